"""What a problem is: the record, where records come from, and what the model is fed.

    Record         one problem: question, pictures, gold answer, and what was measured of it
    load_records   every file format people bring, told apart by the keys of a row
    SOURCES        readers of the published training sets; BENCHMARKS of the test sets
    PROMPTS        the three system prompts: answer only, think, observe
    Processor      tokenizer and image processor of a checkpoint: Record -> Prompt -> a padded batch
    save_usable    a source, without what cannot be verified or is in a benchmark -> one Parquet file

    python data.py mathvision --input MathLLMs/MathVision --out raw/mathvision.parquet --exclude mathvista,mathverse
    python data.py any --input problems.jsonl --out raw/mine.parquet

Shapes: B rows, T tokens, I pictures, N vision patches, D values of a patch.
"""
from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageFilter
from tqdm import tqdm

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
    images: tuple = ()  # PIL images, or Pictures / paths / bytes opened on use
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

        if isinstance(self.answer, dict):
            fail("its answer is an object; write a text, a number, or a list of which any is right")
        several = isinstance(self.answer, (list, tuple))
        golds = tuple("" if gold is None else str(gold) for gold in (self.answer if several else [self.answer]))
        if not golds or not all(plain(gold) for gold in golds):
            fail(f"its answer is empty: {self.answer!r}")
        choices = tuple(str(choice) for choice in self.choices)
        if len(choices) > len(ascii_uppercase):
            fail(f"it has {len(choices)} choices, more than there are letters")
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
        if self.difficulty is not None and not 0 <= self.difficulty <= 1:
            fail(f"its difficulty is {self.difficulty}; it is 1 - pass rate, from 0 to 1")
        for name, value in settled.items():
            object.__setattr__(self, name, value)  # the record is frozen

    @property
    def text(self) -> str:
        """The question, and its options with their letters, as the model reads them."""
        options = [f"({letter}) {text}" for letter, text in zip(ascii_uppercase, self.choices)]
        return "\n".join([self.question, *options])

    @property
    def content(self) -> list[dict]:
        """The text and its pictures, in order, as parts of a chat message; without marks the pictures come first."""
        texts = self.text.split("<image>")
        if len(texts) == 1:
            texts = [""] * len(self.images) + texts
        if len(texts) - 1 != len(self.images):
            raise ValueError(f"record {self.id}: {len(texts) - 1} <image> marks for {len(self.images)} pictures")
        content: list[dict] = []
        for i, text in enumerate(texts):
            content += [{"type": "image"}] if i else []
            content += [{"type": "text", "text": text}] if text else []
        return content

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
    """Which option a text names, by its letter alone, `(B)`, `B.` or `B**`, or by its whole text."""
    letters = ascii_uppercase[:len(choices)] or LETTERS
    letter = re.fullmatch(r"[(\[{*#\s]*([A-Za-z])[)\]}.:;,!*#\s]*", plain(text))
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
}  # (with `question` and `answer_type` a row is ours whatever else it holds: save_records writes others' columns too)
OTHERS_COLUMNS = ("problem", "prompt", "solution")  # what save_records adds to our own, for EasyR1 and TRL
REPORTS = (".dropped.jsonl", ".report.json")  # what save_usable writes beside x.parquet; no data
BATCH = 64  # rows in memory at once, and in a row group when written: with pictures far below Arrow's limit of 2 GiB


