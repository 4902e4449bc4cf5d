"""How it learns: Observe-R1's GRPO, from settings to checkpoint.

    torchrun train.py --stage all                         # the built-in world, on a laptop
    torchrun train.py --preset 3b --data ladder/          # Qwen2.5-VL-3B on a ladder of your own
    torchrun --nproc-per-node 8 train.py --preset 7b --data ladder/

The loop, for each batch of P problems of the ladder:

    sample   G responses o_1 .. o_G to each prompt q                                   rollout.py
    reward   r_i = accuracy_i + 0.5 format_i + bonus_i                                 rewards.py
    weight   adv_i = w(d) (r_i - mean r) / (std r + 1e-6),  w(d) = 4 sigma d (1 - d)   rewards.py
    update   L = - sum_i sum_t min(ratio adv_i, clip(ratio, 0.8, 1.2) adv_i) / tokens
    log      every quantity of step_metrics' glossary, to metrics.jsonl

Departures from the official code (arXiv 2505.12432, GitHub zrguo/Observe-R1), each with its reason; those of rewards
and curriculum stand at the head of their own files:
  1. The loss is the mean over all tokens of an update; the official one is the mean over micro-batches of 2 responses,
     so that its gradient depends on the split.
  2. No KL term (kl_coef 0); the official script leaves its framework's 0.01 on, inside the reward, where the paper has
     none. Set, ours is the k3 estimator in the loss.
  3. A group without signal (weight 0, or equal rewards) is not forwarded and its tokens are not counted; the official
     code forwards it with weight 0, which shrinks the step of the others. --count-no-signal restores the count; with a
     KL, which every group has, it is forwarded; not with --refill, which samples others in its place, as the official
     code can.
  4. The responses of a group stay together in one update; the official code scatters them over the 16 of a rollout.
  5. --order says the order; the official --shuffle switches shuffling off.
  6. The logged reward is the reward used; the official log leaves the bonus out.
  7. A prompt over --max-prompt-tokens is refused; the official code cuts it, and image tokens with it.
  8. The first update's lr is a step of the warm-up above 0; the official one is 0, and moves nothing.
  9. "Old" log-probs are the trainer's own, in the packing of the update; in the first update of a rollout they are
     the policy's very own, nothing is computed, and ratio is 1.

With several processes each takes a share of the prompts and of the weights (rollout.shard), and the run is the same. It
may be stopped or killed at any moment and goes on with --resume, on a CPU to the bit: see "checkpoints".

Shapes: P prompts, G responses of a group, N rows (responses), T response tokens.
"""
from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.metadata
import importlib.util
import itertools
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
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from curriculum import Batch, Curriculum, warn_if_blind
from data import PROMPTS, TINY, Processor, Prompt, Record, T, check_records, load_records, range_fault, run_program
from eval import (before_after, begun, claim, data_digest, judge, lock, plot_curves, read_json, response_lines,
                  mean, roll_out, summarize, sync, write_json, write_responses)
from rewards import VERIFIER, Response, Rewards, group_rewards
from rollout import (Group, Packed, Policy, copy_weights, device_of, encode_ahead, full_tensor, gather_shares,
                     generation_config, load_trainer, on_rank_0, rank_and_world, response_logprobs, sample_groups,
                     picture_effect, save_weights, start_processes, stop_processes, without_adapters)

HERE = Path(__file__).resolve().parent


# --- the loss ---------------------------------------------------------------------------------------------------------

def grpo_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor,
              num_tokens: int | None = None, num_sequences: int | None = None, *, clip_low: float = 0.2,
              clip_high: float = 0.2, ratio_of: str = "token", aggregation: str = "token", max_tokens: int = 1,
              sampler_logprobs: torch.Tensor | None = None, tis_cap: float = 0.0,
              ref_logprobs: torch.Tensor | None = None, kl_coef: float = 0.0,
              ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped GRPO loss of N responses.

    logprobs, old_logprobs, mask (and sampler_logprobs, ref_logprobs) [N, T], advantages [N] already weighted.
    num_tokens and num_sequences count the whole update, of which these rows may be a micro-batch: losses of
    micro-batches then add up to the update's. Statistics are sums over tokens, and add up too. aggregation `constant`
    divides by num_sequences * max_tokens. ratio_of `sequence`: GSPO (2507.18071, eq. 7), one ratio for a response, the
    geometric mean of its tokens'. tis_cap above 0: truncated importance sampling, each token weighs
    min(pi_old / pi_sampler, tis_cap), where the sampler rounds otherwise than the trainer."""
    mask = mask.to(logprobs.dtype)
    tokens = max(1, mask.sum().item() if num_tokens is None else num_tokens)
    sequences = max(1, len(mask) if num_sequences is None else num_sequences)
    if aggregation == "token":
        share = mask / tokens  # [N, T], what a token counts
    elif aggregation == "sequence":
        share = mask / mask.sum(1, keepdim=True).clamp(min=1) / sequences
    else:
        share = mask / (sequences * max_tokens)

    log_ratio = (logprobs - old_logprobs) * mask
    if ratio_of == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1) * mask
    ratio = log_ratio.exp()  # pi(o_t) / pi_old(o_t)
    adv = advantages[:, None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.min(ratio * adv, clipped * adv)  # [N, T]
    if tis_cap > 0 and sampler_logprobs is not None:
        gain = gain * ((old_logprobs - sampler_logprobs) * mask).exp().clamp(max=tis_cap)
    loss = -(gain * share).sum()
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

def update(policy: Policy, groups: list[Group | None], responses: list[list[Response]], rewards: Rewards,
           lrs: list[float], cfg: Config, wanted: int = 0) -> dict[str, float]:
    """len(lrs) optimizer steps on one rollout, each on its share of the prompts -> statistics, means over the steps.

    groups, responses: of all P prompts; None for a group that another rank has sampled. wanted: with --refill so many
    are learned from, the first with a signal. Raises FloatingPointError, on all ranks and before the weights change,
    when the loss is not finite. A collective."""
    device, world = device_of(policy.model), rank_and_world()[1]
    parts: list[list[list[Packed]]] = []  # of each update this rank's micro-batches
    counts: list[tuple[int, int]] = []  # tokens and responses of an update on all ranks, the loss's denominators
    chosen = np.arange(len(responses))
    if cfg.refill > 1:  # (those without signal were made up for)
        chosen = np.flatnonzero(rewards.signal)[:wanted]
    for part in np.array_split(chosen, len(lrs)):
        rows, tokens, sequences = rows_of(part, groups, responses, rewards, cfg)
        parts.append(micro_batches(rows, cfg.micro_tokens))
        counts.append((tokens, sequences))
    blanks = even_out(parts, policy.processor, cfg) if world > 1 else [None] * len(parts)
    forward = partial(response_logprobs, processor=policy.processor, temperature=cfg.temperature)

    policy.model.train()
    # Later updates meet a policy that has moved: its log-probs are noted before the first, and in the packing of the
    # update, for another one rounds otherwise. In the first, the old log-probs are the present ones.
    with torch.no_grad():
        for micros, blank in zip(parts[1:], blanks[1:]):
            for micro in micros:
                logprobs, _, mask = forward(policy.model, rows=micro, blank=blank)
                flat = iter([logp[keep].cpu() for logp, keep in zip(logprobs, mask)])
                for row in micro:
                    row.old = [next(flat) for _ in row.responses]

    steps: list[dict[str, float]] = []  # statistics of each
    for micros, blank, (num_tokens, num_sequences), lr in zip(parts, blanks, counts, lrs):
        if not micros:
            continue  # no signal on any rank, no step: Adam's momentum alone would move the weights
        sums: dict[str, torch.Tensor] = {}
        for micro in micros:
            logprobs, entropy, mask = forward(policy.model, rows=micro, blank=blank)  # [N, T]
            counted = torch.tensor([row.counted for row in micro for _ in row.responses], device=device)
            mask = mask & counted[:, None]
            old = padded([row.old or [] for row in micro], device) if micro[0].old else logprobs.detach()
            sampled, ref = padded([row.sampled for row in micro], device), None
            if policy.reference is not None:
                with torch.no_grad(), without_adapters(policy.reference):
                    ref = forward(policy.reference, rows=micro, blank=blank)[0]
            advantages = torch.tensor([a for row in micro for a in row.advantages], device=device)  # [N]
            loss, stats = grpo_loss(
                logprobs, old, advantages, mask, num_tokens, num_sequences, clip_low=cfg.clip_low,
                clip_high=cfg.clip_high, ratio_of=cfg.ratio, aggregation=cfg.aggregation,
                max_tokens=cfg.max_response_tokens, sampler_logprobs=sampled, tis_cap=cfg.tis_cap, ref_logprobs=ref,
                kl_coef=cfg.kl_coef)
            (loss * world).backward()  # (sharded gradients are means over the ranks; the loss is a sum)
            gap = (old - sampled).abs()
            stats |= {"entropy": (entropy * mask).sum(), "loss": loss.detach(), "scored": mask.sum(),
                      "sampler_gap": (gap * mask).sum()}
            for name, value in stats.items():
                sums[name] = sums.get(name, 0.0) + value.float()
        if world > 1:  # (every rank has the same names in the same order)
            values = torch.stack(list(sums.values()))
            dist.all_reduce(values)
            sums = dict(zip(sums, values))
        if not torch.isfinite(sums["loss"]):
            raise FloatingPointError(f"the loss is {sums['loss'].item()}")
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), cfg.grad_clip))
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm.item()}")
        for group in policy.optimizer.param_groups:
            group["lr"] = lr
        policy.optimizer.step()
        policy.optimizer.zero_grad()
        scored, whole = sums.pop("scored").item(), {"loss": sums.pop("loss").item(), "grad_norm": norm.item(), "lr": lr}
        steps.append({name: value.item() / scored for name, value in sums.items()} | whole)  # (num_tokens may be more)
    means = {name: sum(step[name] for step in steps) / len(steps) for name in (steps[0] if steps else ())}
    return {"updates": len(steps)} | means


def rows_of(part: np.ndarray, groups: list[Group | None], responses: list[list[Response]], rewards: Rewards,
            cfg: Config) -> tuple[list[Packed], int, int]:
    """Of an update on the prompts `part`: this rank's packed rows; tokens and responses that count, of all ranks."""
    rows, tokens, sequences = [], 0, 0
    for p in part:
        forwarded = bool(rewards.signal[p]) or cfg.kl_coef > 0
        kept = [g for g, r in enumerate(responses[p]) if not (r.truncated and cfg.mask_truncated)]
        group = groups[p]
        if forwarded and group is not None:
            rows += pack_group(group, rewards.advantages[p].tolist(), kept, cfg.micro_tokens)
        if forwarded or cfg.count_no_signal:
            tokens += sum(responses[p][g].tokens or 0 for g in kept)
            sequences += len(kept)
    return rows, tokens, sequences


