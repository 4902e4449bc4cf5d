"""Readers of the published training sets and benchmarks, what is excluded, and the command that makes one file of them.

The data sets cannot be downloaded here: each test writes a small file of exactly the published shape, with its traps.
"""
from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageFont

import data
from data import (
    DATASETS,
    Dropped,
    Picture,
    Record,
    load_records,
    open_image,
    read_any,
    read_held,
    same_picture,
    save_records,
    save_usable,
    split_options,
    thumbnail,
    verifiable,
)
from rewards import accuracy_reward


def encoded(image: Image.Image, **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG"} | how)
    return buffer.getvalue()


def png(color="red") -> bytes:
    return encoded(Image.new("RGB", (8, 6), color))


def hub_file(folder: Path, name: str, rows: list[dict]) -> str:
    """A folder as the hub hands it out: rows in data/NAME.parquet, pictures as {bytes, path}."""
    (folder / "data").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"data/{name}.parquet")
    return str(folder)


def read(name: str, path: str | None = None) -> Iterator[Record | Dropped]:
    return DATASETS[name].read(name, path)


def told(made: list) -> dict[str, Record | Dropped]:
    assert len({item.id for item in made}) == len(made), "ids are not unique"
    return {item.id: item for item in made}


PICTURE = {"bytes": png(), "path": "1.jpg"}


# --- training sources ------------------------------------------------------------------------------------------------


def mathvision_row(number: int, **more) -> dict:
    return {"id": str(number), "question": "How many?\n<image1>", "options": [], "image": f"images/{number}.jpg",
            "decoded_image": PICTURE, "answer": "1", "solution": None, "level": 3, "subject": "algebra"} | more


def test_mathvision(tmp_path):
    letters = list("ABCDE")
    rows = [mathvision_row(1, question="Which of <image1> to <image5>?", options=letters, answer="B"),
            mathvision_row(2, options=["$12$", "$24$", "7", "8", "9"], answer="B "),
            mathvision_row(3, answer="\x0crac{36}{13}"), mathvision_row(4, answer="C"),
            mathvision_row(5, answer="69{degrees}"), mathvision_row(6, answer=None), mathvision_row(7, answer="  "),
            mathvision_row(8, options=["1", "2", "3", "4", "5"], answer="F")]
    found = told(list(read("mathvision", hub_file(tmp_path, "test-00000-of-00001-ab12", rows))))
    one = found["mathvision-1"]  # ONE merged picture: its labels stay as text, and "(A) A" would offer nothing
    assert (one.question, one.choices, one.answer, one.answer_type, len(one.images)) == (
        "Which of <image1> to <image5>?", (), "B", "choice", 1)
    assert one.content[0] == {"type": "image"} and one.meta == {"level": 3, "subject": "algebra"}
    assert one.source == "mathvision" and open_image(one.images[0], "1").size == (8, 6)
    assert found["mathvision-2"].answer == "B" and found["mathvision-2"].choices[1] == "$24$"
    assert found["mathvision-3"].answer == r"\frac{36}{13}"  # strip() takes a form feed for white space
    assert accuracy_reward(r"<answer>\frac{36}{13}</answer>", found["mathvision-3"]) == 1
    assert found["mathvision-4"].answer_type == "choice" and found["mathvision-5"].answer_type == "number"
    assert [found[f"mathvision-{i}"].reason for i in (6, 7, 8)] == ["null gold", "null gold", "unverifiable"]
    assert "record 8: " in found["mathvision-8"].detail


def test_a_split_is_not_taken_for_another(tmp_path):
    """testmini is a subset of test: read together, 304 problems would stand twice."""
    hub_file(tmp_path, "testmini-00000-of-00001", [mathvision_row(1)])
    for shard in (0, 1):
        hub_file(tmp_path, f"test-{shard:05}-of-00002", [mathvision_row(10 + shard)])
    assert list(told(list(read("mathvision", str(tmp_path))))) == ["mathvision-10", "mathvision-11"]
    assert [r.id for r in read("mathvision", str(tmp_path / "data/testmini-00000-of-00001.parquet"))] == [
        "mathvision-1"]
    (tmp_path / "data/test-00000-of-00002.parquet").rename(tmp_path / "data/train-00000-of-00001.parquet")
    (tmp_path / "data/test-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="none of its files is of the split test: testmini.*, train"):
        list(read("mathvision", str(tmp_path)))
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "MathVision.jsonl").write_text(json.dumps(mathvision_row(1, decoded_image=None, image=[])) + "\n")
    assert list(told(list(read("mathvision", str(lone))))) == ["mathvision-1"], "a lone file has any name"


def test_mathvision_of_github_is_json_beside_its_pictures(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "images/1.jpg").write_bytes(png("blue"))
    row = {key: value for key, value in mathvision_row(1).items() if key != "decoded_image"}
    (tmp_path / "data/test.jsonl").write_text(json.dumps(row) + "\n{broken\n")
    good, bad = read("mathvision", str(tmp_path))
    assert open_image(good.images[0], "1").getpixel((0, 0)) == (0, 0, 255)
    assert isinstance(bad, Dropped) and bad.reason == "malformed row"


def test_published_hub_id_of_default_and_other_split(tmp_path, monkeypatch):
    """MathVerse has a config of each split's name, MMMU one of each subject: all of them are the benchmark."""
    hub_file(tmp_path, "x", [mathvision_row(1)])
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "data/x.parquet"), split="train",
                                  cache_dir=str(tmp_path / "cache"))
    asked, configs = [], []
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: configs)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: asked.append((*args, more["split"])) or table)
    (record,) = read("mathvision")
    assert isinstance(record.images[0], Picture) and open_image(record.images[0], "1").size == (8, 6)
    list(read("mathvision", "MathLLMs/MathVision@testmini"))
    configs[:] = ["testmini", "testmini_text_only"]
    list(read("mathverse"))
    configs[:] = ["Art", "Math"]
    list(read("mmmu"))
    assert asked == [("MathLLMs/MathVision", "test"), ("MathLLMs/MathVision", "testmini"),
                     ("AI4Math/MathVerse", "testmini", "testmini"),
                     ("MMMU/MMMU", "Art", "validation"), ("MMMU/MMMU", "Math", "validation")]


