"""Readers of every published file format, what they refuse, and Parquet files of our own.

The data sets cannot be downloaded here: each test writes a small file of exactly the published shape.
"""
from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from data import Picture, Record, check_records, load_records, open_image, save_records


def png(color="red", size=(8, 6), mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, format="PNG")
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that only claims its size: what a decompression bomb looks like before it is decoded."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 1 << 20) + b"IDAT"


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def files(record: Record) -> tuple:
    """Its pictures, with the bytes of those that lie in a Parquet file."""
    return tuple(image.read() if isinstance(image, Picture) else image for image in record.images)


def jsonl(path: Path, *rows: dict | str) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def parquet(path: Path, *rows: dict) -> str:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return str(path)


def plain(number: int, **more) -> dict:
    return {"id": f"q{number}", "question": f"What is {number} + 1?", "answer": str(number + 1), **more}


# --- formats ---------------------------------------------------------------------------------------------------------


def test_lmm_r1_message_is_a_json_string_with_file_urls(tmp_path):
    (tmp_path / "a b.png").write_bytes(png())
    chat = [{"role": "system", "content": "Answer in French."},
            {"role": "user", "content": [{"type": "image", "image": f"file://{tmp_path}/a b.png"},
                                         {"type": "text", "text": "How many sides?"}]}]
    row = {"message": json.dumps(chat), "question": "How many sides?", "answer": "$3$"}
    (record,) = load_records(jsonl(tmp_path / "mm.jsonl", row))
    assert (record.id, record.answer, record.answer_type) == ("mm-1", "$3$", "number")
    assert record.question == "<image>How many sides?"  # the system message of others is dropped: we set our own
    assert record.images == (str(tmp_path / "a b.png"),)


