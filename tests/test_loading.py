"""What comes in is what was meant, or is refused by file, record and remedy: a table of inputs of each kind.

Each once was read in silence as something else: a picture lost, an option called "A", any number of a box right.
"""
from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_data import encoded, files, jsonl, png

import curriculum
import data
import eval as evaluation
import rollout
from data import Record, load_records, open_image, save_records, split_options
from rewards import answer_matches

NAN = float("nan")


def load(tmp_path: Path, *rows: dict, **more) -> list[Record]:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png("blue"))
    return load_records(jsonl(tmp_path / "x.jsonl", *rows), **more)


def asked(**more) -> dict:
    return {"question": "Which?", "answer": "B", "choices": ["red", "blue"]} | more


# --- a field's type ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("choices", [
    ["red", "blue"], {"A": "red", "B": "blue"}, {"A": "red", "B": "blue", "C": None}, ["red", "blue", NAN],
    {"text": ["red", "blue"], "label": ["A", "B"]}, [{"label": "A", "text": "red"}, {"label": "B", "text": "blue"}],
    [{"text": "red", "label": "A"}, {"text": "blue", "label": "B"}], ["A. red", "B. blue"], ["(A) red", "(B) blue", ""],
    "['red', 'blue']", '["red", "blue"]', "A. red\nB. blue", [["A", "red"], ["B", "blue"]],
    ["red", "blue", "nan", None]])
def test_options_of_every_shape(tmp_path, choices):
    """{"A": "red", "B": "blue"} made "(A) A (B) B", and the model trained on it."""
    for name in ("choices", "options"):
        [record] = load(tmp_path, {"question": "Which?", "answer": "B", name: choices})
        assert (record.choices, record.text) == (("red", "blue"), "Which?\n(A) red\n(B) blue")
        assert answer_matches("blue", record) and answer_matches("B", record) and not answer_matches("A", record)


@pytest.mark.parametrize("row, told", [
    (asked(choices=["red", None, "blue"]), "choice B"), (asked(choices=["red", NAN, "blue"]), "choice B"),
    (asked(choices={"1": "red", "2": "blue"}), "call them A, B"),
    (asked(choices={"B": "red", "C": "blue"}), "call them"),
    (asked(choices="['red' 'blue']"), "lacks commas"),
    (asked(choices="red, blue"), "one text"), (asked(choices=3), "its choices are '3'"),
    (asked(answers={"a": 1}), "its answers are"), (asked(answers="B"), "its answers are"),
    (asked(choices=[str(i) for i in range(27)]), "more than there are letters"),
    (asked(choices=["red", ["blue"]]), "choice B"),
    (asked(answer=NAN), "answer is empty"), (asked(answer="nan", choices=[]), "answer is empty"),
    (asked(answer=None), "it has no answer"), (asked(answer=True), "a bool"), (asked(answer={"a": 1}), "a dict"),
    (asked(answers=[], answer=None), "it has no answer"),
    (asked(answers=["B", NAN]), "answer is empty"), (asked(id=NAN), "its id"),
    (asked(answers=["red"]), "none of its answers"), (asked(id=["a"]), "its id"),
    (asked(question=5), "its question is 5"),
    (asked(question=["a"]), "its question"), (asked(source=["a"]), "its source"),
    (asked(precision="low"), "its precision"),
    (asked(precision=True), "its precision"), (asked(difficulty=NAN), "its difficulty"), (asked(stage=9), "its stage"),
    (asked(complexity=-1), "its complexity"), (asked(meta=[1]), "its meta"),
    (asked(meta={"facts": [1, 2]}), "meta.facts"),
    (asked(meta={"facts": ["red 3", None]}), "meta.facts"), (asked(meta={"facts": "red 3"}), "meta.facts"),
    (asked(meta={"rollouts": 8}), "meta.rollouts"), (asked(meta={"rollouts": [{"answer": "B"}]}), "meta.rollouts")])
def test_a_value_of_another_type_is_refused_by_its_field(tmp_path, row, told):
    path = jsonl(tmp_path / "x.jsonl", {"question": "Fine?", "answer": "1"}, row)
    with pytest.raises(ValueError, match="x.jsonl: 1 of 2 records cannot be used") as error:
        load_records(path)
    assert "x.jsonl, line 2: " in str(error.value) and told in str(error.value)
    assert [record.question for record in load_records(path, skip_bad=True)] == ["Fine?"]