def padded(values: list[list[torch.Tensor]], device: torch.device) -> torch.Tensor:
    """Of each row its responses' [T] -> [N, T]."""
    flat = list(itertools.chain.from_iterable(values))
    return torch.nn.utils.rnn.pad_sequence(flat, batch_first=True).to(device)


def pack_group(group: Group, advantages: list[float], kept: list[int], budget: int) -> list[Packed]:
    """The kept responses of a group in rows of at most budget tokens, or of one response; few: each has the prompt."""
    rows: list[Packed] = []
    for g in sorted(kept, key=lambda g: len(group.samples[g].ids), reverse=True):
        sample = group.samples[g]
        row = next((row for row in rows if len(row) + len(sample.ids) <= budget), None)
        if row is None:
            rows.append(row := Packed(group.prompt, []))
        row.responses.append(sample.ids)
        row.advantages.append(advantages[g])
        row.sampled.append(sample.logprobs)
    return rows


def micro_batches(rows: list[Packed], budget: int) -> list[list[Packed]]:
    """As many rows together as come to at most budget tokens, but one at least."""
    batches: list[list[Packed]] = []
    for row in sorted(rows, key=len, reverse=True):  # the longest first: too little memory shows at once
        batch = next((batch for batch in batches if sum(map(len, batch)) + len(row) <= budget), None)
        if batch is None:
            batches.append(batch := [])
        batch.append(row)
    return batches


def even_out(parts: list[list[list[Packed]]], processor: Processor, cfg: Config) -> list[Prompt | None]:
    """Give each rank as many micro-batches of each update as the rank with the most has: a sharded model gathers its
    weights block by block, which all ranks must ask for alike -> of each update the prompt whose picture goes through
    the vision tower where a rank's rows have none; None where no rank has a picture. A collective."""
    load = torch.tensor([[len(micros), any(row.prompt.grid is not None for micro in micros for row in micro)]
                         for micros in parts])
    dist.all_reduce(load, dist.ReduceOp.MAX)
    blanks = [processor.encode(Record("blank", "?", "1", images=pictures), cfg.prompt)
              for pictures in ((), (Image.new("RGB", (28, 28)),))]
    for micros, (count, pictured) in zip(parts, load.tolist()):
        # A response of one token, which is forwarded and counts nothing.
        filler = Packed(blanks[pictured], [processor.stop_ids[:1]], [0.0], [torch.zeros(1)], counted=False)
        micros += [[filler] for _ in range(count - len(micros))]
    return [blanks[1] if pictured else None for _, pictured in load.tolist()]


# --- the run ----------------------------------------------------------------------------------------------------------

