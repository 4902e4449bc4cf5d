"""In what order: how hard a problem is, the ladder built from that, and where training stands on it.

    measure        a problem and its 8 rollouts (eval.roll_out) -> difficulty 1 - pass rate, complexity mean length
    build_ladder   measured problems -> stages 0 .. 8, each mixed from a window of neighbouring difficulty levels
    Curriculum     the batches of one run, easy to hard, and its place among them
    write_review   problems that no rollout solved, for a person to check their golds; apply_review: what was decided

    torchrun curriculum.py --data raw/*.parquet --model MODEL --out ladder/        # killed: the same command goes on
    python curriculum.py --data ladder/measured.parquet --out ladder/ --corrections ladder/review.csv --size 20000
    python curriculum.py show ladder/ladder.parquet

Departures and inferences:
  1. Stage sizes and "row = stage" are inferred from the paper's figure; the shares are read off it to +-.005.
  2. The order inside a stage is unknown; ours is a seeded shuffle. Where a level is shared out among stages, earlier
     stages take its less complex problems, as the paper sorts by difficulty, then complexity.
  3. "All records in exactly these shares" has no solution in general. Ours is the largest ladder that over-draws no
     level; beyond that size a scarce level gives what it has and the stage is filled from the rest of its window.
  4. The threshold under which the paper drops always solved problems is not given (its figure drops 2 and 23 tokens,
     and keeps 56); ours drops the least complex tenth of them (--low-complexity), or those under --min-complexity.
  5. A stage's last batch is not dropped or padded: the stage is cut into batches that differ by at most one problem.
  6. The paper's simple-question filter asks a "small MLLM", not named; ours asks the measuring model unless told
     another. A direct answer gets 128 tokens: what is cut off there was not simple.
  7. The paper reviews all never-solved problems by hand. Here rows of the review without a decision stay on the
     ladder, as without any review, and the card says how many golds nobody looked at.
  8. The paper measures with a plain prompt (--prompt steps) and a model that it does not name; ours with the prompt and
     the model that will be trained: its own pass rate is what the weight w(d) will see.
  9. A batch is of one stage; the official loader's batches cross the borders.
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import io
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from huggingface_hub import DatasetCardData
from tqdm import tqdm

from data import (DATASETS, PROMPTS, SOURCES, TINY, Processor, Record, batches, check_records, load_records, number,
                  parsed, raise_or_skip, read_cells, run_program, save_records, told_apart)
from eval import (FREE, Result, begun, claim, data_digest, markdown, model_digest, read_json, render, roll_out,
                  section_of, vote, write_json, write_page)
from rewards import answer_matches, gold_fault, parse_number
from rollout import load_to_sample, on_rank_0, rank_and_world, start_processes, stop_processes

SAMPLES = 8  # N, rollouts a problem
DIRECT_TOKENS = 128  # of a direct answer
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

# --- measuring --------------------------------------------------------------------------------------------------------

def with_rollouts(record: Record, rollouts: list[dict]) -> Record:
    """The record with difficulty 1 - accuracy over its N rollouts and complexity, their mean length in tokens."""
    return replace(record, difficulty=1 - sum(r["accuracy"] for r in rollouts) / len(rollouts),
                   complexity=sum(r["tokens"] for r in rollouts) / len(rollouts),
                   meta=record.meta | {"rollouts": rollouts})


def measure(result: Result) -> Record:
    """A problem's record with its difficulty, its complexity and, in meta["rollouts"], what they were counted from."""
    assert isinstance(result.record, Record)  # (none was dropped: all were checked)
    return with_rollouts(result.record, [
        {"answer": r.answer, "accuracy": r.accuracy, "tokens": r.tokens} for r in result.responses])


# --- the ladder -------------------------------------------------------------------------------------------------------

def is_raw(record: Record) -> bool:
    """Was it never measured?"""
    return record.difficulty is None or record.complexity is None


def level_of(record: Record) -> int:
    """Difficulty level 0 .. 8. Raises ValueError for a record that was never measured."""
    if is_raw(record):
        raise ValueError(f"record {record.id} has no difficulty and complexity; measure it first: "
                         "torchrun curriculum.py --data FILE --model MODEL --out ladder/")
    return round((record.difficulty or 0) * (LEVELS - 1))


