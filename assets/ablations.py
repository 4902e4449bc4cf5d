"""The method piece by piece, with seeds, on the built-in world: runs what is missing, then makes the tables.

    pip install scikit-learn && python assets/ablations.py      # 2 cores: hours, see ablations/README.md
    python assets/ablations.py --tables                         # no runs: the tables of those that are kept
    python assets/ablations.py --again "Observe-R1 think"       # makes a row's runs anew

One change a row, the same 1,899 problems and 8 responses to each, the same 1,000 held-out problems of handwriting
never seen in training (the 300 of the built-in world are too few to tell rows apart). What a referee would ask next is
in SECOND, rows of other starts among them, some on the problems of the second world; what they are to show was noted
before, in ablations/plan.md.

It may be stopped and started again (one at a time): a finished run is not done again, a begun one goes on. Whole runs
lie in out/ablations.

What the tables are made of is kept in assets/ablations/runs.parquet, a record a run:

    row, seed      which run
    settings       its settings.json
    environment    its environment.json: commit, versions, machine
    scores         its scores.json: before and after training, greedy and sampled, without the single problems
    steps          a list of {step, stage, reward, accuracy, signal, ...}: its metrics.jsonl, in six digits (times in
                   three)
    answers        a list of {step, sampling, problem, difficulty, accuracy}: the held-out problems before and after
                   training, greedy and sampled; at each stage's end some of them, greedy
    groups         a list of {accuracy, format, tokens}, each a list over responses: the groups that were logged, two a
                   rollout
    pictures       of the rows in LOOKED, a list of {end, pictures, problem, accuracy}: the held-out problems before and
                   after training, greedy, with their pictures, grey ones and another problem's

Settings, environment and scores are JSON texts; `answers` unnested is the long table of row, seed, step, problem and
accuracy.

What the seeds can show, in four cases of five, between two rows at temperature 1. Of seeds 0 - 3 it was noted too late,
when seven of the runs were done, and as 3.4 points, by a normal approximation. They left bonus and weight within 3.8
points of nothing, with a spread over seeds of 1.3 points. So before seeds 4 - 7 were begun, which were to be taken
whatever they gave, it was noted that eight show 2.0 points: (2.145 + 0.868) * 1.3 * (2 / 8)^0.5, Student's t with 14
degrees. The tables' own intervals take 7 degrees a side and are wider: at this spread 2.2 points (four seeds: 3.9).
"""
from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from compare import Run, cell, compare_runs, difference, over_seeds, training_run  # noqa: E402

from data import load_records, number, save_records  # noqa: E402
from eval import PICTURES, markdown, other_pictures, read_json, tables, write_json  # noqa: E402
from rewards import Response, group_rewards  # noqa: E402
from train import as_kept, environment, parse_config  # noqa: E402

ROOT, OUT, KEPT = Path(__file__).resolve().parent.parent, Path("out/ablations"), Path("assets/ablations")
TOY, STEEP = Path("assets/toy"), Path("assets/steep")
WORLDS = {  # other starts, a row's word before the colon -> whose problems they are asked
    "steep": STEEP, "filler": STEEP, "terse": STEEP, "even": TOY, "longer": TOY, "steeper": STEEP, "large": TOY}
