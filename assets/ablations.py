"""The method piece by piece, with seeds, on the built-in world: runs what is missing, then draws the table.

    pip install scikit-learn && python assets/ablations.py          # 2 cores: see README for the hours it takes

One change a row, the same 1,899 problems and 8 responses to each, the same 1,000 held-out problems of handwriting
never seen in training (made here, for the 300 of the built-in world are too few to tell rows apart). It may be stopped
and started again: a finished run is not done again, a begun one goes on. Whole runs lie in out/ablations; what the
table is made of is kept in assets/ablations, with compare.md and compare.png, which `eval.py compare` makes of it.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

ROOT, OUT, KEPT = Path(__file__).resolve().parent.parent, Path("out/ablations"), Path("assets/ablations")
MODEL = "assets/toy/model"
TEST = OUT / "held-out/measured.parquet"
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
}


def name_of(row: str, seed: int) -> str:
    return f"{re.sub('[^A-Za-z0-9]+', '-', row).strip('-')}-seed{seed}"


def make_held_out(count: int) -> None:
    """`count` problems of the test set's handwriting, measured by the shipped model as the ladder's were."""
    from make_toy import load_glyphs, make_problem

    from data import save_records

    rng, (_, glyphs) = random.Random(1), load_glyphs()
    OUT.mkdir(parents=True, exist_ok=True)
    save_records(str(OUT / "held-out.parquet"), [make_problem(rng, glyphs, f"held-out-{i:04d}") for i in range(count)])
    run("curriculum.py", "--data", OUT / "held-out.parquet", "--model", MODEL, "--out", TEST.parent, "--keep-simple",
        "--max-tokens", 160, "--max-pixels", 64 * 28 * 28)


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
        code = run("train.py", *shlex.split(ROWS[row]), "--seed", seed, "--test", TEST, "--eval-limit", 100,
                   "--save-every", 20, "--out", OUT / name, *resume, log=OUT / f"{name}.log", threads=threads)
        if code:
            sys.exit(f"{row}, seed {seed} failed: see {OUT / name}.log")
    keep(OUT / name)


def keep(folder: Path) -> None:
    """What compare reads of a run, without the long lines; the scores last, for they say that all is there."""
    kept = KEPT / folder.name
    kept.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "environment.json"):
        shutil.copy(folder / file, kept)
    steps = [line for line in (folder / "metrics.jsonl").read_text().splitlines(True) if '"eval"' not in line]
    (kept / "metrics.jsonl").write_text("".join(steps))
    (kept / "scores.json").write_text(json.dumps(json.loads((folder / "scores.json").read_text())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=4, help="seeds of each row, from 0")
    parser.add_argument("--held-out", type=int, default=1000, help="held-out problems")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    os.chdir(ROOT)
    if not TEST.exists():
        make_held_out(args.held_out)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in [pool.submit(train, row, seed, threads) for seed in range(args.seeds) for row in ROWS]:
            done.result()
    # Sharpening by itself: the starting model, from its own temperature down to greedy.
    starts = [OUT / f"start-T{temperature}" for temperature in (1, 0.6, 0.3, 0)]
    for out in starts:
        temperature = out.name.removeprefix("start-T")
        run("eval.py", "--model", MODEL, "--benchmark", TEST, "--prompt", "observe,think", "--max-tokens", 160,
            "--temperature", temperature, *(["--samples", 4] if temperature != "0" else []), "--out", out,
            log=OUT / "start.log")
    runs = [KEPT / name_of(row, seed) for row in ROWS for seed in range(args.seeds)]
    for what, out in ((runs, KEPT), (starts, KEPT / "start")):
        run("eval.py", "compare", *what, "--out", out, log=OUT / "compare.log")
        print((out / "compare.md").read_text())


if __name__ == "__main__":
    main()
