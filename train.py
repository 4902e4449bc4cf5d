"""How it learns: Observe-R1's GRPO, from settings to checkpoint.

    torchrun train.py --stage all                         # the built-in world, on a laptop
    torchrun train.py --preset 3b --data ladder/          # Qwen2.5-VL-3B on a ladder of your own
    torchrun --nproc-per-node 8 train.py --preset 7b --data ladder/

The loop, for each batch of P problems of the ladder:

    sample   G responses o_1 .. o_G to each prompt q                                   rollout.py
    reward   r_i = accuracy_i + 0.5 format_i + bonus_i                                 rewards.py
    weight   adv_i = w(d) (r_i - mean r) / (std r + eps),  w(d) = 4 sigma d (1 - d)    rewards.py
    update   L = - sum_i sum_t min(ratio adv_i, clip(ratio, 1 - eps, 1 + eps) adv_i) / tokens
    log      every quantity of the README's glossary, to metrics.jsonl

Departures from the official code (arXiv 2505.12432, GitHub zrguo/Observe-R1), each with its reason; those of rewards
and curriculum stand at the head of their own files:
  1. The loss is the mean over all tokens of an update; the official one is the mean over micro-batches of 2 responses,
     so that its gradient depends on the split.
  2. No KL term (kl_coef 0); the official script leaves its framework's 0.01 on, inside the reward, where the paper has
     none. Set, ours is the k3 estimator in the loss.
  3. A group without signal (weight 0, or equal rewards) is not forwarded and its tokens are not counted; the official
     code forwards it with weight 0, which shrinks the step of the others. --count-no-signal restores the count.
  4. The responses of a group stay together in one update; the official code scatters them over the 16 of a rollout.
  5. --order says the order; the official --shuffle switches shuffling off.
  6. The logged reward is the reward used; the official log leaves the bonus out.
  7. "Old" log-probs are the trainer's own, in the packing of the update; in the first update of a rollout they are
     the policy's very own, nothing is computed, and ratio is 1.

With several processes each takes a share of the prompts and of the weights (FSDP2), and the run is the same: see "many
GPUs" below. It may be stopped or killed at any moment and goes on with --resume, to the bit: see "checkpoints".

Shapes: P prompts, G responses of a group, N rows (responses), T response tokens.
"""
from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, HfArgumentParser
from transformers import logging as hf_logging

from curriculum import Curriculum
from data import Processor, Prompt, Record, check_prompts, load_records
from eval import (
    TECHNICAL,
    Result,
    before_after,
    check_same,
    data_digest,
    evaluate,
    place,
    plot_curves,
    plot_strip,
    summarize,
    together,
    write_json,
    write_page,
)
from rewards import VERIFIER, Rewards, check_golds, group_rewards, score_groups
from rollout import (
    Group,
    Packed,
    best_device,
    device_of,
    generation_config,
    load_policy,
    response_logprobs,
    sample_groups,
)

HERE = Path(__file__).resolve().parent


# --- settings ---------------------------------------------------------------------------------------------------------


