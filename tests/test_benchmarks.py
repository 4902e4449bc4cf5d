"""The benchmarks' published scores, each computed by hand on a few rows of the published shape, with their traps."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import compare
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TOY
from test_sources import PICTURE, hub_file, mathvision_row, mathvista_row, png, wemath_row

import eval
from data import DOMAINS, Dropped, Record, save_records
from eval import (
    Job,
    Result,
    given,
    interval,
    majority_right,
    pass_at,
    prepare,
    read_benchmark,
    read_responses,
    samplings,
    scores_of,
    summarize,
    vote,
)
from rewards import Response, answer_matches, score


def answered(benchmark: str, path: str, *answers: str | list[str]) -> list[Result]:
    """Rows of a local copy and, for each, its answer or answers, judged."""
    _, rows = read_benchmark(f"{benchmark}={path}", None)
    assert len(rows) == len(answers)
    return [Result(row, [] if isinstance(row, Dropped) else [
        score(text if "<" in text else f"<answer>{text}</answer>", row, "none")
        for text in ([some] if isinstance(some, str) else some)]) for row, some in zip(rows, answers)]


def accuracies(scores: dict, kind: str) -> dict[str, tuple[int, float]]:
    return {name: (part["problems"], round(part["accuracy"], 4)) for name, part in scores["parts"][kind].items()}


def test_mathvista_by_hand(tmp_path):
    """precision is a float64 (round(x, 1.0) raises), a choice's gold is its text, a list is no number of it."""
    choices = {"question_type": "multi_choice", "answer_type": "text", "choices": ["C", "B", "A"]}
    math = {"metadata": {"task": "math word problem", "skills": ["arithmetic reasoning", "algebraic reasoning"],
                         "source": "x", "category": "y", "grade": "z", "language": "english"}}
    rows = [mathvista_row(1), mathvista_row(2, answer="1.2", answer_type="float", precision=1.0),
            mathvista_row(3, answer="1.2", answer_type="float", precision=1.0),
            mathvista_row(4, answer="[2013, 2014]", answer_type="list", **math),
            mathvista_row(5, answer="A", **choices, **math), mathvista_row(6, answer="A", **choices, **math)]
    scores = scores_of("mathvista", answered(
        "mathvista", hub_file(tmp_path, "testmini-x", rows), "3.0", "1.2499", "1.26", "2014", "C", "A"))
    assert scores["accuracy"] == 3 / 6 and (scores["problems"], scores["published"]) == (6, 1000)
    assert accuracies(scores, "task") == {"FQA": (3, .6667), "MWP": (3, .3333)}
    assert accuracies(scores, "skill") == {"statistical reasoning": (3, .6667), "algebraic reasoning": (3, .3333),
                                           "arithmetic reasoning": (3, .3333)}


def test_mathvision_by_hand_over_all_rows(tmp_path):
    """A row whose gold no rule can read stays in the denominator, of its level and subject too."""
    rows = [mathvision_row(1, answer="\x0crac{36}{13}", level=5), mathvision_row(2, answer=None, level=5),
            mathvision_row(3, options=["$12$", "$24$", "7", "8", "9"], answer="B"),
            mathvision_row(4, options=list("ABCDE"), answer="E", subject="graph theory"),
            mathvision_row(5, answer=r"\frac{1}{", level=1)]
    path = hub_file(tmp_path, "test-00000-of-00001", rows)
    results = answered("mathvision", path, "36/13", "1", "24", "E", "1")
    assert [isinstance(r.record, Dropped) for r in results] == [False, True, False, False, True]
    scores = scores_of("mathvision", results)
    assert (scores["accuracy"], scores["unusable"], scores["unreadable"]) == (3 / 5, 2, 0)
    assert accuracies(scores, "level") == {"1": (1, 0), "3": (2, 1), "5": (2, .5)}
    assert accuracies(scores, "subject") == {"algebra": (4, .5), "graph theory": (1, 1)}


def mathverse_row(number: int, problem: int, version: str, **more) -> dict:
    return {"sample_index": str(number), "problem_index": str(problem), "problem_version": version,
            "question": "Angle?\nChoices:\nA:40°\nB:48°\nC:60°", "image": PICTURE, "answer": "(C)",
            "question_type": "multi-choice", "query_wo": "", "query_cot": "", "question_for_eval": "",
            "metadata": {"split": "testmini", "source": "x", "subject": "Plane", "subfield": "Angle"}} | more


