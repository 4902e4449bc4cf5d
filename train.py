"""How it learns: Observe-R1's GRPO, from settings to checkpoint.

    torchrun train.py --stage all                         # the built-in world, on a laptop
    torchrun train.py --preset 3b --data ladder/          # Qwen2.5-VL-3B on a ladder of your own

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

Shapes: P prompts, G responses of a group, N rows (responses), T response tokens.
"""
from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers import logging as hf_logging

from curriculum import Curriculum
from data import Processor, Record, check_prompts, load_records
from eval import before_after, evaluate, plot_curves, summarize, write_page
from rewards import VERIFIER, Rewards, check_golds, group_rewards
from rollout import Group, Packed, best_device, generation_config, load_policy, response_logprobs, sample_groups

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
    rollout_rows: int = setting(256, "responses sampled at a time; less saves memory")

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
    "3b": {"model": "Qwen/Qwen2.5-VL-3B-Instruct", "rollout_rows": 128, "save_every": 10},
    "7b": {"model": "Qwen/Qwen2.5-VL-7B-Instruct", "rollout_rows": 64, "save_every": 10},
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
    try:
        first, last = (text.split("-") * 2)[:2] if "-" not in text else text.split("-")
        stages = range(int(first), int(last) + 1)
    except ValueError:
        stages = range(0)
    if not stages or stages[-1] > 8:
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


def update(model, reference, processor: Processor, optimizer, groups: list[Group], rewards: Rewards, lrs: list[float],
           cfg: Config) -> dict[str, float]:
    """len(lrs) optimizer steps on one rollout, each on its share of the prompts -> statistics, means over the steps.

    Raises FloatingPointError, before the weights change, when the loss is not finite.
    """
    parts: list[list[list[Row]]] = []  # of each update its micro-batches
    counts: list[tuple[int, int]] = []  # tokens and responses of an update, the loss's denominators
    for part in np.array_split(np.arange(len(groups)), len(lrs)):
        rows, tokens, sequences = [], 0, 0
        for p in part:
            group, forwarded = groups[p], bool(rewards.signal[p]) or cfg.kl_coef > 0
            kept = [g for g, cut in enumerate(group.truncated) if not (cut and cfg.mask_truncated)]
            if forwarded:
                rows += pack_group(group, rewards.advantages[p].tolist(), kept, cfg.micro_tokens)
            if forwarded or cfg.count_no_signal:
                tokens += sum(len(group.responses[g]) for g in kept)
                sequences += len(kept)
        parts.append(micro_batches(rows, cfg.micro_tokens))
        counts.append((tokens, sequences))

    def padded(values: list[list[torch.Tensor]]) -> torch.Tensor:  # rows of [T] -> [N, T]
        return torch.nn.utils.rnn.pad_sequence(sum(values, []), batch_first=True).to(model.device)

    model.train()
    with torch.no_grad():  # later updates meet a policy that has moved: note its log-probs before the first,
        for micro in sum(parts[1:], []):  # in the packing of the update, for in bf16 another one rounds otherwise
            logprobs, _, mask = response_logprobs(model, processor, micro, cfg.temperature)
            flat = iter([row[keep].cpu() for row, keep in zip(logprobs, mask)])
            for row in micro:
                row.old = [next(flat) for _ in row.responses]

    total: dict[str, float] = {"updates": 0}
    for micros, (num_tokens, num_sequences), lr in zip(parts, counts, lrs):
        if not micros:
            continue  # no signal, no step: Adam's momentum alone would move the weights
        scored = sum(len(r) for micro in micros for row in micro for r in row.responses)
        sums: dict[str, torch.Tensor] = {}
        for micro in micros:
            logprobs, entropy, mask = response_logprobs(model, processor, micro, cfg.temperature)  # [N, T]
            old = logprobs.detach() if micro[0].old is None else padded([row.old for row in micro])
            ref = None
            if reference is not None:
                with torch.no_grad():
                    ref = response_logprobs(reference, processor, micro, cfg.temperature)[0]
            advantages = torch.tensor([a for row in micro for a in row.advantages], device=model.device)  # [N]
            loss, stats = grpo_loss(
                logprobs, old, advantages, mask, num_tokens, num_sequences, clip_low=cfg.clip_low,
                clip_high=cfg.clip_high, aggregation=cfg.aggregation, max_tokens=cfg.max_response_tokens,
                ref_logprobs=ref, kl_coef=cfg.kl_coef)
            loss.backward()
            stats |= {"entropy": (entropy * mask).sum(), "loss": loss.detach() * scored,
                      "sampler_gap": ((old - padded([row.sampled for row in micro])).abs() * mask).sum()}
            for name, value in stats.items():
                sums[name] = sums.get(name, 0.0) + value
        if not torch.isfinite(sums["loss"]):
            raise FloatingPointError(f"the loss is {sums['loss'].item()}")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm.item()}")
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        total["updates"] += 1
        means = {name: value.item() / scored for name, value in sums.items()} | {"grad_norm": norm.item(), "lr": lr}
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


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_checkpoint(run: Path, model, processor: Processor, optimizer, state: dict, keep: int) -> Path:
    """Write run/checkpoint-<step>: a plain Hugging Face folder, and trainer/ beside it. Whole or not at all."""
    path, aside = run / f"checkpoint-{state['step']:06d}", run / "checkpoint.partial"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    processor.tokenizer.save_pretrained(aside)
    processor.image_processor.save_pretrained(aside)
    (aside / "trainer").mkdir()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    moments = optimizer.state_dict()["state"]  # index -> {step, exp_avg, exp_avg_sq}
    save_file({f"{key}/{names[i]}": value.contiguous() for i, entry in moments.items() for key, value in entry.items()},
              aside / "trainer" / "optimizer.safetensors")
    (aside / "trainer" / "state.json").write_text(json.dumps(state, indent=1))
    shutil.rmtree(path, ignore_errors=True)
    os.replace(aside, path)
    for old in sorted(run.glob("checkpoint-*"))[:-keep]:
        shutil.rmtree(old)
    return path