def test_lmm_r1_parquet_with_its_picture_in_a_column(tmp_path):
    """R1-Reward-RL keeps the picture beside the chat, whose image part is bare, and a list of answers."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Sides?"}]}]
    row = {"message": json.dumps(chat), "answer": ["$3$", "three"], "image": {"bytes": png(), "path": None}}
    (record,) = load_records(parquet(tmp_path / "mm.parquet", row))
    assert files(record) == (png(),) and record.answer == ("$3$", "three")


@pytest.mark.parametrize("image", ["geo/1.png", ["geo/1.png"]])
def test_llava_conversations_with_one_picture_or_a_list(tmp_path, image):
    (tmp_path / "geo").mkdir()
    (tmp_path / "geo/1.png").write_bytes(png())
    rows = [{"id": 7, "image": image, "conversations": [{"from": "human", "value": "<image>\nWhich is red?"},
                                                        {"from": "gpt", "value": "The answer is B"}]}]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    (record,) = load_records(str(tmp_path / "llava.json"))
    assert (record.id, record.question, record.answer) == ("7", "<image>\nWhich is red?", "B")
    assert record.images == (str(tmp_path / "geo/1.png"),)


def test_llava_dialogue_is_refused_rather_than_cut_to_its_first_question(tmp_path):
    turns = [{"from": who, "value": "3"} for who in ("human", "gpt", "human", "gpt")]
    with pytest.raises(ValueError, match="line 1: its conversation has 4 turns"):
        load_records(jsonl(tmp_path / "x.jsonl", {"conversations": turns}))


def test_verl_parquet(tmp_path):
    row = {"data_source": "geometry3k", "prompt": [{"content": "<image>Find x.", "role": "user"}],
           "images": [{"bytes": png(), "path": None}], "ability": "math",
           "reward_model": {"ground_truth": "2 \\sqrt { 221 }", "style": "rule"},
           "extra_info": {"index": 0, "split": "train"}}
    (record,) = load_records(parquet(tmp_path / "verl.parquet", row))
    assert record == Record(id="verl-1", question="<image>Find x.", answer="2 \\sqrt { 221 }", images=record.images,
                            source="geometry3k", meta={"ability": "math", "extra_info": row["extra_info"]})
    assert files(record) == (png(),)


@pytest.mark.parametrize("solution, gold", [
    ("<think>so</think><answer> 12 </answer>", "12"),
    ("First \\boxed{1}, in all \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),  # braces inside the box
    ("<answer>\\boxed{5}</answer>", "5"),
    ("12", "12"),
])
def test_trl_chat_with_gold_in_its_solution(tmp_path, solution, gold):
    row = {"prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is half?"}],
           "image": {"bytes": png(), "path": "1.png"}, "solution": solution}
    (record,) = load_records(parquet(tmp_path / "trl.parquet", row))
    assert (record.question, record.answer, files(record)) == ("What is half?", gold, (png(),))


def test_trl_parts_that_passed_through_datasets_are_null_filled(tmp_path):
    """Every part then has every key: {"type": "image", "text": None}. A reader that asks for keys, not for `type`,
    takes the picture for a text."""
    content = [{"type": "image"}, {"type": "text", "text": "What is "}, {"type": "image"},
               {"type": "text", "text": " here?"}]
    data = datasets.Dataset.from_list([{
        "prompt": [{"role": "user", "content": content}], "solution": "12",
        "images": [Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")]}])
    assert data[0]["prompt"][0]["content"][0]["text"] is None  # what this test is about
    data.to_parquet(tmp_path / "trl.parquet")
    (record,) = load_records(str(tmp_path / "trl.parquet"))
    assert record.question == "<image>What is <image> here?"
    assert [open_image(image, record.id).getpixel((0, 0)) for image in record.images] == [(255, 0, 0), (0, 0, 255)]


def test_trl_solution_without_a_final_answer_is_refused(tmp_path):
    """A derivation taken as the gold would make every response wrong, in silence."""
    row = {"prompt": [{"role": "user", "content": "Half of 4?"}], "solution": "We halve it.\nSo it is 2."}
    with pytest.raises(ValueError, match="add the final answer as `answer`"):
        load_records(jsonl(tmp_path / "x.jsonl", row))


@pytest.mark.parametrize("picture, inside", [
    ({"bytes": png(), "path": "a.png"}, True), ({"bytes": None, "path": "a.png"}, False),
    ("a.png", False), (png(), True),
], ids=["struct", "struct without bytes", "path", "bytes"])
def test_easyr1_pictures_as_struct_path_or_bytes(tmp_path, picture, inside):
    (tmp_path / "a.png").write_bytes(png())
    row = {"problem": "<image>Find x.", "answer": "3", "images": [picture]}
    (record,) = load_records(parquet(tmp_path / "easy.parquet", row))
    assert (record.question, record.answer) == ("<image>Find x.", "3")
    assert files(record) == ((png(),) if inside else (str(tmp_path / "a.png"),))


def test_multimodal_open_r1_gold_is_inside_the_answer_tag(tmp_path):
    row = {"image": {"bytes": png(), "path": None}, "problem": "Which?\nA. 1\nB. 2", "original_answer": "It is B",
           "solution": "<think>B, since</think>\n\n<answer>B</answer>"}
    (record,) = load_records(parquet(tmp_path / "open.parquet", row))
    assert (record.question, record.choices, record.answer, files(record)) == ("Which?", ("1", "2"), "B", (png(),))


def test_our_own_rows_in_full_and_with_the_two_keys_that_are_needed(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    full = {"id": "a", "question": "Q?", "answer": ["1", "one"], "images": ["a.png"], "choices": ["1", 2],
            "answer_type": "text", "source": "me", "precision": 2.0, "difficulty": 0.25, "complexity": 90, "stage": 3,
            "meta": {"level": 5}}
    record, least = load_records(jsonl(tmp_path / "own.jsonl", full, {"question": "1 + 1?", "answer": 2}))
    assert record == Record("a", "Q?", ("1", "one"), (str(tmp_path / "a.png"),), ("1", "2"), "text", "me", precision=2,
                            difficulty=0.25, complexity=90.0, stage=3, meta={"level": 5})
    assert isinstance(record.precision, int) and isinstance(record.complexity, float)
    assert least == Record("own-2", "1 + 1?", "2")
    assert [r.id for r in load_records(jsonl(tmp_path / "own.jsonl", plain(1, id=0)))] == ["0"]  # 0 is an id


def test_a_single_picture_may_stand_under_image(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (record,) = load_records(jsonl(tmp_path / "own.jsonl", plain(1, image="a.png")))
    assert record.images == (str(tmp_path / "a.png"),)


def test_vlmevalkit_table(tmp_path):
    """Pictures in base64 are longer than csv's 128 KiB, and a repeated one is the index of the row that holds it."""
    noise = io.BytesIO()
    Image.effect_noise((500, 500), 90).save(noise, format="PNG")
    code = base64.b64encode(noise.getvalue()).decode()
    assert len(code) > 131072
    two = str([code, base64.b64encode(png()).decode()])
    (tmp_path / "MMBench.tsv").write_text(
        "index\timage\tquestion\thint\tA\tB\tC\tanswer\tcategory\n"
        f'0\t{code}\t"Two\nlines?"\tLook.\tred\tblue\t\tB\tcolour\n'
        "1000000\t0\tAgain?\t\tred\tblue\tgreen\tC\t\n"
        f'2\t"{two}"\tHow many?\t\t\t\t\t2\tcount\n'
        "3\t\t1 + 1?\t\t\t\t\t2\t\n")
    first, again, both, bare = load_records(str(tmp_path / "MMBench.tsv"))
    assert first == Record("0", "Hint: Look.\nTwo\nlines?", "B", (noise.getvalue(),), ("red", "blue"),
                           first.answer_type, meta={"category": "colour"})
    assert again.id == "1000000" and again.images == first.images and again.choices == ("red", "blue", "green")
    assert both.images == (noise.getvalue(), png()) and both.choices == ()
    assert bare.images == ()
    (tmp_path / "MMBench.tsv").write_text("index\timage_path\tquestion\tanswer\n0\ta.png\tQ?\t1\n"
                                          "1\t['a.png', 'b.png']\tQ?\t1\n2\t[a.png, b c.png]\tQ?\t1\n")
    assert [[Path(p).name for p in r.images] for r in load_records(str(tmp_path / "MMBench.tsv"))] == [
        ["a.png"], ["a.png", "b.png"], ["a.png", "b c.png"]]