def setting(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting of a run. Defaults are the paper's, except where a preset says otherwise."""

    preset: Literal["toy", "3b", "7b"] = setting("toy", "row of the table PRESETS; options given beside it prevail")
    model: str = setting("", "policy to start from: Hugging Face folder or hub id")
    data: str = setting("", "training problems: ladder folder, Parquet, JSONL, ... or hub id")
    test: str = setting("", "held-out problems, evaluated before, at each stage's end and after; empty: none")
    out: str = setting("", "folder of the run (default: out/<preset>-<order>-<prompt>-seed<seed>)")
    resume: bool = setting(False, "go on with the run in --out from its newest checkpoint")
    skip_bad: bool = setting(False, "leave out records that cannot be used, instead of stopping")

    # in what order
    stage: str = setting("all", "rungs of the ladder to train on: all, one (3) or a range (0-3)")
    order: Literal["ladder", "sorted", "random", "reverse"] = setting(
        "ladder", "of the problems; unmeasured data has only random")

    # sample
    prompt: Literal["none", "think", "observe"] = setting("observe", "prompt style and the format it asks for")
    group_size: int = setting(8, "G, responses to a prompt")
    prompts_per_rollout: int = setting(128, "P, prompts sampled before the policy is updated")
    temperature: float = setting(1.0, "of sampling, and of the log-probs in the loss")
    max_prompt_tokens: int = setting(9216, "a longer prompt is refused, never cut")
    max_response_tokens: int = setting(8192, "a response is cut here")
    max_pixels: int = setting(2_560_000, "pictures of a larger area are shrunk to it")
    rollout_rows: int = setting(256, "responses sampled at a time, a group at least; less saves memory")

    # reward and weight
    format_weight: float = setting(0.5, "of the format reward")
    bonus: float = setting(0.2, "to the shortest correct response of a group; 0: off")
    bonus_floor: int = setting(100, "tokens; a shortest correct response at or under it earns no bonus")
    sigma: float = setting(1.8, "of the difficulty weight w(d) = 4 sigma d (1 - d); 0: weight off, all groups count 1")
    normalize_std: bool = setting(True, "divide advantages by the group's standard deviation")
    rejection_sampling: bool = setting(
        False, "a control in place of GRPO: learn from right answers, each counting 1, and from no others")

    # update
    updates_per_rollout: int = setting(16, "optimizer steps a rollout is split into, by prompts")
    clip_low: float = setting(0.2, "ratio is clipped at 1 - clip_low")
    clip_high: float = setting(0.2, "ratio is clipped at 1 + clip_high")
    aggregation: Literal["token", "sequence", "constant"] = setting(
        "token", "loss is a mean over tokens | over sequences of their token means | sum / (N max tokens), Dr. GRPO")
    kl_coef: float = setting(0.0, "of the KL to the starting model (k3); 0: no reference is loaded")
    count_no_signal: bool = setting(False, "count the tokens of groups without signal in the loss's denominator")
    mask_truncated: bool = setting(False, "leave cut-off responses out of the loss")
    freeze_vision: bool = setting(False, "train the language model only")
    lr: float = setting(1e-6, "peak learning rate of AdamW")
    warmup: float = setting(0.03, "share of the updates over which lr rises")
    schedule: Literal["cosine", "constant"] = setting("cosine", "of lr after the warm-up; cosine falls to 0.1 lr")
    grad_clip: float = setting(1.0, "gradients are scaled to this norm at most")
    gradient_checkpointing: bool = setting(True, "recompute activations in backward, to save memory")
    micro_tokens: int = setting(
        16384, "tokens in one forward and backward; changes memory and speed, not the result")

    offload: bool = setting(False, "keep weights, gradients and moments in the CPU's memory: 3B on one GPU of 24-48 GB")

    # evaluate, save, log
    eval_samples: int = setting(4, "k of avg@k at temperature 1, before and after")
    eval_limit: int = setting(0, "held-out problems answered, greedily, at a stage's end; 0: all")
    save_every: int = setting(0, "steps between checkpoints, besides those at a stage's end; 0: none")
    keep: int = setting(2, "newest checkpoints kept")
    tracker: Literal["none", "tensorboard", "wandb"] = setting("none", "also log there, through accelerate")
    seed: int = setting(0, "of sampling and of the order inside a stage")


# What a preset changes; everything else is the paper's, as Config has it.
PRESETS: dict[str, dict] = {
    "toy": {
        "model": str(HERE / "assets/toy/model"), "data": str(HERE / "assets/toy/ladder"),
        "test": str(HERE / "assets/toy/test.parquet"), "max_pixels": 64 * 28 * 28, "max_prompt_tokens": 256,
        "max_response_tokens": 160, "bonus_floor": 40, "prompts_per_rollout": 16, "updates_per_rollout": 1,
        "lr": 1e-4, "gradient_checkpointing": False, "micro_tokens": 8192},
    "3b": {"model": "Qwen/Qwen2.5-VL-3B-Instruct", "rollout_rows": 64, "save_every": 10},
    "7b": {"model": "Qwen/Qwen2.5-VL-7B-Instruct", "rollout_rows": 32, "save_every": 10},
}


def parse_config(args: list[str] | None = None) -> Config:
    """Command line -> Config: the paper's defaults, then the preset's, then what is given. Unknown options exit."""
    args = sys.argv[1:] if args is None else args
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # the preset, whose settings become defaults
    first.add_argument("--preset", choices=PRESETS, default="toy")
    parser = HfArgumentParser(Config, allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.set_defaults(**PRESETS[first.parse_known_args(args)[0].preset])
    _, unknown = parser.parse_known_args(args)
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}; --help lists every option")
    [cfg] = parser.parse_args_into_dataclasses(args, look_for_args_file=False)
    cfg.out = cfg.out or f"out/{cfg.preset}-{cfg.order}-{cfg.prompt}-seed{cfg.seed}"
    check_config(cfg)
    return cfg


def as_kept(cfg: Config) -> dict:
    """The settings as config.json has them: what lies in this repository by its place there, for a run goes on, and is
    compared with others, in another clone too."""
    settings = asdict(cfg) | {"resume": False}
    inside = {name: Path(settings[name]) for name in ("model", "data", "test") if Path(settings[name]).is_absolute()}
    return settings | {name: str(path.relative_to(HERE)) for name, path in inside.items() if path.is_relative_to(HERE)}


def check_config(cfg: Config) -> None:
    """Raise ValueError, naming option and remedy, for settings that cannot be meant."""
    if cfg.group_size < 2:
        raise ValueError(f"--group-size {cfg.group_size}: advantages compare the responses of a group; take 2 or more")
    if cfg.prompts_per_rollout % cfg.updates_per_rollout:
        raise ValueError(f"--prompts-per-rollout {cfg.prompts_per_rollout} does not divide into --updates-per-rollout "
                         f"{cfg.updates_per_rollout} updates")
    if not cfg.model or not cfg.data:
        raise ValueError(f"preset {cfg.preset} needs --data: a ladder built by curriculum.py, or any data with "
                         "--order random")
    for name in ("temperature", "lr", "micro_tokens", "prompts_per_rollout", "updates_per_rollout", "rollout_rows",
                 "max_response_tokens", "max_prompt_tokens", "max_pixels", "grad_clip", "keep", "eval_samples"):
        if not 0 < getattr(cfg, name) < math.inf:  # (nan is neither)
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be above 0 and finite")
    if cfg.rollout_rows < cfg.group_size:
        raise ValueError(f"--rollout-rows {cfg.rollout_rows} is below --group-size {cfg.group_size}: a group is "
                         "sampled together")
    for name in ("format_weight", "bonus", "sigma", "kl_coef", "clip_high", "save_every", "eval_limit"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be finite and not negative")
    for name in ("clip_low", "warmup"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must lie between 0 and 1")
    if cfg.tracker != "none" and importlib.util.find_spec(cfg.tracker) is None:
        raise ValueError(f"--tracker {cfg.tracker}: pip install {cfg.tracker} first")
    parse_stages(cfg.stage)


def parse_stages(text: str) -> range | None:
    """`all` -> None, `3` -> range(3, 4), `0-3` -> range(0, 4). Raises ValueError otherwise."""
    if text == "all":
        return None
    found = re.fullmatch(r"([0-8])(?:-([0-8]))?", text)
    stages = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not stages:
        raise ValueError(f"--stage {text}: must be all, a stage from 0 to 8, or a range such as 0-3")
    return stages


# --- the loss ---------------------------------------------------------------------------------------------------------


def grpo_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
              num_tokens: int | None = None, num_sequences: int | None = None, *, clip_low: float = 0.2,
              clip_high: float = 0.2, aggregation: str = "token", max_tokens: int | None = None,
              ref_logprobs: torch.Tensor | None = None, kl_coef: float = 0.0,
              ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped GRPO loss of N responses (method.md, 1).

    logprobs, old_logprobs, mask (and ref_logprobs) [N, T], advantages [N] already weighted. num_tokens and
    num_sequences count the whole update, of which these rows may be a micro-batch: losses of micro-batches then add up
    to the update's. Statistics are sums over tokens, and add up too. aggregation `constant` divides by
    num_sequences * max_tokens.
    """
    mask = mask.to(logprobs.dtype)
    num_tokens = max(1, mask.sum().item() if num_tokens is None else num_tokens)
    num_sequences = max(1, len(mask) if num_sequences is None else num_sequences)
    if aggregation == "token":
        share = mask / num_tokens  # [N, T], what a token counts
    elif aggregation == "sequence":
        share = mask / mask.sum(1, keepdim=True).clamp(min=1) / num_sequences
    else:
        share = mask / (num_sequences * max_tokens)

    log_ratio = (logprobs - old_logprobs) * mask
    ratio = log_ratio.exp()  # pi(o_t) / pi_old(o_t)
    adv = advantages[:, None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -(torch.min(ratio * adv, clipped * adv) * share).sum()
    stats = {
        "ratio": (ratio.detach() * mask).sum(),
        "clip_low": ((ratio < 1 - clip_low) * (adv < 0) * mask).sum(),
        "clip_high": ((ratio > 1 + clip_high) * (adv > 0) * mask).sum(),
        "approx_kl": ((ratio.detach() - 1 - log_ratio.detach()) * mask).sum(),  # k3 of old to new
    }
    if ref_logprobs is not None:
        log_ref = (ref_logprobs - logprobs) * mask
        k3 = log_ref.exp() - 1 - log_ref  # KL(pi || pi_ref), unbiased and never negative
        loss = loss + kl_coef * (k3 * share).sum()
        stats["ref_kl"] = (k3.detach() * mask).sum()
    return loss, stats


# --- one update -------------------------------------------------------------------------------------------------------


@dataclass
class Row(Packed):
    """A packed row on its way through the loss: some responses of one group, beside their prompt."""

    advantages: list[float]
    sampled: list[torch.Tensor]  # [T] each, the sampler's log-probs
    old: list[torch.Tensor] | None = None  # [T] each, the policy's log-probs at sampling time; None: its present ones
    counted: bool = True  # False: fills up a rank's micro-batches, and is nothing to the loss


def pack_group(group: Group, advantages: list[float], kept: list[int], budget: int) -> list[Row]:
    """The kept responses of a group, in rows of at most budget tokens, but one response at least."""
    rows: list[Row] = []
    for g in kept:
        if not rows or len(rows[-1]) + len(group.responses[g]) > budget:
            rows.append(Row(group.prompt, [], [], []))
        rows[-1].responses.append(group.responses[g])
        rows[-1].advantages.append(advantages[g])
        rows[-1].sampled.append(group.logprobs[g])
    return rows


def micro_batches(rows: list[Row], budget: int) -> list[list[Row]]:
    """Rows of like length together, as many as come, padded, to at most budget tokens, but one at least."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=len, reverse=True):  # the longest first: too little memory shows at once
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0]) > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def even_out(parts: list[list[list[Row]]], processor: Processor, cfg: Config) -> list[Prompt | None]:
    """Give each rank as many micro-batches of each update as the rank with the most has, for a sharded model's ranks
    must make the same calls -> for each update a prompt whose picture runs where rows have none; None: nobody has any.
    """
    load = torch.tensor([[len(micros), any(row.prompt.grid is not None for micro in micros for row in micro)]
                         for micros in parts])
    dist.all_reduce(load, dist.ReduceOp.MAX)
    blanks = [processor.encode(Record("blank", "?", "1", images=pictures), cfg.prompt)
              for pictures in ((), (Image.new("RGB", (28, 28)),))]
    for micros, (count, pictured) in zip(parts, load.tolist()):
        micros += [[Row(blanks[pictured], [processor.stop_ids[:1]], [0.0], [torch.zeros(1)], counted=False)]
                   for _ in range(count - len(micros))]
    return [blanks[1] if pictured else None for _, pictured in load.tolist()]


def update(model, reference, processor: Processor, optimizer, groups: list[Group], rewards: Rewards, lrs: list[float],
           cfg: Config) -> dict[str, float]:
    """len(lrs) optimizer steps on one rollout, each on its share of the prompts -> statistics, means over the steps.

    groups: of all ranks; this one forwards group rank, rank + world, ...  Raises FloatingPointError, on all ranks and
    before the weights change, when the loss is not finite.
    """
    (rank, world), device = place(), device_of(model)
    parts: list[list[list[Row]]] = []  # of each update this rank's micro-batches
    counts: list[tuple[int, int]] = []  # tokens and responses of an update on all ranks, the loss's denominators
    for part in np.array_split(np.arange(len(groups)), len(lrs)):
        rows, tokens, sequences = [], 0, 0
        for p in part:
            group, forwarded = groups[p], bool(rewards.signal[p]) or cfg.kl_coef > 0
            kept = [g for g, cut in enumerate(group.truncated) if not (cut and cfg.mask_truncated)]
            if forwarded and p % world == rank:
                rows += pack_group(group, rewards.advantages[p].tolist(), kept, cfg.micro_tokens)
            if forwarded or cfg.count_no_signal:
                tokens += sum(len(group.responses[g]) for g in kept)
                sequences += len(kept)
        parts.append(micro_batches(rows, cfg.micro_tokens))
        counts.append((tokens, sequences))
    blanks = even_out(parts, processor, cfg) if world > 1 else [None] * len(parts)

    def padded(values: list[list[torch.Tensor]]) -> torch.Tensor:  # rows of [T] -> [N, T]
        return torch.nn.utils.rnn.pad_sequence(sum(values, []), batch_first=True).to(device)

    model.train()
    with torch.no_grad():  # later updates meet a policy that has moved: note its log-probs before the first,
        for micros, blank in zip(parts[1:], blanks[1:]):  # in the packing of the update: another one rounds otherwise
            for micro in micros:
                logprobs, _, mask = response_logprobs(model, processor, micro, cfg.temperature, blank=blank)
                flat = iter([row[keep].cpu() for row, keep in zip(logprobs, mask)])
                for row in micro:
                    row.old = [next(flat) for _ in row.responses]

    total: dict[str, float] = {"updates": 0}
    for micros, blank, (num_tokens, num_sequences), lr in zip(parts, blanks, counts, lrs):
        if not micros:
            continue  # no signal on any rank, no step: Adam's momentum alone would move the weights
        sums: dict[str, torch.Tensor] = {}
        for micro in micros:
            logprobs, entropy, mask = response_logprobs(model, processor, micro, cfg.temperature, blank=blank)  # [N, T]
            counted = torch.tensor([row.counted for row in micro for _ in row.responses], device=device)
            mask = mask & counted[:, None]
            old = logprobs.detach() if micro[0].old is None else padded([row.old for row in micro])
            ref = None
            if reference is not None:
                with torch.no_grad():
                    ref = response_logprobs(reference, processor, micro, cfg.temperature, blank=blank)[0]
            advantages = torch.tensor([a for row in micro for a in row.advantages], device=device)  # [N]
            loss, stats = grpo_loss(
                logprobs, old, advantages, mask, num_tokens, num_sequences, clip_low=cfg.clip_low,
                clip_high=cfg.clip_high, aggregation=cfg.aggregation, max_tokens=cfg.max_response_tokens,
                ref_logprobs=ref, kl_coef=cfg.kl_coef)
            (loss * world).backward()  # (sharded gradients are means over the ranks; the loss is a sum)
            stats |= {"entropy": (entropy * mask).sum(), "loss": loss.detach(), "scored": mask.sum(),
                      "sampler_gap": ((old - padded([row.sampled for row in micro])).abs() * mask).sum()}
            for name, value in stats.items():
                sums[name] = sums.get(name, 0.0) + value.float()
        if world > 1:
            values = torch.stack(list(sums.values()))
            dist.all_reduce(values)
            sums = dict(zip(sums, values))
        if not torch.isfinite(sums["loss"]):
            raise FloatingPointError(f"the loss is {sums['loss'].item()}")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm.item()}")
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        total["updates"] += 1
        scored, loss = sums.pop("scored").item(), sums.pop("loss").item()
        means = {name: value.item() / scored for name, value in sums.items()}
        means |= {"loss": loss, "grad_norm": norm.item(), "lr": lr}
        total |= {name: total.get(name, 0.0) + value for name, value in means.items()}
    return {name: value if name == "updates" else value / total["updates"] for name, value in total.items()}