class Dropped(NamedTuple):
    """A record that cannot be used."""

    id: str
    reason: str  # short and stable, to be counted: "null gold"
    detail: str  # where it stands, what is wrong, what to do
    images: tuple = ()  # --exclude needs a benchmark's pictures also where no rule can judge the gold
    meta: dict = {}  # (never changed) and a benchmark's sub-scores are over all of its rows


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture inside a Parquet or Arrow file, whose bytes are read when it is opened: records stay small."""

    file: str
    stamp: int  # time of the file's last change, in ns: a file written anew holds other pictures in these places
    group: int  # row group; 0 in an Arrow file
    row: int  # in its row group
    column: str
    index: int | None  # in a column of lists

    def read(self) -> bytes:
        with _READING:  # one thread at a time: the others then find the row group read
            value = _column(self.file, self.stamp, self.group, self.column)[self.row].as_py()
        value = value if self.index is None else value[self.index]
        return value["bytes"] if isinstance(value, dict) else value


_READING = threading.Lock()


@lru_cache(maxsize=8)
def _parquet(file: str, stamp: int) -> pq.ParquetFile:
    if os.stat(file).st_mtime_ns != stamp:
        raise ValueError(f"{file} was changed after its records were read; start again")
    return pq.ParquetFile(file)


@lru_cache(maxsize=4)  # row groups; records are mostly read in order, a handful of files at a time
def _column(file: str, stamp: int, group: int, column: str) -> pa.ChunkedArray:
    if file.endswith(".arrow"):
        return _arrow(file)[column]
    return _parquet(file, stamp).read_row_group(group, columns=[column])[column]


def _arrow(file: str) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(file)).read_all()  # mapped, not read


def load_records(path_or_id: str, limit: int | None = None, skip_bad: bool = False) -> list[Record]:
    """The problems of a file, of a folder, or of a hub id with its split (`org/name@train`), at most `limit` of them.

    Files: .jsonl, .json (a list of rows), .parquet, .tsv (VLMEvalKit's); a folder: its ladder.parquet, else all its
    .parquet, .jsonl and .json. Pictures lie in the file or beside it: paths start at its folder and may not leave it.
    They are not opened here; check_prompts does that. Those of Parquet and hub are not held in memory (Picture).
    Raises ValueError: for a file that cannot be read; or one for all records that cannot be used, naming file, record
    and remedy. skip_bad drops such records instead, and prints them.
    """
    good: list[Record] = []
    bad: list[str] = []
    for made in read_any(path_or_id):
        if isinstance(made, Dropped):
            bad.append(made.detail)
        else:
            good.append(made)
        if limit is not None and len(good) >= limit:
            break
    if not good and not bad:
        raise ValueError(f"{path_or_id}: holds no records")
    return settle(path_or_id, good, bad, skip_bad)


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

    bar = tqdm(total=len(records), desc="checking prompts", unit="problem", disable=len(records) < 5000)
    faults: list[str | None] = []
    with bar, ThreadPoolExecutor() as pool:  # Pillow decodes outside the GIL
        for batch in batches(records):
            faults += pool.map(fault, batch)
            bar.update(len(batch))
    good = [record for record, found in zip(records, faults, strict=True) if not found]
    return settle("prompts", good, [found for found in faults if found], skip_bad)


def save_records(path: str, records: Iterable[Record]) -> None:
    """Write a Parquet file with the pictures inside, one column to a field of Record; whole or not at all.

    `answer` is the first accepted answer and `answers` all, where there are several; `meta` is JSON; `images` is a
    column of pictures to `datasets`, and so to TRL and EasyR1, for which OTHERS_COLUMNS repeat the problem.
    PIL images are written as PNG, as open_image shows them. Takes records as they come: memory for BATCH of them.
    """
    import datasets

    text, integer, real = (datasets.Value(name) for name in ("string", "int64", "float64"))
    schema = datasets.Features({
        "id": text, "question": text, "answer": text, "answers": [text], "images": [datasets.Image()],
        "choices": [text], "answer_type": text, "source": text, "precision": integer, "difficulty": real,
        "complexity": real, "stage": integer, "meta": text, "problem": text,
        "prompt": [{"role": text, "content": [{"type": text, "text": text}]}], "solution": text}).arrow_schema
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with pq.ParquetWriter(part, schema) as writer:
            for batch in batches(records):
                writer.write_table(pa.Table.from_pylist([_row(record) for record in batch], schema))
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def batches(items: Iterable, size: int = BATCH) -> Iterator[list]:
    """Lists of `size` items, the last one shorter; takes no more than it gives."""
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, size)), [])


def settle(name: str, good: list[Record], bad: list[str], skip_bad: bool) -> list[Record]:
    """The good records, unless there are bad ones that may not be skipped: one ValueError for these."""
    count = f"{name}: {len(bad)} of {len(good) + len(bad)} records cannot be used"
    if bad and not (skip_bad and good):
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        remedy = "mend or remove them" + ", or pass --skip-bad" * (not skip_bad)
        raise ValueError("\n".join([f"{count}:", *(f"  {line}" for line in bad[:10])]) + f"{more}\n{remedy}")
    if bad:
        print(*(f"dropped: {line}" for line in bad), f"{count} and were dropped", sep="\n", file=sys.stderr)
    return good


def read_any(path_or_id: str) -> Iterator[Record | Dropped]:
    """Every record of a file, folder or hub id in any of FORMATS, one at a time."""
    return _read(_tables(path_or_id), _any_fields)


def _read(tables: Iterable[tuple[str, tuple, Iterator]], convert: Callable[[dict], dict | Dropped],
          source: str = "") -> Iterator[Record | Dropped]:
    """Rows -> records, one at a time; `convert` makes fields of Record of a row, with pictures as they stand in it."""
    seen: set[str] = set()
    for name, folders, rows in tables:
        unit = "line" if name.endswith(".jsonl") else "record"
        try:
            for number, row in rows:
                made = _made(row, convert, folders, f"{source or Path(name).stem}-{number}", source)
                if isinstance(made, Record) and made.id in seen:
                    made = Dropped(made.id, "repeated id", f"the id {made.id!r} is taken; give every record an id of "
                                   "its own", made.images)
                if isinstance(made, Dropped):
                    made = made._replace(detail=f"{name}, {unit} {number}: {made.detail}")
                else:
                    seen.add(made.id)
                yield made
        except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:  # of the whole file
            raise ValueError(f"{name}: cannot be read: {error}; was it copied whole? is its suffix right?") from error


def _made(row: dict | bytes, convert: Callable[[dict], dict | Dropped], folders: tuple[Path, ...], made_id: str,
          source: str) -> Record | Dropped:
    """One row -> its record, or why it cannot be used; the caller adds where it stands."""
    record_id, reason, images, meta = made_id, "malformed row", (), {}  # reason: to drop it if the next lines fail
    try:
        row = json.loads(row) if isinstance(row, bytes) else row
        if not isinstance(row, dict):
            raise ValueError(f"a row must be an object with keys, not a {type(row).__name__}")
        fields = convert({key: value for key, value in row.items() if value is not None})  # a null is a key left out
        if isinstance(fields, Dropped):
            return fields._replace(id=made_id)
        own_id, meta = str(fields.pop("id", "")), fields.get("meta", {})
        record_id = (f"{source}-{own_id}" if source else own_id) if own_id else made_id
        reason = "picture unreadable"
        images = _pictures(fields.pop("images", None), folders)
        reason = "no question"
        question = fields.get("question")
        if not isinstance(question, str) or not question.strip():
            raise ValueError("its question is empty")
        gold = fields.get("answer")
        reason = "null gold" if gold is None or not str(gold).strip(" []()") else "unverifiable"
        record = Record(id=record_id, images=images, **{"source": source} | fields)
        reason = "malformed row"  # a lone surrogate, half of a cut emoji, would fail much later, and so would dates
        json.dumps([record.id, record.source, record.text, record.golds, record.meta], ensure_ascii=False).encode()
        reason = "picture marks"
        marks = "".join((question, *record.choices)).count("<image>")
        if marks and marks != len(images):
            raise ValueError(f"{marks} <image> marks for {len(images)} pictures; write a mark for each, or none")
        return record
    except (AttributeError, KeyError, IndexError, OverflowError, TypeError, RecursionError, MemoryError) as error:
        return Dropped(record_id, reason, f"it is not as {source or 'its format'} writes it: {error!r}", images, meta)
    except (OSError, ValueError, SyntaxError) as error:  # OSError: no path, such as base64 without `data:`
        return Dropped(record_id, reason, str(error)[:500], images, meta)


def _tables(path_or_id: str, split: str | None = None) -> Iterator[tuple[str, tuple[Path, ...], Iterator]]:
    """-> name, folders that pictures may lie in, and (number, row) from 1 on, of each file or hub data set.

    split: of a published data set. A hub id may then leave it out, and of a folder's files only its own are taken,
    the rows numbered through.
    """
    path = Path(path_or_id)
    if path.is_dir():
        found = sorted(path.rglob("*") if split else path.iterdir())
        files = [file for file in found if file.suffix in (".parquet", ".jsonl", ".json")
                 and not file.name.endswith(REPORTS)]
        if split:  # test-00000-of-00002.parquet, test.jsonl, but not testmini; a lone file has any name
            of_split = [file for file in files if re.fullmatch(rf"(?:{split})(?:-\d+-of-.*)?", file.stem)]
            parquet = [[file for file in some if file.suffix == ".parquet"] for some in (of_split, files)]
            lone = next((some for some in (parquet[1], files) if len(some) == 1), [])
            if files and not of_split and not lone:
                raise ValueError(f"{path}: none of its files is of the split {split}: "
                                 f"{', '.join(file.name for file in files[:10])}; give the one that is")
            files = parquet[0] or of_split or lone
        else:
            files = [file for file in files if file.name == "ladder.parquet"] or files
        if not files:
            raise ValueError(f"{path}: no .parquet, .jsonl or .json in this folder; give the one that holds them")
    elif path.exists():
        files = [path]
    elif re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*" + ("(@\\w+)?" if split else r"@\w+"), path_or_id):
        import datasets

        name, _, asked = path_or_id.partition("@")
        try:
            configs = datasets.get_dataset_config_names(name) if split else []
            asked = asked or split
            named = [config for config in configs if config == asked] or configs  # MMMU: one for each subject, all read
            tables = [datasets.load_dataset(name, *config, split=asked) for config in ([(c,) for c in named] or [()])]
        except Exception as error:  # of a dozen classes: no network, no such id or split, a gated one, a script
            raise ValueError(f"{path_or_id}: neither a file, nor could it be loaded from the hub: {error}") from error
        files = [Path(part["filename"]) for table in tables for part in table.cache_files]
        rows = (row for file in files for _, row in _rows(file))
        yield path_or_id, (Path(datasets.config.HF_CACHE_HOME),), enumerate(rows, 1)
        return
    else:
        raise ValueError(f"{path}: no such file or folder (a hub id needs its split: org/name@train)")
    numbers = itertools.count(1)
    for file in files:
        folder = file.parent
        if split:
            places = (folder, folder / "images", folder / "data_images", path)
            yield str(file), tuple(filter(Path.is_dir, places)), ((next(numbers), row) for _, row in _rows(file))
        else:
            yield str(file), (folder,), _rows(file)


def _rows(file: Path) -> Iterator[tuple[int, dict | bytes]]:
    """Numbered rows of one file. Lines of JSON stay bytes: a broken one is then a bad record, not a bad file."""
    if not file.stat().st_size:
        raise ValueError("the file is empty")
    if file.suffix == ".jsonl":
        with open(file, "rb") as lines:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    elif file.suffix == ".json":
        yield from enumerate(_json_items(file), 1)
    elif file.suffix == ".parquet":
        with pq.ParquetFile(file) as table:
            groups = (table.iter_batches(BATCH, row_groups=[group]) for group in range(table.num_row_groups))
            yield from enumerate(_lazy_rows(file, groups), 1)
    elif file.suffix == ".arrow":  # of the hub's cache
        yield from enumerate(_lazy_rows(file, [_arrow(str(file)).to_batches(BATCH)]), 1)
    elif file.suffix == ".tsv":
        yield from enumerate(_tsv_rows(file), 1)
    else:
        raise ValueError("it is not .jsonl, .json, .parquet or .tsv")


def _lazy_rows(file: Path, groups: Iterable[Iterable[pa.RecordBatch]]) -> Iterator[dict]:
    """Rows of row groups, with a Picture in the place of each picture's bytes."""
    stamp = file.stat().st_mtime_ns
    for group, parts in enumerate(groups):
        for number, row in enumerate(row for part in parts for row in part.to_pylist()):
            place = (str(file), stamp, group, number)
            yield {column: [_lazy(item, *place, column, i) for i, item in enumerate(value)] if isinstance(value, list)
                   else _lazy(value, *place, column, None) for column, value in row.items()}


def _lazy(value, *place):
    return Picture(*place) if isinstance(value.get("bytes") if isinstance(value, dict) else value, bytes) else value


def _json_items(file: Path) -> Iterator:
    """The items of a JSON list one at a time: MathV360K's is hundreds of MB, and several times that once parsed."""
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    with open(file, encoding="utf-8-sig") as source:
        text = source.read(1 << 20)
        start = space.match(text).end()
        if text[start:start + 1] != "[":
            json.loads(text + source.read())  # says what is wrong, if it is no JSON at all
            raise ValueError("it holds one object, where a list of rows is needed")
        start, stop = start + 1, None  # of the next item, of the last one
        while stop is None or text[stop] == ",":
            start = space.match(text, start).end()
            if stop is None and text[start:start + 1] == "]":
                stop = start  # an empty list
                break
            try:
                item, end = decoder.raw_decode(text, start)
                end = space.match(text, end).end()
                if end == len(text):  # perhaps half of a number
                    raise json.JSONDecodeError("the list has no end", text, end)
            except json.JSONDecodeError:
                more = source.read(max(1 << 20, len(text) - start))
                if not more:
                    raise
                text, start, stop = "," + text[start:] + more, 1, None if stop is None else 0
                continue
            yield item
            start, stop = end + 1, end
        if text[stop] != "]" or (text[stop + 1:] + source.read()).strip():
            raise ValueError(f"it is no list of JSON: {text[stop:stop + 40]!r} stands after an item")


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
            if not images and (paths := row.pop("image_path", None)):
                images = [item.strip(" '\"") for item in paths[1:-1].split(",")] if paths[0] == "[" else [paths]
            options = [row.pop(letter, None) or "" for letter in ascii_uppercase]
            while options and not options[-1]:
                options.pop()
            hint = row.pop("hint", None)
            question = f"Hint: {hint}\n{row.pop('question')}" if hint else row.pop("question")
            yield {"id": index, "question": question, "answer": row.pop("answer"), "images": images, "choices": options,
                   "meta": {key: value for key, value in row.items() if key and value}}


def _any_fields(row: dict) -> dict:
    """A row of any of FORMATS -> fields of Record, pictures as they stand in the row."""
    kind = next((key for key in FORMATS if key in row), None)
    if {"question", "answer_type"} <= row.keys():  # ours, beside the columns for others
        row = {key: value for key, value in row.items() if key not in OTHERS_COLUMNS}
        kind = "question"
    if kind is None:
        known = ", ".join(f"`{key}` ({writer})" for key, writer in FORMATS.items())
        raise ValueError(f"the keys {', '.join(map(repr, row))} are of no known format; each has its own key: {known}")
    try:
        fields = _own_fields(row) if kind == "question" else _foreign_fields(row, kind)
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"it is not as {FORMATS[kind]} writes `{kind}`: {error!r}") from error
    images = fields.get("images") or row.get("images") or row.get("image")
    return fields | {"id": row.get("id", ""), "images": images}