def test_options_beside_a_text_without_them_are_not_lost(tmp_path):
    """Rows of others: a letter is nothing without them, while an open question was asked without them."""
    for options in (["red", "blue "], {"A": "red", "B": "blue"}, "['red', 'blue']", ["(A) red", "(B) blue", None]):
        for question in ("Which? A. red B. blue", "Which?"):
            [record] = load_records(jsonl(tmp_path / "x.jsonl", {"problem": question, "answer": "(B)",
                                                                 "options": options}))
            assert (record.question, tuple(map(str.strip, record.choices))) == ("Which?", ("red", "blue"))
    [record] = load_records(jsonl(tmp_path / "x.jsonl", {"problem": "Find x.", "answer": "12", "choices": ["12", "7"]}))
    assert (record.answer, record.choices) == ("12", ())


def test_more_options_than_letters_are_refused():
    with pytest.raises(ValueError, match="27 choices"):
        Record("a", "?", "B", choices=tuple(map(str, range(27))))


def test_vlmevalkit_row_with_broken_base64_is_one_bad_record(tmp_path, capsys):
    (tmp_path / "x.tsv").write_text("index\timage\tquestion\tanswer\n0\t*\tQ?\t1\n1\t\tQ?\t1\n")
    assert [record.id for record in load_records(str(tmp_path / "x.tsv"), skip_bad=True)] == ["1"]
    assert "x.tsv, line 2: " in capsys.readouterr().err


