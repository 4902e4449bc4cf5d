"""In what order: how hard a problem is, the ladder built from that, and where training stands on it.

    measure        8 rollouts a problem -> difficulty 1 - pass rate, complexity mean response length
    build_ladder   measured problems -> stages 0 .. 8, each mixed from a window of neighbouring difficulty levels
    Curriculum     the batches of one run, easy to hard, and its place among them

    torchrun curriculum.py --data raw.parquet --model MODEL --out ladder/

Departures and inferences (method.md, section 2):
  1. Stage sizes and "row = stage" are inferred from the paper's figure; the shares are read off it to +-.005.
  2. The order inside a stage is unknown; ours is a seeded shuffle. Where a level is shared out among stages, earlier
     stages take its less complex problems, as the paper sorts by difficulty, then complexity.
  3. "All records in exactly these shares" has no solution in general. Ours is the largest ladder that over-draws no
     level; beyond that size a scarce level gives what it has and the stage is filled from the rest of its window.
  4. The paper drops problems that are always solved and of low complexity, under a threshold it does not give; ours
     keeps them (they are 1.5% of the ladder) until the builder can be told a threshold.
  5. A stage's last batch is not dropped or padded: the stage is cut into batches that differ by at most one problem.
"""
from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np
from tqdm import tqdm

from data import PROMPTS, Processor, Record, check_prompts, load_records, save_records
from eval import evaluate
from rewards import check_golds
from rollout import best_device, load_policy

LEVELS = 9  # difficulty 0, 1/8, .. 1, for N = 8 rollouts

# Row = stage, column = difficulty level; read off the paper's figure, rows normalised.
MIXING = np.array([
    [.287, .177, .188, .188, .168, 0, 0, 0, 0],
    [.053, .495, .149, .155, .147, 0, 0, 0, 0],
    [.025, .078, .508, .168, .225, 0, 0, 0, 0],
    [0, .033, .070, .504, .209, .192, 0, 0, 0],
    [0, 0, .029, .070, .583, .184, .135, 0, 0],
    [0, 0, 0, .033, .102, .573, .147, .147, 0],
    [0, 0, 0, 0, .053, .115, .536, .176, .123],
    [0, 0, 0, 0, .020, .057, .098, .684, .143],
    [0, 0, 0, 0, .018, .045, .074, .151, .716],
])
MIXING /= MIXING.sum(axis=1, keepdims=True)

# Sizes of the stages that give back the paper's shares of the levels: solves STAGE_SHARES @ MIXING = level shares.
STAGE_SHARES = np.array([.040, .043, .054, .079, .110, .136, .155, .179, .204])
STAGE_SHARES /= STAGE_SHARES.sum()


def measure(model, processor: Processor, records: list[Record], *, style: str, max_tokens: int, samples: int = 8,
            temperature: float = 1.0, seed: int = 0, max_rows: int = 256) -> Iterator[Record]:
    """Yield each record with its difficulty (1 - correct / samples) and complexity (mean response length, tokens)."""
    for result in evaluate(model, processor, records, style=style, temperature=temperature, samples=samples,
                           max_tokens=max_tokens, max_rows=max_rows, seed=seed):
        yield replace(result.record, difficulty=1 - sum(s.correct for s in result.samples) / samples,
                      complexity=sum(s.tokens for s in result.samples) / samples)


def level_of(record: Record) -> int:
    """Difficulty level 0 .. 8. Raises ValueError for a record that was never measured."""
    if record.difficulty is None or record.complexity is None:
        raise ValueError(f"record {record.id} has no difficulty and complexity; measure it first: "
                         "torchrun curriculum.py --data FILE --model MODEL --out ladder/")
    return round(record.difficulty * (LEVELS - 1))