@pytest.mark.parametrize("text, stem, options", [
    ("A. 45°; B. 60°; C. 75°; D. No correct answer", "", ("45°", "60°", "75°", "No correct answer")),
    ("A. 1; 2; B. 3; 4; C. 5", "", ("1; 2", "3; 4", "5")),  # `;` inside
    ("A. 45° B. 60° ;C. 75°", "", ("45°", "60°", "75°")),  # `;` lacking
    ("Why?\nA. red\nB) blue\n(C) green", "Why?", ("red", "blue", "green")),
    ("What is x?A. 1\nB. 2 \nC. 3", "What is x?", ("1", "2", "3")),  # run on
    ("In figure A. and B. what is x?\nA. 1\nB. 2\nC. 3", "In figure A. and B. what is x?", ("1", "2", "3")),
    ("Where?\nA. At point B.\nB. At point C.\nC. Nowhere", "Where?", ("At point B.", "At point C.", "Nowhere")),
    ("A. 45°C. B. 50°C. C. 55°C.", "", ("45°C.", "50°C.", "55°C.")),
    ("Which?\nOptions: A: a cat, B: a dog, C: both", "Which?", ("a cat", "a dog", "both")),
    ("What is x? A. B. C. D.", None, ()), ("Find x", None, ()), ("Is it A. so?", None, ()),
])
def test_options_in_a_text(text, stem, options):
    assert split_options(text) == (text if stem is None else stem, options)


def wemath_row(identity: str, key: str, option: str, answer: str) -> dict:
    return {"ID": identity, "split": "testmini", "knowledge concept": "Angles", "question": "Find the angle ( ).",
            "option": option, "answer": answer, "image_path": PICTURE, "key": key, "question number": 7,
            "knowledge concept description": "..."}


def test_wemath(tmp_path):
    options = "A. 45°; B. 60°; C. 75°; D. No correct answer"
    rows = [wemath_row("2steps_1", "2steps_1", options, "B"), wemath_row("2steps_1", "2steps_multi", options, "C"),
            wemath_row("3steps_2", "3steps_1", options + "; E. 90°", "E"),
            wemath_row("3steps_3", "3steps_1", "A. 45° B.; C. 60°", "B"),
            wemath_row("3steps_4", "3steps_1", options, "F")]
    found = told(list(read("wemath", hub_file(tmp_path, "testmini-00000-of-00001", rows))))
    assert list(found)[:2] == ["wemath-2steps_1@2steps_1", "wemath-2steps_1@2steps_multi"]  # ID alone repeats
    one = found["wemath-2steps_1@2steps_1"]
    assert (one.question, one.choices, one.answer) == (
        "Find the angle ( ).", ("45°", "60°", "75°", "No correct answer"), "B")
    assert one.meta == {"ID": "2steps_1", "key": "2steps_1", "knowledge_concept": "Angles", "question_number": 7}
    assert found["wemath-3steps_2@3steps_1"].choices[4] == "90°"
    odd = found["wemath-3steps_3@3steps_1"]  # an option without text: left as it is, judged by its letter
    assert (odd.question, odd.choices, odd.answer) == ("Find the angle ( ).\nA. 45° B.; C. 60°", (), "B")
    assert found["wemath-3steps_4@3steps_1"].reason == "unverifiable"  # no F is offered


def test_polymath(tmp_path):
    rows = [{"image": PICTURE, "category": "spatial", "answer_option": option, "final_answer_range": span,
             "final_answer": gold}
            for option, span, gold in [
                ("A, B, C, D", "A-D", "C"), ("1,2,3,4", "1-4", "2"), ("A, B, C, D", "A-D", "[A, C]"),
                ("A-D", "1,2,3,4", "3"), ("A-D", "A-D", None), ("A-D", "A-D", "see figure")]]
    found = told(list(read("polymath", hub_file(tmp_path, "test-00000-of-00001", rows))))
    letter, digit, several, spelled, null, odd = found.values()
    assert list(found)[0] == "polymath-1"
    assert letter.question == "Answer the question in the image. Options: A, B, C, D" and letter.answer == "C"
    for answer in ("2", "B", "(B)"):  # the authors turn letters into digits in a range 1-4
        assert accuracy_reward(f"<answer>{answer}</answer>", digit) == 1, answer
    assert accuracy_reward("<answer>C</answer>", digit) == accuracy_reward("<answer>1</answer>", digit) == 0
    assert accuracy_reward("<answer>C</answer>", spelled) == 1
    assert several.answer == ("A", "C") and accuracy_reward("<answer>C</answer>", several) == 1
    assert accuracy_reward("<answer>B</answer>", several) == 0
    assert (null.reason, odd.reason) == ("null gold", "unverifiable")


