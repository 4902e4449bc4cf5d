"""Runs side by side: what each setting came to over its seeds, and whether two differ, paired by problem.

    python assets/compare.py RUN RUN ... [--against first|previous] [--out DIR]

RUN is a folder that train.py (with --test) or eval.py left. Runs of one setting but the seed are one row of the table.
Prints the tables and leaves compare.md and compare.png in DIR.

    read_runs      a folder -> its runs
    difference     mean accuracy, or a difference of means, with its interval
    compare_runs   runs -> the tables in Markdown, and the picture
"""
from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # (not pyplot: no window, no state)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import TOY, drawn, label_of, markdown, mean, percent  # noqa: E402
from train import TECHNICAL, read_log  # noqa: E402

# What runs of one setting may differ in; what was asked of an evaluation is told by its data.
UNEQUAL = ("program", "seed", "out", "resume", "model", "trained", "responses", "benchmark", "pictures", "rows",
           *TECHNICAL)


@dataclass(frozen=True)
class Run:
    """What one run of train.py, or one prompt style of an evaluation, came to."""

    folder: Path
    seed: str
    settings: dict  # without the seed
    problems: dict[str, dict[str, tuple[str, float]]]  # column of the table -> id -> (what is drawn together, accuracy)
    before: dict[str, dict[str, tuple[str, float]]] = field(default_factory=dict)  # the same, before training
    beside: dict[str, float] = field(default_factory=dict)  # what else stands in the tables, by column


# --- reading ----------------------------------------------------------------------------------------------------------