MADE = ("even", "longer", "steeper", "large")  # models too many, or too large, to be kept: made before their runs
MEASURED = ("steeper", "large")  # starts with a ladder of their own: of these problems, as hard as they are for them
RUNS, TEST, GREY = KEPT / "runs.parquet", OUT / "held-out/measured.parquet", OUT / "grey/ladder.parquet"
HELD_OUT = KEPT / "held-out.parquet"  # as it was measured for the first runs
SEEDS, FEWER = 8, {"again": 3, "even": 4, "longer": 4, "large": 4}  # of each row; of those with this word first
FIRST = {  # name -> what differs from the full method
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
SECOND = {  # noted in ablations/plan.md before they were begun
    "again: GRPO think random": "--order random --prompt think --bonus 0 --sigma 0",
    "again: Observe-R1 random": "--order random",
    "again: Observe-R1": "",
    "Observe-R1 review": "--order review",
    "Observe-R1 gaussian": "--order gaussian",
    "Observe-R1 adaptive": "--order adaptive",
    "random rewards": "--order random --bonus 0 --sigma 0 --random-rewards",
    "grey pictures": "--order random",  # on the ladder with grey ones
    "steep: Observe-R1": "",
    "steep: Observe-R1 random": "--order random",
    "steep: Observe-R1 review": "--order review",
    "steep: Observe-R1 reversed": "--order reverse",
    "steep: Observe-R1 think random": "--order random --prompt think",
    "filler: Observe-R1 think random": "--order random --prompt think",
    "filler: Observe-R1 random": "--order random",
    "terse: Observe-R1 think random": "--order random --prompt think",
    "terse: Observe-R1 random": "--order random",
    "even: GRPO think random": "--order random --prompt think --bonus 0 --sigma 0",
    "even: GRPO observe random": "--order random --bonus 0 --sigma 0",
    "longer: GRPO think random": "--order random --prompt think --bonus 0 --sigma 0",
    "longer: GRPO observe random": "--order random --bonus 0 --sigma 0",
    "steeper: Observe-R1 random": "--order random",
    "steeper: Observe-R1": "",
    "steeper: Observe-R1 review": "--order review",
    "steeper: Observe-R1 reversed": "--order reverse",
    "large: GRPO think random": "--order random --prompt think --bonus 0 --sigma 0",
    "large: Observe-R1 random": "--order random",
    "large: Observe-R1": "",
}
ROWS = FIRST | SECOND
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
    "remedies": ("first", ["Observe-R1 random", "Observe-R1", "Observe-R1 review", "Observe-R1 gaussian",
                           "Observe-R1 adaptive"]),
    "steep": ("first", ["steep: Observe-R1 random", "steep: Observe-R1", "steep: Observe-R1 review",
                        "steep: Observe-R1 reversed"]),
    "steeper": ("first", ["steeper: Observe-R1 random", "steeper: Observe-R1", "steeper: Observe-R1 review",
                          "steeper: Observe-R1 reversed"]),
    "tags": ("first", ["steep: Observe-R1 think random", "steep: Observe-R1 random"]),
    "filler": ("first", ["filler: Observe-R1 think random", "filler: Observe-R1 random"]),
    "terse": ("first", ["terse: Observe-R1 think random", "terse: Observe-R1 random"]),
    "even": ("first", ["even: GRPO think random", "even: GRPO observe random"]),
    "longer": ("first", ["longer: GRPO think random", "longer: GRPO observe random"]),
    "large": ("previous", ["large: GRPO think random", "large: Observe-R1 random", "large: Observe-R1"]),
    "coin": ("first", ["GRPO observe random", "random rewards"]),
    "grey": ("first", ["Observe-R1 random", "grey pictures"]),
}
PARTS = {"easy (0 - .25)": (0, .25), "middle": (.375, .625), "hard (.75 - 1)": (.75, 1)}  # difficulty, from and to
STAGED = tuple(row for row in ROWS if "--order" not in ROWS[row] or re.search("review|sorted|reverse", ROWS[row]))
STAGES = (  # rows whose way, stage by stage, is shown
    "GRPO observe ladder", "Observe-R1", "Observe-R1 sorted", "Observe-R1 reversed", "steep: Observe-R1",
    "steep: Observe-R1 reversed", "steeper: Observe-R1", "steeper: Observe-R1 reversed")
LOOKED = tuple(row for row in SECOND if row.startswith("again: ") or row in (
    "grey pictures", "steep: Observe-R1", "steep: Observe-R1 random", "steep: Observe-R1 think random"))


def name_of(row: str, seed: int) -> str:
    return f"{re.sub('[^A-Za-z0-9]+', '-', row).strip('-')}-seed{seed}"


# --- making runs ------------------------------------------------------------------------------------------------------


def make_held_out(count: int) -> None:
    """`count` problems of the test set's handwriting, measured by the shipped model as the ladder's were.

    The kept thousand are taken as they are: measured anew, with the seeds that curriculum.py has since, some would
    change level, and the runs' scores by level would not be of one kind.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    if count == 1000:
        TEST.parent.mkdir(exist_ok=True)
        shutil.copy(HELD_OUT, TEST)
        return
    from make_toy import load_glyphs, make_problem

    rng, (_, glyphs) = random.Random(1), load_glyphs()
    save_records(str(OUT / "held-out.parquet"), [make_problem(rng, glyphs, f"held-out-{i:04d}") for i in range(count)])
    measure(OUT / "held-out.parquet", TOY / "model", TEST.parent)


def measure(problems: Path, model: Path, out: Path, *more) -> None:
    """Difficulties, and a ladder, as the first world's were made."""
    log = out.with_suffix(".log")
    if run("curriculum.py", "--data", problems, "--model", model, "--out", out, "--keep-simple", "--max-tokens", 160,
           "--max-pixels", 64 * 28 * 28, *more, log=log):
        sys.exit(f"{problems} could not be measured: see {log}")


def run(*command, log: Path | None = None, threads: int | None = None) -> int:
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with open(log or os.devnull, "a") as file:
        return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, stdout=file,
                              stderr=subprocess.STDOUT).returncode


def world_of(row: str) -> str:
    """One of WORLDS; "": the first."""
    world = row.partition(": ")[0]
    return world if world in WORLDS else ""