def _own_fields(row: dict) -> dict:
    """A row of our own format -> fields of Record but its id; pictures as they stand in the row."""
    names = [f.name for f in dataclasses.fields(Record)]
    if unknown := row.keys() - {*names, "image", "answers"}:  # a dropped `options` would leave a question without them
        raise ValueError(f"{', '.join(sorted(unknown))}: no fields of a record ({', '.join(names)}); rename them, "
                         "or move them into `meta`")
    fields = {name: row[name] for name in names[1:] if name in row} | {"source": str(row.get("source", ""))}
    fields["answer"] = row.get("answers", row.get("answer"))
    if isinstance(row.get("choices"), str):
        raise ValueError("its choices are one text; write a list of texts")
    meta = row.get("meta", {})
    fields["meta"] = dict(json.loads(meta) if isinstance(meta, str) else meta)
    for name, kind in (("precision", int), ("difficulty", float), ("complexity", float), ("stage", int)):
        if name in fields:
            fields[name] = kind(value := fields[name])  # 2.0, as pandas writes an int beside a null, is 2
            if fields[name] != value or abs(value) >= 2**63:
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
    gold = _final_answer(gold)
    offered = row.get("choices") or row.get("options")
    if offered and re.fullmatch(r"\W*[A-Za-z]\W*", str(gold)) and not split_options(str(question))[1]:
        raise ValueError(f"its answer is {gold!r}, and its options {str(offered)[:80]} do not stand in its text, where "
                         f"{FORMATS[kind]} has them; write them there")
    if isinstance(gold, str) and len(gold.split()) > 8 and infer_answer_type((gold,), ()) == "text":
        raise ValueError(f"its answer {gold[:80]!r} is free text, which can be said in other words")
    return {"question": question, "answer": gold, "images": images,
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


ANSWER_IS = re.compile(r"(?i)^the (?:final )?answer is:?\s+(.*?)\.?$")


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
    return ANSWER_IS.sub(r"\1", text)


def _pictures(value, folders: tuple[Path, ...]) -> tuple:
    """One or many of Picture | {bytes, path} | path | file: or data: URL | bytes -> Pictures, bytes, and absolute paths
    inside one of `folders`."""
    if isinstance(value, list):
        return tuple(picture for item in value for picture in _pictures(item, folders))
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if not value or isinstance(value, (bytes, Picture)):
        return (value,) if value else ()
    if value.startswith("data:"):
        return (base64.b64decode(value.partition(",")[2], validate=True),)
    if value.startswith(("http://", "https://")):
        raise ValueError(f"its picture {value} is on the web; download it to a place beside the file")
    value = value.removeprefix("file://")
    tried = [folder / (value + suffix) for suffix in ("", ".jpg", ".png") for folder in folders]  # (SceMQA has none)
    path = os.path.realpath(next(filter(Path.is_file, tried), tried[0]))  # follows symbolic links
    if not any(Path(path).is_relative_to(os.path.realpath(folder)) for folder in folders):
        raise ValueError(f"its picture {value} is outside {folders[0]}; move the pictures beside the file, "
                         "or use a Parquet file that holds them")  # data from others must not open our other files
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
            image = image.read() if isinstance(image, Picture) else image
            images.append({"bytes": image if isinstance(image, bytes) else Path(image).read_bytes(), "path": None})
        except (OSError, ValueError) as error:
            raise ValueError(f"record {record.id}: cannot read its picture: {error}") from error
    answers = list(record.answer) if isinstance(record.answer, tuple) else None
    return vars(record) | {
        "answer": record.golds[0], "answers": answers, "images": images, "choices": list(record.choices),
        "meta": json.dumps(record.meta), "problem": "".join(part.get("text", "<image>") for part in record.content),
        "solution": record.golds[0], "prompt": [{"role": "user", "content": record.content}]}


# --- published data sets ---------------------------------------------------------------------------------------------
# Each converter turns a published row (nulls left out) into fields of Record; all shapes and traps: tests/test_sources.


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """`How long? A. 45; B. 60 ;C: 75` -> what stands before the options, and the options; (text, ()) where they cannot
    be told: no A and B, or nothing after a letter (they are in the picture)."""
    best: list[re.Match] = []
    for opening in (r"^[^\S\n]*", r"(?<![\w°∠△\\])(?<!\w\()"):  # line starts; where these give no three, anywhere
        marks = list(re.finditer(rf"(?m){opening}[(\[]?([A-J])[)\].:：}}]", text))
        for first, mark in enumerate(marks):
            row = [mark] if mark[1] == "A" else []
            for other in marks[first + 1:] if row else ():
                row += [other] if other[1] == ascii_uppercase[len(row)] else []
            best = row if len(row) >= max(2, len(best)) else best  # of equal ones the last: "A." may stand in the stem
        if len(best) > 2:
            break
    ends = [mark.start() for mark in best[1:]] + [len(text)]
    options = tuple(text[mark.end():end].strip(" \r\n\t;,；\x08") for mark, end in zip(best, ends))
    return (text[:best[0].start()].rstrip(), options) if options and all(options) else (text, ())


LETTER = re.compile(r"\s*\(?([A-J])\)?(?![\w'])(?!\s*(?:,|and|or|&)\s*\(?[A-J]\b)")  # "(D)  http..", but not "(A, D)"


def _inline_choice(text: str, answer) -> dict:
    """Fields of a problem whose options stand in its text; they stay there when they, or the gold's, cannot be told."""
    stem, choices = split_options(text)
    letter = LETTER.match(str(answer or ""))
    if letter and letter[1] not in ascii_uppercase[:len(choices)] and re.search(rf"\b{letter[1]}\b", text):
        stem, choices = text, ()  # (a gold E where there is no E anywhere is refused by Record)
    stem = re.sub(r"\s*\b(?:Options|Choices)\s*:\s*$", "", stem)
    return {"question": stem.strip(), "choices": choices, "answer": letter[1] if letter else answer,
            "answer_type": "choice"}


def _meta(row: dict, *names: str) -> dict:
    return {name.replace(" ", "_"): row[name] for name in names if name in row}


def _mathvision(row: dict) -> dict:
    choices = row["options"]
    fields = {"id": row["id"], "question": row["question"], "choices": choices,
              "answer": row.get("answer", "").replace("\x0c", "\\f").strip(),  # (strip takes the form feed of \frac)
              "images": row.get("decoded_image") or row["image"], "meta": _meta(row, "level", "subject")}
    if choices == list("ABCDE"):  # the real ones are in the picture
        fields |= {"choices": [], "answer_type": "choice"}
    return fields


def _wemath(row: dict) -> dict:
    return _inline_choice(f"{row['question'].strip()}\n{row['option'].strip()}", row.get("answer")) | {
        "id": f"{row['ID']}@{row['key']}", "images": row["image_path"],
        "meta": _meta(row, "ID", "key", "knowledge concept", "question number")}


def _polymath(row: dict) -> dict:
    """The question is a screenshot. A digit range is offered as options 1 .. 4, so that a letter is right too: the
    authors turn letters into digits there."""
    golds = [gold.strip(" '\"") for gold in str(row.get("final_answer", "")).strip(" []").split(",")]
    fields = {"id": row.get("id", ""), "images": row["image"], "answer": golds if len(golds) > 1 else golds[0],
              "answer_type": "choice", "meta": _meta(row, "category")}
    if str(row.get("final_answer_range", "")).replace(" ", "") in ("1-4", "1,2,3,4"):
        return fields | {"question": "Answer the question in the image.", "choices": list("1234")}
    offered = str(row.get("answer_option") or row.get("final_answer_range") or "A, B, C, D").strip("[]")
    return fields | {"question": f"Answer the question in the image. Options: {offered}"}


def _scemqa(row: dict) -> dict:
    """Rows as read_scemqa flattens them: their subject and number in it added."""
    answer = row.get("Answer (final answer highlighted)", "")
    golds = [gold.strip() for gold in re.findall(r"\\answ?er\{((?:[^{}]|\{[^{}]*\})*)\}", answer)]  # (one \anser)
    free = row["subject"].endswith("Free_Response")
    fields = ({"question": row["Question"].strip(), "answer": golds if len(golds) > 1 else golds[0] if golds else None}
              if free else _inline_choice(row["Question"], answer))
    return fields | {"id": f"{row['subject']}-{row['number']}", "images": row["ImagePath"],
                     "meta": {"subject": row["subject"].split("_")[0].lower(), "free_response": free}}


def _mathv360k(row: dict) -> dict:
    human, gpt = row["conversations"]
    text = human["value"].replace("<image>", "").strip()  # of the one picture, which then comes first
    text = re.sub(r"^(?:Hint:[^\n]*\n+)?(?:Question:\s*)?", "", text)
    stem, mark, listed = text.partition("\nChoices:")
    gold = ANSWER_IS.sub(r"\1", gpt["value"].strip())
    choices = split_options(listed)[1] if mark else ()
    return {"question": (stem if choices else text).strip(), "choices": choices, "answer": gold,
            "images": row["image"], "meta": {"id": row.get("id"), "subset": row["image"].split("/")[0]}}


def read_scemqa(path: str) -> Iterator[Record | Dropped]:
    """SceMQA, of a clone of its repository: two JSON files of {subject: [row, ...]}, pictures beside them."""
    def rows(file: Path) -> Iterator[tuple[int, dict]]:
        subjects = json.loads(file.read_bytes())
        if not isinstance(subjects, dict) or not all(isinstance(some, list) for some in subjects.values()):
            raise ValueError("it holds no lists of rows by subject")
        flat = (row | {"subject": subject, "number": number} if isinstance(row, dict) else row
                for subject, some in subjects.items() for number, row in enumerate(some, 1))
        yield from enumerate(flat, 1)

    root = Path(path)
    files = sorted(root.rglob("multiple_choice.json")) + sorted(root.rglob("free_response.json"))
    files = files or [root] if files or root.is_file() else []
    if not files:
        raise ValueError(f"{path}: no multiple_choice.json or free_response.json; SceMQA is no hub data set: clone "
                         "GitHub's SceMQA/SceMQA")
    return _read(((str(file), (file.parent,), rows(file)) for file in files), _scemqa, "scemqa")


def read_mathv360k(path: str) -> Iterator[Record | Dropped]:
    """MathV360K, of a folder with train_samples_all_tuning.json and data_images/ (the unpacked data_images.zip).

    Read twice: the first time to find questions about one picture with different labels.
    """
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file or folder; download Zhiqiang007/MathV360K and unpack data_images.zip")
    labels: dict[int, str | None] = {}  # of each question; None: several. Hashes: 360,000 texts would be 200 MB

    def asked(fields: dict) -> int:
        return hash((fields["images"], fields["question"], fields["choices"]))

    def convert(row: dict) -> dict | Dropped:
        fields = _mathv360k(row)
        question = asked(fields)
        if question not in labels:
            return Dropped("", "repeated question", "its picture, question and label stand in an earlier row")
        if labels[question] is None:
            return Dropped("", "conflicting labels", f"{fields['answer']!r} here, another answer elsewhere")
        del labels[question]
        if not fields["choices"] and len(fields["answer"].split()) > 3 and not split_number(fields["answer"]):
            return Dropped("", "free text", f"{fields['answer'][:80]!r} can be said in other words")
        return fields

    for _, _, rows in _tables(path, "train_samples_all_tuning"):
        with contextlib.suppress(OSError, ValueError, RecursionError):  # the second reading says so, and of which file
            for _, row in rows:
                try:
                    row = json.loads(row) if isinstance(row, bytes) else row
                    fields = _mathv360k({key: value for key, value in row.items() if value is not None})
                    number = parse_number(fields["answer"])
                    label = sys.intern(normal_text(fields["answer"])[:80] if number is None else f"{number:.9g}")
                    question = asked(fields)
                except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
                    continue  # the second reading says why
                if labels.setdefault(question, label) != label:
                    labels[question] = None
    return _read(_tables(path, "train_samples_all_tuning"), convert, "mathv360k")


def _mathvista(row: dict) -> dict:
    gold, choices, precision = row.get("answer"), row.get("choices") or [], row.get("precision")
    fields = {"id": row["pid"], "question": row.get("query", row["question"]).split("\nChoices:")[0],
              "choices": choices, "images": row.get("decoded_image") or row["image"],
              "meta": _meta(row["metadata"], "task", "skills", "source", "category", "grade", "language")}
    if row["question_type"] == "multi_choice":  # the gold is the text of a choice, be it "A" as the third of them
        return fields | {"answer": ascii_uppercase[choices.index(gold)] if gold in choices else gold}
    kind = {"integer": "number", "float": "number", "list": "list"}.get(row["answer_type"], "")
    known = row["answer_type"] == "float" and precision is not None and precision == precision  # (nan is not)
    return fields | {"answer": gold, "answer_type": kind, "precision": int(precision) if known else None}


def _mathverse(row: dict) -> dict:
    """Five versions of each problem; vision-only has no text of its own, and no options outside the picture."""
    text = row.get("question", "").strip() or "Answer the question in the image."
    fields = (_inline_choice(text, row.get("answer")) if row["question_type"] == "multi-choice"
              else {"question": text, "answer": row.get("answer")})
    return fields | {"id": row["sample_index"], "images": row["image"],
                     "meta": _meta(row, "problem_index", "problem_version", "question_type")
                     | _meta(row["metadata"], "subject", "subfield")}


def _mmmu(row: dict) -> dict:
    """Marks `<image 1>` in the question or its options name columns; here pictures come in the order of their marks."""
    def given(text: str) -> str:
        return re.sub(r"<image (\d)>", lambda mark: "<image>" if f"image_{mark[1]}" in row else mark[0], text)

    choices = ast.literal_eval(row.get("options", "[]"))  # a list written as a string
    order = [f"image_{n}" for n in re.findall(r"<image (\d)>", "\n".join([row["question"], *choices]))]
    unnamed = [name for name in (f"image_{n}" for n in range(1, 8)) if name in row and name not in order]
    gold = row.get("answer", "")
    if not choices and gold.startswith("["):  # any of these is right
        gold = ast.literal_eval(gold)
    return {"id": row["id"], "question": "<image>" * len(unnamed) + given(row["question"]),
            "choices": [given(choice) for choice in choices], "answer": gold,
            "images": [row[name] for name in unnamed + order if name in row],
            "meta": _meta(row, "subfield", "topic_difficulty", "question_type")
            | {"subject": re.sub(r"^[a-z]+_|_\d+$", "", row["id"])}}


def _mmstar(row: dict) -> dict:
    return _inline_choice(row["question"], row.get("answer")) | {
        "id": row["index"], "images": row["image"], "meta": _meta(row, "category", "l2_category")}


def _published(source: str, hub_id: str, split: str, convert: Callable[[dict], dict | Dropped]) -> Callable:
    """-> the reader of a published data set, of its hub id (perhaps with @split) or of a local copy."""
    return lambda path_or_id=None: _read(_tables(path_or_id or hub_id, split), convert, source)


SOURCES: dict[str, Callable[[str], Iterator[Record | Dropped]]] = {  # what NeuraLadder was made of
    "mathvision": _published("mathvision", "MathLLMs/MathVision", "test", _mathvision),
    "wemath": _published("wemath", "We-Math/We-Math", "testmini", _wemath),
    "polymath": _published("polymath", "him1411/polymath", "test", _polymath),
    "scemqa": read_scemqa,
    "mathv360k": read_mathv360k,
}
BENCHMARKS: dict[str, Callable[[str | None], Iterator[Record | Dropped]]] = {  # without a path: the published one
    "mathvista": _published("mathvista", "AI4Math/MathVista", "testmini", _mathvista),
    "mathvision": SOURCES["mathvision"],
    "mathverse": _published("mathverse", "AI4Math/MathVerse", "testmini", _mathverse),
    "wemath": SOURCES["wemath"],
    "mmmu": _published("mmmu", "MMMU/MMMU", "validation", _mmmu),
    "mmstar": _published("mmstar", "Lin-Chen/MMStar", "val", _mmstar),
}


# --- what the model is fed -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """One encoded problem, ready for the model."""

    ids: torch.Tensor  # [T] int64, ends where the response begins
    pixels: torch.Tensor | None  # [N, D] float32, all patches of all its pictures
    grid: torch.Tensor | None  # [I, 3] int64, patches of each picture in time, height, width


PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow has more, and runs Ghostscript for EPS


TURNS = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
                        Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                        Image.Transpose.ROTATE_90), 2))  # EXIF orientation -> what undoes it


