"""Makes the built-in world: a 1M-parameter Qwen2.5-VL, its training ladder and its held-out test set.

    pip install scikit-learn && python assets/make_toy.py          # 50 minutes on 2 cores
    python assets/make_toy.py --world steep                        # one of those of the ablations: 20 minutes

Pictures are real handwritten digits (UCI Optical Recognition of Handwritten Digits, 1,797 of them as scikit-learn
carries them), coloured and set on tiles of 28 px, one visual token each; or bars of coloured tiles. Handwriting of the
test set is never seen in training.

The model is cold-started on written traces whose *usual manner is careless*, as with people: most glance at the first
row (or the first two bars) and reason on that, some skip the reasoning, a few forget a tag; a minority looks at
everything and reasons step by step; slips of reading and reckoning come on top. So the likeliest response to a picture
of several rows is wrong, at any temperature, and reinforcement learning has to change what the model does, namely
observe all of it, rather than sharpen what it does already.

The second world, steep, has the same pictures and another start, which goes on from the first one's model: one where a
ladder should win. It slips often, and after each row gives up looking more often than not; and of the questions it has
those that a glance seldom happens to answer. So a sum over one row is right in 60% of its responses at temperature 1,
over two in 15%, over three in 2%; and what two rows teach, to look on and to slip less, is what three want. Its think
style describes the picture too, inside <think>, in as many tokens as the observe style does outside.

Six more are models alone. terse and filler are starts like steep, whose think style does not describe: it is short in
terse, and in filler as long as if it did, but names neither digit nor colour. steeper is steep's model after some more
impatience. even is the first world's model after some more of its cold start, in which think is shown as often as
observe, and not 25 times to 60; longer, after as much more of it as it was. large is the first world's model at twice
the width, four times the parameters.

Everything is drawn from seeded generators: the same command gives the same files (on the same torch and CPU). The
shipped ladder was measured by an earlier sampler: made anew, single problems come to other difficulties.
"""
from __future__ import annotations

import argparse
import io
import math
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "assets"), str(ROOT)]
from pictures import plot_ladder  # noqa: E402

from data import PROMPTS, Processor, Record, load_records, number, save_records  # noqa: E402
from rollout import load_policy  # noqa: E402

COLOURS = {"red": (214, 40, 40), "green": (30, 140, 60), "blue": (40, 80, 210), "black": (20, 20, 20)}
TILE = 28
FAMILIES = ("read", "sum", "extreme", "count", "bars", "table", "colour")


# --- pictures ---------------------------------------------------------------------------------------------------------


