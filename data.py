"""What a problem is: the record, where records come from, and what the model is fed.

    Record         one problem: question, pictures, gold answer, and what was measured of it
    load_records   every file format people bring, told apart by the keys of a row
    PROMPTS        the three system prompts: answer only, think, observe
    Processor      tokenizer and image processor of a checkpoint: Record -> Prompt -> a padded batch

Shapes: B rows, T tokens, I pictures, N vision patches, D values of a patch.
"""
from __future__ import annotations

import base64
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

# System prompts. The paper's own wording was never released; what is known is the order of the tags (method.md, 1).
PROMPTS: dict[str, str] = {
    "none": "Answer the question about the image. Write only the final answer, inside <answer> </answer>.",
    "think": "Answer the question about the image. First reason step by step inside <think> </think>, "
             "then write only the final answer inside <answer> </answer>.",
    "observe": "Answer the question about the image. First describe what you see inside <observe> </observe>, "
               "then reason step by step inside <think> </think>, "
               "then write only the final answer inside <answer> </answer>.",
}


@dataclass(frozen=True)
class Record:
    """One problem. Every reader makes these; everything else takes them."""

    id: str  # unique within a file
    question: str  # `<image>` marks where a picture stands; without marks the pictures come first
    answer: str | tuple[str, ...]  # a tuple: any of these is right
    images: tuple = ()  # PIL images, or paths / bytes opened on use
    choices: tuple[str, ...] = ()  # texts of the options, in the order A, B, C, ...
    answer_type: str = ""  # choice | number | list | text | math; inferred when empty
    source: str = ""
    precision: int | None = None  # decimals to which a number is compared
    difficulty: float | None = None  # 1 - pass rate over the measuring rollouts, in [0, 1]
    complexity: float | None = None  # mean response length of these rollouts, in tokens
    stage: int | None = None  # rung of the ladder, 0 (easiest) to 8
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        """Settle the answer type; ValueError naming the record for a gold that no rule can read (math: check_golds)."""

        def fail(why: str):
            raise ValueError(f"record {self.id}: {why}")

        several = isinstance(self.answer, (list, tuple))
        golds = tuple("" if gold is None else str(gold) for gold in (self.answer if several else [self.answer]))
        if not golds or not all(plain(gold) for gold in golds):
            fail(f"its answer is empty: {self.answer!r}")
        choices = tuple(str(choice) for choice in self.choices)
        kind = self.answer_type or infer_answer_type(golds, choices)
        if kind not in ANSWER_TYPES:
            fail(f"answer type {kind!r} is none of {', '.join(ANSWER_TYPES)}")
        for gold in golds:
            if kind == "choice" and option_index(gold, choices) is None:
                fail(f"its answer {gold[:80]!r} names none of the options {list(choices) or LETTERS}")
            if kind == "number" and parse_number(gold) is None:
                fail(f"its answer {gold[:80]!r} is no number")
            if kind == "list" and parse_items(gold) is None:
                fail(f"its answer {gold[:80]!r} is no list, tuple or ratio")
            if kind == "text" and not normal_text(gold):
                fail(f"its answer {gold[:80]!r} holds nothing but punctuation")
            if kind != "choice" and len(gold) > MAX_ANSWER:
                fail(f"its answer is {len(gold)} characters long; no rule can judge more than {MAX_ANSWER}")
        settled = {"answer": golds if several else golds[0], "choices": choices, "images": tuple(self.images),
                   "answer_type": kind}
        for name, value in settled.items():
            object.__setattr__(self, name, value)  # the record is frozen

    @property
    def text(self) -> str:
        """The question, and its options with their letters, as the model reads them."""
        options = [f"({letter}) {text}" for letter, text in zip(ascii_uppercase, self.choices)]
        return "\n".join([self.question, *options])

    @property
    def golds(self) -> tuple[str, ...]:
        """All accepted answers."""
        return self.answer if isinstance(self.answer, tuple) else (self.answer,)


# --- golds -----------------------------------------------------------------------------------------------------------

ANSWER_TYPES = ("choice", "number", "list", "text", "math")
MAX_ANSWER = 1000  # characters; a longer answer is wrong unread
LETTERS = "ABCDEFGHIJ"  # what a choice may be when its options stand in the question or in the picture

