"""The method piece by piece, with seeds, on the built-in world: runs what is missing, then draws the table.

    pip install scikit-learn && python assets/ablations.py          # 2 cores: see README for the hours it takes

One change a row, the same 1,899 problems and 8 responses to each, the same 1,000 held-out problems of handwriting
never seen in training (the 300 of the built-in world are too few to tell rows apart). It may be stopped and started
again: a finished run is not done again, a begun one goes on. Whole runs lie in out/ablations; what the tables are made
of is kept in assets/ablations, with the tables and plots that `eval.py compare` makes of it.

What the seeds can show, in four cases of five, between two rows at temperature 1. Of seeds 0 - 3 it was noted too late,
when seven of the runs were done, and as 3.4 points, by a normal approximation. They left bonus and weight within 3.8
points of nothing, with a spread over seeds of 1.3 points. So before seeds 4 - 7 were begun, which were to be taken
whatever they gave, it was noted that eight show 2.0 points: (2.145 + 0.868) * 1.3 * (2 / 8)^0.5, Student's t with 14
degrees. The tables' own intervals take 7 degrees a side and are wider: at this spread 2.2 points (four seeds: 3.9).
"""
from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from data import load_records, save_records  # noqa: E402
from eval import markdown, over_seeds, tables  # noqa: E402
from rewards import Score, group_rewards  # noqa: E402

ROOT, OUT, KEPT = Path(__file__).resolve().parent.parent, Path("out/ablations"), Path("assets/ablations")
MODEL, LADDER = "assets/toy/model", "assets/toy/ladder"
TEST = OUT / "held-out/measured.parquet"
SEEDS = 8  # of each row
ROWS = {  # name -> what differs from the full method
    "rejection sampling": "--order random --rejection-sampling",
    "GRPO think random": "--order random --prompt think --bonus 0 --sigma 0",
    "GRPO observe random": "--order random --bonus 0 --sigma 0",
    "GRPO observe ladder": "--bonus 0 --sigma 0",
    "GRPO observe ladder bonus": "--sigma 0",
    "Observe-R1": "",  # + the difficulty weight
    "Observe-R1 think": "--prompt think",
    "Observe-R1 random": "--order random",
    "Observe-R1 without bonus": "--bonus 0",
    "Observe-R1 sorted": "--order sorted",  # without mixing
    "Observe-R1 reversed": "--order reverse",
    "GRPO observe random, constant lr": "--order random --bonus 0 --sigma 0 --schedule constant",
    "GRPO observe ladder, constant lr": "--bonus 0 --sigma 0 --schedule constant",
}
# Tables: what a row's difference is from, and the rows. GRPO with ladder and bonus is Observe-R1 without its weight.
TABLES = {
    "build-up": ("previous", ["GRPO think random", "GRPO observe random", "GRPO observe ladder",
                              "GRPO observe ladder bonus", "Observe-R1"]),
    "take-away": ("first", ["Observe-R1", "Observe-R1 think", "Observe-R1 random", "Observe-R1 without bonus",
                            "GRPO observe ladder bonus", "Observe-R1 sorted", "Observe-R1 reversed"]),
    "order": ("first", ["Observe-R1 random", "Observe-R1", "Observe-R1 sorted", "Observe-R1 reversed"]),
    "control": ("first", ["rejection sampling", "GRPO observe random", "Observe-R1 random", "Observe-R1"]),
    "constant-lr": ("previous", ["GRPO observe random", "GRPO observe ladder", "GRPO observe ladder, constant lr",
                                 "GRPO observe random, constant lr"]),
}
PARTS = {"easy (0 - .25)": (0, .25), "middle": (.375, .625), "hard (.75 - 1)": (.75, 1)}  # difficulty, from and to
STAGES = ("GRPO observe ladder", "Observe-R1", "Observe-R1 sorted", "Observe-R1 reversed")  # rows with stages to show


def name_of(row: str, seed: int) -> str:
    return f"{re.sub('[^A-Za-z0-9]+', '-', row).strip('-')}-seed{seed}"


def kept(row: str, seeds: int = SEEDS) -> list[Path]:
    return [KEPT / name_of(row, seed) for seed in range(seeds)]