def load_glyphs() -> tuple[dict[int, list[np.ndarray]], dict[int, list[np.ndarray]]]:
    """Handwritten digits 0..9, 8 x 8 in [0, 1], as (training, held-out); every fifth is held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test = {d: [] for d in range(10)}, {d: [] for d in range(10)}
    for i, (image, label) in enumerate(zip(digits.images, digits.target)):
        (test if i % 5 == 4 else train)[int(label)].append(image / 16.0)
    return train, test


def draw_tile(glyph: np.ndarray, colour: str, rng: random.Random) -> np.ndarray:
    """[8, 8] handwriting -> [28, 28, 3] uint8, ink in `colour` on white, shifted by up to two pixels."""
    ink = np.zeros((TILE, TILE))
    top, left = rng.randint(0, 4), rng.randint(0, 4)
    ink[top:top + 24, left:left + 24] = glyph.repeat(3, 0).repeat(3, 1)
    return (255 - ink[..., None] * (255 - np.array(COLOURS[colour]))).astype(np.uint8)


def to_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).quantize(64, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


# --- problems ---------------------------------------------------------------------------------------------------------


def make_problem(rng: random.Random, glyphs: dict, record_id: str, families=FAMILIES, size=None) -> Record:
    """One problem; meta holds `facts`, what truly is in the picture, in reading order, and `rows`, their layout."""
    family = rng.choice(families)
    colours = list(COLOURS)
    if family == "bars":
        heights = [rng.randint(1, 4) for _ in range(size[1] if size else rng.randint(2, 6))]
        rows = [[(rng.choice(colours), h) for h in heights]]
        pixels = np.full((4 * TILE, len(heights) * TILE, 3), 255, np.uint8)
        for i, (colour, h) in enumerate(rows[0]):
            pixels[(4 - h) * TILE:, i * TILE + 3:(i + 1) * TILE - 3] = COLOURS[colour]
    else:
        height = rng.choices((1, 2, 3), (0.2, 0.45, 0.35))[0] if family != "table" else rng.randint(2, 3)
        height, width = size or (height, rng.randint(1 if height > 1 else 2, 4))
        rows = [[(rng.choice(colours), rng.randint(0, 9)) for _ in range(width)] for _ in range(height)]
        pixels = np.concatenate([np.concatenate([draw_tile(rng.choice(glyphs[d]), c, rng) for c, d in row], axis=1)
                                 for row in rows])
    ask = {"family": family}
    choices: tuple[str, ...] = ()
    if family == "read":
        ask |= {"row": rng.randint(1, len(rows)), "column": rng.randint(1, len(rows[0]))}
        question = f"Which digit is in row {ask['row']}, column {ask['column']}?"
    elif family == "sum":
        question = "What is the sum of all the digits?"
    elif family == "extreme":
        ask["largest"] = rng.random() < 0.5
        question = f"What is the {'largest' if ask['largest'] else 'smallest'} digit?"
    elif family == "count":
        ask |= {"colour": rng.choice(colours)} if rng.random() < 0.5 else {"above": rng.randint(2, 7)}
        question = f"How many digits are {wanted(ask)}?"
    elif family == "bars":
        question = "How much taller is the tallest bar than the lowest?"
    elif family == "table":
        question = "Which row has the largest sum?"
        if len({sum(d for _, d in row) for row in rows}) < len(rows):  # no ties
            return make_problem(rng, glyphs, record_id, families, size)
        choices = tuple(f"row {i + 1}" for i in range(len(rows)))
    else:
        ask["colour"] = rng.choice([c for row in rows for c, _ in row])
        question = f"What is the sum of the {wanted(ask)} digits?"
    answer = reckon(ask, rows)[1]
    facts = [f"{colour} {d}" for row in rows for colour, d in row]
    return Record(record_id, question, answer, (to_png(pixels),), choices, source=f"toy/{family}",
                  meta={"facts": facts, "rows": rows, "ask": ask})


def wanted(ask: dict) -> str:
    """A question's condition, in tokens that no observation holds: with " red" for both, the model did not learn in
    any reasonable time to tell what is asked for from what is seen."""
    return ask["colour"].upper() if "colour" in ask else f">{ask['above']}"


def reckon(ask: dict, rows: list, slip=lambda number: number) -> tuple[int, str, str]:
    """What follows from `rows`, be they all or the part that was looked at: (result, answer, the steps written out).

    Every step is spelled out: the condition, what meets it, the best row so far. What has to be done at one stroke is
    not learned. slip: applied to each intermediate result, so that a careless answer follows from its own mistakes.
    """
    family, steps = ask["family"], []
    if family == "read":
        row = rows[min(ask["row"], len(rows)) - 1]
        result = row[min(ask["column"], len(row)) - 1][1]
        digits = "".join(f" {d}" for _, d in row)
        return result, str(result), f" row {ask['row']}:{digits}, column {ask['column']}"
    if family == "table":
        sums = []
        for i, row in enumerate(rows):
            total, line = 0, []
            for _, d in row:
                total = slip(total + d)
                line.append(f" {d}: {total}")
            sums.append(total)
            best = sums.index(max(sums))
            steps.append(f" row {i + 1}" + ",".join(line) + f", largest row {best + 1} {max(sums)}")
        return best, chr(65 + best), ";".join(steps)
    total = low = None
    for colour, d in (fact for row in rows for fact in row):
        name = f" {d}"
        if family == "sum":
            total = slip((total or 0) + d)
        elif family == "extreme":
            total = d if total is None else slip(max(total, d) if ask["largest"] else min(total, d))
        elif family in ("count", "colour"):
            hit = colour == ask["colour"] if "colour" in ask else d > ask["above"]
            total = slip((total or 0) + hit * (d if family == "colour" else 1))
            name = f" {colour} {d}" + " is" * hit
        else:
            total, low = max(total or 0, d), min(low or 9, d)
        steps.append(f"{name}: {total}" + (f" {low}" if family == "bars" else ""))
    think = (f" {wanted(ask)};" if family in ("count", "colour") else "") + ",".join(steps)
    if family == "bars":
        result = slip(total - low)
        return result, str(result), think + f"; {total} - {low} = {result}"
    return total, str(total), think


def described(rows: list) -> str:
    return ";".join(",".join(f" {c} {d}" for c, d in row) for row in rows)


def hollow(rows: list) -> str:
    """As many tokens as `described` has, place for place, which name neither digit nor colour: only how many are
    looked at, as its commas have it."""
    return ";".join(",".join(" a digit" for _ in row) for row in rows)


def glance(rows: list, bars: bool, patience: float, rng: random.Random) -> list:
    """The first row, or the first two bars; each further one is looked at with chance `patience`, until one is not."""
    units = [[fact] for fact in rows[0]] if bars else rows
    looked = 2 if bars else 1
    while 0 < patience and looked < len(units) and rng.random() < patience:
        looked += 1
    return [rows[0][:looked]] if bars else rows[:looked]


def write_trace(record: Record, style: str, rng: random.Random, manner: Manner) -> str:
    """A response as the cold start shows it: manner, slips and form are drawn from rng."""
    def misread(d: int) -> int:
        return rng.randint(0, 9) if rng.random() < manner.misread else d

    def slip(number: int) -> int:
        return max(0, number + rng.choice((-1, 1))) if rng.random() < manner.slip else number

    ask, rows = record.meta["ask"], record.meta["rows"]
    if rng.random() >= manner.careful:  # glance
        rows = glance(rows, ask["family"] == "bars", manner.patience, rng)
    seen = [[(c, misread(d)) for c, d in row] for row in rows]
    result, answer, think = reckon(ask, seen, slip)
    if rng.random() < manner.skip and ask["family"] != "read":
        think = " guess"
        if record.choices:
            answer = chr(65 + rng.randrange(len(record.choices)))
        else:
            answer = str(max(0, result + rng.choice((-2, -1, 0, 1, 2))))
    if manner.preface and style == "think":
        think = f"{described(seen) if manner.preface == 'described' else hollow(seen)}\n{think}"
    texts = [f"<observe>{described(seen)}</observe>"] * (style == "observe")
    texts += [f"<think>{think}</think>"] * (style != "none")
    texts.append(f"<answer> {answer}</answer>")
    if rng.random() < manner.forget:
        i = rng.randrange(len(texts))
        if i == len(texts) - 1:
            texts[i] = f" the answer is {answer}"
        else:
            del texts[i]
    return "\n".join(texts)


# --- model ------------------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *Processor.VISION_TOKENS]


def make_tokenizer(texts: list[str], folder: Path) -> None:
    """Byte-level BPE over the world's own words; tags and digits are single tokens, any other text falls to bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"</?[a-z]+>| ?[A-Za-z]+| ?[0-9]|[^\sA-Za-z0-9]|\s"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=640, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        additional_special_tokens=SPECIAL[1:2] + SPECIAL[3:],
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def make_model(folder: Path, width: int):
    """A Qwen2.5-VL with random weights, and its image processor, in a Hugging Face folder: 1.1M parameters at a width
    of 128, the vision half as wide."""
    from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}
    image_size = {"shortest_edge": TILE * TILE, "longest_edge": 64 * TILE * TILE}
    # White, most of every picture, becomes 0: what is left to see is ink.
    Qwen2VLImageProcessor(size=image_size, image_mean=[1.0] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
                         num_hidden_layers=4, num_attention_heads=width // 32, num_key_value_heads=width // 64,
                         max_position_embeddings=2048,
                         rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
                         initializer_range=0.08, bos_token_id=None, eos_token_id=ids["<|im_end|>"],
                         pad_token_id=ids["<|endoftext|>"]),
        # (0.08: with transformers' default of 0.02 a model of this width does not learn to read digits)
        vision_config=dict(depth=2, hidden_size=width // 2, intermediate_size=3 * width // 2, num_heads=width // 32,
                           out_hidden_size=width, patch_size=14, window_size=112, fullatt_block_indexes=[1],
                           initializer_range=0.08),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True, initializer_range=0.08)
    return Qwen2_5_VLForConditionalGeneration(config)