SPELLINGS = [(re.compile(pattern), plain_form) for pattern, plain_form in (  # LaTeX and unicode -> plain text, in order
    (r"[−–—]", "-"), (r"[\u00a0\u2009\u202f~]|\\quad|\\ ", " "), (r"\\(?:left|right|displaystyle|[,;:!])", ""),
    ("，", ","), ("[：∶]|\\\\colon", ":"), ("（", "("), ("）", ")"), ("％", "%"), (r"\{,\}", ","),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\{degrees?\}|[º˚]", "°"),
    (r"\\(?:text|mathrm|textbf|mathbf|textrm|textit|mbox)\s*\{([^{}]*)\}", r" \1"),
    (r"\\[dtc]?frac\s*\{\s*(-?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}", r" \1/\2"),
    (r"\\[dtc]?frac\s*(\d)\s*(\d)", r" \1/\2"),
    (r"(\d)\s*(?:\\times|\\cdot|[×·*])\s*10\s*\^\s*\{?\s*([+-]?\d+)\s*\}?", r"\1e\2"),
    (r"\\([%$&#_])", r"\1"), (r"\s+", " "))]
WRAPPERS = (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}"), (r"\text{", "}"), ("**", "**"), ("`", "`"))

# What may follow a number. SYMBOLS contradict each other (12 m is not 12 cm); NOT_UNITS change the number's value.
SYMBOLS = frozenset("mm cm dm m km mg g kg ml l s h °".split())
UNITS = SYMBOLS | frozenset("""% $ € £ ¥ in ft yd mi t lb oz ms min hr n j w v a k c f °c °f pa kpa hz mol rad ω kj kw
    degree degrees percent unit units square cubic sq per cent cents dollar dollars inch inches foot feet mile miles
    yard yards meter meters metre metres millimeters centimeter centimeters centimetres kilometer kilometers gram grams
    kilogram kilograms liter liters litres second seconds minute minutes hour hours day days week weeks month months
    year years""".split())
NOT_UNITS = frozenset("""and but not nor than plus minus times over root squared cubed hundred thousand million billion
    trillion dozen half halves third thirds quarter quarters fourths fifth fifths tenth tenths""".split())
DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
NUMBER = re.compile(rf"""([+-]?)\s*[$€£¥]?\s*
    (?:(?:([0-9]+)\s+)?({DECIMAL})\s*/\s*({DECIMAL})                                    # 7/3, 2 1/3
      |((?:[0-9]{{1,3}}(?:,[0-9]{{3}})+(?:\.[0-9]*)?|{DECIMAL})(?:e[+-]?[0-9]{{1,3}})?))  # 1,234.5 or 4.9e-8
    (\s*)([%°$€£¥a-zµμω][a-zµμω°²³0-9\s./·^{{}}-]*)?""", re.IGNORECASE | re.VERBOSE)