def inputs_of(row: str) -> tuple[Path, Path, Path]:
    """Model, ladder and held-out problems of a row."""
    world = world_of(row)
    problems = WORLDS.get(world, TOY)
    folder = OUT / world if world in MADE else Path("assets") / (world or "toy")
    ladder = (folder if world in MEASURED else problems) / "ladder"
    if row == "grey pictures":
        ladder = GREY
    return folder / "model", ladder, TEST if problems == TOY else problems / "test.parquet"


def make_world(world: str) -> None:
    """A start that is too large to be kept, or one too many; what is there whole is taken as it is."""
    folder, log = OUT / world, OUT / f"{world}.log"
    if not (folder / "model/model.safetensors").exists() or (folder / f"making-{world}").exists():
        print(f"the model of {world}, see {log}", flush=True)
        if run("assets/make_toy.py", "--world", world, "--out", folder, log=log):
            sys.exit(f"the model of {world} could not be made: see {log}")
    if world in MEASURED and not (folder / "ladder/ladder.parquet").exists():
        theirs = load_records(str(WORLDS[world] / "ladder"))
        same = [replace(record, difficulty=None, complexity=None, stage=None) for record in theirs]
        save_records(str(folder / "problems.parquet"), same)
        # (All of them, but for a few where the levels are uneven.)
        measure(folder / "problems.parquet", folder / "model", folder / "ladder", "--low-complexity", 0, "--size",
                len(same))


def make_grey() -> None:
    """The first world's ladder with grey pictures of the same size."""
    GREY.parent.mkdir(parents=True, exist_ok=True)
    save_records(str(GREY), other_pictures(load_records(str(TOY / "ladder")), "none"))


# What the starting model's answers hang on, beside the commit: the code, both models and the held-out files.
SAME = ("model", "test", "prompt", "eval_samples", "max_response_tokens", "max_pixels")


def answered_before(folder: Path, command: list) -> None:
    """Give a new run the starting model's answers, where another run has them: they are the same whatever the seed.
    It then goes on as one that was killed after them."""
    settings, commit = as_kept(parse_config([*map(str, command)])), environment()["commit"]
    for scores in sorted(OUT.glob("*/scores.json")):
        if not (scores.parent / "environment.json").exists():
            continue  # a look's, not a whole run's
        theirs, answers = read_json(scores.parent / "settings.json"), scores.parent / "held-out"
        same = read_json(scores.parent / "environment.json")["commit"] == commit
        if same and all(theirs.get(key) == settings[key] for key in SAME):
            aside = folder.with_name(f"{folder.name}.part")  # (a kill leaves the whole folder or none)
            (aside / "held-out").mkdir(parents=True, exist_ok=True)
            write_json(aside / "settings.json", settings)
            for file in answers.glob("step000000-*.jsonl"):
                shutil.copy(file, aside / "held-out")
            aside.rename(folder)
            return


def command_of(row: str, seed: int) -> list:
    model, ladder, test = inputs_of(row)
    return ["--preset", "toy", "--model", model, "--data", ladder, *shlex.split(ROWS[row]), "--seed", seed,
            "--test", test, "--eval-limit", 100, "--save-every", 20, "--out", OUT / name_of(row, seed)]


def train(row: str, seed: int, threads: int) -> tuple[str, int]:
    """A run to its end, in out/ablations; one that is there is taken as it is."""
    name, command = name_of(row, seed), command_of(row, seed)
    if not (OUT / name).exists():
        answered_before(OUT / name, command)
    resume = ["--resume"] if (OUT / name / "settings.json").exists() else []
    if not (OUT / name / "scores.json").exists():
        print(f"{row}, seed {seed}{', resumed' if resume else ''}", flush=True)
        code = run("train.py", *command, *resume, log=OUT / f"{name}.log", threads=threads)
        if code or not (OUT / name / "scores.json").exists():
            sys.exit(f"{row}, seed {seed}, {'failed' if code else 'was stopped'}: see {OUT / name}.log")
    if row in LOOKED:
        newest = max((OUT / name).glob("checkpoint-*"), default=None)
        if newest is None:
            sys.exit(f"{OUT / name} has no checkpoint left, which is to be asked; move it away, and start again")
        look(row, newest, OUT / f"pictures-{name}", threads)
    return row, seed


def prompt_of(row: str) -> str:
    return "think" if "--prompt think" in ROWS[row] else "observe"


def start_of(row: str) -> Path:
    """Folder of what the starting model answers to given, grey and swapped pictures: the same for all of its rows."""
    return OUT / f"pictures-{inputs_of(row)[0].parent.name}-{prompt_of(row)}"


def look(row: str, model: Path, out: Path, threads: int) -> None:
    """A model's answers to the row's held-out problems with given, grey and swapped pictures."""
    if not (out / "scores.json").exists() and run(
            "eval.py", "--model", model, "--benchmark", inputs_of(row)[2], "--prompt", prompt_of(row), "--pictures",
            "given,none,swapped", "--temperature", 0, "--max-tokens", 160, "--out", out, log=OUT / f"{out.name}.log",
            threads=threads):
        sys.exit(f"no answers to other pictures: see {OUT / out.name}.log")


