"""Scores by hand, the closing table, and pages that cannot be turned into markup by what a model writes."""
from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TOY
from PIL import Image

import eval
from data import Record, load_records, save_records
from eval import Result, Sample, before_after, evaluate, judge, plot_curves, scores_of, summarize, write_page
from rewards import accuracy_reward


def sample(correct: bool, tokens: int = 10, observation: float | None = None, answer: str | None = "1") -> Sample:
    return Sample("text", answer, correct, 1.0, observation, tokens, False)


@pytest.fixture
def results() -> list[Result]:
    easy = Record("easy", "?", "1", difficulty=0.25)
    hard = Record("hard", "?", "1", difficulty=0.75)
    return [Result(easy, [sample(True, 10, 1.0), sample(True, 20, 0.5)]),
            Result(hard, [sample(False, 30), sample(True, 50), sample(False, 40, answer=None)])]


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
    assert "12.5 ->  66.7" in table
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["all", "0.250", "0.750"]


def test_evaluation_uses_the_judge_of_training(shipped, processor, test_set):
    options = {"style": "observe", "temperature": 1, "samples": 2, "max_tokens": 160}
    results = list(evaluate(shipped, processor, test_set[:4], **options))
    for result, record in zip(results, test_set):
        assert result.record == record and len(result.samples) == 2
        for s in result.samples:
            assert s.correct == (accuracy_reward(s.text, record) == 1.0) and s.observation is not None


def test_a_changed_picture_of_any_record_is_noticed(tmp_path):
    """Of Parquet, bytes, path and PIL image alike; 64 records were looked into, and record 1 of 130 was none of them.
    A picture that cannot be read is left to check_prompts, a file that moves is the same."""
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
    monkeypatch.setattr(eval, "place", lambda: (0, 2))
    monkeypatch.setattr(eval.dist, "broadcast_object_list", lambda box: sent.extend(box))
    with pytest.raises(ValueError, match=re.escape(str(error))):
        eval.together(work)
    assert sent == [None, str(error)]
    monkeypatch.setattr(eval, "place", lambda: (1, 2))
    monkeypatch.setattr(eval.dist, "broadcast_object_list", lambda box: box.__setitem__(slice(None), sent))
    with pytest.raises(SystemExit) as end:
        eval.together(work)
    assert end.value.code == 1


def test_responses_do_not_depend_on_rows_or_processes(tmp_path, monkeypatch):
    """Padding that leaks into a row, random numbers that a batch shares, or a chunk that depends on the process would
    make the score one of the machine."""
    options = ["--model", str(TOY / "model"), "--limit", "20", "--max-tokens", "60"]

    def responses(out: str, kind: str) -> list[dict]:
        lines = map(json.loads, (tmp_path / out / "responses.jsonl").read_text().splitlines())
        return [line for line in lines if line["sampling"] == kind]

    torch.set_num_threads(1)  # as torchrun's processes have
    for rows in (8, 64):
        monkeypatch.setattr(sys, "argv", ["eval.py", *options, "--rows", str(rows), "--out", str(tmp_path / f"{rows}")])
        eval.main()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend",
                           "c10d", "--rdzv-endpoint", "localhost:0", "eval.py", *options, "--rows", "8", "--out",
                           str(tmp_path / "two")], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(responses("8", "greedy")) == 20 and len(responses("8", "T=1")) == 80
    assert responses("8", "greedy") == responses("64", "greedy") == responses("two", "greedy")
    assert responses("8", "T=1") == responses("64", "T=1") == responses("two", "T=1")
    first, second = (list((tmp_path / "two" / "rollouts").glob(f"toy-observe-greedy-{rank}.jsonl")) for rank in (0, 1))
    assert first and second and second[0].stat().st_size, "both processes worked"
    monkeypatch.setattr(eval, "load_policy", None)
    eval.main()  # finished: the same command answers nothing again


def test_sections_are_counted(processor):
    """Length and share of what is observed, thought and answered, in tokens of the model."""
    text = "<observe>red 3, blue 5</observe> <think>3 + 5 = 8</think> <answer>8</answer>"
    sample = judge(text, Record("a", "?", "8"), "observe", processor)
    size = {tag: len(processor.tokenizer(part).input_ids) for tag, part in (
        ("observe", "red 3, blue 5"), ("think", "3 + 5 = 8"), ("answer", "8"), ("all", text))}
    assert sample.tokens == size.pop("all") and sample.sections == size
    scores = scores_of("x", [Result(Record("a", "?", "8"), [sample])])
    assert scores["sections"]["think"] == {"length": size["think"], "share": size["think"] / sample.tokens}


def test_page_escapes_what_a_model_writes(tmp_path, test_set):
    record = test_set[0]
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)">'
    line = {"step": 1, "stage": 0, "id": record.id, "weight": 1.0, "responses": [
        {"text": evil, "accuracy": 0.0, "format": 0.0, "bonus": 0.0, "reward": 0.0, "advantage": -1.0, "tokens": 5},
        {"text": "fine", "accuracy": 1.0, "format": 1.0, "bonus": 0.2, "reward": 1.7, "advantage": 1.0, "tokens": 5}]}
    path = tmp_path / "page.html"
    write_page([line] * 5, {record.id: record}, path, "<b>", limit=3)
    page = path.read_text()
    assert page.count("<script>") == 1 and "&lt;script&gt;alert" in page and "<title>&lt;b&gt;</title>" in page
    assert page.count("<section>") == 3 and page.count('<pre class="wrong">') == page.count('<pre class="right">') == 3
    assert not re.search(r'(?:src|href)="(?!data:)', page), "self-contained"


def test_curves_are_drawn_even_of_a_run_just_begun(tmp_path):
    step = {"step": 1, "stage": None, "reward": 0.5, "accuracy": 0.5, "length": 5.0}
    warnings.simplefilter("error")
    for name, metrics in (("none", []), ("one", [step]), ("two", [step, step | {"step": 2}])):
        plot_curves(metrics, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


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
    from PIL import Image

    Image.new("RGB", (56, 28), "white").save(tmp_path / "x.png")
    assert run("rollout.py", "--model", model, "--image", str(tmp_path / "x.png"), "--question", "What is it?",
               "--max-tokens", "20").strip()
    help_text = run("train.py", "--help")
    assert "--group-size" in help_text and "responses to a prompt" in help_text
    refused = subprocess.run([sys.executable, "train.py", "--stage", "9"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and refused.stderr.startswith("error: --stage 9"), "one line, not a stack"