# Signs that a gold needs math-verify: operators, half-open intervals, a letter times or minus something, functions.
MATH = re.compile(r"[\\$^_=+*<>{}\[\]|√π∞≤≥×÷²³]|\d!|\d[a-zA-Z]\b|\b[a-z]\s*-\s*(?:\d|[a-z]\b)|\d\s*-\s*[a-z]\b|"
                  r"\b[a-z]\(|\b(?:pi|sqrt|sin|cos|tan|log|ln)\b")


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...}, its braces balanced; None without one."""
    _, box, tail = text.rpartition(r"\boxed{")
    depth = list(itertools.accumulate({"{": 1, "}": -1}.get(char, 0) for char in tail))
    return tail[:depth.index(-1)] if box and -1 in depth else None  # -1: where the box's own brace closes


def unwrap(text: str) -> str:
    """A short answer without white space, math delimiters, \\boxed{}, markdown and full stop around it."""
    text = text.replace("\x0c", "\\f")  # MathVision has a `\frac` whose `\f` became a form feed
    for _ in range(5):  # deep enough for `**$\boxed{\text{B}}$.**`
        text = text.strip().rstrip(".。,;").rstrip()
        for left, right in WRAPPERS:
            inner = text[len(left):len(text) - len(right)]
            whole = text.startswith(left) and text.endswith(right) and inner
            if whole and left not in inner and inner.count("{") == inner.count("}"):
                text = inner
    return text


def plain(text: str) -> str:
    """A short answer without the LaTeX, markdown and unicode it may be dressed in: `$\\frac{1}{2}$` -> `1/2`."""
    text = unwrap(text)
    for pattern, plain_form in SPELLINGS:
        text = pattern.sub(plain_form, text)
    return text.strip()


def normal_text(text: str) -> str:
    """What two texts are compared by: no case, no punctuation around, no article."""
    return re.sub(r"^(?:an?|the) ", "", plain(text).casefold().strip(" .,;:!?\"'"))


def split_number(text: str, known_units: bool = True) -> tuple[float, str] | None:
    """`$1,234.5 cm^2$` -> (1234.5, "cm"); None where the text is anything but one number and perhaps its unit.

    known_units: the unit is one of UNITS, else any words of a noun's length ("3 red cars").
    """
    text = plain(text)
    match = NUMBER.fullmatch(text[1:-1] if text[:1] + text[-1:] == "()" and "," not in text else text)
    if not match:
        return None
    sign, whole, top, bottom, digits, space, unit = match.groups()
    unit = re.sub(r"(?<=[a-zµμω])(?:\^?\{?-?[1-3]\}?|[²³])(?![0-9])", "", (unit or "").lower())
    words = re.split(r"[\s/·.-]+", unit.strip(" .")) if unit else []
    for word in words:
        noun = space and len(word) > 2 and word.isalpha() and word not in NOT_UNITS
        if word not in UNITS and (known_units or not noun):
            return None
    if top:
        value = float(whole or 0) + float(top) / float(bottom) if float(bottom) else float("inf")
    else:
        value = float(digits.replace(",", ""))
    unit = "%" if words and words[0] in ("%", "percent") else " ".join(words)
    return (-value if sign == "-" else value, unit) if np.isfinite(value) else None


def parse_number(text: str) -> float | None:
    """The number that a text is: `-.5`, `- 3`, `1,234`, `4.9e-8`, `7/3`, `145°`, `12 cm`, `50%` (as 50); else None."""
    number = split_number(text, known_units=False)
    return number and number[0]


def parse_items(text: str) -> tuple[str, tuple[str, ...]] | None:
    """`[2013, 2014]`, `(1, 2)`, `1, 2`, `1:2` -> its mark (the bracket, "" or ":") and its items; else None."""
    text = plain(text)
    if ":" in text:
        items = tuple(item.strip() for item in text.split(":"))
        return (":", items) if all(split_number(item) for item in items) else None
    mark = text[0] if text[:1] + text[-1:] in ("[]", "()") else ""
    inner = re.sub(r",?\s+and\s+", ", ", text[1:-1] if mark else text)
    items = tuple(item.strip(" '\"") for item in inner.split(","))
    listed = all(items) and not re.search(r"[\[\](){}]", inner) and (len(items) > 1 or mark == "[")
    return (mark, items) if listed else None


def option_index(text: str, choices: tuple[str, ...]) -> int | None:
    """Which option a text names, by its letter alone, `(B)` or `B.`, or by its whole text."""
    letters = ascii_uppercase[:len(choices)] or LETTERS
    letter = re.fullmatch(r"[(\[]*([A-Za-z])[)\].:,!]*", plain(text))
    if letter and letter[1] in letters:
        return letters.index(letter[1])
    same = [i for i, choice in enumerate(choices) if normal_text(choice) == normal_text(text)]
    if same:
        return same[0]
    return letters.index(letter[1].upper()) if letter and letter[1].upper() in letters else None


def infer_answer_type(golds: tuple[str, ...], choices: tuple[str, ...]) -> str:
    """The answer type of all accepted answers together; text takes in mixtures such as 12 and twelve."""
    if choices:
        return "choice"
    kinds = set()
    for gold in golds:
        items = parse_items(gold)
        if re.fullmatch(r"[(\[]*[A-J][)\].:]*", plain(gold)):
            kinds.add("choice")  # its options stand in the question (SceMQA, MathVerse) or in the picture
        elif split_number(gold):
            kinds.add("number")
        elif items and all(split_number(item) or items[0] == "[" and not MATH.search(item) for item in items[1]):
            kinds.add("list")
        else:
            kinds.add("math" if MATH.search(plain(gold)) else "text")
    return kinds.pop() if len(kinds) == 1 else "math" if "math" in kinds else "text"

# --- readers ---------------------------------------------------------------------------------------------------------

FORMATS: dict[str, str] = {  # the key that tells a row's format, looked for in this order, and who writes such rows
    "message": "lmm-r1", "conversations": "LLaVA, VLM-R1", "reward_model": "verl", "prompt": "TRL",
    "problem": "EasyR1, multimodal-open-r1", "question": "ours, the fields of Record",
}
BATCH = 64  # rows in memory at once, and in a row group when written: with pictures far below Arrow's limit of 2 GiB


def load_records(path_or_id: str, limit: int | None = None, skip_bad: bool = False) -> list[Record]:
    """The problems of a file, of a folder, or of a hub id with its split (`org/name@train`), at most `limit` of them.

    Files: .jsonl, .json (a list of rows), .parquet, .tsv (VLMEvalKit's); a folder: its ladder.parquet, else all its
    .parquet, .jsonl and .json. Pictures lie in the file or beside it: paths start at its folder and may not leave it.
    They are not opened here; check_prompts does that.
    Raises ValueError: for a file that cannot be read; or one for all records that cannot be used, naming file, record
    and remedy. skip_bad drops such records instead, and prints them.
    """
    good: dict[str, Record] = {}
    bad: list[str] = []
    for name, folder, rows in _tables(path_or_id):
        unit = "line" if name.endswith(".jsonl") else "record"
        try:
            for number, row in rows:
                if limit is not None and len(good) >= limit:
                    break
                try:
                    record = _record(row, folder, f"{Path(name).stem}-{number}")
                    if record.id in good:
                        raise ValueError(f"the id {record.id!r} is taken; give every record its own id, or none an id")
                    good[record.id] = record
                except ValueError as error:
                    bad.append(f"{name}, {unit} {number}: {error}")
        except (OSError, ValueError, csv.Error, pa.ArrowException) as error:  # not of a record but of the whole file
            raise ValueError(f"{name}: cannot be read: {error}; was it copied whole? is its suffix right?") from error
    if not good and not bad:
        raise ValueError(f"{path_or_id}: holds no records")
    return settle(path_or_id, list(good.values()), bad, skip_bad)


def check_prompts(processor: Processor, records: list[Record], style: str, max_tokens: int | None = None,
                  skip_bad: bool = False) -> list[Record]:
    """Encode every record once, as training will (nothing less finds a truncated picture) -> the records that can be.

    Raises one ValueError for all the others; skip_bad drops and prints them instead.
    """
    def fault(record: Record) -> str | None:
        try:
            processor.encode(record, style, max_tokens)
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the GIL
        faults = list(pool.map(fault, records))
    good = [record for record, found in zip(records, faults, strict=True) if not found]
    return settle("prompts", good, [found for found in faults if found], skip_bad)


def save_records(path: str, records: list[Record]) -> None:
    """Write a Parquet file with the pictures inside, one column to a field of Record; whole or not at all.

    `answer` is the first accepted answer and `answers` all, where there are several; `meta` is JSON; `images` is a
    column of pictures to `datasets`, and so to TRL and EasyR1. PIL images are written as PNG, as open_image shows them.
    """
    import datasets

    text, integer, real = (datasets.Value(name) for name in ("string", "int64", "float64"))
    schema = datasets.Features({
        "id": text, "question": text, "answer": text, "answers": [text], "images": [datasets.Image()],
        "choices": [text], "answer_type": text, "source": text, "precision": integer, "difficulty": real,
        "complexity": real, "stage": integer, "meta": text}).arrow_schema
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with pq.ParquetWriter(part, schema) as writer:
            for start in range(0, len(records), BATCH):
                rows = [_row(record) for record in records[start : start + BATCH]]
                writer.write_table(pa.Table.from_pylist(rows, schema))
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def settle(name: str, good: list[Record], bad: list[str], skip_bad: bool) -> list[Record]:
    """The good records, unless there are bad ones that may not be skipped: one ValueError for these."""
    count = f"{name}: {len(bad)} of {len(good) + len(bad)} records cannot be used"
    if bad and not (skip_bad and good):
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ValueError(f"{count}:\n  " + "\n  ".join(bad[:10]) + more + "\nmend or remove them, or pass --skip-bad")
    if bad:
        print(*(f"dropped: {line}" for line in bad), f"{count} and were dropped", sep="\n", file=sys.stderr)
    return good


def _tables(path_or_id: str) -> Iterator[tuple[str, Path, Iterator]]:
    """-> name, folder that its pictures may lie in, and (number, row) from 1 on, of each file or hub data set."""
    path = Path(path_or_id)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".parquet", ".jsonl", ".json"))
        files = [file for file in files if file.name == "ladder.parquet"] or files
        if not files:
            raise ValueError(f"{path}: no .parquet, .jsonl or .json in this folder; give the one that holds them")
    elif path.exists():
        files = [path]
    elif re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*@\w+", path_or_id):
        import datasets

        name, split = path_or_id.split("@")
        try:
            table = datasets.load_dataset(name, split=split).with_format("arrow")  # arrow: pictures stay undecoded
        except Exception as error:  # of a dozen classes: no network, no such id or split, a gated one, a script
            raise ValueError(f"{path_or_id}: neither a file, nor could it be loaded from the hub: {error}") from error
        rows = (row for batch in table.iter(batch_size=BATCH) for row in batch.to_pylist())
        yield path_or_id, Path(datasets.config.HF_CACHE_HOME), enumerate(rows, 1)
        return
    else:
        raise ValueError(f"{path}: no such file or folder (a hub id needs its split: org/name@train)")
    for file in files:
        yield str(file), file.parent, _rows(file)


def _rows(file: Path) -> Iterator[tuple[int, dict | bytes]]:
    """Numbered rows of one file. Lines of JSON stay bytes: a broken one is then a bad record, not a bad file."""
    if not file.stat().st_size:
        raise ValueError("the file is empty")
    if file.suffix == ".jsonl":
        with open(file, "rb") as lines:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    elif file.suffix == ".json":
        rows = json.loads(file.read_bytes())
        if not isinstance(rows, list):
            raise ValueError("it holds one object, where a list of rows is needed")
        yield from enumerate(rows, 1)
    elif file.suffix == ".parquet":
        with pq.ParquetFile(file) as table:
            yield from enumerate((row for batch in table.iter_batches(BATCH) for row in batch.to_pylist()), 1)
    elif file.suffix == ".tsv":
        yield from enumerate(_tsv_rows(file), 1)
    else:
        raise ValueError("it is not .jsonl, .json, .parquet or .tsv")


def _tsv_rows(file: Path) -> Iterator[dict]:
    """VLMEvalKit's table: index, image (base64), question, A, B, ..., answer, and more -> rows of our own format."""
    csv.field_size_limit(2**31 - 1)  # pictures are longer than csv's 128 KiB
    pictures: dict[str, str] = {}
    with open(file, newline="", encoding="utf-8-sig") as lines:
        table = csv.DictReader(lines, delimiter="\t")
        if missing := {"index", "question", "answer"} - set(table.fieldnames or ()):
            raise ValueError(f"it has no column {', '.join(sorted(missing))}, which VLMEvalKit's tables have")
        for row in table:
            image = row.pop("image", None) or ""
            index = row.pop("index")
            image = pictures[index] = pictures.get(image, image)  # the index of an earlier row stands for its picture
            images = ["data:;base64," + item.strip(" '\"") for item in image.strip("[]").split(",")] if image else []
            options = [row.pop(letter, None) or "" for letter in ascii_uppercase]
            while options and not options[-1]:
                options.pop()
            hint = row.pop("hint", None)
            question = f"Hint: {hint}\n{row.pop('question')}" if hint else row.pop("question")
            yield {"id": index, "question": question, "answer": row.pop("answer"), "images": images, "choices": options,
                   "meta": {key: value for key, value in row.items() if key and value}}


def _record(row: dict | bytes, folder: Path, made_id: str) -> Record:
    """One row of any format -> Record. Raises ValueError that says what is wrong with it; the caller adds where."""
    if isinstance(row, bytes):
        row = json.loads(row)
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with keys, not a {type(row).__name__}")
    kind = next((key for key in FORMATS if key in row), None)
    if kind is None:
        known = ", ".join(f"`{key}` ({writer})" for key, writer in FORMATS.items())
        raise ValueError(f"the keys {', '.join(map(repr, row))} are of no known format; each has its own key: {known}")
    row = {key: value for key, value in row.items() if value is not None}  # a null of Parquet is a key left out
    try:
        fields = _own_fields(row) if kind == "question" else _foreign_fields(row, kind)
        fields["images"] = _pictures(fields.get("images") or row.get("images", row.get("image")), folder)
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"it is not as {FORMATS[kind]} writes `{kind}`: {error!r}") from error
    question = fields.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("its question is empty")
    question.encode()  # a lone surrogate, half of a cut emoji, would fail much later: in the tokenizer
    record = Record(id=str(row.get("id", "")) or made_id, **fields)
    marks = "".join((question, *record.choices)).count("<image>")
    if marks and marks != len(record.images):
        raise ValueError(f"{marks} <image> marks for {len(record.images)} pictures; write a mark for each, or none")
    return record


