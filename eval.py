"""What came of it: held-out problems answered, scored by the judge of training, counted and shown.

    evaluate       a model's responses to problems, judged
    roll_out       the same for any number of problems and processes, on disk as it comes (measuring uses it too)
    summarize      accuracy, format, observation accuracy, length: overall and by difficulty level
    scores_of      all that is told of a benchmark: its published sub-scores, avg@k, maj@k, pass@k, intervals
    before_after   the table that closes a run; tables: the one that closes an evaluation
    other_pictures is the picture used? the same problems with grey pictures, or with another problem's
    claim          whose folder a run is: train.py, curriculum.py and this file go on in their own, and in no other
    plot_curves    metrics.jsonl -> curves.png;  write_page: responses -> one HTML file, pictures inside

    torchrun eval.py --model CHECKPOINT --benchmark toy,mathvista,mathverse=PATH --prompt none,think,observe
    python eval.py --benchmark mathvista --responses answers.jsonl

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
import io
import itertools
import json
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import jinja2
import numpy as np
from PIL import Image
from tqdm import tqdm

from data import (BENCHMARKS, DATASETS, PROMPTS, QUIET, Dropped, Made, Picture, Processor, Record, Rows, batches,
                  file_rows, in_threads, json_list, number, open_image, parsed, raise_or_skip, read_any, read_cells,
                  run_program, stored, verifiable)
from rewards import (MAX_ANSWER, SECTIONS, THINGS, Response, named_option, normal_text, parse_items, quantity, score,
                     score_groups, section, sides, stated)
from rollout import (Group, encode_ahead, gather_shares, load_to_sample, on_rank_0, rank_and_world, sample_groups,
                     start_processes, stop_processes)

ASSETS = Path(__file__).resolve().parent / "assets"
TOY = ASSETS / "toy/test.parquet"
PICTURES = ("given", "none", "swapped")  # kinds, see other_pictures


@dataclass(frozen=True)
class Result:
    """One problem and its responses; none for a problem that cannot be used, which counts as wrong."""

    record: Made
    responses: list[Response]

    @property
    def accuracy(self) -> float:
        """Share of the responses that are right."""
        return mean(r.accuracy for r in self.responses) or 0.0

    @property
    def problem(self) -> str:
        return problem_of(self.record)


def problem_of(row: Made) -> str:
    """What is drawn together in an interval: MathVerse's versions of one problem, We-Math's steps of one."""
    return str(row.meta.get("problem_index", row.meta.get("ID", row.id)))


# --- answers of a model -----------------------------------------------------------------------------------------------

def judge(groups: list[Group], style: str, processor: Processor | None = None) -> list[list[Response]]:
    """Score sampled groups; with a processor the tokens of their sections are counted too."""
    texts = [[sample.text for sample in group.samples] for group in groups]
    scored = score_groups(texts, [group.record for group in groups], style)
    return [[replace(response, tokens=len(sample.ids), truncated=sample.truncated,
                     sections=count_sections(sample.text, processor))
             for response, sample in zip(responses, group.samples)] for responses, group in zip(scored, groups)]


def count_sections(text: str, processor: Processor | None) -> dict[str, int] | None:
    """Tokens inside the tags, <observe>, <think>, <answer>, of those that are there."""
    if processor is None:
        return None
    parts = {tag: section(text, tag) for tag in SECTIONS}
    return {tag: count_tokens(part, processor) for tag, part in parts.items() if part}


def count_tokens(text: str, processor: Processor) -> int:
    return len(processor.tokenizer(text, add_special_tokens=False).input_ids)


def evaluate(model, processor: Processor, records: list[Record], *, style: str, temperature: float, samples: int,
             max_tokens: int, max_rows: int = 256, seed: int = 0) -> Iterator[Result]:
    """Answer each problem `samples` times (temperature 0: greedy), scored by the judge of training, as results come.

    In memory at a time: max_rows responses, or those to one problem, and the pictures of twice as many problems."""
    chunks = list(batches(records, max(1, max_rows // samples)))
    for chunk, prompts in zip(chunks, encode_ahead(processor, chunks, style)):
        groups = sample_groups(model, processor, chunk, prompts, samples=samples, temperature=temperature,
                               max_tokens=max_tokens, seed=seed, max_rows=max_rows)
        for record, responses in zip(chunk, judge(groups, style, processor)):
            yield Result(record, responses)


def roll_out(folder: Path, name: str, records: list[Record], load: Callable[[], tuple],
             attempt: Callable[[Callable], Any] = lambda work: work(), **sampling) -> list[Result]:
    """Answer records on all ranks -> all results, in the same order, on every rank. A collective.

    What any earlier run answered, with whatever --rows and processes, is on disk and is not done again. load: gives
    model and processor, and is called only if there is anything to do. attempt: does the work, or gives None, on all
    ranks, when it is to stop; there are no results then. sampling: see answer_to_disk and evaluate."""
    rank, world = rank_and_world()
    todo = on_rank_0(lambda: {r.id for r in records} - _answers(folder, name).keys())  # the unit on disk is the record
    mine = [r for r in records if r.id in todo][rank::world]
    if todo and attempt(lambda: answer_to_disk(folder, name, mine, *load(), **sampling)) is None:
        return []
    gather_shares([True])  # all have written theirs
    done = _answers(folder, name)
    if missing := [r.id for r in records if r.id not in done]:
        raise ValueError(f"{folder}: {len(missing)} answers are not there; do all processes write to the same folder?")
    return [Result(r, [Response(**response) for response in done[r.id]]) for r in records]


def answer_to_disk(folder: Path, name: str, records: list[Record], model, processor: Processor, *,
                   keep_texts: bool = True, **sampling) -> bool:
    """Answer this rank's records -> folder/name-RANK.jsonl, a line each, forced to disk as it comes -> True.

    keep_texts: else only what was extracted from the responses (a longer answer is wrong whatever the gold, and stays
    so when cut to one character too many). sampling: see evaluate."""
    rank, world = rank_and_world()
    label = name if world == 1 else f"{name}, the first of {world} equal shares"
    with open(folder / f"{name}-{rank}.jsonl", "ab", buffering=0) as file:
        results = evaluate(model, processor, records, **sampling)
        for result in tqdm(results, total=len(records), desc=label, unit="problem", disable=rank > 0):
            responses = result.responses if keep_texts else [
                replace(r, text="", answer=r.answer and r.answer[:MAX_ANSWER + 1]) for r in result.responses]
            line = json.dumps({"id": result.record.id, "responses": [asdict(r) for r in responses]})
            file.write(f"\n{line}\n".encode())  # (if an earlier run was killed inside a line, it ends here)
            os.fsync(file.fileno())
    return True


def _answers(folder: Path, name: str) -> dict[str, list[dict]]:
    """Responses by record id, of all ranks. A line that cannot be read was cut by a kill: its record is not done."""
    done = {}
    for file in sorted(folder.glob(f"{glob.escape(name)}-[0-9]*.jsonl")):
        for line in file.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                answered = json.loads(line)
                done[answered["id"]] = answered["responses"]
    return done


# --- scores -----------------------------------------------------------------------------------------------------------

def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def summarize(results: list[Result]) -> dict:
    """Scores in [0, 1] and mean length in tokens, means over problems of means over samples (avg@k).

    `levels` holds the same for each difficulty level that the problems were measured at; `by_problem` each accuracy."""
    def scores(part: list[Result]) -> dict:
        def over(field: str) -> float | None:
            return mean(mean(getattr(r, field) for r in result.responses) for result in part)

        unread = mean(mean(r.answer is None for r in result.responses) for result in part)
        return {"problems": len(part), "accuracy": mean(r.accuracy for r in part), "format": over("format"),
                "observation": over("observation"), "length": over("tokens"), "truncated": over("truncated"),
                "unreadable": unread}

    levels = defaultdict(list)
    for result in results:
        if isinstance(result.record, Record) and result.record.difficulty is not None:
            levels[result.record.difficulty].append(result)
    own = sorted(results, key=lambda r: isinstance(r.record, Record))  # (a row may be dropped for another's id)
    return scores(results) | {"levels": {f"{level:.3f}": scores(levels[level]) for level in sorted(levels)},
                              "by_problem": {r.record.id: r.accuracy for r in own}}


def interval(groups: list[list[Result]], values: dict[str, float] | None = None) -> list[float] | None:
    """95% bootstrap interval of the mean over groups of each group's mean: problems are drawn anew, with all their
    versions and samples. None for a single problem. values: by record id, what the mean is of (None: accuracy)."""
    index = {problem: i for i, problem in enumerate(sorted({r.problem for group in groups for r in group}))}
    sums, counts = np.zeros((2, len(index), len(groups)))
    for column, group in enumerate(groups):
        for result in group:
            sums[index[result.problem], column] += result.accuracy if values is None else values[result.record.id]
            counts[index[result.problem], column] += 1
    if len(index) < 2:
        return None
    times = drawn(np.random.default_rng(0), len(index), 2000)
    with np.errstate(invalid="ignore"):  # 0 / 0: a draw without any problem of a group
        means = np.nanmean((times @ sums) / (times @ counts), axis=1)
    return np.percentile(means, [2.5, 97.5]).tolist()


def drawn(rng: np.random.Generator, count: int, draws: int) -> np.ndarray:
    """[draws, count] how often each of `count` things is drawn, in `count` draws with replacement."""
    return rng.multinomial(count, np.full(count, 1 / count), draws).astype(float)


def vote(answer: str, record: Record) -> str:
    """What equal answers share: the option's letter, the number and its unit, the items of a list, or the text."""
    answer = (stated(answer) or [answer])[-1][:MAX_ANSWER + 1]
    option = named_option(answer, record.choices) if record.answer_type == "choice" else None
    if option is not None:
        return ascii_uppercase[option]
    if record.answer_type in ("number", "list") or not any("=" in gold for gold in record.golds):
        answer = sides(answer)[-1]
    listed = parse_items(answer) if record.answer_type == "list" else None
    votes = []
    for item in listed[1] if listed else (answer,):
        if found := quantity(item, nouns=record.answer_type == "number"):
            value, size, unit = found
            number = value * size
            digits = f"{float(number):.6g}" if abs(number) < 1 else f"{number.limit_denominator(10**5)}"
            votes.append(digits + ("" if unit in ((), THINGS) else str(unit)))
        else:
            votes.append(normal_text(item))
    return ", ".join(votes)


