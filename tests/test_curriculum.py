"""The ladder and the order of training: shares, nothing twice, and the same batches after a stop."""
from __future__ import annotations

import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from conftest import ROOT, TOY
from PIL import Image

import curriculum
import rollout
from curriculum import (
    MIXING,
    PAPER_SHARES,
    STAGE_SHARES,
    Curriculum,
    allot,
    build_ladder,
    level_of,
    licence,
    low_complexity_cut,
    majority,
    measure,
    off_shares,
    parse_args,
    prepare,
    with_rollouts,
    write_review,
)
from data import Record, load_records, save_records
from eval import evaluate
from rewards import accuracy_reward
from rollout import sample_groups
from train import Config


def measured(per_level: list[int], seed: int = 0) -> list[Record]:
    rng = np.random.default_rng(seed)
    records = [Record(f"{level}-{i}", "?", "1", difficulty=level / 8, complexity=float(rng.integers(20, 300)))
               for level, count in enumerate(per_level) for i in range(count)]
    return [records[i] for i in rng.permutation(len(records))]


def counts(ladder: list[Record]) -> np.ndarray:
    table = np.zeros((9, 9), int)
    for record in ladder:
        table[record.stage, level_of(record)] += 1
    return table


def test_the_tables_give_back_the_papers_shares():
    """A typo in either table would shift the mixture for good; the paper's level shares are the check."""
    np.testing.assert_allclose(MIXING.sum(1), 1)
    assert STAGE_SHARES.sum() == pytest.approx(1)
    np.testing.assert_allclose(STAGE_SHARES @ MIXING, PAPER_SHARES, atol=.005)
    assert all((row > 0).sum() == 5 or k == 3 for k, row in enumerate(MIXING))  # windows of five levels
    assert (np.diff(MIXING @ np.arange(9)) > 0).all(), "stages get harder"


def test_ladder_holds_the_shares_when_supply_allows():
    ladder = build_ladder(measured([400] * 9), size=1500)
    table = counts(ladder)
    assert len(ladder) == 1500 == len({r.id for r in ladder})
    np.testing.assert_allclose(table.sum(1), 1500 * STAGE_SHARES, atol=1)
    np.testing.assert_allclose(table, table.sum(1, keepdims=True) * MIXING, atol=1.01)
    assert [r.stage for r in ladder] == sorted(r.stage for r in ladder)


def test_default_size_is_the_largest_that_over_draws_no_level():
    supply = np.array([50, 60, 90, 100, 300, 260, 300, 280, 400])
    ladder = build_ladder(measured(list(supply)))
    assert len(ladder) == int(min(supply / (STAGE_SHARES @ MIXING)))
    table = counts(ladder)
    np.testing.assert_allclose(table, table.sum(1, keepdims=True) * MIXING, atol=2)


def test_a_scarce_level_gives_what_it_has_and_its_stages_are_filled(capsys):
    """Level 4 is scarce: every stage still has its size, nothing twice, and it is said aloud."""
    supply = [200, 200, 200, 200, 20, 300, 300, 300, 300]
    ladder = build_ladder(measured(supply), size=1000)
    table = counts(ladder)
    assert table[:, 4].sum() == 20 and len({r.id for r in ladder}) == 1000
    np.testing.assert_allclose(table.sum(1), 1000 * STAGE_SHARES, atol=1)
    assert (table[MIXING == 0] == 0).all(), "filled from the window only"
    assert "level 4" in capsys.readouterr().err


def test_an_exhausted_window_is_said_aloud(capsys):
    ladder = build_ladder(measured([5] * 5 + [300] * 4), size=1000)
    assert len(ladder) < 1000 and "short of" in capsys.readouterr().err


def test_empty_levels_do_not_empty_the_ladder():
    ladder = build_ladder(measured([100, 0, 100, 100, 100, 100, 100, 100, 100]))
    assert len(ladder) > 300 and (counts(ladder)[:, 1] == 0).all()


def test_allot_by_hand():
    mixing = np.array([[.5, .5, 0], [0, .5, .5]])
    assert allot(np.array([10, 10, 10]), np.array([4, 4]), mixing).tolist() == [[2, 2, 0], [0, 2, 2]]
    # level 1 has 2 for a demand of 4: shared out, 1 each; the rest of each stage comes from its own window
    assert allot(np.array([10, 2, 10]), np.array([4, 4]), mixing).tolist() == [[3, 1, 0], [0, 1, 3]]
    assert allot(np.array([1, 2, 10]), np.array([4, 4]), mixing).sum(1).tolist()[0] < 4


def test_a_ladder_of_other_shares():
    """An ablation of the mixing gives its own table, and its own sizes of the stages, to the one function."""
    shares = np.array([5, 1, 1, 1, 1, 1, 1, 1, 8]) / 20
    ladder = build_ladder(measured([400] * 9), size=200, mixing=np.eye(9), stage_shares=shares)
    assert (counts(ladder) == np.diag([50, 10, 10, 10, 10, 10, 10, 10, 80])).all()
    assert len(build_ladder(measured([100] * 9), mixing=np.eye(9), stage_shares=shares)) == 250, "level 8 limits it"


