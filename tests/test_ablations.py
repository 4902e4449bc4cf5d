"""The evidence in assets/ablations and in the README is what the commands make of the runs."""
import json
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import ablations
import compare
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, TOY, lines

import train
from data import Record, load_records, open_image, save_records
from train import parse_config


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return ablations.load_runs()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A short run of train.py that is done, in a folder as ablations.py has it."""
    folder = tmp_path_factory.mktemp("done")
    save_records(str(folder / "held-out.parquet"), load_records(str(TOY / "test.parquet"))[:8])
    train.main(["--model", str(TOY / "model"), "--data", str(TOY / "ladder"), "--stage", "0-1", "--test",
                str(folder / "held-out.parquet"), "--eval-limit", "4", "--prompts-per-rollout", "40", "--group-size",
                "2", "--seed", "3", "--out", str(folder / "Observe-R1-seed3")])
    return folder / "Observe-R1-seed3"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Runs are made and kept in a folder of the test."""
    monkeypatch.setattr(ablations, "OUT", tmp_path / "out")
    monkeypatch.setattr(ablations, "RUNS", tmp_path / "kept/runs.parquet")
    monkeypatch.setattr(ablations, "TEST", TOY / "test.parquet")
    return tmp_path


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def section(name: str) -> str:
    """A table of tables.md."""
    return (ablations.KEPT / "tables.md").read_text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def test_rows_differ_in_what_they_say():
    """A switch misspelt, or two rows of one setting, would show after hours; a row must change one thing only."""
    settings = {row: vars(parse_config([*map(str, ablations.command_of(row, 0))])) for row in ablations.ROWS}
    for now in settings.values():
        del now["out"]

    def changed(one: str, other: str) -> list[str]:
        return [key for key in settings[one] if settings[one][key] != settings[other][key]]

    own = {row: str(now) for row, now in settings.items() if not row.startswith("again: ")}
    assert len(set(own.values())) == len(own)
    assert all(not changed(row, row.removeprefix("again: ")) for row in settings)
    for name, (against, rows) in ablations.TABLES.items():
        if name in ("control", "large"):  # (plain GRPO and rejection sampling differ in all that they leave out)
            continue
        for one, other in zip(rows, rows[1:]):
            base = one if against == "previous" else rows[0]
            assert len(changed(base, other)) == 1, f"{name}: {base} -> {other}"


@pytest.mark.parametrize("options, told", [
    (["--jobs", "0"], "--jobs: "), (["--seeds", "-1"], "--seeds: "), (["--held-out", "0"], "--held-out: "),
    (["--held-out", "50"], "asked 1,000 problems: move it away")])
def test_what_cannot_be_meant_is_refused_before_a_run(elsewhere, monkeypatch, capsys, options, told):
    """No run at a time was a division by zero after an hour of making models; runs that were asked other problems went
    into one file with the kept ones."""
    for work in ("make_held_out", "make_grey", "make_runs"):
        monkeypatch.setattr(ablations, work, lambda *_, work=work: pytest.fail(work))
    monkeypatch.setattr(ablations, "finished", lambda: {("Observe-R1", 0)})
    monkeypatch.setattr(sys, "argv", ["ablations.py", *options])
    with pytest.raises(SystemExit) as stop:
        ablations.main()
    assert told in f"{stop.value} {capsys.readouterr().err}"


def test_a_stopped_run_is_not_kept(elsewhere, monkeypatch):
    """train.py ends well when it is stopped; half a run would stand in the tables as a whole one."""
    monkeypatch.setattr(ablations, "run", lambda *command, **options: 0)
    with pytest.raises(SystemExit, match="rejection sampling, seed 0, was stopped"):
        ablations.make_runs(seeds=1, jobs=1)
    assert not (elsewhere / "kept").exists()