def test_a_row_of_several_formats_is_read_in_the_published_order(tmp_path):
    """verl rows have a `prompt` too, lmm-r1 rows a `question`: the wrong reader would find no gold, or no picture."""
    chat = [{"role": "user", "content": "of the chat"}]
    rows = [{"message": json.dumps(chat), "question": "bare", "answer": "1"},
            {"prompt": chat, "problem": "bare", "reward_model": {"ground_truth": "2"}, "answer": "9"},
            {"prompt": chat, "problem": "bare", "solution": "3"}]
    records = load_records(jsonl(tmp_path / "x.jsonl", *rows))
    assert [(r.question, r.answer) for r in records] == [("of the chat", str(i)) for i in (1, 2, 3)]


# --- places ----------------------------------------------------------------------------------------------------------


def test_folder_reads_its_files_in_order_of_name_and_a_ladder_only_its_ladder(tmp_path):
    jsonl(tmp_path / "b.jsonl", plain(2))
    (tmp_path / "a.json").write_text(json.dumps([plain(1)]))
    (tmp_path / "README.md").write_text("not data")
    assert [record.id for record in load_records(str(tmp_path))] == ["q1", "q2"]
    parquet(tmp_path / "ladder.parquet", plain(3))
    assert [record.id for record in load_records(str(tmp_path))] == ["q3"]


def test_hub_id_with_split(tmp_path, monkeypatch):
    """Rows come undecoded, pictures stay in the hub's cache: as bytes in records, 40 GB of them would not fit."""
    asked = []
    features = datasets.Features(problem=datasets.Value("string"), answer=datasets.Value("string"),
                                 images=[datasets.Image()])
    rows = [{"problem": f"<image>{i}?", "answer": str(i), "images": [{"bytes": png((i, 0, 0)), "path": "x.png"}]}
            for i in range(150)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "x.parquet")
    data = datasets.load_dataset("parquet", data_files=str(tmp_path / "x.parquet"), split="train",
                                 cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or data)
    records = load_records("hiyouga/geometry3k@train", limit=140)
    assert asked == [("hiyouga/geometry3k", "train")]
    assert all(isinstance(record.images[0], Picture) for record in records)
    assert [(r.id, r.question, files(r)) for r in records[::139]] == [
        ("geometry3k@train-1", "<image>0?", (png((0, 0, 0)),)),
        ("geometry3k@train-140", "<image>139?", (png((139, 0, 0)),))]


def test_hub_trouble_names_the_id(monkeypatch):
    def offline(name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="org/name@train: neither a file, nor .* hub: no network"):
        load_records("org/name@train")


def test_limit_stops_reading_before_later_faults(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", plain(1), plain(2), "{broken")
    assert [record.id for record in load_records(path, limit=2)] == ["q1", "q2"]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_image_marks_must_equal_pictures(tmp_path):
    """A mark too few or too many would shift every later picture to another place, or crash the model mid-run."""
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"problem": "<image><image> Same?", "answer": "1", "images": ["a.png"]},
            {"problem": "<image> Same?", "answer": "1"},
            {"problem": "<image> Same?", "answer": "1", "images": ["a.png", "a.png"]},
            plain(3, answer="A", choices=["<image>", "<image>"], images=["a.png"])]  # options may be pictures
    with pytest.raises(ValueError) as error:
        load_records(jsonl(tmp_path / "x.jsonl", *rows))
    for line, marks, pictures in ((1, 2, 1), (2, 1, 0), (3, 1, 2), (4, 2, 1)):
        assert f"line {line}: {marks} <image> marks for {pictures} pictures" in str(error.value)


def test_numbered_image_marks_of_mathvision_are_text(tmp_path):
    """MathVision names <image1>..<image7> and has ONE merged picture."""
    (tmp_path / "a.png").write_bytes(png())
    row = plain(1, question="Which of <image1> to <image7>?\n<image 2>", images=["a.png"])
    (record,) = load_records(jsonl(tmp_path / "x.jsonl", row))
    assert record.question == "Which of <image1> to <image7>?\n<image 2>" and len(record.images) == 1