def majority_right(result: Result) -> float:
    """1 or 0: is the answer that most samples give right? Tied answers share; what cannot be read has no vote. Right
    ones are equal, however they are written, where there is one gold."""
    record = result.record
    if isinstance(record, Dropped):
        return 0.0
    heard = [(r.answer, r.accuracy) for r in result.responses if r.answer is not None]
    votes = ["right" if right and len(record.golds) == 1 else f"= {vote(answer, record)}" for answer, right in heard]
    counts = Counter(votes)
    return mean(right for said, (_, right) in zip(votes, heard) if counts[said] == max(counts.values())) or 0.0


def pass_at(result: Result, k: int) -> float:
    """Chance that one of k of the n samples, c of them right, is right: 1 - C(n - c, k) / C(n, k), unbiased."""
    n, c = len(result.responses), sum(r.accuracy > 0 for r in result.responses)
    return 1 - math.comb(n - c, k) / math.comb(n, k) if n else 0.0


# === the fold: below, tables, pages, curves, whose folder a run is, and the command line ==============================

# --- the benchmarks' own sub-scores -----------------------------------------------------------------------------------

def scores_of(benchmark: str, results: list[Result]) -> dict:
    """All that is told of a benchmark's results in one prompt style and sampling; shares and scores in [0, 1]."""
    n = max(len(r.responses) for r in results)
    ks = [k for k in sorted({2**i for i in range(n.bit_length())} | {n}) if k]
    unusable = {r.record.id: r.record.detail for r in results if isinstance(r.record, Dropped)}
    published = DATASETS.get(benchmark)
    found = summarize(results) | {
        "interval": interval([results]), "samples": n, "majority": mean(majority_right(r) for r in results),
        "pass": {k: mean(pass_at(r, k) for r in results) for k in ks},
        "unusable": sum(isinstance(r.record, Dropped) for r in results), "why_unusable": unusable,
        "drawn_with": {r.record.id: r.problem for r in results if r.problem != r.record.id},
        "published": published and published.size}
    found["sections"] = section_lengths(results, found["length"])
    found |= part_scores(benchmark, results, published.mean_over if published else "")
    return found | ({"four_way": four_way(results)} if benchmark == "wemath" else {})