def test_keys_of_no_field_go_into_meta_and_it_is_said(tmp_path, capsys):
    """Five of five real files in our own layout were refused for such keys."""
    [record] = load(tmp_path, asked(image_path="a.png", split="train", year=2020))
    assert record.meta == {"split": "train", "year": 2020} and len(record.images) == 1
    assert "went into meta: split, year" in capsys.readouterr().err


# --- pictures ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("row", [
    {"image": "a.png"}, {"images": ["a.png"]}, {"image_path": "a.png"}, {"img": "a.png"}, {"image_1": "a.png"},
    {"image_file": "a.png"}, {"file_name": "a.png"}, {"image": {"path": "a.png"}}, {"image": {"filename": "a.png"}},
    {"images": [{"url": "a.png"}]}, {"images": [], "image": "a.png"},
    {"images": [{"base64": base64.b64encode(png()).decode()}]}, {"image": base64.encodebytes(png()).decode()},
    {"image": "data:image/png;base64," + base64.encodebytes(png()).decode()}])
def test_a_picture_that_is_named_is_seen(tmp_path, row):
    for problem in ({"question": "Q?", "answer": "1"}, {"problem": "Q?", "answer": "1"},
                    {"messages": [{"role": "user", "content": "Q?"}], "solution": "1"}):
        [record] = load(tmp_path, problem | row)
        assert [open_image(image, "x").size for image in record.images] == [(8, 6)]


def test_numbered_pictures_stand_in_their_order(tmp_path):
    [record] = load(tmp_path, {"question": "Q?", "answer": "1", "image_10": "a.png", "image_2": "b.png"})
    assert [Path(image).name for image in record.images] == ["b.png", "a.png"]


@pytest.mark.parametrize("row", [
    {"images": [None]}, {"images": [""]}, {"images": ["a.png", None]}, {"image": {"bytes": None, "path": None}},
    {"image": {"id": 3}}, {"images": 3}, {"video": "a.mp4"}, {"diagram": "a.png"}, {"left_image": "a"},
    {"image": "a.png", "image_1": "b.png"}, {"question": "What is in <image 1>?"}, {"image": "https://x.org/a.png"}])
def test_a_picture_that_would_not_be_seen_is_refused(tmp_path, row):
    """The model trained blind, even where the file did not exist."""
    with pytest.raises(ValueError, match="x.jsonl, line 1: .*(picture|video|image)"):
        load(tmp_path, {"question": "Q?", "answer": "1"} | row)