def low_complexity_cut(records: list[Record], quantile: float, least: float = 0.0) -> list[Record]:
    """The records without those of level 0 whose complexity is below this quantile of their level's, or `least`."""
    easy = [r.complexity or 0.0 for r in records if level_of(r) == 0]
    floor = max(least, np.quantile(easy, quantile)) if easy else 0
    return [r for r in records if level_of(r) > 0 or (r.complexity or 0.0) >= floor]


def stage_sizes(size: int, stage_shares: np.ndarray = STAGE_SHARES) -> np.ndarray:
    """[S] int, in the proportion of stage_shares by largest remainders, together `size`."""
    exact = size * stage_shares
    sizes = np.floor(exact).astype(int)
    sizes[np.argsort(sizes - exact, kind="stable")[:size - sizes.sum()]] += 1
    return sizes


def largest_size(supply: np.ndarray, mixing: np.ndarray = MIXING,
                 stage_shares: np.ndarray = STAGE_SHARES) -> tuple[int, int]:
    """The size of the largest ladder that over-draws no level of [L] supply, empty levels aside; the level that limits
    it."""
    sizes = np.where(supply > 0, supply / (stage_shares @ mixing), np.inf)
    return int(min(sizes.min() + 1e-9, supply.sum())), int(sizes.argmin())


def allot(supply: np.ndarray, sizes: np.ndarray, mixing: np.ndarray) -> np.ndarray:
    """How many problems each stage takes from each level: [S] sizes, [L] supply -> [S, L] int.
    Shares of `mixing` as far as the supply goes; an over-drawn level is shared out in proportion, and its stages are
    filled from the rest of their windows. A stage falls short only when its whole window is empty."""
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
    if size is None:
        size = largest_size(supply, mixing, stage_shares)[0]
    if not 0 < size <= supply.sum():
        raise ValueError(f"cannot build a ladder of {size} problems from {supply.sum()}")
    sizes = stage_sizes(size, stage_shares)
    take = allot(supply, sizes, mixing)
    if not take.any():
        raise ValueError(f"none of the {supply.sum()} problems is of a level that a ladder of {size} takes from; bring "
                         "problems of other levels, or more of them")
    for line in off_shares(take, sizes, mixing):
        print(f"ladder: {line}", file=sys.stderr)

    rng = np.random.default_rng(seed)
    stages: list[list[Record]] = [[] for _ in sizes]
    for level, pool in enumerate(by_level):
        used = sorted(shuffled(pool, rng)[:take[:, level].sum()], key=lambda r: (r.complexity, r.id))
        for stage, count in enumerate(take[:, level]):
            stages[stage] += used[:count]
            used = used[count:]
    return [replace(record, stage=k) for k, stage in enumerate(stages) for record in shuffled(stage, rng)]


def shuffled(records: list[Record], rng: np.random.Generator) -> list[Record]:
    return [records[i] for i in rng.permutation(len(records))]


# --- the order of training --------------------------------------------------------------------------------------------

DRAWN = ("gaussian", "adaptive")  # orders whose batches are drawn from all problems
REVIEWED = 0.25  # share of a stage that gives way to problems of the stages before it
BELL = 4.0  # levels, standard deviation: at the end the easiest level still has 14% of the hardest one's chance
NEWS, LEAST = 0.1, 0.01  # what one problem moves its level's running pass rate by; added to p (1 - p)

@dataclass(frozen=True)
class Batch:
    """The problems of one rollout."""

    stage: int | None  # None where the order knows no stages
    records: list[Record]
    ends_stage: bool


def blocks_of(records: list[Record], order: str, stages: range | None) -> list[tuple[int | None, list[Record]]]:
    """The problems of each stage, in the order in which the stages are trained on. Raises ValueError, with the remedy,
    where the records or the order have no such stages."""
    if order in ("random", *DRAWN):
        if stages is not None:
            raise ValueError(f"--order {order} knows no stages; leave --stage at all")
        return [(None, records)]
    blocks: dict[int, list[Record]] = {}
    for record in records:
        stage = level_of(record) if order == "sorted" else record.stage
        if stage is None:
            raise ValueError(f"record {record.id} is on no stage of a ladder; build one with curriculum.py, or train "
                             "on the data as it is with --order random")
        blocks.setdefault(stage, []).append(record)
    taken = blocks if stages is None else stages
    if missing := [stage for stage in taken if stage not in blocks]:
        raise ValueError(f"the data has no stage {missing[0]}; its stages are {sorted(blocks)}")
    return [(stage, blocks[stage]) for stage in sorted(taken, reverse=order == "reverse")]


