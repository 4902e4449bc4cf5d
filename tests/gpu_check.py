"""What only a GPU can show, cheapest first: a line of JSON a check, flushed, so that a lost machine loses one check.

    python tests/gpu_check.py                                       # all: some six minutes of an H100
    python tests/gpu_check.py --only kernels,capture                # these
    python tests/gpu_check.py --budget 360 --out gpu_check.jsonl    # where a GPU is lent: none begins after 360 s

A check that fails says so, beside what it had found, and the next begins; the exit status is then 1. Without a GPU the
same code runs at tiny sizes, in fp32, to be tried itself, and what cannot be had says that it needs one. What is
expected is from reading and arithmetic: none of it has met a GPU yet.
"""
from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import math
import os
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bench
import torch
import torch.nn.functional as F
from plain import plain_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

import rollout
from data import Processor, Prompt, Record, load_records

TOY = Path(__file__).resolve().parent.parent / "assets" / "toy"
DEVICE = rollout.claim_device()
GPU = DEVICE.type == "cuda"
HALF = torch.bfloat16 if GPU else torch.float32  # what a policy samples in
SIZE = bench.SIZES["3b" if GPU else "tiny"]
HEADS, KEY_HEADS, WIDTH, LAYERS = (16, 2, 128, 36) if GPU else (4, 2, 16, 2)  # 3B's attention
PROMPT, RESPONSE = (9216, 8192) if GPU else (16, 32)  # its preset's limits, tokens
CAPTURE: Callable[[Callable], Callable] = rollout.capture if GPU else lambda step: step
NEEDS = {"needs": "a GPU"}
Found = Iterator[tuple[str, Any]]  # what a check finds, by name, as it comes


# --- tools ------------------------------------------------------------------------------------------------------------

def ms(work: Callable[[], Any], repeats: int = 10) -> float:
    """The median, after two that warm up."""
    for _ in range(2):
        work()
    return 1e3 * statistics.median(bench.time_of(work) for _ in range(repeats))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, of the whole tensor."""
    found, wanted = found.detach().double().reshape(wanted.shape), wanted.detach().double()
    return ((found - wanted).norm() / wanted.norm()).item()


def normal(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)


def reset() -> None:
    bench.clock()  # (a fault on the device shows here)
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict:
    """At most since reset(). retries, so far: all cached memory was given back, the first sign of too little."""
    if not GPU:
        return NEEDS
    found = torch.cuda.memory_stats()
    return {"allocated GB": found["allocated_bytes.all.peak"] / 1e9,
            "reserved GB": found["reserved_bytes.all.peak"] / 1e9, "retries": found["num_alloc_retries"]}


@cache
def problems() -> tuple[Processor, list[Record], list[Prompt]]:
    processor = Processor(str(TOY / "model"))
    records = load_records(str(TOY / "test.parquet"), limit=16 if GPU else 2)
    return processor, records, [processor.encode(record, "observe") for record in records]


def build(dtype: torch.dtype, layers: int = LAYERS, own: bool = True, **vision) -> PreTrainedModel:
    """A model of 3B's widths, without a GPU of tiny ones."""
    torch.manual_seed(0)
    setting = {"text": SIZE["text"] | {"num_hidden_layers": layers}, "vision": SIZE["vision"] | vision}
    return bench.build(setting, problems()[0], DEVICE, dtype, own)


def policies() -> Iterator[tuple[str, PreTrainedModel, PreTrainedModel]]:
    """The toy, then 3B's widths in 2 layers of random weights: what samples, and the fp32 weights that are trained."""
    toy = str(TOY / "model")
    yield "toy", rollout.load_policy(toy, DEVICE, dtype=HALF), rollout.load_policy(toy, DEVICE)
    sampler, trained = (build(dtype, 2, depth=2, fullatt_block_indexes=[1]) for dtype in (HALF, torch.float32))
    sampler.load_state_dict(trained.state_dict())
    yield "3B's widths" if GPU else "tiny", sampler, trained


def sampled(model: PreTrainedModel, temperature: float) -> list[rollout.Group]:
    return rollout.sample_groups(model, *problems(), samples=8, temperature=temperature, seed=1,
                                 max_tokens=160 if GPU else 40)