def test_ladder_depends_on_the_seed_and_not_on_the_order_of_the_input():
    records = measured([60] * 9)
    first = build_ladder(records, size=200, seed=1)
    assert build_ladder(records[::-1], size=200, seed=1) == first
    assert build_ladder(records, size=200, seed=2) != first


def test_earlier_stages_take_the_less_complex_of_a_level():
    ladder = build_ladder(measured([200] * 9), size=900)
    means = [np.mean([r.complexity for r in ladder if r.stage == k and level_of(r) == 4]) for k in range(9)]
    assert means == sorted(means)


def test_unmeasured_or_too_few_problems_are_refused():
    with pytest.raises(ValueError, match="record raw has no difficulty"):
        build_ladder([Record("raw", "?", "1")])
    with pytest.raises(ValueError, match="cannot build a ladder of 100 problems from 9"):
        build_ladder(measured([1] * 9), size=100)


def test_measure_counts_its_own_rollouts(shipped, processor, test_set):
    """Difficulty is 1 - pass rate and complexity the mean length of the very responses that were sampled."""
    records = test_set[:3]
    got = [measure(result) for result in evaluate(shipped, processor, records, style="observe", temperature=1.0,
                                                  samples=8, max_tokens=160, seed=4)]
    prompts = [processor.encode(r, "observe") for r in records]
    groups = sample_groups(shipped, processor, records, prompts, samples=8, temperature=1.0, max_tokens=160, seed=4)
    for record, group in zip(got, groups):
        assert record.difficulty == 1 - sum(accuracy_reward(s.text, record) for s in group.samples) / 8
        assert record.complexity == sum(len(s.ids) for s in group.samples) / 8


def test_shares_that_are_off_are_named_and_rounding_is_none():
    ladder = build_ladder(measured([400] * 9), size=1500)
    sizes = curriculum.stage_sizes(1500)
    assert sizes.sum() == 1500 and off_shares(counts(ladder), sizes, MIXING) == []
    table = counts(ladder)
    table[3, 3] -= 5
    [line] = off_shares(table, sizes, MIXING)
    assert line.startswith("stage 3: 5 problems short of") and "level 3" in line


def test_low_complexity_cut_takes_the_shortest_of_level_0_only():
    """A cut over all levels, or one that reads the input's order, would take others."""
    records = [Record(f"{d}-{i}", "?", "1", difficulty=d, complexity=float(i)) for d in (0.0, 0.5) for i in range(10)]
    left = low_complexity_cut(records[::-1], 0.25)
    assert {r.id for r in records} - {r.id for r in left} == {"0.0-0", "0.0-1", "0.0-2"}
    assert low_complexity_cut(records, 0) == records and low_complexity_cut(records[10:], 0.5) == records[10:]


# --- from records to a ladder, by the commands -----------------------------------------------------------------------

MODEL = str(TOY / "model")


@pytest.fixture
def command(monkeypatch):
    """Run curriculum.py with these arguments, in this process (a new one takes seconds to import torch)."""
    def run(*arguments, call=curriculum.main):
        monkeypatch.setattr(sys, "argv", ["curriculum.py", *map(str, arguments)])
        return call()

    return run


@pytest.fixture(scope="module")
def raw(test_set, tmp_path_factory) -> Path:
    """24 problems, unmeasured."""
    path = tmp_path_factory.mktemp("raw") / "raw.parquet"
    save_records(str(path), [replace(r, difficulty=None, complexity=None) for r in test_set[:24]])
    return path


def rollouts(answers: list[str | None], gold: str, tokens: int = 20) -> list[dict]:
    return [{"answer": a, "accuracy": float(a == gold), "tokens": tokens} for a in answers]


@pytest.fixture
def pool(tmp_path) -> Path:
    """270 measured problems with the answers of their rollouts, 30 to a level; 7 of the 8 of the hardest say 5."""
    def one(level: int, i: int) -> Record:
        record = Record(f"{level}-{i:02d}", "How many?", "3", (Image.new("RGB", (8, 8), "red"),), source="We-Math")
        return with_rollouts(record, rollouts(["3"] * (8 - level) + ["5"] * (level - 1) + ["7"] * (level > 0), "3",
                                              tokens=20 + i))
    path = tmp_path / "measured" / "measured.parquet"
    save_records(str(path), [one(level, i) for level in range(9) for i in range(30)])
    return path


def answered_ids(folder: Path) -> list[str]:
    """Of all rollouts on disk, in whatever file; lines that were cut are none."""
    lines = [line for file in folder.glob("rollouts-*.jsonl") for line in file.read_bytes().splitlines()]
    return [json.loads(line)["id"] for line in lines if line.endswith(b"]}")]