class Curriculum:
    """The batches of one run, in order, never across two stages; iterating goes on from where it stands.

    order:
        ladder, reverse     stages easy to hard, or hard to easy; inside a stage a seeded shuffle
        sorted              by difficulty, then complexity, without mixing: a stage is a level
        random              all shuffled, no stages; the only one for unmeasured data
        review              the ladder, where a quarter of each stage gives way to problems of those walked before,
                            against the forgetting of what was solved (2606.03087)
        gaussian            no stages; levels are drawn by a bell whose mean rises from the easiest to the hardest, and
                            which leaves all of them a chance (E2H-G, 2506.06632, with a wider bell)
        adaptive            no stages; problems are drawn by p (1 - p), p the running pass rate of their level
    In the last two any problem may come again, or never; in a batch each is once. stages: which to take; None for all.
    epochs: walks through them. A new order: its stages in blocks_of, in a stage here, its name in train.Config."""

    def __init__(self, records: list[Record], batch_size: int, order: str = "ladder", stages: range | None = None,
                 seed: int = 0, epochs: int = 1):
        self.batches: list[Batch] = []
        self.order, self.seed = order, seed
        seen: dict[str, Record] = {}
        for epoch, (stage, block) in itertools.product(range(epochs), blocks_of(records, order, stages)):
            rng = np.random.default_rng([seed, 0 if stage is None else stage + 1, epoch])
            if order == "sorted":
                block = sorted(block, key=lambda r: (r.difficulty, r.complexity, r.id))
            else:  # (a stage's shuffle does not depend on which other stages are taken)
                block = shuffled(block, rng)
            if order == "review":
                before = [record for record in seen.values() if record.stage != stage]
                old = min(int(REVIEWED * len(block)), len(before))
                new = block[:len(block) - old]
                block = shuffled(new + shuffled(before, rng)[:old], rng)
                seen |= {record.id: record for record in new}
            parts = np.array_split(np.arange(len(block)), -(-len(block) // batch_size))
            self.batches += [Batch(stage, [block[i] for i in part], part is parts[-1]) for part in parts]
        self.records = list({record.id: record for batch in self.batches for record in batch.records}.values())
        self.position = 0  # batches already used
        self.rates: list[list[float]] = []  # of the batches used (of adaptive): the pass rates of their problems
        self.running = 1 - np.arange(LEVELS) / (LEVELS - 1)  # [L] pass rate, at first as the levels were measured
        if order in DRAWN:
            self.levels = np.array([level_of(record) for record in self.records])
            for k in range(len(self)):  # (of adaptive all but two are drawn again, see learned)
                self.draw(k)
        self.began_as = self.digest()

    def draw(self, k: int) -> None:
        """Choose the problems of batch k anew."""
        if self.order == "gaussian":
            mean = (LEVELS - 1) * k / max(1, len(self) - 1)
            bell = np.exp(-((np.arange(LEVELS) - mean) / BELL) ** 2 / 2)
            chance = bell / np.bincount(self.levels, minlength=LEVELS).clip(1)  # (of a level, however many it has)
        else:
            chance = self.running * (1 - self.running) + LEAST
        each = chance[self.levels]
        drawn = np.random.default_rng([self.seed, k]).choice(
            len(each), len(self.batches[k].records), replace=False, p=each / each.sum())
        self.batches[k] = replace(self.batches[k], records=[self.records[i] for i in drawn])

    def learned(self, rates: list[float]) -> None:
        """Of adaptive: note the pass rates of the newest batch's problems, and choose the next batch but one by them.
        (The pictures of the next one are made already.)"""
        if self.order == "adaptive":
            self.rates.append(rates)
            for record, rate in zip(self.batches[self.position - 1].records, rates):
                self.running[level_of(record)] += NEWS * (rate - self.running[level_of(record)])
            if self.position + 1 < len(self):
                self.draw(self.position + 1)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        while self.position < len(self):
            self.position += 1
            yield self.batches[self.position - 1]

    def undo(self, count: int = 1) -> None:
        """Give the newest batches back: they were not learned from."""
        self.position -= count
        del self.rates[self.position:]

    def digest(self) -> str:
        """Changes with the choice of problems, their difficulty, order and batches (content: eval.data_digest)."""
        text = "\n".join(f"{b.stage} {r.id} {r.difficulty}" for b in self.batches for r in b.records)
        return hashlib.sha256(f"{len(self)}\n{text}".encode()).hexdigest()[:16]

    def state_dict(self) -> dict:
        return {"position": self.position, "digest": self.began_as, "rates": self.rates}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError when the data or its order is not what the state was saved with."""
        if state["digest"] != self.began_as:
            raise ValueError("the training data, its order or the batch size changed since the checkpoint was saved; "
                             "resume with what the run began with, or start a new run")
        for self.position, rates in enumerate(state["rates"], 1):  # (adaptive chooses again what it chose)
            self.learned(rates)
        self.position = state["position"]


# === the fold: below, the review of golds, a ladder's card, and the command line ======================================

# --- review of golds --------------------------------------------------------------------------------------------------

Decisions = dict[str, tuple[str, Record | None]]  # id -> keep, drop or fix, and the corrected record
REVIEW = """No rollout met the gold of these {count} problems. The likeliest wrong golds come first: those where the
rollouts agree most on one other answer. Write into review.csv, column decision: keep (the gold is right), drop, or fix
with the right answer in new_gold; then run curriculum.py again with --corrections review.csv. Rows without a decision
stay as they are. Pages:"""


def majority(record: Record) -> tuple[str, int]:
    """The answer that most of a record's rollouts gave, as the first of them wrote it, and how many gave it."""
    answers = [rollout["answer"] for rollout in record.meta["rollouts"] if rollout["answer"] is not None]
    if not answers:
        return "", 0
    votes = [vote(answer, record) for answer in answers]
    [(winner, count)] = Counter(votes).most_common(1)
    return answers[votes.index(winner)], count


def write_review(records: list[Record], folder: Path, per_page: int = 200) -> None:
    """Records with meta["rollouts"] -> folder/review.html (then review-2.html, ...) and review.csv, likely wrong first.

    A review.csv that differs from what would be written was edited by a person: it is left as it is, and said so."""
    ranked = [(record, *majority(record)) for record in tqdm(records, "counting answers")]
    ranked.sort(key=lambda row: (-row[2], row[0].id))
    chunks = list(batches(ranked, per_page))
    pages = ["review.html", *(f"review-{n}.html" for n in range(2, len(chunks) + 1))]
    for page, chunk in zip(tqdm(pages, "writing pages"), chunks):
        sections = []
        for record, answer, votes in chunk:
            rollouts = record.meta["rollouts"]
            given = " | ".join("(none)" if r["answer"] is None else r["answer"] for r in rollouts)
            sections.append(section_of(record, f"{record.id} {record.source}", [
                ("right", f"gold: {' or '.join(record.golds)}", ""),
                ("wrong", f"majority, {votes} of {len(rollouts)}: {answer}", ""), ("", f"all: {given}", "")]))
        write_page(folder / page, "Review of golds", REVIEW.format(count=len(ranked)), sections, links=pages)

    def cell(text: str) -> str:  # on one line, and no formula to a spreadsheet: a model wrote some of these
        text = " ".join(text.split())
        return "'" + text if text.startswith(("=", "+", "-", "@")) and parse_number(text) is None else text

    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["id", "question", "gold", "majority", "votes", "decision", "new_gold"])
    for record, answer, votes in ranked:
        writer.writerow([record.id, cell(record.text), cell(" or ".join(record.golds)), cell(answer),
                         f"{votes} of {len(record.meta['rollouts'])}", "", ""])
    content = table.getvalue().encode("utf-8-sig")  # the mark tells spreadsheets that it is UTF-8
    path = folder / "review.csv"
    if path.exists() and path.read_bytes() != content:
        print(f"{path} has been edited; left as it is", file=sys.stderr)
    else:
        path.write_bytes(content)


def read_corrections(path: Path, records: Iterable[Record]) -> Decisions:
    """A review.csv that a person edited -> its Decisions; undecided rows are left out.

    Raises one ValueError that names every row that cannot be used, by line, with what to do."""
    try:
        rows = list(read_cells(path, ("id", "decision", "new_gold")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}; edit the review.csv of a build, and save it as CSV in UTF-8"
                         ) from error
    known = {record.id: record for record in records}
    decisions: Decisions = {}
    bad = []
    for line, row in rows:
        try:
            if decided := read_decision(parsed(row), known):
                row_id, decision, fixed = decided
                if row_id in decisions:
                    raise ValueError(f"record {row_id!r} is decided twice; leave one of the rows")
                decisions[row_id] = decision, fixed
        except ValueError as error:
            bad.append(f"line {line}: {error}")
    if bad:
        raise ValueError(f"{path}: {len(bad)} rows cannot be used:\n  " + "\n  ".join(bad[:20]) + "\nmend them")
    return decisions


def read_decision(row: dict, known: dict[str, Record]) -> tuple[str, str, Record | None] | None:
    """A row of review.csv -> id, decision, corrected record; None where nobody decided."""
    row_id, decision, gold = (row.get(name, "").strip() for name in ("id", "decision", "new_gold"))
    decision, gold = decision.lower(), re.sub("^'(?=[=+@-])", "", gold)  # (see cell)
    if not decision and not gold:
        return None
    if row_id not in known:
        raise ValueError(f"the data has no record {row_id!r}; write the id as it was: spreadsheets change some")
    if decision not in ("keep", "drop", "fix"):
        raise ValueError(f"its decision is {decision!r}; write keep, drop or fix")
    if bool(gold) != (decision == "fix"):
        raise ValueError(f"its decision is {decision} and its new_gold {gold!r}; a new_gold goes with fix, and fix "
                         "with a new_gold")
    return row_id, decision, with_gold(known[row_id], gold) if gold else None


def with_gold(record: Record, gold: str) -> Record:
    """The record with another gold, of its own answer type where that can hold it. ValueError: no rule can read it."""
    faults = []
    for kind in (record.answer_type, ""):
        try:
            fixed = replace(record, answer=gold, answer_type=kind)
            if fault := gold_fault(fixed):
                raise ValueError(fault)
            return fixed
        except ValueError as error:
            faults.append(error)
    raise faults[0]


def apply_review(records: list[Record], decisions: Decisions) -> list[Record]:
    """Measured records after review: dropped ones left out, and where the gold is new the stored rollouts judged anew,
    for what was wrong may now be right. Raises ValueError where the rollouts of such a record are not known."""
    reviewed = []
    for record in records:
        decision, fixed = decisions.get(record.id, ("", None))
        if fixed is not None:
            if "rollouts" not in record.meta:
                raise ValueError(f"record {record.id}: its rollouts' answers are not known, so a new gold cannot be "
                                 "judged; give the corrections to the build that measured it")
            rollouts = [r | {"accuracy": float(r["answer"] is not None and answer_matches(r["answer"], fixed))}
                        for r in record.meta["rollouts"]]
            record = with_rollouts(replace(record, answer=fixed.answer, answer_type=fixed.answer_type), rollouts)
        if decision != "drop":
            reviewed.append(record)
    return reviewed


# --- the card of a ladder ---------------------------------------------------------------------------------------------

# The official set, by level, read off the figure that MIXING is from.
PAPER_SHARES = np.array([.015, .035, .05, .075, .135, .15, .15, .20, .19])
PAPER_COMPLEXITY = np.array([154, 165, 173, 179, 198, 210, 224, 236, 248])  # tokens


def off_shares(table: np.ndarray, sizes: np.ndarray, mixing: np.ndarray) -> list[str]:
    """How [S, L] problems differ, by more than rounding, from [S] sizes in the shares of mixing: a line a stage."""
    lines = []
    for stage, (row, wanted) in enumerate(zip(table, sizes)):
        want, missing = wanted * mixing[stage], wanted - row.sum()
        parts = [f"{abs(missing)} problems {'short of' if missing > 0 else 'over'} {wanted}"] if missing else []
        parts += [f"level {level} {row[level]} instead of {want[level]:.0f}"
                  for level in np.flatnonzero(np.abs(row - want) >= 2)]
        if parts:
            lines.append(f"stage {stage}: {', '.join(parts)}")
    return lines


def stage_table(ladder: list[Record]) -> np.ndarray:
    """[S, L] problems by stage and level. Raises ValueError for a record that is on no stage."""
    table = np.zeros((LEVELS, LEVELS), int)
    for record in ladder:
        level = level_of(record)
        if record.stage is None:
            raise ValueError(f"record {record.id} is on no stage 0 .. 8; build a ladder: --data FILE --out DIR")
        table[record.stage, level] += 1
    return table


def licence(source: str) -> str:
    """As the authors of a source publish it."""
    name = re.sub(r"[^a-z0-9]", "", source.lower())
    return next((DATASETS[key].licence for key in SOURCES if name.startswith(key)), "as its source")


def write_card(path: Path, ladder: list[Record], counts: str, settings: dict, notes: list[str]) -> None:
    """The data set's card: its front matter makes the hub and `datasets` take ladder.parquet alone for the train split.

    counts: tables by level, stage and source; settings: what measured the problems; notes: how the ladder was built,
    and where it departs from the shares."""
    licences = {licence(r.source) for r in ladder}
    [name] = licences if len(licences) == 1 else ["other"]
    bounds = {1e3: "n<1K", 1e4: "1K<n<10K", 1e5: "10K<n<100K", 1e6: "100K<n<1M", np.inf: "n>1M"}
    front = DatasetCardData(
        pretty_name="A NeuraLadder", license=name if re.fullmatch(r"[a-z0-9.-]+", name) else "other",
        task_categories=["image-text-to-text"], tags=["curriculum", "reasoning", "reinforcement-learning"],
        size_categories=[next(size for limit, size in bounds.items() if len(ladder) < limit)],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "ladder.parquet"}]}])
    measured = markdown(["setting", "value"], [[key.replace("_", " "), str(value)] for key, value in settings.items()
                                               if key != "program"])
    path.write_text(render("card.md", front=front.to_yaml(), count=len(ladder), samples=settings.get("samples", "the"),
                           picture=path.with_name("ladder.png").exists(), counts=counts, notes=notes,
                           measured=measured), encoding="utf-8")