def _turned(image: Image.Image) -> Image.Image:
    """The picture as the camera was held."""
    image.load()  # a truncated one fails here, and not below
    try:  # (Pillow's own exif_transpose writes the other fields anew, of which any may be broken)
        turn = TURNS.get(image.getexif().get(0x0112))
    except Exception:  # Pillow raises all there is for broken EXIF, which is no reason to lose the picture
        turn = None
    return image if turn is None else image.transpose(turn)


def open_image(image, record_id: str, max_megapixels: float = 100.0) -> Image.Image:
    """A picture, given as PIL image, Picture, path or bytes -> RGB PIL image, as a camera was held (EXIF), of 8 bits;
    transparency becomes white.

    Raises ValueError naming the record when the picture is missing, truncated, absurdly large or thin, in none of
    PICTURE_FORMATS, or of numbers whose range nobody knows.
    """
    try:
        image = image.read() if isinstance(image, Picture) else image
        if not isinstance(image, Image.Image):
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=PICTURE_FORMATS)
        width, height = image.size  # known from the header: nothing is decompressed before the checks
        if width * height > max_megapixels * 1e6:
            raise ValueError(f"{width} x {height} is over {max_megapixels:.0f} megapixels; shrink the picture")
        if max(width, height) > 200 * min(width, height):  # the limit of Qwen's image processors
            raise ValueError(f"{width} x {height} is thinner than 1:200; crop or pad the picture")
        image = _turned(image)
        if image.mode in ("I", "F"):
            raise ValueError(f"its pixels are of mode {image.mode}, whose range nobody knows; save it as 8 bits")
        if image.mode.startswith("I;16"):  # (convert would cut at 255, and all would be white)
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
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
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            self.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
            vocab = self.tokenizer.get_vocab()
            self.image_id: int = vocab["<|image_pad|>"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: not a Qwen vision-language model, or incomplete, and nothing of that name can "
                             f"be fetched ({error!r}); --model wants such a model's folder or hub id") from error
        if max_pixels is not None:
            smallest = self.image_processor.size["shortest_edge"]  # (areas, in spite of the names)
            if max_pixels < smallest:
                raise ValueError(f"max_pixels {max_pixels} is below the image processor's minimum {smallest}")
            self.image_processor.size = {"shortest_edge": smallest, "longest_edge": max_pixels}
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
        messages = [{"role": "system", "content": [{"type": "text", "text": PROMPTS[style]}]},
                    {"role": "user", "content": record.content}]
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