def main(args: list[str] | None = None) -> None:
    cfg = parse_config(args)
    device = start_processes(cfg.offload)
    run = Run(cfg)  # its folder: new, gone on with (run.source is then its newest checkpoint), or refused
    processor = Processor(run.source, cfg.max_pixels)
    train, test = load_problems(cfg, processor)
    curriculum = Curriculum(train, cfg.prompts_per_rollout, cfg.order, parse_stages(cfg.stage), cfg.seed, cfg.epochs)
    policy = load_trainer(run.source, processor, device, start=cfg.model, lr=cfg.lr, kl=cfg.kl_coef > 0,
                          freeze_vision=cfg.freeze_vision, gradient_checkpointing=cfg.gradient_checkpointing,
                          offload=cfg.offload, lora_rank=cfg.lora_rank, seed=cfg.seed)
    run.begin(policy, curriculum, train, test)
    run.evaluate_if_due()
    rank, world = rank_and_world()
    ahead = range(curriculum.position, len(curriculum))
    if cfg.max_steps:
        left = max(0, cfg.max_steps - curriculum.position)
        ahead = ahead[:left + (cfg.refill - 1) * (left > 0)]  # (a refilled rollout that has begun goes on past it)
    shares = (curriculum.batches[k].records[rank::world] for k in ahead)  # (adaptive knows but the next two)
    coming = encode_ahead(policy.processor, shares, cfg.prompt)  # (prompts, made while the policy is at work)
    rollout = Rollout()
    for batch in itertools.islice(curriculum, len(ahead)):
        step = curriculum.position

        # 1. Sample G responses o_1 .. o_G to each of P prompts q, of which this rank takes its share.
        prompts = run.signals.unless_asked(partial(next, coming))
        rollout.ends("pictures")
        groups = None if prompts is None else run.signals.unless_asked(
            partial(sample, policy, batch.records[rank::world], prompts, step, cfg))
        if groups is None:  # asked to stop: the policy is still what it was after the step before
            curriculum.undo(len(rollout.batches) + 1)
            break
        rollout.ends("rollout")

        # 2. Reward and weight them: adv_i = w(d) (r_i - mean r) / (std r + eps).
        responses = gather_shares(judge(groups, cfg.prompt))  # [P][G], scored by rewards.score
        rollout.add(batch, groups, flip_coins(responses, step, cfg) if cfg.random_rewards else responses)
        rewards = reward(rollout.responses, cfg)
        curriculum.learned(rewards.accuracy[-len(batch.records):].mean(1).tolist())
        rollout.ends("reward")
        if rollout.wants_more(rewards, cfg):
            continue
        metrics = step_metrics(rollout.responses, rewards) | run.first_look(rollout)
        run.log_groups(step, rollout, rewards, metrics)
        rollout.ends("reward")

        # 3. Update the policy, then its replica that samples: L = - sum min(ratio adv, clip(ratio) adv) / tokens.
        try:
            stats = update(policy, rollout.groups, rollout.responses, rewards,
                           learning_rates(step, len(curriculum), cfg), cfg, rollout.wanted)
        except FloatingPointError as error:
            raise SystemExit(run.not_finite(step, rollout, error)) from error
        copy_weights(policy)
        rollout.ends("update")

        # 4. Log.
        run.log_step(step, rollout, metrics | stats | system_metrics(rollout, device))
        rollout.groups.clear()
        del prompts, groups  # (or the pictures of three batches would be in memory)

        # 5. Save; at the end of a stage, evaluate.
        run.save_if_due(batch)
        run.evaluate_if_due()
        if run.signals.asked_of_any() or step >= (cfg.max_steps or math.inf):
            break
        rollout = Rollout()
    run.close()
    stop_processes()


def sample(policy: Policy, records: list[Record], prompts: list[Prompt], step: int, cfg: Config) -> list[Group]:
    """G responses to each record, with random numbers of their own: of seed, step, record and place in the group."""
    return sample_groups(policy.sampler, policy.processor, records, prompts, samples=cfg.group_size,
                         temperature=cfg.temperature, max_tokens=cfg.max_response_tokens,
                         seed=cfg.seed * 1_000_003 + step, max_rows=cfg.rollout_rows)


def reward(responses: list[list[Response]], cfg: Config) -> Rewards:
    lengths = torch.tensor([[r.tokens for r in group] for group in responses])  # [P, G]
    return group_rewards(responses, lengths, format_weight=cfg.format_weight, bonus_coef=cfg.bonus,
                         bonus_min_length=cfg.bonus_floor, sigma=cfg.sigma or None, normalize_std=cfg.normalize_std,
                         rejection_sampling=cfg.rejection_sampling)


def learning_rates(step: int, steps: int, cfg: Config) -> list[float]:
    """Of the updates of rollout `step`, from 1, of `steps`."""
    first, total = (step - 1) * cfg.updates_per_rollout, steps * cfg.updates_per_rollout
    return [learning_rate(first + i, total, cfg) for i in range(cfg.updates_per_rollout)]


def learning_rate(update: int, total: int, cfg: Config) -> float:
    """lr of update 0 .. total - 1: linear warm-up, then cosine to a tenth, or constant."""
    warm = math.ceil(cfg.warmup * total)
    if update < warm:
        return cfg.lr * (update + 1) / warm
    if cfg.schedule == "constant":
        return cfg.lr
    done = (update - warm) / max(1, total - warm)
    return cfg.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


# === the fold: below, settings, the run's folder and log, signals, checkpoints ========================================

# --- settings ---------------------------------------------------------------------------------------------------------

def setting(default, help: str, low: float = -math.inf, high: float = math.inf, technical: bool = False,
            choices: Iterable[str] = ()):
    """A field of Config. low, high: bounds, both allowed (just above 0: TINY). technical: changes memory, speed or what
    is kept, and no step (but by rounding): it may differ on --resume, and between runs that are compared."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "technical": technical,
                                            "choices": tuple(choices)})


@dataclass
class Config:
    """Every setting of a run. Defaults are the paper's, except where a preset says otherwise."""

    preset: Literal["toy", "3b", "7b"] = setting("toy", "row of the table PRESETS; options given beside it prevail")
    model: str = setting("", "policy to start from: Hugging Face folder or hub id")
    data: str = setting("", "training problems: ladder folder, Parquet, JSONL, ... or hub id")
    test: str = setting("", "held-out problems, evaluated before, at each stage's end and after; empty: none")
    out: str = setting("", "folder of the run; empty: out/<preset>-<order>-<prompt>-seed<seed>")
    resume: bool = setting(False, "go on with the run in --out from its newest checkpoint")
    skip_bad: bool = setting(False, "leave out records that cannot be used, instead of stopping")
    limit: int = setting(0, "train on so many of the problems only, taken evenly from all; 0: all", 0)

    # in what order
    stage: str = setting("all", "rungs of the ladder to train on: all, one (3) or a range (0-3)")
    order: Literal["ladder", "sorted", "random", "reverse", "review", "gaussian", "adaptive"] = setting(
        "ladder", "of the problems, see curriculum.Curriculum; unmeasured data has only random")
    epochs: int = setting(1, "passes over the problems, each in the same order of stages", 1)

    # sample
    prompt: str = setting("observe", "prompt style and the format it asks for", choices=PROMPTS)
    group_size: int = setting(8, "G, responses to a prompt, of which advantages compare the rewards", 2)
    prompts_per_rollout: int = setting(128, "P, prompts sampled before the policy is updated", 1)
    refill: int = setting(1, "dynamic sampling: until P groups have a signal, sample up to so many times P problems of "
                          "the same stage (DAPO); lr and steps count them all; 1: off", 1)
    temperature: float = setting(1.0, "of sampling, and of the log-probs in the loss", TINY)
    max_prompt_tokens: int = setting(9216, "a longer prompt is refused, never cut", 1)
    max_response_tokens: int = setting(8192, "a response is cut here", 1)
    max_pixels: int = setting(2_560_000, "pictures of a larger area are shrunk to it", 1)
    rollout_rows: int = setting(256, "responses sampled at a time, a group at least; less saves memory", 1,
                                technical=True)

    # reward and weight
    format_weight: float = setting(0.5, "of the format reward", 0)
    bonus: float = setting(0.2, "to the shortest correct response of a group; 0: off", 0)
    bonus_floor: int = setting(100, "tokens; a shortest correct response at or under it earns no bonus", 0)
    sigma: float = setting(
        1.8, "of the difficulty weight w(d) = 4 sigma d (1 - d); 0: weight off, all groups count 1", 0)
    normalize_std: bool = setting(True, "divide advantages by the group's standard deviation")
    random_rewards: bool = setting(False, "a control: a coin in place of accuracy, in reward and log")
    rejection_sampling: bool = setting(
        False, "a control in place of GRPO: learn from right answers, each counting 1, and from no others")

    # update
    updates_per_rollout: int = setting(16, "optimizer steps a rollout is split into, by prompts", 1)
    clip_low: float = setting(0.2, "ratio is clipped at 1 - clip_low", 0, 1)
    clip_high: float = setting(0.2, "ratio is clipped at 1 + clip_high", 0)
    ratio: Literal["token", "sequence"] = setting(
        "token", "pi / pi_old of each token | of the response, its geometric mean (GSPO, which clips at some 4e-4)")
    tis_cap: float = setting(
        0.0, "truncated importance sampling: tokens weigh pi_old / pi_sampler, at most this; 0: off", 0)
    aggregation: Literal["token", "sequence", "constant"] = setting(
        "token", "loss is a mean over tokens | over sequences of their token means | sum / (N max tokens), Dr. GRPO")
    kl_coef: float = setting(0.0, "of the KL to the starting model (k3); 0: no reference is loaded", 0)
    count_no_signal: bool = setting(False, "count the tokens of groups without signal in the loss's denominator")
    mask_truncated: bool = setting(False, "leave cut-off responses out of the loss")
    freeze_vision: bool = setting(False, "train the language model only")
    lora_rank: int = setting(0, "train adapters of this rank (LoRA) in place of the weights, at some ten times "
                             "their lr; 0: off", 0)
    lr: float = setting(1e-6, "peak learning rate of AdamW", TINY)
    warmup: float = setting(0.03, "share of the updates over which lr rises", 0, 1)
    schedule: Literal["cosine", "constant"] = setting("cosine", "of lr after the warm-up; cosine falls to 0.1 lr")
    grad_clip: float = setting(1.0, "gradients are scaled to this norm at most", TINY)
    gradient_checkpointing: bool = setting(
        True, "recompute activations in backward, to save memory", technical=True)
    micro_tokens: int = setting(
        16384, "tokens in one forward and backward; changes memory and speed, not the result", 1, technical=True)
    offload: bool = setting(
        False, "keep weights, gradients and moments in the CPU's memory: 3B on one GPU of 24-48 GB", technical=True)

    # evaluate, save, log
    eval_samples: int = setting(4, "k of avg@k at temperature 1, before and after", 1)
    eval_limit: int = setting(0, "held-out problems answered, greedily, at a stage's end; 0: all", 0)
    save_every: int = setting(0, "steps between checkpoints, besides those at a stage's end; 0: none", 0,
                              technical=True)
    keep: int = setting(2, "newest checkpoints kept", 1, technical=True)
    max_steps: int = setting(
        0, "stop after so many rollouts (of --refill the batches count), for --resume to go on; lr is that of the "
        "whole run; 0: all", 0, technical=True)
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = setting(
        "none", "also log there, through accelerate", technical=True)
    seed: int = setting(0, "of sampling and of the order inside a stage", 0)