def report(ladder: list[Record]) -> str:
    """Counts by level, stage and source, beside the paper's: Markdown that reads well in a terminal."""
    table = stage_table(ladder)
    levels = []
    for level, count in enumerate(table.sum(0)):
        at_level = [r.complexity or 0 for r in ladder if level_of(r) == level]
        levels.append([f"{level / (LEVELS - 1):.3f}", str(count), f"{count / len(ladder):.3f}",
                       f"{PAPER_SHARES[level]:.3f}", f"{np.mean(at_level):.0f}" if at_level else "-",
                       str(PAPER_COMPLEXITY[level])])
    stages = [[str(stage), str(row.sum()), *map(str, row)] for stage, row in enumerate(table)]
    sources = []
    for source, count in Counter(sorted(r.source for r in ladder)).most_common():
        name = " ".join(source.replace("|", "/").split()) or "(not named)"
        sources.append([name, str(count), licence(source)])
    return "\n\n".join([
        markdown(["level", "problems", "share", "paper", "complexity, tokens", "paper"], levels),
        markdown(["stage", "problems", *(f"level {n}" for n in range(LEVELS))], stages),
        markdown(["source", "problems", "licence"], sources)])


# --- from the command line --------------------------------------------------------------------------------------------

def load_all(paths: list[str], limit: int | None, skip_bad: bool) -> list[Record]:
    """The records of all paths by id, at most `limit`. Equal ids of two paths are told apart by these; one problem that
    stands in both is refused, or skipped."""
    good: dict[str, tuple[Record, str]] = {}
    bad = []
    for path in paths:
        left = None if limit is None else limit - len(good)
        for record in load_records(path, left, skip_bad) if left != 0 else []:
            if record.id in good and good[record.id][0].text != record.text:
                record = replace(record, id=told_apart(record.id, path))
            if record.id in good:
                bad.append(f"{path}: the id {record.id!r} stands in {good[record.id][1]} too; ids must be unique")
            else:
                good[record.id] = record, path
    return raise_or_skip("--data", [good[key][0] for key in sorted(good)], bad, skip_bad)