# --- one command: source in, usable records out ----------------------------------------------------------------------


def same_picture(a: Image.Image, b: Image.Image) -> bool:
    """Are these one picture but for its encoding and size? Both are brought to the smaller size and blurred a little.

    The largest difference of grey is then, measured on drawings and screenshots: at most 11 of 255 after JPEG of
    quality 75, halving, and both; 19 and more (mostly above 40) where one digit differs. Where that copy is halved
    too, a fifth of the pairs pass for one picture (type of 10 to 16 pixels): a problem dropped in vain, no leak.
    """
    size = min(a.size, b.size, key=lambda size: size[0] * size[1])
    a, b = (np.asarray(image.convert("L").resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.BoxBlur(1.5)),
                       np.int16) for image in (a, b))
    return np.abs(a - b).max() <= 12


def _thumbnail(image: Image.Image) -> np.ndarray:
    """[256] int16, 16 x 16 greys: differs by at most 10 for one picture encoded or halved, and hardly ever for two."""
    return np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BICUBIC), np.int16).ravel()


@dataclass(frozen=True)
class Held:
    """What the benchmarks hold: B pictures in order of their shape."""

    ids: frozenset[str]
    shapes: np.ndarray  # [B] width / height, ascending
    thumbnails: np.ndarray  # [B, 256] int16
    pictures: list[tuple]  # [B] (picture, id), opened again when the thumbnails agree

    def find(self, record: Record, images: list[Image.Image]) -> Dropped | None:
        """The record, dropped, if a benchmark holds its id or one of its pictures (given opened)."""
        if record.id in self.ids:
            return Dropped(record.id, f"in {record.id.partition('-')[0]}, by id", "the benchmark has this id")
        for image in images:
            shape, thumbnail = image.width / image.height, _thumbnail(image)
            low, high = np.searchsorted(self.shapes, [shape / 1.03, shape * 1.03])  # halving rounds odd sizes
            near = np.arange(low, high)
            for cells in (slice(None, None, 17), slice(None)):  # the diagonal rules nearly all out at 1/16 of the cost
                near = near[np.abs(self.thumbnails[near, cells] - thumbnail[cells]).max(axis=1) <= 12]
            for picture, held_id in (self.pictures[i] for i in near):
                if same_picture(image, open_image(picture, held_id)):
                    return Dropped(record.id, f"in {held_id.partition('-')[0]}, by picture", f"a picture of {held_id}")
        return None