def part_scores(benchmark: str, results: list[Result], mean_over: str) -> dict:
    """Scores by part; and their mean over the parts of kind `mean_over`, where a benchmark reports that."""
    parts: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        for kind, name in parts_of(benchmark, result.record):
            parts.setdefault(kind, {}).setdefault(name, []).append(result)
    found: dict[str, dict] = {"parts": {}}
    for kind, named in parts.items():
        found["parts"][kind] = {name: {"problems": len(rows), "accuracy": mean(r.accuracy for r in rows),
                                       "interval": interval([rows])} for name, rows in sorted(named.items())}
    if over := parts.get(mean_over):
        found["mean_over_parts"] = {
            "kind": mean_over, "parts": len(over), "interval": interval(list(over.values())),
            "accuracy": mean(part["accuracy"] for part in found["parts"][mean_over].values())}
    return found


def section_lengths(results: list[Result], whole: float | None) -> dict[str, dict[str, float]]:
    """Mean tokens inside <observe>, <think> and <answer>, and their share of the whole; {} where not counted."""
    found = {}
    for tag in SECTIONS:
        length = mean(mean(r.sections.get(tag, 0) for r in result.responses if r.sections is not None)
                      for result in results)
        if length is not None and whole:
            found[tag] = {"length": length, "share": length / whole}
    return found


def parts_of(benchmark: str, row: Made) -> list[tuple[str, str]]:
    """Which parts of its benchmark a row counts in: (what kind of part, its name)."""
    if benchmark not in BENCHMARKS:
        level, source = getattr(row, "difficulty", None), getattr(row, "source", "")
        known = [("difficulty", "" if level is None else f"{level:.3f}"), ("source", source)]
        return [(kind, name) for kind, name in known if name]
    found = []
    for kind, key, names in DATASETS[benchmark].parts:
        values = row.meta.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            found.append((kind, str(names.get(value, value))))
    return found


def four_way(results: list[Result]) -> dict:
    """We-Math's metric over the rows of one ID: M, the problem of several steps, is right; all / any: its single steps.

    IG = all and not M; IK = not all and not M; strict CM = all and M, RM = not all and M; loose CM = any and M, RM =
    not any and M; score = CM + IG / 2 = (N - IG / 2 - RM - IK) / N, with N = 525 IDs. RM_rate, RM / (RM + CM), is what
    the authors print as RM. Means over the samples. IDs whose rows are not all there (--limit) are left out."""
    whole = whole_ids(results)
    if not whole:
        return {}
    samples = max(len(r.responses) for rows in whole for r in rows)
    right = []  # [IDs] of [rows, samples]
    for rows in whole:
        right.append(np.array([[r.accuracy > 0 for r in row.responses] or [False] * samples for row in rows]))
    m = np.array([steps[-1] for steps in right])  # [IDs, samples]
    every = np.array([steps[:-1].all(0) for steps in right])
    some = np.array([steps[:-1].any(0) for steps in right])
    last = [rows[-1] for rows in whole]
    found: dict = {"ids": len(whole)}
    for name, taken in (("strict", every), ("loose", some)):
        kinds = {"CM": m & taken, "IG": ~m & every, "IK": ~m & ~every, "RM": m & ~taken}
        scores = dict(zip((row.record.id for row in last), (kinds["CM"] + kinds["IG"] / 2).mean(1)))
        means = {kind: float(held.mean()) for kind, held in kinds.items()}
        cm, rm = means["CM"], means["RM"]
        found[name] = {"score": cm + means["IG"] / 2, **means, "RM_rate": rm and rm / (rm + cm),
                       "interval": interval([last], scores)}
    return found


def whole_ids(results: list[Result]) -> list[list[Result]]:
    """Of each We-Math ID whose rows are all there: its single steps in order, and M last."""
    by_id: dict[str, dict[str, Result]] = {}
    for result in results:
        meta = result.record.meta
        if {"ID", "key"} <= meta.keys():
            by_id.setdefault(meta["ID"], {})[meta["key"]] = result
    whole = []
    for rows in by_id.values():
        *steps, last = sorted(rows)  # ("multi" sorts after the numbers of the steps)
        if "multi" in last and len(steps) == int(last[0]):
            whole.append([rows[key] for key in (*steps, last)])
    return whole


# --- tables -----------------------------------------------------------------------------------------------------------

def before_after(before: dict, after: dict) -> str:
    """The table that closes a run. before, after: {"greedy": summary, "sampled": summary}, see summarize."""
    columns = {"accuracy, greedy %": ("greedy", "accuracy"), "accuracy, T=1 %": ("sampled", "accuracy"),
               "format %": ("sampled", "format"), "observation %": ("sampled", "observation"),
               "length, tokens": ("sampled", "length")}
    rows = []
    for level in ["all", *before["greedy"]["levels"]]:
        cells = []
        for kind, key in columns.values():
            ends = [end[kind] if level == "all" else end[kind]["levels"][level] for end in (before, after)]
            scale, digits = (1, 0) if key == "length" else (100, 1)
            told = [f"{scale * end[key]:.{digits}f}" for end in ends if end[key] is not None]
            cells.append(" -> ".join(told) if len(told) == 2 else "-")
        rows.append([level, str(ends[1]["problems"]), *cells])
    return markdown(["difficulty", "problems", *columns], rows)


def percent(value: float | None, interval: list[float] | None = None, sign: str = "") -> str:
    if value is None:
        return "-"
    text, *ends = (f"{100 * v:{sign}.1f}" for v in (value, *(interval or ())))
    return f"{text} [{', '.join(ends)}]" if ends else text


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table that Markdown and a person at a terminal can read."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def tables(scores: list[dict]) -> str:
    """What eval.py prints: a row for each benchmark, prompt style and sampling; then each benchmark's sub-scores."""
    rows = [row_of(s) for s in scores]
    unused = set() if any(s["samples"] > 1 for s in scores) else {"majority %", "pass@k %"}
    if all(s["pictures"] == "given" for s in scores):
        unused |= {"pictures", "against given, paired"}
    header = [column for column in rows[0] if column not in unused]
    texts = [markdown(header, [[row[column] for column in header] for row in rows])]
    for benchmark in dict.fromkeys(s["benchmark"] for s in scores):
        texts.append(parts_table(benchmark, [s for s in scores if s["benchmark"] == benchmark]))
    return "\n".join(text for text in texts if text)


