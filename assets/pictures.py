"""Two pictures of what is on disk: how a run's answers changed, and what is on a ladder.

    python assets/pictures.py strip RUN                    # a run of train.py -> RUN/strip.png
    python assets/pictures.py ladder LADDER [--out PATH]   # a ladder of curriculum.py -> ladder.png beside it
"""
from __future__ import annotations

import argparse
import json
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # (not pyplot: no window, no state)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from curriculum import LEVELS, MIXING, PAPER_COMPLEXITY, PAPER_SHARES, level_of, stage_table  # noqa: E402
from data import Record, load_records, open_image  # noqa: E402

# --- a run ------------------------------------------------------------------------------------------------------------


def read_strip(run: Path) -> tuple[list[dict], dict[str, Record]]:
    """What plot_strip takes, from a run's folder. ValueError: it has not answered held-out problems twice."""
    try:
        test = json.loads((run / "settings.json").read_text())["test"]
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{run}: no run of train.py: {error}") from error
    if sum(bool(line.get("shown")) for line in metrics) < 2:
        raise ValueError(f"{run}: it did not answer held-out problems twice; a run with --test does, at its ends")
    # settings.json names what lies in the repository by its place there; all else as it was given.
    test = test if Path(test).exists() else str(ROOT / test)
    return metrics, {record.id: record for record in load_records(test)}


def plot_strip(metrics: list[dict], records: dict[str, Record], path: Path) -> None:
    """Lines of metrics.jsonl -> a PNG: one held-out problem, and its greedy response before, midway and last.

    The first problem of those logged that is wrong at first and right at last; where there is none, the first.
    """
    tests = [m for m in metrics if m.get("shown")]
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


# --- a ladder ---------------------------------------------------------------------------------------------------------

NAMES = [f"{level / (LEVELS - 1):.3g}" for level in range(LEVELS)]  # of the levels: their difficulty


def plot_ladder(ladder: list[Record], path: Path) -> None:
    """A ladder -> a PNG: shares and complexity by level, mixing by stage, and a picture of each level, easy to hard."""
    table = stage_table(ladder)  # [S, L] problems
    figure = Figure(figsize=(16, 9), layout="constrained")
    axes = figure.subplot_mosaic([["shares"] * 4 + ["mixing"] * (LEVELS - 4), [str(level) for level in range(LEVELS)]],
                                 height_ratios=[5, 3])
    plot_shares(axes["shares"], table, complexity_of(ladder))
    plot_mixing(axes["mixing"], table)
    for level in range(LEVELS):
        show_example(axes[str(level)], [r for r in ladder if level_of(r) == level and r.images], NAMES[level])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks are drawn as boxes
        figure.savefig(path, dpi=100)


def complexity_of(ladder: list[Record]) -> np.ndarray:
    """[L] mean complexity of each level, in tokens; nan where there is no problem."""
    levels = [[r.complexity for r in ladder if level_of(r) == level] for level in range(LEVELS)]
    return np.array([np.mean(level) if level else np.nan for level in levels])


def plot_shares(axis: Axes, table: np.ndarray, complexity: np.ndarray) -> None:
    """Share and mean complexity of each level, beside the paper's."""
    axis.bar(range(LEVELS), table.sum(0) / table.sum(), color="C0", alpha=.6, label="share")
    axis.plot(range(LEVELS), PAPER_SHARES, "_", color="black", markersize=24, label="share, paper")
    axis.set(title="problems by difficulty level", xlabel="difficulty", ylabel="share", xticks=range(LEVELS),
             xticklabels=NAMES)
    tokens = axis.twinx()
    tokens.plot(range(LEVELS), complexity, "o-", color="C1", label="complexity")
    tokens.plot(range(LEVELS), PAPER_COMPLEXITY, "--", color="C1", alpha=.6, label="complexity, paper")
    tokens.set(ylabel="complexity, tokens", ylim=(0, None))
    axis.legend(loc="upper left")
    tokens.legend(loc="upper left", bbox_to_anchor=(0, .88))


def plot_mixing(axis: Axes, table: np.ndarray) -> None:
    """Share of each level in each stage, the paper's in brackets."""
    stages = len(table)
    own = table / table.sum(1, keepdims=True).clip(min=1)  # [S, L]
    axis.imshow(own, cmap="Blues", vmin=0, vmax=.8, aspect="auto")
    for stage in range(stages):
        for level in range(LEVELS):
            if table[stage, level] or MIXING[stage, level]:
                axis.text(level, stage, f"{own[stage, level]:.3f}\n({MIXING[stage, level]:.3f})", ha="center",
                          va="center", fontsize=7, color="white" if own[stage, level] > .4 else "black")
    axis.set(title="mixing: share of each level in a stage (paper's)", xlabel="difficulty", ylabel="stage, problems",
             xticks=range(LEVELS), xticklabels=NAMES, yticks=range(stages),
             yticklabels=[f"{stage}: {n}" for stage, n in enumerate(table.sum(1))])


def show_example(axis: Axes, records: list[Record], level: str) -> None:
    """The one of middling complexity; nothing where there are no records."""
    axis.set_axis_off()
    axis.set_anchor("N")
    if not records:
        return
    records = sorted(records, key=lambda r: (r.complexity, r.id))
    example = records[len(records) // 2]
    picture = open_image(example.images[0], example.id)
    picture.thumbnail((512, 512))
    axis.imshow(picture)
    question = "\n".join(textwrap.wrap(textwrap.shorten(example.question, 110), 24))
    axis.set_title(f"difficulty {level}, {example.complexity:.0f} tokens\n{question}", fontsize=8,
                   parse_math=False)  # a lone $ of a question would be an error


def place_of(ladder: str, out: Path | None) -> Path:
    """Where the picture of a ladder goes: a file; ladder.png of a folder; beside the ladder unless told."""
    if out is None:
        if not Path(ladder).exists():  # a hub id
            raise ValueError(f"{ladder} is no file or folder here, so there is no place beside it; give --out")
        out = Path(ladder) if Path(ladder).is_dir() else Path(ladder).parent
    if out.is_dir() or not out.suffix:
        out.mkdir(parents=True, exist_ok=True)
        return out / "ladder.png"
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw a run's answers, or a ladder.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    strip = kinds.add_parser("strip", help="one held-out problem's responses before, midway and last: RUN/strip.png")
    strip.add_argument("run", type=Path, help="folder of train.py")
    ladder = kinds.add_parser("ladder", help="levels, stages and examples of a ladder: ladder.png")
    ladder.add_argument("ladder", help="file, folder or hub id")
    ladder.add_argument("--out", type=Path, help="folder, or a file (default: beside the ladder)")
    args = parser.parse_args(argv)
    if args.kind == "strip":
        path = args.run / "strip.png"
        plot_strip(*read_strip(args.run), path)
    else:
        path = place_of(args.ladder, args.out)
        plot_ladder(load_records(args.ladder), path)
    print(f"-> {path}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
