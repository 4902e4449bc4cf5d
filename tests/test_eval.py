"""Scores by hand, the closing table, and pages that cannot be turned into markup by what a model writes."""
from __future__ import annotations

import re
import subprocess
import sys
import warnings

import pytest
from conftest import ROOT, TOY

from data import Record
from eval import Result, Sample, before_after, evaluate, plot_curves, summarize, write_page
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


def test_page_escapes_what_a_model_writes(tmp_path, test_set):
    record = test_set[0]
    evil = '<script>alert(1)</script><img src=x onerror="alert(2)">'
    line = {"step": 1, "stage": 0, "id": record.id, "weight": 1.0, "responses": [
        {"text": evil, "accuracy": 0.0, "format": 0.0, "bonus": 0.0, "reward": 0.0, "advantage": -1.0, "tokens": 5},
        {"text": "fine", "accuracy": 1.0, "format": 1.0, "bonus": 0.2, "reward": 1.7, "advantage": 1.0, "tokens": 5}]}
    path = tmp_path / "page.html"
    write_page([line] * 5, {record.id: record}, path, "<b>", limit=3)
    page = path.read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "<title>&lt;b&gt;</title>" in page
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
    scores = run("eval.py", "--model", model, "--benchmark", "toy", "--limit", "8", "--out", str(tmp_path),
                 "--max-tokens", "160")
    assert "accuracy" in scores and len((tmp_path / "responses.jsonl").read_text().splitlines()) == 8
    from PIL import Image

    Image.new("RGB", (56, 28), "white").save(tmp_path / "x.png")
    assert run("rollout.py", "--model", model, "--image", str(tmp_path / "x.png"), "--question", "What is it?",
               "--max-tokens", "20").strip()
    help_text = run("train.py", "--help")
    assert "--group-size" in help_text and "responses to a prompt" in help_text
    refused = subprocess.run([sys.executable, "train.py", "--stage", "9"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and refused.stderr.startswith("error: --stage 9"), "one line, not a stack"