@pytest.mark.run
def test_a_finished_run_is_kept_as_it_is_and_not_done_again(elsewhere, finished_run, monkeypatch):
    """What the tables take from the Parquet file must be what they would take from the folder."""
    shutil.copytree(finished_run, elsewhere / "out/Observe-R1-seed3")
    monkeypatch.setattr(ablations, "run", None)
    assert ablations.train("Observe-R1", 3, 1) == ("Observe-R1", 3), "it is there: nothing is run"
    ablations.keep("Observe-R1", 3)
    [record] = pq.read_table(ablations.RUNS).to_pylist()
    [direct], kept = compare.read_runs(finished_run), ablations.as_run(record)
    assert (kept.seed, kept.settings, kept.problems, kept.before) == (
        direct.seed, direct.settings, direct.problems, direct.before)
    told = {name: value for name, value in direct.beside.items() if "in training" not in name}  # (of problems.jsonl)
    assert kept.beside.pop("minutes") == pytest.approx(told.pop("minutes"), rel=5e-3), "times are kept in three digits"
    assert kept.beside == pytest.approx(told, rel=1e-5) and len(told) + 1 < len(direct.beside)
    settings = json.loads(record["settings"])
    assert settings.pop("program") == "train.py"  # (which the kept runs, older ones, do not say)
    assert ablations.as_run(record | {"settings": json.dumps(settings)}).settings == direct.settings
    on_the_way = [a for a in record["answers"] if 0 < a["step"] < record["steps"][-1]["step"]]
    difficulty = {r.id: r.difficulty for r in load_records(str(TOY / "test.parquet"))}
    assert len(on_the_way) == 4 and all(a["difficulty"] == difficulty[a["problem"]] for a in on_the_way)
    logged = [json.loads(line) for line in (finished_run / "responses.jsonl").read_text().splitlines()]
    assert [len(group["tokens"]) for group in record["groups"]] == [2] * (2 * len(record["steps"])), "two a rollout"
    for name in ("accuracy", "format", "tokens"):
        assert [value for group in record["groups"] for value in group[name]] == [line[name] for line in logged]
    monkeypatch.setattr(ablations, "ROWS", {"Observe-R1": ""})
    monkeypatch.setattr(ablations, "train", lambda row, seed, threads: pytest.fail(f"{row} {seed}") if seed == 3 else (
        shutil.copytree(finished_run, ablations.OUT / ablations.name_of(row, seed)) and (row, seed)))
    ablations.make_runs(seeds=4, jobs=1)
    assert ablations.finished() == {("Observe-R1", seed) for seed in range(4)}
    runs = ablations.load_runs(5)
    assert [len(records) for records in runs.values()] == [4] and not ablations.not_made(runs, 4)
    assert ablations.not_made(runs, 5) == "Seeds still to be made: Observe-R1 (4 of 5)."
    with pytest.raises(ValueError, match="has no runs of these rows"):
        ablations.load_runs(0)


@pytest.mark.run
def test_a_row_is_made_anew_when_its_runs_are_forgotten(elsewhere, finished_run):
    """A run of it that is still in out/ablations would be taken for a new one."""
    for row in ("Observe-R1", "Observe-R1 random"):
        shutil.copytree(finished_run, elsewhere / "out" / ablations.name_of(row, 3))
        (elsewhere / "out" / f"{ablations.name_of(row, 3)}.log").write_text("")
        (elsewhere / "out" / f"pictures-{ablations.name_of(row, 3)}").mkdir()
        ablations.keep(row, 3)
    ablations.forget("Observe-R1")
    assert ablations.finished() == {("Observe-R1 random", 3)}
    assert sorted(path.name for path in (elsewhere / "out").iterdir()) == [
        "Observe-R1-random-seed3", "Observe-R1-random-seed3.log", "pictures-Observe-R1-random-seed3"]