def make_runs(seeds: int, jobs: int) -> None:
    """All that are not kept yet, `jobs` at a time; each is kept when it ends."""
    done = finished()
    missing = [(row, seed) for seed in range(seeds) for row in ROWS if seed < seeds_of(row) and (row, seed) not in done]
    for world in MADE:
        if any(world_of(row) == world for row, _ in missing):
            make_world(world)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    for row in {row for row, _ in missing if row in LOOKED}:
        look(row, inputs_of(row)[0], start_of(row), os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(train, row, seed, threads) for row, seed in missing]
        try:
            for future in as_completed(futures):
                keep(*future.result())
        except BaseException:  # Ctrl-C too: the runs under way save and end, others do not begin
            pool.shutdown(cancel_futures=True)
            raise


def make_start() -> str:
    """Sharpening by itself: the starting model's scores, from its own temperature down to greedy."""
    scores = []
    for temperature in ("1", "0.6", "0.3", "0"):
        out = OUT / f"start-T{temperature}"
        samples = ["--samples", 4] if temperature != "0" else []
        if run("eval.py", "--model", TOY / "model", "--benchmark", TEST, "--prompt", "observe,think", "--max-tokens",
               160, "--temperature", temperature, *samples, "--out", out, log=OUT / "start.log"):
            sys.exit(f"no scores of the starting model: see {OUT / 'start.log'}")
        scores += json.loads((out / "scores.json").read_text())["scores"]
    return tables(scores).split("\n\n")[0]


# --- keeping them -----------------------------------------------------------------------------------------------------


def finished() -> set[tuple[str, int]]:
    """The runs that are kept."""
    if not RUNS.exists():
        return set()
    table = pq.read_table(RUNS, columns=["row", "seed"])
    return set(zip(table["row"].to_pylist(), table["seed"].to_pylist()))


def write_kept(table: pa.Table) -> None:
    """Aside and renamed: a kill leaves the old file or the new one."""
    aside = RUNS.with_suffix(".part")
    pq.write_table(table.combine_chunks(), aside, compression="zstd", compression_level=19)
    aside.replace(RUNS)


def keep(row: str, seed: int) -> None:
    """A finished run's record goes to the others."""
    record = record_of(row, seed, OUT / name_of(row, seed))
    table = pa.Table.from_pylist([record])
    if RUNS.exists():  # (permissive: where a run has no stage, or logs another metric, the column is none, or new)
        kept = pq.read_table(RUNS)
        for other in kept.filter(pc.equal(kept["row"], row)).slice(0, 1).to_pylist():
            then, now = (answered(each, "before", "greedy") for each in (other, record))
            if sum(then[problem] != now.get(problem) for problem in then) > len(then) / 50:
                sys.exit(f"{row}, seed {seed}, in {OUT / name_of(row, seed)} began from another model than the kept "
                         f"ones (a model made anew is another): make all of them with it, --again {row!r}")
        table = pa.concat_tables([kept, table], promote_options="permissive")
    RUNS.parent.mkdir(parents=True, exist_ok=True)
    write_kept(table)


def forget(row: str) -> None:
    """A row's runs, kept or not, so that they are made anew."""
    if RUNS.exists():
        table = pq.read_table(RUNS)
        write_kept(table.filter(pc.not_equal(table["row"], row)))
    name = re.sub(r"\d+$", "*", name_of(row, 0))
    for folder in [*OUT.glob(name), *OUT.glob(f"pictures-{name}")]:  # (the logs beside them too)
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()


def record_of(row: str, seed: int, folder: Path) -> dict:
    """What is kept of a run's folder: see the schema above."""
    metrics, responses = (read_lines(folder / name) for name in ("metrics.jsonl", "responses.jsonl"))
    scores = json.loads((folder / "scores.json").read_text())
    for end in scores.values():
        for summary in end.values():
            del summary["by_problem"]
    difficulty = {r.id: r.difficulty for r in load_records(str(inputs_of(row)[2]))}
    answers = []
    for line in metrics:
        for sampling, summary in line.get("eval", {}).items():
            answers += [{"step": line["step"], "sampling": sampling, "problem": problem,
                         "difficulty": difficulty[problem], "accuracy": accuracy}
                        for problem, accuracy in summary["by_problem"].items()]
    groups = []
    for _, group in itertools.groupby(responses, key=lambda line: (line["step"], line["id"])):
        lines = list(group)
        groups.append({name: [line[name] for line in lines] for name in ("accuracy", "format", "tokens")})
    pictures = []
    for end, answered in (("before", start_of(row)), ("after", OUT / f"pictures-{name_of(row, seed)}")):
        for summary in read_json(answered / "scores.json")["scores"] if row in LOOKED else []:
            pictures += [{"end": end, "pictures": summary["pictures"], "problem": problem, "accuracy": accuracy}
                         for problem, accuracy in summary["by_problem"].items()]
    return {"row": row, "seed": seed, "pictures": pictures, "settings": (folder / "settings.json").read_text(),
            "environment": (folder / "environment.json").read_text(), "scores": json.dumps(scores),
            "steps": [with_short_times(line) for line in metrics if "reward" in line], "answers": answers,
            "groups": groups}


