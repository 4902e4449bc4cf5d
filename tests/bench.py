"""How fast rollout and update are, against the plain way and against TRL's GRPOTrainer where trl is installed.

    python tests/bench.py                    # small: CPU, a random Qwen2.5-VL of 30 M parameters
    python tests/bench.py --size 3b          # one GPU of 141 GB: Qwen2.5-VL-3B's configuration, random weights
    python tests/bench.py --growth           # time and memory by response length, group size, picture size
    python tests/bench.py --size 3b --repeats 1 --no-trl --budget 480 --out figures.jsonl     # where a GPU is lent

One process; the same weights, prompts, dtype and response lengths for all; interleaved, medians after a first round,
in which peak memory is taken. Each figure is written as it comes; the table is made of them. Beside them stand bounds:
what this machine's measured bandwidth and products of matrices allow. The plain way is transformers' own in everything,
a convolution and the vision tower's windows one by one among it. The
lengths are drawn ahead from a long-tailed law (log-normal, sigma 0.7, cut at 2.56 times the mean) and forced on every
sampler, for random weights never end a response by themselves. The plain way repeats rows and pictures for each
response, pads on the left, and makes all logits at once. TRL's step is its own: prompts, generate, reward, loss,
backward, AdamW; ours is the same.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from PIL import Image
from plain import plain_logprobs, plain_rollout
from transformers import AutoConfig, AutoModelForImageTextToText, LogitsProcessor, LogitsProcessorList

import rollout
import train
from data import PROMPTS, Processor, Record
from rewards import Response, Rewards
from rollout import Group, Policy, Sample
from train import Config

ROOT = Path(__file__).resolve().parent.parent
TOY = str(ROOT / "assets/toy/model")
SIZES = {  # mean length of a response, visual tokens of a picture, prompts, and the model
    "tiny": dict(mean=12, visual=16, prompts=2, text=dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1024, mrope=[2, 3, 3]), vision=dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2)),
    "small": dict(mean=64, visual=256, prompts=8, text=dict(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=8192, mrope=[8, 12, 12]), vision=dict(depth=4, hidden_size=256, intermediate_size=512, num_heads=4)),
    "3b": dict(mean=400, visual=1280, prompts=8, text=dict(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
        vocab_size=151936, mrope=[16, 24, 24]), vision=dict(
            depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)),
}


class Lengths(LogitsProcessor):
    """Ends row n of transformers' loop at lengths[n] tokens, and never before."""

    def __init__(self, lengths: list[int], stops: list[int]):
        self.lengths, self.stops, self.start = torch.tensor(lengths), stops, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.start = input_ids.shape[1] if self.start is None else self.start
        last = (self.lengths == input_ids.shape[1] - self.start + 1).to(scores.device)[:, None]
        stopped = torch.full_like(scores, -torch.inf)
        stopped[:, self.stops[0]] = 0
        scores[:, self.stops] = -torch.inf
        return torch.where(last, stopped, scores)