def warn_if_blind(records: list[Record]) -> None:
    """Say, before hours are spent, that no record has a picture: they may have been lost on the way."""
    if not any(r.images for r in records):
        print(f"warning: none of the {len(records)} problems has a picture; if some should, see under which key the "
              "data have theirs: it is to be `images`, paths from the file's folder", file=sys.stderr)


def to_measure(args: argparse.Namespace, records: list[Record]) -> dict:
    """The settings that raw records are to be measured with."""
    settings = {"data": data_digest(records), "model": model_digest(args.model), "samples": SAMPLES,
                "simple-question filter": "off" if args.keep_simple else model_digest(args.filter_model)}
    return settings | {key: getattr(args, key) for key in ("prompt", "temperature", "max_tokens", "max_pixels", "rows",
                                                           "sampling_seed")}


def measured_with(args: argparse.Namespace, records: list[Record]) -> dict:
    """The settings that measured records were measured with, as a settings.json beside their file tells."""
    folders = dict.fromkeys(Path(path) if Path(path).is_dir() else Path(path).parent for path in args.data)
    files = [folder / "settings.json" for folder in folders]
    found = [read_json(file) for file in files if file.exists()]
    builds = [settings for settings in found if settings.get("program") == "curriculum.py"]
    for other in builds[1:]:
        if unlike := [key for key in builds[0] if key not in ("data", *FREE) and builds[0][key] != other.get(key)]:
            raise ValueError(f"the files of --data were measured with different settings, {unlike[0]} "
                             f"{builds[0][unlike[0]]} and {other.get(unlike[0])}; measure them all alike")
    known = builds[0] if len(builds) == len(files) else {"model": "unknown in part" if builds else "unknown"}
    if len(builds) != 1 or len(args.data) > 1 or args.limit is not None:
        known = known | {"data": data_digest(records)}
    return known


