"""What came of it: held-out problems answered, scored by the judge of training, counted, compared and shown.

    evaluate       a model's responses to problems, each with its score
    roll_out       the same for any number of problems and processes, on disk as it comes (measuring uses it too)
    summarize      accuracy, format, observation accuracy, length: overall and by difficulty level
    scores_of      all that is told of a benchmark: its published sub-scores, avg@k, maj@k, pass@k, intervals
    before_after   the table that closes a run
    compare        runs side by side, by setting over seeds, paired by problem
    plot_curves    metrics.jsonl -> curves.png
    plot_strip     one held-out problem's responses before, midway and last -> strip.png
    write_page     groups of responses -> one HTML file to look through, pictures inside

    torchrun eval.py --model CHECKPOINT --benchmark toy,mathvista,mathverse=PATH --prompt none,think,observe
    python eval.py --benchmark mathvista --responses answers.jsonl
    python eval.py compare RUN RUN ...

Departures from the benchmarks' own scripts, each with its reason:
  1. No judge model, and no random guess: an answer that names no option is wrong; a response that gives no answer
     (rewards.extract_answer) is wrong too, and counted as unreadable.
  2. The judge is the one of training (rewards.py). MathVista's own cuts 3.7 down to 3 where an integer is asked for;
     here 3.0 is 3 and 3.7 is not.
  3. Accuracy is over all published rows. One whose gold no rule can read is wrong; their number stands in the table.
  4. Intervals resample problems, not rows: MathVerse's five versions of a problem and We-Math's steps go together.
Scores, greedy and sampled, depend neither on --rows nor on the number of processes (but for rounding: logits that tie,
uniforms that fall on an edge): a response draws its own random numbers, see rollout.uniforms.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import fcntl
import glob
import hashlib
import html
import io
import itertools
import json
import math
import os
import re
import sys
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from string import ascii_uppercase
from typing import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure  # (not pyplot: no window, no state)
from tqdm import tqdm

from data import (
    BENCHMARKS,
    MAX_ANSWER,
    PROMPTS,
    SYMBOLS,
    Dropped,
    Picture,
    Processor,
    Record,
    batches,
    normal_text,
    open_image,
    parse_items,
    read_any,
    settle,
    split_number,
)
from rewards import TAGS, bare, judged, named_option, score, section
from rollout import best_device, load_policy, sample_groups

TOY = Path(__file__).resolve().parent / "assets/toy/test.parquet"
PUBLISHED = {"mathvista": 1000, "mathvision": 3040, "mathverse": 3940, "wemath": 1740, "mmmu": 900, "mmstar": 1500}


@dataclass(frozen=True)
class Sample:
    """One response, scored."""

    text: str
    answer: str | None  # as extracted; None: unreadable, which is counted as wrong
    correct: bool
    format: float
    observation: float | None  # share of the picture's facts that <observe> states; None where they are not known
    tokens: int | None  # None: another engine wrote it and did not say
    truncated: bool | None  # None: another engine did not say
    sections: dict[str, int] | None = None  # tokens inside <observe>, <think>, <answer>; None: not counted


@dataclass(frozen=True)
class Result:
    """One problem and its responses; none for a problem that cannot be used, which counts as wrong."""

    record: Record | Dropped
    samples: list[Sample]

    @property
    def accuracy(self) -> float:
        """Share of the responses that are right."""
        return mean(s.correct for s in self.samples) or 0.0

    @property
    def problem(self) -> str:
        """What is drawn together in an interval: MathVerse's versions of one problem, We-Math's steps of one."""
        return str(self.record.meta.get("problem_index", self.record.meta.get("ID", self.record.id)))


# --- answers of a model -----------------------------------------------------------------------------------------------


def evaluate(model, processor: Processor, records: list[Record], *, style: str, temperature: float, samples: int,
             max_tokens: int, max_rows: int = 256, seed: int = 0) -> Iterator[Result]:
    """Answer each problem `samples` times (temperature 0: greedy), scored by the judge of training, as results come.

    At most max_rows responses, but those to one problem, and the pictures of as many problems as these answer, are in
    memory at a time.
    """
    per_chunk = max(1, max_rows // samples)
    for start in range(0, len(records), per_chunk):
        chunk = records[start:start + per_chunk]
        prompts = [processor.encode(r, style) for r in chunk]
        groups = sample_groups(model, processor, chunk, prompts, samples=samples, temperature=temperature,
                               max_tokens=max_tokens, seed=seed, max_rows=max_rows)
        for record, group in zip(chunk, groups):
            yield Result(record, [
                judge(text, record, style, processor, len(response), cut)
                for text, response, cut in zip(group.texts, group.responses, group.truncated)])


def judge(text: str, record: Record, style: str, processor: Processor | None = None, tokens: int | None = None,
          truncated: bool | None = None) -> Sample:
    """One response -> scored, its sections counted where a processor tells what a token is."""
    def count(part: str) -> int:
        return len(processor.tokenizer(part, add_special_tokens=False).input_ids)

    s = score(text, record, style)
    parts = {tag: count(part) for tag in TAGS["observe"] if (part := section(text, tag))} if processor else None
    tokens = count(text) if tokens is None and processor else tokens
    return Sample(text, s.answer, bool(s.accuracy), s.format, s.observation, tokens, truncated, parts)


def load_both(path: str, max_pixels: int | None) -> tuple:
    """Model and processor, on this process's own GPU where there are any."""
    device = best_device()
    model = load_policy(path, device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return model, Processor(path, max_pixels)


def place() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def together(work: Callable):
    """Rank 0 does the work; every rank gets its result, or ends with its error, which rank 0 alone prints.

    Raises ValueError on rank 0 for a ValueError or OSError of the work, SystemExit on the others.
    """
    rank, world = place()
    box, cause = [None, None], None
    if rank == 0:
        try:
            box[0] = work()
        except (ValueError, OSError) as error:  # OSError: a full disk, a folder that may not be written to
            box[1], cause = str(error), error
    if world > 1:
        dist.broadcast_object_list(box)
    if box[1] is not None:
        if rank > 0:
            raise SystemExit(1)
        raise ValueError(box[1]) from cause
    return box[0]


def roll_out(folder: Path, name: str, records: list[Record], load: Callable[[], tuple], *, rows: int, seed: int,
             samples: int, keep_texts: bool = True, **sampling) -> list[Result]:
    """Answer records on all ranks -> all results, in the same order, on every rank.

    The unit of work is a chunk: `rows // samples` records, the same ones whatever the number of processes and whatever
    is done already. A finished chunk is a line of
    folder/name-RANK.jsonl, forced to disk; chunks that any rank of any earlier run finished are not done again.
    load: gives model and processor, and is called only if there is anything to do. sampling: style, temperature,
    max_tokens. keep_texts: else only what was extracted from them. All processes must see the same folder.
    """
    rank, world = place()
    size = max(1, rows // samples)
    chunks = [records[start:start + size] for start in range(0, len(records), size)]
    todo = together(lambda: sorted(set(range(len(chunks))) - set(_finished(folder, name, chunks))))
    if todo:
        model, processor = load()
        mine = todo[rank::world]
        with (tqdm(total=sum(len(chunks[i]) for i in mine), unit="problem", disable=rank > 0,
                   desc=name if world == 1 else f"{name}, the first of {world} equal shares") as bar,
              open(folder / f"{name}-{rank}.jsonl", "a+b") as file):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{file.name}: another process still writes to it (left over from a run that was "
                                 "killed?); end it, or wait for it") from None
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n":
                file.write(b"\n")  # the last run was killed inside a line
            for i in mine:
                done = evaluate(model, processor, chunks[i], samples=samples, seed=seed, max_rows=rows,
                                **sampling)
                results = [{"id": r.record.id, "samples": [
                    asdict(s if keep_texts else replace(s, text="", answer=s.answer and s.answer[:MAX_ANSWER + 1]))
                    for s in r.samples]} for r in done]
                file.write(json.dumps({"chunk": i, "results": results}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                bar.update(len(chunks[i]))
        if world > 1:
            dist.barrier()
    done = _finished(folder, name, chunks)
    if missing := len(chunks) - len(done):
        raise ValueError(f"{folder}: {missing} chunks are not there; do all processes write to the same folder?")
    return [result for i in range(len(chunks)) for result in done[i]]


def _finished(folder: Path, name: str, chunks: list[list[Record]]) -> dict[int, list[Result]]:
    """Finished chunks by number. A line that cannot be read was cut when its run was killed: its chunk is not done."""
    done = {}
    for file in sorted(folder.glob(f"{glob.escape(name)}-[0-9]*.jsonl")):
        for line in file.read_bytes().splitlines():
            try:
                chunk = json.loads(line)
            except ValueError:
                continue
            i, results = chunk["chunk"], chunk["results"]
            if i < len(chunks) and [r["id"] for r in results] == [r.id for r in chunks[i]]:
                done[i] = [Result(record, [Sample(**s) for s in r["samples"]])
                           for record, r in zip(chunks[i], results)]
    return done


# --- scores -----------------------------------------------------------------------------------------------------------


def mean(values) -> float | None:
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def summarize(results: list[Result]) -> dict:
    """Scores in [0, 1] and mean length in tokens, means over problems of means over samples (avg@k).

    `levels` holds the same for each difficulty level that the problems were measured at; `by_problem` each accuracy.
    """
    def scores(part: list[Result]) -> dict:
        def over(get) -> float | None:
            return mean(mean(get(s) for s in r.samples) for r in part)

        return {"problems": len(part), "accuracy": mean(r.accuracy for r in part), "format": over(lambda s: s.format),
                "observation": over(lambda s: s.observation), "length": over(lambda s: s.tokens),
                "truncated": over(lambda s: s.truncated), "unreadable": over(lambda s: s.answer is None)}

    levels: dict[float, list[Result]] = {}
    for result in results:
        if isinstance(result.record, Record) and result.record.difficulty is not None:
            levels.setdefault(result.record.difficulty, []).append(result)
    own = sorted(results, key=lambda r: isinstance(r.record, Record))  # (a row may be dropped for another's id)
    return scores(results) | {"levels": {f"{level:.3f}": scores(levels[level]) for level in sorted(levels)},
                              "by_problem": {r.record.id: r.accuracy for r in own}}


def interval(groups: list[list[Result]], get: Callable[[Result], float] = lambda r: r.accuracy, draws: int = 2000,
             seed: int = 0) -> list[float] | None:
    """95% bootstrap interval of the mean over groups of each group's mean: problems are drawn anew, with all their
    versions and samples. None for a single problem.
    """
    index = {problem: i for i, problem in enumerate(sorted({r.problem for group in groups for r in group}))}
    sums, counts = np.zeros((2, len(index), len(groups)))
    for column, group in enumerate(groups):
        for result in group:
            sums[index[result.problem], column] += get(result)
            counts[index[result.problem], column] += 1
    if len(index) < 2:
        return None
    times = drawn(np.random.default_rng(seed), len(index), draws)
    with np.errstate(invalid="ignore"):  # 0 / 0: a draw without any problem of a group
        means = np.nanmean((times @ sums) / (times @ counts), axis=1)
    return np.percentile(means, [2.5, 97.5]).tolist()


def drawn(rng: np.random.Generator, count: int, draws: int) -> np.ndarray:
    """[draws, count] how often each of `count` things is drawn, in `count` draws with replacement."""
    return rng.multinomial(count, np.full(count, 1 / count), draws).astype(float)


def vote(answer: str, record: Record) -> str:
    """What equal answers share: the option's letter, the number with a unit that the judge tells apart, the items of a
    list, or the text."""
    answer = bare(answer[:MAX_ANSWER + 1], record)
    option = named_option(answer, record.choices) if record.answer_type == "choice" else None
    if option is not None:
        return ascii_uppercase[option]
    listed = parse_items(answer) if record.answer_type == "list" else None
    items = listed[1] if listed else (answer,)
    numbers = [split_number(item, known_units=record.answer_type != "number") for item in items]
    return ", ".join(
        (f"{number[0]:.6g}" if abs(number[0]) < 1 else f"{number[0]:.5f}") + (number[1] if number[1] in SYMBOLS else "")
        if number else normal_text(item) for item, number in zip(items, numbers))


def majority_right(result: Result) -> float:
    """1 or 0: is the answer that most samples give right? Tied answers share; what cannot be read has no vote. Right
    ones are equal, however they are written, where there is one gold."""
    one = len(result.record.golds) == 1 if result.samples else False
    votes = [("right" if one and s.correct else f"= {vote(s.answer, result.record)}", s.correct)
             for s in result.samples if s.answer is not None]
    counts = Counter(answer for answer, _ in votes)
    return mean(right for answer, right in votes if counts[answer] == max(counts.values())) or 0.0


def pass_at(result: Result, k: int) -> float:
    """Chance that one of k of the n samples, c of them right, is right: 1 - C(n - c, k) / C(n, k), unbiased."""
    n, c = len(result.samples), sum(s.correct for s in result.samples)
    return 1 - math.comb(n - c, k) / math.comb(n, k) if n else 0.0


def before_after(before: dict, after: dict) -> str:
    """The table that closes a run. before, after: {"greedy": summary, "sampled": summary}, see summarize."""
    def change(old: float | None, new: float | None, percent: bool) -> str:
        if old is None or new is None:
            return "-"
        return f"{100 * old:5.1f} -> {100 * new:5.1f}" if percent else f"{old:5.0f} -> {new:5.0f}"

    columns = [("accuracy", "greedy", True), ("accuracy", "sampled", True), ("format", "sampled", True),
               ("observation", "sampled", True), ("length", "sampled", False)]
    names = ["accuracy, greedy %", "accuracy, T=1 %", "format %", "observation %", "length, tokens"]
    lines = ["difficulty  problems  " + "  ".join(f"{name:>18}" for name in names)]
    for level in ["all", *before["greedy"]["levels"]]:
        def pick(summary: dict, level=level) -> dict:
            return summary if level == "all" else summary["levels"][level]

        cells = [change(pick(before[kind])[key], pick(after[kind])[key], percent) for key, kind, percent in columns]
        lines.append(f"{level:>10}  {pick(after['greedy'])['problems']:8d}  " + "  ".join(f"{c:>18}" for c in cells))
    return "\n".join(lines)


# --- the benchmarks' own sub-scores -----------------------------------------------------------------------------------

TASKS = {"figure question answering": "FQA", "geometry problem solving": "GPS", "math word problem": "MWP",
         "textbook question answering": "TQA", "visual question answering": "VQA"}  # of MathVista
DOMAINS = {subject: domain for domain, subjects in {  # of MMMU
    "Art & Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health & Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
                         "Public_Health",
    "Humanities & Social Science": "History Literature Psychology Sociology",
    "Tech & Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
                          "Materials Mechanical_Engineering"}.items() for subject in subjects.split()}
STEPS = {f"{n}steps_{step}": f"S{n if step == 'multi' else 1}" for n in (2, 3) for step in (1, 2, 3, "multi")}
PARTS = {  # of each benchmark, its published sub-scores: their kind, the key in a row's meta, other names of its values
    "mathvista": [("task", "task", TASKS), ("skill", "skills", {})],
    "mathvision": [("level", "level", {}), ("subject", "subject", {})],
    "mathverse": [("version", "problem_version", {})],
    "wemath": [("steps", "key", STEPS)],
    "mmmu": [("domain", "subject", DOMAINS), ("subject", "subject", {})],
    "mmstar": [("category", "category", {})]}
MEAN_OVER = {"mathverse": "version", "mmstar": "category"}  # these report the mean of their parts


def parts_of(benchmark: str, row: Record | Dropped) -> list[tuple[str, str]]:
    """Which parts of its benchmark a row counts in: (what kind of part, its name)."""
    if benchmark not in PARTS:
        level, source = getattr(row, "difficulty", None), getattr(row, "source", "")
        found = [("difficulty", "" if level is None else f"{level:.3f}"), ("source", source)]
        return [(kind, name) for kind, name in found if name]
    found = [(kind, names, row.meta.get(key, [])) for kind, key, names in PARTS[benchmark]]
    return [(kind, str(names.get(value, value))) for kind, names, values in found
            for value in (values if isinstance(values, list) else [values])]


def four_way(results: list[Result]) -> dict:
    """We-Math's metric over the rows of one ID: M, the problem of several steps, is right; all / any: its single steps.

    IG = all and not M; IK = not all and not M; strict CM = all and M, RM = not all and M; loose CM = any and M, RM =
    not any and M; score = CM + IG / 2 = (N - IG / 2 - RM - IK) / N, with N = 525 IDs. RM_rate, RM / (RM + CM), is what
    the authors print as RM. Means over the samples. IDs whose rows are not all there (--limit) are left out.
    """
    by_id: dict[str, dict[str, Result]] = {}
    for result in results:
        if {"ID", "key"} <= result.record.meta.keys():
            by_id.setdefault(result.record.meta["ID"], {})[result.record.meta["key"]] = result
    ordered = [[rows[key] for key in sorted(rows)] for rows in by_id.values() if any("multi" in key for key in rows)]
    whole = [rows for rows in ordered if len(rows) == 1 + int(rows[-1].record.meta["key"][0])]  # M is the last
    if not whole:
        return {}
    samples = max(len(r.samples) for rows in whole for r in rows)
    right = [np.array([[s.correct for s in r.samples] or [False] * samples for r in rows]) for rows in whole]
    m, every, some = np.array([(r[-1], r[:-1].all(0), r[:-1].any(0)) for r in right]).swapaxes(0, 1)  # [IDs, samples]
    found: dict = {"ids": len(whole)}
    for name, taken in (("strict", every), ("loose", some)):
        kinds = {"CM": m & taken, "IG": ~m & every, "IK": ~m & ~every, "RM": m & ~taken}
        scores = dict(zip((rows[-1].record.id for rows in whole), (kinds["CM"] + kinds["IG"] / 2).mean(1)))
        cm, ig, ik, rm = (float(kind.mean()) for kind in kinds.values())
        found[name] = {"score": cm + ig / 2, "CM": cm, "IG": ig, "IK": ik, "RM": rm, "RM_rate": rm and rm / (rm + cm),
                       "interval": interval([[rows[-1] for rows in whole]], lambda r, of=scores: of[r.record.id])}
    return found


def scores_of(benchmark: str, results: list[Result]) -> dict:
    """All that is told of a benchmark's results in one prompt style and sampling; shares and scores in [0, 1]."""
    n = max(len(r.samples) for r in results)
    found = summarize(results) | {
        "interval": interval([results]), "samples": n, "majority": mean(map(majority_right, results)),
        "pass": {k: mean(pass_at(r, k) for r in results) for k in sorted({2**i for i in range(n.bit_length())} | {n})
                 if 0 < k <= n},
        "unusable": sum(isinstance(r.record, Dropped) for r in results),
        "why_unusable": {r.record.id: r.record.detail for r in results if isinstance(r.record, Dropped)},
        "drawn_with": {r.record.id: r.problem for r in results if r.problem != r.record.id},
        "published": PUBLISHED.get(benchmark)}
    lengths = {tag: mean(mean(s.sections.get(tag, 0) for s in r.samples if s.sections is not None) for r in results)
               for tag in TAGS["observe"]}
    found["sections"] = {tag: {"length": length, "share": length / found["length"]}
                         for tag, length in lengths.items() if length is not None and found["length"]}
    parts: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        for kind, name in parts_of(benchmark, result.record):
            parts.setdefault(kind, {}).setdefault(name, []).append(result)
    found["parts"] = {kind: {name: {"problems": len(rows), "accuracy": mean(r.accuracy for r in rows),
                                    "interval": interval([rows])} for name, rows in sorted(named.items())}
                      for kind, named in parts.items()}
    if (kind := MEAN_OVER.get(benchmark)) in parts:
        found["mean_over_parts"] = {"parts": len(parts[kind]), "interval": interval(list(parts[kind].values())),
                                    "accuracy": mean(part["accuracy"] for part in found["parts"][kind].values())}
    if benchmark == "wemath":
        found["four_way"] = four_way(results)
    return found


def percent(value: float | None, interval: list[float] | None = None, sign: str = "") -> str:
    if value is None:
        return "-"
    value, *ends = (f"{100 * v:{sign}.1f}" for v in (value, *(interval or ())))
    return f"{value} [{', '.join(ends)}]" if ends else value


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table that Markdown and a person at a terminal can read."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def tables(scores: list[dict]) -> str:
    """What eval.py prints: a row for each benchmark, prompt style and sampling; then each benchmark's sub-scores."""
    many = any(s["samples"] > 1 for s in scores)
    header = ["benchmark", "prompt", "sampling", "problems", "accuracy %, 95% interval",
              *(["majority %", "pass@k %"] if many else []), "format %", "unreadable %", "observation %", "tokens",
              "of these <observe> / <think> / <answer>", "cut off %"]
    rows, parts = [], []
    for s in scores:
        k, sections = s["samples"], s["sections"]
        passes = "  ".join(f"@{n}: {percent(value)}" for n, value in s["pass"].items() if int(n) > 1)
        rows.append([s["benchmark"], s["prompt"], f"{s['sampling']}, avg@{k}" if k > 1 else s["sampling"],
                     str(s["problems"]), percent(s["accuracy"], s["interval"]),
                     *([percent(s["majority"]) if k > 1 else "-", passes or "-"] if many else []),
                     percent(s["format"]), percent(s["unreadable"]), percent(s["observation"]),
                     "-" if s["length"] is None else f"{s['length']:.0f}",
                     " / ".join(f"{part['length']:.0f} ({part['share']:.0%})" for part in sections.values()) or "-",
                     percent(s["truncated"])])
    for benchmark in dict.fromkeys(s["benchmark"] for s in scores):
        runs = [s for s in scores if s["benchmark"] == benchmark]
        lines = [[f"{kind}: {name}", str(part["problems"]),
                  *(percent(s["parts"][kind][name]["accuracy"], s["parts"][kind][name]["interval"]) for s in runs)]
                 for kind, named in runs[0]["parts"].items() for name, part in named.items()]
        if mean_of := runs[0].get("mean_over_parts"):
            lines.append([f"mean over {mean_of['parts']} {MEAN_OVER[benchmark]} scores", str(runs[0]["problems"]), *(
                percent(s["mean_over_parts"]["accuracy"], s["mean_over_parts"]["interval"]) for s in runs)])
        if four := runs[0].get("four_way"):
            for name, key in itertools.product(("strict", "loose"), ("score", "CM", "IG", "IK", "RM", "RM_rate")):
                ways = [s["four_way"][name] for s in runs]
                lines.append([f"{name} {key.replace('_', ' ')}", f"{four['ids']} IDs",
                              *(percent(way[key], way["interval"] if key == "score" else None) for way in ways)])
        if lines:
            parts += ["", markdown([benchmark, "problems", *(f"{s['prompt']}, {s['sampling']}" for s in runs)], lines)]
        if runs[0]["unusable"]:
            parts.append(f"{benchmark}: {runs[0]['unusable']} of {runs[0]['problems']} problems cannot be used (most "
                         "often no rule can read the gold); they count as wrong. scores.json names them.")
        if runs[0]["published"] not in (None, runs[0]["problems"]):
            parts.append(f"{benchmark}: these are {runs[0]['problems']} of {runs[0]['published']} published problems.")
    return "\n".join([markdown(header, rows), *parts])


# --- pictures ---------------------------------------------------------------------------------------------------------


def plot_curves(metrics: list[dict], path: Path) -> None:
    """Lines of metrics.jsonl -> a PNG: what training saw, and held-out scores at each stage's end."""
    steps = [m for m in metrics if "reward" in m]
    tests = [m for m in metrics if "eval" in m]
    panels = [("accuracy", "accuracy"), ("format", "format"), ("observation", "observation accuracy"),
              ("length", "response length, tokens"), ("reward", "reward"), ("signal", "share of groups with signal"),
              ("entropy", "entropy, nats a token"), ("grad_norm", "gradient norm")]
    figure = Figure(figsize=(16, 6.5), layout="constrained")
    axes = figure.subplots(2, 4)
    for axis, (key, title) in zip(axes.flat, panels):
        points = [(m["step"], m[key]) for m in steps if key in m]
        if points:
            x, y = zip(*points)
            axis.plot(x, y, color="0.8", linewidth=0.8)
            window = max(1, len(y) // 20)
            smooth = [mean(y[max(0, i - window):i + window + 1]) for i in range(len(y))]
            axis.plot(x, smooth, color="C0", label="training, mean of neighbours")
        for kind, colour in (("greedy", "C1"), ("sampled", "C2")):
            scores = [(m["step"], m["eval"][kind][key]) for m in tests if m["eval"].get(kind, {}).get(key) is not None]
            if scores:
                axis.plot(*zip(*scores), "o-" if kind == "greedy" else "o:", color=colour, markersize=4,
                          label="held out, greedy" if kind == "greedy" else "held out, temperature 1")
        for before, after in zip(steps, steps[1:]):
            if before["stage"] != after["stage"]:
                axis.axvline(before["step"] + 0.5, color="0.9", linewidth=0.8, zorder=0)
        axis.set(title=title, xlabel="rollout (a line at each stage's end)")
    if axes.flat[0].get_legend_handles_labels()[0]:
        axes.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def plot_strip(metrics: list[dict], records: dict[str, Record], path: Path) -> None:
    """Lines of metrics.jsonl -> a PNG: one held-out problem, and its greedy response before, midway and last.

    The first problem of those logged that is wrong at first and right at last; where there is none, the first.
    """
    tests = [m for m in metrics if m.get("shown")]
    if len(tests) < 2:
        return
    said = [{line["id"]: line for line in m["shown"]} for m in tests]
    known = [key for key in said[0] if key in said[-1]]
    turned = [key for key in known if said[-1][key]["right"] and not said[0][key]["right"]]
    record = records[(turned or known)[0]]
    chosen = [0, len(tests) // 2, -1] if len(tests) > 2 else [0, -1]
    figure = Figure(figsize=(4 + 4 * len(chosen), 4.4), layout="constrained")
    axes = figure.subplots(1, 1 + len(chosen))
    if record.images:
        axes[0].imshow(open_image(record.images[0], record.id))
    axes[0].set_title(textwrap.fill(record.text.replace("$", r"\$"), 36), fontsize=10)
    for axis, i in zip(axes[1:], chosen):
        line = said[i][record.id]
        text = "\n".join(textwrap.fill(part, 42) for part in line["text"].replace("$", r"\$").splitlines())
        axis.text(0, 1, text, va="top", family="monospace", fontsize=9, transform=axis.transAxes)
        axis.set_title(f"after {tests[i]['step']} rollouts: {'right' if line['right'] else 'wrong'}", fontsize=11,
                       color="#2a9d4a" if line["right"] else "#d04040")
    for axis in axes:
        axis.axis("off")
    figure.savefig(path, dpi=110)


PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }}
section {{ border-top: 1px solid #ccc; padding: 1rem 0; display: grid; grid-template-columns: 15rem 1fr; gap: 1.5rem }}
img {{ min-width: 7rem; max-width: 15rem; max-height: 15rem; border: 1px solid #ddd; image-rendering: pixelated }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .5rem; padding: .4rem .6rem; background: #f6f6f6 }}
.right {{ border-left: 4px solid #2a9d4a }} .wrong {{ border-left: 4px solid #d04040 }}
.unreadable {{ border-left: 4px solid #999 }} [hidden] {{ display: none }}
small {{ color: #666; display: block }} label {{ margin-right: 1rem }}
</style><h1>{title}</h1><p>{intro}</p>
{body}"""
SWITCHES = """<script>
function show(kind, on) {
  document.querySelectorAll("pre." + kind).forEach(e => e.hidden = !on);
  document.querySelectorAll("section").forEach(e => e.hidden = !e.querySelector("pre:not([hidden])"));
}</script>""" + " ".join(
    f"""<label><input type="checkbox" checked onchange="show('{kind}', this.checked)"> {kind} ({colour})</label>"""
    for kind, colour in (("right", "green"), ("wrong", "red"), ("unreadable", "grey")))


def picture_tag(record: Record, image) -> str:
    """A picture as an HTML image with the data inside, at most 512 px a side."""
    try:
        picture = open_image(image, record.id)
    except ValueError as error:  # answers of another engine are scored without the pictures
        return f"<small>{html.escape(str(error))}</small>"
    picture.thumbnail((512, 512))
    buffer = io.BytesIO()
    kind = "png" if picture.width * picture.height < 256 * 256 else "jpeg"  # a page of photographs as PNG is 80 MB
    picture.save(buffer, kind, quality=85)
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def gold_of(record: Record) -> str:
    return " or ".join(record.golds)


def write_page(lines: list[dict], records: dict[str, Record], path: Path, title: str, limit: int = 300) -> None:
    """Lines of training's responses.jsonl, or of an evaluation -> one HTML file without outside parts; at most `limit`
    groups, spread over the run; to be filtered by right, wrong, unreadable.

    All text is escaped: what a model writes cannot become markup.
    """
    def worth(r: dict) -> str:
        told = [f"reward {r['reward']:.2f} = accuracy {r['accuracy']:.0f}, format {r['format']:.0f}, bonus "
                f"{r['bonus']:.1f}; advantage {r['advantage']:+.2f}"] if "reward" in r else (
                    [] if r["answer"] is None else [f"answer: {html.escape(r['answer'][:200])}"])
        return "; ".join(told + ([] if r["tokens"] is None else [f"{r['tokens']} tokens"]))

    kept = [lines[i * len(lines) // limit] for i in range(limit)] if len(lines) > limit else lines
    parts = []
    for line in kept:
        record = records[line["id"]]
        responses = "".join(
            f'<pre class="{"right" if r["accuracy"] else "unreadable" if r.get("answer", "") is None else "wrong"}">'
            f'{html.escape(r["text"])}<small>{worth(r)}</small></pre>' for r in line["responses"])
        stage = "" if line.get("stage") is None else f", stage {line['stage']}"
        where = f"step {line['step']}{stage}, weight {line['weight']:.2f}, " if "step" in line else ""
        parts.append(
            f'<section><div>{"".join(picture_tag(record, i) for i in record.images)}'
            f'<small>{where}problem {html.escape(line["id"])}</small></div>'
            f'<div><p><b>{html.escape(record.text).replace(chr(10), "<br>")}</b><br>'
            f'gold: {html.escape(gold_of(record))}</p>'
            f'{responses}</div></section>')
    intro = f"{len(kept)} of {len(lines)} groups of responses, spread evenly, in order. {SWITCHES}"
    path.write_text(PAGE.format(title=html.escape(title), intro=intro, body="\n".join(parts)), encoding="utf-8")


# --- runs side by side ------------------------------------------------------------------------------------------------

# Settings of training that change memory, speed and what is kept, not the steps (but by rounding).
TECHNICAL = ("micro_tokens", "rollout_rows", "gradient_checkpointing", "save_every", "keep", "tracker", "offload")
# What runs of one setting may differ in; what was asked of an evaluation is told by its data.
UNEQUAL = ("seed", "out", "resume", "model", "trained", "responses", "benchmark", "rows", *TECHNICAL)


@dataclass(frozen=True)
class Run:
    """What one run of train.py, or one prompt style of an evaluation, came to."""

    folder: Path
    seed: str
    settings: dict  # without the seed
    problems: dict[str, dict[str, tuple[str, float]]]  # column of the table -> id -> (what is drawn together, accuracy)
    before: dict[str, dict[str, tuple[str, float]]] = field(default_factory=dict)  # the same, before training
    beside: dict[str, float] = field(default_factory=dict)  # what else stands in the tables, by column


def _beside(summary: dict, sampling: str) -> dict[str, float]:
    """Of a summary: what its responses were like, and accuracy by difficulty level."""
    shares = {name: summary.get(name) for name in ("observation", "format")} | {
        level: scores["accuracy"] for level, scores in summary.get("levels", {}).items()}
    found = {f"{name}, {sampling}, %": 100 * value for name, value in shares.items() if value is not None}
    return found | ({f"tokens, {sampling}": summary["length"]} if summary.get("length") is not None else {})


def read_runs(folder: Path) -> list[Run]:
    """The runs in a folder that train.py or eval.py left: one, or one for each prompt style."""
    try:
        scores = json.loads((folder / "scores.json").read_text())
        config = {} if "settings" in scores else json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no finished run of train.py (with --test) or eval.py: {error}") from error
    if config:
        test = Path(config["test"])
        label = "toy" if test.parts[-2:] == TOY.parts[-2:] else label_of(config["test"])

        def columns(ends: dict) -> dict:
            return {f"{label}, {name}": {key: (key, value) for key, value in ends[kind]["by_problem"].items()}
                    for name, kind in (("greedy", "greedy"), ("T=1", "sampled"))}

        settings = {key: value for key, value in config.items() if key not in UNEQUAL or key == "model"}
        beside = _beside(scores["after"]["sampled"], "T=1")
        if (file := folder / "metrics.jsonl").exists():
            steps = [line for line in map(json.loads, file.read_text().splitlines()) if "reward" in line]
            seconds = sum(s["seconds_rollout"] + s["seconds_reward"] + s["seconds_update"] for s in steps)
            beside |= {"groups with signal, %": 100 * mean(s["signal"] for s in steps), "minutes": seconds / 60}
        return [Run(folder, str(config["seed"]), settings, columns(scores["after"]), columns(scores["before"]), beside)]
    asked = scores["settings"]
    trained = {} if asked["responses"] else asked["trained"] or {}  # (a model beside responses only counts tokens)
    settings = {key: value for key, value in asked.items() if key not in UNEQUAL} | {
        f"trained with {key}": value for key, value in trained.items() if key not in UNEQUAL or key == "model"}
    settings["model"] = asked["responses"] or ("a checkpoint of train.py" if trained else asked["model"])
    runs: dict[str, dict] = {}
    for s in scores["scores"]:
        runs.setdefault(s["prompt"], {})[f"{s['benchmark']}, {s['sampling']}"] = {
            key: (s["drawn_with"].get(key, key), accuracy) for key, accuracy in s["by_problem"].items()}
    seed = f"{trained.get('seed', '')}/{asked['seed']}"
    beside = {s["prompt"]: _beside(s, s["sampling"]) for s in scores["scores"]}
    return [Run(folder, seed, settings | {"prompt": prompt}, problems, beside=beside[prompt])
            for prompt, problems in runs.items()]


def difference(runs: list[dict], base: list[dict], draws: int = 2000, seed: int = 0):
    """Mean accuracy of runs, minus that of the base runs where there are any, over the problems that all of them
    have; runs and base: {id: (what is drawn together, accuracy)} for each seed.

    -> mean, its 95% interval (None where there is nothing to draw), problems; None without common problems.
    Problems are drawn anew (bootstrap), once for both sides, which pairs them. What the seeds of each side add, where
    it has several, is Student's t with their standard error: seeds are few, and drawn anew from four of themselves they
    would give intervals half as wide. That error has the noise of single responses in it, which is taken out of the
    bootstrap's spread, not to count it twice.
    """
    ids = sorted(set.intersection(*(set(run) for run in [*runs, *base]))) if runs else []
    if not ids:
        return None
    names = {name: i for i, name in enumerate(sorted({runs[0][key][0] for key in ids}))}
    rng = np.random.default_rng(seed)
    weights = drawn(rng, len(names), draws)[:, [names[runs[0][key][0]] for key in ids]]  # [draws, problems]
    change, noise, errors = np.zeros(len(ids)), 0.0, np.zeros(draws)
    for sign, part in ((1, runs), (-1, base)):
        scores, n = np.array([[run[key][1] for key in ids] for run in part]), len(part)  # [seeds, problems]
        change += sign * scores.mean(0) if n else 0
        if n > 1:
            noise += scores.var(0, ddof=1).mean() / n
            t = np.quantile(rng.standard_t(n - 1, 50_000), (np.arange(draws) + .5) / draws)  # (2,000 have rough tails)
            errors += rng.permutation(t) * scores.mean(1).std(ddof=1) / n ** .5
    center, spread = change.mean(), change.var()
    own = max(0.0, 1 - noise / spread) ** .5 if spread else 0.0  # the problems' share of the bootstrap's spread
    means = center + own * (weights @ change / weights.sum(1) - center) + errors
    several = len(names) > 1 or max(len(runs), len(base)) > 1
    return center, np.percentile(means, [2.5, 97.5]).tolist() if several else None, len(ids)


def compare(argv: list[str]) -> None:
    """Print and save, in Markdown, what runs came to, by setting over seeds; draw it."""
    parser = argparse.ArgumentParser(prog="eval.py compare", description="Set runs side by side.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that train.py or eval.py left")
    parser.add_argument("--against", choices=("first", "previous"), default="first", help="which setting each is "
                        "compared with, in the order given: the first, or the one before it (a ladder of ablations)")
    parser.add_argument("--out", type=Path, default=Path("out/compare"), help="folder for compare.md and compare.png")
    args = parser.parse_args(argv)
    groups: dict[str, list[Run]] = {}
    for folder in args.runs:
        for run in read_runs(folder):
            group = groups.setdefault(json.dumps(run.settings, sort_keys=True), [])
            if twin := next((other for other in group if other.seed == run.seed), None):
                raise ValueError(f"{twin.folder} and {run.folder} are of the same settings and seed (memory and speed "
                                 "do not count); give one of them: a run counted twice would make its interval too "
                                 "small")
            group.append(run)
    shown = list(groups.values())
    keys = dict.fromkeys(key for group in shown for key in group[0].settings)
    differ = [key for key in keys  # a model that was never trained does not differ in all settings of training
              if len({json.dumps(group[0].settings[key]) for group in shown if key in group[0].settings}) > 1]
    short = [key for key in differ if not key.startswith("data ")]

    def name_of(group: list[Run]) -> str:
        settings = group[0].settings
        if 0 < len(short) < 4:
            return ", ".join(f"{key} {_short(settings.get(key))}" for key in short)
        alone = sum(other[0].folder == group[0].folder for other in shown) == 1
        return re.sub(r"-seed\d+$", "", group[0].folder.name) + ("" if alone else f", prompt {settings['prompt']}")

    names = [name_of(group) for group in shown]
    columns = list(dict.fromkeys(column for group in shown for run in group for column in run.problems))
    trained = any(run.before for group in shown for run in group)

    def cell(found: tuple | None, sign: str = "") -> str:
        return percent(*found[:2], sign) if found else "-"

    header, table, points = ["setting", "seeds"], [[name, str(len(group))] for name, group in zip(names, shown)], {}
    for column in columns:
        header += [f"{column}, %", *["gain by training"] * trained,
                   *[f"against the {args.against}", "paired problems"] * (len(shown) > 1)]
        base: list[dict] = []
        for y, (row, group) in enumerate(zip(table, shown)):
            runs = [run.problems[column] for run in group if column in run.problems]
            before = [run.before[column] for run in group if column in run.before]
            score = points[column, y] = difference(runs, [])
            row.append(cell(score))
            if trained:
                row.append(cell(difference(runs, before) if before else None, "+"))
            if len(shown) > 1:
                against = difference(runs, base) if base else None
                row += [cell(against, "+"), str(against[2]) if against else "-"]
            if y == 0 or args.against == "previous":
                base = runs
    text = [markdown(header, table), "", "Accuracy in %, with 95% intervals: bootstrap over problems and, where a "
            "setting has several seeds, Student's t over these. Differences are paired by problem."]
    for kind, by_level in (("setting", False), ("accuracy by difficulty", True)):
        more = list(dict.fromkeys(name for group in shown for run in group for name in run.beside
                                  if name[0].isdigit() == by_level))
        rows = [[name, *(over_seeds([run.beside[key] for run in group if key in run.beside]) for key in more)]
                for name, group in zip(names, shown)]
        text += ["", markdown([kind, *more], rows)] if more else []
    text += ["", "Means over seeds, with their standard error."] if any(len(group) > 1 for group in shown) else []
    if differ:
        text += ["", markdown(["differs", *names], [[key, *(_short(g[0].settings.get(key)) for g in shown)]
                                                    for key in differ])]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "compare.md").write_text("\n".join(text) + "\n")
    across = min(3, len(columns))
    down = -(-len(columns) // across)
    figure = Figure(figsize=(5 * across + 2, down * (1.5 + .4 * len(names))), layout="constrained")
    axes = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for axis, column in zip(axes, columns):
        axis.set(title=f"{column}: accuracy, 95% interval", yticks=range(len(names)), ylim=(len(names) - .5, -.5))
        axis.set_yticklabels(names, parse_math=False)
        axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        for y in range(len(names)):
            if found := points[column, y]:
                axis.plot(found[1] or [found[0]] * 2, [y, y], color="C0", linewidth=2)
                axis.plot(found[0], y, "o", color="C0")
    for axis in axes[len(columns):]:
        axis.set_visible(False)
    figure.savefig(args.out / "compare.png", dpi=110)
    print(*text, "", f"-> {args.out}", sep="\n")


def over_seeds(values: list[float]) -> str:
    """Their mean, with its standard error where there are several."""
    error = f" ± {np.std(values, ddof=1) / len(values) ** .5:.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{error}" if values else "-"


def _short(value) -> str:
    return str(value if value not in (None, "") else "-").replace("|", "/")


# --- from the command line --------------------------------------------------------------------------------------------


def model_digest(path: str) -> str:
    """A model's name and, of a folder, a digest of its weights and settings, which outlives a move of the folder."""
    if not Path(path).is_dir():
        return path
    digest = hashlib.sha256()
    for file in sorted(Path(path).iterdir()):
        if file.suffix in (".safetensors", ".bin", ".json", ".jinja", ".txt"):
            with open(file, "rb") as data:
                digest.update(file.name.encode() + hashlib.file_digest(data, "sha256").digest())
    return f"{Path(path).resolve().name} ({digest.hexdigest()[:12]})"


def data_digest(records: list[Record]) -> str:
    """Changes with any change of the texts and of the pictures' files, which are read but not decoded."""
    digest = hashlib.sha256()
    for r in records:
        digest.update(repr((r.id, r.question, r.answer, r.choices, r.answer_type, r.precision, len(r.images))).encode())
    images = [image for r in records for image in r.images]
    found = [b""] * len(images)

    def position(i: int) -> tuple:  # in the order of the files, whose row groups are then read once each
        image = images[i]
        return (image.file, image.group, image.row) if isinstance(image, Picture) else ("", 0, 0)

    for i in sorted(range(len(images)), key=position):
        with contextlib.suppress(OSError, ValueError):  # (check_prompts will name it)
            found[i] = hashlib.sha256(_raw(images[i])).digest()
    digest.update(repr(found).encode())
    return f"{len(records)} problems ({digest.hexdigest()[:12]})"


def _raw(image) -> bytes:
    """A picture as it is stored; of one that is in memory, its size and pixels."""
    if isinstance(image, Picture):
        return image.read()
    if isinstance(image, (str, Path)):
        return Path(image).read_bytes()
    return image if isinstance(image, bytes) else repr(image.size).encode() + open_image(image, "").tobytes()


def check_same(folder: Path, what: str, before: dict, now: dict) -> None:
    """Raise ValueError, naming what changed, when a folder holds another run than the one to go on with."""
    changed = [f"  {key}: {before.get(key)} there, {now.get(key)} now" for key in before | now
               if before.get(key) != now.get(key)]
    if changed:
        raise ValueError("\n".join([f"{folder} holds {what} of other data or settings:", *changed,
                                    "give what it began with, or another --out"]))


def write_json(path: Path, value) -> None:
    """Whole or not at all, whatever is killed when."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with open(part, "w") as file:
        file.write(json.dumps(value, indent=1))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


@dataclass(frozen=True)
class Job:
    """One line of the table."""

    benchmark: str
    prompt: str
    sampling: str  # greedy, T=1, ..., or given: by another engine
    temperature: float
    samples: int

    @property
    def name(self) -> str:
        return f"{self.benchmark}-{self.prompt}-{self.sampling}"


def samplings(benchmark: str, args: argparse.Namespace) -> list[tuple[str, float, int]]:
    """(name, temperature, samples) of each: greedy, unless told otherwise; the built-in world at temperature 1 too."""
    greedy = ("greedy", 0.0, 1)
    if args.responses:
        return [("given", 0.0, 0)]
    if args.temperature is None and args.samples is None:
        return [greedy, ("T=1", 1.0, 4)] if benchmark == "toy" else [greedy]
    temperature, samples = 1.0 if args.temperature is None else args.temperature, args.samples or 1
    if temperature == 0 and samples > 1:
        raise ValueError("--temperature 0 is greedy: all samples would be the same; give a temperature above 0")
    return [(f"T={temperature:g}", temperature, samples)] if temperature else [greedy]


def read_benchmark(spec: str, limit: int | None) -> tuple[str, list[Record | Dropped]]:
    """`toy`, a benchmark, benchmark=PATH, or any file -> its name and its rows, in the published order."""
    name, _, path = spec.partition("=")
    if name in BENCHMARKS:
        made = BENCHMARKS[name](path or None)
    elif spec == "toy" or Path(spec).exists() or "@" in spec:
        name, made = "toy" if spec == "toy" else label_of(spec), read_any(str(TOY) if spec == "toy" else spec)
    else:
        raise ValueError(f"--benchmark {spec}: no benchmark of that name (there are toy, {', '.join(BENCHMARKS)}; "
                         "name=PATH reads a local copy), no file or folder here, and no hub id with its split "
                         "(org/name@test)")
    rows = [judged(row) for row in itertools.islice(tqdm(made, desc=f"reading {name}", unit=" records"), limit)]
    if not rows:
        raise ValueError(f"--benchmark {spec}: holds no records")
    return name, rows


def label_of(spec: str) -> str:
    """What a table calls a file: its stem, its folder for curriculum.py's measured.parquet, and both for one that is
    called as a benchmark is, for it is not scored as that."""
    stem, folder = Path(spec).stem, Path(spec).resolve().parent.name
    return folder if stem == "measured" else f"{folder}-{stem}" if stem in ("toy", *BENCHMARKS) else stem


def longest_first(rows: list[Record | Dropped], processor: Processor | None) -> list[int]:
    """Encode every record once, which finds broken pictures before hours are lost: what cannot be fed is dropped in
    `rows` -> places of the others, longest prompts first: neighbours are of one length, and too little memory shows."""
    def length(i: int) -> int:
        try:
            return len(processor.encode(rows[i], "observe").ids) if processor else 0
        except ValueError as error:
            rows[i] = Dropped(rows[i].id, "cannot be fed", str(error), rows[i].images, rows[i].meta)
            return 0

    places = [i for i, row in enumerate(rows) if isinstance(row, Record)]
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the GIL
        lengths = dict(zip(places, tqdm(pool.map(length, places), total=len(places), desc="checking", unit="problem")))
    return sorted((i for i in places if isinstance(rows[i], Record)), key=lambda i: -lengths[i])


def prepare(args: argparse.Namespace) -> tuple[dict[str, list[Record | Dropped]], dict[str, list[int]], list[Job]]:
    """Everything that can be refused before hours are lost -> rows of each benchmark, the order in which its records
    are answered, and the lines of the table. Settings go to settings.json, so that the same command goes on and
    another one is refused.
    """
    specs, prompts = ([name.strip() for name in text.split(",") if name.strip()]
                      for text in (args.benchmark, args.prompt))
    if not prompts or len(set(prompts)) < len(prompts) or not set(prompts) <= set(PROMPTS):
        raise ValueError(f"--prompt {args.prompt}: there are {', '.join(PROMPTS)}; give some, each style only once")
    for name, low in (("rows", 1), ("max_tokens", 1), ("samples", 1), ("limit", 1), ("temperature", 0)):
        if (value := getattr(args, name)) is not None and not low <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value} is out of range; give {low} or more")
    best_device()  # refuses more processes than GPUs
    if not args.responses and not args.model:
        raise ValueError("give the --model that is to answer, or --responses with answers that another engine wrote")
    if not specs or args.responses and len(specs) + len(prompts) > 2:
        raise ValueError("give a --benchmark; --responses are answers to one, in one --prompt style")
    processor = Processor(args.model, args.max_pixels) if args.model else None
    rows: dict[str, list[Record | Dropped]] = {}
    for spec in specs:
        label, made = read_benchmark(spec, args.limit)
        if label in rows:
            raise ValueError(f"--benchmark: two are both called {label}; rename a file, or give each only once")
        rows[label] = made
    jobs = [Job(label, prompt, *sampling) for label in rows for prompt in prompts for sampling in
            samplings(label, args)]
    data = {f"data {label}": data_digest([r for r in made if isinstance(r, Record)]) for label, made in rows.items()}
    settings = {"model": model_digest(args.model) if args.model else None, "trained": trained_by(args.model)} | data | {
        key: getattr(args, key) for key in ("responses", "benchmark", "prompt", "temperature", "samples", "max_tokens",
                                            "max_pixels", "rows", "seed", "limit", "skip_bad")}
    file = args.out / "settings.json"
    if file.exists():
        check_same(args.out, "an evaluation", json.loads(file.read_text())["settings"], settings)
    elif args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"{args.out} is not empty and holds no evaluation; give another --out")

    order = {}
    for label, made in rows.items():
        order[label] = longest_first(made, None if args.responses else processor)
        expected = ("null gold", "unverifiable") if label in BENCHMARKS else ()  # of a published row: not the user's
        faults = [row for row in made if isinstance(row, Dropped) and row.reason not in expected]
        settle(label, [row for row in made if row not in faults], [row.detail for row in faults], args.skip_bad)
        if not order[label]:
            raise ValueError(f"{label}: none of its {len(made)} problems can be used, such as {made[0].detail}")
    if args.responses:
        read_responses(args.responses, *rows, *rows.values())  # refused before anything is written
    (args.out / "rollouts").mkdir(parents=True, exist_ok=True)
    write_json(file, {"settings": settings})
    return rows, order, jobs


def trained_by(model: str | None) -> dict | None:
    """The settings of the run of train.py that a model is a checkpoint of; None: of none."""
    file = Path(model or "").resolve().parent / "config.json"
    config = json.loads(file.read_text()) if model and Path(model).is_dir() and file.exists() else {}
    return config | {"checkpoint": Path(model).name} if {"order", "seed", "sigma"} <= config.keys() else None


def read_responses(path: str, benchmark: str, rows: list[Record | Dropped]) -> dict[str, list[dict]]:
    """JSONL of {id, response: text or list of texts} (several lines of one id are its samples), or a VLMEvalKit .tsv
    with index and prediction -> {id of a row: [{"text", "tokens"}, ...]}.

    Ids are the published ones, with or without `benchmark-`. Raises ValueError that names lines that cannot be read,
    ids that the benchmark lacks and ids with other numbers of responses; ids without any are said, and count as wrong.
    """
    sources = {benchmark, *(row.source for row in rows if isinstance(row, Record))}
    known = {name: row.id for row in rows for name in (row.id, *(row.id.removeprefix(f"{s}-") for s in sources))}
    found: dict[str, list[dict]] = {}
    bad, jobs = [], set()
    csv.field_size_limit(2**31 - 1)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = ([{"id": row.get("index"), "response": row.get("prediction")}
                      for row in csv.DictReader(file, delimiter="\t")] if path.endswith(".tsv") else
                     [line for line in file if line.strip()])
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--responses {path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            line = json.loads(line) if isinstance(line, str) else line
            name, texts, tokens, cut = str(line["id"]), line["response"], line.get("tokens"), line.get("truncated")
            texts = texts if isinstance(texts, list) else [texts]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError("its response is no text and no list of texts")
            if not isinstance(tokens, (int, float, type(None))):
                raise ValueError(f"its tokens are {tokens!r}, where a number is needed")
            if not isinstance(cut, (bool, type(None))):
                raise ValueError(f"its truncated is {cut!r}, where true or false is needed")
            "".join(texts).encode()  # a lone surrogate, half of a cut emoji, would fail once all is scored
            if name not in known:
                raise ValueError(f"{benchmark} has no problem {name!r}; its ids are such as {rows[0].id!r}")
            if "sampling" in line:  # our own responses.jsonl, which may hold more than was asked for
                jobs.add(f"{line['benchmark']} {line['prompt']} {line['sampling']}")
            found.setdefault(known[name], []).extend(
                {"text": text, "tokens": tokens if len(texts) == 1 else None, "truncated": cut}
                for text in texts)
        except KeyError as error:
            bad.append(f"line {number}: it has no {error}; write id and response")
        except (AttributeError, RecursionError, TypeError, ValueError) as error:
            bad.append(f"line {number}: {error}")
    most = max(map(len, found.values()), default=0)
    bad += [f"{key}: {len(texts)} responses, others have {most}" for key, texts in found.items() if len(texts) != most]
    bad += [f"they are of {', '.join(sorted(jobs))}; leave the lines of one"] if len(jobs) > 1 else []
    if bad or not found:
        raise ValueError(f"--responses {path}: {len(bad)} lines or problems cannot be used:\n  "
                         + "\n  ".join(bad[:10] or ["it is empty"]))
    return found


def given(job: Job, rows: list[Record | Dropped], path: str, processor: Processor | None) -> list[Result]:
    """What another engine wrote, scored. A problem without responses has unreadable ones, as many as the others."""
    found = read_responses(path, job.benchmark, rows)
    if missing := [row.id for row in rows if row.id not in found]:
        tqdm.write(f"{len(missing)} of {len(rows)} problems have no response and count as wrong: "
                   f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}", file=sys.stderr)
    nothing = [{"text": "", "tokens": None, "truncated": None}] * len(next(iter(found.values())))
    return [Result(row, [] if isinstance(row, Dropped) else [
        judge(r["text"], row, job.prompt, processor, r["tokens"], r["truncated"]) for r in found.get(row.id, nothing)])
        for row in tqdm(rows, desc="scoring", unit="problem")]


def write_results(out: Path, done: list[tuple[Job, list[Result]]], settings: dict) -> list[dict]:
    """scores.json, responses.jsonl, responses.html, and a table for VLMEvalKit of each job's first samples -> the
    scores, a dict for each job."""
    def reference(image) -> str:
        if isinstance(image, Picture):
            place = (image.group, image.row, image.column, image.index)
            return f"{image.file}#" + "/".join(str(part) for part in place if part is not None)
        return image if isinstance(image, str) else "(inside the data)"

    scores = [{"benchmark": job.benchmark, "prompt": job.prompt, "sampling": job.sampling}
              | scores_of(job.benchmark, results) for job, results in tqdm(done, desc="counting", disable=None)]
    write_json(out / "scores.json", {"settings": settings, "scores": scores})
    (out / "vlmevalkit").mkdir(exist_ok=True)
    records, groups = {}, []
    with open(out / "responses.jsonl", "w") as file:
        for job, results in done:
            usable = [(r.record, r.samples) for r in results if r.samples]
            for record, samples in usable:
                about = {"benchmark": job.benchmark, "prompt": job.prompt, "sampling": job.sampling, "id": record.id,
                         "images": [reference(image) for image in record.images], "gold": record.answer}
                file.writelines(json.dumps(about | {
                    "sample": i, "response": s.text, "answer": s.answer, "right": s.correct, "format": s.format,
                    "observation": s.observation, "tokens": s.tokens, "truncated": s.truncated}) + "\n"
                    for i, s in enumerate(samples))
                key = f"{job.name} {record.id}"
                records[key] = record
                groups.append({"id": key, "responses": [asdict(s) | {"accuracy": s.correct} for s in samples]})
            with open(out / "vlmevalkit" / f"{job.name}.tsv", "w", newline="", encoding="utf-8") as table:
                letters = ascii_uppercase[:max(len(record.choices) for record, _ in usable)]
                writer = csv.writer(table, delimiter="\t", lineterminator="\n")
                writer.writerow(["index", "question", *letters, "answer", "prediction"])
                writer.writerows([record.id.removeprefix(f"{record.source or job.benchmark}-"), record.question,
                                  *record.choices, *[""] * (len(letters) - len(record.choices)), record.golds[0],
                                  samples[0].text]
                                 for record, samples in usable)
    write_page(groups, records, out / "responses.html", title=str(out))
    return scores


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score a checkpoint, or answers of another engine, on benchmarks. "
                                     "(`eval.py compare RUN RUN ...` sets runs side by side.)")
    parser.add_argument("--model", help="Hugging Face folder or hub id; with --responses: what counts their tokens")
    parser.add_argument("--benchmark", default="toy", help=f"comma-separated: toy, {', '.join(BENCHMARKS)}; name=PATH "
                        "or name=ID@SPLIT reads a local copy or another split; or any file that data.py reads")
    parser.add_argument("--responses", help="answers of another engine: JSONL of {id, response}, response a text or a "
                        "list; or a VLMEvalKit .tsv with index and prediction")
    parser.add_argument("--prompt", default="observe", help=f"prompt styles, comma-separated: {', '.join(PROMPTS)}")
    parser.add_argument("--temperature", type=float, help="0: greedy (the default; toy: greedy, and 1 with 4 samples)")
    parser.add_argument("--samples", type=int, help="k of avg@k, maj@k, pass@k; at temperature 1 unless told otherwise")
    parser.add_argument("--max-tokens", type=int, help="longest response (default: 1024; toy: 160)")
    parser.add_argument("--max-pixels", type=int, help="area above which pictures are shrunk (default: the model's)")
    parser.add_argument("--rows", type=int, default=256, help="responses sampled at a time; less saves memory")
    parser.add_argument("--limit", type=int, help="first so many problems of each benchmark only")
    parser.add_argument("--skip-bad", action="store_true", help="go on without problems that cannot be used; they "
                        "count as wrong")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--out", type=Path, help="folder of the results (default: out/eval/MODEL-BENCHMARKS-PROMPTS); "
                        "one that is unfinished goes on")
    args = parser.parse_args()
    if args.out is None:
        model = "-".join(Path(args.responses or args.model or "").absolute().parts[-2:])
        names = "+".join(Path(spec.partition("=")[0]).stem for spec in args.benchmark.split(","))
        args.out = Path("out/eval", f"{model}-{names}-{args.prompt.replace(',', '+')}")
    return args


def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        return compare(sys.argv[2:])
    args = parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # (gloo on GPUs too: ranks only wait for each other, maybe for days)
        dist.init_process_group("gloo", timeout=timedelta(days=365))
    rows, order, jobs = together(lambda: prepare(args))
    rank, world = place()
    load = cache(lambda: load_both(args.model, args.max_pixels))
    done = []
    for job in jobs:
        made = rows[job.benchmark]
        if args.responses:
            done += [(job, given(job, made, args.responses, Processor(args.model) if args.model else None))
                     ] if rank == 0 else []
            continue
        # Each chunk in the order of the file, whose pictures are read in groups of neighbours.
        places = [i for chunk in batches(order[job.benchmark], max(1, args.rows // job.samples)) for i in sorted(chunk)]
        answered = roll_out(args.out / "rollouts", job.name, [made[i] for i in places], load,
                            rows=args.rows, seed=args.seed, samples=job.samples, style=job.prompt,
                            temperature=job.temperature,
                            max_tokens=args.max_tokens or (160 if job.benchmark == "toy" else 1024))
        by_place = dict(zip(places, answered))
        done.append((job, [by_place.get(i) or Result(row, []) for i, row in enumerate(made)]))
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        settings = json.loads((args.out / "settings.json").read_text())["settings"]
        print(tables(write_results(args.out, done, settings)), f"-> {args.out}", sep="\n\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on where it was")