def read_held(benchmarks: str) -> Held:
    """`mathvista,mathverse=local/path,...` -> what these hold."""
    ids: set[str] = set()
    found: list[tuple] = []

    def look(made: Record | Dropped) -> list[tuple]:
        seen = []
        if getattr(made, "reason", "") == "picture unreadable":
            print(f"--exclude cannot look for the picture of {made.id}: {made.detail}", file=sys.stderr)
        for picture in made.images:
            try:
                image = open_image(picture, made.id)
            except ValueError as error:
                print(f"--exclude cannot look for it: {error}", file=sys.stderr)
                continue
            seen.append((image.width / image.height, _thumbnail(image), (picture, made.id)))
        return seen

    for benchmark in filter(None, benchmarks.split(",")):
        name, _, path = benchmark.partition("=")
        if name not in BENCHMARKS:
            raise ValueError(f"--exclude {name}: no benchmark of that name; there are {', '.join(BENCHMARKS)}")
        rows = tqdm(BENCHMARKS[name](path or None), desc=f"reading {name}", unit=" records")
        own: set[str] = set()
        with ThreadPoolExecutor() as pool:
            for batch in batches(rows):
                own.update(made.id for made in batch if getattr(made, "reason", "") != "malformed row")  # a made-up id
                found += itertools.chain.from_iterable(pool.map(look, batch))
        ids |= own
        if not own:
            raise ValueError(f"--exclude {benchmark}: no row there is one of {name}, and nothing would be excluded; "
                             "give the benchmark as it is published")
    found.sort(key=lambda item: item[0])
    return Held(frozenset(ids), np.array([shape for shape, _, _ in found]),
                np.array([thumbnail for _, thumbnail, _ in found], np.int16).reshape(-1, 256),
                [picture for _, _, picture in found])