def learning_rate(update: int, total: int, cfg: Config) -> float:
    """lr of update 0 .. total - 1: linear warm-up, then cosine to a tenth, or constant."""
    warm = math.ceil(cfg.warmup * total)
    if update < warm:
        return cfg.lr * (update + 1) / warm
    if cfg.schedule == "constant":
        return cfg.lr
    done = (update - warm) / max(1, total - warm)
    return cfg.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


# --- many GPUs --------------------------------------------------------------------------------------------------------


def join_processes(cfg: Config) -> torch.device:
    """Meet the other processes of torchrun, where there are any -> this one's device."""
    device = best_device()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    patience = timedelta(hours=6)  # one rank may sample, or save, for long while others wait; the dead end all at once
    if dist.is_initialized():
        return device
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group(backend, timeout=patience)
    elif cfg.offload:  # off-loading is FSDP's, which wants a group, be it of one
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def shard(model, device: torch.device, offload: bool) -> None:
    """FSDP2: each rank keeps 1/world of every weight, gradient and moment in fp32, and gathers a block at a time, in
    bf16 on a GPU, to compute. offload: they lie in the CPU's memory meanwhile."""
    # (Inputs are not cast: rounded rotary angles would make another policy than the replica's.)
    half = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {"mesh": init_device_mesh(device.type, (place()[1],)),
               "mp_policy": half if device.type == "cuda" else MixedPrecisionPolicy(),
               "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()}
    for block in [*model.model.visual.blocks, *model.model.language_model.layers]:
        fully_shard(block, **options)
    fully_shard(model, **options)
    # What is outside of the blocks (embeddings, head, norms) is gathered when this is called.
    model.computes_on, model.inside = device, lambda work: work()
    register_fsdp_forward_method(model, "inside")


def load_models(cfg: Config, source: str, device: torch.device) -> tuple:
    """-> the policy in fp32, in shares where there are several processes; with a KL the model that the run began with,
    to hold the policy near it; a plain replica of the policy to sample with (on one CPU the policy itself); AdamW."""
    sharded, half = place()[1] > 1 or cfg.offload, torch.bfloat16 if device.type == "cuda" else torch.float32

    def ready(policy):  # each is shared out before the next is loaded: together, whole, they may be too much
        if sharded:
            shard(policy, device, cfg.offload)
        return policy

    home = {"device": "cpu" if sharded else device, "computes_on": device}
    model = ready(load_policy(source, **home, freeze_vision=cfg.freeze_vision,
                              gradient_checkpointing=cfg.gradient_checkpointing))
    reference = None
    if cfg.kl_coef > 0:
        reference = ready(load_policy(cfg.model, **home, dtype=half).requires_grad_(False).eval())
    sampler = model
    if sharded or device.type == "cuda":
        sampler = load_policy(source, device, dtype=half).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=device.type == "cuda" and not cfg.offload)
    return model, reference, sampler, optimizer