TECHNICAL = tuple(f.name for f in dataclasses.fields(Config) if f.metadata["technical"])
# What may differ on --resume. (Folders may have moved; data_digest tells whether the problems are the same.)
FREE = ("resume", "out", "data", "test", *TECHNICAL)

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
    parser = argparse.ArgumentParser(allow_abbrev=False, description=str(__doc__).split("\n")[0],
                                     usage="%(prog)s --help | [--OPTION VALUE | --SWITCH | --no-SWITCH] ...")
    types = get_type_hints(Config)
    for f in dataclasses.fields(Config):
        option, text = f"--{f.name.replace('_', '-')}", f"{f.metadata['help']} (default: %(default)s)"
        if types[f.name] is bool:  # (argparse's own action lists both forms of each, with one text)
            parser.add_argument(option, action="store_true", default=f.default, help=text)
            parser.add_argument(f"--no{option[1:]}", action="store_false", dest=f.name, help=argparse.SUPPRESS)
        else:
            choices = get_args(types[f.name]) or f.metadata["choices"]
            parser.add_argument(option, type=str if choices else types[f.name], choices=choices or None,
                                default=f.default, help=text)
    preset = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    preset.add_argument("--preset", choices=PRESETS)
    chosen, toy = preset.parse_known_args(args)[0].preset, PRESETS["toy"]
    parser.set_defaults(**PRESETS.get(chosen, toy))
    cfg = Config(**vars(parser.parse_args(args)))
    cfg.out = cfg.out or f"out/{cfg.preset}-{cfg.order}-{cfg.prompt}-seed{cfg.seed}"
    check_config(cfg)
    if chosen is None and Path(cfg.model).resolve() != Path(toy["model"]).resolve():
        raise ValueError(f"--model {cfg.model}: give a --preset for it too ({', '.join(PRESETS)}); without one it "
                         f"would be trained as the toy is: lr {toy['lr']}, pictures of {toy['max_pixels']} pixels, "
                         f"prompts of {toy['max_prompt_tokens']} and responses of {toy['max_response_tokens']} tokens")
    return cfg


def check_config(cfg: Config) -> None:
    """Raise ValueError, naming option and remedy, for settings that cannot be meant."""
    for f in dataclasses.fields(cfg):
        value, low, high = getattr(cfg, f.name), f.metadata["low"], f.metadata["high"]
        if isinstance(value, (int, float)) and (fault := range_fault(value, low, high)):
            raise ValueError(f"--{f.name.replace('_', '-')} {fault} ({f.metadata['help']})")
    if cfg.prompts_per_rollout % cfg.updates_per_rollout:
        raise ValueError(f"--prompts-per-rollout {cfg.prompts_per_rollout} does not divide into --updates-per-rollout "
                         f"{cfg.updates_per_rollout} updates")
    if not cfg.model:
        raise ValueError("--model is empty; give a Hugging Face folder or hub id")
    if not cfg.data:
        raise ValueError(f"preset {cfg.preset} needs --data: a ladder built by curriculum.py, or any data with "
                         "--order random")
    if cfg.rollout_rows < cfg.group_size:
        raise ValueError(f"--rollout-rows {cfg.rollout_rows} is below --group-size {cfg.group_size}: a group is "
                         "sampled together")
    if cfg.refill > 1 and cfg.count_no_signal:
        raise ValueError("--refill makes up for groups without signal, and --count-no-signal counts them; choose one")
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


def as_kept(cfg: Config) -> dict:
    """The settings as settings.json has them: what lies in this repository by its place there, for a run goes on, and
    is compared with others, in another clone too."""
    settings = {"program": "train.py"} | asdict(cfg) | {"resume": False}
    for name in ("model", "data", "test"):
        path = Path(settings[name])
        if path.is_relative_to(HERE):
            settings[name] = str(path.relative_to(HERE))
    return settings


