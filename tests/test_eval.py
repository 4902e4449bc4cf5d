"""Scores by hand, the closing table, and pages that cannot be turned into markup by what a model writes."""
from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import compare
import numpy as np
import pytest
import torch
from conftest import ROOT, TOY
from PIL import Image

import eval
import rollout
from data import Dropped, Record, load_records, open_image, run_program, save_records
from eval import (
    Result,
    before_after,
    evaluate,
    judge,
    other_pictures,
    plot_curves,
    response_lines,
    scores_of,
    summarize,
    write_page,
    write_responses,
)
from rewards import Response, accuracy_reward
from rollout import Group, Sample, load_policy


def response(right: bool, tokens: int = 10, observation: float | None = None, answer: str | None = "1") -> Response:
    return Response(answer, float(right), 1.0, observation, "text", tokens, False)


@pytest.fixture
def results() -> list[Result]:
    easy = Record("easy", "?", "1", difficulty=0.25)
    hard = Record("hard", "?", "1", difficulty=0.75)
    return [Result(easy, [response(True, 10, 1.0), response(True, 20, 0.5)]),
            Result(hard, [response(False, 30), response(True, 50), response(False, 40, answer=None)])]


def test_summary_by_hand(results):
    """Means over problems of means over samples: pooled over samples, the problem with more samples weighs more."""
    scores = summarize(results)
    assert scores["accuracy"] == pytest.approx((1 + 1 / 3) / 2) and scores["length"] == pytest.approx((15 + 40) / 2)
    assert scores["observation"] == 0.75, "problems whose truth is unknown are left out"
    assert scores["unreadable"] == pytest.approx(1 / 6)
    assert scores["levels"]["0.250"]["accuracy"] == 1 and scores["levels"]["0.750"]["problems"] == 1


def test_closing_table_shows_both_ends(results):
    scores = summarize(results)
    worse = {"greedy": scores | {"accuracy": 0.125}, "sampled": scores}
    table = before_after(worse, {"greedy": scores, "sampled": scores})
    assert "12.5 -> 66.7" in table
    assert [line.split()[1] for line in table.splitlines()[2:]] == ["all", "0.250", "0.750"]


def test_evaluation_uses_the_judge_of_training(shipped, processor, test_set):
    options = {"style": "observe", "temperature": 1, "samples": 2, "max_tokens": 160}
    results = list(evaluate(shipped, processor, test_set[:4], **options))
    for result, record in zip(results, test_set):
        assert result.record == record and len(result.responses) == 2
        for r in result.responses:
            assert r.accuracy == accuracy_reward(r.text, record) and r.observation is not None


def test_another_seed_samples_other_responses(shipped, processor, test_set):
    """--seed stood in the settings, and a line that did not hand it on passed its tests."""
    def texts(seed: int) -> list[str]:
        results = evaluate(shipped, processor, test_set[:4], style="observe", temperature=1, samples=2, max_tokens=60,
                           seed=seed)
        return [response.text for result in results for response in result.responses]

    assert texts(0) == texts(0) != texts(1)


def test_a_changed_picture_of_any_record_is_noticed(tmp_path):
    """Of Parquet, bytes, path and PIL image alike; 64 records were looked into, and record 1 of 130 was none of them.
    A picture that cannot be read is left to check_records, a file that moves is the same."""
    def png(color: int) -> bytes:
        Image.new("RGB", (4, 4), (color, 0, 0)).save(tmp_path / "made.png")
        return (tmp_path / "made.png").read_bytes()

    plain = [Record(f"r{i}", "?", "1", images=(png(i),)) for i in range(130)]
    save_records(str(tmp_path / "a.parquet"), plain)
    save_records(str(tmp_path / "b.parquet"), [plain[0], replace(plain[1], images=(png(200),)), *plain[2:]])
    a, b = (load_records(str(tmp_path / name)) for name in ("a.parquet", "b.parquet"))
    assert eval.data_digest(a) == eval.data_digest(plain), "where the bytes lie is all the same"
    assert eval.data_digest(a) != eval.data_digest(b)
    assert eval.data_digest(a[::-1]) != eval.data_digest(a)

    (tmp_path / "one.png").write_bytes(png(1)), (tmp_path / "two.png").write_bytes(png(200))
    for one, two in ((png(1), png(200)), (str(tmp_path / "one.png"), str(tmp_path / "two.png")),
                     (Image.new("RGB", (4, 4)), Image.new("RGB", (2, 8))),
                     (Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "red")),
                     (png(1), str(tmp_path / "missing.png"))):
        digests = [eval.data_digest([plain[0], replace(plain[1], images=(image,)), *plain[2:]]) for image in (one, two)]
        assert digests[0] != digests[1] and all(text.startswith("130 problems (") for text in digests)
    both = [eval.data_digest([replace(plain[0], images=images)]) for images in ((b"ab", b"c"), (b"a", b"bc"))]
    assert both[0] != both[1]