@pytest.mark.run
def test_runs_of_another_start_are_not_put_beside_the_kept_ones(elsewhere, finished_run):
    """A start that is not shipped is made anew on another machine, where rounding makes it another model."""
    for seed in (3, 4):
        shutil.copytree(finished_run, elsewhere / f"out/Observe-R1-seed{seed}")
    ablations.keep("Observe-R1", 3)
    metrics = elsewhere / "out/Observe-R1-seed4/metrics.jsonl"
    first, *rest = metrics.read_text().splitlines()
    first = json.loads(first)
    problem, accuracy = next(iter(first["eval"]["greedy"]["by_problem"].items()))
    first["eval"]["greedy"]["by_problem"][problem] = 1 - accuracy
    metrics.write_text("\n".join([json.dumps(first), *rest]) + "\n")
    with pytest.raises(SystemExit, match="seed 4, .* began from another model"):
        ablations.keep("Observe-R1", 4)
    assert ablations.finished() == {("Observe-R1", 3)}


@pytest.mark.run
def test_runs_of_unlike_columns_lie_in_one_file(elsewhere, finished_run):
    """Random order has no stages, the think prompt no observation, and a later train.py may log something new."""
    shutil.copytree(finished_run, elsewhere / "out/Observe-R1-seed3")
    shutil.copytree(finished_run, elsewhere / "out/Observe-R1-random-seed3")
    metrics = elsewhere / "out/Observe-R1-random-seed3/metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        if "reward" in line:
            line["stage"], line["new"] = None, .5
            del line["observation"]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for row in ("Observe-R1", "Observe-R1 random"):
        ablations.keep(row, 3)
    one, other = pq.read_table(ablations.RUNS).to_pylist()
    assert one["steps"][0]["stage"] == 0 and one["steps"][0]["new"] is None and one["steps"][0]["observation"] > 0
    assert other["steps"][0]["stage"] is None and other["steps"][0]["new"] == .5
    assert ablations.as_run(one).problems == ablations.as_run(other).problems


@pytest.mark.run
def test_weight_and_bonus_act_where_the_method_says(runs):
    """On groups that the runs sampled: (d (1 - d))^0.5 and ^1.5; weighted, no bonus where all or none are right."""
    text = ablations.mechanisms(runs)
    assert text in section("mechanisms")
    powers = [float(x) for x in re.findall(r"power ([\d.]+), with the weight ([\d.]+)\.", text)[0]]
    assert powers == pytest.approx([.5, 1.5], abs=.1)
    acts = [float(row[-1]) for row in cells(text) if row[0].endswith(" of 8")]
    assert acts[0] == acts[8] == 0 < acts[1] < min(acts[2:8])


