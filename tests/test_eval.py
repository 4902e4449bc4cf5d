"""Scores by hand, the closing table, and pages that cannot be turned into markup by what a model writes."""
from __future__ import annotations

import re
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, TOY

from data import Record
from eval import (
    Result,
    Sample,
    before_after,
    evaluate,
    licence,
    majority,
    plot_curves,
    plot_ladder,
    summarize,
    with_rollouts,
    write_page,
    write_review,
)
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


def answered(record: Record, *answers: str | None) -> Record:
    return with_rollouts(record, [{"answer": a, "correct": False, "tokens": 9} for a in answers])


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
    assert "majority, 3 of 4: 5" in first and "<script>" not in first and "data:image/png" in first
    assert "(none)" in second and "review-2.html" in first
    table = (tmp_path / "review.csv").read_text("utf-8-sig")
    assert [line.split(",")[0] for line in table.splitlines()] == ["id", "b", "a"] and "b,<script>" in table
    write_review([sure], tmp_path)
    assert (tmp_path / "review.csv").read_text("utf-8-sig") == table and "has been edited" in capsys.readouterr().err
    (tmp_path / "review.csv").unlink()
    write_review([answered(unsure, *["=HYPERLINK(1)"] * 8)], tmp_path)
    assert ",'=HYPERLINK(1)," in (tmp_path / "review.csv").read_text("utf-8-sig"), "no formula for a spreadsheet"


def test_a_ladder_is_drawn_with_empty_levels_and_stray_dollars(tmp_path, test_set):
    table = np.zeros((9, 9), int)
    table[0, 0] = table[0, 1] = 1
    ladder = [replace(test_set[0], question="Is it $5 or $x_?", difficulty=0.0, complexity=9.0),
              Record("text", "?", "1", difficulty=.125, complexity=8.0)]
    complexity = np.array([9.0, 8.0] + [np.nan] * 7)
    plot_ladder(ladder, table, complexity, np.eye(9), np.ones(9) / 9, np.ones(9), tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_licences_of_the_sources_are_told():
    assert licence("MathVision") == "MIT" and licence("polymath") == "AFL-3.0" and licence("mine") == "as its source"


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