def make_held_out(count: int) -> None:
    """`count` problems of the test set's handwriting, measured by the shipped model as the ladder's were.

    The kept thousand are taken as they are: measured anew, with the seeds that curriculum.py has since, some would
    change level, and the runs' scores by level would not be of one kind.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    if count == 1000:
        TEST.parent.mkdir(exist_ok=True)
        shutil.copy(KEPT / "held-out.parquet", TEST)
        return
    from make_toy import load_glyphs, make_problem

    rng, (_, glyphs) = random.Random(1), load_glyphs()
    save_records(str(OUT / "held-out.parquet"), [make_problem(rng, glyphs, f"held-out-{i:04d}") for i in range(count)])
    if run("curriculum.py", "--data", OUT / "held-out.parquet", "--model", MODEL, "--out", TEST.parent, "--keep-simple",
           "--max-tokens", 160, "--max-pixels", 64 * 28 * 28, log=OUT / "held-out.log"):
        sys.exit(f"the held-out problems could not be measured: see {OUT / 'held-out.log'}")


def run(*command, log: Path | None = None, threads: int | None = None) -> int:
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with open(log or os.devnull, "a") as file:
        return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, stdout=file,
                              stderr=subprocess.STDOUT).returncode


def train(row: str, seed: int, threads: int) -> None:
    name = name_of(row, seed)
    if (KEPT / name / "scores.json").exists():
        return
    resume = ["--resume"] if (OUT / name / "config.json").exists() else []
    if not (OUT / name / "scores.json").exists():
        print(f"{row}, seed {seed}{', resumed' if resume else ''}", flush=True)
        code = run("train.py", "--model", MODEL, "--data", LADDER, *shlex.split(ROWS[row]), "--seed", seed,
                   "--test", TEST, "--eval-limit", 100, "--save-every", 20, "--out", OUT / name, *resume,
                   log=OUT / f"{name}.log", threads=threads)
        if code or not (OUT / name / "scores.json").exists():
            sys.exit(f"{row}, seed {seed}, {'failed' if code else 'was stopped'}: see {OUT / name}.log")
    keep(OUT / name)


def keep(folder: Path) -> None:
    """What the tables are made of, in six digits; the scores last, for they say that all is there."""
    difficulty = {r.id: r.difficulty for r in load_records(str(TEST))}
    to = KEPT / folder.name
    to.mkdir(parents=True, exist_ok=True)

    def lines(file: str) -> list[dict]:
        digits = lambda text: float(f"{float(text):.6g}")  # noqa: E731
        return [json.loads(line, parse_float=digits) for line in (folder / file).read_text().splitlines()]

    groups = [[[r[name] for r in line["responses"]] for name in ("accuracy", "format", "tokens")]
              for line in lines("responses.jsonl")]  # two groups a step are logged
    steps = lines("metrics.jsonl")
    found = {line["step"]: line["eval"]["greedy"]["by_problem"] for line in steps if "eval" in line}
    ids = min(found.values(), key=len)  # --eval-limit's; both ends of training answer more
    for line in steps:
        if "eval" in line:
            del line["eval"], line["shown"]
            line["held_out"] = [[difficulty[i], found[line["step"]][i]] for i in ids]
    for file in ("config.json", "environment.json"):
        shutil.copy(folder / file, to)
    (to / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    (to / "groups.json").write_text(json.dumps(groups))
    (to / "scores.json").write_text(json.dumps(json.loads((folder / "scores.json").read_text())))


def mechanisms(seeds: int = SEEDS) -> str:
    """What weight and bonus do to the advantages of the groups that the runs logged, by right answers in a group.

    method.md's two claims: |A| goes as (d (1 - d))^0.5, with the weight as its 1.5th power; with the weight, the bonus
    acts in mixed groups where two or more are right. (Without it, it acts most where all are.)
    """
    files = [run / "groups.json" for row in ROWS for run in kept(row, seeds)]
    groups = torch.tensor([group for file in files for group in json.loads(file.read_text())])  # [P, 3, G]
    scores = [[Score(None, a, f, None) for a, f in zip(*group[:2])] for group in groups.tolist()]
    right, G = groups[:, 0].sum(1), groups.shape[2]

    def advantages(bonus: float, sigma: float | None) -> torch.Tensor:
        return group_rewards(scores, groups[:, 2], bonus_coef=bonus, bonus_min_length=40, sigma=sigma).advantages

    plain, weighted = advantages(0, None), advantages(0, 1.8)
    acts, acts_weighted = advantages(.2, None) - plain, advantages(.2, 1.8) - weighted
    rows, d = [], np.arange(1, G) / G
    for k in range(G + 1):
        at = right == k
        size = [x[at].abs().mean().item() for x in (plain, weighted, acts, acts_weighted)]
        share = [100 * (x[at].abs().sum() / x.abs().sum()).item() for x in (plain, weighted)]
        rows.append([f"{k} of {G}", f"{100 * at.float().mean().item():.1f}", *(f"{x:.2f}" for x in size[:2]),
                     *(f"{x:.1f}" for x in share), *(f"{x:.3f}" for x in size[2:])])
    means = np.array([[x[right == k].abs().mean().item() for k in range(1, G)] for x in (plain, weighted)])
    powers = np.polyfit(np.log(d * (1 - d)), np.log(means).T, 1)[0]
    table = markdown(["right", "groups, %", "mean abs A", "with weight", "share of all, %", "with weight, %",
                      "bonus changes A by", "with weight by"], rows)
    moved = [100 * (now.abs().sum() / x.abs().sum()).item() for now, x in ((acts, plain), (acts_weighted, weighted))]
    return (f"{table}\n\n{len(groups)} groups, two a rollout, of {len(files)} runs. The bonus moves {moved[0]:.0f}% "
            f"of the sum of |A|, with the weight {moved[1]:.0f}%. Mean |A| goes as d (1 - d) to the power "
            f"{powers[0]:.2f}, with the weight {powers[1]:.2f}.\n")


def by_stage(row: str, seeds: int = SEEDS) -> str:
    """Greedy accuracy of a row at the end of each of its stages, on the held-out problems that are answered there, easy
    and hard ones (there are too few between), mean over seeds."""
    found: dict[int, list] = {}  # step -> (difficulty, right)
    for run in kept(row, seeds):
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
            if "held_out" in line:
                found.setdefault(line["step"], []).extend(line["held_out"])
    table = []
    for part in (part for part in PARTS if part != "middle"):
        low, high = PARTS[part]
        inside = [[right for difficulty, right in at if low <= difficulty <= high] for at in found.values()]
        table.append([f"{part}, %", str(len(inside[0]) // seeds), *(f"{100 * np.mean(at):.0f}" for at in inside)])
    return markdown([f"{row}, after rollout", "problems", *map(str, found)], table)


def by_difficulty(seeds: int = SEEDS) -> str:
    """Held-out accuracy of every row after training, of easy, middling and hard problems, over seeds."""
    table = []
    for row in ROWS:
        ends = [json.loads((run / "scores.json").read_text())["after"] for run in kept(row, seeds)]
        table.append([row])
        for kind in ("sampled", "greedy"):
            for low, high in PARTS.values():
                levels = [[at for level, at in end[kind]["levels"].items() if low <= float(level) <= high]
                          for end in ends]
                means = [np.average([at["accuracy"] for at in each], weights=[at["problems"] for at in each])
                         for each in levels]
                table[-1].append(over_seeds([100 * value for value in means]))
    return markdown(["row", *(f"{part}, {kind}, %" for kind in ("T=1", "greedy") for part in PARTS)], table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds of each row, from 0")
    parser.add_argument("--held-out", type=int, default=1000, help="held-out problems")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    os.chdir(ROOT)
    if not TEST.exists():
        make_held_out(args.held_out)
    if (found := len(load_records(str(TEST)))) != args.held_out:
        sys.exit(f"{TEST} has {found} problems, not {args.held_out}: other ones want another folder, and all runs anew")
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(train, row, seed, threads) for seed in range(args.seeds) for row in ROWS]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:  # Ctrl-C too: the runs under way save and end, others do not begin
            pool.shutdown(cancel_futures=True)
            raise
    # Sharpening by itself: the starting model, from its own temperature down to greedy.
    starts = [OUT / f"start-T{temperature}" for temperature in (1, 0.6, 0.3, 0)]
    for out in starts:
        temperature = out.name.removeprefix("start-T")
        if run("eval.py", "--model", MODEL, "--benchmark", TEST, "--prompt", "observe,think", "--max-tokens", 160,
               "--temperature", temperature, *(["--samples", 4] if temperature != "0" else []), "--out", out,
               log=OUT / "start.log"):
            sys.exit(f"no scores of the starting model: see {OUT / 'start.log'}")
    for name, (against, rows) in TABLES.items():
        folders = [run for row in rows for run in kept(row, args.seeds)]
        if run("eval.py", "compare", *folders, "--out", KEPT / name, "--against", against, log=OUT / "compare.log"):
            sys.exit(f"no table: see {OUT / 'compare.log'}")
        print((KEPT / name / "compare.md").read_text())
    scores = [score for out in starts for score in json.loads((out / "scores.json").read_text())["scores"]]
    stages = [by_stage(row, args.seeds) for row in STAGES]
    for file, text in (("start.md", tables(scores).split("\n\n")[0] + "\n"), ("mechanisms.md", mechanisms(args.seeds)),
                       ("levels.md", by_difficulty(args.seeds) + "\n"),
                       ("stages.md", "\n\n".join(stages) + "\n")):
        (KEPT / file).write_text(text)
        print(text)


if __name__ == "__main__":
    main()
