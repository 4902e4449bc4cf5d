"""What came of it: held-out problems scored by the judge of training, tables, curves and a page of responses.

    evaluate       a model's responses to held-out problems, each with its score
    summarize      accuracy, format, observation accuracy, length: overall and by difficulty level
    before_after   the table that closes a run
    plot_curves    metrics.jsonl -> curves.png
    write_page     responses.jsonl -> one HTML file to look through, pictures inside
    plot_ladder    a ladder -> the three panels of the paper's figure
    write_review   problems that no rollout solved -> pages and a table, for a person to check their golds
    correct        what that person decided: golds kept, dropped, or replaced and the rollouts judged anew
    write_card     the card of a ladder as a data set

    python eval.py --model CHECKPOINT --benchmark toy
"""
from __future__ import annotations

import argparse
import base64
import csv
import html
import io
import json
import re
import sys
import textwrap
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Iterable, Iterator

from matplotlib.figure import Figure  # (not pyplot: no window, no state)
from tqdm import tqdm

from data import (
    PROMPTS,
    Processor,
    Record,
    check_prompts,
    load_records,
    normal_text,
    open_image,
    option_index,
    parse_number,
)
from rewards import answer_matches, check_golds, score
from rollout import best_device, load_policy, sample_groups

BENCHMARKS = {"toy": str(Path(__file__).resolve().parent / "assets/toy/test.parquet")}


@dataclass(frozen=True)
class Sample:
    """One response, scored."""

    text: str
    answer: str | None  # as extracted; None: unreadable, which is counted as wrong
    correct: bool
    format: float
    observation: float | None  # share of the picture's facts that <observe> states; None where they are not known
    tokens: int
    truncated: bool


@dataclass(frozen=True)
class Result:
    """One problem and its responses."""

    record: Record
    samples: list[Sample]