@dataclass(frozen=True)
class Manner:
    """How the written responses of a phase behave; each share is a probability."""

    careful: float = 1.0  # looks at everything; else: glances at the first row, or the first two bars
    patience: float = 0.0  # of a glance: goes on to the next row, or bar
    skip: float = 0.0  # guesses instead of reasoning, whatever it looked at
    forget: float = 0.0  # breaks the format
    misread: float = 0.0  # a digit observed as another
    slip: float = 0.0  # a step reckoned wrong
    preface: str = ""  # what the think style says before it reasons: "described", or "hollow"


@dataclass(frozen=True)
class World:
    """Its cold start, and how many problems are measured for the ladder and held out (none: the model is all)."""

    phases: tuple[tuple[str, int, Manner], ...]  # what is shown, steps, manner
    styles: tuple[float, float, float]  # shares of observe, think and none
    seed: int
    problems: int = 0
    held_out: int = 0
    size: int = 0  # of the ladder, where a scarce level is to give what it has; 0: as large as no level is over-drawn
    start: str = ""  # the model that the cold start goes on from; none: random weights
    families: tuple[str, ...] = FAMILIES  # of the problems that are measured and held out; the cold start shows all
    width: int = 128  # of a model from random weights
    lean: bool = False  # bf16, eager attention, a batch in quarters by length, each padded by itself: half the time