def with_short_times(step: dict) -> dict:
    """A step's times in three digits: in six they are a third of the file, and say no more."""
    times = {name: float(f"{value:.3g}") for name, value in step.items()
             if name.startswith(("seconds_", "tokens_per_second")) and value is not None}
    return step | times


def read_lines(file: Path) -> list[dict]:
    """JSON lines, their numbers in six digits."""
    def digits(text: str) -> float:
        return float(f"{float(text):.6g}")

    return [json.loads(line, parse_float=digits) for line in file.read_text().splitlines()]


def load_runs(seeds: int = SEEDS) -> dict[str, list[dict]]:
    """The kept records of each row, seed after seed; see not_made for those that are not there. ValueError: none is."""
    runs: dict[str, list[dict]] = {row: [] for row in ROWS}
    kept = pq.read_table(RUNS).to_pylist() if RUNS.exists() else []
    for record in sorted(kept, key=lambda record: record["seed"]):
        if record["row"] in ROWS and record["seed"] < seeds:
            runs[record["row"]].append(record)
    if not any(runs.values()):
        raise ValueError(f"{RUNS} has no runs of these rows; make them: python assets/ablations.py")
    return runs


def seeds_of(row: str) -> int:
    return FEWER.get(row.partition(": ")[0], SEEDS)


def not_made(runs: dict[str, list[dict]], seeds: int = SEEDS) -> str:
    """What the tables lack, in a sentence; else ""."""
    lacking = [f"{row} ({len(runs[row])} of {min(seeds, seeds_of(row))})" for row in ROWS
               if len(runs[row]) < min(seeds, seeds_of(row))]
    return f"Seeds still to be made: {', '.join(lacking)}." if lacking else ""


def as_run(record: dict) -> Run:
    """A kept record as what its folder was to compare.py."""
    scores = json.loads(record["scores"])
    steps = [answer["step"] for answer in record["answers"]]
    for end, step in (("before", min(steps)), ("after", max(steps))):
        for sampling, summary in scores[end].items():
            summary["by_problem"] = {a["problem"]: a["accuracy"] for a in record["answers"]
                                     if a["step"] == step and a["sampling"] == sampling}
    logged = [{name: value for name, value in step.items() if value is not None} for step in record["steps"]]
    return training_run(Path(name_of(record["row"], record["seed"])), json.loads(record["settings"]), scores, logged)


# --- tables -----------------------------------------------------------------------------------------------------------


def side_by_side(runs: dict[str, list[dict]], name: str, picture: Path | None = None) -> str:
    """One of TABLES, of the rows that have runs."""
    against, rows = TABLES[name]
    kept = [as_run(record) for row in rows for record in runs[row]]
    return compare_runs(kept, against, picture) if kept else "None of these runs is made yet."


def mechanisms(runs: dict[str, list[dict]]) -> str:
    """What weight and bonus do to the advantages of the groups that the runs logged, by right answers in a group.

    method.md's two claims: |A| goes as (d (1 - d))^0.5, with the weight as its 1.5th power; with the weight, the bonus
    acts in mixed groups where two or more are right. (Without it, it acts most where all are.)
    """
    records = [record for row in FIRST for record in runs[row]]
    groups = torch.tensor([[group["accuracy"], group["format"], group["tokens"]]
                           for record in records for group in record["groups"]])  # [P, 3, G]
    judged = [[Response(None, a, f, None) for a, f in zip(*group[:2])] for group in groups.tolist()]
    right, G = groups[:, 0].sum(1), groups.shape[2]

    def advantages(bonus: float, sigma: float | None) -> torch.Tensor:
        return group_rewards(judged, groups[:, 2], bonus_coef=bonus, bonus_min_length=40, sigma=sigma).advantages

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
    return (f"{table}\n\n{len(groups)} groups, two a rollout, of {len(records)} runs. The bonus moves {moved[0]:.0f}% "
            f"of the sum of |A|, with the weight {moved[1]:.0f}%. Mean |A| goes as d (1 - d) to the power "
            f"{powers[0]:.2f}, with the weight {powers[1]:.2f}.")