def test_scemqa(tmp_path):
    gold = "Answer (final answer highlighted)"
    listed = "Which?\n\nA. red\nB. blue\nC. green\nD. grey"
    choice = {"Math": [{"Question": listed, gold: "B The sky is blue", "ImagePath": "Math/1"},
                       {"Question": "x?A. 1\nB. 2\nC: 3", gold: "C: Since A is", "ImagePath": "Math/2", "Notes": "9"},
                       {"Question": listed, gold: "(D)  http://img.example/a.jpg", "ImagePath": "Math/1"},
                       {"Question": listed, gold: "(A, D) Both", "ImagePath": "Math/1"},
                       {"Question": listed, gold: "A, D For a lens", "ImagePath": "Math/1"},
                       {"Question": listed, gold: "E The list lacks it", "ImagePath": "Math/1"},
                       {"Question": "", gold: "A", "ImagePath": "Math/1"}]}
    free = {"Physics_Free_Response": [
        {"Question": "How far?", gold: text, "ImagePath": "Physics_Free_Response/1"}
        for text in (r"\answer{69.5} The height", r"\anser{0.39} m", r"\answer{3.397} \answer{3} \answer{4} or so",
                     r"\answer{33.31%}", r"\answer{4.9e-8}", r"\answer{5/21}", r"\answer{Yes}",
                     r"\answer{$\frac{1}{2}$}", "No mark")]}
    for kind, name, rows in (("Multiple_Choice", "multiple_choice", choice), ("Free_Response", "free_response", free)):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"{name}.json").write_text(json.dumps(rows))
    for path in ("Multiple_Choice/Math/1.jpg", "Multiple_Choice/Math/2.png",
                 "Free_Response/Physics_Free_Response/1.jpg"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(png())
    found = told(list(read("scemqa", str(tmp_path))))
    maths = [found[f"scemqa-Math-{i}"] for i in range(1, 8)]
    assert [r.answer for r in maths[:3]] == ["B", "C", "D"] and maths[1].choices == ("1", "2", "3")
    assert [Path(r.images[0]).name for r in maths[:2]] == ["1.jpg", "2.png"]  # the path lacks its extension
    assert [r.reason for r in maths[3:]] == ["unverifiable"] * 3 + ["no question"]  # two letters; a letter not there
    golds = [getattr(found[f"scemqa-Physics_Free_Response-{i}"], "answer", None) for i in range(1, 10)]
    assert golds == ["69.5", "0.39", ("3.397", "3", "4"), "33.31%", "4.9e-8", "5/21", "Yes", r"$\frac{1}{2}$", None]
    assert found["scemqa-Physics_Free_Response-9"].reason == "null gold"
    assert found["scemqa-Physics_Free_Response-1"].meta == {"subject": "physics", "free_response": True}


def mathv360k_row(human: str, gpt: str, image: str = "ScienceQA/images/1.png") -> dict:
    return {"id": "identity", "image": image, "conversations": [{"from": "human", "value": human},
                                                                {"from": "gpt", "value": gpt}]}


def test_mathv360k(tmp_path):
    hint = "<image>\nHint: Please provide the correct option letter, e.g., A, B, C, D, at the end.\nQuestion: "
    rows = [mathv360k_row(hint + "Which is red?\nChoices:\n(A) the cat\n(B) the dog (left)", "The answer is B"),
            mathv360k_row(hint + "How many?", "The answer is 12."),
            mathv360k_row("<image>\nWhat is it?", "It shows a man who walks along a river."),
            mathv360k_row(hint + "Which is blue?\nChoices:\n(A) 1\n(B) 2", "The answer is A"),
            mathv360k_row(hint + "Which is blue?\nChoices:\n(A) 1\n(B) 2", "The answer is B"),
            mathv360k_row(hint + "Which is blue?\nChoices:\n(A) 1\n(B) 2", "The answer is A", "GEOS/images/2.png"),
            mathv360k_row(hint + "How many?", "The answer is 12"),  # the same again
            mathv360k_row("<image>\nIs it?", "Yes"), mathv360k_row("<image>\nAnd?", ""),
            mathv360k_row(hint + "Which?\nChoices:\n(A) 1\n(B) 2", "The answer is 7"),
            {"id": "text only", "conversations": []},
            mathv360k_row("<image>\nPopulation?", "The answer is 1,234,567 people in all")]
    (tmp_path / "data_images/ScienceQA/images").mkdir(parents=True)
    (tmp_path / "data_images/ScienceQA/images/1.png").write_bytes(png())
    (tmp_path / "train_samples_all_tuning.json").write_text(json.dumps(rows))
    found = list(told(list(read("mathv360k", str(tmp_path)))).values())
    one = found[0]
    assert (one.id, one.question, one.choices, one.answer) == (
        "mathv360k-1", "Which is red?", ("the cat", "the dog (left)"), "B")
    assert one.meta == {"id": "identity", "subset": "ScienceQA"}
    assert one.images == (str(tmp_path / "data_images/ScienceQA/images/1.png"),)
    assert (found[1].question, found[1].answer, found[1].answer_type) == ("How many?", "12", "number")
    assert found[7].answer_type == "text" and isinstance(found[5], Record)  # another picture: no conflict
    assert [getattr(found[i], "reason", "") for i in (2, 3, 4, 6, 8, 9, 10, 11)] == [
        "free text", "conflicting labels", "conflicting labels", "repeated question", "null gold", "unverifiable",
        "malformed row", "free text"]


GEOMETRY3K = [  # golds as they are written there, what a model may write for each, and what it may not
    ("48", ["48", "$48$", "48^\\circ", "48°", "48 degrees", "x = 48", "m\\angle A = 48^\\circ", "48.0", "\\text{48 cm}",
            "AB = 48 \\text{ units}"], ["4.8", "48 or 132", "84", "48, 132", "48\\sqrt{2}", "not 48"]),
    ("13.5", ["13.5", "\\frac{27}{2}", "27/2", "13 \\frac{1}{2}", "13.50 ft"], ["13", "13.6", "27"]),
    ("2 \\sqrt { 221 }", ["2\\sqrt{221}", "2√221", "\\sqrt{884}", "2*sqrt(221)", "2 \\cdot \\sqrt{221}",
                          "x = 2\\sqrt{221} \\approx 29.73", "2\\sqrt{221} \\text{ cm}"],
     ["221", "2", "2\\sqrt{212}", "\\sqrt{221}", "4\\sqrt{221}", "29.73"]),
    ("3 \\sqrt 2", ["3\\sqrt{2}", "\\sqrt{18}", "3√2"], ["3", "6", "\\sqrt{6}"]),
    ("\\frac { 65 } { 63 }", ["\\frac{65}{63}", "\\dfrac{65}{63}", "65/63", "1 \\frac{2}{63}", "\\frac{130}{126}"],
     ["\\frac{63}{65}", "65", "1.03"]),
    ("22 / 3", ["\\frac{22}{3}", "22/3", "7\\frac{1}{3}"], ["22", "7.3", "\\frac{3}{22}"]),
    ("\\frac { 2 \\sqrt { 2 } } { 5 }", ["\\frac{2\\sqrt{2}}{5}", "\\frac{2}{5}\\sqrt{2}", "\\frac{4}{5\\sqrt{2}}",
                                         "(2√2)/5"], ["\\frac{2}{5}", "\\frac{\\sqrt{2}}{5}", "0.57"]),
    ("12 \\pi", ["12\\pi", "12π", "12*pi", "12\\pi \\text{ cm}^2"], ["12", "37.7", "\\pi", "24\\pi"]),
    ("\\frac { 5 } { 3 } \\pi", ["\\frac{5\\pi}{3}", "\\frac{5}{3}\\pi", "5π/3"], ["\\frac{5}{3}", "\\frac{3\\pi}{5}"]),
    ("72 \\sqrt { 3 } - 24 \\pi", ["72\\sqrt{3} - 24\\pi", "24(3\\sqrt{3} - \\pi)", "-24π + 72√3"],
     ["72\\sqrt{3}", "72\\sqrt{3} + 24\\pi", "24\\pi - 72\\sqrt{3}"])]


@pytest.mark.parametrize("columns", [3, 6])
def test_geometry3k(tmp_path, columns):
    """This field's first run. The hub's copy had three columns, and has six: options that the question is not asked
    with, and a letter, must not become either what is asked or the gold."""
    features = {"images": datasets.Sequence(datasets.Image()), "problem": datasets.Value("string"),
                "answer": datasets.Value("string"), "id": datasets.Value("int64"),
                "choices": datasets.Sequence(datasets.Value("string")), "ground_truth": datasets.Value("string")}
    rows = [{"images": [Image.new("RGB", (250, 251), "white")], "problem": f"<image>Find $m \\widehat{{A B}}$ in {i}.",
             "answer": gold, "id": 2401 + i, "choices": ["30", gold, "7 \\pi", "80"], "ground_truth": "B"}
            for i, (gold, *_) in enumerate(GEOMETRY3K)]
    kept = dict(list(features.items())[:columns])
    for split in ("train", "test"):
        table = datasets.Dataset.from_list([{key: row[key] for key in kept} for row in rows],
                                           features=datasets.Features(kept))
        table.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    records = load_records(f"{tmp_path}@test")
    assert len(records) == len(rows) and not any(isinstance(verifiable(record), Dropped) for record in records)
    for i, (record, (gold, right, wrong)) in enumerate(zip(records, GEOMETRY3K)):
        assert (record.answer, record.choices) == (gold, ()) and record.answer_type in ("number", "math")
        assert record.text == rows[i]["problem"] and open_image(record.images[0], "1").size == (250, 251)
        assert record.id == str(2401 + i) or columns == 3
        for answer, score in [*((one, 1) for one in right), *((one, 0) for one in wrong)]:
            forms = (f"<answer>{answer}</answer>", f"So we have it.\n\n\\[\n\\boxed{{{answer}}}\n\\]",
                     f"<answer>\\boxed{{{answer}}}</answer>", f"Therefore, the answer is:\n\n${answer}$")
            assert [accuracy_reward(form, record) for form in forms] == [score] * 4, (gold, answer)
    out = str(tmp_path / "geo3k.parquet")
    report = save_usable(read_any(f"{tmp_path}@train"), out)
    assert report["kept"] == len(rows) and load_records(out)[2].answer == "2 \\sqrt { 221 }"


@pytest.mark.parametrize("gold, answer, precision, right", [
    ("18.8", "18.81", None, 0), ("18.8", "6\\pi", None, 0), ("18.8", "18.81", 1, 1), ("18.8", "18.9", 1, 0),
    ("0.53", "\\frac{8}{15}", None, 0), ("0.53", "\\frac{8}{15}", 2, 1)])
def test_a_rounded_gold_is_met_by_its_digits_or_by_its_precision(gold, answer, precision, right):
    """Geometry3K rounds some of its answers: .53 for 8/15. What is more exact is wrong unless the record says so."""
    record = Record("r", "Find x.", gold, precision=precision)
    assert accuracy_reward(f"<answer>{answer}</answer>", record) == right


def test_sources_that_are_no_hub_data_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="clone GitHub's SceMQA/SceMQA"):
        read("scemqa", "SceMQA/SceMQA")
    with pytest.raises(ValueError, match="unpack data_images.zip"):
        read("mathv360k", "Zhiqiang007/MathV360K")