def read_runs(folder: Path) -> list[Run]:
    """The runs in a folder that train.py or eval.py left: one, or one for each prompt style."""
    try:
        scores = json.loads((folder / "scores.json").read_text())
        settings = {} if "settings" in scores else json.loads((folder / "settings.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no finished run of train.py (with --test) or eval.py: {error}") from error
    if not settings:
        return evaluation_runs(folder, scores)
    return [training_run(folder, settings, scores, read_log(folder / "metrics.jsonl"),
                         read_log(folder / "problems.jsonl"))]


def training_run(folder: Path, kept: dict, scores: dict, metrics: list[dict], history: Iterable[dict] = ()) -> Run:
    """One run of train.py, from what its settings.json, scores.json, metrics.jsonl and problems.jsonl hold (the last
    two may be empty). history: what each problem, measured then at its level, came to when it was trained on."""
    test = Path(kept["test"])
    label = "toy" if test.parts[-2:] == TOY.parts[-2:] else label_of(kept["test"])
    settings = {key: value for key, value in kept.items() if key not in UNEQUAL or key == "model"}
    beside = beside_of(scores["after"]["sampled"], "T=1")
    steps = [line for line in metrics if "reward" in line]
    if steps:
        seconds = sum(value for step in steps for name, value in step.items() if name.startswith("seconds_"))
        beside |= trained_by_level(history)
        beside |= {"groups with signal, %": 100 * mean(s["signal"] for s in steps), "minutes": seconds / 60}
    return Run(folder, str(kept["seed"]), settings, columns_of(scores["after"], label),
               columns_of(scores["before"], label), beside)


def trained_by_level(history: Iterable[dict]) -> dict[str, float]:
    """Difficulty then and now: of the problems of each level that was measured, how many were right in training."""
    levels: dict[float, list[float]] = {}
    for line in {line["id"]: line for line in history}.values():  # (the last pass over each)
        if line["difficulty"] is not None:
            levels.setdefault(line["difficulty"], []).append(100 * line["right"] / line["of"])
    return {f"{level:.3f}, in training, %": float(np.mean(rates)) for level, rates in sorted(levels.items())}


def columns_of(end: dict, label: str) -> dict:
    """One end of a run of train.py, before or after -> Run.problems."""
    columns = {}
    for name, kind in (("greedy", "greedy"), ("T=1", "sampled")):
        columns[f"{label}, {name}"] = {key: (key, value) for key, value in end[kind]["by_problem"].items()}
    return columns


def evaluation_runs(folder: Path, scores: dict) -> list[Run]:
    """The prompt styles of an evaluation, from its scores.json."""
    asked = scores["settings"]
    trained = {} if asked["responses"] else asked["trained"] or {}  # (a model beside responses only counts tokens)
    settings = {key: value for key, value in asked.items() if key not in UNEQUAL}
    settings |= {f"trained with {key}": value for key, value in trained.items() if key not in UNEQUAL or key == "model"}
    settings["model"] = asked["responses"] or ("a checkpoint of train.py" if trained else asked["model"])
    problems: dict[str, dict] = {}
    beside = {}
    for s in scores["scores"]:
        kind = s.get("pictures", "given")
        column = f"{s['benchmark']}, {s['sampling']}" + f", pictures {kind}" * (kind != "given")
        problems.setdefault(s["prompt"], {})[column] = {
            key: (s["drawn_with"].get(key, key), accuracy) for key, accuracy in s["by_problem"].items()}
        if kind == "given":
            beside[s["prompt"]] = beside_of(s, s["sampling"])
    seed = f"{trained.get('seed', '')}/{asked['seed']}"
    return [Run(folder, seed, settings | {"prompt": prompt}, columns, beside=beside.get(prompt, {}))
            for prompt, columns in problems.items()]


def beside_of(summary: dict, sampling: str) -> dict[str, float]:
    """Of a summary: what its responses were like, and accuracy by difficulty level."""
    shares = {name: summary.get(name) for name in ("observation", "format")}
    shares |= {level: scores["accuracy"] for level, scores in summary.get("levels", {}).items()}
    found = {f"{name}, {sampling}, %": 100 * value for name, value in shares.items() if value is not None}
    if summary.get("length") is not None:
        found[f"tokens, {sampling}"] = summary["length"]
    return found


# --- reckoning --------------------------------------------------------------------------------------------------------


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


def over_seeds(values: list[float]) -> str:
    """Their mean, with its standard error where there are several."""
    error = f" ± {np.std(values, ddof=1) / len(values) ** .5:.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{error}" if values else "-"


def by_setting(runs: list[Run]) -> list[list[Run]]:
    """Runs of one setting together, its seeds, in the order given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        group = groups.setdefault(json.dumps(run.settings, sort_keys=True), [])
        if twin := next((other for other in group if other.seed == run.seed), None):
            raise ValueError(f"{twin.folder} and {run.folder} are of the same settings and seed (memory and speed do "
                             "not count, nor which benchmarks and pictures were asked for: ask for all of them in one "
                             "evaluation); give one of them: a run counted twice would make its interval too small")
        group.append(run)
    return list(groups.values())


def accuracies(group: list[Run], column: str) -> list[dict]:
    return [run.problems[column] for run in group if column in run.problems]


# --- showing ----------------------------------------------------------------------------------------------------------


def compare_runs(runs: list[Run], against: str = "first", picture: Path | None = None) -> str:
    """The tables in Markdown. against: what a setting's difference is from, the `first` or the `previous`. picture:
    where a plot of the accuracies goes."""
    groups = by_setting(runs)
    differ = differing(groups)
    names = names_of(groups, differ)
    columns = dict.fromkeys(column for run in runs for column in run.problems)
    scores = {column: [difference(accuracies(group, column), []) for group in groups] for column in columns}
    parts = [accuracy_table(groups, names, scores, against),
             "Accuracy in %, with 95% intervals: bootstrap over problems and, where a setting has several seeds, "
             "Student's t over these. Differences are paired by problem.",
             beside_table(groups, names, "setting", by_level=False),
             beside_table(groups, names, "accuracy by difficulty", by_level=True)]
    if any(len(group) > 1 for group in groups):
        parts.append("Means over seeds, with their standard error.")
    if differ:
        parts.append(markdown(["differs", *names], [
            [key, *(short(group[0].settings.get(key)) for group in groups)] for key in differ]))
    if picture:
        draw(names, scores, picture)
    return "\n\n".join(part for part in parts if part)


def differing(groups: list[list[Run]]) -> list[str]:
    """The settings that tell the groups apart. One that a group does not have tells nothing: a model that was never
    trained does not differ in all settings of training."""
    differ = []
    for key in dict.fromkeys(key for group in groups for key in group[0].settings):
        values = {json.dumps(group[0].settings[key]) for group in groups if key in group[0].settings}
        if len(values) > 1:
            differ.append(key)
    return differ


def names_of(groups: list[list[Run]], differ: list[str]) -> list[str]:
    """What the tables call each setting: by what differs where that is short, else by its folder."""
    told = [key for key in differ if not key.startswith("data ")]
    names = []
    for group in groups:
        settings, folder = group[0].settings, group[0].folder
        if 0 < len(told) < 4:
            name = ", ".join(f"{key} {short(settings.get(key))}" for key in told)
        else:
            name = re.sub(r"-seed\d+$", "", folder.name)
            if sum(other[0].folder == folder for other in groups) > 1:
                name += f", prompt {settings['prompt']}"
        names.append(name)
    return names


def short(value) -> str:
    return str(value if value not in (None, "") else "-").replace("|", "/")


def accuracy_table(groups: list[list[Run]], names: list[str], scores: dict[str, list], against: str) -> str:
    """A row for each setting; for each column of accuracies its gain by training, where there was any, and its
    difference from another row, where there are several."""
    trained = any(run.before for group in groups for run in group)
    header = ["setting", "seeds"]
    rows = [[name, str(len(group))] for name, group in zip(names, groups)]
    for column in scores:
        header.append(f"{column}, %")
        for row, score in zip(rows, scores[column]):
            row.append(cell(score))
        if trained:
            header.append("gain by training")
            for row, group in zip(rows, groups):
                row.append(cell(gain(group, column), "+"))
        if len(groups) > 1:
            header += [f"against the {against}", "paired problems"]
            for y, row in enumerate(rows):
                row += change_cells(groups, y, column, against)
    return markdown(header, rows)


def cell(found: tuple | None, sign: str = "") -> str:
    """What difference() found, in %."""
    return percent(*found[:2], sign) if found else "-"


def gain(group: list[Run], column: str) -> tuple | None:
    before = [run.before[column] for run in group if column in run.before]
    return difference(accuracies(group, column), before) if before else None


def change_cells(groups: list[list[Run]], y: int, column: str, against: str) -> list[str]:
    """Row y against the first, or the previous: the difference, and over how many problems."""
    base = accuracies(groups[0 if against == "first" else y - 1], column) if y else []
    found = difference(accuracies(groups[y], column), base) if base else None
    return [cell(found, "+"), str(found[2]) if found else "-"]


def beside_table(groups: list[list[Run]], names: list[str], title: str, by_level: bool) -> str:
    """What else is known of the runs, means over seeds: accuracies by difficulty level, or the rest. "" for nothing."""
    keys = dict.fromkeys(key for group in groups for run in group for key in run.beside)
    keys = [key for key in keys if key[0].isdigit() == by_level]
    rows = [[name, *(over_seeds([run.beside[key] for run in group if key in run.beside]) for key in keys)]
            for name, group in zip(names, groups)]
    return markdown([title, *keys], rows) if keys else ""


def draw(names: list[str], scores: dict[str, list], path: Path) -> None:
    """Accuracies with their intervals -> a PNG: a panel for each column, at most three in a row; a line a setting."""
    across = min(3, len(scores))
    down = -(-len(scores) // across)
    labels = [textwrap.fill(name, 40) for name in names]  # (in one line a long one would leave the panels no room)
    row = .4 + .16 * max(label.count("\n") for label in labels)  # inches
    figure = Figure(figsize=(5 * across + 3, down * (1.5 + row * len(names))), layout="constrained")
    axes = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for axis, column in zip(axes, scores):
        axis.set(yticks=range(len(names)), ylim=(len(names) - .5, -.5))
        axis.set_title(textwrap.fill(f"{column}: accuracy, 95% interval", 45), parse_math=False)
        axis.set_yticklabels(labels, parse_math=False)
        axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        for y, found in enumerate(scores[column]):
            if found:
                axis.plot(found[1] or [found[0]] * 2, [y, y], color="C0", linewidth=2)
                axis.plot(found[0], y, "o", color="C0")
    for axis in axes[len(scores):]:
        axis.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Set runs side by side.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that train.py or eval.py left")
    parser.add_argument("--against", choices=("first", "previous"), default="first", help="which setting each is "
                        "compared with, in the order given: the first, or the one before it (a ladder of ablations)")
    parser.add_argument("--out", type=Path, default=Path("out/compare"), help="folder for compare.md and compare.png")
    args = parser.parse_args(argv)
    runs = [run for folder in args.runs for run in read_runs(folder)]
    text = compare_runs(runs, args.against, args.out / "compare.png")
    (args.out / "compare.md").write_text(text + "\n")
    print(text, "", f"-> {args.out}", sep="\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