@pytest.mark.slow
def test_a_killed_build_goes_on_with_other_processes_and_gives_the_same_ladder(command, raw, tmp_path):
    """The heart of the builder: hours of rollouts survive SIGKILL, a line cut in two, other --rows, and another number
    of processes; and two processes at work in one folder would spoil it.

    Fails when what is answered together depends on the processes or on what is done, when seeds do, or when a half line
    swallows the next.
    """
    options = ["--data", str(raw), "--model", MODEL, "--max-tokens", "160", "--keep-simple"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's processes have
    command(*options, "--rows", 32, "--out", tmp_path / "whole")
    torch.set_num_threads(threads)

    out, log = tmp_path / "killed", tmp_path / "killed" / "rollouts-0.jsonl"
    options += ["--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([sys.executable, "curriculum.py", *options, "--rows", "64"], cwd=ROOT, env=environment,
                           stderr=subprocess.DEVNULL, start_new_session=True)
    while run.poll() is None and not (log.exists() and answered_ids(out)):
        time.sleep(.02)
    os.killpg(run.pid, signal.SIGSTOP)
    with pytest.raises(ValueError, match="another process is at work there"):
        command(*options)
    os.killpg(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "it ended before it could be killed"
    done = answered_ids(out)
    assert 1 <= len(done) < 24 and not (out / "ladder.parquet").exists()
    missing = next(r.id for r in load_records(str(raw)) if r.id not in done)
    with open(log, "ab") as file:
        file.write(b'\n{"id": "%s", "responses": [{"answer": "3' % missing.encode())
    before = log.read_bytes()
    ended = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend",
                            "c10d", "--rdzv-endpoint", "localhost:0", "curriculum.py", *options, "--rows", "8"],
                           cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr

    for name in ("measured.parquet", "ladder.parquet", "review.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert log.read_bytes().startswith(before), "what was on disk stays"
    assert sorted(answered_ids(out)) == sorted(r.id for r in load_records(str(raw))), "all, and nothing is done twice"
    assert (out / "rollouts-1.jsonl").stat().st_size, "both processes worked"


def test_a_finished_build_is_not_measured_again(command, raw, tmp_path, monkeypatch):
    """The same command with other shares or corrections must take seconds: no model is even loaded."""
    options = ["--data", raw, "--model", MODEL, "--max-tokens", "20", "--keep-simple", "--limit", 4, "--size", 2,
               "--out", tmp_path / "out"]
    command(*options)
    monkeypatch.setattr(rollout, "load_policy", None)
    command(*options, "--size", 3)
    assert len(load_records(str(tmp_path / "out"))) == 3
    assert len(load_records(str(tmp_path / "out" / "measured.parquet"))) == 4


def test_difficulty_is_measured_on_other_responses_than_scores(command, raw, shipped, processor, tmp_path):
    """With one seed for both, a held-out problem is easy because of the very responses that are scored later: at each
    level the starting model then scores what the level says, and after training easy problems seem to be lost."""
    command("--data", raw, "--model", MODEL, "--max-tokens", "160", "--keep-simple", "--limit", 4, "--size", 2,
            "--out", tmp_path / "out")
    measured = {r.id: [rollout["tokens"] for rollout in r.meta["rollouts"]]
                for r in load_records(str(tmp_path / "out/measured.parquet"))}
    records = [r for r in load_records(str(raw)) if r.id in measured]
    scored = evaluate(shipped, processor, records, style="observe", temperature=1, samples=8, max_tokens=160)
    assert all([s.tokens for s in r.responses] != measured[r.record.id] for r in scored) and len(records) == 4


def test_the_filter_drops_what_is_right_at_once(command, raw, shipped, processor, tmp_path):
    """Greedy, without reasoning; a wrong style or a temperature would drop others."""
    records = sorted(load_records(str(raw)), key=lambda r: r.id)
    tried = list(evaluate(shipped, processor, records, style="none", temperature=0, samples=1, max_tokens=128))
    hard = {t.record.id for t in tried if not t.responses[0].accuracy}
    assert 0 < len(hard) < len(records)
    command("--data", raw, "--model", MODEL, "--max-tokens", "160", "--out", tmp_path / "out", "--size", 2)
    assert {r.id for r in load_records(str(tmp_path / "out" / "measured.parquet"))} == hard


def test_a_ladder_of_measured_data_is_the_same_for_any_order_of_it(command, pool, tmp_path):
    backwards = tmp_path / "backwards.parquet"
    save_records(str(backwards), list(load_records(str(pool)))[::-1])
    for name, data, seed in (("a", pool, 1), ("b", backwards, 1), ("c", pool, 2)):
        command("--data", data, "--out", tmp_path / name, "--seed", seed)
    ladders = [(tmp_path / name / "ladder.parquet").read_bytes() for name in "abc"]
    assert ladders[0] == ladders[1] != ladders[2]


def unpadded(text: str) -> str:
    """Without the blanks that line a table's columns up."""
    return re.sub(" +", " ", text)


def test_the_folder_loads_in_datasets_and_the_card_tells_all(command, pool, tmp_path, capsys):
    """Without its front matter `datasets` would mix measured.parquet into the train split."""
    import datasets

    settings = {"program": "curriculum.py", "model": "tiny (0123)", "samples": 8}
    (pool.parent / "settings.json").write_text(json.dumps(settings))
    out = pool.parent  # a folder with measured.parquet inside
    command("--data", pool, "--out", out, "--size", 170)
    ladder = load_records(str(out))
    table = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert set(table) == {"train"} and table["train"]["id"][:] == [r.id for r in ladder] and len(ladder) == 170
    assert table["train"].features["images"].feature == datasets.Image() and ladder[0].images
    assert all("rollouts" not in r.meta for r in ladder)
    card = (out / "README.md").read_text()
    unreviewed = sum(r.difficulty == 1 for r in ladder)
    for part in ("license: cc-by-nc-4.0", "| We-Math | 170 | cc-by-nc-4.0 |", "| model | tiny (0123) |",
                 f"Nobody reviewed the golds of {unreviewed} problems of difficulty 1", "of 170 asked for"):
        assert part in unpadded(card), part
    said = re.findall("^ladder: (.*)$", capsys.readouterr().err, re.MULTILINE)
    assert said and said == re.findall(r"^- Departs from the shares: (.*)\.$", card, re.MULTILINE)
    command("show", out / "ladder.parquet")
    shown = capsys.readouterr().out
    assert "| 1.000 | " in unpadded(shown) and shown.split("\n\n")[0] in card


@pytest.mark.run
def test_the_card_shows_the_picture_where_there_is_one(command, pool, tmp_path):
    """A card is not to point at a file that nobody drew; drawn and built again, it does."""
    out = tmp_path / "out"
    for drawn in (False, True):
        command("--data", pool, "--out", out, "--size", 170)
        assert ("](ladder.png)" in (out / "README.md").read_text()) == drawn == (out / "ladder.png").exists()
        pictures.main(["ladder", str(out)])
    assert (out / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_the_shipped_card_tells_of_the_shipped_ladder():
    assert curriculum.report(load_records(str(TOY / "ladder"))) in (TOY / "ladder/README.md").read_text()


def edit(path: Path, decisions: dict[str, tuple[str, str]], delimiter: str = ",") -> None:
    """Fill in the decisions, as a person with a spreadsheet does."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["decision"], row["new_gold"] = decisions.get(row["id"], ("", ""))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.run
def test_corrections_join_the_ladder_and_a_new_gold_judges_the_rollouts_anew(command, pool, tmp_path, monkeypatch):
    """A new gold whose record kept difficulty 1 would stand on the wrong stage."""
    out, given = tmp_path / "out", {}
    command("--data", pool, "--out", out)
    review = out / "review.csv"
    edit(review, {"8-00": ("fix", "5"), "8-01": ("Drop", ""), "8-02": ("keep", ""), "8-03": ("fix", "x + 1")}, ";")
    edited = review.read_bytes()
    monkeypatch.setattr(curriculum, "build_ladder", lambda records, *options: given.update(
        {r.id: r for r in records}) or build_ladder(records, *options))
    command("--data", pool, "--out", out, "--corrections", review)
    assert review.read_bytes() == edited, "a person's work is never written over"
    assert given["8-00"].answer == "5" and given["8-00"].difficulty == 1 / 8
    assert "8-01" not in given and given["8-02"].difficulty == given["8-03"].difficulty == 1
    assert given["8-03"].answer_type == "math" and given["8-04"].answer == "3", "an undecided row stays"
    ladder = load_records(str(out))
    unreviewed = sum(r.difficulty == 1 and r.id not in ("8-02", "8-03") for r in ladder)
    card = (out / "README.md").read_text()
    assert "4 golds (1 kept, 2 replaced" in card and f"golds of {unreviewed} problems of difficulty 1" in card


def test_bad_corrections_are_refused_by_line(command, pool, tmp_path):
    out = tmp_path / "out"
    command("--data", pool, "--out", out)
    review = out / "review.csv"
    lines = review.read_text("utf-8-sig").splitlines()

    def refused(row: str, message: str) -> None:
        review.write_text("\n".join([*lines[:2], row, *lines[3:]]))
        with pytest.raises(ValueError, match=message):
            command("--data", pool, "--out", out, "--corrections", review)

    refused("8-01,?,3,5,7 of 8,kep,", "line 3: its decision is 'kep'; write keep, drop or fix")
    refused("8-99,?,3,5,7 of 8,keep,", "line 3: the data has no record '8-99'")
    refused("8-01,?,3,5,7 of 8,fix,", "line 3: .* fix with a new_gold")
    refused("8-01,?,3,5,7 of 8,keep,5", "line 3: .* a new_gold goes with fix")
    refused("8-01,?,3,5,7 of 8,,5", "line 3: its decision is ''")
    refused("8-01,?,3,5,7 of 8,fix,...", "line 3: record 8-01: its answer is empty")
    refused("8-01,?,3,5,7 of 8,keep,\n8-01,?,3,5,7 of 8,drop,", "line 4: record '8-01' is decided twice")
    review.write_text("id,gold\n1,2\n")
    with pytest.raises(ValueError, match="no column decision, new_gold"):
        command("--data", pool, "--out", out, "--corrections", review)


def test_another_build_is_not_gone_on_with(command, raw, tmp_path, test_set):
    """Rollouts of two settings, models or data sets in one ladder would make its difficulties mean nothing."""
    out, other = tmp_path / "out", tmp_path / "other"

    def check(*arguments, data=raw, model=MODEL):
        return command("--data", data, "--model", model, "--out", out, "--limit", 2, *arguments,
                       call=lambda: prepare(parse_args()))

    records, settings = check()
    kept = json.loads((out / "settings.json").read_text())
    assert len(records) == 2 and kept == settings | {"program": "curriculum.py"}
    again, same = check("--size", 1, "--low-complexity", 0, "--rows", 8)
    assert [r.id for r in again] == [r.id for r in records], "what comes after measuring may change"
    assert same == settings | {"rows": 8}, "and how much is sampled at a time"
    with pytest.raises(ValueError, match="temperature: 1.0 there, 0.5 now\n.*another --out"):
        check("--temperature", .5)
    with pytest.raises(ValueError, match="simple-question filter: model .* there, off now"):
        check("--keep-simple")
    changed = replace(records[0], images=(Image.new("RGB", (28, 28), "red"),))
    save_records(str(other / "raw.parquet"), [changed, records[1]])
    with pytest.raises(ValueError, match="data: 2 problems .* there, 2 problems"):
        check(data=other / "raw.parquet")
    for file in (TOY / "model").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="model: model .* there, other"):
        check(model=other)
    (other / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="other is not empty and holds no run of curriculum.py"):
        command("--data", raw, "--model", MODEL, "--out", other)
    assert (other / "config.json").exists()


def test_data_that_cannot_make_a_ladder_is_refused_before_hours_are_lost(command, raw, pool, tmp_path):
    def refused(message: str, *arguments) -> None:
        with pytest.raises(ValueError, match=message):
            command(*arguments, "--out", tmp_path / "out", call=lambda: prepare(parse_args()))
        assert not (tmp_path / "out").exists(), "nothing is left behind"

    refused("give the --model", "--data", raw)
    refused("270 records are measured and 24 are not, such as test-", "--data", raw, pool, "--model", MODEL)
    twin = tmp_path / "twin.parquet"
    twin.write_bytes(raw.read_bytes())
    refused("twin.parquet: the id 'test-.*' stands in .*raw.parquet too", "--data", raw, twin, "--model", MODEL)
    refused("no Qwen|not a Qwen", "--data", raw, "--model", tmp_path)
    with pytest.raises(ValueError, match="would write over the ladder"):
        command("--data", TOY / "ladder", "--out", TOY / "ladder")
    broken = replace(load_records(str(raw))[0], id="broken", images=(b"no picture",))
    save_records(str(tmp_path / "broken.parquet"), [broken, *load_records(str(raw))[1:3]])
    refused("record broken: cannot use its picture", "--data", tmp_path / "broken.parquet", "--model", MODEL)

    def usable() -> list[Record]:
        return command("--data", tmp_path / "broken.parquet", "--model", MODEL, "--skip-bad", "--out",
                       tmp_path / "out", call=lambda: prepare(parse_args()))[0]

    assert len(usable()) == 2 and len(usable()) == 2, "begun, and gone on with"
    (tmp_path / "out/dropped.json").unlink()
    assert len(usable()) == 2, "killed between its two files"


@pytest.mark.parametrize("option, value", [
    ("temperature", "0"), ("temperature", "nan"), ("temperature", "inf"), ("low-complexity", "1.5"), ("size", "0"),
    ("low-complexity", "nan"), ("limit", "0"), ("seed", "-1"), ("max-tokens", "0"), ("max-pixels", "0"), ("rows", "0")])
def test_numbers_that_cannot_be_meant_are_refused_by_option(command, capsys, option, value):
    """--temperature nan built a ladder from greedy rollouts."""
    with pytest.raises(SystemExit):
        command("--data", "x", "--out", "y", f"--{option}={value}", call=parse_args)
    assert f"argument --{option}: {value}" in capsys.readouterr().err.replace(f"{value}.0 ", f"{value} ")


def test_show_writes_nothing(command, tmp_path, monkeypatch, capsys):
    """It once drew a picture into whatever folder one was in."""
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (TOY / "ladder").iterdir()}
    command("show", TOY / "ladder")
    assert "| stage" in capsys.readouterr().out and not any(tmp_path.iterdir())
    assert {path: path.stat().st_mtime_ns for path in (TOY / "ladder").iterdir()} == before


def test_data_without_a_picture_say_so_before_they_are_measured(command, raw, tmp_path, capsys):
    """Pictures under a key that is not read are lost, and hours of rollouts measured a model that saw nothing."""
    blind = tmp_path / "blind.jsonl"
    blind.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": f"{i + 1}"}) + "\n" for i in range(3)))
    for data, told in ((blind, True), (raw, False)):
        command("--data", data, "--model", MODEL, "--out", tmp_path / data.stem, call=lambda: prepare(parse_args()))
        assert ("has a picture; if some should" in capsys.readouterr().err) == told


def test_files_measured_with_different_settings_do_not_mix(command, pool, tmp_path):
    for name, model in (("a", "one"), ("b", "two")):
        half = [r for r in load_records(str(pool)) if r.id.endswith(("5", "0")) == (name == "a")]
        save_records(str(tmp_path / name / "measured.parquet"), half)
        (tmp_path / name / "settings.json").write_text(json.dumps(
            {"program": "curriculum.py", "data": name, "model": model}))
    both = ["--data", tmp_path / "a/measured.parquet", tmp_path / "b/measured.parquet", "--out", tmp_path / "out"]
    with pytest.raises(ValueError, match="different settings, model one and two"):
        command(*both)
    (tmp_path / "b/settings.json").unlink()
    command(*both)
    assert "| model | unknown in part |" in unpadded((tmp_path / "out/README.md").read_text())


def test_what_measures_is_what_trains(command):
    """Difficulty is the model's own at training: other defaults here would measure another policy."""
    args, train = command("--data", "x", "--out", "y", call=parse_args), Config()
    assert (args.prompt, args.temperature, args.max_tokens, args.max_pixels) == (
        train.prompt, train.temperature, train.max_response_tokens, train.max_pixels)


# --- review and card --------------------------------------------------------------------------------------------------


def answered(record: Record, *answers: str | None) -> Record:
    return with_rollouts(record, [{"answer": a, "accuracy": 0.0, "tokens": 9} for a in answers])


def test_majority_counts_equal_answers_however_they_are_written():
    number = Record("n", "?", "3")
    assert majority(answered(number, "7", "1/2", "0.5", None, "$\\frac{1}{2}$", "7")) == ("1/2", 3)
    choice = Record("c", "?", "A", choices=("red", "blue"))
    assert majority(answered(choice, "blue", "(B)", "b.", "C")) == ("blue", 3)
    assert majority(answered(number, None, None)) == ("", 0)


def test_review_puts_likely_wrong_golds_first_and_spares_edited_tables(tmp_path, capsys, test_set):
    """Reviewers stop early; and an overwritten table is a person's afternoon."""
    unsure = answered(replace(test_set[0], id="a"), "1", "2", "=HYPERLINK(1)", None)
    sure = answered(replace(test_set[1], id="b", question="<script>"), "5", "5", "5", "6")
    write_review([unsure, sure], tmp_path, per_page=1)
    first, second = ((tmp_path / name).read_text() for name in ("review.html", "review-2.html"))
    assert "majority, 3 of 4: 5" in first and "data:image/png" in first
    assert first.count("<script>") == second.count("<script>") and "&lt;script&gt;" in first, "none but the page's own"
    assert "(none)" in second and "review-2.html" in first
    table = (tmp_path / "review.csv").read_text("utf-8-sig")
    assert [line.split(",")[0] for line in table.splitlines()] == ["id", "b", "a"] and "b,<script>" in table
    write_review([sure], tmp_path)
    assert (tmp_path / "review.csv").read_text("utf-8-sig") == table and "has been edited" in capsys.readouterr().err
    (tmp_path / "review.csv").unlink()
    write_review([answered(unsure, *["=HYPERLINK(1)"] * 8)], tmp_path)
    assert ",'=HYPERLINK(1)," in (tmp_path / "review.csv").read_text("utf-8-sig"), "no formula for a spreadsheet"


def test_licences_of_the_sources_are_told():
    assert licence("MathVision") == "mit" and licence("polymath") == "afl-3.0" and licence("mine") == "as its source"


# --- the order of training -------------------------------------------------------------------------------------------


@pytest.fixture
def ladder() -> list[Record]:
    return build_ladder(measured([60] * 9), size=200)


def test_batches_use_every_problem_once_and_never_cross_a_stage(ladder):
    curriculum = Curriculum(ladder, 16)
    batches = list(curriculum)
    assert sorted(r.id for b in batches for r in b.records) == sorted(r.id for r in ladder)
    assert all({r.stage for r in b.records} == {b.stage} for b in batches)
    assert [b.stage for b in batches] == sorted(b.stage for b in batches)
    assert [b.ends_stage for b in batches] == [
        i + 1 == len(batches) or batches[i + 1].stage != b.stage for i, b in enumerate(batches)]
    for stage in range(9):
        sizes = [len(b.records) for b in batches if b.stage == stage]
        assert max(sizes) <= 16 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("order", ["ladder", "sorted", "random", "reverse", "review", "gaussian"])
def test_a_stopped_run_goes_on_where_it_was(ladder, order):
    """Off-by-one replays: the classic fault of resumed runs."""
    whole = list(Curriculum(ladder, 16, order, seed=3))
    first = Curriculum(ladder, 16, order, seed=3)
    seen = [batch for batch, _ in zip(first, range(5))][:5]
    state = first.state_dict() | {"position": 5}
    second = Curriculum(ladder, 16, order, seed=3)
    second.load_state_dict(state)
    assert seen + list(second) == whole


def test_state_says_how_many_batches_were_handed_out(ladder):
    curriculum = Curriculum(ladder, 16)
    for i, _ in enumerate(curriculum):
        assert curriculum.state_dict()["position"] == i + 1


def test_a_batch_that_is_given_back_comes_again(ladder):
    """It was not learned from: a run that is stopped while it samples must not lose its problems."""
    whole = list(Curriculum(ladder, 16))
    curriculum = Curriculum(ladder, 16)
    seen = [batch for batch, _ in zip(curriculum, range(2))]
    assert curriculum.position == 3  # (zip takes one more)
    curriculum.undo()
    assert seen + list(curriculum) == whole


def test_orders(ladder):
    def stages(order):
        return [b.stage for b in Curriculum(ladder, 16, order)]

    assert stages("reverse") == sorted(stages("ladder"), reverse=True)
    assert set(stages("random")) == {None}
    keys = [(r.difficulty, r.complexity) for b in Curriculum(ladder, 16, "sorted") for r in b.records]
    assert keys == sorted(keys)
    by_level = [r.difficulty for b in Curriculum(ladder, 16, "random") for r in b.records]
    assert by_level != sorted(by_level)


def levels_of(curriculum: Curriculum, quarter: int) -> np.ndarray:
    """[L] problems by level in a quarter of the batches."""
    cut = [len(curriculum) * i // 4 for i in range(5)]
    batches = curriculum.batches[cut[quarter]:cut[quarter + 1]]
    return np.bincount([level_of(r) for b in batches for r in b.records], minlength=9)


@pytest.mark.parametrize("order", ["review", "gaussian", "adaptive"])
def test_remedies_take_as_many_rollouts(ladder, order):
    """Rows that are compared must have sampled as many; a problem that is twice in a batch has its responses twice."""
    curriculum = Curriculum(ladder, 16, order, seed=2)
    for batch in [*curriculum, *Curriculum(ladder, 16, order, epochs=2).batches]:
        assert len({r.id for r in batch.records}) == len(batch.records)
    other = Curriculum(ladder, 16, "ladder" if order == "review" else "random", seed=2)
    assert [len(b.records) for b in curriculum.batches] == [len(b.records) for b in other.batches]


def test_review_brings_back_problems_of_stages_before(ladder):
    """A quarter of each stage but the first; the new ones are the first of the stage's own."""
    curriculum, plain = Curriculum(ladder, 16, "review", seed=1), Curriculum(ladder, 16, seed=1)
    seen: set[str] = set()
    for stage in range(9):
        got, own = ([r for b in each.batches if b.stage == stage for r in b.records] for each in (curriculum, plain))
        again = [r for r in got if r.stage != stage]
        assert len(again) == (len(own) // 4 if stage else 0) and {r.id for r in again} <= seen
        new = {r.id for r in got if r.stage == stage}
        assert new == {r.id for r in own[:len(own) - len(again)]}
        seen |= new
    assert [(b.stage, b.ends_stage) for b in curriculum.batches] == [(b.stage, b.ends_stage) for b in plain.batches]


def test_what_is_reviewed_is_of_all_stages_before_and_spread_over_the_stage(ladder):
    """Not the earliest problems again and again, and not all of them in a stage's last batches."""
    stages, first, all_of_it = [], 0, 0
    for seed in range(10):
        last = [b.records for b in Curriculum(ladder, 16, "review", seed=seed).batches if b.stage == 8]
        again = [sum(r.stage != 8 for r in records) for records in last]
        stages += [r.stage for records in last for r in records if r.stage != 8]
        first, all_of_it = first + again[0] / len(last[0]), all_of_it + sum(again) / sum(map(len, last))
    assert set(stages) == set(range(8)) and first == pytest.approx(all_of_it, rel=.4)


def test_gaussian_rises_and_never_lets_the_easy_go(ladder):
    """E2H-G: the mean level rises steadily; at the end easy levels are drawn still, where the ladder has none."""
    curriculum = Curriculum(ladder, 16, "gaussian", seed=1)
    quarters = [levels_of(curriculum, i) for i in range(4)]
    means = [(q * np.arange(9)).sum() / q.sum() for q in quarters]
    assert means == sorted(means) and means[3] - means[0] > 1.5
    assert quarters[3][:3].sum() > 0 == levels_of(Curriculum(ladder, 16, seed=1), 3)[:3].sum()
    # By hand, at the end: level l has the chance exp(-((l - 8) / 4)^2 / 2), however many problems it has.
    bell = np.exp(-((np.arange(9) - 8) / 4) ** 2 / 2)
    ends = [levels_of(Curriculum(ladder, len(ladder) // 8, "gaussian", seed=seed), 3) for seed in range(40)]
    late = np.sum(ends, axis=0) / np.sum(ends)
    assert late[0] > .3 * bell[0] / bell.sum() and late[8] > .6 * bell[8] / bell.sum()


@pytest.mark.parametrize("order", ["gaussian", "adaptive"])
def test_each_batch_is_drawn_anew(ladder, order):
    """Of one random number for all of them, the run would be one batch, over and over."""
    ids = [{r.id for r in b.records} for b in Curriculum(ladder, 16, order, seed=1).batches]
    assert np.mean([len(one & other) for one, other in itertools.pairwise(ids)]) < 6


def test_adaptive_begins_with_the_levels_as_they_were_measured():
    """p (1 - p) + .01 of each problem: not of each level, and what is never, or always, solved has a chance too."""
    count = np.array([100, 50, 20, 50, 100, 50, 20, 50, 200])
    records, p = measured(count.tolist()), 1 - np.arange(9) / 8
    drawn = sum(np.bincount([level_of(r) for b in Curriculum(records, 16, "adaptive", seed=seed).batches
                             for r in b.records], minlength=9) for seed in range(10))
    wanted = count * (p * (1 - p) + .01)
    assert drawn / drawn.sum() == pytest.approx(wanted / wanted.sum(), abs=.015)
    assert drawn[0] > 0 < drawn[8]


def test_adaptive_learns_from_the_batch_for_the_next_but_one():
    """The next one's pictures are made already. What is always solved, as it was measured, stays as rare as it was."""
    easy = 0
    for seed in range(5):
        curriculum = Curriculum(measured([200] + [0] * 7 + [200]), 16, "adaptive", seed=seed)
        batch, before = next(iter(curriculum)), list(curriculum.batches)
        curriculum.learned([.5 if level_of(r) else 1.0 for r in batch.records])
        assert [k for k, b in enumerate(curriculum.batches) if b != before[k]] == [2]
        easy += sum(level_of(r) == 0 for r in curriculum.batches[2].records)
    assert easy < 15


def test_adaptive_follows_the_running_pass_rate():
    """Levels that are solved by now, or not at all, give way to those that are solved half of the time."""
    records = [replace(r, stage=0) for r in measured([150] * 9)]

    def drawn(rate_of) -> np.ndarray:
        curriculum = Curriculum(records, 16, "adaptive", seed=1)
        for batch in curriculum:
            curriculum.learned([rate_of(level_of(r)) for r in batch.records])
        return levels_of(curriculum, 3)

    mastered = drawn(lambda level: 1.0 if level < 6 else .5)  # p (1 - p) + .01: .01 against .26
    assert mastered[6:].min() > 5 * mastered[:6].max()
    hopeless = drawn(lambda level: 0.0 if level > 2 else .5)
    assert hopeless[:3].min() > 5 * hopeless[3:].max()


def test_adaptive_goes_on_as_it_would_have(ladder):
    """What is chosen hangs on what was met: a resumed run must choose the same, the batch that was made ready too."""
    def met(batch) -> list[float]:
        return [(int(r.id[-1]) if r.id[-1].isdigit() else 5) / 9 for r in batch.records]

    whole, first = [], Curriculum(ladder, 16, "adaptive", seed=3)
    for batch in first:
        whole.append(batch)
        first.learned(met(batch))
        if first.position == 7:
            state = json.loads(json.dumps(first.state_dict()))
    second = Curriculum(ladder, 16, "adaptive", seed=3)
    second.load_state_dict(state)
    assert second.position == 7
    for batch, wanted in zip(second, whole[7:], strict=True):
        assert batch == wanted
        second.learned(met(batch))
    with pytest.raises(ValueError, match="changed since the checkpoint"):
        Curriculum(ladder, 16, "adaptive", seed=4).load_state_dict(state)


def test_a_batch_of_adaptive_that_is_given_back_is_not_learned_from(ladder):
    curriculum = Curriculum(ladder, 16, "adaptive")
    for batch in itertools.islice(curriculum, 3):
        curriculum.learned([0.0] * len(batch.records))
    curriculum.undo()
    assert curriculum.state_dict()["position"] == len(curriculum.state_dict()["rates"]) == 2


@pytest.mark.parametrize("order", ["gaussian", "adaptive"])
def test_drawn_orders_of_problems_measured_anew_are_not_gone_on_with(ladder, order):
    """Same problems, other difficulties: the batches that were used would be said to be others."""
    state = Curriculum(ladder, 16, order).state_dict()
    anew = [replace(r, difficulty=1 - r.difficulty) for r in ladder]
    with pytest.raises(ValueError, match="changed since the checkpoint"):
        Curriculum(anew, 16, order).load_state_dict(state)


@pytest.mark.parametrize("order", ["gaussian", "adaptive"])
def test_drawn_orders_know_no_stages_and_want_measured_data(ladder, order):
    with pytest.raises(ValueError, match=f"--order {order} knows no stages"):
        Curriculum(ladder, 16, order, stages=range(2))
    with pytest.raises(ValueError, match="has no difficulty"):
        Curriculum([Record(str(i), "?", "1") for i in range(10)], 4, order)


def test_one_stage_alone_is_what_it_is_in_the_whole_run(ladder):
    whole = [b.records for b in Curriculum(ladder, 16, seed=1) if b.stage == 4]
    assert [b.records for b in Curriculum(ladder, 16, seed=1, stages=range(4, 5))] == whole
    assert [b.records for b in Curriculum(ladder, 16, seed=2, stages=range(4, 5))] != whole


def test_changed_data_is_refused_on_resume(ladder):
    state = Curriculum(ladder, 16).state_dict()
    with pytest.raises(ValueError, match="changed since the checkpoint"):
        Curriculum(ladder[:-1], 16).load_state_dict(state)
    with pytest.raises(ValueError, match="changed since the checkpoint"):
        Curriculum(ladder, 16, seed=1).load_state_dict(state)


def test_unmeasured_data_trains_in_random_order_only():
    raw = [Record(str(i), "?", "1") for i in range(10)]
    assert len(list(Curriculum(raw, 4, "random"))) == 3
    with pytest.raises(ValueError, match="--order random"):
        Curriculum(raw, 4)
    with pytest.raises(ValueError, match="has no difficulty"):
        Curriculum(raw, 4, "sorted")
    with pytest.raises(ValueError, match="knows no stages"):
        Curriculum(raw, 4, "random", stages=range(2))


def test_a_stage_that_the_data_lacks_is_named(ladder):
    with pytest.raises(ValueError, match="the data has no stage 3"):
        Curriculum([r for r in ladder if r.stage != 3], 16, stages=range(2, 5))


@pytest.mark.parametrize("levels", [{8: 20}, {7: 200, 8: 190}, {0: 20}])
def test_a_ladder_of_few_levels_is_no_larger_than_its_problems(levels):
    """Empty levels used to count as endless: the default size failed after all rollouts were done."""
    ladder = build_ladder(measured([levels.get(level, 0) for level in range(9)]))
    assert 0 < len(ladder) <= sum(levels.values())
    assert len({record.id for record in ladder}) == len(ladder)


def test_one_easy_problem_is_no_ladder_and_not_an_empty_one():
    with pytest.raises(ValueError, match="none of the 1 problems is of a level"):
        build_ladder(measured([1] + [0] * 8))