@pytest.mark.run
def test_tables_follow_from_the_kept_runs(runs, tmp_path, monkeypatch, capsys):
    """A table is not to outlive the runs that it was made of (intervals are drawn, which numpy may do otherwise).
    One command makes them all, and runs nothing."""
    kept = (ablations.KEPT / "tables.md").read_text()
    assert ablations.by_difficulty(runs) in section("levels")
    for row in ablations.STAGES:
        assert ablations.by_stage(row, runs[row]) in section("stages")
    monkeypatch.setattr(compare, "difference", partial(compare.difference, draws=2))
    monkeypatch.setattr(ablations, "run", None)
    monkeypatch.setattr(ablations, "load_runs", lambda seeds: runs)
    monkeypatch.setattr(ablations, "KEPT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--tables"])
    ablations.main()
    made = (tmp_path / "tables.md").read_text()
    drawn = re.compile(r" \[.*?\]|-{3,}| +(?=\|)")
    assert drawn.sub("", made) == drawn.sub("", kept) and made in capsys.readouterr().out
    for name in ("build-up.png", "turnover.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def answers_of(step: int, *right: str, sampling: str = "greedy") -> list[dict]:
    """Of four held-out problems a and b, easy, c and d, hard, which were right at a step."""
    return [{"step": step, "sampling": sampling, "problem": problem, "difficulty": float(problem in "cd"),
             "accuracy": float(problem in right)} for problem in "abcd"]


def test_turnover_by_hand(monkeypatch):
    """Newly lost counts what was right before, of all; sampled answers, and levels of the other part, do not count."""
    records = [{"answers": [*answers_of(0, "a", "b"), *answers_of(5, "a", "c"), *answers_of(9, "a", "d", "b"),
                            *answers_of(0, "c", sampling="sampled")]},
               {"answers": [*answers_of(0, "a"), *answers_of(5, "a", "b"), *answers_of(9, "b", "c")]}]
    monkeypatch.setattr(ablations, "ROWS", {"x": ""})
    monkeypatch.setattr(ablations, "PARTS", {"easy": (0, .25), "hard": (.75, 1)})
    monkeypatch.setattr(ablations, "AGAINST_RANDOM", (("easy", "newly lost"),))
    header, _, row, *_ = cells(ablations.turnover({"x": records, "Observe-R1 random": records[1:]}))
    told = dict(zip(header, row))
    assert told.pop("easy: newly lost, against random order").startswith("-25.0 [")  # a quarter, against a half
    assert told == {
        "row": "x", "seeds": "2", "easy: newly solved, %": "25.0 ± 25.0", "easy: newly lost, %": "25.0 ± 25.0",
        "easy: kept, %": "50.0 ± 50.0", "hard: newly solved, %": "50.0 ± 0.0", "hard: newly lost, %": "0.0 ± 0.0",
        "hard: kept, %": "0.0 ± 0.0"}
    _, _, first, second = cells(ablations.turnover_by_stage("x", records))
    assert first == ["0 to 5", "25.0 ± 0.0", "12.5 ± 12.5", "25.0 ± 0.0"]
    assert second == ["5 to 9", "37.5 ± 12.5", "25.0 ± 0.0", "25.0 ± 0.0"]


def test_use_of_pictures_by_hand(monkeypatch):
    """Given minus none, paired; what training added to each. The start is one, however many seeds there are."""
    def seen(end: str, kind: str, *right: int) -> list[dict]:
        return [{"end": end, "pictures": kind, "problem": str(i), "accuracy": float(i in right)} for i in range(4)]

    start = [*seen("before", "given", 0, 1), *seen("before", "none", 0), *seen("before", "swapped")]
    records = [{"pictures": start + seen("after", "given", 0, 1, 2, 3) + seen("after", "none", *none)
                + seen("after", "swapped", 3)} for none in ((0,), (0, 1))]
    monkeypatch.setattr(ablations, "LOOKED", ("x",))
    _, _, *rows = cells(ablations.picture_use({"x": records}))
    assert [[cell.partition(" [")[0] for cell in row] for row in rows] == [
        ["x", "2", "before", "50.0", "25.0", "+25.0", "50.0", "0.0", "+50.0", "0.0"],
        ["x", "2", "after", "100.0", "37.5", "+62.5", "37.5 ± 12.5", "25.0", "+75.0", "25.0 ± 0.0"],
        ["x", "2", "added by training", "+50.0", "+12.5", "", "", "+25.0", "", ""]]


@pytest.mark.run
def test_answers_to_other_pictures_are_kept(elsewhere, finished_run, monkeypatch):
    """Of the starting model, and of the newest checkpoint: what its weights answer, and not another's."""
    row, held_out = "again: Observe-R1", finished_run.parent / "held-out.parquet"
    monkeypatch.setattr(ablations, "inputs_of", lambda row: (TOY / "model", TOY / "ladder", held_out))
    shutil.copytree(finished_run, ablations.OUT / ablations.name_of(row, 3))
    ablations.look(row, TOY / "model", ablations.start_of(row), 1)
    assert ablations.train(row, 3, 1) == (row, 3)
    ablations.keep(row, 3)
    [record] = pq.read_table(ablations.RUNS).to_pylist()
    scores = json.loads((finished_run / "scores.json").read_text())
    for end in ("before", "after"):
        kinds = {kind: {a["problem"]: a["accuracy"] for a in record["pictures"]
                        if (a["end"], a["pictures"]) == (end, kind)} for kind in ("given", "none", "swapped")}
        assert kinds["given"] == scores[end]["greedy"]["by_problem"], "answered as in training"
        assert len(kinds["none"]) == len(kinds["swapped"]) == 8
        assert sum(kinds["none"].values()) < sum(kinds["given"].values())


@pytest.mark.run
def test_a_new_run_takes_over_the_starting_models_answers(elsewhere, finished_run):
    """They are the same whatever the seed, and a third of a run; nothing else may come from the other run."""
    shutil.copytree(finished_run, ablations.OUT / "other")
    look = ablations.OUT / "a look"  # at other pictures, which lies among the runs and is none
    look.mkdir()
    shutil.copy(finished_run / "scores.json", look)
    options = ["--model", str(TOY / "model"), "--data", str(TOY / "ladder"), "--stage", "0-1", "--test",
               str(finished_run.parent / "held-out.parquet"), "--eval-limit", "4", "--prompts-per-rollout", "40",
               "--group-size", "2", "--seed", "4", "--out"]
    new = ablations.OUT / "new"
    ablations.answered_before(new, [*options, new])
    before = {file.name: file.read_bytes() for file in (new / "held-out").iterdir()}
    assert len(before) == 2 and all(name.startswith("step000000") for name in before)
    train.main([*options, str(new), "--resume"])
    train.main([*options, str(elsewhere / "alone")])
    assert lines(new) == lines(elsewhere / "alone") != lines(finished_run)
    assert {name: (new / "held-out" / name).read_bytes() for name in before} == before, "not answered again"
    ablations.answered_before(ablations.OUT / "think", [*options, ablations.OUT / "think", "--prompt", "think"])
    assert not (ablations.OUT / "think").exists(), "no answers to that prompt are there"


@pytest.mark.run
def test_a_start_measures_the_problems_of_another_ladder(tmp_path, monkeypatch):
    """The difficulties that it had would be another model's; the usual size of a ladder leaves most problems out."""
    problems = load_records(str(TOY / "ladder"))[::30]
    save_records(str(tmp_path / "toy/ladder/ladder.parquet"), [replace(r, difficulty=1.0) for r in problems])
    shutil.copytree(TOY / "model", tmp_path / "large/model")
    monkeypatch.setitem(ablations.WORLDS, "large", tmp_path / "toy")
    monkeypatch.setattr(ablations, "OUT", tmp_path)
    ablations.make_world("large")
    model, ladder, _ = ablations.inputs_of("large: Observe-R1")
    assert model == tmp_path / "large/model"
    found = {record.id: record for record in load_records(str(ladder))}
    assert found.keys() <= {record.id for record in problems} and len(found) > .9 * len(problems)
    assert {record.stage for record in found.values()} == set(range(9))
    off = [abs(found[r.id].difficulty - r.difficulty) for r in problems if r.id in found]
    assert sum(off) / len(off) < .15, "measured anew, by what here is the same model"
    written = (ladder / "ladder.parquet").stat().st_mtime_ns
    ablations.make_world("large")
    assert (ladder / "ladder.parquet").stat().st_mtime_ns == written, "once made, it is taken as it is"


def test_answers_are_taken_over_from_the_very_same_start_only(elsewhere, monkeypatch):
    """Three starts answer the one held-out file of steep; another commit may answer otherwise."""
    def begins(row: str, seed: int, name: str) -> bool:
        ablations.answered_before(ablations.OUT / name, ablations.command_of(row, seed))
        return (ablations.OUT / name).exists()

    monkeypatch.setattr(ablations, "environment", lambda: {"commit": "now"})
    done = ablations.OUT / "done"
    (done / "held-out").mkdir(parents=True)
    (done / "held-out/step000000-greedy-0.jsonl").write_text("")
    kept = train.as_kept(parse_config([*map(str, ablations.command_of("steep: Observe-R1", 0))]))
    for name, value in (("settings", kept), ("environment", {"commit": "now"}), ("scores", {})):
        (done / f"{name}.json").write_text(json.dumps(value))
    assert begins("steep: Observe-R1 reversed", 1, "same")
    for row in ("steep: Observe-R1 think random", "filler: Observe-R1 random", "Observe-R1"):
        assert not begins(row, 1, "other"), row
    monkeypatch.setattr(ablations, "environment", lambda: {"commit": "then"})
    assert not begins("steep: Observe-R1", 1, "older")


def test_rows_are_of_the_world_that_they_say():
    """Another world's held-out problems, in all rows of a table alike, would not show in the table."""
    names = {row: [str(path) for path in ablations.inputs_of(row)] for row in ablations.ROWS}
    steep = ["assets/steep/ladder", "assets/steep/test.parquet"]
    toy, test, out = "assets/toy/ladder", str(ablations.TEST), str(ablations.OUT)
    worlds = {"steep": ["assets/steep/model", *steep], "filler": ["assets/filler/model", *steep],
              "terse": ["assets/terse/model", *steep], "large": [f"{out}/large/model", f"{out}/large/ladder", test],
              "steeper": [f"{out}/steeper/model", f"{out}/steeper/ladder", steep[1]],
              **{name: [f"{out}/{name}/model", toy, test] for name in ("even", "longer")}}
    for row, inputs in names.items():
        ladder = str(ablations.GREY) if row == "grey pictures" else toy
        assert inputs == worlds.get(row.partition(":")[0], ["assets/toy/model", ladder, test]), row
        config = parse_config([*map(str, ablations.command_of(row, 0))])
        assert [config.model, config.data, config.test] == inputs


def test_a_look_asks_as_the_run_was_asked(elsewhere, monkeypatch):
    """In its prompt style, on its held-out problems, into a folder that is no other start's."""
    asked = {}

    def run(*command, **_) -> int:
        words = [*map(str, command)]
        asked[words[words.index("--out") + 1]] = {
            name: words[words.index(f"--{name}") + 1] for name in ("model", "benchmark", "prompt", "pictures")}
        return 0

    monkeypatch.setattr(ablations, "run", run)
    rows = ("again: Observe-R1", "again: GRPO think random", "steep: Observe-R1", "steep: Observe-R1 think random")
    for row in rows:
        model, _, test = ablations.inputs_of(row)
        ablations.look(row, model, ablations.start_of(row), 1)
        assert asked[str(ablations.start_of(row))] == {
            "model": str(model), "benchmark": str(test), "prompt": "think" if "think" in row else "observe",
            "pictures": "given,none,swapped"}
    assert len(asked) == 4 and ablations.start_of("grey pictures") == ablations.start_of("again: Observe-R1")


def test_rows_have_the_seeds_that_were_planned(elsewhere, monkeypatch):
    """Three where a row was there before, four of the large model, and all of the others; models are made first."""
    made = []
    rows = ("large: x", "again: x", "x", "even: x")
    monkeypatch.setattr(ablations, "ROWS", dict.fromkeys(rows, ""))
    monkeypatch.setattr(ablations, "make_world", made.append)
    monkeypatch.setattr(ablations, "train", lambda row, seed, threads: made.append((row, seed)) or (row, seed))
    monkeypatch.setattr(ablations, "keep", lambda *_: None)
    ablations.make_runs(seeds=8, jobs=1)
    assert made == ["even", "large", *((row, seed) for seed in range(3) for row in rows),
                    *((row, 3) for row in rows if row != "again: x"), *(("x", seed) for seed in range(4, 8))]
    lacking = ablations.not_made({row: [{}] * 3 for row in rows})
    assert lacking == "Seeds still to be made: large: x (3 of 4), x (3 of 8), even: x (3 of 4)."
    assert ablations.not_made({row: [{}] * 3 for row in rows}, 3) == ""


def test_leads_of_observe_by_hand(monkeypatch):
    """Think and observe of one seed, which need not be those at hand first; starts by problem; c and d are sums. A lead
    that was there before training, told as what training gave, once turned the order of two starts about."""
    monkeypatch.setattr(ablations, "load_records", lambda path: [
        Record(name, "?", "1", source="toy/sum" if name in "cd" else "toy/bars") for name in "abcd"])

    def seeds(start: str, *ends: str) -> list[dict]:
        return [{"seed": seed, "answers": [*answers_of(0, *start), *answers_of(9, *end), *(
            answer for step in (0, 9) for answer in answers_of(step, sampling="sampled"))]}
            for seed, end in enumerate(ends)]

    runs = dict.fromkeys((row for rows in ablations.LEADS.values() for row in rows), [])
    (observe, think), (more, fewer), (level, _), (other, others), *_ = ablations.LEADS.values()
    runs |= {observe: seeds("", "abcd", "ac"), think: seeds("a", "ab", "a"), level: seeds("", "abcd"),
             more: seeds("cd", "", "abcd")[1:], fewer: seeds("", "", "ab"), other: seeds("", "a"),
             others: seeds("", "")}
    header, _, *made = cells(ablations.leads(runs))
    told = {(line[0], line[2]): dict(zip(header, [cell.partition(" [")[0] for cell in line])) for line in made}
    assert {(start, line["seeds"]) for (start, _), line in told.items()} == {
        ("the first world's", "2"), ("longer", "1"), ("steep", "1")}, "even has no pair"

    def lead(start: str, part: str) -> list[str]:
        return list(told[start, part].values())[3:]

    # Before, after, added, and both against the first world's, whose problems steep is not asked.
    assert lead("the first world's", "all, greedy") == ["-25.0", "+37.5", "+62.5", "-", "-"]
    assert lead("the first world's", "sums, greedy") == ["+0.0", "+75.0", "+75.0", "-", "-"]
    assert lead("longer", "all, greedy") == ["+50.0", "+50.0", "+0.0", "+12.5", "-62.5"]
    assert lead("longer", "sums, greedy") == ["+100.0", "+100.0", "+0.0", "+25.0", "-75.0"]
    assert lead("longer", "all, T=1") == ["+0.0"] * 5
    assert lead("steep", "all, greedy") == ["+0.0", "+25.0", "+25.0", "-", "-"]


def test_a_worlds_turnover_is_against_its_own_random_order(monkeypatch):
    """The problems of two worlds may be called alike."""
    rows = ("Observe-R1 random", "steep: Observe-R1 random", "steep: x")
    monkeypatch.setattr(ablations, "ROWS", dict.fromkeys(rows, ""))
    lost = [{"answers": [*answers_of(0, "a", "b"), *answers_of(9, *right)]} for right in ((), "a", "ab")]
    header, _, *made = cells(ablations.turnover({row: [record] for row, record in zip(rows, lost)}))
    at = header.index("easy (0 - .25): newly lost, against random order")
    assert [row[at].partition(" [")[0] for row in made] == ["-", "-", "-50.0"]


def test_the_plot_of_turnover_has_losses_to_the_left(monkeypatch, tmp_path):
    """Solved and lost the other way round would be a plot that looks as well."""
    bars = []
    monkeypatch.setattr(ablations, "ROWS", {"x": ""})
    monkeypatch.setattr(ablations.Figure, "savefig", lambda figure, *_, **__: bars.extend(
        [[bar.get_width() for bar in axis.patches] for axis in figure.axes]))
    ablations.draw_turnover({"x": [{"answers": [*answers_of(0, "c"), *answers_of(9, "a", "b")]}]}, tmp_path / "x.png")
    assert bars == [[100, 0], [0, -50]]


def test_the_grey_ladder_is_the_ladder_but_for_its_pictures(tmp_path, monkeypatch):
    """Swapped ones, or another choice of problems, would be another row than the table says."""
    problems = load_records(str(TOY / "ladder"))[::100]
    monkeypatch.setattr(ablations, "load_records", lambda path: problems)
    monkeypatch.setattr(ablations, "GREY", tmp_path / "grey/ladder.parquet")
    ablations.make_grey()
    grey = load_records(str(tmp_path / "grey/ladder.parquet"))
    assert [replace(r, images=()) for r in grey] == [replace(r, images=()) for r in problems]
    for one, other in zip(grey, problems):
        [image], [picture] = one.images, other.images
        image = open_image(image, one.id)
        assert image.size == open_image(picture, one.id).size and len(image.getcolors()) == 1


def evidence(name: str) -> dict[str, list[str]]:
    """Of a table in tables.md, by row, what the READMEs show: accuracies with their differences, and what is beside."""
    against, rows = ablations.TABLES[name]
    made = cells(section(name))
    if not made:
        return {}
    second = next(i for i, line in enumerate(made) if i and line[0] == "setting")
    first, then = made[0], made[second]
    score = {kind: next(i for i, title in enumerate(first) if title.endswith(f", {kind}, %"))
             for kind in ("T=1", "greedy")}
    change = {kind: first.index(f"against the {against}", at) for kind, at in score.items()}
    places = [score["T=1"], change["T=1"], score["greedy"], change["greedy"]]
    more = [then.index(title) for title in ("observation, T=1, %", "tokens, T=1", "groups with signal, %", "minutes")]
    there = {row for row, _ in ablations.finished()}
    found = {}
    for i, row in enumerate(row for row in rows if row in there):  # (after a header and its rule)
        one, two = made[2 + i], made[second + 2 + i]
        assert one[0] == two[0]
        found[row] = ["" if cell == "-" else cell for cell in [*(one[i] for i in places), *(two[i] for i in more)]]
    return found


def test_the_readmes_show_what_the_runs_came_to():
    """Numbers in a README outlive the runs that they came from: each row must be that of the table. The main README
    may have some of the rows, and the first of their columns. (Numbers in sentences are checked by nobody.)"""
    tables = [evidence(name) for name in ablations.TABLES if name not in ("order", "control", "constant-lr")]
    told = cells((ablations.KEPT / "README.md").read_text())
    for table in tables:
        for row, wanted in table.items():
            shown = [line[2:] for line in told if line[0] == row]
            assert wanted in shown or wanted[:-1] in shown, f"{row}: {wanted}"  # (minutes may be left out)
    looks, leads = ({tuple(line) for line in cells(section(name))} for name in ("pictures", "leads"))
    for line in told + cells((ROOT / "README.md").read_text()):
        of_the_row = [table[line[0]] for table in tables if line[0] in table]
        if line[0] in ablations.LEADS:
            assert tuple(line) in leads, line
        elif line[2:3] in (["before"], ["after"], ["added by training"]):
            assert tuple(line) in looks, line
        else:
            assert not of_the_row or line[2:] in [wanted[:len(line) - 2] for wanted in of_the_row], line
    by_level = {line[0]: line[1:4] for line in cells(section("levels"))}
    called = {"control": "rejection sampling", "Observe-R1, random order": "Observe-R1 random",
              "Observe-R1, ladder": "Observe-R1", "Observe-R1, sorted": "Observe-R1 sorted",
              "Observe-R1, hard to easy": "Observe-R1 reversed"}
    for name, row in called.items():
        assert [name, *by_level[row]] in told


@pytest.mark.run
def test_intervals_follow_from_the_kept_runs(runs):
    """Every claim is an interval's; they are drawn, which another numpy may do otherwise, in the third digit."""
    def numbers(line: list[str]) -> list[float]:
        return [float(x) for cell in line for x in re.findall(r"[-+]?\d+\.\d", cell)]

    steep, steeper = (ablations.side_by_side(runs, name) for name in ("steep", "steeper"))
    for name, made in (("leads", ablations.leads(runs)), ("steep", steep), ("steeper", steeper)):
        for line, kept in zip(cells(made), cells(section(name)), strict=True):
            assert numbers(line) == pytest.approx(numbers(kept), abs=.2), line