def prepare(args: argparse.Namespace) -> tuple[list[Record], dict]:
    """Everything that can be refused before hours are lost -> usable records by id, and what measures or measured them.

    The settings go to settings.json, so that the same command can go on and another one is refused."""
    ladder = (args.out / "ladder.parquet").resolve()
    if any(ladder in (Path(path).resolve(), Path(path).resolve() / ladder.name) for path in args.data):
        raise ValueError(f"--out {args.out} would write over the ladder that --data reads; build from measured.parquet "
                         "or give another --out")
    records = load_all(args.data, args.limit, args.skip_bad)
    raw = [r for r in records if is_raw(r)]
    if raw and len(raw) < len(records):
        raise ValueError(f"{len(records) - len(raw)} records are measured and {len(raw)} are not, such as {raw[0].id}; "
                         "build from the measured ones alone, or take difficulty and complexity out of all")
    if raw and not args.model:
        raise ValueError("the records are not measured yet; give the --model that is to measure them")
    settings = {"program": "curriculum.py"} | (to_measure(args, records) if raw else measured_with(args, records))
    dropped_ids = args.out / "dropped.json"
    goes_on = begun(args.out, settings, FREE) and dropped_ids.exists()
    dropped = set(read_json(dropped_ids)) if goes_on else set()
    if raw and not goes_on:  # (checked once: it takes a while)
        usable = records
        for path in sorted({args.model, args.model if args.keep_simple else args.filter_model}):
            usable = check_records(Processor(path, args.max_pixels), usable, args.prompt, skip_bad=args.skip_bad)
        warn_if_blind(usable)
        dropped = {r.id for r in records} - {r.id for r in usable}
    records = [r for r in records if r.id not in dropped]
    if args.corrections:
        read_corrections(args.corrections, records)
    claim(args.out, settings)
    write_json(dropped_ids, sorted(dropped))
    return records, settings