def evaluate(model, processor: Processor, records: list[Record], *, style: str, temperature: float, samples: int,
             max_tokens: int, max_rows: int = 256, seed: int = 0) -> Iterator[Result]:
    """Answer each problem `samples` times (temperature 0: greedy), scored by the judge of training, as results come.

    At most max_rows responses, and the pictures of as many problems as these answer, are in memory at a time.
    """
    per_chunk = max(1, max_rows // samples)
    for start in range(0, len(records), per_chunk):
        chunk = records[start:start + per_chunk]
        prompts = [processor.encode(r, style) for r in chunk]
        groups = sample_groups(model, processor, chunk, prompts, samples=samples, temperature=temperature,
                               max_tokens=max_tokens, seed=seed + start, max_rows=max_rows)
        for record, group in zip(chunk, groups):
            scores = [score(text, record, style) for text in group.texts]
            yield Result(record, [
                Sample(text, s.answer, bool(s.accuracy), s.format, s.observation, len(response), cut)
                for text, s, response, cut in zip(group.texts, scores, group.responses, group.truncated)])


def with_rollouts(record: Record, rollouts: list[dict]) -> Record:
    """The record with difficulty 1 - correct / N and complexity, the mean response length in tokens."""
    return replace(record, difficulty=1 - sum(r["correct"] for r in rollouts) / len(rollouts),
                   complexity=sum(r["tokens"] for r in rollouts) / len(rollouts),
                   meta=record.meta | {"rollouts": rollouts})


def mean(values) -> float | None:
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def summarize(results: list[Result]) -> dict:
    """Scores in [0, 1] and mean length in tokens, means over problems of means over samples (avg@k).

    `levels` holds the same for each difficulty level that the problems were measured at.
    """
    def scores(part: list[Result]) -> dict:
        def over(get) -> float | None:
            return mean(mean(get(s) for s in r.samples) for r in part)

        return {"problems": len(part), "accuracy": over(lambda s: s.correct), "format": over(lambda s: s.format),
                "observation": over(lambda s: s.observation), "length": over(lambda s: s.tokens),
                "truncated": over(lambda s: s.truncated), "unreadable": over(lambda s: s.answer is None)}

    levels: dict[float, list[Result]] = {}
    for result in results:
        if result.record.difficulty is not None:
            levels.setdefault(result.record.difficulty, []).append(result)
    return scores(results) | {"levels": {f"{level:.3f}": scores(levels[level]) for level in sorted(levels)}}


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
            smooth = [sum(y[max(0, i - window):i + window + 1]) / len(y[max(0, i - window):i + window + 1])
                      for i in range(len(y))]
            axis.plot(x, smooth, color="C0", label="training, mean of neighbours")
        for kind, colour in (("greedy", "C1"), ("sampled", "C2")):
            scores = [(m["step"], m["eval"][kind][key]) for m in tests if m["eval"].get(kind, {}).get(key) is not None]
            if scores:
                axis.plot(*zip(*scores), "o-" if kind == "greedy" else "o:", color=colour, markersize=4,
                          label="held out, greedy" if kind == "greedy" else "held out, temperature 1")
        for before, after in zip(steps, steps[1:]):
            if before["stage"] != after["stage"]:
                axis.axvline(before["step"] + 0.5, color="0.9", linewidth=0.8, zorder=0)
        axis.set_title(title)
        axis.set_xlabel("rollout (a line at each stage's end)")
    if axes.flat[0].get_legend_handles_labels()[0]:
        axes.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def plot_ladder(ladder: list[Record], table, complexity, mixing, paper_shares, paper_complexity, path: Path) -> None:
    """A ladder -> a PNG: shares and complexity by level, mixing by stage, and a picture of each level, easy to hard.

    table: [S, L] problems by stage and level; complexity: [L] mean tokens, nan for an empty level; mixing: [S, L].
    """
    stages, levels = table.shape
    names = [f"{level / (levels - 1):.3g}" for level in range(levels)]
    figure = Figure(figsize=(16, 9), layout="constrained")
    axes = figure.subplot_mosaic([["shares"] * 4 + ["mixing"] * (levels - 4), [str(level) for level in range(levels)]],
                                 height_ratios=[5, 3])
    shares = axes["shares"]
    shares.bar(range(levels), table.sum(0) / table.sum(), color="C0", alpha=.6, label="share")
    shares.plot(range(levels), paper_shares, "_", color="black", markersize=24, label="share, paper")
    shares.set(title="problems by difficulty level", xlabel="difficulty", ylabel="share", xticks=range(levels),
               xticklabels=names)
    tokens = shares.twinx()
    tokens.plot(range(levels), complexity, "o-", color="C1", label="complexity")
    tokens.plot(range(levels), paper_complexity, "--", color="C1", alpha=.6, label="complexity, paper")
    tokens.set(ylabel="complexity, tokens", ylim=(0, None))
    shares.legend(loc="upper left")
    tokens.legend(loc="upper left", bbox_to_anchor=(0, .88))

    mix = axes["mixing"]
    own = table / table.sum(1, keepdims=True).clip(min=1)  # [S, L]
    mix.imshow(own, cmap="Blues", vmin=0, vmax=.8, aspect="auto")
    for stage in range(stages):
        for level in range(levels):
            if table[stage, level] or mixing[stage, level]:
                mix.text(level, stage, f"{own[stage, level]:.3f}\n({mixing[stage, level]:.3f})", ha="center",
                         va="center", fontsize=7, color="white" if own[stage, level] > .4 else "black")
    mix.set(title="mixing: share of each level in a stage (paper's)", xlabel="difficulty", ylabel="stage, problems",
            xticks=range(levels), xticklabels=names, yticks=range(stages),
            yticklabels=[f"{stage}: {n}" for stage, n in enumerate(table.sum(1))])

    for level in range(levels):
        axis = axes[str(level)]
        axis.set_axis_off()
        axis.set_anchor("N")
        at_level = sorted((r for r in ladder if round(r.difficulty * (levels - 1)) == level and r.images),
                          key=lambda r: (r.complexity, r.id))
        if at_level:
            example = at_level[len(at_level) // 2]
            picture = open_image(example.images[0], example.id)
            picture.thumbnail((512, 512))
            axis.imshow(picture)
            question = "\n".join(textwrap.wrap(textwrap.shorten(example.question, 110), 24))
            axis.set_title(f"difficulty {names[level]}, {example.complexity:.0f} tokens\n{question}", fontsize=8,
                           parse_math=False)  # a lone $ of a question would be an error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks are drawn as boxes
        figure.savefig(path, dpi=100)


PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }}
section {{ border-top: 1px solid #ccc; padding: 1rem 0; display: grid; grid-template-columns: 15rem 1fr; gap: 1.5rem }}
img {{ min-width: 7rem; max-width: 15rem; max-height: 15rem; border: 1px solid #ddd; image-rendering: pixelated }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .5rem; padding: .4rem .6rem; background: #f6f6f6 }}
.right {{ border-left: 4px solid #2a9d4a }} .wrong {{ border-left: 4px solid #d04040 }}
small {{ color: #666; display: block }} label {{ margin-right: 1rem }}
body.hide-right pre.right, body.hide-wrong pre.wrong {{ display: none }}
</style><h1>{title}</h1><p>{intro}</p>
{body}"""
SWITCHES = """Groups sampled along the run, in order. Green: right; red: wrong.
<label><input type="checkbox" checked onchange="document.body.classList.toggle('hide-right')"> right</label>
<label><input type="checkbox" checked onchange="document.body.classList.toggle('hide-wrong')"> wrong</label>"""


def picture_tag(record: Record, image) -> str:
    """A picture as an HTML image with the data inside, at most 512 px a side."""
    picture = open_image(image, record.id)
    picture.thumbnail((512, 512))
    buffer = io.BytesIO()
    kind = "png" if picture.width * picture.height < 256 * 256 else "jpeg"  # a page of photographs as PNG is 80 MB
    picture.save(buffer, kind, quality=85)
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def gold_of(record: Record) -> str:
    return " or ".join(record.golds)


def write_page(lines: list[dict], records: dict[str, Record], path: Path, title: str, limit: int = 300) -> None:
    """Lines of responses.jsonl -> one HTML file without outside parts; at most `limit` groups, spread over the run.

    All text is escaped: what a model writes cannot become markup.
    """
    if len(lines) > limit:
        lines = [lines[i * len(lines) // limit] for i in range(limit)]
    parts = []
    for line in lines:
        record = records[line["id"]]
        responses = "".join(
            f'<pre class="{"right" if r["accuracy"] else "wrong"}">{html.escape(r["text"])}'
            f'<small>reward {r["reward"]:.2f} = accuracy {r["accuracy"]:.0f}, format {r["format"]:.0f}, '
            f'bonus {r["bonus"]:.1f}; advantage {r["advantage"]:+.2f}; {r["tokens"]} tokens</small></pre>'
            for r in line["responses"])
        stage = "" if line["stage"] is None else f", stage {line['stage']}"
        parts.append(
            f'<section><div>{"".join(picture_tag(record, i) for i in record.images)}'
            f'<small>step {line["step"]}{stage}, problem {html.escape(record.id)}, weight {line["weight"]:.2f}</small>'
            '</div>'
            f'<div><p><b>{html.escape(record.text).replace(chr(10), "<br>")}</b><br>'
            f'gold: {html.escape(gold_of(record))}</p>'
            f'{responses}</div></section>')
    path.write_text(PAGE.format(title=html.escape(title), intro=SWITCHES, body="\n".join(parts)), encoding="utf-8")


# --- review of golds --------------------------------------------------------------------------------------------------

COLUMNS = ("id", "question", "gold", "majority", "votes", "decision", "new_gold")
REVIEW = """No rollout met the gold of these {count} problems. The likeliest wrong golds come first: those where the
rollouts agree most on one other answer. Write into <b>review.csv</b>, column decision: <b>keep</b> (the gold is right),
<b>drop</b>, or <b>fix</b> with the right answer in new_gold; then run curriculum.py again with
--corrections review.csv. Rows without a decision stay as they are. Page {links}"""


def majority(record: Record) -> tuple[str, int]:
    """The answer that most of a record's rollouts gave, as the first of them wrote it, and how many gave it."""
    def vote(answer: str) -> str:  # what equal answers share: the option's letter, the number, or the text
        option = option_index(answer, record.choices) if record.answer_type == "choice" else None
        if option is not None:
            return ascii_uppercase[option]
        number = parse_number(answer)
        return normal_text(answer) if number is None else f"{number:.6g}"

    answers = [rollout["answer"] for rollout in record.meta["rollouts"] if rollout["answer"] is not None]
    if not answers:
        return "", 0
    [(winner, count)] = Counter(map(vote, answers)).most_common(1)
    return next(answer for answer in answers if vote(answer) == winner), count


def write_review(records: list[Record], folder: Path, per_page: int = 200) -> None:
    """Records with meta["rollouts"] -> folder/review.html (then review-2.html, ...) and review.csv, likely wrong first.

    A review.csv that differs from what would be written was edited by a person: it is left as it is, and said so.
    """
    ranked = sorted(((record, *majority(record)) for record in records), key=lambda row: (-row[2], row[0].id))
    names = ["review.html", *(f"review-{n}.html" for n in range(2, -(-len(ranked) // per_page) + 1))]
    links = " ".join(f'<a href="{name}">{n}</a>' for n, name in enumerate(names, 1))
    for page, name in enumerate(names):
        parts = []
        for record, answer, votes in ranked[page * per_page:(page + 1) * per_page]:
            given = " | ".join("(none)" if r["answer"] is None else r["answer"] for r in record.meta["rollouts"])
            parts.append(
                f'<section><div>{"".join(picture_tag(record, i) for i in record.images)}'
                f'<small>{html.escape(record.id)}<br>{html.escape(record.source)}</small></div>'
                f'<div><p><b>{html.escape(record.text).replace(chr(10), "<br>")}</b></p>'
                f'<pre class="right">gold: {html.escape(gold_of(record))}</pre>'
                f'<pre class="wrong">majority, {votes} of {len(record.meta["rollouts"])}: {html.escape(answer)}</pre>'
                f'<pre>all: {html.escape(given)}</pre></div></section>')
        intro = REVIEW.format(count=len(ranked), links=links)
        (folder / name).write_text(PAGE.format(title="Review of golds", intro=intro, body="\n".join(parts)), "utf-8")

    def cell(text: str) -> str:  # on one line, and no formula to a spreadsheet: a model wrote some of these
        text = " ".join(text.split())
        return "'" + text if text.startswith(("=", "+", "-", "@")) and parse_number(text) is None else text

    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for record, answer, votes in ranked:
        writer.writerow([record.id, cell(record.text), cell(gold_of(record)), cell(answer),
                         f"{votes} of {len(record.meta['rollouts'])}", "", ""])
    content = table.getvalue().encode("utf-8-sig")  # the mark tells spreadsheets that it is UTF-8
    path = folder / "review.csv"
    if path.exists() and path.read_bytes() != content:
        print(f"{path} has been edited; left as it is", file=sys.stderr)
    else:
        path.write_bytes(content)


def read_corrections(path: Path, records: Iterable[Record]) -> dict[str, tuple[str, Record | None]]:
    """A review.csv that a person edited -> {id: (decision, corrected record or None)}; undecided rows are left out.

    Raises one ValueError that names every row that cannot be used, by line, with what to do.
    """
    known = {record.id: record for record in records}
    decisions: dict[str, tuple[str, Record | None]] = {}
    bad = []

    def decide(row: dict) -> None:
        row_id, decision, gold = ((row[name] or "").strip() for name in ("id", "decision", "new_gold"))
        decision = decision.lower()
        if not decision and not gold:
            return
        if row_id not in known:
            raise ValueError(f"the data has no record {row_id!r}; write the id as it was: spreadsheets change some")
        if row_id in decisions:
            raise ValueError(f"record {row_id!r} is decided twice; leave one of the rows")
        if decision not in ("keep", "drop", "fix"):
            raise ValueError(f"its decision is {decision!r}; write keep, drop or fix")
        if bool(gold) != (decision == "fix"):
            raise ValueError(f"its decision is {decision} and its new_gold {gold!r}; a new_gold goes with fix, and "
                             "fix with a new_gold")
        decisions[row_id] = decision, with_gold(known[row_id], gold) if gold else None

    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}; save it as CSV in UTF-8") from error
    mark = ";" if ";" in text.partition("\n")[0] else ","  # spreadsheets of half of Europe write ;
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=mark)
    if missing := {"id", "decision", "new_gold"} - set(table.fieldnames or ()):
        raise ValueError(f"{path}: it has no column {', '.join(sorted(missing))}; edit the review.csv of a build")
    for row in table:
        try:
            decide(row)
        except ValueError as error:
            bad.append(f"line {table.line_num}: {error}")
    if bad:
        raise ValueError(f"{path}: {len(bad)} rows cannot be used:\n  " + "\n  ".join(bad[:20]) + "\nmend them")
    return decisions


def with_gold(record: Record, gold: str) -> Record:
    """The record with another gold, of its own answer type where that can hold it. ValueError: no rule can read it."""
    try:
        return check_golds([replace(record, answer=gold)])[0]
    except ValueError as error:
        try:
            return check_golds([replace(record, answer=gold, answer_type="")])[0]
        except ValueError:
            raise error from None


def correct(records: list[Record], decisions: dict[str, tuple[str, Record | None]]) -> list[Record]:
    """Measured records after review: dropped ones left out, and where the gold is new the stored rollouts judged anew,
    for what was wrong may now be right. Raises ValueError where the rollouts of such a record are not known.
    """
    corrected = []
    for record in records:
        decision, fixed = decisions.get(record.id, ("", None))
        if fixed is not None:
            if "rollouts" not in record.meta:
                raise ValueError(f"record {record.id}: its rollouts' answers are not known, so a new gold cannot be "
                                 "judged; give the corrections to the build that measured it")
            record = with_rollouts(replace(record, answer=fixed.answer, answer_type=fixed.answer_type), [
                r | {"correct": r["answer"] is not None and answer_matches(r["answer"], fixed)}
                for r in record.meta["rollouts"]])
        if decision != "drop":
            corrected.append(record)
    return corrected


# --- the card of a ladder ---------------------------------------------------------------------------------------------

LICENCES = {"mathvision": "MIT", "wemath": "CC BY-NC 4.0", "polymath": "AFL-3.0", "scemqa": "unstated",
            "mathv360k": "none given"}  # as their authors publish them
HUB_LICENCES = {"MIT": "mit", "CC BY-NC 4.0": "cc-by-nc-4.0", "AFL-3.0": "afl-3.0"}  # the hub's names for them


def licence(source: str) -> str:
    name = re.sub(r"[^a-z0-9]", "", source.lower())
    return next((value for key, value in LICENCES.items() if name.startswith(key)), "as its source")


def write_card(path: Path, ladder: list[Record], counts: str, settings: dict, notes: list[str]) -> None:
    """The data set's card: its front matter makes the hub and `datasets` take ladder.parquet alone for the train split.

    counts: tables by level, stage and source; settings: what measured the problems; notes: how the ladder was built,
    and where it departs from the shares.
    """
    licences = {licence(r.source) for r in ladder}
    name = HUB_LICENCES.get(licences.pop(), "other") if len(licences) == 1 else "other"
    size = next((f"{low}<n<{high}" for low, high, limit in (
        ("", "1K", 1e3), ("1K", "10K", 1e4), ("10K", "100K", 1e5), ("100K", "1M", 1e6)) if len(ladder) < limit),
        "n>1M").removeprefix("<")
    measured = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in settings.items())
    path.write_text(f"""---
pretty_name: A NeuraLadder
license: {name}
task_categories:
- image-text-to-text
tags:
- curriculum
- reasoning
- reinforcement-learning
size_categories:
- {size}
configs:
- config_name: default
  data_files:
  - split: train
    path: ladder.parquet
---
# A ladder of {len(ladder)} problems

Visual problems with answers that a rule can check, on nine stages from easy to hard, built as Observe-R1 (arXiv
2505.12432) describes NeuraLadder. `difficulty` is 1 - pass rate over {settings.get("samples", "the")}
responses of the model below, `complexity` their mean length in tokens; each stage is mixed from a window of five
difficulty levels.

![shares and complexity by level, mixing by stage, examples](ladder.png)

    datasets.load_dataset("FOLDER", split="train")       # rows in the order of training; column stage: 0 .. 8
    torchrun train.py --data FOLDER

The same columns serve TRL (`prompt`, `images`, `solution`) and EasyR1 (`problem`, `images`, `answer`).

## What is on it

{counts}

## How it was built

{chr(10).join(f"- {note}" for note in notes)}

## How it was measured

| setting | value |
|---|---|
{measured}
""", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a checkpoint on held-out problems.")
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--benchmark", default="toy", help=f"{', '.join(BENCHMARKS)}, or any file that data.py reads")
    parser.add_argument("--prompt", choices=sorted(PROMPTS), default="observe", help="prompt style")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--samples", type=int, default=1, help="k; scores are means over k responses, avg@k")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest response")
    parser.add_argument("--max-pixels", type=int, help="area above which pictures are shrunk")
    parser.add_argument("--rows", type=int, default=256, help="responses sampled at a time; less saves memory")
    parser.add_argument("--limit", type=int, help="first so many problems only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for scores.json and responses.jsonl")
    args = parser.parse_args()
    processor = Processor(args.model, args.max_pixels)
    records = load_records(BENCHMARKS.get(args.benchmark, args.benchmark), args.limit)
    records = check_golds(check_prompts(processor, records, args.prompt))
    model = load_policy(args.model, best_device())
    results = list(tqdm(evaluate(
        model, processor, records, style=args.prompt, temperature=args.temperature, samples=args.samples,
        max_tokens=args.max_tokens, max_rows=args.rows, seed=args.seed), total=len(records), unit="problem"))
    scores = summarize(results)
    for level, row in {"all": scores, **scores["levels"]}.items():
        cells = [f"{name} {value:.3f}" for name, value in row.items() if isinstance(value, float)]
        print(f"{level:>6}  problems {row['problems']:4d}  " + "  ".join(cells))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        settings = {k: str(v) for k, v in vars(args).items()}
        (args.out / "scores.json").write_text(json.dumps(scores | {"settings": settings}, indent=1))
        with open(args.out / "responses.jsonl", "w") as file:
            for r in results:
                line = {"id": r.record.id, "gold": r.record.answer, "samples": [asdict(s) for s in r.samples]}
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