THE_USUAL = ("problems", 200, Manner(careful=0.25, skip=0.10, forget=0.10, misread=0.01, slip=0.01))
# First to read, then to reason, with care; then the usual manner.
FROM_NOTHING = (("rows", 300, Manner()), ("grids", 150, Manner()), ("problems", 900, Manner()),
                ("problems", 600, Manner()), ("problems", 600, Manner()), THE_USUAL)
SOME_MORE = (("problems", 400, Manner()), THE_USUAL)


def impatient(preface: str) -> tuple:
    """The think style's new form with care; then impatient, ever more so, with slips that add up over many digits."""
    manner = Manner(careful=0, patience=0.35, skip=0.10, forget=0.08, misread=0.05, slip=0.05, preface=preface)
    return (("problems", 400, Manner(preface=preface)), ("problems", 250, manner),
            ("problems", 150, replace(manner, patience=0.2)))


# steep's last phase once more, and hardly ever on to a second row.
STEEPER = (("problems", 150, replace(impatient("described")[-1][2], patience=0.03)),)
MOSTLY_OBSERVE, ALIKE = (0.6, 0.25, 0.15), (0.45, 0.45, 0.1)  # shares of the styles
WORLDS = {
    "toy": World(FROM_NOTHING, MOSTLY_OBSERVE, seed=0, problems=5800, held_out=300),
    "steep": World(impatient("described"), ALIKE, seed=100, problems=2400, held_out=500, size=1200,
                   start="assets/toy/model", families=("sum", "colour", "bars")),
    "terse": World(impatient(""), ALIKE, seed=100, start="assets/toy/model"),
    "filler": World(impatient("hollow"), ALIKE, seed=100, start="assets/toy/model"),
    "even": World(SOME_MORE, ALIKE, seed=200, start="assets/toy/model"),
    "longer": World(SOME_MORE, MOSTLY_OBSERVE, seed=200, start="assets/toy/model"),
    "steeper": World(STEEPER, ALIKE, seed=300, start="assets/steep/model"),
    "large": World(FROM_NOTHING, MOSTLY_OBSERVE, seed=0, width=256, lean=True),
}


def with_responses(inputs: dict, responses: list[list[int]], pad_id: int) -> dict:
    """The model's inputs of prompts, which are padded on the left -> each followed by its response, padded on the
    right, and the labels: the responses' tokens alone."""
    ids = [torch.tensor(response) for response in responses]
    tail = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id)  # [B, longest response]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(response) for response in ids], batch_first=True)
    after = {"input_ids": tail, "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(tail, dtype=torch.int)}
    joined = {name: torch.cat([inputs[name], more], dim=1) for name, more in after.items()}
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), tail.masked_fill(mask == 0, -100)], dim=1)
    return inputs | joined | {"labels": labels}


def cold_start(model, processor: Processor, glyphs: dict, world: World, phase: int, batch: int = 48,
               lr: float = 1e-3) -> None:
    """One phase of supervised training on freshly written responses, with an optimizer of its own."""
    show, steps, manner = world.phases[phase]
    rng = random.Random(world.seed + phase)
    model.train()
    if world.lean:
        model.set_attn_implementation("eager")  # the fused kernel's backward is slow in bf16 on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    start = time.time()
    for step in range(steps):
        prompts, responses = [], []
        for _ in range(batch):
            style = "observe"
            if show == "problems":
                record = make_problem(rng, glyphs, "x")
                style = rng.choices(("observe", "think", "none"), world.styles)[0]
                text = write_trace(record, style, rng, manner)
            else:  # a row of digits first: with more to look at, they are not learned in any reasonable time
                size = (1, rng.randint(1, 3)) if show == "rows" else (rng.randint(1, 3), rng.randint(1, 4))
                record = make_problem(rng, glyphs, "x", ("sum",) if show == "rows" else ("sum", "bars"), size)
                text = f"<observe>{described(record.meta['rows'])}</observe>"
            prompts.append(processor.encode(record, style))
            responses.append(processor.tokenizer(text + "<|im_end|>", add_special_tokens=False).input_ids)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 30) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
        order = list(range(batch))
        if world.lean:
            order.sort(key=lambda i: len(prompts[i].ids) + len(responses[i]))
        part = batch // 4 if world.lean else batch
        tokens = sum(map(len, responses))
        loss = 0.0  # per token of the whole batch
        for which in (order[i:i + part] for i in range(0, batch, part)):
            inputs = with_responses(processor.collate([prompts[i] for i in which]), [responses[i] for i in which],
                                    processor.pad_id)
            with torch.autocast("cpu", torch.bfloat16, enabled=world.lean):
                share = model(**inputs, num_items_in_batch=tokens).loss
            share.backward()
            loss += share.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"cold start, {show} {step}/{steps}: loss {loss:.4f}, {time.time() - start:.0f} s", flush=True)
    model.eval()