def build(args: argparse.Namespace, records: list[Record], settings: dict) -> None:
    """Measured records -> the pages of review, ladder.parquet and its card."""
    unsolved = [r for r in records if r.difficulty == 1]
    if reviewable := [r for r in unsolved if "rollouts" in r.meta]:
        write_review(reviewable, args.out)
    decisions = read_corrections(args.corrections, records) if args.corrections else {}
    reviewed = apply_review(records, decisions)
    pool = low_complexity_cut(reviewed, args.low_complexity, args.min_complexity)
    ladder = build_ladder(pool, args.size, args.seed)
    decided = Counter(decision for decision, _ in decisions.values())
    unreviewed = sum(r.difficulty == 1 and r.id not in decisions for r in ladder)
    warning = "No unreviewed gold of difficulty 1 is on the ladder."
    if unreviewed:
        warning = (f"**Nobody reviewed the golds of {unreviewed} problems of difficulty 1 on the ladder: some may be "
                   "wrong.**")
    notes = [f"{len(records)} measured problems, {len(unsolved)} of them never solved.",
             f"Reviewed by a person: {decided.total()} golds ({decided['keep']} kept, {decided['fix']} replaced and "
             f"the rollouts judged anew, {decided['drop']} dropped). {warning}",
             f"{len(reviewed) - len(pool)} always solved problems of the lowest complexity were left out "
             f"(quantile {args.low_complexity}; fewer than {args.min_complexity:g} tokens).",
             *share_notes(ladder, pool, args)]
    counts = report(ladder)
    bare = [replace(r, meta={key: value for key, value in r.meta.items() if key != "rollouts"}) for r in ladder]
    save_records(str(args.out / "ladder.parquet"), bare)
    write_card(args.out / "README.md", ladder, counts, settings, notes)
    print(counts, "", *notes, f"-> {args.out}", sep="\n")