def whole(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded; every rank must ask."""
    if not isinstance(value, DTensor):
        return value
    return value.to(value.device_mesh.device_type).full_tensor()


@torch.no_grad()
def refresh(sampler, model) -> None:
    """Copy the policy's weights into the replica that samples, which is a plain model: generating with the sharded one
    would gather every layer for every token."""
    if sampler is not model:
        for copy, weight in zip(sampler.parameters(), model.parameters(), strict=True):
            copy.copy_(whole(weight.to(copy.dtype)))


def memory(config, cfg: Config, processes: int) -> dict[str, float]:
    """GB (1e9 bytes) of a GPU's memory that a run takes at its limits, every prompt and response as long as it may be.

    config: the model's. Counted from its real shapes on the meta device; activations by what a layer keeps for its
    backward pass (README, "Memory"). "peak" is the larger of two moments that do not meet: sampling, and forward and
    backward (the fused AdamW's step takes nothing more).
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    text, vision = config.text_config, config.vision_config
    blocks = [sum(p.numel() for p in block.parameters())
              for block in [*model.model.visual.blocks, *model.model.language_model.layers]]
    n, sharded = sum(p.numel() for p in model.parameters()), processes > 1 or cfg.offload
    outside = n - sum(blocks)  # embeddings, head, norms
    kept = 0 if cfg.offload else n / processes
    length = cfg.max_prompt_tokens + cfg.max_response_tokens
    tokens = max(length, cfg.micro_tokens)
    patches = cfg.max_prompt_tokens * vision.spatial_merge_size**2  # a prompt that is all picture
    stream = 2 if sharded else 4  # bytes of the residual stream: fp32 under autocast
    width = getattr(vision, "embed_dim", vision.hidden_size)  # (Qwen2-VL's hidden_size is the language model's)
    mlp = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers = (tokens * (30 * text.hidden_size + 12 * text.intermediate_size),  # one, from its forward to its backward
              patches * (30 * width + 12 * mlp))

    gb = {
        "weights": 4 * kept, "gradients": 4 * kept, "moments": 8 * kept, "replica": 2 * n,
        "reference": 2 * n / processes * (cfg.kl_coef > 0),
        # fp32 weights are cast to bf16 whole; sharded ones are gathered in bf16: what is outside of the blocks, with
        # its gradient and that in fp32 on its way to the other ranks, and two blocks.
        "compute copies": (8 + 2 * (cfg.kl_coef > 0)) * outside + 10 * max(blocks) if sharded else 2 * n,
        "cache": 4 * cfg.rollout_rows * length * text.num_hidden_layers * text.num_key_value_heads
        * head,
        "activations": stream * (tokens * text.hidden_size * text.num_hidden_layers + patches * width * vision.depth)
        + (max(layers) if cfg.gradient_checkpointing else layers[0] * text.num_hidden_layers + layers[1] * vision.depth)
        + 3 * tokens**2 + 24 * 1024 * text.vocab_size}  # the mask, and one chunk of logits
    held = gb["weights"] + gb["moments"] + gb["replica"] + gb["reference"]
    gb["peak"] = held + max(
        gb["cache"] + 34 * cfg.rollout_rows * text.vocab_size,  # logits, and their sum in float64 to draw from
        gb["gradients"] + gb["compute copies"] + gb["activations"])
    return {name: value / 1e9 for name, value in gb.items()}


def everyones(share: list) -> list:
    """Each rank's share [rank::world] of a list -> the whole list, on all ranks."""
    _, world = place()
    shares = [share] * world
    if world > 1:
        dist.all_gather_object(shares, share)
    return [shares[i % world][i // world] for i in range(sum(map(len, shares)))]


# --- checkpoints ------------------------------------------------------------------------------------------------------

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{6,}", path.name))


def save_checkpoint(run: Path, step: int, model, sampler, processor: Processor, optimizer, state: dict) -> None:
    """Write run/checkpoint-<step>: a plain Hugging Face folder, and trainer/ beside it. Whole or not at all.

    All ranks call it; rank 0 gathers, one tensor after the other into its CPU memory, and writes. Written aside, forced
    to disk, then renamed; trainer/sha256.json tells later whether it still is what was written. Raises OSError, naming
    what is left and what to do, when it cannot be written.
    """
    path, aside, chief = run / f"checkpoint-{step:06d}", run / "checkpoint.partial", place()[0] == 0

    def gather(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        full = ((name, whole(value.detach())) for name, value in tensors.items())
        return {name: value.cpu().contiguous() for name, value in full if chief}

    try:
        if chief:
            shutil.rmtree(aside, ignore_errors=True)
        weights = gather(dict(model.named_parameters()))
        if chief:
            sampler.save_pretrained(aside, state_dict=weights)
            processor.tokenizer.save_pretrained(aside)
            processor.image_processor.save_pretrained(aside)
            (aside / "trainer").mkdir()
        del weights
        moments = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
        for kind in MOMENTS:  # (one after the other: all at once would take twice the memory)
            values = gather({name: moment[kind] for name, moment in moments.items()})
            if chief:
                save_file(values, aside / "trainer" / f"{kind}.safetensors")
            del values
        if chief:
            (aside / "trainer" / "state.json").write_text(json.dumps(state, indent=1))
            names = [str(file.relative_to(aside)) for file in sorted(aside.rglob("*")) if file.is_file()]
            write_json(aside / "trainer" / "sha256.json", digests(aside, names))
            for folder in (aside / "trainer", aside):
                sync(folder)
            os.replace(aside, path)
            sync(run)
    except Exception as error:  # (safetensors has errors of its own for a full disk)
        if not chief:
            raise
        shutil.rmtree(aside, ignore_errors=True)
        left, free = checkpoints(run), shutil.disk_usage(run).free / 1e9
        raise OSError(f"{path} could not be saved: {error} ({free:.2f} GB are free). The checkpoints before it are "
                      f"whole, the newest is {left[-1].name if left else 'none'}. Make room, or lower --keep, then go "
                      "on with --resume") from error


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def digests(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of files, each forced to disk first; several at a time, for 3B's are 45 GB."""
    def digest(name: str) -> str:
        sync(folder / name)
        with open(folder / name, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(digest, names)))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None: every byte is what was written."""
    try:
        written = json.loads((path / "trainer" / "sha256.json").read_text())
        found = digests(path, list(written))
    except (OSError, ValueError) as error:
        return str(error)
    return next((f"{name} is not what was written" for name in written if found[name] != written[name]), None)


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint that is whole, None where there are none at all; damaged ones are set aside, and said so.

    Raises ValueError when all are damaged.
    """
    damaged = []
    for path in reversed(checkpoints(run)):
        fault = damage(path)
        if fault is None:
            for bad in damaged:
                aside = run / bad.name.replace("checkpoint", "damaged")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(bad, aside)
            return path
        tqdm.write(f"{path} is damaged: {fault}; taking the one before it")
        damaged.append(path)
    if damaged:
        raise ValueError(f"--resume: no checkpoint of {run} is whole; bring one back from a copy, or start again with "
                         "another --out")
    return None


def mark_best_and_prune(run: Path, evals: dict[int, float], keep: int) -> None:
    """Name the checkpoint of highest held-out accuracy (the earliest, of equals) in best.json; delete all but this and
    the newest `keep`. evals: step -> greedy accuracy."""
    there = {int(path.name.split("-")[1]): path for path in checkpoints(run)}
    scored = [step for step in there if step > 0 and step in evals]
    best = max(scored, key=lambda step: (evals[step], -step), default=None)
    if best is not None:
        write_json(run / "best.json", {"checkpoint": there[best].name, "accuracy": evals[best]})
    for step in sorted(there)[:-keep]:
        if step != best:
            shutil.rmtree(there[step])


def load_optimizer(path: Path, model, optimizer) -> None:
    """Put AdamW's moments, saved by save_checkpoint, back: of each this rank's shard, however many there were."""
    parameters, fused = dict(model.named_parameters()), optimizer.param_groups[0]["fused"]
    for kind in MOMENTS:
        with safe_open(path / "trainer" / f"{kind}.safetensors", "pt") as file:
            for name in file.keys():
                p, value = parameters[name], file.get_tensor(name)
                if kind != "step" and isinstance(p, DTensor):  # this rank's rows alone, to where the weight's lie
                    (rank, world), full, value = place(), value, torch.empty_like(p)
                    rows = -(-len(full) // world)
                    value.to_local().copy_(full[rank * rows:(rank + 1) * rows])
                elif kind != "step" or fused:  # (the count of steps is wanted on the CPU, unless AdamW is fused)
                    value = value.to(p.device)
                optimizer.state[p][kind] = value


def cut_log(path: Path, last_step: int) -> list[dict]:
    """Lines of a log up to last_step; later ones, and what a killed process left of a line, are cut off the file.

    Raises ValueError for a log that ends before last_step, the newest checkpoint's: it is another run's.
    """
    lines, size = [], 0
    with open(path, "a+b") as file:
        file.seek(0)
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                break
            if line["step"] > last_step or not text.endswith(b"\n"):
                break
            lines.append(line)
            size += len(text)
        if last_step > 0 and (not lines or lines[-1]["step"] < last_step):
            raise ValueError(f"{path} ends before step {last_step}, whose checkpoint lies beside it; restore the log, "
                             "or start a new run with another --out")
        file.truncate(size)
    return lines


class Journal:
    """A run's folder: its two logs, which are held in memory too, its checkpoints, and the pictures drawn of them.

    All ranks hold one and call its methods together; rank 0 writes.
    """

    def __init__(self, cfg: Config, train: list[Record], test: list[Record], saved: int):
        """saved: the newest checkpoint's step, -1 where there is none. Rank 0's logs are cut back to it, so that no
        step stands twice; the starting model's scores stay good."""
        self.run, self.keep, self.train, self.test = Path(cfg.out), cfg.keep, train, test
        self.always = [r.id for r in test[:cfg.eval_limit or None]]  # the problems that every evaluation answers
        self.saved, self.writes = saved, place()[0] == 0
        self.logs = together(lambda: {name: cut_log(self.run / name, max(saved, 0))
                                      for name in ("metrics.jsonl", "responses.jsonl")})

    def log(self, name: str, line: dict) -> None:
        self.logs[name].append(line)
        if self.writes:
            with open(self.run / name, "a") as file:
                file.write(json.dumps(line) + "\n")

    def evals(self) -> dict[int, dict[str, dict]]:
        """Held-out scores by step."""
        return {line["step"]: line["eval"] for line in self.logs["metrics.jsonl"] if "eval" in line}

    def prune(self) -> None:
        if self.writes:
            mark_best_and_prune(self.run, {
                step: sum(scores["greedy"]["by_problem"][i] for i in self.always) / len(self.always)
                for step, scores in self.evals().items()}, self.keep)

    def save(self, step: int, model, sampler, processor: Processor, optimizer, state: dict) -> None:
        """A checkpoint, unless the newest is of this step."""
        if step > self.saved:
            for name in self.logs if self.writes else ():  # the log reaches the disk before its checkpoint
                sync(self.run / name)
            save_checkpoint(self.run, step, model, sampler, processor, optimizer, state)
            self.saved = step
            self.prune()

    def draw(self) -> None:
        if self.writes:
            plot_curves(self.logs["metrics.jsonl"], self.run / "curves.png")
            plot_strip(self.logs["metrics.jsonl"], {r.id: r for r in self.test}, self.run / "strip.png")
            write_page(self.logs["responses.jsonl"], {r.id: r for r in self.train}, self.run / "responses.html",
                       title=str(self.run))


def environment() -> dict:
    """Where the run's numbers come from: commit, versions, machine."""
    def git(*args: str) -> str | None:
        try:
            command = ["git", "-C", str(HERE), *args]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None  # not a checkout, or no git

    packages = ("torch", "transformers", "accelerate", "pillow", "numpy", "datasets", "math-verify", "flash-attn")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    changes = git("status", "--porcelain", "--", "*.py")
    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {"commit": git("rev-parse", "HEAD"), "uncommitted": None if changes is None else bool(changes),
            "python": platform.python_version(), "device": device, "packages": versions, "command": sys.argv}


# --- the run ----------------------------------------------------------------------------------------------------------

# Settings that may differ on --resume. (Folders may have moved; data_digest tells whether the problems are the same.)
FREE = ("resume", "out", "data", "test", *TECHNICAL)


def lock(run: Path):
    """The file that a training process holds; ValueError when another one does."""
    file = open(run / "lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{run}: another process is training there; end it, or wait for it") from None
    return file


def find_run(cfg: Config, held: list) -> Path | None:
    """The checkpoint to resume from, or None for a run that is new, or that died before its first.

    Raises ValueError when the folder holds another run, when --resume finds other settings than the run began with, or
    when all of its checkpoints are damaged. held: gets the lock of a run that is there, before they are looked at.
    """
    run = Path(cfg.out)
    if not (run / "config.json").exists():
        if cfg.resume:
            raise ValueError(f"--resume: {run} holds no run; check --out")
        if run.exists() and any(path.name != "lock" and path.name[0] != "." for path in run.iterdir()):
            raise ValueError(f"{run} is not empty; choose another --out")
        return None
    if not cfg.resume:
        raise ValueError(f"{run} holds another run; add --resume to go on with it, or choose another --out")
    before, now = ({k: v for k, v in settings.items() if k not in FREE}
                   for settings in (json.loads((run / "config.json").read_text()), as_kept(cfg)))
    check_same(run, "a run", before, now)
    held.append(lock(run))
    return newest_whole(run)


def load_problems(cfg: Config, processor: Processor) -> tuple[list[Record], list[Record]]:
    """Training and held-out problems, every one checked before hours are spent: gold, pictures, prompt length."""
    def load(path: str) -> list[Record]:
        records = load_records(path, skip_bad=cfg.skip_bad)
        good = together(lambda: {r.id for r in check_prompts(
            processor, check_golds(records, cfg.skip_bad), cfg.prompt, cfg.max_prompt_tokens, cfg.skip_bad)})
        return [r for r in records if r.id in good]

    return load(cfg.data), load(cfg.test) if cfg.test else []


def step_metrics(groups: list[Group], rewards: Rewards) -> dict[str, float]:
    """What one rollout was like; each name is defined in the README's glossary."""
    lengths = torch.tensor([[len(r) for r in g.responses] for g in groups]).float()  # [P, G]
    correct = rewards.accuracy.sum(1)
    observed = rewards.observation[~rewards.observation.isnan()]
    metrics = {
        "reward": rewards.total.mean(), "accuracy": rewards.accuracy.mean(), "format": rewards.format.mean(),
        "bonus": (rewards.bonus > 0).float().mean(), "all_right": (correct == lengths.shape[1]).float().mean(),
        "all_wrong": (correct == 0).float().mean(), "signal": rewards.signal.float().mean(),
        "weight": rewards.weight.mean(), "advantage_std": rewards.advantages.std(), "length": lengths.mean(),
        "length_max": lengths.max(), "truncated": torch.tensor([g.truncated for g in groups]).float().mean()}
    metrics = {name: value.item() for name, value in metrics.items()}
    return metrics | ({"observation": observed.mean().item()} if len(observed) else {})


def log_groups(groups: list[Group], rewards: Rewards, step: int, stage: int | None, count: int = 2) -> list[dict]:
    """The first `count` groups of a rollout, as lines of responses.jsonl."""
    return [{"step": step, "stage": stage, "id": group.record.id, "weight": rewards.weight[p].item(), "responses": [
        {"text": text, "answer": rewards.answers[p][g], "accuracy": rewards.accuracy[p, g].item(),
         "format": rewards.format[p, g].item(), "bonus": rewards.bonus[p, g].item(),
         "reward": rewards.total[p, g].item(), "advantage": rewards.advantages[p, g].item(),
         "tokens": len(group.responses[g])} for g, text in enumerate(group.texts)]}
        for p, group in enumerate(groups[:count])]


def warn_first_rollout(metrics: dict[str, float], cfg: Config) -> None:
    """Say what will keep a run from learning, while it is cheap to stop."""
    if metrics["format"] < 0.5:
        tqdm.write(f"warning: only {metrics['format']:.0%} of the first responses have the format of --prompt "
                   f"{cfg.prompt}; groups all wrong or all right carry no format signal. Try an instruction-tuned "
                   "model, or a short supervised start on formatted answers"
                   + (", or --prompt think." if cfg.prompt == "observe" else "."))
    if metrics["signal"] == 0:
        tqdm.write(f"warning: no group of the first rollout has a signal: {metrics['all_right']:.0%} are all right, "
                   f"{metrics['all_wrong']:.0%} all wrong. Try easier or harder stages (--stage), a larger "
                   "--group-size, or another model; read responses.jsonl first.")


class Stop:
    """SIGINT (Ctrl-C) and SIGTERM (torchrun's, a cluster's) ask a run to stop. Sampling is cut short; an update is not,
    so that what is saved then is whole."""

    def __init__(self):
        self.asked = self.at_once = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number: int, frame) -> None:
        if not self.asked and place()[0] == 0:  # (os.write, for print is not to be interrupted by itself)
            os.write(2, b"\nstopping: the step under way is finished or left undone, then all is saved\n")
        self.asked = True
        if self.at_once:
            self.at_once = False
            raise KeyboardInterrupt

    def unless_asked(self, work: Callable):
        """The work's result; None, on all ranks, when any of them is asked to stop before the work is done."""
        result = None
        try:
            self.at_once = True
            result = None if self.asked else work()
            self.at_once = False
        except KeyboardInterrupt:
            pass
        return None if self.asked_of_any() else result

    def asked_of_any(self) -> bool:
        return any(everyones([self.asked]))

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def held_out(sampler, processor: Processor, test: list[Record], cfg: Config, stop: Stop, ends: bool) -> dict | None:
    """Answer the held-out problems greedily and, at the two ends of training, also at temperature 1 -> the line to log;
    None when asked to stop before all are answered. In between the first --eval-limit of them have to do."""
    rank, world = place()
    records = test if ends else test[:cfg.eval_limit or None]
    scores = {}
    for name, temperature, k in (("greedy", 0, 1), ("sampled", 1, cfg.eval_samples))[:2 if ends else 1]:
        share = stop.unless_asked(lambda t=temperature, k=k: [result.samples for result in evaluate(
            sampler, processor, records[rank::world], style=cfg.prompt, temperature=t, samples=k,
            max_tokens=cfg.max_response_tokens, max_rows=cfg.rollout_rows)])
        if share is None:
            return None
        results = [Result(record, s) for record, s in zip(records, everyones(share), strict=True)]
        scores[name] = summarize(results)
        if name == "greedy":
            shown = [{"id": r.record.id, "text": r.samples[0].text, "right": r.samples[0].correct}
                     for r in results[:40]]
    return {"eval": scores, "shown": shown}


def main(args: list[str] | None = None) -> None:
    cfg = parse_config(args)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    device = join_processes(cfg)
    rank, world = place()
    chief = rank == 0  # who writes all there is to write
    say = print if chief else lambda *_: None
    held: list = []  # the lock, as long as main lives
    run, resume_from = Path(cfg.out), together(lambda: find_run(cfg, held))
    source = str(resume_from or cfg.model)
    processor = Processor(source, cfg.max_pixels)
    train, test = load_problems(cfg, processor)
    curriculum = Curriculum(train, cfg.prompts_per_rollout, cfg.order, parse_stages(cfg.stage), cfg.seed)

    model, reference, sampler, optimizer = load_models(cfg, source, device)

    def set_up() -> None:  # only now: bad input leaves no folder in the way of the mended command
        run.mkdir(parents=True, exist_ok=True)
        if not held:
            held.append(lock(run))
        write_json(run / "config.json", as_kept(cfg))
        write_json(run / "environment.json", environment() | {"processes": world})

    together(set_up)
    accelerator = Accelerator(cpu=device.type == "cpu", project_dir=run,
                              log_with=None if cfg.tracker == "none" else cfg.tracker)
    accelerator.init_trackers(run.name, config=asdict(cfg))
    effective = generation_config(processor, temperature=cfg.temperature, max_tokens=cfg.max_response_tokens)
    if chief:
        (run / "generation_config.json").write_text(effective.to_json_string(use_diff=False))
    total_updates = len(curriculum) * cfg.updates_per_rollout
    size = sum(p.numel() for p in model.parameters())
    say(f"{run}: {size / 1e6:.1f}M parameters, {len(train)} problems in {len(curriculum)} rollouts of up to "
        f"{cfg.prompts_per_rollout} x {cfg.group_size} responses, {total_updates} updates; {len(test)} held out; "
        f"{world} process{'es' if world > 1 else ''} on {device.type}")
    if device.type == "cuda":
        say(f"GPU memory, at most (estimate): {memory(model.config, cfg, world)['peak']:.0f} GB; less with shorter "
            "--max-response-tokens, fewer --rollout-rows, fewer --micro-tokens")

    if len(set(everyones([(curriculum.digest(), *(r.id for r in test))]))) > 1:
        raise ValueError(f"{cfg.data} or {cfg.test} is not the same for all processes; give all machines one copy")
    data = together(lambda: {"train": data_digest(train), "test": data_digest(test)})
    if resume_from:
        state = json.loads((resume_from / "trainer" / "state.json").read_text())
        check_same(run, "a run", state["data"], data)
        curriculum.load_state_dict(state["curriculum"])
        load_optimizer(resume_from, model, optimizer)
        say(f"resumed from {resume_from}")
    journal = Journal(cfg, train, test, saved=curriculum.position if resume_from else -1)

    def save() -> None:
        journal.save(curriculum.position, model, sampler, processor, optimizer,
                     {"data": data, "curriculum": curriculum.state_dict()})

    def evaluate_if_due() -> None:
        """Before the first step, at each stage's end and after the last."""
        step, ends = curriculum.position, curriculum.position in (0, len(curriculum))
        if test and step not in journal.evals() and (ends or curriculum.batches[step - 1].ends_stage):
            if line := held_out(sampler, processor, test, cfg, stop, ends):
                journal.log("metrics.jsonl", {"step": step} | line)
                journal.prune()

    stop = Stop()
    evaluate_if_due()
    bar = tqdm(total=len(curriculum), initial=curriculum.position, desc="training", unit="rollout", disable=not chief)
    for batch in curriculum:
        step = curriculum.position

        # 1. Sample G responses to each of P prompts, of which this rank takes its share.
        t0 = time.perf_counter()
        share = batch.records[rank::world]
        prompts = [processor.encode(r, cfg.prompt) for r in share]
        groups = stop.unless_asked(lambda r=share, p=prompts, n=step: sample_groups(
            sampler, processor, r, p, samples=cfg.group_size, temperature=cfg.temperature,
            max_tokens=cfg.max_response_tokens, seed=cfg.seed * 1_000_003 + n, max_rows=cfg.rollout_rows))
        if groups is None:  # the policy is still what it was after the step before
            curriculum.position -= 1
            break

        # 2. Reward and weight them.
        t1 = time.perf_counter()
        scores = everyones(score_groups([g.texts for g in groups], share, cfg.prompt))
        # Of the others' groups the rank learns what was said, and not what it was computed from.
        others = everyones([replace(g, record=None, prompt=None, logprobs=None) for g in groups])
        groups = [groups[p // world] if p % world == rank else replace(group, record=batch.records[p])
                  for p, group in enumerate(others)]
        lengths = torch.tensor([[len(r) for r in g.responses] for g in groups])  # [P, G]
        rewards = group_rewards(scores, lengths, format_weight=cfg.format_weight, bonus_coef=cfg.bonus,
                                bonus_min_length=cfg.bonus_floor, sigma=cfg.sigma or None,
                                normalize_std=cfg.normalize_std, rejection_sampling=cfg.rejection_sampling)
        metrics = {"step": step, "stage": batch.stage} | step_metrics(groups, rewards)
        for line in log_groups(groups, rewards, step, batch.stage):
            journal.log("responses.jsonl", line)
        if step == 1 and chief:
            warn_first_rollout(metrics, cfg)

        # 3. Update the policy, and with it what samples.
        t2 = time.perf_counter()
        done = (step - 1) * cfg.updates_per_rollout
        lrs = [learning_rate(done + i, total_updates, cfg) for i in range(cfg.updates_per_rollout)]
        try:
            stats = update(model, reference, processor, optimizer, groups, rewards, lrs, cfg)
        except FloatingPointError as error:
            raise SystemExit(f"step {step}: {error}. Its problems: {', '.join(r.id for r in batch.records)}. "
                             f"The newest whole checkpoint is {(checkpoints(run) or ['none'])[-1]}; "
                             "try a lower --lr or --grad-clip from there in a new run.") from error
        refresh(sampler, model)

        # 4. Log.
        t3 = time.perf_counter()
        metrics |= stats | {"verifier_timeouts": sum(everyones([VERIFIER.timeouts])),
                            "tokens_per_second": lengths.sum().item() / (t3 - t0), "seconds_rollout": t1 - t0,
                            "seconds_reward": t2 - t1, "seconds_update": t3 - t2}
        if device.type == "cuda":
            metrics["memory"] = max(everyones([torch.cuda.max_memory_allocated() / 1e9]))
        journal.log("metrics.jsonl", metrics)
        accelerator.log({k: v for k, v in metrics.items() if isinstance(v, (int, float))}, step=step)
        bar.update()
        bar.set_postfix(stage=batch.stage, reward=f"{metrics['reward']:.2f}", accuracy=f"{metrics['accuracy']:.2f}",
                        length=f"{metrics['length']:.0f}")

        # 5. Save; at the end of a stage, evaluate.
        if batch.ends_stage or (cfg.save_every and step % cfg.save_every == 0):
            save()
        evaluate_if_due()
        if curriculum.position == journal.saved < len(curriculum):
            journal.draw()
        if stop.asked_of_any():
            break
    bar.close()
    save()
    journal.prune()  # (a run that was killed between an evaluation and this)
    journal.draw()
    stop.close()
    if curriculum.position < len(curriculum) or (test and len(curriculum) not in journal.evals()):
        say(f"stopped after step {curriculum.position}, saved; the same command with --resume goes on")
    else:
        if test:
            before, after = journal.evals()[0], journal.evals()[len(curriculum)]
            say("\n" + before_after(before, after))
            together(lambda: write_json(run / "scores.json", {"before": before, "after": after}))
        say(f"\nthe run lies in {run}: curves.png, responses.html, metrics.jsonl, "
            f"{together(lambda: checkpoints(run)[-1].name)} (a Hugging Face folder)")
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # what the user can mend: one line, not a stack
        sys.exit(f"error: {error}")