def load_optimizer(path: Path, model, optimizer) -> None:
    """Put AdamW's moments, saved by save_checkpoint, back."""
    index = {name: i for i, name in enumerate(name for name, p in model.named_parameters() if p.requires_grad)}
    moments: dict[int, dict] = {}
    for key, value in load_file(path / "trainer" / "optimizer.safetensors").items():
        kind, name = key.split("/", 1)
        moments.setdefault(index[name], {})[kind] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def read_log(path: Path, last_step: int) -> list[dict]:
    """Lines of a log up to last_step; what a killed process left of a line comes after it and goes with the rest."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if line["step"] > last_step:
            break
        lines.append(line)
    return lines


def environment() -> dict:
    """Where the run's numbers come from: commit, versions, machine."""
    def git(*args: str) -> str:
        try:
            command = ["git", "-C", str(HERE), *args]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"  # not a checkout, or no git

    packages = ("torch", "transformers", "accelerate", "pillow", "numpy", "datasets", "math-verify", "flash-attn")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {"commit": git("rev-parse", "HEAD"), "uncommitted": bool(git("status", "--porcelain")),
            "python": platform.python_version(), "device": device, "packages": versions, "command": sys.argv}


# --- the run ----------------------------------------------------------------------------------------------------------


def find_run(cfg: Config) -> Path | None:
    """The checkpoint to resume from, or None for a run that is new, or that died before its first.

    Raises ValueError when the folder holds another run, or when --resume finds other settings than the run began with.
    """
    run = Path(cfg.out)
    settings = asdict(cfg) | {"resume": False}
    if not (run / "config.json").exists():
        if cfg.resume:
            raise ValueError(f"--resume: {run} holds no run; check --out")
        if run.exists() and any(run.iterdir()):
            raise ValueError(f"{run} is not empty; choose another --out")
        return None
    if not cfg.resume:
        raise ValueError(f"{run} holds another run; add --resume to go on with it, or choose another --out")
    before = json.loads((run / "config.json").read_text())
    changed = [f"{k}: {before.get(k)} -> {v}" for k, v in settings.items() if before.get(k) != v]
    if changed:
        raise ValueError(f"--resume: settings differ from those {run} began with ({'; '.join(changed)}); "
                         "give the same, or start a new run with another --out")
    return max(run.glob("checkpoint-0*"), default=None)