def allot(supply: np.ndarray, sizes: np.ndarray, mixing: np.ndarray) -> np.ndarray:
    """How many problems each stage takes from each level: [S] sizes, [L] supply -> [S, L] int.

    Shares of `mixing` as far as the supply goes; an over-drawn level is shared out in proportion, and its stages are
    filled from the rest of their windows. A stage falls short only when its whole window is empty.
    """
    want = sizes[:, None] * mixing
    drawn = want.sum(0)
    take = np.floor(want * np.minimum(1, supply / np.maximum(drawn, 1e-12)) + 1e-9).astype(int)
    # One problem at a time, to the level of the window that lags furthest behind its share.
    for stage in range(len(sizes)):
        while take[stage].sum() < sizes[stage]:
            open_levels = (mixing[stage] > 0) & (take.sum(0) < supply)
            if not open_levels.any():
                break
            lag = np.where(open_levels, want[stage] - take[stage], -np.inf)
            take[stage, lag.argmax()] += 1
    return take


def build_ladder(records: Iterable[Record], size: int | None = None, seed: int = 0, mixing: np.ndarray = MIXING,
                 stage_shares: np.ndarray = STAGE_SHARES) -> list[Record]:
    """Measured records in any order -> stage after stage, `.stage` set, no record twice; deterministic in `seed`.

    size: total; None takes the largest that over-draws no level (levels without any problem left aside).
    Every departure from the shares is printed to stderr. Raises ValueError for unmeasured records or too large a size.
    """
    by_level: list[list[Record]] = [[] for _ in range(LEVELS)]
    for record in sorted(records, key=lambda r: r.id):
        by_level[level_of(record)].append(record)
    supply = np.array([len(level) for level in by_level])
    shares = stage_shares @ mixing  # [L] of a whole ladder
    if size is None:
        size = int(min(s / share for s, share in zip(supply, shares) if s > 0) + 1e-9) if supply.any() else 0
    if not 0 < size <= supply.sum():
        raise ValueError(f"cannot build a ladder of {size} problems from {supply.sum()}")
    exact = size * stage_shares
    sizes = np.floor(exact).astype(int)
    sizes[np.argsort(sizes - exact, kind="stable")[:size - sizes.sum()]] += 1  # largest remainders
    take = allot(supply, sizes, mixing)
    for stage, wanted in enumerate(sizes):
        if (missing := wanted - take[stage].sum()) > 0:
            print(f"ladder: stage {stage} is {missing} problems short of {wanted}: its levels are used up",
                  file=sys.stderr)
        off = np.abs(take[stage] - wanted * mixing[stage])
        if off.max() > 1 + .02 * wanted:
            level = int(off.argmax())
            print(f"ladder: stage {stage} takes {take[stage, level]} of level {level} where its share asks for "
                  f"{wanted * mixing[stage, level]:.0f}", file=sys.stderr)

    rng = np.random.default_rng(seed)
    stages: list[list[Record]] = [[] for _ in sizes]
    for level, pool in enumerate(by_level):
        used = [pool[i] for i in sorted(rng.permutation(len(pool))[:take[:, level].sum()])]
        used.sort(key=lambda r: (r.complexity, r.id))
        for stage, count in enumerate(take[:, level]):
            stages[stage] += used[:count]
            used = used[count:]
    return [replace(stage[i], stage=k) for k, stage in enumerate(stages) for i in rng.permutation(len(stage))]


@dataclass(frozen=True)
class Batch:
    """The problems of one rollout."""

    stage: int | None  # None where the order knows no stages
    records: list[Record]
    ends_stage: bool