def test_a_null_picture_of_a_parquet_struct_is_refused(tmp_path):
    rows = {"question": ["Q?"], "answer": ["1"], "image": [{"bytes": None, "path": None}]}
    schema = pa.schema([("question", pa.string()), ("answer", pa.string()),
                        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
    pq.write_table(pa.table(rows, schema), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="record 1: its picture is"):
        load_records(str(tmp_path / "x.parquet"))


def test_pictures_of_another_folder(tmp_path):
    """They were refused, with no way to say where they are."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/c.png").write_bytes(png())
    (tmp_path / "rows").mkdir()
    path = jsonl(tmp_path / "rows/x.jsonl", {"question": "Q?", "answer": "1", "image": "c.png"})
    [made] = data.read_any(path, str(tmp_path / "pictures"))
    assert made.images == (str(tmp_path / "pictures/c.png"),)


@pytest.mark.parametrize("head, told", [
    (b"\0\0\0\x18ftypheic", "HEIC"), (b"\0\0\0\x18ftypavif", "AVIF"), (b"<svg xmlns='x'>", "SVG"),
    (b"<?xml version='1.0'?>\n<svg>", "SVG"), (b"<!DOCTYPE html>", "HTML"), (b"%PDF-1.4", "PDF"),
    (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"), (b"hello", "an unknown format")])
def test_what_is_no_picture_is_named(tmp_path, head, told):
    (tmp_path / "a.png").write_bytes(head + b"\0" * 50)
    for picture in (str(tmp_path / "a.png"), head + b"\0" * 50):
        with pytest.raises(ValueError, match=f"record x: cannot use its picture: .*{told}"):
            open_image(picture, "x")


def test_twelve_bits_in_sixteen_are_refused_and_transparency_stays_white():
    """They came out nearly black; the transparent grey of a 16-bit PNG was drawn."""
    with pytest.raises(ValueError, match="below 4096"):
        open_image(encoded(Image.fromarray(np.full((4, 4), 4000, np.uint16)), "PNG"), "x")
    grey = Image.fromarray(np.array([[0, 40000], [65535, 257]], np.uint16))
    assert list(open_image(encoded(grey, "PNG", transparency=40000), "x").convert("L").getdata()) == [0, 255, 255, 1]


# --- lists ------------------------------------------------------------------------------------------------------------

BOX = [74.0, 302.0, 181.0, 500.5]


@pytest.mark.parametrize("row", [
    {"problem": "Where?", "solution": BOX}, {"question": "Where?", "answer": BOX},
    {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": BOX}]},
    {"question": "Where?", "answer": [str(number) for number in BOX]}])
def test_a_box_is_one_answer(tmp_path, row):
    """Any of its four numbers was right, and the box was wrong."""
    [record] = load(tmp_path, row)
    assert (record.answer, record.answer_type) == ("[74, 302, 181, 500.5]", "list") or record.answer == str(BOX)
    assert answer_matches("[74, 302, 181, 500.5]", record) and not answer_matches("74", record)
    assert not answer_matches("[302, 74, 181, 500.5]", record) and not answer_matches("[74, 302, 181, 501]", record)
    [coarse] = load(tmp_path, row | {"precision": 0})
    assert answer_matches("[74.2, 302, 181, 500.4]", coarse) and not answer_matches("[76, 302, 181, 500]", coarse)


def test_a_multi_select_wants_all_of_its_letters(tmp_path):
    choices = ["red", "blue", "green"]
    for gold in (["A", "C"], "A, C", "C and A", "AC"):
        [record] = load(tmp_path, {"question": "Which two?", "answer": gold, "choices": choices})
        for right in ("A, C", "C, A", "A and C", "AC", "(A), (C)"):
            assert answer_matches(right, record), (gold, right)
        for wrong in ("A", "C", "A, B", "A, B, C", "B", "A or C"):
            assert not answer_matches(wrong, record), (gold, wrong)


def test_several_accepted_answers_have_a_field_of_their_own(tmp_path):
    rows = [{"question": "Who?", "answers": ["Bob", "Robert"]}, {"question": "Root?", "answers": [2, -2], "answer": 2},
            {"question": "Half?", "answer": ["0.5", "1/2"]}, {"question": "Who?", "answers": ["Bob"]},
            {"question": "Which two?", "answer": ["A", "C"], "choices": ["x", "y", "z"]},
            {"question": "Where?", "answer": [1, 2]}]
    records = load(tmp_path, *rows)
    assert [record.answer for record in records] == [
        ("Bob", "Robert"), ("2", "-2"), ("0.5", "1/2"), "Bob", "A, C", "[1, 2]"]
    save_records(str(tmp_path / "saved.parquet"), records)
    again = load_records(str(tmp_path / "saved.parquet"))
    told = [[(r.answer, r.answer_type, r.choices) for r in some] for some in (again, records)]
    assert told[0] == told[1]
    assert answer_matches("Robert", again[0]) and answer_matches("-2", again[1]) and not answer_matches("A", again[4])


# --- options and instructions in the text -----------------------------------------------------------------------------

OPTIONS = "What is it?\n(A) shortage\n(B) surplus"
FOREIGN = [lambda text, gold: {"problem": text, "answer": gold},
           lambda text, gold: {"prompt": [{"role": "user", "content": text}], "solution": f"<answer>{gold}</answer>"},
           lambda text, gold: {"prompt": [{"role": "user", "content": text}], "reward_model": {"ground_truth": gold}},
           lambda text, gold: {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": gold}]},
           lambda text, gold: {"conversations": [{"from": "user", "value": text},
                                                 {"from": "assistant", "value": gold}]},
           lambda text, gold: {"question": text, "answer": gold}]


@pytest.mark.parametrize("row", FOREIGN)
@pytest.mark.parametrize("gold", ["shortage", "A", "(A)"])
def test_options_in_the_text_become_choices(tmp_path, row, gold):
    """The gold `shortage` was a text, and the letter A wrong: 239 of 998 rows of TabMWP."""
    [record] = load(tmp_path, row(OPTIONS, gold))
    assert (record.question, record.choices) == ("What is it?", ("shortage", "surplus"))
    assert answer_matches("A", record) and answer_matches("shortage", record) and not answer_matches("B", record)


@pytest.mark.parametrize("text, gold", [
    ("In triangle ABC, A. is 3 and B. is 4. How long is C?", "5"), ("What is 3 + 4? Give your answer in cm.", "7"),
    ("Solve for x, and round to two decimals. Answer in the unit m.", "7"),
    ("Which letter from the word is missing?", "T"),
    ("Is A. larger than B. here?", "A"), ("Look at points (A) and (B). Which is larger?", "B"),
    ("Here: (A) a cat and (B) a dog. Which is larger?", "B"), ("What is shown? (A) is one. (B) is two, is it?", "A"),
    ("In the figure, 'Option B' is chosen. Which option letter is circled?", "B"),
    ("Find x. Which of the values is \\boxed{}?", "7"), ("The area is \\boxed{12}. The side is \\boxed{?}", "7"),
    ("Fill in:\n....", "7"), ("Solve the following system: x+y=3\n\nx-y=1", "2"),
    ("Please first find the area of ABC.\n\nThen tell the perimeter.", "7"),
    ("Hint: Please note: AB = 5.\n\nFind AC.", "7"),
    ("Which angle? In ABC with (A) and (B)...", "B"), ("The weights are A: 5, B: 7, C: 9. How heavy is B?", "7"),
    ("Tanks A: 5, B: 7, C: 9. Who is heaviest", "C"), ("Find the final answer.", "7"),
    ("Output the value of f(3).", "7"), ("Please find x. Which number is it?", "7")])
def test_a_question_that_needs_its_words_keeps_them(tmp_path, text, gold):
    [record] = load(tmp_path, {"problem": text, "answer": gold})
    assert record.question == text and record.choices == ()


@pytest.mark.parametrize("before, after", [
    ("", " You FIRST think about the reasoning process as an internal monologue and then provide the final answer. The "
         "reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}."),
    ("", " Output the thinking process in <think> </think> and final answer (number) in <answer> </answer> tags."),
    ("", " Let's think step by step and output the final answer within \\boxed{}."),
    ("", "\nAnswer the question using a single word or phrase."),
    ("Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the "
     "end.\nQuestion: ", "")])
@pytest.mark.parametrize("text", ["How long is it, in cm?", "Find $A C$", "Find x."])
def test_the_instruction_of_another_trainer_is_taken_off_and_said(tmp_path, capsys, text, before, after):
    """verl's "MUST be put in \\boxed{}" stayed in the question, against our own prompt."""
    [record] = load(tmp_path, {"problem": f"<image>{before}{text}{after}", "answer": "7", "images": ["a.png"]})
    assert record.question == f"<image>{text}"
    assert "instruction of another trainer was taken off" in capsys.readouterr().err


@pytest.mark.parametrize("text, options", [
    ("A: New York City, B: Washington, D.C., C: Philadelphia, D: Boston",
     ("New York City", "Washington, D.C.", "Philadelphia", "Boston")),
    ("A: Team A and Team B., B: Team A and Team C., C: Team B and Team C., D: Team A and Team D.",
     ("Team A and Team B.", "Team A and Team C.", "Team B and Team C.", "Team A and Team D.")),
    ("A．3; B．4; C．5", ("3", "4", "5")), ("A. Yes.; B. Both.; C. No.; F. No correct answer", ()),
    ("A. 1\nB. 2\nC. 3\nUse the figure on the left.", ())])
def test_letters_in_sequence_each_before_a_text_of_its_own(text, options):
    """2 of MMStar's 1,500 questions were shown with wrong options."""
    assert split_options(text)[1] == options


# --- tables and folders -----------------------------------------------------------------------------------------------

ROWS = "question\tanswer\n" + "".join(f"Q{i}?\t{i}\n" for i in range(10))


@pytest.mark.parametrize("suffix, mark", [(".tsv", "\t"), (".csv", ","), (".csv", ";")])
def test_an_unclosed_quote_swallows_nothing(tmp_path, suffix, mark):
    """A table of 10 rows became 2 records."""
    path = tmp_path / f"x{suffix}"
    path.write_text("\ufeff" + ROWS.replace("\t", mark), "utf-8")
    assert [record.answer for record in load_records(str(path))] == [str(i) for i in range(10)]
    for broken in ('"Q4?', '"Q4?\t4\nQ5" x'):
        path.write_text(ROWS.replace("Q4?", broken).replace("\t", mark))
        with pytest.raises(ValueError, match=f"x{suffix}: line 6: a quote is not closed"):
            load_records(str(path), skip_bad=True)
    path.write_text(ROWS.replace("Q4?\t4", "Q4?").replace("\t", mark))
    with pytest.raises(ValueError, match=f"x{suffix}, line 6: it has 1 cells, the header 2"):
        load_records(str(path))
    assert len(load_records(str(path), skip_bad=True)) == 9


def test_a_clone_of_a_hub_data_set_is_read_by_split(tmp_path):
    """The test split was read as training data, and dataset_infos.json made all of it unreadable."""
    for split in ("train", "test"):
        save_records(str(tmp_path / f"{split}-00000-of-00001.parquet"), [Record(split, "Q?", "1")])
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".cache.json").write_text("{")
    (tmp_path / "._x.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match="holds the splits test, train; give one, as in .*@train"):
        load_records(str(tmp_path))
    assert [record.id for record in load_records(f"{tmp_path}@test")] == ["test"]
    with pytest.raises(ValueError, match="none of its files is of the split val"):
        load_records(f"{tmp_path}@val")
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    assert [record.id for record in load_records(str(tmp_path))] == ["train"]


def test_what_save_to_disk_wrote_is_read(tmp_path):
    rows = datasets.Dataset.from_dict({"problem": ["<image>Q?"], "answer": ["1"],
                                       "images": [[Image.new("RGB", (8, 6))]]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "both")
    for path in ("one", "both@train"):
        [record] = load_records(str(tmp_path / path))
        assert open_image(record.images[0], "x").size == (8, 6)
    with pytest.raises(ValueError, match="holds the splits train, test"):
        load_records(str(tmp_path / "both"))


def test_imagefolder_csv_and_json_by_id(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "metadata.csv").write_text("file_name,question,answer\na.png,Q?,1\n")
    (tmp_path / "by_id.json").write_text(json.dumps({"p7": {"question": "Q?", "answer": "1", "image": "a.png"}}))
    (tmp_path / "lines.json").write_text('{"question": "Q?", "answer": "1"}\n{"question": "R?", "answer": "2"}\n')
    assert [len(files(record)) for record in load_records(str(tmp_path / "metadata.csv"))] == [1]
    assert [record.id for record in load_records(str(tmp_path / "by_id.json"))] == ["p7"]
    assert len(load_records(str(tmp_path / "lines.json"))) == 2


def test_equal_ids_of_two_files_are_told_apart(tmp_path):
    """`--skip-bad` threw 200 good problems away."""
    for folder in ("train", "more"):
        (tmp_path / folder).mkdir()
        jsonl(tmp_path / folder / "problems.jsonl", {"question": f"In {folder}?", "answer": "1"})
    paths = [str(tmp_path / folder / "problems.jsonl") for folder in ("train", "more")]
    assert [record.id for record in curriculum.load_all(paths, None, False)] == [
        "more/problems/problems-1", "problems-1"]
    with pytest.raises(ValueError, match="stands in"):
        curriculum.load_all([paths[0], f"{tmp_path}/./train/problems.jsonl"], None, False)


def test_a_review_with_an_unclosed_quote_loses_no_decision(tmp_path):
    """Five `drop` decisions were lost."""
    path = tmp_path / "review.csv"
    path.write_text("id,decision,new_gold\na,drop,\nb,\"drop,\nc,drop,\n")
    with pytest.raises(ValueError, match="review.csv: cannot be read: line 3: a quote"):
        curriculum.read_corrections(path, [Record(name, "Q?", "1") for name in "abc"])


# --- answers of other engines -----------------------------------------------------------------------------------------

ANSWERS = {"jsonl": ".jsonl", "list": ".json", "lines": ".json", "by id": ".json", "texts by id": ".json",
           "lists by id": ".json", "vlmevalkit": ".tsv", "model_answer": ".json"}


@pytest.mark.parametrize("form", ANSWERS)
def test_answers_of_other_engines(tmp_path, form):
    """A JSON list gave "33827 lines cannot be used: Expecting property name"."""
    rows: list = [Record("toy-7", "Q?", "1", source="toy"), Record("toy-8", "Q?", "2", source="toy")]
    told = {"7": "<answer>1</answer>", "8": "so\n2"}
    listed = [{"id": key, "response": text} for key, text in told.items()]
    lines = "".join(json.dumps(row) + "\n" for row in listed)
    written = {"jsonl": lines, "lines": lines, "list": json.dumps(listed, indent=1), "texts by id": json.dumps(told),
               "by id": json.dumps({key: {"response": text, "query": "Q?"} for key, text in told.items()}),
               "lists by id": json.dumps({key: [text] for key, text in told.items()}),
               "vlmevalkit": 'index\tquestion\tprediction\n7\tQ?\t<answer>1</answer>\n8\tQ?\t"so\n2"\n',
               "model_answer": json.dumps([{"sample_index": key, "model_answer": told[key]} for key in told])}[form]
    path = tmp_path / f"answers{ANSWERS[form]}"
    path.write_text(written)
    found = evaluation.read_responses(str(path), "toy", rows)
    assert {key: [each["text"] for each in texts] for key, texts in found.items()} == {
        f"toy-{key}": [text] for key, text in told.items()}


@pytest.mark.parametrize("name, content, said", [
    ("a.xlsx", "PK", "pandas.read_excel"), ("a.tsv", "index\tanswer\n7\t1\n", "no column prediction"),
    ("a.tsv", 'index\tprediction\n7\t"x\n8\ty\n', "line 2: a quote"), ("a.json", "{", "cannot be read"),
    ("a.jsonl", '{"id": "7", "output": "1"}\n', "line 1: it has no response"), ("a.txt", "x", "it is not"),
    ("a.jsonl", '{"id": "9", "response": "1"}\n', "no problem '9'"), ("a.jsonl", "", "empty")])
def test_answers_that_cannot_be_read_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"--responses .*{name}") as error:
        evaluation.read_responses(str(tmp_path / name), "toy", [Record("toy-7", "Q?", "1", source="toy")])
    assert said in str(error.value)


# --- command lines ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("program, given", [
    (program, given) for program, several in {
        evaluation: "--temperature nan|--temperature -1|--samples 0|--max-tokens 0|--rows 0|--limit 0|--seed -1|"
                    "--max-pixels 0|--temperature inf|--samples 1.5",
        curriculum: "--temperature nan|--temperature 0|--max-tokens 0|--rows -1|--limit 0|--seed -1|--size 0|"
                    "--low-complexity 2|--low-complexity nan|--max-pixels -5",
        rollout: "--temperature nan|--temperature -1|--samples 0|--max-tokens 0|--seed -1|--max-pixels 0"}.items()
    for given in several.split("|")])