# --- the checks -------------------------------------------------------------------------------------------------------

def environment() -> Found:
    """Versions, card, memory, and what it can do. Expected: cuDNN's attention off; an H100 copies some 3,000 GB/s and
    an H200 4,300, read and written, and both multiply 800 TFLOP/s in bf16."""
    for package in ("torch", "transformers", "accelerate", "flash-attn", "trl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)
    yield "python, cuda, cudnn", [sys.version.split()[0], torch.version.cuda, torch.backends.cudnn.version()]
    yield "cores", os.cpu_count()
    yield "cuDNN attention on", torch.backends.cuda.cudnn_sdp_enabled()
    yield "order of SDPA", str(torch._C._get_sdp_priority_order())
    yield "device", torch.cuda.get_device_name() if GPU else NEEDS
    yield "GB free, in all", [n / 1e9 for n in torch.cuda.mem_get_info()] if GPU else NEEDS
    data = torch.zeros(2**28 if GPU else 2**22, device=DEVICE)
    there, matrix = torch.empty_like(data), normal(*[8192 if GPU else 256] * 2, dtype=torch.bfloat16).detach()
    yield "copy GB/s", 2 * data.nbytes / ms(lambda: there.copy_(data)) / 1e6
    yield "bf16 TFLOP/s", 2 * len(matrix)**3 / ms(lambda: matrix @ matrix) / 1e9


def kernels() -> Found:
    """rollout.varlen against fp64 by hand, relative errors of the output and of each gradient, for torch's kernel and,
    where it is installed, flash-attn's. Expected: 2e-3 to 6e-3 in bf16; 1e-2 or more is a fault. (fp32: 1e-6.)"""
    windows = [64] * 8 + [32, 16, 700]  # (the last as a layer that sees the whole picture)
    for flash in (False, True) if rollout.is_flash_attn_2_available() else (False,):
        with patch.object(rollout, "is_flash_attn_2_available", return_value=flash):
            name = "flash-attn" if flash else "torch"
            yield f"{name}, prompt and responses", kernel_errors(
                HEADS, KEY_HEADS, WIDTH, True, [321, 5, 64, 1, 400], [321, 326, 385, 322, 721])
            yield f"{name}, windows", kernel_errors(16, 16, 80, False, windows, windows)


def kernel_errors(heads: int, key_heads: int, width: int, causal: bool, queries: list[int], keys: list[int]) -> dict:
    torch.manual_seed(0)
    given = normal(sum(queries), heads, width), *(normal(sum(keys), key_heads, width) for _ in "kv")
    ends = (torch.tensor([0, *n], device=DEVICE).cumsum(0).int() for n in (queries, keys))
    out = rollout.varlen(*given, *ends, max(queries), max(keys), width**-0.5, causal)
    grad = torch.randn_like(out)
    exact = [x.detach().double().requires_grad_() for x in given]
    wanted = plain_attention(*exact, queries, keys, width**-0.5, causal)
    found = out, *torch.autograd.grad(out, given, grad)
    right = wanted, *torch.autograd.grad(wanted, exact, grad.double())
    return dict(zip(("out", "q", "k", "v"), map(error, found, right)))


def cudnn_nan() -> Found:
    """Gradients of q that are not finite, where all scores are -120 and a mask is given (pytorch issue 196678).
    Expected: with cuDNN, 704 tokens, 64 over a multiple of 128: all 45,056; at 640, and without it, none."""
    for name in ("off", "on"):
        torch.backends.cuda.enable_cudnn_sdp(name == "on")
        for length in (704, 640):
            torch.manual_seed(0)
            q, k, v = (normal(1, 1, length, 64, dtype=torch.bfloat16) for _ in "qkv")
            with torch.no_grad():
                q *= 0.1
                k *= 0.1
                q[..., 0], k[..., 0] = 1, -120 * 8
            mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()[None, None]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            grad = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))[0]
            yield f"cuDNN {name}, {length} tokens", (~grad.isfinite()).sum().item()