@pytest.mark.parametrize("how", ["..", "absolute", "file:", "symlink", "sibling"])
def test_pictures_outside_the_folder_are_refused(tmp_path, how):
    """A data set of others must not make us open any file of this machine."""
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "data-private").mkdir()  # its path begins as the folder's does
    for secret in (tmp_path / "secret.png", tmp_path / "data-private/secret.png"):
        secret.write_bytes(png())
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    path = {"..": "../secret.png", "absolute": str(tmp_path / "secret.png"), "file:": f"file://{tmp_path}/secret.png",
            "symlink": "link.png", "sibling": "../data-private/secret.png"}[how]
    with pytest.raises(ValueError, match="is outside .*data; name its folder with .*--images"):
        load_records(jsonl(data / "x.jsonl", plain(1, images=[path])))


def test_absolute_and_dotted_paths_inside_the_folder_are_fine(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    row = plain(1, images=[str(tmp_path / "a.png"), "./b/../a.png"])
    (record,) = load_records(jsonl(tmp_path / "x.jsonl", row))
    assert record.images == (str(tmp_path / "a.png"),) * 2


def test_pictures_on_the_web_are_not_fetched(tmp_path):
    with pytest.raises(ValueError, match="is on the web; download it"):
        load_records(jsonl(tmp_path / "x.jsonl", plain(1, image="https://example.com/a.png")))


def test_all_bad_records_are_told_at_once_with_their_lines(tmp_path):
    rows = ["{broken", plain(1), "", {"text": "Q?", "gold": 1}, plain(1), plain(2, question=" "), "[1]",
            plain(3, options=["1"]), plain(4, answer=None), plain(5, stage="low"), plain(6, precision=2.5)]
    path = jsonl(tmp_path / "x.jsonl", *rows)
    with pytest.raises(ValueError) as error:
        load_records(path)
    told = str(error.value)
    assert told.startswith(f"{path}: 9 of 10 records cannot be used:") and told.endswith("or pass --skip-bad")
    for line, what in ((1, "Expecting property name"), (4, "the keys 'text', 'gold' are of no known format"),
                       (5, "the id 'q1' is taken"), (6, "its question is empty"), (7, "not a list"),
                       (8, "its answer '4' names none of the options"), (9, "it has no answer"),
                       (10, "'low'"), (11, "its precision is 2.5")):
        assert f"{path}, line {line}: " in told and what in told.split(f"line {line}: ")[1].split("\n")[0]
    assert "`problem` (EasyR1" in told  # the formats known


def test_only_ten_bad_records_are_listed(tmp_path):
    with pytest.raises(ValueError) as error:
        load_records(jsonl(tmp_path / "x.jsonl", *["{"] * 13))
    assert "13 of 13 records" in str(error.value) and "line 10: " in str(error.value)
    assert "line 11: " not in str(error.value) and "and 3 more" in str(error.value)


def test_skip_bad_keeps_the_good_and_prints_what_it_drops(tmp_path, capsys):
    path = jsonl(tmp_path / "x.jsonl", plain(1), "{broken", plain(1), plain(2))
    assert [record.id for record in load_records(path, skip_bad=True)] == ["q1", "q2"]
    told = capsys.readouterr().err
    assert f"dropped: {path}, line 2: " in told and f"dropped: {path}, line 3: " in told
    assert f"{path}: 2 of 4 records cannot be used and were dropped" in told


def test_skip_bad_does_not_return_nothing(tmp_path):
    with pytest.raises(ValueError, match="1 of 1 records"):
        load_records(jsonl(tmp_path / "x.jsonl", "{broken"), skip_bad=True)


def test_empty_gold_and_lone_surrogate_are_bad_records(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", plain(1, answer=" "), plain(2, question="\ud83d?"), plain(3, answer=[]))
    with pytest.raises(ValueError) as error:
        load_records(path)
    assert "3 of 3" in str(error.value) and "line 2: 'utf-8' codec can't encode" in str(error.value)


@pytest.mark.parametrize("row", [{"message": [{"role": "user"}], "answer": "1"}, {"conversations": "Q?"},
                                 {"reward_model": {"style": "rule"}, "prompt": "Q?"},
                                 {"prompt": [{"role": "user", "content": [{"text": "no type"}]}], "answer": "1"}])
def test_a_row_unlike_its_format_is_told_and_no_crash(tmp_path, row):
    with pytest.raises(ValueError, match="line 1: (it is not as .* writes|Expecting value)"):
        load_records(jsonl(tmp_path / "x.jsonl", row))


@pytest.mark.parametrize("name, content, told", [
    ("x.jsonl", None, "no such file"), ("x.jsonl", b"", "the file is empty"), ("x.jsonl", b"\n\n", "holds no records"),
    ("x.json", b"[]", "holds no records"), ("x.json", b'{"question": "Q?"}', "holds one object"),
    ("x.json", b'[{"question": 1}]\n[]', "Extra data: line 2"),
    ("x.parquet", b"version https://git-lfs.github.com/spec/v1\n", "cannot be read: Parquet magic bytes not found"),
    ("x.parquet", b"", "the file is empty"), ("x.txt", b"question,answer\n", "not .parquet, .jsonl, .json, .csv, .tsv"),
    ("x.tsv", b"question\tgold\nQ?\t1\n", "line 2: it has no answer"), ("x.xlsx", b"PK", "pandas.read_excel(")])
def test_files_that_are_not_what_they_say_are_named(tmp_path, name, content, told):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_records(str(path))
    assert str(path) in str(error.value) and told in str(error.value)


def test_truncated_parquet_is_an_error_even_when_bad_records_may_be_skipped(tmp_path):
    """--skip-bad on a half-copied file must not train on the half in silence."""
    path = tmp_path / "x.parquet"
    save_records(str(path), [Record("a", "Q?", "1", images=(png(),))])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="x.parquet: cannot be read"):
        load_records(str(path), skip_bad=True)


def test_folder_without_data(tmp_path):
    with pytest.raises(ValueError, match="no .parquet, .jsonl, .json, .csv, .tsv in this folder"):
        load_records(str(tmp_path))


# --- Parquet of our own ----------------------------------------------------------------------------------------------


def test_saved_records_come_back_equal(tmp_path):
    (tmp_path / "a.png").write_bytes(png("blue"))
    records = [
        Record("a", "<image>Which of <image>?", "B", (png(), str(tmp_path / "a.png")), ("é", "2"), "choice", "me", 2,
               1 / 3, 123.4, 8, {"level": [1, None, "ü"]}),
        Record("b", "1 + 1?", ("2", "two"), answer_type="text"),
        *(Record(str(i), f"{i}?", str(i)) for i in range(130)),  # more than two row groups
    ]
    path = str(tmp_path / "new/x.parquet")
    save_records(path, records)
    loaded = load_records(path)
    assert files(loaded[0]) == (png(), png("blue"))
    assert [vars(r) | {"images": ()} for r in loaded] == [vars(r) | {"images": ()} for r in records]
    assert [p.name for p in Path(path).parent.iterdir()] == ["x.parquet"]  # nothing temporary is left behind
    save_records(str(tmp_path / "again.parquet"), loaded)
    again = load_records(str(tmp_path / "again.parquet"))
    assert [vars(r) | {"images": files(r)} for r in again] == [vars(r) | {"images": files(r)} for r in loaded]


def test_datasets_shows_the_pictures_of_a_saved_file(tmp_path):
    path = str(tmp_path / "x.parquet")
    clear = Image.new("RGBA", (4, 2), (9, 9, 9, 0))
    save_records(path, [Record("a", "<image>?", ("1", "one"), (clear,), meta={"k": 1}), Record("b", "?", "2")])
    data = datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
    assert data.features["images"] == datasets.List(datasets.Image())
    (image,) = data[0]["images"]
    assert (image.size, image.mode, image.getpixel((0, 0))) == ((4, 2), "RGB", (255, 255, 255))  # transparent: white
    assert (data[0]["answer"], data[0]["answers"], json.loads(data[0]["meta"])) == ("1", ["1", "one"], {"k": 1})
    assert (data[1]["answer"], data[1]["answers"], data[1]["images"]) == ("2", None, [])


def test_failed_save_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.parquet"
    save_records(str(path), [Record("a", "?", "1")])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="record b: cannot read its picture"):
        save_records(str(path), [Record("a", "?", "1"), Record("b", "?", "1", images=(str(tmp_path / "gone.png"),))])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("picture, told", [
    (png(size=(64, 64))[:-40], "truncated"),  # its header still opens
    ("gone.png", "No such file"),
    (b"GIF, or not", "cannot identify"),
    (png_header(12_000, 12_000), "over 100 megapixels"),
    (png_header(60_000, 60_000), "decompression bomb"),
    (png(size=(2010, 10)), "thinner than 1:200"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),  # Pillow would run Ghostscript on it
    (encoded(Image.new("F", (2, 2), .5), "TIFF"), "of mode F, whose range nobody knows"),
], ids=["truncated", "missing", "no picture", "large", "bomb", "thin", "program", "float"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unusable_pictures_are_found_before_training_and_named(processor, picture, told, capsys):
    good, bad = Record("good", "?", "1", images=(png(),)), Record("bad", "?", "1", images=(png(), picture))
    with pytest.raises(ValueError) as error:
        check_records(processor, [good, bad, good], "observe")
    assert "1 of 3 records" in str(error.value) and "record bad: cannot use its picture: " in str(error.value)
    assert told in str(error.value)
    assert check_records(processor, [good, bad, good], "observe", skip_bad=True) == [good, good]
    assert "dropped: record bad" in capsys.readouterr().err


def test_golds_that_math_verify_cannot_read_are_found_with_the_pictures(processor, capsys):
    good, bad = Record("good", "?", "$x^2$"), Record("bad", "?", "\\frac{1}{")
    with pytest.raises(ValueError, match="1 of 2 records cannot be used:\n  record bad: math-verify cannot read"):
        check_records(processor, [bad, good], "observe")
    assert check_records(processor, [bad, good], "observe", skip_bad=True) == [good]
    assert "dropped: record bad: math-verify" in capsys.readouterr().err


def test_picture_of_200_to_1_is_still_usable(processor):
    record = Record("a", "?", "1", images=(png(size=(2000, 10)),))
    assert check_records(processor, [record], "observe") == [record]


@pytest.mark.parametrize("mode, color, shown", [
    ("RGBA", (255, 0, 0, 0), (255, 255, 255)), ("RGBA", (0, 0, 0, 255), (0, 0, 0)), ("LA", (0, 0), (255, 255, 255)),
    ("L", 7, (7, 7, 7)), ("CMYK", (0, 0, 0, 0), (255, 255, 255))])
def test_every_mode_becomes_rgb_and_transparency_white(mode, color, shown):
    """A transparent diagram on black, Pillow's own choice, is black on black."""
    image = open_image(Image.new(mode, (2, 2), color), "a")
    assert (image.mode, image.getpixel((1, 1))) == ("RGB", shown)


def test_sixteen_bits_are_scaled_and_not_cut():
    """Pillow's own conversion cuts at 255, and nearly all of a picture is white."""
    ramp = Image.fromarray(np.array([[0, 0x4000, 0x8000, 0xffff]], np.uint16))
    assert np.asarray(open_image(encoded(ramp, "PNG"), "a"))[0, :, 0].tolist() == [0, 64, 128, 255]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_photograph_stands_as_the_camera_was_held():
    """TRL and EasyR1 turn it, from the very same file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif), "a").size == (20, 40)
    ramp = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        stored = Image.open(io.BytesIO(encoded(ramp, "PNG", exif=exif)))
        assert open_image(stored, "a").tobytes() == ImageOps.exif_transpose(stored).convert("RGB").tobytes()
    broken = encoded(ramp, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert open_image(broken, "a").size == (4, 3), "a broken note beside a picture is no reason to lose it"


def test_palette_with_a_transparent_colour_becomes_white():
    buffer = io.BytesIO()
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(buffer, format="PNG", transparency=1)
    assert open_image(buffer.getvalue(), "a").getpixel((0, 0)) == (255, 255, 255)