LEADS = {  # start -> two rows that differ in the prompt alone, observe and think
    "the first world's": ("GRPO observe random", "GRPO think random"),
    "longer": ("longer: GRPO observe random", "longer: GRPO think random"),
    "even": ("even: GRPO observe random", "even: GRPO think random"),
    "steep": ("steep: Observe-R1 random", "steep: Observe-R1 think random"),
    "filler": ("filler: Observe-R1 random", "filler: Observe-R1 think random"),
    "terse": ("terse: Observe-R1 random", "terse: Observe-R1 think random"),
}


def leads(runs: dict[str, list[dict]]) -> str:
    """By how much observe is ahead of think, by start: before training, after, and what training added; of all
    held-out problems, and of sums. Where the first world's problems are asked, beside its own lead, paired by problem.

    A lead is taken seed by seed, and what lies between two of them by problem.
    """
    sums = {problems: {record.id for record in load_records(str(held_out)) if record.source == "toy/sum"}
            for problems, held_out in ((TOY, HELD_OUT), (STEEP, STEEP / "test.parquet"))}
    first, table = {}, []
    for start, rows in LEADS.items():
        problems = WORLDS.get(start, TOY)
        observe, think = (runs[row] for row in rows)
        pairs = [(one, other) for one in observe for other in think if one["seed"] == other["seed"]]
        if not pairs:
            continue
        for part, kind in itertools.product(("all", "sums"), ("sampled", "greedy")):
            only = sums[problems] if part == "sums" else None
            before, after = ([minus(*(answered(record, end, kind, only) for record in pair)) for pair in pairs]
                             for end in ("before", "after"))
            added = [minus(now, then) for now, then in zip(after, before)]
            line = [start, str(len(pairs)), f"{part}, {'T=1' if kind == 'sampled' else kind}"]
            line += [cell(difference(lead, []), "+") for lead in (before[:1], after, added)]  # (before, seeds are one)
            theirs = first.get((part, kind)) if problems == TOY else None
            line += [cell(difference(*two), "+") for two in zip((after, added), theirs)] if theirs else ["-", "-"]
            if start == "the first world's":
                first[part, kind] = after, added
            table.append(line)
    return markdown(["start", "seeds", "of", "before", "after", "added by training", "after, against the first",
                     "added, against the first"], table)


def answered(record: dict, end: str, kind: str, only: set[str] | None = None) -> dict[str, tuple[str, float]]:
    """As compare.difference wants it: what a run's problems came to before or after training, all or some."""
    first, last = ends_of(record)
    step = first if end == "before" else last
    return {a["problem"]: (a["problem"], a["accuracy"]) for a in record["answers"]
            if (a["step"], a["sampling"]) == (step, kind) and (only is None or a["problem"] in only)}


def by_stage(row: str, records: list[dict]) -> str:
    """Greedy accuracy of a row at the end of each of its stages, on the held-out problems that are answered at all of
    them, easy and hard ones (there are too few between), mean over seeds."""
    greedy = [answer for record in records for answer in record["answers"] if answer["sampling"] == "greedy"]
    asked: dict[int, set[str]] = {}  # step -> problems
    for answer in greedy:
        asked.setdefault(answer["step"], set()).add(answer["problem"])
    always = set.intersection(*asked.values())
    table = []
    for part in (part for part in PARTS if part != "middle"):
        low, high = PARTS[part]
        inside = [a for a in greedy if a["problem"] in always and low <= a["difficulty"] <= high]
        line = [f"{part}, %", str(len({a["problem"] for a in inside}))]
        for step in asked:
            line.append(f"{100 * np.mean([a['accuracy'] for a in inside if a['step'] == step]):.0f}")
        table.append(line)
    return markdown([f"{row}, after rollout", "problems", *map(str, asked)], table)


def by_difficulty(runs: dict[str, list[dict]]) -> str:
    """Held-out accuracy of every row after training, of easy, middling and hard problems, over seeds."""
    table = []
    for row in (row for row in ROWS if runs[row]):
        ends = [json.loads(record["scores"])["after"] for record in runs[row]]
        line = [row]
        for kind in ("sampled", "greedy"):
            for low, high in PARTS.values():
                means = [mean_between(end[kind]["levels"], low, high) for end in ends]
                line.append(over_seeds([100 * value for value in means]))
        table.append(line)
    return markdown(["row", *(f"{part}, {kind}, %" for kind in ("T=1", "greedy") for part in PARTS)], table)


def mean_between(levels: dict[str, dict], low: float, high: float) -> float:
    """Accuracy over the problems of difficulty low to high, from what is known of each level."""
    inside = [at for level, at in levels.items() if low <= float(level) <= high]
    return np.average([at["accuracy"] for at in inside], weights=[at["problems"] for at in inside])