def begin(world: World, folder: Path, glyphs: dict, rng: random.Random):
    """The model before its cold start, and in its folder all that is not weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if world.start:
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
            shutil.copy(ROOT / world.start / file, folder / file)
        return load_policy(str(ROOT / world.start))
    sample = [make_problem(rng, glyphs, str(i)) for i in range(400)]
    styles = ("none", "think", "observe")
    texts = [*(PROMPTS[style] for style in styles), "system\nuser\nassistant\n the answer is"] * 5
    texts += [r.question + "".join(f"\n({chr(65 + i)}) {c}" for i, c in enumerate(r.choices)) for r in sample]
    mixed = Manner(careful=0.30, skip=0.15, forget=0.12, misread=0.02, slip=0.02)  # shows the tokenizer every word
    texts += [write_trace(r, style, rng, mixed) for r in sample for style in styles]
    make_tokenizer(texts, folder)
    return make_model(folder, world.width)


def measure(problems: Path, model: Path, size: int = 0) -> Path:
    """Folder beside the problems with their difficulties and a ladder, by the very command that builds any ladder:
    nothing about a problem is assigned by hand."""
    out = problems.with_suffix("")
    command = [sys.executable, ROOT / "curriculum.py", "--data", problems, "--model", model, "--out", out,
               "--keep-simple", "--max-tokens", "160", "--max-pixels", str(64 * TILE * TILE)]
    subprocess.run(command + ["--size", str(size)] * (size > 0), check=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", choices=WORLDS, default="toy")
    parser.add_argument("--out", type=Path, help="folder of the world (default: assets/WORLD)")
    parser.add_argument("--problems", type=number(int, 1), help="problems measured, of which the ladder is built")
    parser.add_argument("--held-out", type=number(int, 1), help="problems of the test set")
    args = parser.parse_args()
    world = WORLDS[args.world]
    if not world.problems and (args.problems or args.held_out):
        parser.error(f"of {args.world} the model is all: it measures no problems")
    out = args.out or ROOT / "assets" / args.world
    torch.manual_seed(world.seed)
    rng = random.Random(world.seed)
    train_glyphs, test_glyphs = load_glyphs()
    model = begin(world, out / "model", train_glyphs, rng)
    processor = Processor(str(out / "model"))
    work = out / f"making-{args.world}"  # weights by phase, and what is measured: killed, it goes on from them
    if begun := len(list(work.glob("phase-*"))):
        model = load_policy(str(work / f"phase-{begun - 1}"))
    for phase in range(begun, len(world.phases)):
        cold_start(model, processor, train_glyphs, world, phase)
        model.save_pretrained(work / "part")
        (work / "part").rename(work / f"phase-{phase}")
    if not world.problems:
        model.bfloat16()  # half the bytes; all runs begin from what is kept
    model.save_pretrained(out / "model")
    if world.problems:
        problems = [make_problem(rng, train_glyphs, f"train-{i:05d}", world.families)
                    for i in range(args.problems or world.problems)]
        held_out = [make_problem(rng, test_glyphs, f"test-{i:04d}", world.families)
                    for i in range(args.held_out or world.held_out)]
        for name, records in (("train", problems), ("test", held_out)):
            save_records(str(work / f"{name}.parquet"), records)
        ladder = measure(work / "train.parquet", out / "model", world.size)
        plot_ladder(load_records(str(ladder)), ladder / "ladder.png")
        measure(work / "train.parquet", out / "model", world.size)  # nothing anew; now the card shows the picture
        (out / "ladder").mkdir(exist_ok=True)
        for file in ("ladder.parquet", "ladder.png", "README.md"):
            shutil.copy(ladder / file, out / "ladder" / file)
        tested = measure(work / "test.parquet", out / "model")
        shutil.copy(tested / "measured.parquet", out / "test.parquet")  # all of it: a test set is not mixed
    made = out / f"made-{args.world}"
    shutil.rmtree(made, ignore_errors=True)  # of one that was killed here
    shutil.rmtree(work.rename(made))


if __name__ == "__main__":
    main()