def load_problems(cfg: Config, processor: Processor) -> tuple[list[Record], list[Record]]:
    """Training and held-out problems, every one checked before hours are spent: gold, pictures, prompt length."""
    def load(path: str, limit: int = 0) -> list[Record]:
        records = load_records(path, skip_bad=cfg.skip_bad)
        if 0 < limit < len(records):  # (a ladder's first problems are all of stage 0)
            records = [records[i * len(records) // limit] for i in range(limit)]
        good = on_rank_0(lambda: {r.id for r in check_records(processor, records, cfg.prompt, cfg.max_prompt_tokens,
                                                              cfg.skip_bad)})
        return [r for r in records if r.id in good]

    return load(cfg.data, cfg.limit), load(cfg.test) if cfg.test else []


# --- one rollout ------------------------------------------------------------------------------------------------------

@dataclass
class Rollout:
    """What one step learns from: a batch; with --refill (DAPO's dynamic sampling) up to so many of one stage."""

    batches: list[Batch] = field(default_factory=list)
    groups: list[Group | None] = field(default_factory=list)  # of each problem; None: another rank sampled it
    responses: list[list[Response]] = field(default_factory=list)  # [P][G], on every rank
    seconds: dict[str, float] = field(default_factory=dict)  # spent on pictures, rollout, reward, update
    clock: float = field(default_factory=time.perf_counter)

    @property
    def records(self) -> list[Record]:
        return [record for batch in self.batches for record in batch.records]

    def ends(self, name: str) -> None:
        """Count the time since the last call as spent on this."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.clock
        self.clock = now

    def add(self, batch: Batch, groups: list[Group], responses: list[list[Response]]) -> None:
        """groups: this rank's share, every world-th of the batch; responses: to all of it."""
        rank, world = rank_and_world()
        self.batches.append(batch)
        self.groups += [groups[p // world] if p % world == rank else None for p in range(len(responses))]
        self.responses += responses

    @property
    def wanted(self) -> int:
        """P, the groups with a signal that are to be learned from. (A stage is cut evenly: its batches may be smaller.)
        """
        return len(self.batches[0].records)

    def wants_more(self, rewards: Rewards, cfg: Config) -> bool:
        """Have fewer groups a signal, and may another batch of the stage be sampled?"""
        few = int(rewards.signal.sum()) < self.wanted
        return few and len(self.batches) < cfg.refill and not self.batches[-1].ends_stage


def flip_coins(responses: list[list[Response]], step: int, cfg: Config) -> list[list[Response]]:
    """The control of random rewards: a coin in place of each accuracy, the same on all ranks."""
    coins = np.random.default_rng([cfg.seed, step]).integers(2, size=(len(responses), cfg.group_size)).tolist()
    return [[replace(r, accuracy=float(coin)) for r, coin in zip(group, row)] for group, row in zip(responses, coins)]


# --- the run's folder and log -----------------------------------------------------------------------------------------

LOGS = ("metrics.jsonl", "responses.jsonl", "problems.jsonl")
LOOKED_AT, UNSEEN = 8, 0.01  # problems; nats a token, below which no picture is seen


class Run:
    """A run's folder: its log, its checkpoints, its held-out scores, and the pictures of them.

    All ranks hold one and call its methods together, each a collective; rank 0 writes."""

    def __init__(self, cfg: Config):
        """Find the folder new, or a run to go on with and its newest checkpoint. Raises ValueError for any other."""
        self.cfg, self.folder, self.chief = cfg, Path(cfg.out), rank_and_world()[0] == 0
        self.newest = on_rank_0(lambda: find_run(cfg))
        self.source = str(self.newest or cfg.model)  # what the policy is loaded from

    def begin(self, policy: Policy, curriculum: Curriculum, train: list[Record], test: list[Record]) -> None:
        """Claim the folder, now that all is checked, and restore what the newest checkpoint holds."""
        cfg, world = self.cfg, rank_and_world()[1]
        self.policy, self.curriculum, self.test = policy, curriculum, test
        self.records = {r.id: r for r in train}
        if len(set(gather_shares([(curriculum.digest(), *(r.id for r in test))]))) > 1:
            raise ValueError(f"{cfg.data} or {cfg.test} is not the same for all processes; give all machines one copy")
        self.data = on_rank_0(lambda: {"train": data_digest(train), "test": data_digest(test)})
        self.saved = -1  # step of the newest checkpoint
        if self.newest:
            state = read_json(self.newest / "trainer" / "state.json")
            for name, now in self.data.items():
                if state["data"][name] != now:
                    raise ValueError(f"{self.folder} holds a run of other data: {name}: {state['data'][name]} there, "
                                     f"{now} now; give what it began with, or another --out")
            curriculum.load_state_dict(state["curriculum"])
            load_moments(self.newest, policy, state["steps"])
            self.saved = curriculum.position
        self.signals = Signals()  # (until here Ctrl-C ends the program, which has written nothing yet)
        self.evals = on_rank_0(self._open)
        self.tracker = None
        if cfg.tracker != "none":
            from accelerate import Accelerator  # (its import takes a while)

            self.tracker = Accelerator(cpu=not torch.cuda.is_available(), project_dir=self.folder, log_with=cfg.tracker)
            self.tracker.init_trackers(self.folder.name, config=asdict(cfg))
        if self.chief:
            warn_if_blind(train)
            size, steps = policy.model.num_parameters(), len(curriculum)
            tqdm.write(f"{self.folder}: {size / 1e6:.1f}M parameters, {len(train)} problems in {steps} rollouts of up "
                       f"to {cfg.prompts_per_rollout} x {cfg.group_size} responses, {steps * cfg.updates_per_rollout} "
                       f"updates; {len(test)} held out; {world} process{'es' if world > 1 else ''} on "
                       f"{device_of(policy.model).type}{f'; resumed from {self.newest}' if self.newest else ''}")
        self.bar = tqdm(total=len(curriculum), initial=curriculum.position, desc="training", unit="rollout",
                        disable=not self.chief)

    def _open(self) -> dict[int, dict]:
        """Rank 0: the folder is this run's, its logs are cut back to its newest checkpoint -> held-out scores there.
        What is cut is trained, and answered, again; see find_run for what is refused instead."""
        claim(self.folder, as_kept(self.cfg))
        write_json(self.folder / "environment.json", environment())
        effective = generation_config(self.policy.processor, temperature=self.cfg.temperature,
                                      max_tokens=self.cfg.max_response_tokens)
        (self.folder / "generation_config.json").write_text(effective.to_json_string(use_diff=False))
        (self.folder / "held-out").mkdir(exist_ok=True)
        for answers in answers_after(self.folder, max(self.saved, 0)):  # of a policy that was not saved
            answers.unlink()
        metrics, *_ = [read_log(self.folder / name, max(self.saved, 0), cut=True) for name in LOGS]
        return {line["step"]: line["eval"] for line in metrics if "eval" in line}

    def log(self, name: str, lines: list[dict]) -> None:
        if self.chief:
            with open(self.folder / name, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)

    def first_look(self, rollout: Rollout) -> dict:
        """At a run's first rollout: are the pictures seen? A collective."""
        if self.curriculum.position > len(rollout.batches):
            return {}
        pictured = [group for record, group in zip(rollout.records, rollout.groups) if self.records[record.id].images]
        return self.pictures_seen([(g.prompt, g.samples[0].ids) for g in pictured[:LOOKED_AT] if g is not None])

    def pictures_seen(self, looked_at: list[tuple[Prompt, list[int]]]) -> dict:
        """Of some problems that were loaded with pictures, the prompts and a response each, those that this rank has:
        how much grey pictures change the log-probs of the responses; a warning where they do not. A collective."""
        mine = [picture_effect(self.policy.sampler, self.policy.processor, prompt, ids, self.cfg.temperature)
                for prompt, ids in looked_at if ids]
        changes = list(itertools.chain.from_iterable(gather_shares([mine])))
        seen, blind = mean(changes), changes.count(0.0)
        if self.chief and seen is not None and (blind or not seen >= UNSEEN):
            tqdm.write(f"warning: the pictures are not seen: grey ones in their place change the log-probs of "
                       f"{len(changes)} responses by {seen:.1g} nats a token, and those of {blind} not at all. Were "
                       "they lost on the way to the model, or inside it?")
        return {} if seen is None else {"picture_effect": seen}

    def log_groups(self, step: int, rollout: Rollout, rewards: Rewards, metrics: dict) -> None:
        """Before the update, which may fail: what it was to learn from, and what will keep it from learning."""
        self.log("responses.jsonl", group_lines(rollout, rewards, step))
        self.log("problems.jsonl", problem_lines(rollout, rewards, step))
        if step == len(rollout.batches) and self.chief:
            warn_first_rollout(metrics, self.cfg)

    def log_step(self, step: int, rollout: Rollout, metrics: dict) -> None:
        stage = rollout.batches[0].stage
        metrics = {"step": step, "stage": stage} | metrics
        self.log("metrics.jsonl", [metrics])
        if self.tracker is not None:
            self.tracker.log({k: v for k, v in metrics.items() if isinstance(v, (int, float))}, step=step)
        self.bar.update(len(rollout.batches))
        self.bar.set_postfix(stage=stage, reward=f"{metrics['reward']:.2f}",
                             accuracy=f"{metrics['accuracy']:.2f}", length=f"{metrics['length']:.0f}")

    def evaluate_if_due(self) -> None:
        """Held-out scores before the first step, at each stage's end and after the last."""
        step, steps = self.curriculum.position, len(self.curriculum)
        ends = step in (0, steps)
        if self.test and step not in self.evals and (ends or self.curriculum.batches[step - 1].ends_stage):
            if line := held_out(self.policy, self.test, self.cfg, self.folder / "held-out", step, ends, self.signals):
                rank, world = rank_and_world()
                pictured = [each for each in zip(self.test, line["shown"]) if each[0].images]
                line |= self.pictures_seen([self.told(*each) for each in pictured[:LOOKED_AT][rank::world]])
                self.evals[step] = line["eval"]
                self.log("metrics.jsonl", [{"step": step} | line])
                self.prune()
        if step == self.saved < steps:
            self.draw()

    def told(self, record: Record, shown: dict) -> tuple[Prompt, list[int]]:
        """A held-out problem's prompt, made again, and its response's text as tokens, without any vision tokens."""
        processor = self.policy.processor
        ids = processor.tokenizer(shown["text"], add_special_tokens=False).input_ids
        return processor.encode(record, self.cfg.prompt), [i for i in ids if i not in processor.vision_ids]

    def save_if_due(self, batch: Batch | None) -> None:
        """At each stage's end and every --save-every steps; without a batch: now. Not twice for one step."""
        step, every = self.curriculum.position, self.cfg.save_every
        due = every and step // every > max(self.saved, 0) // every  # (--refill may pass over a multiple)
        if step > self.saved and (batch is None or batch.ends_stage or due):
            if self.chief:
                for name in LOGS:  # the log reaches the disk before its checkpoint
                    sync(self.folder / name)
            save_checkpoint(self.folder, step, self.policy,
                            {"data": self.data, "curriculum": self.curriculum.state_dict()})
            self.saved = step
            self.prune()

    def prune(self) -> None:
        always = [r.id for r in self.test[:self.cfg.eval_limit or None]]  # what every evaluation answers
        if self.chief:
            evals = {step: sum(scores["greedy"]["by_problem"][i] for i in always) / len(always)
                     for step, scores in self.evals.items()}
            mark_best_and_prune(self.folder, evals, self.cfg.keep)

    def draw(self) -> None:
        """curves.png and responses.html, of all that is logged so far."""
        if self.chief:
            plot_curves(read_log(self.folder / "metrics.jsonl"), self.folder / "curves.png")
            groups = [(self.records[line_id], list(lines)) for (_, line_id), lines in itertools.groupby(
                read_log(self.folder / "responses.jsonl"), key=lambda line: (line["step"], line["id"]))]
            write_responses(groups, self.folder / "responses.html")

    def not_finite(self, step: int, rollout: Rollout, error: FloatingPointError) -> str:
        return (f"step {step}: {error}. Its problems: {', '.join(r.id for r in rollout.records)}. The newest whole "
                f"checkpoint is {max(checkpoints(self.folder), default='none')}; try a lower --lr or --grad-clip from "
                "there in a new run.")

    def close(self) -> None:
        """Save, draw, and say what came of it."""
        self.bar.close()
        self.save_if_due(None)
        self.prune()  # (a run that was killed between an evaluation and this)
        self.draw()
        self.signals.close()
        if self.tracker is not None:
            self.tracker.end_training()
        step, steps = self.curriculum.position, len(self.curriculum)
        if not self.chief:
            return
        if step and not self.policy.optimizer.state:
            print(f"warning: no group of any rollout had a signal: nothing was learned, and the weights are what they "
                  f"were. {NO_SIGNAL}")
        if step < steps or (self.test and steps not in self.evals):
            print(f"stopped after step {step}, saved; the same command with --resume"
                  f"{' and a larger --max-steps' * (0 < self.cfg.max_steps <= step)} goes on")
            return
        if self.test:
            print("\n" + before_after(self.evals[0], self.evals[steps]))
            write_json(self.folder / "scores.json", {"before": self.evals[0], "after": self.evals[steps]})
        print(f"\nthe run lies in {self.folder}: curves.png, responses.html, metrics.jsonl, "
              f"{checkpoints(self.folder)[-1].name} (a Hugging Face folder)")


def find_run(cfg: Config) -> Path | None:
    """The checkpoint to resume from, or None for a run that is new, or that died before its first.

    Raises ValueError when the folder holds another run, when --resume finds other settings than the run began with,
    when all of its checkpoints are damaged, and when its log is not that of its checkpoint: nothing is changed yet."""
    folder = Path(cfg.out)
    if cfg.resume != (folder / "settings.json").exists():
        raise ValueError(f"--resume: {folder} holds no run; check --out" if cfg.resume else
                         f"{folder} holds another run; add --resume to go on with it, or choose another --out")
    if not begun(folder, as_kept(cfg), FREE):
        return None
    lock(folder)
    newest = newest_whole(folder)
    last = step_of(newest) if newest else math.inf
    for name in LOGS:
        spare = cfg.refill * (name != "metrics.jsonl")  # a run that was killed in its first step has left the others
        end = max((line["step"] for line in read_log(folder / name, last)), default=0)
        if end < last if newest else end > spare or answers_after(folder, 0):
            raise ValueError(f"--resume: {folder / name} {f'ends at step {end}' if end else 'is missing or empty'}, "
                             f"the newest checkpoint is {newest.name if newest else 'missing'}; bring back what is "
                             "missing from a copy, or start again: move the folder away, or give another --out")
    return newest


def held_out(policy: Policy, test: list[Record], cfg: Config, folder: Path, step: int, ends: bool,
             signals: Signals) -> dict | None:
    """Answer the held-out problems greedily and, at the two ends of training, also at temperature 1 -> the line to log;
    None when asked to stop before all are answered. In between the first --eval-limit of them have to do.

    Answers are on disk as they come, and a run that goes on does not give them again. A collective."""
    records = test if ends else test[:cfg.eval_limit or None]
    scores, shown = {}, []
    for name, temperature, k in (("greedy", 0, 1), ("sampled", 1, cfg.eval_samples))[:2 if ends else 1]:
        results = roll_out(folder, f"step{step:06d}-{name}", records, lambda: (policy.sampler, policy.processor),
                           signals.unless_asked, style=cfg.prompt, temperature=temperature, samples=k,
                           max_tokens=cfg.max_response_tokens, max_rows=cfg.rollout_rows)
        if not results:
            return None
        scores[name] = summarize(results)
        if name == "greedy":
            shown = [{"id": r.record.id, "text": r.responses[0].text, "right": r.responses[0].accuracy > 0}
                     for r in results[:40]]
    return {"eval": scores, "shown": shown}


def step_metrics(responses: list[list[Response]], rewards: Rewards) -> dict[str, float]:
    """What one rollout was like, over all its P x G responses.

    reward                  mean of r_i, bonus and all
    accuracy, format        share of responses with the right answer, with the right format
    bonus                   share of responses that were paid the bonus (at most 1 / G)
    all_right, all_wrong    share of groups whose answers are all right, all wrong
    signal                  share of groups with weight above 0 and unequal rewards: those that are learned from
    weight                  mean w(d) over groups
    advantage_std           standard deviation of the weighted advantages
    problems                sampled: with --refill up to so many times P
    length, length_max      response tokens, mean and most
    truncated               share of responses cut off at the limit
    observation             share of what is in the picture that <observe> states, inventions counted against it

    Of the update, over the tokens it is trained on (means over the rollout's updates):

    entropy                 of the policy, in nats
    ratio                   pi / pi_old; 1 in the first update of a rollout
    clip_low, clip_high     share of tokens whose gradient was clipped away, below and above
    approx_kl, ref_kl       k3 estimates of KL(pi_old, pi); with --kl-coef, of KL(pi, starting model)
    sampler_gap             difference of the sampler's and the trainer's log-probs: 1e-6 in fp32, more in bf16; large
                            where the two are no longer one policy
    loss, grad_norm, lr     the loss; norm of the gradient before clipping; learning rate
    updates                 optimizer steps taken (an update without any signal takes none)

    picture_effect: at the first rollout and with eval, of some responses: mean |change| of a token's log-prob, in nats,
    when the pictures are grey; 0 where none reaches the model, and a warning.

    Of the machine: verifier_timeouts, answers given up on so far; tokens_per_second; seconds_pictures (waited for, not
    made: rollout.encode_ahead), _rollout, _reward, _update; memory, on a GPU the peak so far of the fullest rank, in
    GB. eval: held-out scores, overall and by difficulty level."""
    lengths = torch.tensor([[r.tokens for r in group] for group in responses]).float()  # [P, G]
    truncated = torch.tensor([[bool(r.truncated) for r in group] for group in responses])
    right = rewards.accuracy.sum(1)
    observed = rewards.observation[~rewards.observation.isnan()]
    metrics = {
        "reward": rewards.total.mean(), "accuracy": rewards.accuracy.mean(), "format": rewards.format.mean(),
        "bonus": (rewards.bonus > 0).float().mean(), "all_right": (right == lengths.shape[1]).float().mean(),
        "all_wrong": (right == 0).float().mean(), "signal": rewards.signal.float().mean(),
        "weight": rewards.weight.mean(), "advantage_std": rewards.advantages.std(), "length": lengths.mean(),
        "length_max": lengths.max(), "truncated": truncated.float().mean()}
    if len(observed):
        metrics["observation"] = observed.mean()
    return {name: value.item() for name, value in metrics.items()} | {"problems": len(responses)}


def system_metrics(rollout: Rollout, device: torch.device) -> dict[str, float]:
    """Time-outs, speed, a GPU's memory."""
    tokens = sum(r.tokens or 0 for group in rollout.responses for r in group)
    metrics = {"verifier_timeouts": sum(gather_shares([VERIFIER.timeouts])),
               "tokens_per_second": tokens / sum(rollout.seconds.values())}
    metrics |= {f"seconds_{name}": seconds for name, seconds in rollout.seconds.items()}
    if device.type == "cuda":
        metrics["memory"] = max(gather_shares([torch.cuda.max_memory_allocated() / 1e9]))
    return metrics


def group_lines(rollout: Rollout, rewards: Rewards, step: int, count: int = 2) -> list[dict]:
    """The first `count` groups of a rollout, as lines of responses.jsonl."""
    lines = []
    for p, record in enumerate(rollout.records[:count]):
        about = {"step": step, "stage": rollout.batches[0].stage, "weight": rewards.weight[p].item()}
        for g, line in enumerate(response_lines(record, rollout.responses[p], **about)):
            lines.append(line | {"bonus": rewards.bonus[p, g].item(), "reward": rewards.total[p, g].item(),
                                 "advantage": rewards.advantages[p, g].item()})
    return lines


def problem_lines(rollout: Rollout, rewards: Rewards, step: int) -> list[dict]:
    """Every problem's own history, a line of problems.jsonl a step: how many of G were right, mean reward, length."""
    return [{"step": step, "id": record.id, "stage": rollout.batches[0].stage, "difficulty": record.difficulty,
             "right": int(rewards.accuracy[p].sum()), "of": len(group), "reward": rewards.total[p].mean().item(),
             "length": mean(r.tokens for r in group)}
            for p, (record, group) in enumerate(zip(rollout.records, rollout.responses))]


NO_SIGNAL = ("Read responses.jsonl, then try easier or harder stages (--stage), a larger --group-size, or another "
             "model.")


def warn_first_rollout(metrics: dict[str, float], cfg: Config) -> None:
    """Say what will keep a run from learning, while it is cheap to stop."""
    if metrics["format"] < 0.5:
        tqdm.write(f"warning: only {metrics['format']:.0%} of the first responses have the format of --prompt "
                   f"{cfg.prompt}; groups all wrong or all right carry no format signal. Try an instruction-tuned "
                   "model, or a short supervised start on formatted answers"
                   + (", or --prompt think." if cfg.prompt == "observe" else "."))
    if metrics["signal"] == 0:
        tqdm.write(f"warning: no group of the first rollout has a signal: {metrics['all_right']:.0%} are all right, "
                   f"{metrics['all_wrong']:.0%} all wrong. {NO_SIGNAL}")


class Signals:
    """SIGINT (Ctrl-C) and SIGTERM (torchrun's, a cluster's) ask a run to stop. Sampling and evaluation are cut short,
    and their batch is given back; an update is finished, so that what is saved is whole. Asking again does nothing."""

    def __init__(self):
        self.asked = self.at_once = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number: int, frame) -> None:
        if not self.asked and rank_and_world()[0] == 0:  # (os.write, for print is not to be interrupted by itself)
            os.write(2, b"\nstopping: the step under way is finished or left undone, then all is saved\n")
        self.asked = True
        if self.at_once:
            self.at_once = False
            raise KeyboardInterrupt

    def unless_asked(self, work: Callable[[], T]) -> T | None:
        """The work's result; None, on all ranks, when any of them is asked to stop before the work is done. The work is
        this rank's own, without collectives, and is cut short; the answer is one."""
        result = None
        try:
            self.at_once = True
            result = None if self.asked else work()
            self.at_once = False
        except KeyboardInterrupt:
            pass
        return None if self.asked_of_any() else result

    def asked_of_any(self) -> bool:
        """Was any rank? A collective."""
        return any(gather_shares([self.asked]))

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def environment() -> dict:
    """Where the run's numbers come from: commit, versions of all that is installed, machine."""
    def git(*args: str) -> str | None:  # None: not a checkout, or no git
        command = ["git", "-C", str(HERE), *args]
        done = subprocess.run(command, capture_output=True, text=True) if shutil.which("git") else None
        return done.stdout.strip() if done and not done.returncode else None

    cpu = f"{platform.machine()}, {os.cpu_count()} cores"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    # (half-removed ones have no name)
    packages = {package.name: package.version for package in importlib.metadata.distributions() if package.name}
    changes = git("status", "--porcelain", "--", "*.py")
    return {"commit": git("rev-parse", "HEAD"), "uncommitted": None if changes is None else bool(changes),
            "python": platform.python_version(), "device": device, "threads": torch.get_num_threads(),
            "processes": rank_and_world()[1], "packages": dict(sorted(packages.items())), "command": sys.argv}


# --- checkpoints ------------------------------------------------------------------------------------------------------

def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted(path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{6,}", path.name))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def save_checkpoint(run: Path, step: int, policy: Policy, state: dict) -> None:
    """Write run/checkpoint-<step>: a plain Hugging Face folder, and trainer/ beside it. Whole or not at all.

    Rank 0 gathers and writes the weights; of AdamW's moments each rank writes its own. Written aside, forced to disk,
    then renamed. Raises OSError, naming what is left and what to do, when it cannot be written. A collective."""
    import torch.distributed.checkpoint as dcp  # (here, as in shard: its import takes a second)

    path, aside, chief = run / f"checkpoint-{step:06d}", run / "checkpoint.partial", rank_and_world()[0] == 0
    try:
        full = ((name, full_tensor(p.detach())) for name, p in policy.model.named_parameters()
                if p.requires_grad or not hasattr(policy.model, "peft_config"))  # (all ranks gather)
        weights = {name: value.cpu().contiguous() for name, value in full if chief}
        if chief:
            shutil.rmtree(aside, ignore_errors=True)
            save_weights(policy.sampler, weights, aside)
            policy.processor.tokenizer.save_pretrained(aside)
            pictures = copy.copy(policy.processor.image_processor)
            pictures.size = policy.processor.own_size
            pictures.save_pretrained(aside)
            (aside / "trainer").mkdir()
        del weights
        gather_shares([True])  # the folder is there
        if tensors := moments(policy):
            files = {name: 1 + i // 16 for i, name in enumerate(tensors)}  # (each is in memory as it is written)
            writer = dcp.HuggingFaceStorageWriter(str(aside / "trainer"), files, save_distributed=True)
            dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
        if chief:
            steps = {name: int(policy.optimizer.state[p]["step"]) for name, p in policy.model.named_parameters()
                     if p in policy.optimizer.state}  # (a weight that had no gradient in some step has taken fewer)
            sizes = {str(f.relative_to(aside)): f.stat().st_size for f in sorted(aside.rglob("*")) if f.is_file()}
            write_json(aside / "trainer" / "state.json", state | {"steps": steps, "files": sizes})
            for file in [*sorted(aside.rglob("*")), aside]:
                sync(file)
            os.replace(aside, path)
            sync(run)
    except (OSError, SafetensorError, dcp.api.CheckpointException) as error:
        if not chief:
            raise
        shutil.rmtree(aside, ignore_errors=True)
        left, free = checkpoints(run), shutil.disk_usage(run).free / 1e9
        raise OSError(f"{path} could not be saved: {error} ({free:.2f} GB are free). The checkpoints before it are "
                      f"whole, the newest is {left[-1].name if left else 'none: move the folder away'}. Make room, or "
                      f"lower --keep, then {'go on with --resume' if left else 'start again'}") from error


def moments(policy: Policy) -> dict[str, torch.Tensor]:
    """AdamW's, by the names of their weights, and shared out as these are."""
    state = policy.optimizer.state
    return {f"{kind} {name}": state[p][kind] for name, p in policy.model.named_parameters() if p in state
            for kind in ("exp_avg", "exp_avg_sq")}


def load_moments(path: Path, policy: Policy, steps: dict[str, int]) -> None:
    """Put AdamW's moments, saved by save_checkpoint, back: of each this rank's share, however many there were."""
    import torch.distributed.checkpoint as dcp

    fused = policy.optimizer.param_groups[0]["fused"]  # (the count of steps is wanted on the CPU, unless it is)
    for name, p in policy.model.named_parameters():
        if name in steps:
            policy.optimizer.state[p] = {
                "step": torch.tensor(float(steps[name]), device=p.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    if steps:
        dcp.load(moments(policy), storage_reader=dcp.HuggingFaceStorageReader(str(path / "trainer")),
                 no_dist=not dist.is_initialized())


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint that can be read, None where there are none at all; others are set aside, and said so.

    Read: each file is there and as long as it was, which is where a full disk or half a copy shows, and its JSON and
    the heads of its tensors are what they should be. Raises ValueError when none can be."""
    damaged: list[Path] = []
    for path in reversed(checkpoints(run)):
        try:
            files = read_json(path / "trainer" / "state.json")["files"]
            for name, size in files.items():
                if (path / name).stat().st_size != size:
                    raise ValueError(f"{name} is not as long as it was")
                if name.endswith(".json"):
                    read_json(path / name)
                elif name.endswith(".safetensors"):
                    with safe_open(path / name, "pt") as tensors:
                        tensors.keys()
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            tqdm.write(f"{path} is damaged: {error}; taking the one before it")
            damaged.append(path)
            continue
        for bad in damaged:
            aside = run / bad.name.replace("checkpoint", "damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(bad, aside)
        return path
    if damaged:
        raise ValueError(f"--resume: no checkpoint of {run} is whole; bring one back from a copy, or start again with "
                         "another --out")
    return None


def mark_best_and_prune(run: Path, evals: dict[int, float], keep: int) -> None:
    """Name the checkpoint of highest held-out accuracy (the earliest, of equals) in best.json; delete all but this and
    the newest `keep`. evals: step -> greedy accuracy."""
    there = {step_of(path): path for path in checkpoints(run)}
    scored = [step for step in there if step > 0 and step in evals]
    best = max(scored, key=lambda step: (evals[step], -step), default=None)
    if best is not None:
        write_json(run / "best.json", {"checkpoint": there[best].name, "accuracy": evals[best]})
    for step in sorted(there)[:-keep]:
        if step != best:
            shutil.rmtree(there[step])


def read_log(path: Path, last: float = math.inf, cut: bool = False) -> list[dict]:
    """A log's lines up to step `last`, without what a killed process left after them: lines of later steps, part of a
    line. cut: these are cut off the file. Raises ValueError where lines that are to be kept come after such a one."""
    lines, size, broken = [], 0, 0
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], 1):
        try:
            line = json.loads(text)
            past = line["step"] > last
        except (ValueError, KeyError, TypeError):
            past = True
        if past or not text.endswith(b"\n"):
            broken = broken or number
        elif broken:
            raise ValueError(f"{path}, line {broken}: broken, or of a later step than lines after it, which would be "
                             "lost; mend it, bring the log back from a copy, or start a new run with another --out")
        else:
            lines.append(line)
            size += len(text)
    if cut:
        path.touch()
        os.truncate(path, size)
    return lines


def answers_after(folder: Path, step: int) -> list[Path]:
    """The files of held-out answers of later steps."""
    return [file for file in (folder / "held-out").glob("step*-*.jsonl") if int(file.name[4:10]) > step]


if __name__ == "__main__":
    run_program(main, "stopped", (ValueError, OSError))