def turnover(runs: dict[str, list[dict]]) -> str:
    """Correct-set turnover (2606.03087): of the held-out problems of a part, by greedy answers before and after
    training, the shares that were newly solved, newly lost and kept; means over seeds."""
    table = []
    for row in (row for row in ROWS if runs[row]):
        line = [row, str(len(runs[row]))]
        for part, kind in itertools.product(PARTS, TURNED):
            line.append(over_seeds(in_percent([turned_in(record, part, kind) for record in runs[row]])))
        world = world_of(row)
        base = runs.get(f"{world}: Observe-R1 random" if world else "Observe-R1 random")
        for part, kind in AGAINST_RANDOM:
            both = [[{problem: (problem, float(held)) for problem, held in turned_in(record, part, kind).items()}
                     for record in records] for records in (runs[row], base or [])]
            line.append(cell(difference(*both), "+") if base and base is not runs[row] else "-")
        table.append(line)
    return markdown(["row", "seeds", *(f"{part}: {kind}, %" for part in PARTS for kind in TURNED),
                     *(f"{part}: {kind}, against random order" for part, kind in AGAINST_RANDOM)], table)


def turned_in(record: dict, part: str, kind: str) -> dict[str, bool]:
    """Which held-out problems of a part were newly solved, newly lost or kept by a run's training."""
    return turned(*(greedy_at(record, step, *PARTS[part]) for step in ends_of(record)), kind)


def ends_of(record: dict) -> tuple[int, int]:
    steps = [answer["step"] for answer in record["answers"]]
    return min(steps), max(steps)


def greedy_at(record: dict, step: int, low: float = 0, high: float = 1) -> dict[str, bool]:
    """Which held-out problems of difficulty low to high were right at a step, greedily."""
    return {answer["problem"]: answer["accuracy"] > 0 for answer in record["answers"]
            if answer["step"] == step and answer["sampling"] == "greedy" and low <= answer["difficulty"] <= high}


TURNED = {"newly solved": (False, True), "newly lost": (True, False), "kept": (True, True)}  # right then, and now
AGAINST_RANDOM = (("easy (0 - .25)", "newly lost"), ("hard (.75 - 1)", "newly solved"))


def turned(then: dict[str, bool], now: dict[str, bool], kind: str) -> dict[str, bool]:
    """Which of the problems that both have."""
    return {problem: (then[problem], now[problem]) == TURNED[kind] for problem in then if problem in now}


def in_percent(sets: list[dict[str, bool]]) -> list[float]:
    return [100 * np.mean(list(each.values())) for each in sets]


def turnover_by_stage(row: str, records: list[dict]) -> str:
    """The same from one stage's end to the next, of the problems that are answered at all of them."""
    steps = sorted({answer["step"] for answer in records[0]["answers"]})
    asked = set.intersection(*(set(greedy_at(records[0], step)) for step in steps))
    table = []
    for then, now in itertools.pairwise(steps):
        line = [f"{then} to {now}"]
        for kind in TURNED:
            sets = [turned(greedy_at(record, then), greedy_at(record, now), kind) for record in records]
            line.append(over_seeds(in_percent(sets)))
        table.append(line)
    return markdown([f"{row}, rollouts ({len(asked)} problems)", *(f"{kind}, %" for kind in TURNED)], table)


def draw_turnover(runs: dict[str, list[dict]], path: Path) -> None:
    """Newly lost to the left, newly solved to the right, of easy and of hard problems; a bar a row."""
    rows = [row for row in ROWS if runs[row]]
    figure = Figure(figsize=(12, 1.5 + .3 * len(rows)), layout="constrained")
    for axis, part in zip(figure.subplots(1, 2, sharey=True), (part for part in PARTS if part != "middle")):
        for y, row in enumerate(rows):
            solved, lost = (np.mean(in_percent([turned_in(record, part, kind) for record in runs[row]]))
                            for kind in ("newly solved", "newly lost"))
            axis.barh(y, solved, color="C0", label=None if y else "newly solved")
            axis.barh(y, -lost, color="C3", label=None if y else "newly lost")
        axis.set(yticks=range(len(rows)), ylim=(len(rows) - .5, -.5), xlabel="% of the held-out problems of this part")
        axis.set_yticklabels(rows)
        axis.set_title(f"{part}, greedy, before to after training")
        axis.axvline(0, color="0.5", linewidth=.8)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def picture_use(runs: dict[str, list[dict]]) -> str:
    """Greedy accuracy with given, grey and swapped pictures, before and after training, and what training added to
    each, with differences paired by problem; and which share of the right answers survives the other picture."""
    table = []
    for row in (row for row in LOOKED if runs[row]):
        seen = {(end, kind): seen_with(runs[row], end, kind) for end in ("before", "after") for kind in PICTURES}
        for end in ("before", "after"):
            line = [row, str(len(runs[row])), end, cell(difference(seen[end, "given"], []))]
            for kind in PICTURES[1:]:
                pairs = list(zip(seen[end, "given"], seen[end, kind]))
                lost = [minus(*pair) for pair in pairs]
                line += [cell(difference(seen[end, kind], [])), cell(difference(lost, []), "+"),
                         over_seeds([survive(*pair) for pair in pairs])]
            table.append(line)
        gains = [cell(difference(seen["after", kind], seen["before", kind]), "+") for kind in PICTURES]
        table.append([row, str(len(runs[row])), "added by training", gains[0], gains[1], "", "", gains[2], "", ""])
    return markdown(["row", "seeds", "", "given, %", "none, %", "given - none", "right still, %", "swapped, %",
                     "given - swapped", "right still, %"], table)