def share_notes(ladder: list[Record], pool: list[Record], args: argparse.Namespace) -> list[str]:
    supply = np.bincount([level_of(r) for r in pool], minlength=LEVELS)
    size, scarce = largest_size(supply)
    asked = f" of {args.size} asked for" if args.size else ""
    notes = [f"Level {scarce} is the scarcest: a ladder that over-draws no level has {size} problems; this one has "
             f"{len(ladder)}{asked}, shuffled with seed {args.seed}."]
    notes += [f"There is no problem of level {level}." for level in np.flatnonzero(supply == 0)]
    off = off_shares(stage_table(ladder), stage_sizes(args.size or size), MIXING)
    return notes + ([f"Departs from the shares: {line}." for line in off] or
                    ["No share departs by more than rounding."])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure problems by a model's own rollouts and build a ladder. "
                                     "(`curriculum.py show LADDER` prints one.)")
    option, positive = parser.add_argument, number(int, 1)
    option("--data", required=True, nargs="+", help="files, folders or hub ids that data.py reads")
    option("--model", help="Hugging Face folder or hub id that measures; measured data needs none")
    option("--out", required=True, type=Path, help="folder of the ladder; one that is unfinished goes on")
    option("--filter-model", help="of the simple-question filter (default: --model); the paper's is a small MLLM, by a "
           "summary Qwen2.5-VL-3B")
    option("--keep-simple", action="store_true", help="no filter: keep what is answered right at once")
    option("--corrections", type=Path, help="review.csv with decisions: keep, drop, fix with a new_gold")
    option("--low-complexity", type=number(float, 0, 0.99), default=0.1,
           help="drop difficulty-0 problems below this quantile of their complexities; 0: none")
    option("--min-complexity", type=number(float, 0), default=0,
           help="drop difficulty-0 problems of fewer tokens too; 0: none")
    option("--size", type=positive, help="problems on the ladder (default: all that the shares allow)")
    option("--limit", type=positive, help="first so many problems only")
    option("--skip-bad", action="store_true", help="leave out records that cannot be used")
    option("--seed", type=number(int, 0), default=0, help="of sampling and of the order inside a stage")
    option("--prompt", choices=sorted(PROMPTS), default="observe", help="prompt style of training; steps: the paper's")
    option("--temperature", type=number(float, TINY), default=1.0, help="of training")
    option("--max-tokens", type=positive, default=8192, help="longest response, as in training")
    option("--max-pixels", type=positive, default=2_560_000, help="area above which pictures are shrunk")
    option("--rows", type=positive, default=256, help="responses sampled at a time; less saves memory")
    args = parser.parse_args()
    args.filter_model = args.filter_model or args.model
    # No evaluation's: the responses that made a problem easy must not be the very ones that score it.
    args.sampling_seed = -1 - args.seed
    return args


def show(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="curriculum.py show", description="Print what is on a ladder.")
    parser.add_argument("ladder", help="file, folder or hub id")
    ladder = load_records(parser.parse_args(argv).ladder)
    print(report(ladder), "", *off_shares(stage_table(ladder), stage_sizes(len(ladder)), MIXING), sep="\n")


def measure_all(args: argparse.Namespace, records: list[Record]) -> list[Record]:
    """The simple-question filter, then N rollouts of what it leaves, on all ranks. A collective.

    Raises ValueError when all problems are simple."""
    def measured(name: str, model: str, **sampling) -> list[Record]:
        load = partial(load_to_sample, model, args.max_pixels)
        results = roll_out(args.out, name, records, load, max_rows=args.rows, seed=args.sampling_seed,
                           keep_texts=False, **sampling)
        return [measure(result) for result in results]

    if not args.keep_simple:
        tried = measured("direct", args.filter_model, samples=1, temperature=0.0, style="none",
                         max_tokens=min(DIRECT_TOKENS, args.max_tokens))
        records = [record for record, answered in zip(records, tried) if answered.difficulty]
        if not records:
            raise ValueError(f"all {len(tried)} problems were answered right at once; bring harder ones, or pass "
                             "--keep-simple with another --out")
    return measured("rollouts", args.model, samples=SAMPLES, temperature=args.temperature, style=args.prompt,
                    max_tokens=args.max_tokens)


def main() -> None:
    if sys.argv[1:2] == ["show"]:
        return show(sys.argv[2:])
    args = parse_args()
    start_processes()
    records, settings = on_rank_0(lambda: prepare(args))
    if raw := is_raw(records[0]):
        records = measure_all(args, records)
    if rank_and_world()[0] == 0:
        if raw:
            save_records(str(args.out / "measured.parquet"), records)  # ladders of other shares can be built from it
        build(args, records, settings)
    stop_processes()


if __name__ == "__main__":
    run_program(main)