def _own_fields(row: dict) -> dict:
    """A row of our own format -> fields of Record but its id; pictures as they stand in the row."""
    names = [f.name for f in dataclasses.fields(Record)]
    if unknown := row.keys() - {*names, "image", "answers"}:  # a dropped `options` would leave a question without them
        raise ValueError(f"{', '.join(sorted(unknown))}: no fields of a record ({', '.join(names)}); rename them, "
                         "or move them into `meta`")
    fields = {name: row[name] for name in names[1:] if name in row}
    fields["answer"] = row.get("answers", row.get("answer"))
    if isinstance(row.get("choices"), str):
        raise ValueError("its choices are one text; write a list of texts")
    meta = row.get("meta", {})
    fields["meta"] = dict(json.loads(meta) if isinstance(meta, str) else meta)
    for name, kind in (("precision", int), ("difficulty", float), ("complexity", float), ("stage", int)):
        if name in fields:
            fields[name] = kind(value := fields[name])  # 2.0, as pandas writes an int beside a null, is 2
            if fields[name] != value:
                raise ValueError(f"its {name} is {value!r}, where a number of type {kind.__name__} is needed")
    return fields


def _foreign_fields(row: dict, kind: str) -> dict:
    """A row of another project's format -> question, answer, source; images only when its chat holds them."""
    images, gold = [], row.get("answer", row.get("solution"))
    if kind == "conversations":
        turns = [turn for turn in row[kind] if turn["from"] != "system"]
        if [turn["from"] for turn in turns] != ["human", "gpt"]:
            raise ValueError(f"its conversation has {len(turns)} turns; only one question and its answer can be used")
        question, gold = turns[0]["value"], turns[1]["value"]
    elif kind == "problem":
        question = row.get(kind)
    else:
        question, images = _chat(json.loads(row[kind]) if kind == "message" else row["prompt"])
        gold = row[kind]["ground_truth"] if kind == "reward_model" else gold
    return {"question": question, "answer": _final_answer(gold), "images": images,
            "source": str(row.get("data_source", row.get("source", "")))}