def test_numbers_out_of_bounds_name_their_option(program, given, monkeypatch, capsys):
    """`--temperature nan` built a ladder greedily; `--samples 0` divided by zero."""
    needed = {evaluation: [], curriculum: ["--data", "x", "--out", "y"],
              rollout: ["--model", "x", "--question", "Q?"]}[program]
    monkeypatch.setattr("sys.argv", [program.__name__, *needed, *given.split()])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == 2 and f"argument {given.split()[0]}: " in capsys.readouterr().err


def test_the_commonest_reason_is_told_where_nothing_can_be_used(tmp_path):
    rows = [{"question": "Q?"}] * 2 + [{"question": "", "answer": "1"}]
    path = jsonl(tmp_path / "x.jsonl", *rows)
    with pytest.raises(ValueError, match="null gold 2, no question 1; the first: .*line 1: it has no answer"):
        data.save_usable(data.read_any(path), str(tmp_path / "out.parquet"))


def test_picture_lies_in_memory_only_once(tmp_path):
    """A row's picture under two names is one: the other goes nowhere, and it is said."""
    buffer = io.BytesIO(png())
    rows = pa.table({"question": ["Q?"], "answer": ["1"], "image": [buffer.getvalue()], "thumbnail": [png("blue")]})
    pq.write_table(rows, tmp_path / "x.parquet")
    [record] = load_records(str(tmp_path / "x.parquet"))
    assert files(record) == (png(),) and record.meta == {}