@pytest.mark.parametrize("content", ["{broken", "[]", '{"Math": 3}', '{"Math": ["no row"]}', "[" * 100_000])
def test_a_broken_file_of_scemqa_is_named(tmp_path, content):
    (tmp_path / "free_response.json").write_text(content)
    with pytest.raises(ValueError, match="free_response.json|not a str"):
        [found] = read("scemqa", str(tmp_path))
        raise ValueError(found.detail)
    with pytest.raises(ValueError, match="no multiple_choice.json"):
        read("scemqa", str(tmp_path.parent / "nothing"))


@pytest.mark.parametrize("content", ["[{]", "[" * 100_000])
def test_a_broken_file_of_mathv360k_is_named(tmp_path, content):
    (tmp_path / "train_samples_all_tuning.json").write_text(content)
    with pytest.raises(ValueError, match="train_samples_all_tuning.json: cannot be read"):
        list(read("mathv360k", str(tmp_path)))


def test_a_json_list_is_read_whole_or_not_at_all(tmp_path):
    rows = [{"question": "é" * (1 + i % 977), "answer": str(i)} for i in range(2000)]
    path = tmp_path / "x.json"
    path.write_text(" [\n " + " ,\n".join(json.dumps(row) for row in rows) + " ]\n", "utf-8-sig")
    assert [(r.question, r.answer) for r in load_records(str(path))] == [(r["question"], r["answer"]) for r in rows]
    one = json.dumps(rows[0])
    for text in (f"[{one}, {one}", f"[{one} {one}]", f"[{one}]]", f"[{one},]", "[", one, f"[{one}] x", "[]", "[ ]\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="x.json"):
            load_records(str(path), skip_bad=True)


# --- benchmarks ------------------------------------------------------------------------------------------------------


def mathvista_row(number: int, **more) -> dict:
    return {"pid": str(number), "question": "How much?", "image": f"images/{number}.jpg", "decoded_image": PICTURE,
            "choices": None, "unit": None, "precision": None, "answer": "3", "question_type": "free_form",
            "answer_type": "integer", "query": "Hint: Please answer.\nQuestion: How much?",
            "metadata": {"task": "figure question answering", "skills": ["statistical reasoning"], "source": "PlotQA",
                         "category": "general-vqa", "grade": "daily life", "language": "english"}} | more


def test_mathvista(tmp_path):
    choices = {"question_type": "multi_choice", "answer_type": "text",
               "query": "Hint: x\nQuestion: Which?\nChoices:\n(A) C"}
    rows = [mathvista_row(1), mathvista_row(2, answer="1.2", answer_type="float", precision=1.0),
            mathvista_row(3, answer="[2013, 2014]", answer_type="list"),
            mathvista_row(4, answer="A", choices=["C", "B", "A"], **choices),  # the gold is the choice's TEXT: option C
            mathvista_row(5, answer="12", choices=["10", "12"], **choices),
            mathvista_row(6, answer="0.5", answer_type="float", precision=float("nan"))]
    integer, real, several, letters, texts, blank = read("mathvista", hub_file(tmp_path, "testmini-x", rows))
    assert (integer.id, integer.question, integer.answer_type) == (
        "mathvista-1", "Hint: Please answer.\nQuestion: How much?", "number")
    assert integer.meta["task"] == "figure question answering" and integer.meta["skills"] == ["statistical reasoning"]
    assert isinstance(real.precision, int) and accuracy_reward("<answer>1.2499</answer>", real) == 1
    assert accuracy_reward("<answer>1.26</answer>", real) == 0 and blank.precision is None
    assert several.answer_type == "list" and accuracy_reward("<answer>2014</answer>", several) == 0
    assert letters.answer == "C" and accuracy_reward("<answer>C</answer>", letters) == 1
    assert accuracy_reward("<answer>A</answer>", letters) == 0
    assert letters.question == "Hint: x\nQuestion: Which?" and texts.answer == "B"


def test_mathverse(tmp_path):
    multi = "multi-choice"
    rows = [{"sample_index": str(i), "problem_index": "1", "problem_version": version, "question": question,
             "image": PICTURE, "answer": answer, "question_type": kind, "query_wo": "...", "query_cot": "...",
             "question_for_eval": "...",
             "metadata": {"split": "testmini", "source": "x", "subject": "Plane Geometry", "subfield": "Angle"}}
            for i, (version, question, answer, kind) in enumerate([
                ("Text Dominant", "What is angle A?\nChoices:\nA:40°\nB:48°\nC:60°", "(C)", multi),
                ("Vision Only", "", "B", multi), ("Text Lite", "Area?", r"Area $=9 \pi \mathrm{cm}^{2}$", "free-form"),
                ("Text Lite", "Length?", "2191.7 metres", "free-form")], 1)]
    choice, vision, area, length = read("mathverse", hub_file(tmp_path, "testmini", rows))
    assert (choice.question, choice.choices, choice.answer) == ("What is angle A?", ("40°", "48°", "60°"), "C")
    assert choice.meta == {"problem_index": "1", "problem_version": "Text Dominant", "question_type": multi,
                           "subject": "Plane Geometry", "subfield": "Angle"}
    assert (vision.question, vision.choices, vision.answer_type) == ("Answer the question in the image.", (), "choice")
    assert [verifiable(area), verifiable(length)] == [area, length]
    assert accuracy_reward(r"<answer>$9\pi$</answer>", area) == accuracy_reward("<answer>2191.7</answer>", length) == 1


def test_mmmu(tmp_path):
    def row(identity, question, options, answer, pictures, kind="multiple-choice"):
        images = {f"image_{i}": {"bytes": png(pictures[i - 1]), "path": "x"} if i <= len(pictures) else None
                  for i in range(1, 8)}
        return {"id": identity, "question": question, "options": options, "answer": answer, "question_type": kind,
                "subfield": "Painting", "topic_difficulty": "Easy", "explanation": "?", "img_type": "[]"} | images

    nine = "['a', \"it's\", 'c', 'd', 'e', 'f', 'g', 'h', 'i']"
    rows = [row("validation_Art_1", "Which? <image 1>", "['<image 3>', '<image 2>']", "B", ["red", "lime", "blue"]),
            row("validation_Art_Theory_2", "How many?", nine, "I", ["red"]),
            row("validation_Math_3", "In <image 1>?", "[]", "['24/7', '3.429']", ["red"], "open"),
            row("validation_Math_4", "In <image 1> and <image 2>?", "[]", "[1, 2", ["red"], "open"),
            row("validation_Math_5", "In <image 1>, not <image 4>?", "[]", "7", ["red"], "open")]
    which, many, several, broken, gone = read("mmmu", hub_file(tmp_path, "validation-00000-of-00001", rows))
    assert (which.question, which.choices) == ("Which? <image>", ("<image>", "<image>"))
    colors = [open_image(image, "x").getpixel((0, 0)) for image in which.images]
    assert colors == [(255, 0, 0), (0, 0, 255), (0, 255, 0)]  # in the order of their marks, not of the columns
    assert which.meta["subject"] == "Art" and many.meta["subject"] == "Art_Theory"
    assert many.question == "<image>How many?" and many.answer == "I" and len(many.choices) == 9
    assert several.answer == ("24/7", "3.429") and accuracy_reward("<answer>3.429</answer>", several) == 1
    assert broken.reason == "malformed row" and gone.question == "In <image>, not <image 4>?" and len(gone.images) == 1


def test_mmstar(tmp_path):
    rows = [{"index": 0, "question": "Which?\nOptions: A: a cat, B: a dog, C: both, D: none", "image": png(),
             "answer": "B", "category": "coarse perception", "l2_category": "scene",
             "meta_info": {"source": "MMBench"}},
            {"index": 1, "question": "Which of A to J is it?", "image": png(), "answer": "J", "category": "math",
             "l2_category": "geometry", "meta_info": {"source": "MathVista"}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mmstar.parquet")
    one, far = read("mmstar", str(tmp_path))
    assert (one.id, one.question, one.choices, one.answer) == (
        "mmstar-0", "Which?", ("a cat", "a dog", "both", "none"), "B")
    assert one.meta == {"category": "coarse perception", "l2_category": "scene"}
    assert open_image(one.images[0], "0").size == (8, 6)  # bytes, not {bytes, path}
    assert (far.answer, far.choices, far.answer_type) == ("J", (), "choice")


# --- exclusion -------------------------------------------------------------------------------------------------------


def screenshot(number: int, seed: int = 0) -> Image.Image:
    """A question set in small type."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (640, 320), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    for line in range(12):
        text = " ".join(rng.choice("find the length of side angle area when all are given".split(), 9))
        draw.text((8, 8 + 25 * line), f"{number} {text}" if line == 5 else text, fill="black", font=font)
    return image


def drawing(number: int, seed: int = 0) -> Image.Image:
    """A thin-lined quadrangle with a length beside a side."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (400, 300), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    corners = [tuple(map(int, rng.integers((20, 20), (360, 260)))) for _ in range(4)]
    draw.polygon(corners, outline="black")
    draw.text(corners[0], str(number), fill="black", font=font)
    return image


def again(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def halved(image: Image.Image, how=Image.Resampling.BICUBIC) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), how)


@pytest.mark.parametrize("make", [screenshot, drawing])
def test_a_picture_is_known_again_and_told_from_one_that_differs_in_a_digit(make):
    for seed in range(5):
        image = make(38, seed)
        jpeg = again(encoded(image, format="JPEG", quality=75))
        for other in (jpeg, halved(image), halved(image, Image.Resampling.LANCZOS),
                      again(encoded(halved(jpeg), format="JPEG", quality=75))):
            assert same_picture(image, other) and same_picture(other, image)
            assert np.abs(thumbnail(image) - thumbnail(other)).max() <= 12
        for number in (33, 88, 39, 36):
            assert not same_picture(image, make(number, seed)), number
            assert not same_picture(image, again(encoded(make(number, seed), format="JPEG", quality=75)))


def test_exclusion_by_id_and_by_picture(tmp_path):
    """A benchmark's copy may be smaller, of another format or transparent, and its row one that we cannot judge."""
    clear = Image.new("RGBA", (640, 320), "black")  # all the writing is in its transparency
    clear.putalpha(Image.fromarray(255 - np.asarray(screenshot(7, 9).convert("L"))))
    held = [drawing(12), halved(screenshot(34)), clear]
    rows = [mathvista_row(i, decoded_image={"bytes": encoded(image), "path": "x"}, answer="3" if i else None)
            for i, image in enumerate(held)]
    benchmark = read_held(f"mathvista={hub_file(tmp_path, 'testmini', rows)}")
    assert benchmark.ids == {"mathvista-0", "mathvista-1", "mathvista-2"} and len(benchmark.pictures) == 3
    records = [Record("mathvista-1", "?", "1"), Record("a", "?", "1", (encoded(drawing(12), format="JPEG"),)),
               Record("b", "?", "1", (png(), encoded(screenshot(34)))),
               Record("c", "?", "1", (encoded(screenshot(84)),)),
               Record("d", "?", "1", (encoded(drawing(18)),)), Record("mathvista-9", "?", "1"),
               Record("e", "?", "1", (encoded(screenshot(7, 9), format="JPEG", quality=75),))]
    report = save_usable(records, str(tmp_path / "out/x.parquet"), benchmark)
    assert [r.id for r in load_records(report["out"])] == ["c", "d", "mathvista-9"]
    assert report["dropped"] == {"in mathvista, by picture": 3, "in mathvista, by id": 1}
    lines = [json.loads(line) for line in (tmp_path / "out/x.dropped.jsonl").read_text().splitlines()]
    assert [(line["id"], line["detail"]) for line in lines[1:3]] == [
        ("a", "a picture of mathvista-0"), ("b", "a picture of mathvista-1")]


def test_unknown_benchmark_is_told_with_the_known():
    with pytest.raises(ValueError, match="no benchmark of that name; there are mathvista, mathvision"):
        read_held("mathvist")


def test_a_benchmark_that_would_exclude_nothing_is_refused(tmp_path, capsys):
    """A leak that the option is there to stop, and no word of it."""
    (tmp_path / "wrong.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    with pytest.raises(ValueError, match="no row there is one of mathvista, and nothing would be excluded"):
        read_held(f"mathvista={tmp_path / 'wrong.jsonl'}")
    (tmp_path / "far.jsonl").write_text(json.dumps(mathvista_row(1, image="https://x.org/1.png", decoded_image=None)))
    twice = ",".join(2 * [f"mathvista={tmp_path / 'far.jsonl'}"])
    assert read_held(twice).ids == {"mathvista-1"}
    assert "cannot look for the picture of mathvista-1: " in capsys.readouterr().err


# --- the command -----------------------------------------------------------------------------------------------------


def test_command_reports_what_it_read_kept_and_dropped(tmp_path):
    rows = [{"id": "a", "question": "1 + 1?", "answer": "2"}, {"id": "b", "question": "?", "answer": None},
            {"id": "c", "question": "?", "answer": "\\frac{1}{"}, {"id": "d", "question": "?", "answer": "3",
             "images": ["cut.png"]}, {"id": "a", "question": "?", "answer": "1"},
            {"id": "e", "question": "?", "answer": "$x^2$"}]
    (tmp_path / "cut.png").write_bytes(encoded(screenshot(1))[:-400])
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    out = tmp_path / "raw/mine.parquet"
    command = [sys.executable, data.__file__, "any", "--input", str(tmp_path / "my.jsonl"), "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "raw/mine.report.json").read_text())
    assert json.loads(run.stdout) == report
    assert (report["read"], report["kept"], report["answer_types"]) == (7, 2, {"number": 1, "math": 1})
    assert report["dropped"] == {"null gold": 1, "unverifiable": 1, "picture unreadable": 1, "repeated id": 1,
                                 "malformed row": 1}
    assert [r.id for r in load_records(str(out))] == ["a", "e"] == [r.id for r in load_records(str(out.parent))]
    lines = [json.loads(line) for line in (tmp_path / "raw/mine.dropped.jsonl").read_text().splitlines()]
    assert [(line["id"], line["reason"]) for line in lines] == [
        ("b", "null gold"), ("c", "unverifiable"), ("d", "picture unreadable"), ("a", "repeated id"),
        ("my-7", "malformed row")]
    assert "my.jsonl, line 7: " in lines[4]["detail"]


def test_nothing_usable_is_an_error_and_no_file(tmp_path):
    out = tmp_path / "x.parquet"
    with pytest.raises(ValueError, match="none of the 1 records can be used .null gold 1.*x.dropped.jsonl says why"):
        save_usable([Dropped("a", "null gold", "")], str(out))
    assert not out.exists() and "null gold" in (tmp_path / "x.dropped.jsonl").read_text()


# --- pictures that stay in their file --------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path) -> str:
    path = str(tmp_path / "x.parquet")
    save_records(path, (Record(str(i), "?", "1", (png((i, 0, 0)), png((0, i, 0)))) for i in range(200)))
    return path


def bytes_read() -> int:
    """By this process through system calls, from files in memory too."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts the bytes a process reads")
def test_pictures_in_any_order_are_read_without_their_neighbours(tmp_path):
    """Training asks in random order: a row group of 64 for each picture was 37 times slower."""
    path = str(tmp_path / "x.parquet")
    noise = np.random.default_rng(0).integers(0, 256, (640, 40, 40, 3), dtype=np.uint8)
    save_records(path, (Record(str(i), "?", "1", (encoded(Image.fromarray(noise[i])),)) for i in range(640)))
    records = load_records(path)
    assert Path(path).stat().st_size > 640 * 4000
    random.Random(0).shuffle(records)
    before = bytes_read()
    for record in records:
        assert np.array_equal(np.asarray(open_image(record.images[0], record.id)), noise[int(record.id)])
    assert bytes_read() - before < 2 * 640 * 4800, "each picture at most twice; with its neighbours it is 64 times"


def test_pictures_are_small_and_go_to_other_threads_and_processes(stored):
    records = pickle.loads(pickle.dumps(load_records(stored)))
    alone, all_of_them = (len(pickle.dumps([r.images for r in some])) for some in (records[7:8], records))
    assert alone < 5000 and all_of_them - alone < 200 * 2 * 100  # what they share, their table, goes once
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda r: open_image(r.images[0], r.id).getpixel((0, 0)), reversed(records)))
    assert found == [(i, 0, 0) for i in reversed(range(200))]


@pytest.mark.parametrize("how", ["replaced", "in place", "at the same time"])
def test_a_file_written_anew_does_not_hand_out_the_pictures_of_other_records(stored, how):
    """Row 0 of the new file is another problem's: training would go on with wrong pictures, in silence."""
    before = load_records(stored)[0]
    times = Path(stored).stat()
    new = [Record("b", "?", "1", (png("blue"),))]
    if how == "in place":
        save_records(stored + ".new", new)
        Path(stored).write_bytes(Path(stored + ".new").read_bytes())
    else:
        save_records(stored, new)
    if how == "at the same time":  # as `cp -p` and `rsync -t` set it
        os.utime(stored, ns=(times.st_atime_ns, times.st_mtime_ns))
    (after,) = load_records(stored)
    assert open_image(after.images[0], "b").getpixel((0, 0)) == (0, 0, 255)
    assert open_image(before.images[0], "0").getpixel((0, 0)) == (0, 0, 0), "what was loaded keeps its own pictures"


def test_reading_leaves_nothing_beside_the_file(stored):
    load_records(stored)
    assert [file.name for file in Path(stored).parent.iterdir()] == ["x.parquet"]


def test_a_parquet_file_in_a_folder_with_brackets_in_its_name(stored):
    folder = Path(stored).parent / "run [1] *"
    folder.mkdir()
    Path(stored).rename(folder / "x.parquet")
    assert len(load_records(str(folder))) == 200


def test_a_parquet_file_without_rows_is_told(tmp_path):
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet: holds no records"):
        load_records(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize("columns", [
    {"image": pa.array([png(), None])}, {"image": pa.array([png(), None], pa.large_binary())},
    {"image": pa.array([{"bytes": png(), "path": None}, None])},
    {"images": pa.array([[{"bytes": png(), "path": "a.png"}, {"bytes": png(), "path": None}], []])},
    {"images": pa.array([[png(), png()], None])}, {"image": pa.array([{"path": "a.png"}, None])},
], ids=["binary", "large binary", "struct", "list of structs", "list of binaries", "path alone"])
def test_pictures_in_every_kind_of_column(tmp_path, columns):
    (tmp_path / "a.png").write_bytes(png())
    pq.write_table(pa.table({"question": ["Q?", "R?"], "answer": ["1", "2"]} | columns), tmp_path / "x.parquet")
    pictured, bare = load_records(str(tmp_path / "x.parquet"))
    assert [open_image(image, "0").size for image in pictured.images] == [(8, 6)] * len(pictured.images)
    assert pictured.images and bare.images == ()


def test_references_to_pictures_tell_them_apart(stored):
    pictures = [str(image) for record in load_records(stored) for image in record.images]
    assert pictures[:3] == [f"{stored}#0/images/0", f"{stored}#0/images/1", f"{stored}#1/images/0"]
    assert len(set(pictures)) == 400


def test_several_processes_may_load_at_once(stored):
    code = f"import data; print(sum(len(image.read()) for r in data.load_records({stored!r}) for image in r.images))"
    several = [subprocess.Popen([sys.executable, "-c", code], cwd=Path(data.__file__).parent, stdout=subprocess.PIPE)
               for _ in range(2)]
    assert len({process.communicate()[0] for process in several}) == 1
    assert [process.returncode for process in several] == [0, 0]


def test_a_cache_without_room_is_named_with_the_file(stored, monkeypatch):
    def full(*args, **options):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("An error occurred while generating the dataset") from error  # as `datasets` does

    monkeypatch.setattr(datasets.Dataset, "from_parquet", full)
    with pytest.raises(ValueError, match=r"x.parquet: cannot be read: .*No space left on device; .*HF_DATASETS_CACHE"):
        load_records(stored)


def test_columns_for_other_trainers_and_their_way_back(tmp_path):
    """EasyR1 wants `problem` with a mark to a picture, TRL `prompt` and `solution`; we read such a file as our own."""
    path = str(tmp_path / "x.parquet")
    records = [Record("a", "Which?", "B", (png("lime"), png()), ("1", "2"), meta={"k": 1}),
               Record("b", "In <image> what?", ("2", "two"), (png(),), source="me"), Record("c", "1 + 1?", "2")]
    save_records(path, records)
    rows = datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[0]["images"][0].getpixel((0, 0)) == (0, 255, 0)  # decoded
    assert rows["problem"][:] == ["<image><image>Which?\n(A) 1\n(B) 2", "In <image> what?", "1 + 1?"]
    assert rows["solution"][:] == ["B", "2", "2"] == rows["answer"][:]
    picture = {"type": "image", "text": None}  # (TRL fills these parts with `images`, in order)
    assert rows["prompt"][:] == [[{"role": "user", "content": content}] for content in (
        [picture, picture, {"type": "text", "text": "Which?\n(A) 1\n(B) 2"}],
        [{"type": "text", "text": "In "}, picture, {"type": "text", "text": " what?"}],
        [{"type": "text", "text": "1 + 1?"}])]
    loaded = load_records(path)
    assert [vars(r) | {"images": ()} for r in loaded] == [vars(r) | {"images": ()} for r in records]
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(list(data.OTHERS_COLUMNS)), tmp_path / "older.parquet")
    assert [vars(r) | {"images": ()} for r in load_records(str(tmp_path / "older.parquet"))] == [
        vars(r) | {"images": ()} for r in records]
    pq.write_table(table.drop_columns(["question", "answer_type"]), tmp_path / "trl.parquet")  # theirs alone
    assert [r.question for r in load_records(str(tmp_path / "trl.parquet"))] == [
        "<image><image>Which?", "In <image> what?", "1 + 1?"]


def test_saving_takes_no_more_records_than_it_writes(tmp_path):
    """A list of all records, each with its picture, is what streaming is to avoid."""
    alive = []

    class Counted(bytes):
        def __del__(self):
            alive.pop()

    def records():
        for i in range(1000):
            alive.append(i)
            yield Record(str(i), "?", "1", (Counted(png((i % 256, 0, 0))),))
            assert len(alive) <= 2 * data.BATCH

    save_records(str(tmp_path / "x.parquet"), records())
    assert len(load_records(str(tmp_path / "x.parquet"))) == 1000


# --- what a review found ---------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_one_dropped_record_and_not_the_end_of_the_run(tmp_path):
    """Each of these used to end `data.py any` with a traceback, hours in, and nothing saved."""
    rows = [{"id": "good", "question": "1 + 1?", "answer": "2", "source": 5},
            {"id": "base64 as a path", "question": "Q?", "answer": "1", "image": "iVBORw0K" * 600},
            '{"id": "surrogate", "question": "Q?", "answer": "\\ud800"}',
            {"id": "huge", "question": "Q?", "answer": "1", "stage": 10**30},
            {"id": "percent", "question": "Q?", "answer": "1", "difficulty": 37.5, "complexity": 1},
            {"id": "object", "problem": "Q?", "answer": {"x": 1}},
            {"problem": "Tell a story.", "answer": "once upon a time there was a very long answer indeed"}]
    (tmp_path / "x.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    report = save_usable(read_any(str(tmp_path / "x.jsonl")), str(tmp_path / "out.parquet"))
    assert (report["kept"], report["read"]) == (1, 7)
    (record,) = load_records(str(tmp_path / "out.parquet"))
    assert (record.id, record.source) == ("good", "5")
    dropped = [json.loads(line) for line in (tmp_path / "out.dropped.jsonl").read_text().splitlines()]
    assert len(dropped) == 6 and all(len(line["detail"]) < 700 for line in dropped)


def test_image_beside_an_empty_images_is_not_lost(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "x.jsonl").write_text(json.dumps(
        {"question": "Q?", "answer": "1", "images": [], "image": ["a.png"]}) + "\n")
    (record,) = load_records(str(tmp_path / "x.jsonl"))
    assert len(record.images) == 1


def test_mathv360k_as_json_lines_and_labels_that_are_equal_numbers(tmp_path):
    """The first pass used to skip JSON lines, so every row passed for a repeated one; 3 and 3.0 do not conflict."""
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"id": str(i), "image": "a.png", "conversations": [
        {"from": "human", "value": f"<image>\nQuestion: {question}"},
        {"from": "gpt", "value": f"The answer is {gold}"}]} for i, (question, gold) in enumerate(
            [("How many?", "3"), ("How many?", "3.0"), ("How tall?", "4"), ("How wide?", "1"), ("How wide?", "2")])]
    (tmp_path / "train_samples_all_tuning.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = list(read("mathv360k", str(tmp_path / "train_samples_all_tuning.jsonl")))
    assert [item.answer for item in made if not isinstance(item, Dropped)] == ["3", "4"]
    assert Counter(item.reason for item in made if isinstance(item, Dropped)) == {
        "repeated question": 1, "conflicting labels": 2}


def test_function_notation_is_no_list_of_options():
    assert split_options("f(A) = 3, f(B)=4, f(C)=5. What is f(D)?")[1] == ()