def test_mathverse_by_hand(tmp_path):
    """The mean is over versions, not rows; golds are dirty; one problem's versions are drawn together."""
    rows = [mathverse_row(1, 1, "Text Dominant"), mathverse_row(2, 1, "Vision Only", question="", answer="B"),
            mathverse_row(3, 2, "Text Dominant", question="Area?", question_type="free-form",
                          answer=r"Area $=9 \pi \mathrm{cm}^{2}$"),
            mathverse_row(4, 3, "Text Dominant", question="Far?", question_type="free-form", answer="2191.7 metres")]
    results = answered("mathverse", hub_file(tmp_path, "testmini", rows), "60°", "C", r"$9\pi$", "2191")
    scores = scores_of("mathverse", results)
    assert accuracies(scores, "version") == {"Text Dominant": (3, .6667), "Vision Only": (1, 0)}
    assert scores["mean_over_parts"]["accuracy"] == pytest.approx((2 / 3 + 0) / 2) and scores["accuracy"] == .5
    assert scores["mean_over_parts"]["kind"] == "version" and scores["mean_over_parts"]["parts"] == 2
    assert [r.problem for r in results] == ["1", "1", "2", "3"]


def test_wemath_four_ways_by_hand(tmp_path):
    """IG, IK, strict and loose CM and RM, each from one ID of two or three steps; a torn ID is left out."""
    options = "A. 1; B. 2; C. 3; D. 4"
    table = [  # ID, are its steps right?, is the whole right?
        ("2steps_1", [1, 1], 1), ("2steps_2", [1, 1], 0), ("2steps_3", [1, 0], 0), ("2steps_4", [1, 0], 1),
        ("3steps_1", [0, 0, 0], 1), ("3steps_2", [1, 1, 1], 1)]
    rows, answers = [], []
    for name, steps, whole in table:
        for key, right in [*((f"{name[0]}steps_{i}", r) for i, r in enumerate(steps, 1)), (f"{name[0]}steps_multi",
                                                                                          whole)]:
            rows.append(wemath_row(name, key, options, "B"))
            answers.append("B" if right else "A")
    rows.append(wemath_row("2steps_9", "2steps_multi", options, "B"))
    scores = scores_of("wemath", answered("wemath", hub_file(tmp_path, "testmini", rows), *answers, "B"))
    four = scores["four_way"]
    assert four["ids"] == 6
    strict = {"score": (6 - .5 * 1 - 2 - 1) / 6, "CM": 2 / 6, "IG": 1 / 6, "IK": 1 / 6, "RM": 2 / 6, "RM_rate": .5}
    loose = {"score": (6 - .5 * 1 - 1 - 1) / 6, "CM": 3 / 6, "IG": 1 / 6, "IK": 1 / 6, "RM": 1 / 6, "RM_rate": .25}
    assert {k: four["strict"][k] for k in strict} == pytest.approx(strict)
    assert {k: four["loose"][k] for k in loose} == pytest.approx(loose)
    assert accuracies(scores, "steps") == {"S1": (14, round(9 / 14, 4)), "S2": (5, .6), "S3": (2, 1)}


def test_mmmu_by_hand(tmp_path):
    """Options are a string, open golds may be a list as a string; what names no option is wrong, never a guess."""
    def row(identity: str, answer: str, options: str = "['a', 'b']") -> dict:
        return {"id": identity, "question": "Which? <image 1>", "options": options, "answer": answer,
                "question_type": "x", "subfield": "x", "topic_difficulty": "Easy", "image_1": PICTURE}

    rows = [row("validation_Art_Theory_1", "B"), row("validation_Music_2", "A"), row("validation_Music_3", "A"),
            row("validation_Math_4", "['24/7', '3.429']", "[]"), row("validation_Math_5", "2.83", "[]")]
    scores = scores_of("mmmu", answered("mmmu", hub_file(tmp_path, "validation-0", rows), "b", "I cannot tell",
                                        "<think>hm, A", "3.429", "2.828"))  # (two decimals, as in its script)
    assert accuracies(scores, "domain") == {"Art & Design": (3, .3333), "Science": (2, 1)}
    assert accuracies(scores, "subject") == {"Art_Theory": (1, 1), "Music": (2, 0), "Math": (2, 1)}
    assert scores["unreadable"] == 1 / 5 and len(DOMAINS) == 30 and len(set(DOMAINS.values())) == 6