@pytest.mark.parametrize("gold, right", [
    ("35掳", ["35°", "35"]), ("118掳T", ["118°", "118°T", "118"]), ("315^\\circT", ["315°", "315° T"]),
    ("12 units $^{2}$", ["12", "12 square units"]), ("20{}^\\circ", ["20°"]), ("$$105^{ \\circ }$$", ["105°"])])
def test_golds_of_mathverse_as_published(tmp_path, gold, right):
    """16 of 788 could not be read, and 315°T refused 315°."""
    row = {"sample_index": "1", "question": "Q?", "answer": gold, "question_type": "free-form", "image": "",
           "metadata": {"subject": "s"}}
    (tmp_path / "testmini.json").write_text(json.dumps([row]))
    [record] = data.DATASETS["mathverse"].read("mathverse", str(tmp_path))
    assert isinstance(record, Record), record
    for answer in right:
        assert answer_matches(answer, record), (gold, answer)
    assert not answer_matches("36°", record)


def test_a_box_whose_numbers_repeat_is_one_answer(tmp_path):
    """[0, 0, 100, 100] was "any of these" where [74, 302, 181, 500] was not."""
    for numbers in ([0, 0, 100, 100], [10, 20, 10, 40], [3, 3]):
        [record] = load(tmp_path, {"question": "Where?", "answer": numbers})
        assert record.answer == str(numbers) and answer_matches(str(numbers), record)
        assert not answer_matches(str(numbers[0]), record)