def _chat(messages: list[dict] | str) -> tuple[str, list]:
    """A chat of one user message -> its text with `<image>` marks, and the pictures that its parts hold, if any."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    turns = [turn for turn in turns if turn["role"] != "system"]  # we set our own
    if [turn["role"] for turn in turns] != ["user"]:
        raise ValueError(f"its chat has {len(turns)} messages; only one, of the user, can be used")
    content, text, images = turns[0]["content"], "", []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        # After a passage through `datasets` every part has every key, null where unused: only `type` tells.
        if part["type"] == "text":
            text += part["text"]
        elif part["type"] in ("image", "image_url"):
            text += "<image>"
            images += [part[key] for key in ("image", "image_url", "url", "path") if part.get(key)][:1]
        else:
            raise ValueError(f"its chat has a part of type {part['type']}; only text and pictures can be used")
    return text, images


def _final_answer(solution):
    """A solution, or a list of which any is right -> its last <answer>, else last \\boxed{}, else all of it."""
    if isinstance(solution, list):
        return [_final_answer(item) for item in solution]
    if not isinstance(solution, str):
        return solution
    text = (re.findall(r"<answer>(.*?)</answer>", solution, re.DOTALL) or [solution])[-1].strip()
    boxed = last_boxed(text)
    text = text if boxed is None else boxed
    if "\n" in text:  # a whole derivation: no response would ever equal it
        raise ValueError("its solution has neither <answer> nor \\boxed{}; add the final answer as `answer`")
    return re.sub(r"(?i)^the (?:final )?answer is:?\s+(.*?)\.?$", r"\1", text)


def _pictures(value, folder: Path) -> tuple:
    """One or many of {bytes, path} | path | file: or data: URL | bytes -> bytes, and absolute paths inside `folder`."""
    if isinstance(value, list):
        return tuple(picture for item in value for picture in _pictures(item, folder))
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if not value or isinstance(value, bytes):
        return (value,) if value else ()
    if value.startswith("data:"):
        return (base64.b64decode(value.partition(",")[2], validate=True),)
    if value.startswith(("http://", "https://")):
        raise ValueError(f"its picture {value} is on the web; download it to a place beside the file")
    path = os.path.realpath(folder / value.removeprefix("file://"))  # follows symbolic links
    if not Path(path).is_relative_to(os.path.realpath(folder)):  # data from others must not make us open other files
        raise ValueError(f"its picture {value} is outside {folder}; move the pictures beside the file, "
                         "or use a Parquet file that holds them")
    return (path,)


def _row(record: Record) -> dict:
    """Record -> a row as save_records writes it."""
    images: list[dict] = []
    for image in record.images:
        if isinstance(image, Image.Image):
            buffer = io.BytesIO()
            open_image(image, record.id).save(buffer, format="PNG")
            image = buffer.getvalue()
        try:
            images.append({"bytes": image if isinstance(image, bytes) else Path(image).read_bytes(), "path": None})
        except OSError as error:
            raise ValueError(f"record {record.id}: cannot read its picture: {error}") from error
    answers = list(record.answer) if isinstance(record.answer, tuple) else None
    return vars(record) | {"answer": answers[0] if answers else record.answer, "answers": answers, "images": images,
                           "choices": list(record.choices), "meta": json.dumps(record.meta)}


# --- what the model is fed -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """One encoded problem, ready for the model."""

    ids: torch.Tensor  # [T] int64, ends where the response begins
    pixels: torch.Tensor | None  # [N, D] float32, all patches of all its pictures
    grid: torch.Tensor | None  # [I, 3] int64, patches of each picture in time, height, width


def open_image(image, record_id: str, max_megapixels: float = 100.0) -> Image.Image:
    """A picture, given as PIL image, path or bytes -> RGB PIL image (transparency becomes white).

    Raises ValueError naming the record when the picture is missing, truncated, absurdly large or thin.
    """
    try:
        if not isinstance(image, Image.Image):
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        width, height = image.size  # known from the header: nothing is decompressed before the checks
        if width * height > max_megapixels * 1e6:
            raise ValueError(f"{width} x {height} is over {max_megapixels:.0f} megapixels; shrink the picture")
        if max(width, height) > 200 * min(width, height):  # the limit of Qwen's image processors
            raise ValueError(f"{width} x {height} is thinner than 1:200; crop or pad the picture")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: broken PNG chunks
        raise ValueError(f"record {record_id}: cannot use its picture: {error}") from error


class Processor:
    """Tokenizer and image processor of a Qwen-VL checkpoint.

    Placeholders are written by hand, grid.prod() / merge_size^2 to a picture, because transformers' own processor
    class demands torchvision for videos, which we never feed.
    """

    VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")

    def __init__(self, path: str, max_pixels: int | None = None):
        """path: a Hugging Face folder or hub id; max_pixels: area above which pictures are shrunk (None: its own)."""
        from transformers import AutoTokenizer

        # (from its own module: transformers 5.17 puts a stand-in for it at the top where torchvision is missing)
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
            self.image_id: int = self.tokenizer.get_vocab()["<|image_pad|>"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: not a Qwen vision-language model, or incomplete, and nothing of that name can "
                             f"be fetched ({error!r}); --model wants such a model's folder or hub id") from error
        if max_pixels is not None:
            smallest = self.image_processor.size["shortest_edge"]  # (areas, in spite of the names)
            if max_pixels < smallest:
                raise ValueError(f"max_pixels {max_pixels} is below the image processor's minimum {smallest}")
            self.image_processor.size = {"shortest_edge": smallest, "longest_edge": max_pixels}
        vocab = self.tokenizer.get_vocab()
        self.vision_ids: list[int] = [vocab[t] for t in self.VISION_TOKENS if t in vocab]
        stops = ("<|im_end|>", "<|endoftext|>", self.tokenizer.eos_token)  # chat models end with any of them
        self.stop_ids: list[int] = sorted({vocab[t] for t in stops if t in vocab})
        self.pad_id: int = self.tokenizer.pad_token_id

    def encode(self, record: Record, style: str, max_tokens: int | None = None) -> Prompt:
        """Record -> Prompt, in prompt style `style`. Never truncates: cutting a prompt would cut image tokens.

        Raises ValueError naming the record: pictures and `<image>` marks that differ in number, vision tokens written
        in the question, a prompt over max_tokens.
        """
        if found := [t for t in {*self.VISION_TOKENS, *self.tokenizer.all_special_tokens} if t in record.text]:
            raise ValueError(f"record {record.id}: its text holds the model's own token {found[0]}; remove it")
        parts = record.text.split("<image>")
        if len(parts) == 1:
            parts = [""] * len(record.images) + parts
        if len(parts) - 1 != len(record.images):
            raise ValueError(f"record {record.id}: {len(parts) - 1} <image> marks for {len(record.images)} pictures")
        content: list[dict] = []
        for i, text in enumerate(parts):
            content += [{"type": "image"}] if i else []
            content += [{"type": "text", "text": text}] if text else []
        messages = [{"role": "system", "content": [{"type": "text", "text": PROMPTS[style]}]},
                    {"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pixels = grid = None
        if record.images:
            images = [open_image(image, record.id) for image in record.images]
            features = self.image_processor(images=images, return_tensors="pt")
            pixels, grid = features["pixel_values"], features["image_grid_thw"]
            merge = self.image_processor.merge_size**2
            head, *tails = text.split("<|image_pad|>")
            assert len(tails) == len(images), f"chat template wrote {len(tails)} pictures for {len(images)}"
            counts = (grid.prod(dim=1) // merge).tolist()
            text = head + "".join("<|image_pad|>" * n + tail for n, tail in zip(counts, tails))
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        if max_tokens is not None and len(ids) > max_tokens:
            raise ValueError(f"record {record.id}: its prompt is {len(ids)} tokens long, the limit is {max_tokens}; "
                             "raise --max-prompt-tokens, lower --max-pixels, or leave the record out")
        return Prompt(ids, pixels, grid)

    def decode(self, ids: list[int]) -> str:
        """Response ids -> text without the chat's own tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def collate(self, prompts: list[Prompt], responses: list[list[int]] | None = None) -> dict[str, torch.Tensor]:
        """Prompts, each followed by its response if given -> the model's inputs.

        Prompts end, and responses begin, in one column: prompts are padded on the left, responses on the right.
        input_ids, attention_mask, mm_token_type_ids [B, T]; pixel_values [N, D] and image_grid_thw [I, 3] when any
        row has pictures, in row order.
        """
        width = max(len(p.ids) for p in prompts)
        tail = max(len(r) for r in responses) if responses else 0
        ids = torch.full((len(prompts), width + tail), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            start = width - len(prompt.ids)
            ids[row, start:width] = prompt.ids
            end = width
            if responses:
                end = width + len(responses[row])
                ids[row, width:end] = torch.tensor(responses[row], dtype=torch.long)
            mask[row, start:end] = 1
        # Left out, mm_token_type_ids fails silently: image tokens would get the positions of text.
        batch = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == self.image_id).int()}
        pictured = [p for p in prompts if p.pixels is not None]
        if pictured:
            batch["pixel_values"] = torch.cat([p.pixels for p in pictured])
            batch["image_grid_thw"] = torch.cat([p.grid for p in pictured])
        return batch