def row_of(s: dict) -> dict[str, str]:
    """Cells by their columns."""
    k = s["samples"]
    passes = [f"@{n}: {percent(value)}" for n, value in s["pass"].items() if int(n) > 1]
    sections = [f"{part['length']:.0f} ({part['share']:.0%})" for part in s["sections"].values()]
    return {
        "benchmark": s["benchmark"], "prompt": s["prompt"],
        "sampling": f"{s['sampling']}, avg@{k}" if k > 1 else s["sampling"], "pictures": s["pictures"],
        "problems": str(s["problems"]), "accuracy %, 95% interval": percent(s["accuracy"], s["interval"]),
        "against given, paired": percent(s.get("against_given"), s.get("against_interval"), "+"),
        "majority %": percent(s["majority"]) if k > 1 else "-", "pass@k %": "  ".join(passes) or "-",
        "format %": percent(s["format"]), "unreadable %": percent(s["unreadable"]),
        "observation %": percent(s["observation"]), "tokens": "-" if s["length"] is None else f"{s['length']:.0f}",
        f"of these {' / '.join(f'<{tag}>' for tag in SECTIONS)}": " / ".join(sections) or "-",
        "cut off %": percent(s["truncated"])}


def parts_table(benchmark: str, runs: list[dict]) -> str:
    """A benchmark's sub-scores, a column for each of its rows in the table above, and what is to be said of it."""
    first, lines, notes = runs[0], [], []

    def add(name: str, problems, cells: list[dict], key: str = "accuracy") -> None:
        lines.append([name, str(problems), *(percent(cell[key], cell.get("interval")) for cell in cells)])

    for kind, named in first["parts"].items():
        for name, part in named.items():
            cells = [s["parts"].get(kind, {}).get(name, {"accuracy": None}) for s in runs]
            add(f"{kind}: {name}", part["problems"], cells)
    if over := first.get("mean_over_parts"):
        add(f"mean over {over['parts']} {over['kind']} scores", first["problems"], [s["mean_over_parts"] for s in runs])
    if (four := first.get("four_way")) and all(s["four_way"] for s in runs):
        for name, key in itertools.product(("strict", "loose"), ("score", "CM", "IG", "IK", "RM", "RM_rate")):
            ways = [s["four_way"][name] for s in runs]  # (the interval is that of the score)
            add(f"{name} {key.replace('_', ' ')}", f"{four['ids']} IDs",
                ways if key == "score" else [way | {"interval": None} for way in ways], key)
    if first["unusable"]:
        notes.append(f"{benchmark}: {first['unusable']} of {first['problems']} problems cannot be used (most often no "
                     "rule can read the gold); they count as wrong. scores.json names them.")
    if first["published"] not in (None, first["problems"]):
        notes.append(f"{benchmark}: these are {first['problems']} of {first['published']} published problems.")
    heads = [", ".join([s["prompt"], s["sampling"], *([s["pictures"]] if s["pictures"] != "given" else [])])
             for s in runs]
    table = markdown([benchmark, "problems", *heads], lines)
    return "\n".join((["", table] if lines else []) + notes)


def unread_note(job: Job, results: list[Result]) -> str:
    """What to say, and to try, where more than half of the responses give no answer that can be read; else empty."""
    responses = [response for result in results for response in result.responses]
    unread = [response for response in responses if response.answer is None]
    if 2 * len(unread) <= len(responses):
        return ""
    cut = sum(response.truncated is True for response in unread)
    ends = [" ".join(response.text.split())[-60:] for response in unread if response.text.strip()]
    if 2 * len(ends) < len(unread):
        advice = "Most are empty: look at what wrote them."
    elif 2 * cut > len(unread):
        advice = "Most were cut off: try a larger --max-tokens."
    else:
        advice = ("Try another --prompt (the question may ask for another form of answer), and look whether the model "
                  "is an instruct one that is asked in its own chat template.")
    return (f"\n{job.benchmark}, {job.prompt}, {job.sampling}{job.other}: {len(unread)} of {len(responses)} responses "
            "give no answer that can be read. They end: "
            f"{', '.join(f'...{end!r}' for end in ends[:3]) or 'nowhere'}. {advice}")


# --- pages and curves -------------------------------------------------------------------------------------------------

def write_page(path: Path, title: str, intro: str, sections: list[dict], links: Iterable[str] = ()) -> None:
    """One HTML file without outside parts; sections: see section_of. links: to the other pages of a set; without them
    the blocks can be shown and hidden by kind. All text is escaped: what a model writes cannot become markup."""
    path.write_text(render("page.html", title=title, intro=intro, sections=sections, links=list(links)), "utf-8")


def render(template: str, **values) -> str:
    """A template of assets/, filled in; in HTML values are escaped."""
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(ASSETS), autoescape=jinja2.select_autoescape(),
                                   trim_blocks=True, keep_trailing_newline=True)
    return templates.get_template(template).render(**values)


def section_of(record: Record, where: str, blocks: list[tuple[str, str, str]], gold: str = "") -> dict:
    """A problem on a page, and beside it blocks of (right | wrong | unreadable | "", text, small print)."""
    return {"pictures": [picture_url(image, record.id) for image in record.images], "question": record.text,
            "where": where, "gold": gold, "blocks": blocks}