def test_a_list_of_letters_however_written(tmp_path):
    for gold in (["a", "c"], ["(A)", "(C)"], ["A.", "C."]):
        [record] = load(tmp_path, {"question": "Which?", "answer": gold, "choices": ["x", "y", "z"]})
        assert answer_matches("C, A", record) and not answer_matches("A", record)
    [record] = load(tmp_path, {"question": "Which?", "answer": [1, 2], "choices": ["[1, 2]", "[2, 3]"]})
    assert answer_matches("A", record) and not answer_matches("B", record)
    [record] = load(tmp_path, {"question": "Year?", "answer": ["2014", "2015"], "answer_type": "number"})
    assert answer_matches("2015", record)


@pytest.mark.parametrize("train, test", [
    ("Train", "Test"), ("training", "testing"), ("train1", "test1"), ("geoTrain", "geoTest"), ("geo", "test"),
    ("problems", "testmini"), ("geo_train", "geo_test"), ("train", "held_out")])
def test_a_test_split_by_any_name_is_not_trained_on(tmp_path, train, test):
    for name in (train, test):
        jsonl(tmp_path / f"{name}.jsonl", {"question": f"{name}?", "answer": "1"})
    with pytest.raises(ValueError, match="holds the splits"):
        load_records(str(tmp_path))
    if "rain" in train:
        assert [record.question for record in load_records(f"{tmp_path}@train")] == [f"{train}?"]


def test_what_may_be_two_things_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pictures under images and image"):
        load(tmp_path, {"question": "Q?", "answer": "1", "image": "a.png", "images": ["b.png"]})
    (tmp_path / "x.tsv").write_text('question\tanswer\n"q1\t5\nq2"\t6\n')
    with pytest.raises(ValueError, match="x.tsv: line 2: a quote"):
        load_records(str(tmp_path / "x.tsv"))
    (tmp_path / "a.jsonl").write_text('{"index": 1, "id": "2", "response": "5"}\n')
    rows: list = [Record(f"toy-{i}", "Q?", "1", source="toy") for i in (1, 2)]
    with pytest.raises(ValueError, match="line 1: it is of two problems"):
        evaluation.read_responses(str(tmp_path / "a.jsonl"), "toy", rows)
