"""What only a GPU can show, the cheapest first: a line of JSON for each check, written at once, so that a machine that
is lost loses one check.

    python tests/gpu_check.py --out assets/gpu.jsonl --budget 360          # where a GPU is lent
    python tests/gpu_check.py --only kernels,capture                       # on a CPU it tries its own code, tiny

A check that fails says so, and the next begins; the exit status is 1 then. Nothing is downloaded: weights are random,
or the built-in world's. What is expected stands in each check's docstring.
"""
from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import accelerate
import bench
import torch
import torch.nn.functional as F
import transformers
from plain import transformers_own
from torch.nn.utils.rnn import pad_sequence

import rollout
from data import Processor, load_records
from rollout import Packed, Slots

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
HALF = torch.bfloat16 if GPU else torch.float32
TOY = ROOT / "assets/toy"


def milliseconds(work: Callable, repeats: int = 10) -> float:
    """The median of `repeats`, after two that warm up."""
    seconds = sorted([bench.time_of(work) for _ in range(repeats + 2)][2:])
    return round(1000 * seconds[len(seconds) // 2], 3)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, of norms."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


@contextlib.contextmanager
def cudnn(on: bool) -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def flash_attn_on(on: bool) -> contextlib.AbstractContextManager:
    """With flash-attn's kernels, where it is installed, or with torch's."""
    stack, real = contextlib.ExitStack(), rollout.is_flash_attn_2_available
    rollout.is_flash_attn_2_available = (lambda: on)
    stack.callback(setattr, rollout, "is_flash_attn_2_available", real)
    return stack


KERNELS = {"torch": False} | ({"flash-attn": True} if rollout.is_flash_attn_2_available() else {})


def empty() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def gigabytes() -> dict[str, float]:
    """The peaks since the last `empty`."""
    if not GPU:
        return {"allocated": 0.0, "reserved": 0.0}
    return {"allocated": torch.cuda.max_memory_allocated() / 1e9, "reserved": torch.cuda.max_memory_reserved() / 1e9}


# --- kernels ----------------------------------------------------------------------------------------------------------

def environment() -> dict:
    """Versions, card, and what it can do. cuDNN's attention is to be off."""
    found = {"torch": torch.__version__, "transformers": transformers.__version__, "cores": os.cpu_count(),
             "accelerate": accelerate.__version__, "kernels": list(KERNELS), "device": "CPU",
             "cuDNN attention": torch.backends.cuda.cudnn_sdp_enabled(),
             "GB/s": bench.bandwidth(DEVICE) / 1e9, "TFLOP/s": bench.flops(DEVICE) / 1e12}
    if GPU:
        free, total = torch.cuda.mem_get_info()
        found |= {"device": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version(),
                  "free GB": free / 1e9, "total GB": total / 1e9}
    return found


def sequences(lengths_q: list[int], lengths_k: list[int], heads: int, key_heads: int, width: int,
              ) -> tuple[list[torch.Tensor], tuple]:
    """Queries, keys, values, a gradient to come; and the ends and longest that rollout.varlen takes."""
    torch.manual_seed(0)
    shapes = (sum(lengths_q), heads), (sum(lengths_k), key_heads), (sum(lengths_k), key_heads), (sum(lengths_q), heads)
    tensors = [torch.randn(*shape, width, device=DEVICE, dtype=HALF) for shape in shapes]
    ends = (torch.tensor([0, *n]).cumsum(0).int().to(DEVICE) for n in (lengths_q, lengths_k))
    return tensors, (*ends, max(lengths_q), max(lengths_k))


def run(tensors: list[torch.Tensor], ends: tuple, causal: bool) -> tuple[torch.Tensor, ...]:
    """rollout.varlen, and its gradients."""
    inputs = [t.detach().requires_grad_() for t in tensors[:3]]
    out = rollout.varlen(*inputs, *ends, inputs[0].shape[-1]**-0.5, causal)
    return out.detach(), *torch.autograd.grad(out, inputs, tensors[3])


def kernels() -> dict:
    """Attention of sequences in bf16 against fp64, output and gradients: below 0.01 is bf16's rounding. Grouped heads,
    causal, aligned at the ends; and the vision tower's windows, of head dimension 80."""
    found = {}
    for name, kernel in KERNELS.items():
        for what, lengths_q, lengths_k, shape, causal in (
                ("responses", [321, 5, 64, 1, 400], [321, 326, 385, 322, 721], (16, 2, 128), True),
                ("windows", [64, 64, 16, 64, 300], [64, 64, 16, 64, 300], (16, 16, 80), False)):
            tensors, ends = sequences(lengths_q, lengths_k, *shape)
            with flash_attn_on(kernel):
                got = run(tensors, ends, causal)
            exact = [t.double().cpu() for t in tensors]
            want = run(exact, tuple(e.cpu() if isinstance(e, torch.Tensor) else e for e in ends), causal)
            found[f"{what}, {name}"] = dict(zip(("out", "q", "k", "v"), map(difference, got, want)))
    if max(max(part.values()) for part in found.values()) > 0.01:
        raise ArithmeticError(f"not the attention that it should be: {found}")
    return found


def cudnn_nan() -> dict:
    """pytorch issue 196678: with a mask, L % 128 == 64 and a log-sum-exp below -88.7, cuDNN's gradients were NaN. How
    many are, with it and without: the reason why it is off; without it none may be."""
    found = {}
    for on in (True, False):
        for length in (704, 640):
            torch.manual_seed(0)
            q, k, v = (torch.randn(1, 1, length, 64, device=DEVICE, dtype=HALF) * scale for scale in (0.1, 0.1, 1))
            q[..., 0], k[..., 0] = 1.0, -960.0
            q, k, v = (x.requires_grad_() for x in (q, k, v))
            mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()[None, None]
            with cudnn(on):
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
            found[f"cuDNN {on}, L {length}"] = sum(int((~x.grad.isfinite()).sum()) for x in (q, k, v))
    return found


def new_lengths() -> dict:
    """Seconds, forward and backward, of the first calls for lengths never met before: every micro-batch has its own.
    By rollout.varlen no more than of later ones; cuDNN makes a plan for each, 0.02 to 0.5 s."""
    found: dict[str, list[float]] = {}
    for length in (3001, 3011, 3021) if GPU else (65, 67):
        for on in (True, False):
            q, k, v = (torch.randn(1, 16, length, 128, device=DEVICE, dtype=HALF, requires_grad=True) for _ in range(3))
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=DEVICE).tril()

            def masked(q=q, k=k, v=v, mask=mask) -> None:
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()

            with cudnn(on):
                found.setdefault(f"mask, cuDNN {on}", []).append(bench.time_of(masked))
        tensors, ends = sequences([length], [length], 16, 2, 128)
        found.setdefault("sequences", []).append(bench.time_of(lambda: run(tensors, ends, True)))
    return found


def attention_of_a_row() -> dict:
    """Forward and backward, ms, of one layer of 3B on a prompt and 8 responses: with a mask, and as sequences."""
    found = {}
    for prompt, response in ((1345, 64), (1345, 400), (1345, 1000)) if GPU else ((9, 4),):
        tensors, ends = sequences([prompt] + [response] * 8, [prompt] + [prompt + response] * 8, 16, 2, 128)
        line = {}
        for name, kernel in KERNELS.items():
            with flash_attn_on(kernel):
                line[name] = milliseconds(lambda: run(tensors, ends, True), 5)
        segment = torch.tensor([0] * prompt + [g for g in range(1, 9) for _ in range(response)], device=DEVICE)
        mask = ((segment == 0) | (segment == segment[:, None])).tril()[None, None]
        q, k, v = (torch.randn(1, 16, len(segment), 128, device=DEVICE, dtype=HALF, requires_grad=True)
                   for _ in range(3))
        line["mask"] = milliseconds(
            lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward(), 5)
        found[f"{prompt} + 8 x {response}"] = line
    return found


def attention_of_a_step() -> dict:
    """Of one decode step and one layer of 3B: ms, and difference from fp32, by SDPA with a mask, as without flash-attn,
    by flash-attn's kernel for caches, and by torch's with seqused_k, which is not used yet."""
    found = {}
    for rows, slots in ((64, 1601), (64, 9477), (8, 9477)) if GPU else ((2, 17),):
        torch.manual_seed(0)
        q = torch.randn(rows, 2, 8, 128, device=DEVICE, dtype=HALF)
        k, v = (torch.randn(rows, 2, slots, 128, device=DEVICE, dtype=HALF) for _ in range(2))
        lengths = torch.randint(slots // 2, slots, (rows,), device=DEVICE)
        mask = (torch.arange(slots, device=DEVICE) < lengths[:, None])[:, None, None]
        want = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
        flat, ends = q.flatten(1, 2), torch.arange(rows + 1, device=DEVICE, dtype=torch.int32)
        pages = [x.transpose(1, 2).contiguous() for x in (k, v)]  # [rows, slots, key heads, D]

        def masked() -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        def seqused() -> torch.Tensor:
            return rollout.varlen_attn(flat, *(x.flatten(0, 1) for x in pages), ends, ends * slots, 1,
                                       slots, seqused_k=lengths.int(), enable_gqa=True)

        def flash() -> torch.Tensor:
            return rollout.flash_attn_with_kvcache(flat[:, None], *pages, cache_seqlens=lengths.int())

        ways = {"mask": masked}
        if GPU and rollout.GROUPED:  # (torch 2.11 has no seqused_k)
            ways["seqused_k"] = seqused
        if "flash-attn" in KERNELS:
            ways["flash-attn"] = flash
        found[f"{rows} rows of {slots}"] = {name: {"ms": milliseconds(way, 20), "differs by": difference(
            way().reshape(want.shape), want)} for name, way in ways.items()}
    return found


# --- the model --------------------------------------------------------------------------------------------------------

def world(**given) -> bench.Bench:
    """3B's shapes on a GPU, tiny ones on a CPU; few layers are for what needs no more."""
    return bench.Bench("3b" if GPU else "tiny", **given)


def few_layers(layers: int) -> contextlib.AbstractContextManager:
    """3B's widths with so many layers of language and of vision, of which the last sees all of the picture."""
    size = bench.SIZES["3b" if GPU else "tiny"]
    before = size["text"], size["vision"]
    size["text"] = size["text"] | {"num_hidden_layers": layers}
    size["vision"] = size["vision"] | {"depth": layers, "fullatt_block_indexes": [layers - 1]}
    stack = contextlib.ExitStack()
    stack.callback(size.update, text=before[0], vision=before[1])
    return stack


def vision_tower() -> dict:
    """3B's vision tower, two of its 32 blocks, on a picture of 1,280 tokens, forward, ms: transformers' own, a window
    at a time and with a convolution, and ours; and by how much the features differ (bf16: some 0.01)."""
    with few_layers(2):
        model = world(prompts=1).sampler
    grid = torch.tensor([[1, 64, 80] if GPU else [1, 8, 8]], device=DEVICE)
    pixels = torch.randn(int(grid.prod()), 1176, device=DEVICE, dtype=HALF)

    @torch.no_grad()
    def features() -> torch.Tensor:
        return model.model.visual(pixels, grid_thw=grid).pooler_output

    ours, own = milliseconds(features, 5), features()
    with transformers_own(model):
        theirs, wanted = milliseconds(features, 5), features()
    patches, embedding = pixels.view(-1, 3, 2, 14, 14), model.model.visual.patch_embed.proj
    convolved = milliseconds(lambda: torch.nn.Conv3d.forward(embedding, patches), 5)
    return {"ours": ours, "transformers'": theirs, "differ by": difference(own, wanted),
            "patches as a product": milliseconds(lambda: embedding(patches), 5), "as a convolution": convolved}


def toy_world(count: int) -> tuple:
    processor = Processor(str(TOY / "model"))
    records = load_records(str(TOY / "test.parquet"), limit=count)
    return processor, records, [processor.encode(record, "observe") for record in records]


def capture() -> dict:
    """Of the toy's responses, how many are the same where decode steps are captured as CUDA graphs and where they are
    not: all, and their log-probs differ by nothing that matters. Whether a capture failed, and seconds of each."""
    processor, records, prompts = toy_world(8)
    model = rollout.load_policy(str(TOY / "model"), DEVICE, dtype=HALF).eval()
    real, found = rollout.decode, {}
    captured = rollout.capture if GPU else (lambda step: step)
    for temperature in (0.0, 1.0):
        got = {}
        for name, graph in (("eager", None), ("captured", captured)):
            def decode(*args, graph=graph, **given):
                return real(*args, **given | {"graph": graph})

            def sample() -> list[rollout.Group]:
                return rollout.sample_groups(model, processor, records, prompts, samples=8,
                                             temperature=temperature, max_tokens=160, seed=1)

            rollout.decode = decode
            try:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    groups = sample()
                    seconds = bench.time_of(sample)
            finally:
                rollout.decode = real
            got[name] = [sample for group in groups for sample in group.samples], seconds, [
                str(w.message) for w in said if "CUDA graph" in str(w.message)]
        pairs = [(a, b) for a, b in zip(got["eager"][0], got["captured"][0]) if a.ids == b.ids]
        found[f"T {temperature}"] = {
            "the same": len(pairs), "of": 8 * len(records), "failed": got["captured"][2],
            "log-probs differ by": max([(a.logprobs - b.logprobs).abs().max().item() for a, b in pairs], default=None),
            "seconds, eager": got["eager"][1], "captured": got["captured"][1]}
    return found


def gap() -> dict:
    """Mean and largest difference of the trainer's log-probs (fp32 weights under autocast) from those of the sampler (a
    bf16 copy), the toy's and of 3B's widths with two layers: some 0.01 in the mean. Gradients are finite."""
    processor, records, prompts = toy_world(16)
    toy = [rollout.load_policy(str(TOY / "model"), DEVICE, dtype=dtype) for dtype in (HALF, torch.float32)]
    found = {"toy": gap_of(*toy, processor, records, prompts)}
    with few_layers(2):
        wide = world(prompts=2, mean=16)
    return found | {"3B's widths": gap_of(wide.sampler, wide.model, wide.processor, wide.records, wide.prompts)}


def gap_of(sampler, trainer, processor: Processor, records: list, prompts: list) -> dict:
    groups = rollout.sample_groups(sampler, processor, records, prompts, samples=8, temperature=1.0, max_tokens=64,
                                   seed=1)
    rows = [Packed(group.prompt, [sample.ids for sample in group.samples]) for group in groups]
    trainer.train()
    logp, _, mask = rollout.response_logprobs(trainer, processor, rows, 1.0)
    (logp[mask].mean()).backward()
    sampled = pad_sequence([s.logprobs for g in groups for s in g.samples], batch_first=True).to(DEVICE)
    apart = (logp.detach() - sampled).abs()[mask]
    finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in trainer.parameters())
    trainer.zero_grad()
    if not finite:
        raise FloatingPointError("gradients are not finite")
    return {"mean": apart.mean().item(), "largest": apart.max().item(), "tokens": int(mask.sum())}


def decode_share() -> dict:
    """Milliseconds of a decode step of 3B, 64 rows of some 1,700 tokens, and what share of it reading weights and cache
    would take: vLLM's is 0.65 to 0.7 (8B, A100). Expected 7 to 8 ms on an H100."""
    some = world(mean=200) if GPU else world(prompts=2, mean=8)
    some.ours_rollout()  # (warms up)
    prefill, whole = bench.time_of(lambda: bench.decode_nothing(some)), bench.time_of(some.ours_rollout)
    floor = bench.floor_seconds(some, bench.bandwidth(DEVICE))
    return {"ms a step": 1000 * (whole - prefill) / max(some.flat), "of the floor": floor / (whole - prefill),
            "rows": len(some.flat), "steps": max(some.flat), "prefill, s": prefill}


# --- memory -----------------------------------------------------------------------------------------------------------

class Layer:
    """Of transformers' cache, after a prefill."""

    def __init__(self, *shape: int):
        self.keys, self.values = (torch.zeros(*shape, device=DEVICE, dtype=HALF) for _ in range(2))


def memory_of_sampling() -> dict:
    """GB of the cache at the 3b preset's limits, 64 rows of 17,408 slots: 41.1, little more reserved than taken, and no
    more when it grows or loses rows."""
    prompt, response, layers = (9216, 8192, 36) if GPU else (16, 64, 2)
    empty()
    slots = Slots([Layer(8, 2, prompt, 128) for _ in range(layers)], torch.zeros(8, dtype=torch.long, device=DEVICE), 8,
                  HALF, response)
    while slots.size < prompt + response:
        slots.size += min(256, prompt + response - slots.size)
        rows = max(8, int(0.95 * len(slots.lengths)))
        slots.select(torch.arange(rows, device=DEVICE))
    return gigabytes() | {"retries": torch.cuda.memory_stats()["num_alloc_retries"] if GPU else 0}


def memory_of_an_update() -> dict:
    """GB of an update of 3B at the preset's limits, a prompt all picture, of 9,216 tokens, and a response of 8,192: 60
    of weights, gradients and moments, and activations beside them. (The sampler's copy of the weights is not here.)"""
    if GPU and torch.cuda.get_device_properties(0).total_memory < 100e9:
        return {"needs": "141 GB"}
    empty()
    some = world(prompts=1, group=2, visual=9216 if GPU else 16, mean=3200 if GPU else 8)
    if GPU:
        some.sampler = None
    some.group, some.lengths = 1, [[8192 if GPU else 16]]
    groups = some.given_groups()
    found: dict = {}
    for step in range(2):  # (the moments are made by the first)
        empty()
        seconds = bench.time_of(lambda: some.update(groups, some.optimizer, lr=1e-6))
        found[f"step {step}"] = gigabytes() | {"seconds": seconds}
    return found


CHECKS = (environment, kernels, cudnn_nan, new_lengths, attention_of_a_row, attention_of_a_step, capture, vision_tower,
          gap, memory_of_sampling, decode_share, memory_of_an_update)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="add the lines to this file, too")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no check is begun")
    parser.add_argument("--only", help="names of checks, with commas: " + ", ".join(c.__name__ for c in CHECKS))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rollout.claim_device()
    begun, failed = time.monotonic(), False
    for check in CHECKS:
        if args.only and check.__name__ not in args.only.split(","):
            continue
        line: dict = {"check": check.__name__}
        start = time.monotonic()
        if start - begun > args.budget:
            line["left out"] = "no time"
        else:
            try:
                line["found"] = check()
            except Exception as error:  # (each is to be tried, whatever became of those before)
                failed = True
                line |= {"failed": repr(error)[:500], "where": traceback.format_exc()[-1500:]}
            line["seconds"] = round(time.monotonic() - start, 1)
        print(json.dumps(line), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(line) + "\n")
        empty()
    sys.exit(failed)


if __name__ == "__main__":
    main()