class Curriculum:
    """The batches of one run, in order, never across two stages; iterating goes on from where it stands.

    order: ladder (stages easy to hard) | reverse (stages hard to easy) | sorted (by difficulty, then complexity,
    without mixing: a stage is a level) | random (all shuffled, no stages; the only one for unmeasured data).
    stages: which stages to take; None for all. Inside a stage of ladder and reverse the shuffle is seeded.
    """

    def __init__(self, records: list[Record], batch_size: int, order: str = "ladder", stages: range | None = None,
                 seed: int = 0):
        if order == "random":
            if stages is not None:
                raise ValueError("--order random knows no stages; leave --stage at all")
            blocks = {None: list(records)}
        else:
            blocks = {}
            for record in records:
                stage = level_of(record) if order == "sorted" else record.stage
                if stage is None:
                    raise ValueError(f"record {record.id} is on no stage of a ladder; build one with curriculum.py, "
                                     "or train on the data as it is with --order random")
                blocks.setdefault(stage, []).append(record)
            if stages is not None and (missing := [s for s in stages if s not in blocks]):
                raise ValueError(f"the data has no stage {missing[0]}; its stages are {sorted(blocks)}")
            kept = [s for s in sorted(blocks, reverse=order == "reverse") if stages is None or s in stages]
            blocks = {stage: blocks[stage] for stage in kept}
        self.batches: list[Batch] = []
        for stage, block in blocks.items():
            if order == "sorted":
                block = sorted(block, key=lambda r: (r.difficulty, r.complexity, r.id))
            else:  # (a stage's shuffle does not depend on which other stages are taken)
                rng = np.random.default_rng([seed, 0 if stage is None else stage + 1])
                block = [block[i] for i in rng.permutation(len(block))]
            parts = np.array_split(np.arange(len(block)), -(-len(block) // batch_size))
            self.batches += [Batch(stage, [block[i] for i in part], part is parts[-1]) for part in parts]
        self.position = 0  # batches already used

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        while self.position < len(self.batches):
            batch = self.batches[self.position]
            self.position += 1
            yield batch

    def digest(self) -> str:
        """Changes with any change of the problems, their order or the batches."""
        text = "\n".join(f"{b.stage} {r.id} {r.question} {r.answer}" for b in self.batches for r in b.records)
        return hashlib.sha256(f"{len(self)}\n{text}".encode()).hexdigest()[:16]

    def state_dict(self) -> dict:
        return {"position": self.position, "digest": self.digest()}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError when the data or its order is not what the state was saved with."""
        if state["digest"] != self.digest():
            raise ValueError("the training data, its order or the batch size changed since the checkpoint was saved; "
                             "resume with what the run began with, or start a new run")
        self.position = state["position"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure problems by a model's own rollouts and build a ladder.")
    parser.add_argument("--data", required=True, nargs="+", help="files, folders or hub ids that data.py reads")
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub id that measures")
    parser.add_argument("--out", required=True, type=Path, help="folder of the ladder")
    parser.add_argument("--size", type=int, help="problems on the ladder (default: all that the shares allow)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", choices=sorted(PROMPTS), default="observe", help="prompt style")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest response")
    parser.add_argument("--rows", type=int, default=256, help="responses sampled at a time; less saves memory")
    parser.add_argument("--max-pixels", type=int, help="area above which pictures are shrunk")
    args = parser.parse_args()
    records = [record for path in args.data for record in load_records(path)]
    if twice := [record_id for record_id, n in Counter(r.id for r in records).items() if n > 1]:
        raise ValueError(f"the id {twice[0]!r} stands in more than one file of --data; ids must be unique")
    records = check_golds(records)
    if any(r.difficulty is None for r in records):
        processor = Processor(args.model, args.max_pixels)
        records = check_prompts(processor, records, args.prompt)
        model = load_policy(args.model, best_device())
        measured = measure(model, processor, records, style=args.prompt, temperature=args.temperature,
                           max_tokens=args.max_tokens, max_rows=args.rows, seed=args.seed)
        records = list(tqdm(measured, total=len(records), desc="measuring", unit="problem"))
        save_records(str(args.out / "measured.parquet"), records)  # a ladder of other shares can be built from it
    ladder = build_ladder(records, args.size, args.seed)
    save_records(str(args.out / "ladder.parquet"), ladder)
    table = np.zeros((LEVELS, LEVELS), int)
    for record in ladder:
        table[record.stage, level_of(record)] += 1
    print(f"{args.out / 'ladder.parquet'}: {len(ladder)} of {len(records)} problems\nstage  size   level 0 .. 8")
    for stage, row in enumerate(table):
        print(f"{stage:5d} {row.sum():5d}   " + " ".join(f"{n:4d}" for n in row))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