@pytest.mark.parametrize("error", [ValueError("bad data"), OSError(errno.ENOSPC, "No space left on device", "x.json")])
def test_an_error_of_rank_0_ends_every_rank(monkeypatch, error):
    """One that is not passed on leaves the others waiting, until gloo ends them with noise of its own."""
    def work():
        raise error

    sent = []
    monkeypatch.setattr(rollout, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(rollout.dist, "broadcast_object_list", lambda box: sent.extend(box))
    with pytest.raises(ValueError, match=re.escape(str(error))):
        rollout.on_rank_0(work)
    assert sent == [None, str(error)]
    monkeypatch.setattr(rollout, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(rollout.dist, "broadcast_object_list", lambda box: box.__setitem__(slice(None), sent))
    with pytest.raises(SystemExit) as end:
        rollout.on_rank_0(work)
    assert end.value.code == 1


def test_the_record_is_the_unit_on_disk(shipped, processor, test_set, tmp_path):
    """What stands on disk is not done again, whatever --rows it was done with; a line that was cut is."""
    sampling = dict(style="observe", temperature=1, samples=4, max_tokens=60, seed=3)
    loaded = []

    def load():
        loaded.append(1)
        return shipped, processor

    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    wanted = eval.roll_out(tmp_path / "whole", "[x]", test_set[:6], load, max_rows=64, **sampling)
    eval.roll_out(tmp_path / "cut", "[x]", test_set[:4], load, max_rows=64, **sampling)
    [file] = (tmp_path / "cut").iterdir()
    kept = file.read_bytes()[:-200]
    file.write_bytes(kept)  # in the midst of the fourth
    found = eval.roll_out(tmp_path / "cut", "[x]", test_set[:6], load, max_rows=4, **sampling)
    assert found == wanted and all(len(result.responses) == 4 for result in found) and len(loaded) == 3
    added = file.read_bytes().removeprefix(kept)
    assert [json.loads(line)["id"] for line in added.splitlines() if line] == [r.id for r in test_set[3:6]]
    assert eval.roll_out(tmp_path / "cut", "[x]", test_set[5:2:-1], load, max_rows=4, **sampling) == found[5:2:-1]
    assert len(loaded) == 3, "nothing is left to do, so nothing is loaded"
    eval.roll_out(tmp_path / "whole", "bare", test_set[:2], load, max_rows=8, keep_texts=False, **sampling)
    lines = [json.loads(line) for line in (tmp_path / "whole/bare-0.jsonl").read_text().splitlines() if line]
    assert [line["id"] for line in lines] == [r.id for r in test_set[:2]]
    for line, result in zip(lines, wanted):
        assert [r["text"] for r in line["responses"]] == [""] * 4
        assert [r["answer"] for r in line["responses"]] == [r.answer for r in result.responses]


def lines_of(folder: Path, sampling: str) -> list[dict]:
    lines = map(json.loads, (folder / "responses.jsonl").read_text().splitlines())
    return [line for line in lines if line["sampling"] == sampling]


def on_two_processes(*options: str) -> None:
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend",
                           "c10d", "--rdzv-endpoint", "localhost:0", "eval.py", *options], cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.run
def test_responses_do_not_depend_on_rows_or_processes(tmp_path, monkeypatch):
    """Padding that leaks into a row, random numbers that a batch shares, or a chunk that depends on the process would
    make the score one of the machine."""
    options = ["--model", str(TOY / "model"), "--limit", "20", "--max-tokens", "60"]
    torch.set_num_threads(1)  # as torchrun's processes have
    for rows in (8, 64):
        monkeypatch.setattr(sys, "argv", ["eval.py", *options, "--rows", str(rows), "--out", str(tmp_path / f"{rows}")])
        eval.main()
    on_two_processes(*options, "--rows", "8", "--out", str(tmp_path / "two"))
    eight, many, two = (tmp_path / name for name in ("8", "64", "two"))
    assert len(lines_of(eight, "greedy")) == 20 and len(lines_of(eight, "T=1")) == 80
    assert lines_of(eight, "greedy") == lines_of(many, "greedy") == lines_of(two, "greedy")
    assert lines_of(eight, "T=1") == lines_of(many, "T=1") == lines_of(two, "T=1")
    first, second = (list((tmp_path / "two" / "rollouts").glob(f"toy-observe-greedy-{rank}.jsonl")) for rank in (0, 1))
    assert first and second and second[0].stat().st_size, "both processes worked"
    monkeypatch.setattr(rollout, "load_policy", None)
    eval.main()  # finished: the same command answers nothing again


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_with_other_rows_and_processes(tmp_path, monkeypatch):
    """Hours of answers survive SIGKILL, a line cut in two, less memory and another number of processes: the record is
    the unit. Two evaluations in one folder would spoil each other: the second is refused."""
    options = ["--model", str(TOY / "model"), "--limit", "48", "--max-tokens", "60", "--rows", "64"]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    torch.set_num_threads(1)  # as torchrun's processes have
    monkeypatch.setattr(sys, "argv", ["eval.py", *options, "--out", str(whole)])
    eval.main()

    def done() -> list[tuple[str, str]]:
        """(of which kind, id) of all that is answered."""
        lines = [(file.name.rpartition("-")[0], line) for file in (out / "rollouts").glob("*.jsonl")
                 for line in file.read_bytes().splitlines()]
        return [(name, json.loads(line)["id"]) for name, line in lines if line.endswith(b"]}")]

    monkeypatch.setattr(sys, "argv", ["eval.py", *options, "--out", str(out)])
    run = subprocess.Popen([sys.executable, *sys.argv], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    log = out / "rollouts/toy-observe-T=1-0.jsonl"
    while run.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(.02)
    os.killpg(run.pid, signal.SIGSTOP)
    with pytest.raises(ValueError, match="another process is at work there"):
        eval.main()
    os.killpg(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert 48 < len(done()) < 96 and not (out / "scores.json").exists()
    with open(log, "ab") as file:
        file.write(b'\n{"id": "test-0047", "responses": [{"answer": "3')
    before = log.read_bytes()
    on_two_processes(*options[:-1], "8", "--out", str(out))

    for kind in ("greedy", "T=1"):
        assert lines_of(out, kind) == lines_of(whole, kind) and lines_of(out, kind)
    scores, wanted = (json.loads((folder / "scores.json").read_text())["scores"] for folder in (out, whole))
    assert scores == wanted
    assert log.read_bytes().startswith(before), "what was on disk stays"
    assert len(done()) == len(set(done())) == 96, "all, and nothing is done twice"
    assert (out / "rollouts/toy-observe-T=1-1.jsonl").stat().st_size, "both processes worked"


def test_sections_are_counted(processor):
    """Length and share of what is observed, thought and answered, in tokens of the model."""
    text = "<observe>red 3, blue 5</observe> <think>3 + 5 = 8</think> <answer>8</answer>"
    record, ids = Record("a", "?", "8"), processor.tokenizer(text).input_ids
    group = Group(record, processor.encode(record, "observe"), [Sample(text, ids, False, torch.zeros(len(ids)))])
    [[judged]] = judge([group], "observe", processor)
    size = {tag: len(processor.tokenizer(part).input_ids) for tag, part in (
        ("observe", "red 3, blue 5"), ("think", "3 + 5 = 8"), ("answer", "8"), ("all", text))}
    assert judged.tokens == size.pop("all") and judged.sections == size and judged.accuracy == judged.format == 1
    scores = scores_of("x", [Result(record, [judged])])
    assert scores["sections"]["think"] == {"length": size["think"], "share": size["think"] / judged.tokens}


def test_grey_pictures_have_the_size_of_those_given(test_set):
    """Of another size the prompt would have other tokens, and the difference not be the picture's. Rows without a
    picture, which would be answered as before, and rows that cannot be used are no part of it."""
    rows = [replace(test_set[7], images=()), *test_set[:6], replace(test_set[6], images=test_set[6].images * 2),
            Dropped("x", "null gold", "no gold")]
    for row, other in zip(rows[1:-1], other_pictures(rows, "none"), strict=True):
        assert replace(other, images=()) == replace(row, images=()) and len(row.images) == len(other.images)
        for image, grey in zip(row.images, other.images):
            grey = open_image(grey, "grey")
            assert grey.size == open_image(image, "given").size
            assert grey.getcolors() == [(grey.width * grey.height, (128, 128, 128))]


def test_swapped_pictures_are_another_problems_of_the_same_shape(test_set):
    """One's own picture again, which several rows of a benchmark share, would be no control."""
    twin = replace(test_set[0], id="twin")
    rows = [test_set[0], twin, *test_set[1:60], Dropped("x", "null gold", "no gold")]
    shapes = {row.images: [open_image(image, row.id).size for image in row.images] for row in rows[:-1]}
    alone = 0
    for row, other in zip(rows[:-1], other_pictures(rows, "swapped"), strict=True):
        assert replace(other, images=()) == replace(row, images=()) and other.images != row.images
        theirs = {images for images, shape in shapes.items() if shape == shapes[row.images]} - {row.images}
        alone += not theirs
        assert other.images in theirs if theirs else len(other.images) == 1
    assert alone < 8
    two = replace(test_set[3], id="two", images=test_set[3].images * 2)
    assert "two" not in [row.id for row in other_pictures([*rows, two], "swapped")], "nobody else has two pictures"


def test_versions_of_a_problem_do_not_swap_their_pictures(test_set):
    """MathVerse shows a problem in up to six versions, of alike pictures; the same pixels may be stored otherwise."""
    def row(index: int, problem: str, colour: tuple, format: str = "PNG") -> Record:
        buffer = io.BytesIO()
        Image.new("RGB", (56, 28), colour).save(buffer, format)
        return replace(test_set[0], id=f"v{index}", images=(buffer.getvalue(),), meta={"problem_index": problem})

    red, blue = (200, 0, 0), (0, 0, 200)
    rows = [row(0, "a", red), row(1, "a", blue), row(2, "a", (0, 200, 0)), row(3, "b", red, "BMP"),
            row(4, "b", (9, 9, 0))]
    found = other_pictures(rows, "swapped")
    owner = {r.images: r for r in rows}
    for one, other in zip(rows, found, strict=True):
        theirs = owner[other.images]
        assert theirs.meta != one.meta
        assert list(open_image(theirs.images[0], "").getcolors()) != list(open_image(one.images[0], "").getcolors())
    with pytest.raises(ValueError, match="--pictures swapped: of 3 problems none has pictures, or another's to take"):
        other_pictures(rows[:3], "swapped")
    with pytest.raises(ValueError, match="--pictures none: of 1 problems none has pictures"):
        other_pictures([replace(rows[0], images=())], "none")


@pytest.mark.run
def test_problems_without_another_picture_count_on_neither_side(tmp_path, monkeypatch, capsys, test_set):
    """Left out, or answered as before, they would be losses, or nulls, that no picture has made; and a part of the
    benchmark that only they are of is no part of the others."""
    two = replace(test_set[3], id="two", images=test_set[3].images * 2, source="alone", difficulty=.5)
    save_records(str(tmp_path / "some.parquet"), [*test_set[:6], two, replace(test_set[7], images=())])
    monkeypatch.setattr(sys, "argv", ["eval.py", "--benchmark", f"{tmp_path}/some.parquet", "--model", f"{TOY}/model",
                                      "--pictures", "given,swapped", "--temperature", "0", "--out", f"{tmp_path}/out"])
    eval.main()
    given, swapped = json.loads((tmp_path / "out/scores.json").read_text())["scores"]
    assert given["by_problem"].keys() - swapped["by_problem"].keys() == {"two", test_set[7].id}
    assert (given["problems"], swapped["problems"]) == (8, 6)
    changes = [right - given["by_problem"][key] for key, right in swapped["by_problem"].items()]
    assert swapped["against_given"] == pytest.approx(np.mean(changes))
    assert re.search(r"source: alone *\| 1 *\| [\d.]+ *\| - ", capsys.readouterr().out)
    assert "swapped" in (tmp_path / "out/responses.html").read_text()


@pytest.mark.run
def test_pictures_side_by_side(tmp_path, monkeypatch, capsys, test_set, processor):
    """Each kind is answered with its own pictures; the difference is paired, and so is its interval."""
    save_records(str(tmp_path / "some.parquet"), test_set[:24])
    options = f"--benchmark {tmp_path}/some.parquet --model {TOY}/model --temperature 0 --out {tmp_path}/"
    for name, more in (("three", "--pictures given,none,swapped"), ("plain", ""), ("blind", "--pictures none")):
        monkeypatch.setattr(sys, "argv", ["eval.py", *options.split()[:-1], f"{tmp_path}/{name}", *more.split()])
        eval.main()
    told = capsys.readouterr().out
    three, plain, blind = (json.loads((tmp_path / name / "scores.json").read_text())["scores"]
                           for name in ("three", "plain", "blind"))
    assert [s["pictures"] for s in three] == ["given", "none", "swapped"]
    assert three[0] == plain[0] and three[1]["by_problem"] == blind[0]["by_problem"]
    assert "against_given" not in blind[0]
    for s in three[1:]:
        changes = [s["by_problem"][key] - right for key, right in three[0]["by_problem"].items()]
        assert s["against_given"] == pytest.approx(np.mean(changes)) and s["against_given"] < 0
        low, high = s["against_interval"]
        wide = 1.96 * np.std(changes) / len(changes) ** .5
        assert (high - low) / 2 == pytest.approx(wide, rel=.25)
    assert f"{100 * three[1]['against_given']:+.1f} [" in told and "observe, greedy, swapped" in told
    # Asked again in training's own words: what a grey picture gives is what eval.py says it gives.
    grey = list(evaluate(load_policy(str(TOY / "model")), processor, other_pictures(test_set[:24], "none"),
                         style="observe", temperature=0, samples=1, max_tokens=1024))
    assert {r.record.id: r.accuracy for r in grey} == three[1]["by_problem"]
    runs = compare.read_runs(tmp_path / "three")
    assert set(runs[0].problems) == {"some, greedy", "some, greedy, pictures none", "some, greedy, pictures swapped"}
    monkeypatch.setattr(sys, "argv", ["eval.py", *options.split()[:-1], f"{tmp_path}/again", "--responses",
                                      f"{tmp_path}/three/responses.jsonl"])
    with pytest.raises(SystemExit, match="its pictures were none, not some's; leave such lines out"):
        run_program(eval.main)


def test_other_pictures_are_set_against_those_given_by_hand(tmp_path):
    """In the same prompt style, whatever comes first in the table, and versions of a problem drawn together."""
    def answers(job: eval.Job, *right: int, count: int = 40) -> tuple[eval.Job, list[Result]]:
        return job, [Result(Record(f"{job.prompt}{i}"[-1 - (i > 9):], "?", "1", meta={"problem_index": i // 10}),
                            [response(i in right)]) for i in range(count)]

    done = [answers(eval.Job("x", prompt, "greedy", 0, 1, kind), *right) for prompt, kind, right in (
        ("think", "none", range(10)), ("think", "given", range(20)), ("think", "swapped", range(40)),
        ("none", "given", range(40)), ("none", "none", ()))]
    found = {(s["prompt"], s["pictures"]): s for s in eval.write_results(tmp_path, done, {})}
    assert {key: s["against_given"] for key, s in found.items() if "against_given" in s} == {
        ("think", "none"): -.25, ("think", "swapped"): .5, ("none", "none"): -1}
    assert found["think", "none"]["against_interval"] == pytest.approx([-.75, 0]), "four problems, of ten versions"
    assert found["none", "none"]["against_interval"] == [-1, -1]


@pytest.mark.parametrize("pictures, more, why", [
    ("grey", [], "--pictures grey: there are given, none, swapped"), ("none,none", [], "each only once"),
    ("none", ["--responses", "x.jsonl"], "to the pictures that were given")])
def test_kinds_of_pictures_that_cannot_be_meant(monkeypatch, pictures, more, why):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", "m", "--pictures", pictures, *more])
    with pytest.raises(ValueError, match=why):
        eval.check_args(eval.parse_args())


def test_page_escapes_what_a_model_writes(tmp_path, test_set):
    record = test_set[0]
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)">'
    said = [Response("1", 0.0, 0.0, None, evil, 5), Response("2", 1.0, 1.0, None, "fine", 5)]
    lines = response_lines(record, said, step=1, stage=0, weight=1.0)
    for line, reward in zip(lines, (0.0, 1.7)):
        line |= {"bonus": 0.2 * line["accuracy"], "reward": reward, "advantage": 1.0}
    path = tmp_path / "<b>" / "page.html"
    path.parent.mkdir()
    write_responses([(record, lines)] * 5, path, limit=3)
    page = path.read_text()
    assert page.count("<script>") == 1 and "&lt;script&gt;alert" in page and "/&lt;b&gt;</title>" in page
    assert page.count("<section>") == 3 and page.count('<pre class="wrong">') == page.count('<pre class="right">') == 3
    assert "reward 1.70 = accuracy 1, format 1, bonus 0.2; advantage +1.00; 5 tokens" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page), "self-contained"


def test_page_escapes_all_that_it_is_given(tmp_path):
    """Questions, golds, ids, benchmarks' names and links come from others' files too."""
    evil = '"><script>alert(1)</script>'
    record = Record(evil, evil, evil, (b"no picture",), source=evil)
    write_responses([(record, response_lines(record, [Response(evil, 0.0, 0.0, None, evil)], benchmark=evil))],
                    tmp_path / "one.html")
    section = {"pictures": [evil], "question": evil, "where": evil, "gold": evil, "blocks": [("right", evil, evil)]}
    write_page(tmp_path / "two.html", evil, evil, [section], [evil])
    for name in ("one", "two"):
        page = (tmp_path / f"{name}.html").read_text()
        assert page.count("<script>") == 1 and "&lt;script&gt;" in page and evil not in page


@pytest.mark.run
def test_one_schema_of_responses_for_training_and_evaluation(test_set, whole_run, tmp_path, monkeypatch):
    """Whoever reads the one file can read the other; and what training logged can be scored again."""
    shared = ["id", "sample", "response", "answer", "accuracy", "format", "observation", "tokens", "truncated"]
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(TOY / "model"), "--limit", "2", "--temperature", "0",
                                      "--max-tokens", "60", "--out", str(tmp_path / "e")])
    eval.main()
    trained = {"step", "stage", "weight", "bonus", "reward", "advantage"}
    evaluated = {"benchmark", "prompt", "sampling", "pictures", "images", "gold"}
    for file, own in ((whole_run / "responses.jsonl", trained), (tmp_path / "e/responses.jsonl", evaluated)):
        for line in map(json.loads, file.read_text().splitlines()):
            assert line.keys() == {*shared, *own} and [key for key in line if key in shared] == shared
            assert line["accuracy"] in (0.0, 1.0) and isinstance(line["response"], str)


@pytest.mark.run
def test_curves_are_drawn_even_of_a_run_just_begun(tmp_path):
    step = {"step": 1, "stage": None, "reward": 0.5, "accuracy": 0.5, "length": 5.0}
    warnings.simplefilter("error")
    for name, metrics in (("none", []), ("one", [step]), ("two", [step, step | {"step": 2}])):
        plot_curves(metrics, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.run
def test_commands_run(tmp_path):
    """What the README tells people to type."""
    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    model = str(TOY / "model")
    scores = run("eval.py", "--model", model, "--prompt", "none,observe", "--limit", "2", "--out", str(tmp_path / "e"))
    assert scores.count("avg@4") == 2, "the built-in world is shown greedy and at temperature 1"
    assert len((tmp_path / "e/responses.jsonl").read_text().splitlines()) == 2 * 2 * (1 + 4)
    Image.new("RGB", (56, 28), "white").save(tmp_path / "x.png")
    assert run("rollout.py", "--model", model, "--image", str(tmp_path / "x.png"), "--question", "What is it?",
               "--max-tokens", "20").strip()
    help_text = run("train.py", "--help")
    assert "--group-size" in help_text and "responses to a prompt" in help_text
    refused = subprocess.run([sys.executable, "train.py", "--stage", "9"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and refused.stderr.startswith("error: --stage 9"), "one line, not a stack"