def survive(given: dict, other: dict) -> float:
    """Of the problems that are right with their pictures, in percent: those that are right with other ones too."""
    return 100 * np.mean([other[problem][1] for problem, (_, accuracy) in given.items() if accuracy])


def minus(run: dict, other: dict) -> dict:
    """What one checkpoint's answers lose, problem by problem."""
    return {problem: (problem, accuracy - other[problem][1]) for problem, (_, accuracy) in run.items()}


def seen_with(records: list[dict], end: str, kind: str) -> list[dict]:
    """As compare.difference wants it, of each seed; before training the seeds are one."""
    found = [{a["problem"]: (a["problem"], a["accuracy"]) for a in record["pictures"]
              if (a["end"], a["pictures"]) == (end, kind)} for record in records]
    return found if end == "after" else found[:1]


def all_tables(runs: dict[str, list[dict]], pictures: Path | None = None, seeds: int = SEEDS) -> str:
    """tables.md. pictures: folder of the plots of the build-up and of the turnover."""
    parts = ["# The tables of the ablations", "Made by `python assets/ablations.py --tables` from runs.parquet; what "
             "they say is told in [README.md](README.md).", not_made(runs, seeds)]
    for name, (against, _) in TABLES.items():
        parts += [f"## {name}", f"Differences are from the {'row before' if against == 'previous' else 'first row'}.",
                  side_by_side(runs, name, pictures / "build-up.png" if pictures and name == "build-up" else None)]
    parts += ["## leads", "How far observe is ahead of think, in points, by start; a lead is taken seed by seed.",
              leads(runs)]
    parts += ["## levels", "Held-out accuracy after training, by difficulty; means over seeds, with their standard "
              "error.", by_difficulty(runs)]
    parts += ["## stages", "Greedy accuracy on the way, of the held-out problems that are answered at each stage's "
              "end, mean over seeds.",
              *(by_stage(row, runs[row]) for row in STAGES if runs[row])]
    parts += ["## turnover", "Of the held-out problems, by greedy answers: newly solved, newly lost and kept (right at "
              "both times); means over seeds, with their standard error. First from before training to after, then "
              "from one stage's end to the next.", turnover(runs),
              *(turnover_by_stage(row, runs[row]) for row in STAGED if runs[row])]
    parts += ["## pictures", "Greedy accuracy with the pictures given, none (grey, of the same size) and swapped "
              "(another problem's of the same shape); right still: of the problems that are right with their picture.",
              picture_use(runs)]
    if any(runs[row] for row in FIRST):
        parts += ["## mechanisms", "What weight and bonus do to the advantages A of a group, by its right answers.",
                  mechanisms(runs)]
    if pictures:
        draw_turnover(runs, pictures / "turnover.png")
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=number(int, 1), default=SEEDS,
                        help="seeds of each row, from 0 (some rows have fewer)")
    parser.add_argument("--held-out", type=number(int, 1), default=1000, help="held-out problems")
    parser.add_argument("--jobs", type=number(int, 1), default=2, help="runs at a time")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tables", action="store_true", help="make no runs, only the tables of those that are kept")
    which.add_argument("--again", choices=ROWS, metavar="ROW", help="forget the runs of a row, kept and in "
                       "out/ablations, and make them anew (stopped, go on without it)")
    args = parser.parse_args()
    os.chdir(ROOT)
    if not args.tables:
        if args.held_out != 1000 and finished():
            sys.exit(f"{RUNS} is of runs that were asked 1,000 problems: move it away, and all runs are made anew")
        if args.again:
            forget(args.again)
        if not TEST.exists():
            make_held_out(args.held_out)
        if (found := len(load_records(str(TEST)))) != args.held_out:
            sys.exit(f"{TEST} has {found} problems, not {args.held_out}: other ones want another folder, and all runs "
                     "anew")
        if not GREY.exists():
            make_grey()
        make_runs(args.seeds, args.jobs)
        (KEPT / "start.md").write_text(make_start() + "\n")
    text = all_tables(load_runs(args.seeds), KEPT, args.seeds)
    (KEPT / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