def row_ways(prompt: int, response: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Attention of a prompt and 8 responses in a row, one layer of 3B, forward and backward -> what comes out."""
    own, length = torch.arange(prompt), prompt + 8 * response
    responses = torch.arange(prompt, length).split(response)
    sequences = rollout.Sequences.of(
        [(own, own), *((places, torch.cat([own, places])) for places in responses)], DEVICE)
    segment = torch.tensor([0] * prompt + [g for g in range(1, 9) for _ in range(response)], device=DEVICE)
    mask = ((segment == 0) | (segment == segment[:, None])).tril()[None, None]
    q, k, v = (normal(1, heads, length, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS))

    def ours() -> torch.Tensor:
        out, _ = rollout.attention(SimpleNamespace(scaling=WIDTH**-0.5), q, k, v, sequences=sequences)
        torch.autograd.grad(out, (q, k, v), out.detach())
        return out

    def masked(cudnn: bool) -> torch.Tensor:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        keys, values = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, keys, values, mask).transpose(1, 2)
        torch.autograd.grad(out, (q, k, v), out.detach())
        return out

    return {"ours": ours, "mask": partial(masked, False), "mask, cuDNN": partial(masked, True)}


def new_shapes() -> Found:
    """Seconds of the first forward and backward at lengths not met before; the longest comes first, which also loads
    the kernels and takes the memory. Expected: cuDNN 0.02 to 0.5 at each, the others some ms."""
    for name in ("ours", "mask", "mask, cuDNN"):
        prompts = (1400, 1301, 1313, 1327, 1345) if GPU else (9, 7)
        yield name, [bench.time_of(row_ways(prompt, 200 if GPU else 3)[name]) for prompt in prompts]


def packed_attention() -> Found:
    """One layer of 3B, a prompt and 8 responses in a row: ms forward and backward, and relative difference. Expected:
    ours twice as fast as a mask or more (at 8 x 400 it computes a third of the pairs), different by 5e-3."""
    for prompt, response in ((1345, 64), (1345, 400), (1345, 1000)) if GPU else ((9, 4),):
        ways = row_ways(prompt, response)
        for name, way in ways.items():
            yield f"{name}, {prompt} + 8 x {response}", {"ms": ms(way, 5), "from ours": error(way(), ways["ours"]())}


@torch.no_grad()
def decode_attention() -> Found:
    """ms of a step's attention, 36 layers, captured, and its error. Expected: 64 rows of 1,745 slots are 4.1 GB, 1.4 ms
    of an H100. What SDPA (ours without flash-attn) takes beyond that is the mask, and that a row's key head is one
    block of threads: the more, the fewer and longer the rows. seqused_k has neither."""
    for name in ("SDPA", "flash-attn", "SDPA, cuDNN", "seqused_k"):
        torch.backends.cuda.enable_cudnn_sdp("cuDNN" in name)
        for rows, slots in ((64, 1745), (64, 9477), (8, 9477)) if GPU else ((2, 17),):  # (all beyond the caches)
            ways, found = cache_ways(rows, slots), {"needs": f"a GPU with {name}"}
            if way := ways.get(name):
                found = {"error": error(way(), ways["fp32"]())}
                found["ms"] = ms(CAPTURE(lambda way=way: [way() for _ in range(LAYERS)]))
            yield f"{name}, {rows} rows of {slots}", found


def cache_ways(rows: int, slots: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Attention to one layer's cache as Slots has it: longer than what is in use, each row filled as far as it is."""
    whole, shared = slots + 255, HEADS // KEY_HEADS
    q, k, v = (normal(rows, KEY_HEADS, n, WIDTH).detach() for n in (shared, whole, whole))
    lengths = torch.randint(slots // 2, slots, (rows,), device=DEVICE, dtype=torch.int32)
    mask = (torch.arange(slots, device=DEVICE) < lengths[:, None])[:, None, None]
    used = [x[:, :, :slots] for x in (k, v)]
    ways = {"fp32": lambda: F.scaled_dot_product_attention(q.float(), used[0].float(), used[1].float(), mask)}
    ways["SDPA"] = ways["SDPA, cuDNN"] = partial(F.scaled_dot_product_attention, q, *used, mask)
    if GPU and rollout.is_flash_attn_2_available():
        ways["flash-attn"] = partial(rollout.flash_attn_with_kvcache, q.flatten(1, 2)[:, None],
                                     *(x.transpose(1, 2) for x in used), cache_seqlens=lengths)
    if GPU:  # a row's key head is a sequence: the cache is taken as it lies
        ends = torch.arange(rows * KEY_HEADS + 1, device=DEVICE, dtype=torch.int32)
        flash = partial(torch.ops.aten._flash_attention_forward, q.flatten(0, 1),
                        *(x.flatten(0, 2)[:, None] for x in (k, v)), ends, ends * whole, 1, slots, 0.0, False, False,
                        seqused_k=lengths.repeat_interleave(KEY_HEADS))
        ways["seqused_k"] = lambda: flash()[0]
    return ways


@torch.no_grad()
def vision_tower() -> Found:
    """3B's, on a picture of 1,280 tokens: ms forward, and of the patch embedding alone; the features' difference from
    fp32. Expected: ours faster (transformers' own makes an SDPA call a window, 2,244 in all), both some 1e-2 from fp32;
    the convolution takes anything from a ms to seconds."""
    model, (height, width) = build(HALF, 1, own=False), (64, 80) if GPU else (8, 8)
    tower, grid = model.model.visual, torch.tensor([[1, height, width]], device=DEVICE)
    pixels, features = normal(height * width, 3 * 2 * 14 * 14).detach(), {}
    for name in ("transformers' own", "ours", "fp32"):
        if name == "ours":
            rollout.use_own_kernels(model)
        elif name == "fp32":
            model.float()
        given = pixels.to(model.dtype)
        features[name] = tower(given, grid).pooler_output
        yield name, {"ms": ms(partial(tower, given, grid), 3), "embedding": ms(partial(tower.patch_embed, given))}
    yield "from fp32", {name: error(found, features["fp32"]) for name, found in features.items()}


def capture() -> Found:
    """A step captured as a CUDA graph, and the same step one by one, batch by batch alike. Expected: all responses the
    same, their log-probs to 1e-3, no graph that failed; captured twice as fast or more, on models as small as these."""
    for name, sampler, _ in policies():
        for temperature in (0.0, 1.0):
            one_by_one, slow, _ = decoded(sampler, temperature, lambda step: step)
            captured, fast, faults = decoded(sampler, temperature, CAPTURE)
            same = [(a.logprobs - b.logprobs).abs().max().item() for a, b in zip(one_by_one, captured, strict=True)
                    if a.ids == b.ids]
            yield f"{name}, temperature {temperature}", {
                "same": len(same) / len(captured), "log-probs of the same differ by": max(same, default=None),
                "seconds, one by one": slow, "seconds, captured": fast, "graphs that failed": faults}


def decoded(model: PreTrainedModel, temperature: float, graph: Callable) -> tuple[list[rollout.Sample], float, list]:
    """Samples of rollout.decode with this `graph`, seconds of a second time, what was said of graphs that failed."""
    real = rollout.decode

    @wraps(real)  # (transformers reads its signature)
    def decode(*args, **given):
        return real(*args, **given | {"graph": graph})

    with patch.object(rollout, "decode", decode), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        groups = sampled(model, temperature)
        took = bench.time_of(partial(sampled, model, temperature))
    faults = [str(w.message)[:300] for w in said if "CUDA graph" in str(w.message)]
    return [sample for group in groups for sample in group.samples], took, faults


def gap() -> Found:
    """|Difference| of log-probs between what samples (bf16) and what is trained (fp32 weights, autocast), and of both
    from fp32 throughout, mean and most. Expected: means of 1e-3 to 1e-2, each as far from fp32 as from the other; above
    0.05 the ratio of new to old policy would be noise. All gradients finite."""
    for name, sampler, trained in policies():
        groups = sampled(sampler, 1.0)
        rows = [rollout.Packed(group.prompt, [sample.ids for sample in group.samples]) for group in groups]
        score = partial(rollout.response_logprobs, trained.train(), problems()[0], rows, 1.0)
        taken = pad_sequence([s.logprobs for group in groups for s in group.samples], batch_first=True).to(DEVICE)
        logp, _, mask = score()
        (logp.sum() / mask.sum()).backward()
        with torch.no_grad(), patch.object(rollout, "autocast", lambda model: contextlib.nullcontext()):
            exact = score()[0]
        for pair, a, b in (("sampler, trainer", taken, logp), ("sampler, fp32", taken, exact),
                           ("trainer, fp32", logp, exact)):
            apart = (a - b).abs()[mask]
            yield f"{name}: {pair}", {"mean": apart.mean().item(), "most": apart.max().item()}
        finite = [p.grad.isfinite().all().item() for p in trained.parameters() if p.grad is not None]
        yield f"{name}: gradients, finite", [len(finite), sum(finite)]


def floor() -> Found:
    """A captured decode step of 3B at 64 rows of 1,745 slots, and its share of what reading weights and cache once
    takes; the same of a rollout whose responses end. Expected: 7 to 8 ms on an H100, 6 on an H200, of which drawing
    below 0.5; a share of 0.4 to 0.5 (vLLM's own class of engines reaches 0.65 to 0.7)."""
    world, rate = bench.Bench("3b" if GPU else "tiny"), bench.bandwidth(DEVICE)
    few, many = (272, 528) if GPU else (8, 24)  # (between these, after 1,345 tokens of prompt, 1,745 slots are filled)

    def sample(tokens: int) -> None:
        rollout.sample_groups(world.sampler, world.processor, world.records, world.prompts, samples=8, temperature=1.0,
                              max_tokens=tokens, seed=0, max_rows=64)

    sample(few)
    prefill, short, long = (min(bench.time_of(partial(sample, n)) for _ in range(2)) for n in (1, few, many))
    text = world.sampler.config.text_config
    weights = sum(p.nbytes for p in world.sampler.model.language_model.parameters())  # (tied with the head)
    slots = statistics.mean(len(prompt.ids) for prompt in world.prompts) + (few + many) / 2
    cached = 8 * len(world.prompts) * slots * LAYERS * 2 * KEY_HEADS * WIDTH * HALF.itemsize
    step, least = (long - short) / (many - few), (weights + cached) / rate
    yield "step", {"ms": 1e3 * step, "share of the floor": least / step, "slots": slots, "GB/s": rate / 1e9,
                   "GB of weights": weights / 1e9, "GB of cache": cached / 1e9}
    logits, excluded = normal(64, text.vocab_size).detach(), torch.tensor(world.processor.vision_ids, device=DEVICE)
    uniform = torch.rand(64, 1, device=DEVICE, dtype=torch.float64)
    yield "ms to draw", ms(lambda: rollout.draw(rollout.log_distribution(logits, 1.0, excluded), uniform))
    whole = bench.time_of(world.ours_rollout) - prefill
    yield "rollout", {"prefill seconds": prefill, "decode seconds": whole,
                      "share of the floor": bench.floor_seconds(world, rate) / whole}


@torch.no_grad()
def memory_of_sampling() -> Found:
    """3B's cache at the preset's limits, 9,216 tokens and 8,192 more, as many rows as prompts_that_fit allows, 0.64 GB
    each. Expected: as much reserved as allocated, no retries; when rows leave, half a GB more for a moment."""
    model = build(HALF).eval()
    text, longest = model.model.language_model, Prompt(torch.zeros(PROMPT, dtype=torch.long), None, None)
    fit = rollout.prompts_that_fit(model, [longest], 8, RESPONSE)
    prompts = min(32 if GPU else 2, fit)
    keys_values = ([normal(prompts, KEY_HEADS, PROMPT, WIDTH).detach() for _ in "kv"] for _ in range(LAYERS))
    layers = [SimpleNamespace(keys=keys, values=values) for keys, values in keys_values]
    slots = rollout.Slots(layers, torch.zeros(prompts, dtype=torch.long, device=DEVICE), 8, HALF, RESPONSE)
    slots.size += RESPONSE
    slots.lengths += RESPONSE - 1  # (one is left, for the step)

    def step() -> None:
        ids = torch.full((len(slots.lengths), 1), 100, device=DEVICE)
        text(inputs_embeds=text.embed_tokens(ids), attention_mask=slots.mask(), slots=slots, use_cache=False,
             position_ids=slots.lengths.expand(3, -1)[..., None])

    yield "prompts that fit", fit
    yield "all rows", {"rows": 8 * prompts, "ms of a step, not captured": ms(step, 3), **peaks()}
    slots.select(torch.arange(0, 8 * prompts, 2, device=DEVICE))
    yield "half of them", {"ms of a step, not captured": ms(step, 3), **peaks()}


def memory_of_update() -> Found:
    """Two steps of 3B (AdamW's moments come with the first) on the longest row of its preset: a prompt that is all
    picture, 9,216 tokens, and a response of 8,192. Expected: 60 GB of weights, gradients and moments, 20 to 30 beside
    them, no retries, some 3 seconds. Below 100 GB of memory it is tried with half of the layers."""
    whole = not GPU or torch.cuda.get_device_properties(0).total_memory > 100e9
    if not whole:
        yield "all layers", {"needs": "141 GB"}
    model, processor = build(torch.float32, LAYERS if whole else LAYERS // 2).train(), problems()[0]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=GPU)
    (start, end), side = processor.vision_ids[:2], 2 * math.isqrt(PROMPT)  # (a token is 2 x 2 patches)
    picture = Prompt(torch.tensor([start, *[processor.image_id] * PROMPT, end]), torch.randn(side**2, 3 * 2 * 14 * 14),
                     torch.tensor([[1, side, side]]))
    rows = [rollout.Packed(picture, [[100 + i % 200 for i in range(RESPONSE)]])]

    def step() -> None:
        rollout.response_logprobs(model, processor, rows, 1.0)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    yield "layers", model.config.text_config.num_hidden_layers
    yield "GB of weights, gradients, moments", 16 * sum(p.numel() for p in model.parameters()) / 1e9
    for number in (1, 2):
        yield f"step {number}", {"seconds": bench.time_of(step), **peaks()}


CHECKS = (environment, kernels, cudnn_nan, new_shapes, packed_attention, decode_attention, vision_tower, capture, gap,
          floor, memory_of_sampling, memory_of_update)


# --- the run ----------------------------------------------------------------------------------------------------------

def line_of(check: Callable[[], Found]) -> dict:
    """What the check found, and what it failed of, if it did."""
    start, found = time.monotonic(), {}
    line = {"check": check.__name__, "found": found}
    rollout.claim_device()  # (turns off what the check before may have turned on)
    try:
        for name, value in check():
            found[name] = value
    except Exception as fault:
        line |= {"failed": repr(fault)[:500], "where": traceback.format_exc()[-1500:]}
    return line | {"seconds": time.monotonic() - start}


def main(args: list[str] | None = None) -> None:
    names = [check.__name__ for check in CHECKS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="add the lines to this file too, as they come")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no check begins")
    parser.add_argument("--only", default=",".join(names), help="checks, by name, with commas between them")
    parser.add_argument("--failed", action="store_true", help=argparse.SUPPRESS)  # (one has, in the process before)
    given = parser.parse_args(args)
    chosen, end, failed = given.only.split(","), time.monotonic() + given.budget, given.failed
    if unknown := set(chosen) - set(names):
        parser.error(f"no check is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    rollout.start_processes()
    for name in (left := [name for name in names if name in chosen]).copy():
        left.remove(name)
        late = time.monotonic() >= end
        line = {"check": name, "left out": "no time"} if late else line_of(CHECKS[names.index(name)])
        digits = json.loads(json.dumps(line, default=str), parse_float=lambda text: float(f"{float(text):.4g}"))
        print(json.dumps(digits), flush=True)
        if given.out:
            with open(given.out, "a") as file:
                file.write(json.dumps(digits) + "\n")
        failed |= "failed" in line
        try:
            reset()
        except RuntimeError:  # a fault that ends all that a process can do with the device: the rest in another
            rest = ["--failed", "--only", ",".join(left), "--budget", str(end - time.monotonic())]
            rest += ["--out", str(given.out)] if given.out else []
            os.execv(sys.executable, [sys.executable, __file__, *rest]) if left else sys.exit(1)
    sys.exit(failed)


if __name__ == "__main__":
    main()