def load_problems(cfg: Config, processor: Processor) -> tuple[list[Record], list[Record]]:
    """Training and held-out problems, every one checked before hours are spent: gold, pictures, prompt length."""
    def load(path: str) -> list[Record]:
        records = check_golds(load_records(path, skip_bad=cfg.skip_bad), cfg.skip_bad)
        return check_prompts(processor, records, cfg.prompt, cfg.max_prompt_tokens, cfg.skip_bad)

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
                   "model, a short supervised start on formatted answers, or --prompt think.")
    if metrics["signal"] == 0:
        tqdm.write(f"warning: no group of the first rollout has a signal: {metrics['all_right']:.0%} are all right, "
                   f"{metrics['all_wrong']:.0%} all wrong. Try easier or harder stages (--stage), a larger "
                   "--group-size, or another model; read responses.jsonl first.")


def main(args: list[str] | None = None) -> None:
    cfg = parse_config(args)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("this version trains in one process; start it with torchrun --nproc-per-node 1")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    run, resume_from = Path(cfg.out), find_run(cfg)
    source, device = str(resume_from or cfg.model), best_device()
    processor = Processor(source, cfg.max_pixels)
    train, test = load_problems(cfg, processor)
    curriculum = Curriculum(train, cfg.prompts_per_rollout, cfg.order, parse_stages(cfg.stage), cfg.seed)
    model = load_policy(source, device, freeze_vision=cfg.freeze_vision,
                        gradient_checkpointing=cfg.gradient_checkpointing)
    reference = load_policy(cfg.model, device).requires_grad_(False).eval() if cfg.kl_coef > 0 else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0)

    run.mkdir(parents=True, exist_ok=True)  # only now: bad input leaves no folder in the way of the mended command
    (run / "config.json").write_text(json.dumps(asdict(cfg) | {"resume": False}, indent=1))
    (run / "environment.json").write_text(json.dumps(environment(), indent=1))
    accelerator = Accelerator(cpu=device.type == "cpu", project_dir=run,
                              log_with=None if cfg.tracker == "none" else cfg.tracker)
    accelerator.init_trackers(run.name, config=asdict(cfg))
    effective = generation_config(processor, temperature=cfg.temperature, max_tokens=cfg.max_response_tokens)
    (run / "generation_config.json").write_text(effective.to_json_string(use_diff=False))
    total_updates = len(curriculum) * cfg.updates_per_rollout
    size = sum(p.numel() for p in model.parameters())
    print(f"{run}: {size / 1e6:.1f}M parameters, {len(train)} problems in {len(curriculum)} rollouts of up to "
          f"{cfg.prompts_per_rollout} x {cfg.group_size} responses, {total_updates} updates; {len(test)} held out")

    state = {"step": 0, "before": {}}
    if resume_from:
        state = json.loads((resume_from / "trainer" / "state.json").read_text())
        load_optimizer(resume_from, model, optimizer)
        curriculum.load_state_dict(state["curriculum"])
        print(f"resumed from {resume_from}")
    last = state["step"] if resume_from else -1
    logs = {name: read_log(run / name, last) for name in ("metrics.jsonl", "responses.jsonl")}
    for name, lines in logs.items():  # cut back to the checkpoint, so that no step stands twice
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def log(name: str, line: dict) -> None:
        logs[name].append(line)
        with open(run / name, "a") as file:
            file.write(json.dumps(line) + "\n")

    def held_out(records: list[Record], samples: int = 0) -> dict[str, dict]:
        """Scores greedy and, with `samples` times a problem, at temperature 1."""
        return {name: summarize(list(evaluate(
            model, processor, records, style=cfg.prompt, temperature=temperature, samples=k,
            max_tokens=cfg.max_response_tokens, max_rows=cfg.rollout_rows)))
            for name, temperature, k in (("greedy", 0, 1), ("sampled", 1, samples)) if k}

    def save() -> Path:
        now = state | {"curriculum": curriculum.state_dict()}
        path = save_checkpoint(run, model, processor, optimizer, now, cfg.keep)
        plot_curves(logs["metrics.jsonl"], run / "curves.png")
        write_page(logs["responses.jsonl"], {r.id: r for r in train}, run / "responses.html", title=str(run))
        return path

    stopping: list[int] = []  # a signal asks to stop; an update under way is finished first, so that all saved is whole

    def ask_to_stop(number: int, frame) -> None:
        if not stopping:
            tqdm.write("\nstopping: what is under way is finished, then saved")
        stopping.append(number)

    handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    if test and not state["before"]:
        state["before"] = held_out(test, cfg.eval_samples)
        log("metrics.jsonl", {"step": 0, "eval": state["before"]})
    bar = tqdm(total=len(curriculum), initial=curriculum.position, desc="training", unit="rollout")
    for batch in curriculum:
        step = state["step"] = state["step"] + 1

        # 1. Sample G responses to each of P prompts.
        t0 = time.perf_counter()
        prompts = [processor.encode(r, cfg.prompt) for r in batch.records]
        groups = sample_groups(model, processor, batch.records, prompts, samples=cfg.group_size,
                               temperature=cfg.temperature, max_tokens=cfg.max_response_tokens,
                               seed=cfg.seed * 1_000_003 + step, max_rows=cfg.rollout_rows)
        if stopping:  # the policy is still what it was after the step before
            state["step"] -= 1
            curriculum.position -= 1
            break

        # 2. Reward and weight them.
        t1 = time.perf_counter()
        lengths = torch.tensor([[len(r) for r in g.responses] for g in groups])  # [P, G]
        rewards = group_rewards([g.texts for g in groups], lengths, batch.records, style=cfg.prompt,
                                format_weight=cfg.format_weight, bonus_coef=cfg.bonus, bonus_min_length=cfg.bonus_floor,
                                sigma=cfg.sigma or None, normalize_std=cfg.normalize_std,
                                rejection_sampling=cfg.rejection_sampling)
        metrics = {"step": step, "stage": batch.stage} | step_metrics(groups, rewards)
        for line in log_groups(groups, rewards, step, batch.stage):
            log("responses.jsonl", line)
        if step == 1:
            warn_first_rollout(metrics, cfg)

        # 3. Update the policy.
        t2 = time.perf_counter()
        done = (step - 1) * cfg.updates_per_rollout
        lrs = [learning_rate(done + i, total_updates, cfg) for i in range(cfg.updates_per_rollout)]
        try:
            stats = update(model, reference, processor, optimizer, groups, rewards, lrs, cfg)
        except FloatingPointError as error:
            raise SystemExit(f"step {step}: {error}. Its problems: {', '.join(r.id for r in batch.records)}. "
                             f"The newest whole checkpoint is {max(run.glob('checkpoint-0*'), default='none')}; "
                             "try a lower --lr or --grad-clip from there in a new run.") from error

        # 4. Log.
        t3 = time.perf_counter()
        metrics |= stats | {"verifier_timeouts": VERIFIER.timeouts,
                            "tokens_per_second": lengths.sum().item() / (t3 - t0), "seconds_rollout": t1 - t0,
                            "seconds_reward": t2 - t1, "seconds_update": t3 - t2}

        # 5. Evaluate at the end of a stage; save.
        last = curriculum.position == len(curriculum)
        if test and batch.ends_stage:
            metrics["eval"] = held_out(test, cfg.eval_samples) if last else held_out(test[:cfg.eval_limit or None])
        log("metrics.jsonl", metrics)
        accelerator.log({k: v for k, v in metrics.items() if isinstance(v, (int, float))}, step=step)
        bar.update()
        bar.set_postfix(stage=batch.stage, reward=f"{metrics['reward']:.2f}", accuracy=f"{metrics['accuracy']:.2f}",
                        length=f"{metrics['length']:.0f}")
        if batch.ends_stage or (cfg.save_every and step % cfg.save_every == 0):
            save()
        if stopping:
            break
    bar.close()
    accelerator.end_training()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if curriculum.position < len(curriculum):
        print(f"stopped after step {state['step']}, saved {save()}; the same command with --resume goes on")
        return
    if test:
        after = next(line["eval"] for line in reversed(logs["metrics.jsonl"]) if "eval" in line)
        print("\n" + before_after(state["before"], after))
        (run / "scores.json").write_text(json.dumps({"before": state["before"], "after": after}, indent=1))
    print(f"\nthe run lies in {run}: curves.png, responses.html, metrics.jsonl, "
          f"{max(run.glob('checkpoint-0*')).name} (a Hugging Face folder)")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # what the user can mend: one line, not a stack
        sys.exit(f"error: {error}")