@contextlib.contextmanager
def forced(lengths: dict[str, list[int]], stops: list[int]):
    """The same for our sampler, which draws one uniform a position: where a response is to end, it is above 1."""
    real = rollout.uniforms, rollout.draw

    def uniforms(seed: int, record_id: str, response: int, count: int) -> np.ndarray:
        found = real[0](seed, record_id, response, count)
        found[lengths[record_id][response] - 1] = 2
        return found

    def draw(logp: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor(stops, device=logp.device) if logp.device.type == "cpu" else on_device
        token = real[1](logp.index_fill(-1, ids, -torch.inf), uniform.clamp(max=1))
        return torch.where(uniform[:, 0] > 1, stops[0], token)

    on_device = torch.tensor(stops, device=rollout.claim_device())  # (a captured step copies nothing from the host)
    rollout.uniforms, rollout.draw = uniforms, draw
    try:
        yield
    finally:
        rollout.uniforms, rollout.draw = real


def build(setting: dict, processor: Processor, device: torch.device, dtype: torch.dtype, own: bool = True):
    """A model of one of SIZES with random weights, with our attention and patch embedding or transformers' own. (In its
    dtype from the start, as policies are: .to(bfloat16) would round the rotary frequencies.)"""
    text = dict(setting["text"])
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": text.pop("mrope")}
    config = AutoConfig.for_model(
        "qwen2_5_vl", text_config=text | {"tie_word_embeddings": True}, tie_word_embeddings=True,
        vision_config=setting["vision"] | {"out_hidden_size": text["hidden_size"], "patch_size": 14},
        image_token_id=processor.image_id, vision_start_token_id=processor.vision_ids[0],
        vision_end_token_id=processor.vision_ids[1], video_token_id=processor.vision_ids[-1])
    with device:
        model = AutoModelForImageTextToText.from_config(
            config, attn_implementation=None if own else best_attention(), dtype=dtype)
    if own:
        rollout.use_own_kernels(model)
    return model


class Bench:
    """A model, a batch of problems, response lengths; and every way to sample, to score and to take a step."""

    def __init__(self, size: str, group: int = 8, visual: int | None = None, mean: int | None = None,
                 prompts: int | None = None, seed: int = 0):
        setting = SIZES[size]
        self.device, self.group = rollout.claim_device(), group
        visual, mean = visual or setting["visual"], mean or setting["mean"]
        rng = np.random.default_rng(seed)
        height = next(h for h in range(int(visual**.5), 0, -1) if visual % h == 0)
        pixels = [rng.integers(0, 256, (28 * height, 28 * visual // height, 3), np.uint8)
                  for _ in range(prompts or setting["prompts"])]
        self.records = [Record(f"bench-{i}", "What is the sum of all the digits?", "1", (Image.fromarray(p),))
                        for i, p in enumerate(pixels)]
        self.processor = Processor(TOY, max_pixels=visual * 28 * 28)
        self.prompts = [self.processor.encode(r, "observe") for r in self.records]
        assert all((p.ids == self.processor.image_id).sum() == visual for p in self.prompts)
        eos = self.processor.tokenizer.eos_token_id  # (the one that TRL looks for) first
        self.stops = [eos, *(i for i in self.processor.stop_ids if i != eos)]
        self.max_tokens = int(2.56 * mean)
        drawn = rng.lognormal(np.log(mean) - 0.7**2 / 2, 0.7, (len(self.records), group))
        self.lengths = drawn.round().astype(int).clip(2, self.max_tokens).tolist()
        torch.manual_seed(seed)
        self.model = self.sampler = build(setting, self.processor, self.device, torch.float32)
        if self.device.type == "cuda":  # what samples is a bf16 copy, as in training
            self.sampler = build(setting, self.processor, self.device, torch.bfloat16)
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=self.device.type == "cuda")
        rollout.copy_weights(self.policy(self.optimizer))
        self.cfg = Config(group_size=group, prompts_per_rollout=len(self.records), updates_per_rollout=1,
                          max_response_tokens=self.max_tokens,
                          micro_tokens=16384 if self.device.type == "cuda" else 4096)

    def policy(self, optimizer: torch.optim.Optimizer) -> Policy:
        return Policy(self.model, self.sampler, None, optimizer, self.processor)

    @property
    def flat(self) -> list[int]:
        return [n for group in self.lengths for n in group]

    @property
    def padded_rows(self) -> int:
        """Rows of a padded micro-batch within the budget of tokens; a power of two, which divides the batch."""
        longest = max(len(p.ids) for p in self.prompts) + max(self.flat)
        return 1 << (max(1, self.cfg.micro_tokens // longest).bit_length() - 1)

    def given_groups(self) -> list[Group]:
        """Responses of the lengths drawn, of any tokens, to be scored."""
        def sample(length: int) -> Sample:
            return Sample("", [20 + i % 200 for i in range(length)], False, torch.zeros(length))

        return [Group(record, prompt, list(map(sample, lengths)))
                for record, prompt, lengths in zip(self.records, self.prompts, self.lengths)]

    def ours_rollout(self) -> list[Group]:
        with forced({r.id: n for r, n in zip(self.records, self.lengths)}, self.stops):
            groups = rollout.sample_groups(self.sampler, self.processor, self.records, self.prompts, samples=self.group,
                                           temperature=1.0, max_tokens=self.max_tokens, seed=0, max_rows=4096)
        assert [[len(sample.ids) for sample in group.samples] for group in groups] == self.lengths
        return groups

    def plain_rollout(self) -> list[list[int]]:
        tokens, _ = plain_rollout(self.sampler, self.processor, self.prompts, samples=self.group, temperature=1.0,
                                  max_tokens=self.max_tokens, scores=False,
                                  logits_processor=LogitsProcessorList([Lengths(self.flat, self.stops)]))
        assert tokens.shape == (len(self.flat), max(self.flat))
        return [row[:n] for row, n in zip(tokens.tolist(), self.flat)]

    def ours_score(self, groups: list[Group]) -> None:
        """Score and backward of one update, by train.update itself, with an optimizer that does nothing."""
        self.update(groups, Nothing(self.model.parameters(), lr=0.0), lr=0.0)

    def ours_step(self) -> None:
        rollout.copy_weights(self.policy(self.optimizer))
        self.update(self.ours_rollout(), self.optimizer, lr=1e-6)

    def update(self, groups: list[Group], optimizer: torch.optim.Optimizer, lr: float) -> None:
        """With advantages made up, for all groups."""
        prompts, zeros = len(groups), torch.zeros(len(groups), self.group)
        responses = [[Response(None, 0, 0, None, tokens=len(s.ids), truncated=s.truncated) for s in g.samples]
                     for g in groups]
        advantages = torch.randn(prompts, self.group, generator=torch.Generator().manual_seed(0))
        rewards = Rewards(zeros, zeros, zeros, zeros, torch.ones(prompts), advantages,
                          torch.ones(prompts, dtype=torch.bool), zeros)
        try:
            train.update(self.policy(optimizer), groups, responses, rewards, [lr], self.cfg)
        finally:
            self.model.zero_grad()

    def plain_score(self, groups: list[Group]) -> None:
        """The same loss on padded rows, as many at a time as the budget of tokens holds."""
        rows = [(g.prompt, s.ids) for g in groups for s in g.samples]
        rows.sort(key=lambda row: len(row[0].ids) + len(row[1]), reverse=True)
        many = self.padded_rows
        self.model.train()
        try:
            for i in range(0, len(rows), many):
                prompts, responses = zip(*rows[i:i + many])
                logp, mask = plain_logprobs(self.model, self.processor, list(prompts), list(responses), 1.0)
                train.grpo_loss(logp, logp.detach(), torch.ones(len(logp), device=logp.device), mask,
                                sum(self.flat))[0].backward()
        finally:  # (out of memory, too: what comes next is not to stand on these gradients)
            self.model.zero_grad()


class Nothing(torch.optim.SGD):
    def step(self):
        pass


def best_attention() -> str:
    return "flash_attention_2" if torch.cuda.is_available() and rollout.is_flash_attn_2_available() else "sdpa"


# --- TRL --------------------------------------------------------------------------------------------------------------


def trl_trainer(bench: Bench, size: str, steps: int, between: Callable[[dict], bool]) -> None:
    """GRPOTrainer on the same problems; `between` is given the seconds by part after each step, and says whether to
    stop."""
    from datasets import Dataset
    from transformers import Qwen2_5_VLProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class WithoutVideo(Qwen2_5_VLProcessor):  # (transformers' own wants torchvision, for videos)
        def check_argument_for_proper_class(self, name, argument):
            return type(argument)

    took: dict[str, list[float]] = defaultdict(list)
    gpu = bench.device.type == "cuda"
    model = build(SIZES[size], bench.processor, bench.device, torch.bfloat16 if gpu else torch.float32, own=False)
    model.load_state_dict(bench.model.state_dict())
    tokenizer = bench.processor.tokenizer
    processor = WithoutVideo(bench.processor.image_processor, tokenizer, None, chat_template=tokenizer.chat_template)
    messages = [{"role": "system", "content": PROMPTS["observe"]},
                {"role": "user", "content": bench.records[0].text}]
    data = Dataset.from_list([{"prompt": messages, "image": r.images[0]} for r in bench.records])
    generator = np.random.default_rng(0)

    class Between(TrainerCallback):
        def on_step_begin(self, *args, **_):
            self.start = clock()

        def on_step_end(self, arguments, state, control, **_):
            took["step"].append(clock() - self.start)
            control.should_training_stop |= between(took)

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, num_generations=bench.group, max_steps=steps,
            per_device_train_batch_size=min(bench.padded_rows, len(bench.flat)),  # micro-batches, as ours has
            gradient_accumulation_steps=max(1, len(bench.flat) // bench.padded_rows),
            max_completion_length=bench.max_tokens, learning_rate=1e-6, beta=0.0, temperature=1.0, top_p=1.0, top_k=0,
            shuffle_dataset=False, save_strategy="no", logging_strategy="no", report_to="none", bf16=gpu,
            gradient_checkpointing=gpu, use_cpu=not gpu, disable_tqdm=True, log_completions=False)
        trainer = GRPOTrainer(model, lambda completions, **_: generator.random(len(completions)).tolist(), config, data,
                              processing_class=processor, callbacks=[Between()])
        generate = model.generate

        def timed(*args, **given):
            start = clock()
            found = generate(*args, **given, logits_processor=LogitsProcessorList(
                [Lengths(bench.flat, bench.stops)]))
            took["rollout"].append(clock() - start)
            assert found.shape[1] - given["input_ids"].shape[1] == max(bench.flat)
            return found

        model.generate = timed
        trainer.train()


# --- the clock, the memory, the bounds --------------------------------------------------------------------------------


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_of(work) -> float:
    start = clock()
    work()
    return clock() - start


def peak(work) -> float:
    """GiB at most while work runs, above what was there before: of GPU memory, on a CPU resident."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def status(name: str) -> float:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 2**20

    ctypes.CDLL(None).malloc_trim(0)  # what was freed is handed back, and does not count as there already
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is there now
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def bandwidth(device: torch.device) -> float:
    """Bytes a second read from memory, by a sum over 1 GB, beyond all caches."""
    data = torch.ones(2**28, device=device)  # (zeros nobody wrote are one page, which the cache holds)
    return data.numel() * 4 / min(time_of(data.sum) for _ in range(5))


def flops(device: torch.device) -> float:
    """Floating point operations a second in a product of matrices, of the type that is computed in."""
    gpu = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    matrix = torch.randn(n, n, device=device, dtype=dtype)  # (a GPU multiplies ones faster)
    return 2 * n**3 / min(time_of(lambda: matrix @ matrix) for _ in range(5))


def width_of(config) -> int:
    return config.hidden_size // config.num_attention_heads


def decode_bounds(bench: Bench, rate: float, speed: float) -> tuple[float, float]:
    """Seconds of decoding after the first token: weights and each live row's cache read once for each step, at `rate`
    bytes a second; and the same where the step's products, at `speed` operations a second, take longer than its
    weights. (A kernel that reads the prompt once for a group could take less; ours does not.)"""
    text, size = bench.sampler.config.text_config, next(bench.sampler.parameters()).element_size()
    weights = sum(p.numel() for p in bench.sampler.model.language_model.parameters())  # (tied with the head)
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * width_of(text) * size
    prompts = [len(p.ids) for p in bench.prompts for _ in range(bench.group)]
    memory = both = 0.0
    for step in range(1, max(bench.flat)):
        live = [p + step for p, n in zip(prompts, bench.flat) if n > step]
        cache = token * sum(live) / rate
        memory += weights * size / rate + cache
        both += max(weights * size / rate, 2 * weights * len(live) / speed) + cache
    return memory, both


def floor_seconds(bench: Bench, rate: float) -> float:
    return decode_bounds(bench, rate, float("inf"))[0]


def update_flops(bench: Bench, ours: bool) -> float:
    """Operations of score and backward, in products and attention alone, nothing padded and nothing computed twice:
    of ours a prompt and its picture once a group, of the plain way once a response."""
    text, tower = bench.model.config.text_config, bench.model.model.visual
    layers = sum(p.numel() for layer in bench.model.model.language_model.layers for p in layer.parameters())
    a_pair = 4 * text.num_attention_heads * width_of(text) * text.num_hidden_layers  # (of a query and a key)
    merger = sum(p.numel() for p in tower.merger.parameters())  # (of which a token is four patches)
    vision = sum(p.numel() for p in tower.parameters()) - 0.75 * merger
    total = 0.0
    for prompt, lengths in zip(bench.prompts, bench.lengths):
        p, repeats = len(prompt.ids), 1 if ours else bench.group
        total += 2 * layers * (repeats * p + sum(lengths)) + repeats * 2 * vision * len(prompt.pixels)
        total += 2 * text.hidden_size * text.vocab_size * sum(lengths)  # (the head)
        total += a_pair * (repeats * p * p / 2 + sum(p * n + n * n / 2 for n in lengths))
    return 3 * total  # (the backward pass is two forward ones)


# --- the figures ------------------------------------------------------------------------------------------------------

def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


class Figures:
    """Where figures go, each as it comes: a line of JSON on standard error and, flushed, in a file."""

    def __init__(self, path: Path | None, budget: float):
        self.path, self.end, self.lines = path, time.monotonic() + budget, []

    def write(self, **line) -> None:
        self.lines.append(line)
        print(json.dumps(line), file=sys.stderr, flush=True)
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")

    @property
    def late(self) -> bool:
        return time.monotonic() > self.end

    def tried(self, part: str, way: str, work: Callable[[], Any]) -> bool:
        """Whether the work was done: none begins beyond the budget, and memory may not be enough, which is written."""
        if self.late:
            self.write(part=part, way=way, left_out="no time")
            return False
        try:
            with warnings.catch_warnings(record=True) as said:
                work()
            for warning in said:
                if "CUDA graph" in str(warning.message):  # (decode went on without one)
                    self.write(part=part, way=way, warning=str(warning.message)[:300])
            return True
        except Exception as error:  # (on a CPU, in cuBLAS and cuDNN, it is a RuntimeError like any other)
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "alloc" not in str(error).lower():
                raise
            self.write(part=part, way=way, left_out="out of memory")
            return False
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    def once(self, ways: dict[str, Callable[[], Any]], part: str, measure: Callable = time_of, unit: str = "seconds",
             ) -> None:
        """Each way once. One for which memory is not enough leaves."""
        for name, work in list(ways.items()):
            def figure(name=name, work=work) -> None:
                self.write(part=part, way=name, **{unit: measure(work)})

            if not self.tried(part, name, figure) and not self.late:
                del ways[name]

    def times(self, part: str) -> dict[str, list[float]]:
        """Seconds by way."""
        found: dict[str, list[float]] = defaultdict(list)
        for line in self.lines:
            if line.get("part") == part and "seconds" in line:
                found[line["way"]].append(line["seconds"])
        return found

    def peaks(self, part: str) -> dict[str, float]:
        return {line["way"]: line["gib"] for line in self.lines if line.get("part") == part and "gib" in line}


def compare(size: str, repeats: int, figures: Figures, with_trl: bool) -> None:
    """Rollout, update and step, ours beside the plain way and TRL's; then the table."""
    bench = Bench(size)
    tokens = sum(bench.flat)
    figures.write(part=size, parameters=sum(p.numel() for p in bench.model.parameters()), prompts=len(bench.prompts),
                  prompt_tokens=len(bench.prompts[0].ids), group=bench.group, mean_response=tokens / len(bench.flat),
                  longest_response=max(bench.flat))
    rate, speed = bandwidth(bench.device), flops(bench.device)
    memory, both = decode_bounds(bench, rate, speed)
    work = {ours: update_flops(bench, ours) for ours in (True, False)}
    figures.write(bandwidth=rate, flops=speed, decode_floor_memory=memory, decode_floor=both,
                  update_floor=work[True] / speed, update_bound=work[False] / work[True])
    groups = bench.given_groups()
    ways = {"rollout, ours": bench.ours_rollout, "rollout, plain": bench.plain_rollout,
            "prefill, ours": lambda: decode_nothing(bench),
            "score + backward, ours": lambda: bench.ours_score(groups),
            "score + backward, plain": lambda: bench.plain_score(groups), "step, ours": bench.ours_step}
    figures.once(ways, size, peak, "gib")
    for _ in range(repeats):
        figures.once(ways, size)
    if with_trl and not figures.late:
        compare_trl(bench, size, repeats, figures, {"step, ours": bench.ours_step} if "step, ours" in ways else {})
    print(f"\n{size}: {sum(p.numel() for p in bench.model.parameters()) / 1e6:.0f}M parameters, {len(bench.prompts)} "
          f"prompts of {len(bench.prompts[0].ids)} tokens x {bench.group} responses of {tokens / len(bench.flat):.0f} "
          f"(2 to {max(bench.flat)}); {device()}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    times, peaks = figures.times(size), figures.peaks(size)
    found = {name: statistics.median(seconds) for name, seconds in times.items()}
    print("| | seconds | least, most | peak GiB | tokens / s |\n|---|---|---|---|---|")
    for name, seconds in sorted(found.items()):
        gib = f"{peaks[name]:.2f}" if name in peaks else "-"
        print(f"| {name} | {seconds:.2f} | {min(times[name]):.2f}, {max(times[name]):.2f} | {gib} | "
              f"{tokens / seconds:.0f} |")
    conclude(found, memory, both, work[True] / speed, work[False] / work[True], figures)


def conclude(found: dict[str, float], memory: float, both: float, update: float, bound: float,
             figures: Figures) -> None:
    """What follows from the seconds `found`: ratios, and shares of what no program could beat."""
    conclusions = {}
    for name, part, other in (("rollout, plain / ours", "rollout, ours", "rollout, plain"),
                              ("rollout, TRL / ours", "rollout, ours", "rollout, TRL"),
                              ("score + backward, plain / ours", "score + backward, ours", "score + backward, plain"),
                              ("whole step, TRL / ours", "step, ours", "step, TRL")):
        if part in found and other in found:
            conclusions[name] = found[other] / found[part]
    conclusions["score + backward, plain / ours, bound by arithmetic"] = bound
    if {"rollout, ours", "prefill, ours"} <= found.keys():
        decode = found["rollout, ours"] - found["prefill, ours"]
        conclusions |= {"decode, seconds": decode, "decode, share of its memory floor": memory / decode,
                        "decode, share of its floor": both / decode}
    if "score + backward, ours" in found:
        conclusions["score + backward, ours, share of its floor"] = update / found["score + backward, ours"]
    figures.write(conclusions=conclusions)
    print("\n" + "\n".join(f"{name}: {value:.2f}" for name, value in conclusions.items()))


def compare_trl(bench: Bench, size: str, repeats: int, figures: Figures, ways: dict) -> None:
    """TRL's step between two of ours."""
    if importlib.util.find_spec("trl") is None:
        figures.write(part=size, way="step, TRL", left_out="trl is not installed")
        return

    def between(took: dict[str, list[float]]) -> bool:
        """After each of its steps, of which the first warms up -> whether to stop."""
        for way in ("rollout", "step"):
            if len(took[way]) > 1:
                figures.write(part=size, way=f"{way}, TRL", seconds=took[way][-1])
        figures.once(ways, size)
        return figures.late

    figures.tried(size, "step, TRL", lambda: trl_trainer(bench, size, repeats + 1, between))


def decode_nothing(bench: Bench) -> None:
    """The prefill, and one token."""
    rollout.sample_groups(bench.sampler, bench.processor, bench.records, bench.prompts, samples=bench.group,
                          temperature=1.0, max_tokens=1, seed=0, max_rows=4096)


def growth(size: str, repeats: int, figures: Figures) -> None:
    """Rollout by group size and picture size, update by response length, each beside the plain way."""
    base = SIZES[size]
    for title, values, part, vary in (
            ("mean response, tokens", [base["mean"] * k for k in (1, 4, 8, 16)], "update", "mean"),
            ("G", [1, 2, 4, 8, 16], "rollout", "group"),
            ("visual tokens", [base["visual"] * k // 4 for k in (1, 2, 4, 8)], "rollout", "visual")):
        print(f"\n| {title} | {part}, ours, s | plain, s | plain / ours | bound | GiB, ours | plain |"
              "\n|---|---|---|---|---|---|---|")
        for value in values:
            name = f"{size}, {part} by {vary}, {value}"
            figures.tried(name, "all", partial(growth_row, size, repeats, figures, name, part, {vary: value}))


def growth_row(size: str, repeats: int, figures: Figures, name: str, part: str, vary: dict[str, int]) -> None:
    """One line of a table of growth; 2 prompts, but of the longest responses 1."""
    bench = Bench(size, prompts=1 if vary.get("mean", 0) > 4 * SIZES[size]["mean"] else 2, **vary)
    groups, bound = bench.given_groups(), "-"
    if part == "rollout":
        ways = {"ours": bench.ours_rollout, "plain": bench.plain_rollout}
    else:
        ways = {"ours": lambda: bench.ours_score(groups), "plain": lambda: bench.plain_score(groups)}
        bound = f"{update_flops(bench, False) / update_flops(bench, True):.2f}"
    figures.once(ways, name, peak, "gib")
    for _ in range(repeats):
        figures.once(ways, name)
    times, peaks = figures.times(name), figures.peaks(name)
    middle = {way: statistics.median(seconds) for way, seconds in times.items()}
    ours, plain = (f"{middle[way]:.2f}" if way in middle else "-" for way in ("ours", "plain"))
    ratio = f"{middle['plain'] / middle['ours']:.2f}" if len(middle) == 2 else "-"
    gib = [f"{peaks[way]:.2f}" if way in peaks else "-" for way in ("ours", "plain")]
    print(f"| {next(iter(vary.values()))} | {ours} | {plain} | {ratio} | {bound} | {' | '.join(gib)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="3b" if torch.cuda.is_available() else "small")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each, after one that warms up")
    parser.add_argument("--growth", action="store_true", help="the tables of growth, and nothing else")
    parser.add_argument("--no-trl", action="store_true", help="without TRL")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which nothing is begun")
    parser.add_argument("--out", type=Path, help="add the figures to this file, a line of JSON each, as they come")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)  # (TRL's; that a capture failed is a warning of another kind, and shown)
    figures = Figures(args.out, args.budget)
    figures.write(size=args.size, device=device(), torch=torch.__version__, transformers=transformers.__version__,
                  python=platform.python_version())
    if args.growth:
        growth(args.size, args.repeats, figures)
    else:
        figures.tried(args.size, "all", partial(compare, args.size, args.repeats, figures, not args.no_trl))


if __name__ == "__main__":
    main()