def test_mmstar_by_hand(tmp_path):
    """Options stand inside the question; letters go to J; the mean is over categories."""
    rows = [{"index": i, "question": question, "image": png(), "answer": answer, "category": category,
             "l2_category": "x", "meta_info": {"source": "x"}} for i, (question, answer, category) in enumerate([
                 ("Which?\nOptions: A: a cat, B: a dog, C: both, D: none", "B", "math"),
                 ("Which of A to J is it?", "J", "math"), ("Which of A to D?", "D", "math"),
                 ("Which of A to D?", "D", "logical reasoning")])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mmstar.parquet")
    scores = scores_of("mmstar", answered("mmstar", str(tmp_path / "mmstar.parquet"), "a dog", "J.", "A or D", "(D)"))
    assert scores["accuracy"] == .75 and scores["mean_over_parts"]["accuracy"] == pytest.approx((2 / 3 + 1) / 2)


# --- several samples, intervals ---------------------------------------------------------------------------------------


def result(name: str, *answers: str | None, gold: str = "3", **meta) -> Result:
    record = Record(name, "?", gold, meta=meta)
    return Result(record, [Response(a, float(a is not None and answer_matches(a, record)), 1.0, None, tokens=5,
                                    truncated=False) for a in answers])


def test_avg_maj_and_pass_at_k_by_hand():
    three = result("a", "3", "3", "5", "5.0")  # "5" and "5.0" are one answer: a tie of two and two
    one = result("b", "3", None, None, "7")
    assert (three.accuracy, majority_right(three), majority_right(one)) == (.5, .5, .5)
    assert majority_right(result("d", None, None)) == 0
    for gold, *answers in (("3", "x = 3", "3.0", "7", "The answer is 7"), ("[1, 2]", "1, 2", "[1,2]", "[3, 4]", "3, 4"),
                           ("0.5", "50%", "0.5", "7", "7"), ("$\\sqrt{2}$", "√2", "\\sqrt{2}", "2.5", "2.50"),
                           ("3", "3", "3", "12 m", "12 cm", "1234567", "1234568"),
                           ("5", "5", "3", "3 cars", "x = 3"), ("5", "5", "1/3", "0.333333", ".3333333")):
        # Equal ones written otherwise tie or win, unequal ones that look alike do not.
        want = 1 if answers[-1] == "1234568" else 0 if gold == "5" else .5
        assert majority_right(result("e", *answers, gold=gold)) == want, gold
    options = Record("f", "?", "C", choices=("x = 2", "y = 2", "x + y = 2"))
    assert [vote(answer, options) for answer in ("x = 2", "The answer is y = 2", "C")] == ["A", "B", "C"]
    assert vote("y = 2", Record("g", "?", "$y = 2$")) != vote("x = 2", Record("g", "?", "$y = 2$"))
    assert [pass_at(three, k) for k in (1, 2, 4)] == pytest.approx([.5, 1 - 1 / 6, 1])
    assert [pass_at(one, k) for k in (1, 2, 4)] == pytest.approx([.25, .5, 1])
    scores = scores_of("x", [three, one])
    assert scores["accuracy"] == .375 and scores["pass"] == pytest.approx({1: .375, 2: (5 / 6 + .5) / 2, 4: 1})
    assert scores["majority"] == .5 and scores["unreadable"] == .25


def test_intervals_draw_problems_and_not_samples():
    """Samples of one problem, or versions of it, are no evidence of their own: they would halve the interval."""
    rng = np.random.default_rng(0)
    right = rng.random(400) < .5
    once = [result(str(i), "3" if r else "1") for i, r in enumerate(right)]
    low, high = interval([once])
    assert high - low == pytest.approx(2 * 1.96 * .5 / 20, rel=.1) and low < right.mean() < high
    assert interval([once]) == [low, high], "seeded"
    four = [result(r.record.id, *[r.responses[0].answer] * 4) for r in once]
    assert interval([four]) == [low, high]
    versions = [result(f"{i}{v}", "3" if r else "1", problem_index=f"{i:03}") for i, r in enumerate(right)
                for v in "abcd"]
    assert np.diff(interval([versions])) == pytest.approx(high - low, rel=.1)
    assert interval([once[:1]]) is None


# --- answers of another engine ----------------------------------------------------------------------------------------


@pytest.fixture
def vista(tmp_path) -> str:
    return hub_file(tmp_path, "testmini-x", [mathvista_row(i) for i in range(1, 5)])


def lines(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_answers_of_another_engine(tmp_path, vista, capsys):
    """Published ids or ours; several lines or a list are samples; what has no answer is wrong, and named."""
    path = lines(tmp_path / "a.jsonl", {"id": "1", "response": ["<answer>3</answer>", "4"]},
                 {"id": "mathvista-2", "response": "The answer is 3"}, {"id": 2, "response": "<answer>4</answer>"},
                 {"id": "3", "response": ["", "\\boxed{3}"]})
    _, rows = read_benchmark(f"mathvista={vista}", None)
    results = given(Job("mathvista", "none", "given", 0, 0), rows, path, None)
    assert [[s.accuracy for s in r.responses] for r in results] == [[1, 0], [1, 0], [0, 1], [0, 0]]
    assert "1 of 4 problems have no response and count as wrong: mathvista-4" in capsys.readouterr().err
    scores = scores_of("mathvista", results)
    assert scores["accuracy"] == 3 / 8 and scores["unreadable"] == 3 / 8 and scores["length"] is None
    (tmp_path / "a.tsv").write_text("index\tquestion\tprediction\n1\tx\t\"<answer>\n3</answer>\"\n")
    assert read_responses(str(tmp_path / "a.tsv"), "mathvista", rows) == {
        "mathvista-1": [{"text": "<answer>\n3</answer>", "tokens": None, "truncated": None}]}
    assert scores["truncated"] is None, "not said is not never"
    for row, message in (({"id": "9", "response": "x"}, "line 2: mathvista has no problem '9'"),
                         ({"id": "1"}, "line 2: it has no response"),
                         ({"id": "1", "response": 3}, "line 2: its response is no text"),
                         ({"id": "1", "response": "3", "tokens": "12"}, "line 2: its tokens are '12'"),
                         ({"id": "1", "response": "3", "truncated": "no"}, "line 2: its truncated is 'no'"),
                         ({"id": "1", "response": "\ud83d"}, "line 2: .* surrogates not allowed"),
                         ("text", "line 2: "),
                         ({"id": "2", "response": ["a", "b"]}, "mathvista-1: 1 responses, others have 2")):
        with pytest.raises(ValueError, match=message):
            read_responses(lines(tmp_path / "b.jsonl", {"id": "1", "response": "3"}, row), "mathvista", rows)
    ours = [{"id": "1", "response": "3", "benchmark": "mathvista", "prompt": "none", "sampling": kind}
            for kind in ("greedy", "T=1")]
    assert read_responses(lines(tmp_path / "c.jsonl", ours[0]), "mathvista", rows)
    with pytest.raises(ValueError, match="of mathvista none T=1, mathvista none greedy; leave the lines of one"):
        read_responses(lines(tmp_path / "c.jsonl", *ours), "mathvista", rows)


@pytest.fixture
def command(monkeypatch):
    def run(*arguments, call=eval.main):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        return call()

    return run


def test_scoring_leaves_all_files_and_is_refused_for_other_data(command, tmp_path, vista, capsys):
    path = lines(tmp_path / "a.jsonl", *({"id": i, "response": f"<answer>{i}</answer>"} for i in range(1, 5)))
    out = tmp_path / "out"
    command("--benchmark", f"mathvista={vista}", "--responses", path, "--out", out)
    assert "| mathvista | observe | given    | 4        | 25.0 [0.0, 75.0]" in capsys.readouterr().out
    [scores] = json.loads((out / "scores.json").read_text())["scores"]
    assert scores["accuracy"] == .25 and scores["by_problem"]["mathvista-3"] == 1
    found = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert [(r["id"], r["answer"], r["gold"], r["accuracy"]) for r in found[1:3]] == [
        ("mathvista-2", "2", "3", 0.0), ("mathvista-3", "3", "3", 1.0)]
    assert "testmini-x.parquet#2/decoded_image" in found[2]["images"][0]
    page = (out / "responses.html").read_text()
    assert page.count('<pre class="right">') == 1 and page.count('<pre class="wrong">') == 3 and "unreadable" in page
    table = (out / "vlmevalkit" / "mathvista-observe-given.tsv").read_text().splitlines()
    assert table[0] == "index\tquestion\tanswer\tprediction" and len(table) == 1 + 2 * 4  # (hint and question: 2 lines)
    with pytest.raises(ValueError, match="limit: None there, 2 now\n.*another --out"):
        command("--benchmark", f"mathvista={vista}", "--responses", path, "--out", out, "--limit", 2)


def test_responses_that_cannot_be_read_are_shown(command, tmp_path, capsys):
    """A run of which nothing is read printed 0.0 and no word."""
    copy = lines(tmp_path / "test.jsonl", *({k: v for k, v in mathvision_row(n).items() if k != "decoded_image"}
                                            for n in (1, 2, 3)))
    for texts, told in ((["I see a cube and a ball in the picture.", "Could you say more?", "<answer>1</answer>"],
                         ["2 of 3 responses give no answer", "'Could you say more?'", "another --prompt"]),
                        (["", " ", "3"], ["2 of 3 responses", "empty"]), (["1", "2", "I cannot tell."], [])):
        rows = [{"id": str(n), "response": text} for n, text in enumerate(texts, 1)]
        command("--benchmark", f"mathvision={copy}", "--responses", lines(tmp_path / "a.jsonl", *rows), "--prompt",
                "none", "--out", tmp_path / f"out-{len(told)}")
        out = capsys.readouterr().out
        assert all(part in out for part in told) and ("can be read" in out) == bool(told)


def test_answers_are_scored_without_the_pictures_and_scored_again(command, tmp_path, capsys):
    """A copy of the questions and golds is all that scoring needs; the page, written last, opened every picture.

    What an evaluation left can be scored anew, also where some published rows have no usable gold.
    """
    rows = [mathvision_row(1), mathvision_row(2, answer=None), mathvision_row(3, options=list("ABCDE"), answer="B")]
    copy = lines(tmp_path / "test.jsonl", *({k: v for k, v in row.items() if k != "decoded_image"} for row in rows))
    first = lines(tmp_path / "a.jsonl", {"id": "1", "response": "<answer>1</answer>"}, {"id": "3", "response": "B"})
    for name, path in (("once", first), ("again", tmp_path / "once" / "responses.jsonl")):
        command("--benchmark", f"mathvision={copy}", "--responses", path, "--prompt", " none", "--out", tmp_path / name)
        assert "| mathvision | none   | given    | 3        | 66.7 [0.0, 100.0]" in capsys.readouterr().out
        [scores] = json.loads((tmp_path / name / "scores.json").read_text())["scores"]
        assert list(scores["why_unusable"]) == ["mathvision-2"] and scores["unreadable"] == 0
        page = (tmp_path / name / "responses.html").read_text()
        assert "cannot use its picture" in page and "None tokens" not in page


def test_what_cannot_be_meant_is_refused_before_hours_are_lost(command, tmp_path, vista):
    from conftest import TOY

    def refused(message: str, *arguments, model=TOY / "model") -> None:
        with pytest.raises(ValueError, match=message):
            command("--model", model, "--out", tmp_path / "out", *arguments, call=lambda: prepare(eval.parse_args()))
        assert not (tmp_path / "out").exists(), "nothing is left behind"

    refused("mathvist: no benchmark of that name .there are toy, mathvista, mathvision", "--benchmark", "mathvist")
    refused("no/such.* no such file", "--benchmark", "toy,mathvista=/no/such/folder")
    refused("not a Qwen", model=tmp_path)
    refused("there are none, steps, think, observe", "--prompt", "cot")
    refused("are both called toy", "--benchmark", "toy,toy", "--limit", 2)
    refused("give some, each only once", "--prompt", "none,none", "--limit", 2)
    refused("give some, each only once", "--prompt", ",", "--limit", 2)
    refused("give a --benchmark", "--benchmark", ",")
    refused("all samples would be the same", "--temperature", 0, "--samples", 4, "--limit", 2)
    (tmp_path / "cut").mkdir()
    cut = hub_file(tmp_path / "cut", "testmini-x", [mathvista_row(1), mathvista_row(
        2, decoded_image={"bytes": b"no picture", "path": "x"}), mathvista_row(3, answer=None)])
    refused("mathvista: 1 of 3 records cannot be used:\n.*mathvista-2.*\nmend", "--benchmark", f"mathvista={cut}")
    rows, order, [job] = command("--model", TOY / "model", "--out", tmp_path / "out", "--skip-bad", "--benchmark",
                                 f"mathvista={cut}", call=lambda: prepare(eval.parse_args()))
    assert order == {"mathvista": [0]} and len(rows["mathvista"]) == 3 and job.sampling == "greedy"


def test_greedy_and_sampled(command):
    def asked(*arguments) -> dict[str, list]:
        args = command("--model", "m", *arguments, call=eval.parse_args)
        return {name: samplings(name, args) for name in ("toy", "mmmu")}

    greedy = ("greedy", 0.0, 1)
    assert asked() == {"toy": [greedy, ("T=1", 1.0, 4)], "mmmu": [greedy]}
    assert asked("--samples", 8)["toy"] == [("T=1", 1.0, 8)] and asked("--temperature", 0)["toy"] == [greedy]
    assert asked("--temperature", .6, "--samples", 4)["mmmu"] == [("T=0.6", .6, 4)]


# --- comparison -------------------------------------------------------------------------------------------------------


def test_evaluations_side_by_side(command, tmp_path, vista, capsys):
    for name, answers, copy in (("a", "3333", vista), ("b", "3344", f"{vista}/.")):
        path = lines(tmp_path / f"{name}.jsonl", *({"id": i, "response": f"<answer>{a}</answer>"}
                                                   for i, a in enumerate(answers, 1)))
        command("--benchmark", f"mathvista={copy}", "--responses", path, "--out", tmp_path / name)
    capsys.readouterr()
    compare.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "| benchmark" not in printed, "where a copy lies is no setting: its data tell what was asked"
    assert "mathvista, given, %" in printed and "-50.0 [-100.0, +0.0] | 4" in printed


def test_answers_of_two_engines_are_two_settings(command, tmp_path, vista, capsys):
    """Counted with one model's tokens they were taken for two seeds of it."""
    for seed, answers in enumerate(("3333", "4444")):
        path = lines(tmp_path / f"{seed}.jsonl", *({"id": i, "response": a} for i, a in enumerate(answers, 1)))
        command("--benchmark", f"mathvista={vista}", "--responses", path, "--model", TOY / "model", "--seed",
                seed, "--out", tmp_path / str(seed))
    compare.main([str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(tmp_path / "out")])
    table = capsys.readouterr().out.split("| setting")[1]
    assert table.count(" | 1     | ") == 2, "a row each, of one seed"


def test_a_file_of_ones_own_is_no_published_benchmark(tmp_path):
    """Called toy.jsonl it would be cut at 160 tokens, called mathvista.jsonl its bad golds would pass for published."""
    for stem in ("toy", "mathvista"):
        name, _ = read_benchmark(lines(tmp_path / f"{stem}.jsonl", {"question": "1 + 1?", "answer": "2"}), None)
        assert name == f"{tmp_path.name}-{stem}"
    (tmp_path / "found").mkdir()
    path = lines(tmp_path / "found/measured.parquet".replace("parquet", "jsonl"), {"question": "1 + 1?", "answer": "2"})
    assert read_benchmark(path, None)[0] == "found", "curriculum.py's file: the folder tells"
    save_records(str(tmp_path / "mathvision.parquet"), [Record("mathvision-12", "?", "1", source="mathvision")])
    name, rows = read_benchmark(str(tmp_path / "mathvision.parquet"), None)
    answers = lines(tmp_path / "r.jsonl", {"id": "12", "response": "1"})
    assert read_responses(answers, name, rows).keys() == {"mathvision-12"}, "by the published ids too"


def test_a_dropped_row_with_the_id_of_another_does_not_speak_for_it():
    right = result("a", "3")
    assert summarize([right, Result(Dropped("a", "repeated id", ""), [])])["by_problem"] == {"a": 1.0}