def picture_url(image, record_id: str) -> str:
    """A picture as a data: URL, at most 512 px a side; what is wrong with it, where it cannot be opened."""
    try:
        picture = open_image(image, record_id)
    except ValueError as error:  # answers of another engine are scored without the pictures
        return str(error)
    picture.thumbnail((512, 512))
    buffer = io.BytesIO()
    kind = "png" if picture.width * picture.height < 256 * 256 else "jpeg"  # a page of photographs as PNG is 80 MB
    picture.save(buffer, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def response_lines(record: Record, responses: list[Response], **about) -> list[dict]:
    """Lines of responses.jsonl, one a response: the one form in which training and evaluation write them, and in which
    `--responses` reads them. about: what else is told of each (step and stage; benchmark, prompt and sampling)."""
    return [about | {"id": record.id, "sample": i, "response": r.text, "answer": r.answer, "accuracy": r.accuracy,
                     "format": r.format, "observation": r.observation, "tokens": r.tokens, "truncated": r.truncated}
            for i, r in enumerate(responses)]


def write_responses(groups: list[tuple[Record, list[dict]]], path: Path, limit: int = 300) -> None:
    """Groups of lines of responses.jsonl -> a page of at most `limit` of them, spread over all."""
    count, sections = min(limit, len(groups)), []
    for i in range(count):
        record, lines = groups[i * len(groups) // count]
        first, blocks = lines[0], []
        for r in lines:
            kind = "right" if r["accuracy"] else "unreadable" if r["answer"] is None else "wrong"
            notes = [] if r["answer"] is None else [f"answer: {r['answer'][:200]}"]
            if "reward" in r:
                notes = [f"reward {r['reward']:.2f} = accuracy {r['accuracy']:.0f}, format {r['format']:.0f}, bonus "
                         f"{r['bonus']:.1f}; advantage {r['advantage']:+.2f}"]
            notes += [] if r["tokens"] is None else [f"{r['tokens']} tokens"]
            blocks.append((kind, r["response"], "; ".join(notes)))
        about = [f"{key} {first[key]}" for key in ("step", "stage", "benchmark", "prompt", "sampling", "pictures")
                 if first.get(key) is not None]
        about += [f"weight {first['weight']:.2f}"] if "weight" in first else []
        sections.append(section_of(record, ", ".join([*about, f"problem {record.id}"]), blocks,
                                   " or ".join(record.golds)))
    intro = f"{count} of {len(groups)} groups of responses, spread evenly, in order."
    write_page(path, str(path.parent), intro, sections)


def plot_curves(metrics: list[dict], path: Path) -> None:
    """Lines of metrics.jsonl -> a PNG: what training saw, and held-out scores at each stage's end."""
    from matplotlib.figure import Figure  # (not pyplot: no window, no state)

    steps = [m for m in metrics if "reward" in m]
    panels = [("accuracy", "accuracy"), ("format", "format"), ("observation", "observation accuracy"),
              ("length", "response length, tokens"), ("reward", "reward"), ("signal", "share of groups with signal"),
              ("entropy", "entropy, nats a token"), ("grad_norm", "gradient norm")]
    figure = Figure(figsize=(16, 6.5), layout="constrained")
    axes = figure.subplots(2, 4).ravel()
    for axis, (key, title) in zip(axes, panels):
        if points := [(m["step"], m[key]) for m in steps if key in m]:
            x, y = zip(*points)
            axis.plot(x, y, color="0.8", linewidth=0.8)
            window = max(1, len(y) // 20)
            smooth = [mean(y[max(0, i - window):i + window + 1]) for i in range(len(y))]
            axis.plot(x, smooth, color="C0", label="training, mean of neighbours")
        for kind, style, name in (("greedy", "o-C1", "greedy"), ("sampled", "o:C2", "temperature 1")):
            if scores := [(m["step"], m["eval"][kind][key]) for m in metrics
                          if m.get("eval", {}).get(kind, {}).get(key) is not None]:
                axis.plot(*zip(*scores), style, markersize=4, label=f"held out, {name}")
        for before, after in itertools.pairwise(steps):
            if before["stage"] != after["stage"]:
                axis.axvline(before["step"] + 0.5, color="0.9", linewidth=0.8, zorder=0)
        axis.set(title=title, xlabel="rollout (a line at each stage's end)")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


# --- whose folder a run is --------------------------------------------------------------------------------------------

# What an unfinished evaluation or measuring may go on with otherwise: the unit on disk is the record.
FREE = ("rows",)


def begun(folder: Path, settings: dict, free: Iterable[str] = ()) -> bool:
    """Does the folder hold this very run, to be gone on with? The first of two steps that writes nothing; see claim.

    settings: all that the run's results depend on, and `free` ones that may differ. Raises ValueError, naming what
    changed, when the folder holds another run, or files of another kind."""
    file = folder / "settings.json"
    if not file.exists():
        if folder.exists() and any(path.name != "lock" and path.name[0] != "." for path in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no run of {settings['program']}; give another --out")
        return False
    kept = read_json(file)
    unknown = [key for key in settings.keys() - kept.keys() - set(free) if not key.startswith("data ")]
    if "program" not in kept or kept["program"] == settings["program"] and unknown:
        raise ValueError(f"{folder} holds a run of an older version of this code; take that, or give another --out")
    if changed := [f"  {key}: {kept.get(key)} there, {settings.get(key)} now" for key in kept | settings
                   if key not in free and kept.get(key) != settings.get(key)]:
        raise ValueError("\n".join([f"{folder} holds a run of other data or settings:", *changed,
                                    "give what it began with, or another --out"]))
    return True


def claim(folder: Path, settings: dict) -> None:
    """Make the folder this run's, once all is checked: bad input leaves none in the way of the mended command."""
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    write_json(folder / "settings.json", settings)


def lock(folder: Path) -> None:
    """Let no other process work in the folder as long as this one lives. Raises ValueError when another one does."""
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)  # (never closed: the lock would end with it)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{folder}: another process is at work there; end it, or wait for it") from None


def read_json(path: Path):
    """Raises ValueError naming the file when it holds no JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read: {error}; bring it back from a copy, or give another --out"
                         ) from error


def write_json(path: Path, value) -> None:
    """Whole or not at all, whatever is killed when."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=1))
    sync(part)
    os.replace(part, path)


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def model_digest(path: str) -> str:
    """A model's name and, of a folder, a digest of its weights and settings, which outlives a move of the folder."""
    if not Path(path).is_dir():
        return path
    digest = hashlib.sha256()
    for file in tqdm(sorted(Path(path).iterdir()), "hashing the model", unit=" files", delay=3, disable=QUIET):
        if file.suffix in (".safetensors", ".bin", ".json", ".jinja", ".txt"):
            with open(file, "rb") as data:
                digest.update(file.name.encode() + hashlib.file_digest(data, "sha256").digest())
    return f"{Path(path).resolve().name} ({digest.hexdigest()[:12]})"


def data_digest(records: list[Record]) -> str:
    """Changes with any change of the texts and of the pictures' bytes, which are not decoded."""
    digest = hashlib.sha256()
    for r in tqdm(records, "hashing the pictures", unit="problem", delay=3, disable=QUIET):
        digest.update(repr((r.id, r.question, r.answer, r.choices, r.answer_type, r.precision, len(r.images))).encode())
        for image in r.images:
            with contextlib.suppress(OSError, ValueError):  # (check_records will name it)
                digest.update(hashlib.sha256(stored(image)).digest())
    return f"{len(records)} problems ({digest.hexdigest()[:12]})"


# --- from the command line --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Job:
    """One line of the table."""

    benchmark: str
    prompt: str
    sampling: str  # greedy, T=1, ..., or given: by another engine
    temperature: float
    samples: int
    pictures: str = "given"

    @property
    def name(self) -> str:
        return f"{self.benchmark}-{self.prompt}-{self.sampling}" + self.other

    @property
    def other(self) -> str:
        """What tells that the pictures are not those given."""
        return "" if self.pictures == "given" else f"-{self.pictures}"


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


def read_benchmark(spec: str, limit: int | None) -> tuple[str, list[Made]]:
    """`toy`, a benchmark, benchmark=PATH, or any file -> its name and its rows, in the published order."""
    name, _, path = spec.partition("=")
    if name in BENCHMARKS:
        made = DATASETS[name].read(name, path or None)
    elif spec == "toy":
        made = read_any(str(TOY))
    elif Path(spec).exists() or "@" in spec:
        name, made = label_of(spec), read_any(spec)
    else:
        raise ValueError(f"--benchmark {spec}: no benchmark of that name (there are toy, {', '.join(BENCHMARKS)}; "
                         "name=PATH reads a local copy), no file or folder here, and no hub id with its split "
                         "(org/name@test)")
    first = itertools.islice(tqdm(made, desc=f"reading {name}", unit=" records"), limit)
    rows = in_threads(verifiable, list(first), "checking golds", delay=3)
    if not rows:
        raise ValueError(f"--benchmark {spec}: holds no records")
    return name, rows


def label_of(spec: str) -> str:
    """What a table calls a file: its stem, its folder for curriculum.py's measured.parquet, and both for one that is
    called as a benchmark is, for it is not scored as that."""
    stem, folder = Path(spec).stem, Path(spec).resolve().parent.name
    return folder if stem == "measured" else f"{folder}-{stem}" if stem in ("toy", *BENCHMARKS) else stem


def other_pictures(rows: list[Made], kind: str) -> list[Made]:
    """Is the picture used? The rows with pictures, and in their place grey ones of the same size (kind `none`) or those
    of the next other problem, of the same shape if there is one, as many in any case (`swapped`; who finds none is left
    out). Raises ValueError when no row is left."""
    pictured = [row for row in rows if isinstance(row, Record) and row.images]
    shapes, looks = [], []
    alike: dict[Any, list[int]] = defaultdict(list)  # places of the rows with these shapes, and with so many pictures
    for i, row in enumerate(pictured):
        opened = [open_image(image, row.id) for image in row.images]
        shapes.append(tuple(image.size for image in opened))
        looks.append([hashlib.sha256(image.tobytes()).digest() for image in opened])
        alike[shapes[i]].append(i)
        alike[len(opened)].append(i)

    def next_other(i: int, places: list[int]) -> int | None:
        at = places.index(i)
        return next((j for j in places[at + 1:] + places[:at]
                     if looks[j] != looks[i] and problem_of(pictured[j]) != problem_of(pictured[i])), None)

    found: list[Made] = []
    for i, row in enumerate(pictured):
        if kind == "none":
            greys = [Image.new("RGB", size, (128, 128, 128)) for size in shapes[i]]
            found.append(replace(row, images=tuple(map(stored, greys))))
            continue
        near = next_other(i, alike[shapes[i]])
        near = next_other(i, alike[len(row.images)]) if near is None else near
        if near is not None:
            found.append(replace(row, images=pictured[near].images))
    if not found:
        raise ValueError(f"--pictures {kind}: of {len(rows)} problems none has pictures, or another's to take; give "
                         "more problems, or leave it")
    return found


def longest_first(rows: list[Made], processor: Processor | None) -> list[int]:
    """Encode every record once, which finds broken pictures before hours are lost: what cannot be fed is dropped in
    `rows` -> places of the others, longest prompts first: neighbours are of one length, and too little memory shows."""
    def length(i: int) -> int:
        row = rows[i]
        try:
            return len(processor.encode(row, "observe").ids) if processor and isinstance(row, Record) else 0
        except ValueError as error:
            rows[i] = Dropped(row.id, "cannot be fed", str(error), row.images, row.meta)
            return 0

    lengths = in_threads(length, range(len(rows)), "checking")
    return sorted((i for i, row in enumerate(rows) if isinstance(row, Record)), key=lambda i: -lengths[i])


def prepare(args: argparse.Namespace) -> tuple[dict[str, list[Made]], dict[str, list[int]], list[Job]]:
    """Everything that can be refused before hours are lost -> rows of each benchmark, the order in which its records
    are answered, and the lines of the table."""
    specs, prompts, kinds = check_args(args)
    processor = Processor(args.model, args.max_pixels) if args.model else None
    rows: dict[str, list[Made]] = {}
    for spec in specs:
        label, made = read_benchmark(spec, args.limit)
        if label in rows:
            raise ValueError(f"--benchmark: two are both called {label}; rename a file, or give each only once")
        rows[label] = made
    jobs = [Job(label, prompt, *sampling, kind) for label in rows for prompt in prompts
            for sampling in samplings(label, args) for kind in kinds]
    settings = settings_of(args, rows)
    begun(args.out, settings, FREE)

    order = {}
    for label, made in list(rows.items()):
        order[label] = longest_first(made, None if args.responses else processor)
        expected = ("null gold", "unverifiable") if label in BENCHMARKS else ()  # of a published row: not the user's
        faults = [row for row in made if isinstance(row, Dropped) and row.reason not in expected]
        raise_or_skip(label, [row for row in made if row not in faults], [row.detail for row in faults], args.skip_bad)
        if not order[label]:
            why = next((row.detail for row in made if isinstance(row, Dropped)), "")
            raise ValueError(f"{label}: none of its {len(made)} problems can be used, such as {why}")
        for kind in kinds:
            if kind != "given":
                name = f"{label}-{kind}"
                if name in rows:
                    raise ValueError(f"--benchmark {name}: {label} with --pictures {kind} is called so; rename a file")
                rows[name] = other_pictures(made, kind)
                places = {row.id: i for i, row in enumerate(rows[name])}  # (encoded once, as they were given)
                order[name] = [places[made[i].id] for i in order[label] if made[i].id in places]
    if args.responses:
        [(label, made)] = rows.items()
        read_responses(args.responses, label, made)  # refused before anything is written
    claim(args.out, settings)
    (args.out / "rollouts").mkdir(exist_ok=True)
    return rows, order, jobs


def settings_of(args: argparse.Namespace, rows: dict[str, list[Made]]) -> dict:
    """All that scores depend on."""
    settings = {"program": "eval.py", "model": model_digest(args.model) if args.model else None,
                "trained": trained_by(args.model)}
    for label, made in rows.items():
        settings[f"data {label}"] = data_digest([r for r in made if isinstance(r, Record)])
    return settings | {key: value for key, value in vars(args).items() if key not in ("model", "out")}


def check_args(args: argparse.Namespace) -> tuple[list[str], list[str], list[str]]:
    """The benchmarks, prompt styles and kinds of pictures asked for. Raises ValueError, naming the option, for what
    cannot be meant."""
    specs, prompts, kinds = ([name.strip() for name in text.split(",") if name.strip()]
                             for text in (args.benchmark, args.prompt, args.pictures))
    for option, text, given, known in (("prompt", args.prompt, prompts, PROMPTS),
                                       ("pictures", args.pictures, kinds, PICTURES)):
        if not given or len(set(given)) < len(given) or not set(given) <= set(known):
            raise ValueError(f"--{option} {text}: there are {', '.join(known)}; give some, each only once")
    if args.responses and kinds != ["given"]:
        raise ValueError("--pictures: --responses are answers already, to the pictures that were given")
    if not args.responses and not args.model:
        raise ValueError("give the --model that is to answer, or --responses with answers that another engine wrote")
    if not specs or args.responses and len(specs) + len(prompts) > 2:
        raise ValueError("give a --benchmark; --responses are answers to one, in one --prompt style")
    return specs, prompts, kinds


def trained_by(model: str | None) -> dict | None:
    """The settings of the run of train.py that a model is a checkpoint of; None: of none."""
    if not model or not Path(model).is_dir():
        return None
    file = Path(model).resolve().parent / "settings.json"
    settings = read_json(file) if file.exists() else {}
    return settings | {"checkpoint": Path(model).name} if settings.get("program") == "train.py" else None


def read_responses(path: str, benchmark: str, rows: list[Made]) -> dict[str, list[dict]]:
    """Answers of another engine, see response_rows (several lines of one id are its samples) -> {id of a row: [{"text",
    "tokens", "truncated"}, ...]}.

    Ids are the published ones, with or without `benchmark-`. Raises ValueError that names lines that cannot be read,
    ids that the benchmark lacks and ids with other numbers of responses; ids without any count as wrong."""
    sources = {benchmark, *(row.source for row in rows if isinstance(row, Record))}
    known = {name: row.id for row in rows for name in (row.id, *(row.id.removeprefix(f"{s}-") for s in sources))}
    found: dict[str, list[dict]] = defaultdict(list)
    bad, jobs = [], set()
    for place, line in response_rows(Path(path)):
        try:
            line = parsed(line)
            names = [str(line[key]) for key in ANSWER_IDS if key in line]
            responses = read_response(line)
            if line.get("pictures", "given") != "given":
                raise ValueError(f"its pictures were {line['pictures']}, not {benchmark}'s; leave such lines out")
            meant = {known[name] for name in names if name in known}
            if len(meant) > 1:
                raise ValueError(f"it is of two problems, {' and '.join(map(repr, names))}; leave one of its ids")
            if not meant:
                raise ValueError(f"{benchmark} has no problem {' or '.join(map(repr, names)) or 'without an id'}; its "
                                 f"ids are such as {rows[0].id!r}")
            if "sampling" in line:  # our own responses.jsonl, which may hold more than was asked for
                told = [str(line[key]) for key in ("benchmark", "prompt", "sampling", "pictures") if key in line]
                jobs.add(" ".join(told))
            found[meant.pop()].extend(responses)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            bad.append(f"line {place}: {error}")
    most = max(map(len, found.values()), default=0)
    bad += [f"{key}: {len(texts)} responses, others have {most}" for key, texts in found.items() if len(texts) != most]
    bad += [f"they are of {', '.join(sorted(jobs))}; leave the lines of one"] if len(jobs) > 1 else []
    if bad or not found:
        raise ValueError(f"--responses {path}: {len(bad)} lines or problems cannot be used:\n  "
                         + "\n  ".join(bad[:10] or ["it is empty"]))
    return found


# Where an engine's answers have the problem and the response: ours, VLMEvalKit's, MathVista's, MathVerse's, LLaVA's.
ANSWER_IDS = ("index", "id", "pid", "sample_index", "question_id")
ANSWER_TEXTS = ("response", "prediction", "model_answer", "text")


def response_rows(file: Path) -> Rows:
    """Numbered answers of JSON lines, a JSON list, a JSON object by id (of texts, lists of texts, or rows), a table."""
    if not file.is_file():
        raise ValueError(f"--responses {file}: no such file")
    try:
        found = None
        if file.suffix == ".json":
            with contextlib.suppress(json.JSONDecodeError):  # (lines: see json_rows)
                found = json.loads(file.read_bytes())
        if isinstance(found, dict) and not any(isinstance(value, dict) for value in found.values()):
            yield from enumerate(({"id": key, "response": value} for key, value in found.items()), 1)
        elif found is not None:
            yield from enumerate(json_list(found, file.stem), 1)
        elif file.suffix in (".csv", ".tsv"):
            rows = read_cells(file, ("index", "prediction"))
            yield from ((line, {"prediction": ""} | row if isinstance(row, dict) else row) for line, row in rows)
        else:
            yield from file_rows(file)
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"--responses {file}: cannot be read: {error}") from error


def read_response(line: dict) -> list[dict]:
    """The responses that one line gives. Raises KeyError, TypeError or ValueError for what is none."""
    found = [key for key in ANSWER_TEXTS if key in line]
    if not found:
        raise ValueError(f"it has no response; write it under one of {', '.join(ANSWER_TEXTS)}")
    texts, tokens, cut = line[found[0]], line.get("tokens"), line.get("truncated")
    texts = texts if isinstance(texts, list) else [texts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("its response is no text and no list of texts")
    if not isinstance(tokens, (int, float, type(None))):
        raise ValueError(f"its tokens are {tokens!r}, where a number is needed")
    if not isinstance(cut, (bool, type(None))):
        raise ValueError(f"its truncated is {cut!r}, where true or false is needed")
    "".join(texts).encode()  # a lone surrogate, half of a cut emoji, would fail once all is scored
    return [{"text": text, "tokens": tokens if len(texts) == 1 else None, "truncated": cut} for text in texts]


def given(job: Job, rows: list[Made], path: str, processor: Processor | None) -> list[Result]:
    """What another engine wrote, scored. A problem without responses has unreadable ones, as many as the others."""
    found = read_responses(path, job.benchmark, rows)
    if missing := [row.id for row in rows if row.id not in found]:
        tqdm.write(f"{len(missing)} of {len(rows)} problems have no response and count as wrong: "
                   f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}", file=sys.stderr)
    nothing = [{"text": "", "tokens": None, "truncated": None}] * len(next(iter(found.values())))

    def scored(row: Made) -> Result:
        if isinstance(row, Dropped):
            return Result(row, [])
        responses = []
        for said in found.get(row.id, nothing):
            text, tokens = said["text"], said["tokens"]
            if tokens is None and processor is not None:
                tokens = count_tokens(text, processor)
            responses.append(replace(score(text, row, job.prompt), tokens=tokens, truncated=said["truncated"],
                                     sections=count_sections(text, processor)))
        return Result(row, responses)

    return in_threads(scored, rows, "scoring")


def write_results(out: Path, done: list[tuple[Job, list[Result]]], settings: dict) -> list[dict]:
    """scores.json, responses.jsonl, responses.html, a table for VLMEvalKit of each job's first samples -> scores."""
    (out / "vlmevalkit").mkdir(exist_ok=True)
    scores, groups = [], []
    given = {job.name: {r.record.id: r.accuracy for r in results} for job, results in done}
    for job, results in tqdm(done, desc="counting", disable=None):
        about = {"benchmark": job.benchmark, "prompt": job.prompt, "sampling": job.sampling, "pictures": job.pictures}
        scores.append(about | scores_of(job.benchmark, results))
        if job.other and (base := given.get(job.name.removesuffix(job.other))):
            change = {r.record.id: r.accuracy - base[r.record.id] for r in results}  # (of those that have pictures)
            scores[-1] |= {"against_given": mean(change.values()), "against_interval": interval([results], change)}
        usable = [(r.record, r.responses) for r in results if isinstance(r.record, Record) and r.responses]
        for record, responses in usable:
            images = [str(image) if isinstance(image, (str, Picture)) else "(inside the data)"
                      for image in record.images]
            groups.append((record, response_lines(record, responses, **about, images=images, gold=record.answer)))
        write_vlmevalkit(out / "vlmevalkit" / f"{job.name}.tsv", job.benchmark, usable)
    write_json(out / "scores.json", {"settings": settings, "scores": scores})
    with open(out / "responses.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for _, lines in groups for line in lines)
    write_responses(groups, out / "responses.html")
    return scores


def write_vlmevalkit(path: Path, benchmark: str, usable: list[tuple[Record, list[Response]]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        letters = ascii_uppercase[:max(len(record.choices) for record, _ in usable)]
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["index", "question", *letters, "answer", "prediction"])
        for record, responses in usable:
            padding = [""] * (len(letters) - len(record.choices))
            table.writerow([record.id.removeprefix(f"{record.source or benchmark}-"), record.question, *record.choices,
                            *padding, record.golds[0], responses[0].text])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score a checkpoint, or answers of another engine, on benchmarks.")
    option, positive = parser.add_argument, number(int, 1)
    option("--model", help="Hugging Face folder or hub id; with --responses: what counts their tokens")
    option("--benchmark", default="toy", help=f"comma-separated: toy, {', '.join(BENCHMARKS)}; name=PATH "
           "or name=ID@SPLIT reads a local copy or another split; or any file that data.py reads")
    option("--responses", help="answers of another engine: JSON lines, or a list, of {id, response}, "
           "response a text or a list; a JSON object by id; or a .tsv of VLMEvalKit's")
    option("--prompt", default="observe", help=f"prompt styles, comma-separated: {', '.join(PROMPTS)}")
    option("--pictures", default="given", help="is the picture used? given, none (grey ones of the same size), swapped "
           "(another problem's), comma-separated: answers side by side, differences paired by problem")
    option("--temperature", type=number(float, 0), help="0: greedy (default; toy: greedy, and 1 with 4 samples)")
    option("--samples", type=positive, help="k of avg@k, maj@k, pass@k; at temperature 1 if not told")
    option("--max-tokens", type=positive, help="longest response (default: 1024; toy: 160)")
    option("--max-pixels", type=positive, help="area above which pictures are shrunk (default: model's)")
    option("--rows", type=positive, default=256, help="responses sampled at a time; less saves memory")
    option("--limit", type=positive, help="first so many problems of each benchmark only")
    option("--skip-bad", action="store_true", help="go on without problems that cannot be used; they count as wrong")
    option("--seed", type=number(int, 0), default=0, help="of sampling")
    option("--out", type=Path, help="folder of the results (default: out/eval/MODEL-BENCHMARKS-PROMPTS); "
           "one that is unfinished goes on")
    args = parser.parse_args()
    if args.out is None:
        model = "-".join(Path(args.responses or args.model or "").absolute().parts[-2:])
        names = "+".join(Path(spec.partition("=")[0]).stem for spec in args.benchmark.split(","))
        args.out = Path("out/eval", f"{model}-{names}-{args.prompt.replace(',', '+')}")
    return args


def main() -> None:
    args = parse_args()
    start_processes()
    rows, order, jobs = on_rank_0(lambda: prepare(args))
    load = cache(lambda: load_to_sample(args.model, args.max_pixels))
    done: list[tuple[Job, list[Result]]] = []
    for job in jobs:
        shown = job.benchmark + job.other
        made: list[Any] = rows[shown]
        if args.responses:
            if rank_and_world()[0] == 0:
                processor = Processor(args.model) if args.model else None
                done.append((job, given(job, made, args.responses, processor)))
            continue
        answered = roll_out(args.out / "rollouts", job.name, [made[i] for i in order[shown]], load,
                            max_rows=args.rows, samples=job.samples, style=job.prompt, temperature=job.temperature,
                            max_tokens=args.max_tokens or (160 if job.benchmark == "toy" else 1024), seed=args.seed)
        by_place = dict(zip(order[shown], answered))
        done.append((job, [by_place.get(i) or Result(row, []) for i, row in enumerate(made)]))
    if rank_and_world()[0] == 0:
        scores = write_results(args.out, done, read_json(args.out / "settings.json"))
        notes = [note for job, results in done if (note := unread_note(job, results))]
        print(tables(scores), *notes, f"\n-> {args.out}", sep="\n")
    stop_processes()


if __name__ == "__main__":
    run_program(main)