def save_usable(made: Iterable[Record | Dropped], out: str, held: Held | None = None, **about) -> dict:
    """Save the records whose golds and pictures can be used and that no benchmark holds -> the report.

    Beside `out`, x.parquet: x.report.json, `about` and the counts; x.dropped.jsonl, a line for each other record.
    """
    from rewards import judged  # (rewards imports this file)

    def examine(item: Record | Dropped) -> Record | Dropped:
        if isinstance(item, Dropped):
            return item
        try:
            images = [open_image(image, item.id) for image in item.images]
        except ValueError as error:
            return Dropped(item.id, "picture unreadable", str(error))
        return held and held.find(item, images) or item

    def usable() -> Iterator[Record]:
        for batch in batches(tqdm(made, desc=Path(out).name, unit=" records")):
            for item in map(judged, pool.map(examine, batch)):  # (math-verify answers one thread at a time)
                if isinstance(item, Dropped):
                    dropped[item.reason] += 1
                    lines.write(json.dumps({"id": item.id, "reason": item.reason, "detail": item.detail}) + "\n")
                else:
                    kept[item.answer_type] += 1
                    yield item
        if not kept:
            raise ValueError(f"none of the {dropped.total()} records can be used; {dropped_to} says why")

    kept, dropped = Counter(), Counter()
    dropped_to, report_to = (Path(out).with_suffix(end) for end in REPORTS)
    dropped_to.parent.mkdir(parents=True, exist_ok=True)
    with open(dropped_to, "w") as lines, ThreadPoolExecutor() as pool:
        save_records(out, usable())
    report = about | {"out": out, "read": kept.total() + dropped.total(), "kept": kept.total(),
                              "answer_types": dict(kept.most_common()), "dropped": dict(dropped.most_common())}
    report_to.write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Read a source into one file of records that can be verified.")
    parser.add_argument("source", choices=[*SOURCES, "any"], help="any: every file format that load_records reads")
    parser.add_argument("--input", required=True, help="hub id (perhaps with @split), file, or folder")
    parser.add_argument("--out", required=True, help="Parquet file to write")
    parser.add_argument("--exclude", default="", help="benchmarks whose problems to drop, by id and by picture: "
                        f"{','.join(BENCHMARKS)}; name=PATH reads a local copy, name=ID@SPLIT another split")
    args = parser.parse_args()
    if not args.out.endswith(".parquet"):
        raise ValueError(f"--out {args.out}: give a file that ends in .parquet")
    about = {"source": args.source, "input": args.input, "exclude": args.exclude}
    held = read_held(args.exclude) if args.exclude else None
    if held:
        about["looked_for"] = {"ids": len(held.ids), "pictures": len(held.pictures)}
    made = SOURCES.get(args.source, read_any)(args.input)
    name = Path(args.input).stem  # of rows that do not say where they are from: a ladder's card counts by source
    made = (item if isinstance(item, Dropped) or item.source else dataclasses.replace(item, source=name)
            for item in made)
    report = save_usable(made, args.out, held, **about)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    from data import main as command  # this very file, as the module that rewards imports: one class Record, not two

    try:
        command()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
