"""What a problem is: the record, what the model is fed of it, and where records come from.

    Record         one problem: question, pictures, gold answer, and what was measured of it
    Processor      tokenizer and image processor of a checkpoint: Record -> Prompt -> a padded batch
    load_records   every file format people bring, told apart by the keys of a row
    DATASETS       the published training sets and benchmarks, one entry each
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
import glob
import io
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError
from pyarrow.dataset import ParquetFragmentScanOptions
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from rewards import (PROMPTS, RULES, chosen, gold_fault, infer_answer_type, normal_text, parse_number, quantity,
                     read_gold, stated)

T = TypeVar("T")
datasets.disable_progress_bars()  # (ours tell of records)
QUIET = os.environ.get("RANK", "0") != "0"  # of several processes the first alone shows how far it is


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
        """Settle golds and answer type. ValueError naming the record for a gold that no rule can read."""
        try:
            answer, choices, kind = read_gold(self.answer, self.choices, self.answer_type)
            for name, (_, high, what) in NUMBERS.items():
                value = getattr(self, name)
                if value is not None and not 0 <= value <= high:
                    raise ValueError(f"its {name} is {value}; it is {what}, from 0 to {high:g}")
        except ValueError as error:
            raise ValueError(f"record {self.id}: {error}") from None
        vars(self).update(answer=answer, choices=choices, answer_type=kind, images=tuple(self.images))  # (it is frozen)

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


NUMBERS = {"precision": (int, 15, "the decimals to compare"), "difficulty": (float, 1, "1 - pass rate"),
           "complexity": (float, 1e9, "a mean length in tokens"), "stage": (int, 8, "a rung of the ladder")}


# --- what the model is fed --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Prompt:
    """One encoded problem, ready for the model."""

    ids: torch.Tensor  # [T] int64, ends where the response begins
    pixels: torch.Tensor | None  # [N, D] float32, all patches of all its pictures
    grid: torch.Tensor | None  # [I, 3] int64, patches of each picture in time, height, width


PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow has more, and runs Ghostscript for EPS
MAX_MEGAPIXELS = 100


def open_image(image, record_id: str) -> Image.Image:
    """A PIL image, Picture, path or bytes -> RGB PIL image of 8 bits, as a camera was held; transparency becomes white.

    Raises ValueError naming the record: missing, truncated, too large or thin, no PICTURE_FORMATS, of unknown range."""
    try:
        image = image.read() if isinstance(image, Picture) else image
        if not isinstance(image, Image.Image):
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=PICTURE_FORMATS)
        width, height = image.size  # known from the header: nothing is decompressed before the checks
        if width * height > MAX_MEGAPIXELS * 1e6:
            raise ValueError(f"{width} x {height} is over {MAX_MEGAPIXELS} megapixels; shrink the picture")
        if max(width, height) > 200 * min(width, height):  # the limit of Qwen's image processors
            raise ValueError(f"{width} x {height} is thinner than 1:200; crop or pad the picture")
        image.load()  # a truncated one fails here, and not below
        with contextlib.suppress(Exception):  # of broken EXIF, for which Pillow raises all there is
            image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F"):
            raise ValueError(f"its pixels are of mode {image.mode}, whose range nobody knows; save it as 8 bits")
        if image.mode.startswith("I;16"):  # (convert would cut at 255, and all would be white)
            values, clear = np.asarray(image), image.info.get("transparency")
            if 0 < values.max() < 4096:
                raise ValueError("its 16 bits hold numbers below 4096: 12 bits, or a dark picture? save it as 8 bits")
            grey = (values >> 8).astype(np.uint8)
            image = Image.fromarray(grey if clear is None else np.where(values == clear, np.uint8(255), grey))
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: broken PNG chunks
        told = f"{error}{what_it_is(image)}" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(f"record {record_id}: cannot use its picture: {told}") from error


class Processor:
    """Tokenizer and image processor of a Qwen-VL checkpoint.

    Placeholders are written by hand, grid.prod() / merge_size^2 to a picture, because transformers' own processor
    class demands torchvision for videos, which we never feed."""

    VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")

    def __init__(self, path: str, max_pixels: int | None = None):
        """path: a Hugging Face folder or hub id; max_pixels: area above which pictures are shrunk (None: its own)."""
        from transformers import AutoTokenizer
        from transformers.models.auto.image_processing_auto import AutoImageProcessor  # (the top has a stand-in)

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            self.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
            self.own_size = self.image_processor.size  # (of the model's own pictures: what a checkpoint is saved with)
            if self.tokenizer.chat_template is None:
                self.tokenizer.chat_template = template_beside(path)
            vocab = self.tokenizer.get_vocab()
            self.image_id: int = vocab["<|image_pad|>"]
        except (OSError, ValueError, KeyError, TypeError) as error:
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

        Raises ValueError naming the record: more marks than pictures or fewer, the model's own tokens, max_tokens."""
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

    def collate(self, prompts: list[Prompt]) -> dict[str, torch.Tensor]:
        """Prompts, padded on the left -> the model's inputs: input_ids, attention_mask, mm_token_type_ids [B, T], and
        pictures_of them."""
        padded = partial(pad_sequence, batch_first=True, padding_side="left")
        ids = padded([p.ids for p in prompts], padding_value=self.pad_id)
        mask = padded([torch.ones_like(p.ids) for p in prompts])
        # Left out, mm_token_type_ids fails silently: image tokens would get the positions of text.
        batch = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == self.image_id).int()}
        return batch | pictures_of(prompts)


def pictures_of(prompts: list[Prompt]) -> dict[str, torch.Tensor]:
    """pixel_values [N, D] and image_grid_thw [I, 3] of prompts in row order; {} where none has pictures."""
    grids = [p.grid for p in prompts if p.grid is not None]
    pixels = [p.pixels for p in prompts if p.pixels is not None]
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)} if grids else {}


# --- problems of a run ------------------------------------------------------------------------------------------------

class Dropped(NamedTuple):
    """A record that cannot be used."""

    id: str
    reason: str  # short and stable, to be counted: "null gold"
    detail: str  # where it stands, what is wrong, what to do
    images: tuple = ()  # --exclude needs a benchmark's pictures also where no rule can judge the gold
    meta: dict = {}  # (never changed) and a benchmark's sub-scores are over all of its rows


def load_records(path_or_id: str, limit: int | None = None, skip_bad: bool = False) -> list[Record]:
    """The problems of a file, of a folder, or of a hub id with its split (`org/name@train`), at most `limit` of them.

    Files: .parquet; .jsonl; .json, lines, a list of rows or rows by id; .csv; .tsv (VLMEvalKit's too). A folder: its
    ladder.parquet, else all its files, if they are of one split; those of a split (`folder@train`); what `save_to_disk`
    wrote. Pictures lie in the file or beside it: paths start at its folder and may not leave it.
    Raises ValueError: for a file that cannot be read; or one for all records that cannot be used, naming file, record
    and remedy. skip_bad drops such records instead, and prints them. No picture is opened: check_records does that."""
    good: list[Record] = []
    bad: list[str] = []
    with tqdm(read_any(path_or_id), f"reading {Path(path_or_id).name}", unit=" records", disable=QUIET) as bar:
        for made in bar:
            if isinstance(made, Dropped):
                bad.append(made.detail)
            else:
                good.append(made)
            if limit is not None and len(good) >= limit:
                break
    if not good and not bad:
        raise ValueError(f"{path_or_id}: holds no records")
    return raise_or_skip(path_or_id, good, bad, skip_bad)


def raise_or_skip(name: str, good: list[T], bad: list[str], skip_bad: bool) -> list[T]:
    """The good records, unless there are bad ones that may not be skipped: one ValueError for these."""
    count = f"{name}: {len(bad)} of {len(good) + len(bad)} records cannot be used"
    if bad and not (skip_bad and good):
        more = [f"and {len(bad) - 10} more"] if len(bad) > 10 else []
        remedy = "mend or remove them" if skip_bad else "mend or remove them, or pass --skip-bad"
        raise ValueError("\n  ".join([f"{count}:", *bad[:10], *more]) + f"\n{remedy}")
    if bad:
        print(*(f"dropped: {line}" for line in bad), f"{count} and were dropped", sep="\n", file=sys.stderr)
    return good


def verifiable(item: Made) -> Made:
    """The record, or why no rule can read its gold. Asks math-verify: several threads may do so at once."""
    fault = gold_fault(item) if isinstance(item, Record) else None
    return Dropped(item.id, "unverifiable", fault, item.images, item.meta) if fault else item


def check_records(processor: Processor, records: list[Record], style: str, max_tokens: int | None = None,
                  skip_bad: bool = False) -> list[Record]:
    """The records whose golds can be judged and whose prompts can be encoded, as training will (nothing less finds a
    truncated picture). Raises one ValueError for all the others; skip_bad drops and prints them instead."""
    def fault(record: Record) -> str | None:
        try:
            processor.encode(record, style, max_tokens)
        except ValueError as error:
            return str(error)
        return gold_fault(record)

    faults = in_threads(fault, records, "checking")
    good = [record for record, found in zip(records, faults) if not found]
    return raise_or_skip("problems", good, [found for found in faults if found], skip_bad)


def in_threads(work: Callable[[Any], T], items: Sequence, label: str, unit: str = "problem", delay: int = 0) -> list[T]:
    """What work makes of each item, with a bar. (Pillow decodes outside the GIL; several workers check formulas.)"""
    with ThreadPoolExecutor() as pool:
        made = (one for batch in batches(items, 1000) for one in pool.map(work, batch))  # (what waits takes memory)
        return list(tqdm(made, label, len(items), unit=unit, delay=delay, disable=QUIET))


# === the fold: below, every way a record comes in and goes out: files, others' formats, published sets, leaks =========

# --- files and folders ------------------------------------------------------------------------------------------------

# Format of a row: the key that tells it, looked for in this order -> who writes such rows.
FORMATS = {"message": "lmm-r1", "messages": "ms-swift, LLaMA-Factory", "conversations": "LLaVA, VLM-R1",
           "reward_model": "verl", "prompt": "TRL", "problem": "EasyR1, multimodal-open-r1",
           "question": "ours, the fields of Record", "query": "older ms-swift"}
OTHERS_COLUMNS = ("problem", "prompt", "solution")  # what save_records adds to our own, for EasyR1 and TRL
REPORTS = (".dropped.jsonl", ".report.json")  # what save_usable writes beside x.parquet; no data
NO_DATA = {"dataset_info.json", "dataset_infos.json", "state.json", "settings.json", "dropped.json", "config.json"}
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
SPLITS = {"train": "train", "training": "train", "trainset": "train", "test": "test", "testing": "test",
          "testset": "test", "testmini": "testmini", "val": "val", "valid": "val", "validation": "val", "dev": "dev",
          "eval": "eval", "heldout": "heldout", "holdout": "heldout"}  # words in names of files
BATCH = 64  # rows in memory at once, and in a row group when written: with pictures far below Arrow's limit of 2 GiB
Rows = Iterator[tuple[int, Any]]  # numbered: objects, lines of JSON that hold one, or what is wrong with a row
Table = tuple[str, tuple[Path, ...], Rows]  # name of a file or hub id, where its pictures may lie, its rows
Made = Record | Dropped
Convert = Callable[[dict], dict | Dropped]  # of a row -> fields of Record, values and pictures as they stand in the row


def read_any(path_or_id: str, images: str | None = None) -> Iterator[Made]:
    """Every record of a file, folder or hub id in any of FORMATS, one at a time; images: where its pictures lie, if not
    beside it. What was taken off or set aside is said at the end."""
    said = Counter[str]()
    try:
        yield from read_tables(find_tables(path_or_id, images=images), partial(any_fields, said=said))
    finally:
        for what, count in () if QUIET else (+said).most_common(5):
            tqdm.write(f"{path_or_id}: of {count} records {what}", file=sys.stderr)


def read_tables(tables: Iterable[Table], convert: Convert, source: str = "") -> Iterator[Made]:
    """Rows -> records, one at a time. Equal ids of two files are told apart by these, unless the problem is one, or the
    source published. ValueError naming the file for one that cannot be read."""
    seen: dict[str, tuple[str, int]] = {}  # id -> its file, and hash of its text
    for name, folders, rows in tables:
        unit = "line" if name.endswith((".jsonl", ".csv", ".tsv")) else "record"
        try:
            for number, row in rows:
                made = make_record(row, convert, folders, f"{source or Path(name).stem}-{number}", source)
                file, text = seen.get(made.id, (name, 0))
                if isinstance(made, Record) and file != name and text != hash(made.text) and not source:
                    made = dataclasses.replace(made, id=told_apart(made.id, name))
                if isinstance(made, Record) and made.id in seen:
                    told = f"the id {made.id!r} is taken; give every record an id of its own"
                    made = Dropped(made.id, "repeated id", told, made.images)
                if isinstance(made, Dropped):
                    made = made._replace(detail=f"{name}, {unit} {number}: {made.detail}")
                else:
                    seen[made.id] = name, hash(made.text)
                yield made
        except Exception as error:  # of the whole file; `datasets` and Arrow have a dozen classes
            cause = error.__cause__ or error  # (`datasets` wraps what Arrow and the system say)
            if type(error) is ValueError:  # (our own word)
                raise ValueError(f"{name}: {error}") from error
            remedy = "was it copied whole? is its suffix right? has it a type of column that `datasets` does not know?"
            if name.endswith(".parquet") and getattr(cause, "errno", None):
                remedy = f"it is copied to HF_DATASETS_CACHE, now {datasets.config.HF_DATASETS_CACHE}: is there room?"
            raise ValueError(f"{name}: cannot be read: {cause}; {remedy}") from error


def told_apart(record_id: str, path: str) -> str:
    """The id of a record, when a file read before has it too."""
    return f"{Path(path).parent.name}/{Path(path).stem}/{record_id}"


def make_record(row, convert: Convert, folders: tuple[Path, ...], made_id: str, source: str) -> Made:
    """One row -> its record, or why it cannot be used; the caller adds where. Here every value gets its type."""
    record_id, reason, images, meta = made_id, "malformed row", (), {}  # reason: to drop it if the next lines fail
    try:
        fields = convert(parsed(row))
        if isinstance(fields, Dropped):
            return fields._replace(id=made_id)
        own_id = fields.pop("id", "")
        if own_id != "":
            record_id = f"{source}-{text_of(own_id, 'id')}" if source else text_of(own_id, "id")
        meta = read_meta(fields.pop("meta", {}), fields.pop("others", {}))
        reason = "picture unreadable"
        images = read_pictures(fields.pop("images", None), folders)
        reason = "no question"
        question = fields.pop("question", None)
        if isinstance(question, (int, float)):
            raise ValueError(f"its question is {question}; write a text")
        question = text_of(question, "question")
        reason = "malformed row"
        fields = {"source": source} | fields | {"choices": read_choices(fields.get("choices", ()))}
        fields |= {name: read_number(fields[name], name) for name in NUMBERS if name in fields}
        fields |= {name: text_of(fields[name], name) for name in ("source", "answer_type") if fields.get(name)}
        gold = fields.pop("answer", None)
        golds = fields.pop("answers", None) or [gold]  # any of these is right
        reason = "null gold" if golds == [None] or str(golds).strip(" []()'\"") in NOTHING else "unverifiable"
        kind = given = fields.pop("answer_type", "")
        if len(golds) > 1:
            gold = tuple(read_answer(item)[0] for item in golds)
        else:
            gold, kind = read_answer(golds[0], given)
        kind = given if fields["choices"] else kind  # (the list of one option, [1, 2], is that option)
        record = Record(record_id, question, gold, images, answer_type=kind, meta=meta, **fields)
        reason = "malformed row"  # a lone surrogate, half of a cut emoji, would fail much later, and so would dates
        json.dumps([record.id, record.source, record.text, record.golds, record.meta], ensure_ascii=False).encode()
        reason = "picture marks"
        marks = record.text.count("<image>")
        named = not images and re.search(r"<image ?\d+>", record.text)
        if named or marks and marks != len(images):
            raise ValueError(f"{marks} <image> marks for {len(images)} pictures; write a mark for each, or none")
        return record
    except (OSError, ValueError, SyntaxError) as error:  # OSError: no path, such as base64 without `data:`
        return Dropped(record_id, reason, str(error)[:500], images, meta)
    except (AttributeError, KeyError, IndexError, OverflowError, TypeError, RecursionError, MemoryError) as error:
        return Dropped(record_id, reason, f"it is not as {source or 'its format'} writes it: {error!r}", images, meta)


def parsed(row) -> dict:
    """A row, or a line of JSON -> its keys and values; a null is a key left out. Raises what is wrong with it."""
    row = json.loads(row) if isinstance(row, bytes) else row
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with keys, not a {type(row).__name__}")
    return {key: value for key, value in row.items() if value is not None}


# --- values: what a field may be --------------------------------------------------------------------------------------

NOTHING = ("", "nan", "NaN")  # what a table's empty cell becomes on its way through pandas
PICTURE_PARTS = ("bytes", "path", "url", "image", "image_url", "filename", "file_name", "base64", "data")  # keys
BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # how PNG, JPEG, GIF and WebP begin in it


def text_of(value, name: str) -> str:
    """A text, or a number's digits. ValueError naming the field for nothing, and for what is neither."""
    if isinstance(value, float) and math.isfinite(value):
        value = f"{value:.15g}"
    elif type(value) is int:  # (and no bool)
        value = str(value)
    if value is None:
        raise ValueError(f"it has no {name}")
    if str(value).strip() in NOTHING:
        raise ValueError(f"its {name} is empty: {value!r}")
    if not isinstance(value, str):
        raise ValueError(f"its {name} is {str(value)[:80]!r}, a {type(value).__name__}; write a text or a number")
    return value


def read_number(value, name: str) -> float:
    """One of NUMBERS, or its digits: 2.0, as pandas writes an int beside a null, is 2."""
    kind = NUMBERS[name][0]
    with contextlib.suppress(OverflowError, ValueError):
        given = value if type(value) in (int, float) else float(text_of(value, name))
        if kind(given) == given and abs(given) < 2**63:
            return kind(given)
    raise ValueError(f"its {name} is {value!r}, where a number of type {kind.__name__} is needed")


def read_answer(answer, kind: str = "") -> tuple[str | tuple[str, ...], str]:
    """A gold as data has it -> the gold, or all of which any is right; and its answer type, where a list tells that.

    A list of numbers is one answer, such as a box; one of letters a multi-select; of other texts any is right."""
    if isinstance(answer, str) and kind != "list" and re.match(r"""\s*\[\s*['"]""", answer):  # (as a table has it)
        answer = literal(answer)
    if not isinstance(answer, (list, tuple)):
        return text_of(answer, "answer"), kind
    texts = tuple(text_of(item, "answer") for item in answer)
    letters = [text.strip("(). ").upper() for text in texts]
    if len(texts) > 1 and kind in ("", "choice") and all(re.fullmatch("[A-Z]", letter) for letter in letters):
        return ", ".join(letters), "choice"
    values = {parse_number(text) for text in texts}
    numbers = not any(isinstance(item, str) for item in answer) or len(values - {None}) == len(texts)  # (0.5 is 1/2)
    if len(texts) > 1 and kind in ("", "list") and numbers:
        return f"[{', '.join(texts)}]", "list"
    return texts if len(texts) > 1 else texts[0], kind


def read_choices(value) -> tuple[str, ...]:
    """The texts of the options, in order, of the shapes that data has them in: a list; an object of letters, or of
    `text` and `label`; a list of objects; any of these, or lettered options, in one text. Empty last ones go."""
    if isinstance(value, str) and (value := value.strip()) in NOTHING:
        value = []
    elif isinstance(value, str):
        value = literal(value) if value[0] in "[{" else split_options(value)[1]
        if value == ():
            raise ValueError("its choices are one text; write a list of texts")
    if isinstance(value, dict) and value.keys() >= {"label", "text"}:
        labels, texts = list(value["label"]), list(value["text"])
    elif isinstance(value, dict):
        labels, texts = list(value), list(value.values())
    elif not isinstance(value, (list, tuple)):
        raise ValueError(f"its choices are {str(value)[:80]!r}; write a list of texts")
    else:
        items = [list(item.values()) if isinstance(item, dict) and len(item) == 2 else item for item in value]
        pairs = bool(items) and all(isinstance(item, (list, tuple)) and len(item) == 2 for item in items)
        if pairs and not re.fullmatch(r"\(?[A-Z][).:]?", str(items[0][0])):  # ({"text": .., "label": ..})
            items = [item[::-1] for item in items]
        labels = [item[0] for item in items] if pairs else list(ascii_uppercase)
        texts = [item[1] for item in items] if pairs else items
    while texts and (texts[-1] is None or str(texts[-1]).strip() in NOTHING):
        texts.pop()
    letters = [str(label).strip("(). :").upper() for label in labels[:len(texts)]]
    if len(texts) > len(ascii_uppercase):
        raise ValueError(f"it has {len(texts)} choices, more than there are letters")
    if letters != list(ascii_uppercase[:len(texts)]):
        raise ValueError(f"its choices are called {', '.join(map(repr, labels))}; call them A, B, ..., or write a list")
    texts = [text_of(text, f"choice {letter}") for letter, text in zip(letters, texts)]
    own = [re.match(rf"\s*\(?{letter}[).:：．]\s*(?=\S)", text) for letter, text in zip(letters, texts)]
    return tuple(text[mark.end():] if mark and all(own) else text for mark, text in zip(own, texts))


def literal(text: str):
    """A list or an object that a table keeps as its text, in JSON's or in Python's way."""
    if re.search(r"""['"]\s+['"]""", text):
        raise ValueError(f"{text[:80]!r} lacks commas (a list of numpy's); write a list")
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


def read_meta(value, others: dict) -> dict:
    """`meta`, an object or its JSON, and the row's other keys; those we use are checked: a run would fail on them."""
    meta = json.loads(value) if isinstance(value, str) else value
    if not isinstance(meta, dict):
        raise ValueError(f"its meta is {str(meta)[:80]!r}; write an object")
    meta = others | meta
    facts, rollouts = meta.get("facts") or [], meta.get("rollouts", [{}])
    if not isinstance(facts, list) or not all(isinstance(fact, str) and fact.strip() for fact in facts):
        raise ValueError(f"its meta.facts are {str(facts)[:80]!r}; write texts such as 'red 3', or rename the key")
    told: dict[str, tuple] = {"answer": (str, type(None)), "accuracy": (int, float), "tokens": (int, float)}
    good = isinstance(rollouts, list) and rollouts and all(
        isinstance(rollout, dict) and all(isinstance(rollout.get(key), kind) for key, kind in told.items())
        for rollout in rollouts)
    if "rollouts" in meta and not good:
        raise ValueError("its meta.rollouts are not as curriculum.py writes them: answer, accuracy and tokens of each; "
                         "rename the key")
    return meta


def read_pictures(value, folders: tuple[Path, ...]) -> tuple:
    """One or many pictures as data has them -> Pictures, bytes, and absolute paths inside one of `folders`.

    Raises ValueError naming each one that is none: what is named is seen, or the model would train blind."""
    if isinstance(value, str) and value.startswith("["):
        value = listed(value)
    many = value if isinstance(value, (list, tuple)) else [] if value in (None, "") else [value]
    return tuple(read_picture(item, folders) for item in many)


def read_picture(value, folders: tuple[Path, ...]) -> bytes | str | Picture:
    """{bytes, path}, a path, a file: or data: URL, base64, bytes, a Picture -> one of bytes, path, Picture."""
    held = [value[key] for key in PICTURE_PARTS if value.get(key)] if isinstance(value, dict) else []
    if held:  # (which may be an object, too: {"image_url": {"url": ..}})
        return read_picture(held[0], folders)
    if not isinstance(value, (bytes, str, Picture)) or not value:
        raise ValueError(f"its picture is {str(value)[:80]!r}; write a path, or {{'bytes': ..}}, or leave the key out")
    if not isinstance(value, str):
        return value
    if value.startswith(("data:", *BASE64)):
        return base64.b64decode("".join(value.rpartition(",")[2].split()), validate=True)
    if value.startswith(("http://", "https://")):
        raise ValueError(f"its picture {value} is on the web; download it to a place beside the file")
    value = value.removeprefix("file://")
    tried = [folder / (value + suffix) for suffix in ("", ".jpg", ".png") for folder in folders]  # (SceMQA has none)
    path = os.path.realpath(next(filter(Path.is_file, tried), tried[0]))  # follows symbolic links
    if not any(Path(path).is_relative_to(os.path.realpath(folder)) for folder in folders):
        raise ValueError(f"its picture {value} is outside {folders[0]}; name its folder with `data.py any --images`, "
                         "or move the pictures beside the file")  # data from others must not open our other files
    return path


# --- where rows come from ---------------------------------------------------------------------------------------------

def find_tables(path_or_id: str, split: str = "", images: str | None = None) -> Iterator[Table]:
    """The files, or the hub data set. split: of a published one, whose rows are numbered through all its files."""
    place, _, asked = path_or_id.rpartition("@")
    if not Path(path_or_id).exists() and place and Path(place).is_dir():
        path_or_id, split = place, asked
    path, numbers = Path(path_or_id), itertools.count(1)
    if not path.exists():
        yield hub_table(path_or_id, split)
        return
    extra = [Path(images)] if images else []
    if extra and not extra[0].is_dir():
        raise ValueError(f"--images {images}: no such folder")
    saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    for file in [path] if saved or path.is_file() else find_files(path, split, strict=split == asked):
        rows = saved_rows(path, split) if saved else file_rows(file)
        if split:
            rows = ((number, row) for (_, row), number in zip(rows, numbers))
        folders = (*extra, file.parent, file.parent / "images", file.parent / "data_images", path)
        yield str(file), tuple(filter(Path.is_dir, folders)), rows


def find_files(folder: Path, split: str, strict: bool = False) -> list[Path]:
    """The data in a folder: its ladder, else all its files, which must be of one split; with a split the files of that,
    however deep. strict: a lone file of another name will not do."""
    files = [file for file in sorted(folder.rglob("*") if split else folder.iterdir())
             if file.suffix in SUFFIXES and not file.name.endswith(REPORTS) and file.name not in NO_DATA
             and not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)]
    if not files:
        inner = sorted({file.parent.name for file in folder.glob("*/*") if file.suffix in SUFFIXES})
        raise ValueError(f"{folder}: no {', '.join(SUFFIXES)} in this folder; give the one that holds them"
                         + f" ({', '.join(inner)}?)" * bool(inner))
    if not split:
        files = [file for file in files if file.name == "ladder.parquet"] or files
        found = set().union(*map(splits_of, files))
        if len(found) > 1 or found - {"train"} and not all(map(splits_of, files)):  # (a test split that is trained on)
            raise ValueError(f"{folder} holds the splits {', '.join(sorted(found))}; give one, as in {folder}@train, "
                             "or one of its files")
        return files
    of_split = [file for file in files if re.fullmatch(rf"({split})([-_]\d+-of-.*)?", file.stem)  # testmini is not test
                or strict and SPLITS.get(split, split) in splits_of(file)
                or file.parent != folder and file.parent.name == split]
    chosen = [file for file in of_split or files if file.suffix == ".parquet"] or of_split or files
    if not of_split and (strict or len(chosen) > 1):  # a lone file has any name
        names = ", ".join(file.name for file in files[:10])
        raise ValueError(f"{folder}: none of its files is of the split {split}: {names}; give the one that is")
    return chosen


def splits_of(file: Path) -> set[str]:
    """The splits that a file's name speaks of: geo_train, testSet, Train-00000-of-00001."""
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", file.stem).lower().replace("held_out", "heldout"))
    return {SPLITS[word] for word in words if word in SPLITS}


def saved_rows(folder: Path, split: str) -> Rows:
    """Rows of a folder that `save_to_disk` of `datasets` wrote."""
    table = datasets.load_from_disk(str(folder))
    if isinstance(table, dict):
        if split not in table:
            raise ValueError(f"it holds the splits {', '.join(table)}; give one, as in {folder}@{next(iter(table))}")
        table = table[split]
    return enumerate(table_rows(table, str(folder)), 1)


def hub_table(hub_id: str, split: str) -> Table:
    """A hub data set. split: the one to take where hub_id names none."""
    name, _, asked = hub_id.partition("@")
    asked = asked or split
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*@\w+", f"{name}@{asked}"):
        raise ValueError(f"{hub_id}: no such file or folder (a hub id needs its split: org/name@train)")
    try:
        configs = datasets.get_dataset_config_names(name) if split else []
        if asked in configs:
            configs = [asked]  # MathVerse has one of its split's name; MMMU one for each subject, of which all are read
        places = [[name, config] for config in configs] or [[name]]
        tables = [table_rows(datasets.load_dataset(*place, split=asked), "/".join(place)) for place in places]
    except Exception as error:  # of a dozen classes: no network, no such id or split, a gated one, a script
        raise ValueError(f"{hub_id}: neither a file, nor could it be loaded from the hub: {error}") from error
    return hub_id, (Path(datasets.config.HF_CACHE_HOME),), enumerate(itertools.chain(*tables), 1)


def file_rows(file: Path) -> Rows:
    """Numbered rows of one file. Lines of JSON stay bytes: a broken one is then a bad record, not a bad file."""
    if not file.stat().st_size:
        raise ValueError("the file is empty")
    if file.suffix in (".json", ".jsonl"):
        yield from json_rows(file)
    elif file.suffix in (".csv", ".tsv"):
        yield from cell_rows(file)
    elif file.suffix == ".parquet":
        yield from enumerate(parquet_rows(file), 1)
    elif file.suffix in (".xlsx", ".xls"):
        raise ValueError(f"a spreadsheet; make a table of it: python -c \"import pandas; pandas.read_excel('{file}')"
                         f".to_csv('{file}.tsv', sep='\\t', index=False)\"")
    else:
        raise ValueError(f"it is not {', '.join(SUFFIXES)}")


def json_rows(file: Path) -> Rows:
    """Lines of JSON; or a list of rows; or an object of rows by id, or with one list; or SceMQA's object of such lists
    by subject, whose rows get their subject and number. Told by what stands there: many lines are called .json."""
    with open(file, "rb") as lines:
        listed = next((line for line in lines if line.strip()), b"").lstrip(b"\xef\xbb\xbf \t")[:1] == b"["
    if file.suffix == ".json" or listed:
        try:
            yield from enumerate(json_list(json.loads(file.read_bytes()), file.stem), 1)
            return
        except json.JSONDecodeError as error:
            if listed or error.msg != "Extra data":
                raise
    with open(file, "rb") as lines:
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def json_list(found, name: str) -> list:
    by_key = found if isinstance(found, dict) else {"": found}
    if by_key and all(isinstance(row, dict) for row in by_key.values()):
        return [{"id": key} | row for key, row in by_key.items()]
    lists = {key: rows for key, rows in by_key.items() if isinstance(rows, list)}
    scemqa = found is by_key and name in ("multiple_choice", "free_response") and len(lists) == len(found)
    if not scemqa and len(lists) != 1:
        raise ValueError("it holds one object, where a list of rows is needed, or rows by id")
    if not any(lists.values()):
        raise ValueError("it holds no records")
    return [row | {"subject": subject, "number": number} if scemqa and isinstance(row, dict) else row
            for subject, rows in lists.items() for number, row in enumerate(rows, 1)]


def read_cells(file: Path, needed: Iterable[str] = ()) -> Rows:
    """A table, read strictly -> line, and the cells that hold something, of each row; or what is wrong with the row.

    Raises ValueError for a table without the needed columns, and, naming the line, where a quote is not closed at the
    end of a cell: it may have swallowed all after it."""
    csv.field_size_limit(2**31 - 1)  # pictures are longer than csv's 128 KiB
    with open(file, newline="", encoding="utf-8-sig") as lines:
        head = lines.readline()
        lines.seek(0)
        mark = "\t" if file.suffix == ".tsv" else max(",;", key=head.count)  # (; : spreadsheets of half of Europe)
        table, names, line = csv.reader(lines, delimiter=mark, strict=True), [""], 0
        try:
            names = next(table, names)
            if missing := set(needed) - set(names):
                raise ValueError(f"it has no column {', '.join(sorted(missing))}")
            line = table.line_num
            for cells in table:
                if cells and len(cells) != len(names):
                    yield line + 1, ValueError(f"it has {len(cells)} cells, the header {len(names)}; mend the row, "
                                               "or a quote before it")
                elif mark == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
                    raise csv.Error("a cell holds rows")
                elif cells:
                    yield line + 1, {name: cell for name, cell in zip(names, cells) if name and cell}
                line = table.line_num
        except csv.Error as error:
            raise ValueError(f"line {line + 1}: a quote is not closed at the end of its cell ({error}); write two for "
                             "one that is part of a text") from error


def cell_rows(file: Path) -> Rows:
    """Rows of a table, a hint before its question. VLMEvalKit's have an `index`, and the picture in base64 or the index
    of an earlier row that holds it."""
    pictures: dict[str, Any] = {}
    for line, row in read_cells(file):
        if isinstance(row, dict):
            row |= {"question": f"Hint: {row.pop('hint')}\n{row.get('question', '')}"} if "hint" in row else {}
            if index := row.pop("index", ""):
                row |= {"id": index} | ({"own_id": row["id"]} if "id" in row else {})
                if image := row.get("image"):
                    pictures[index] = pictures.get(image, image)
                    row["image"] = ["data:;base64," + code for code in listed(pictures[index])]
        yield line, row


def listed(cell: str) -> list[str]:
    """`[a, b]` or `['a', 'b']` or `a` -> a, b."""
    items = cell[1:-1].split(",") if cell.startswith("[") else [cell]
    return [item.strip(" '\"") for item in items if item]


def parquet_rows(file: Path) -> Iterator[dict]:
    if pq.read_metadata(file).num_rows:  # (none is an error to `datasets`)
        # `datasets` copies a file once into its cache, uncompressed, where any row is found without reading others.
        # It knows a file by path and time of change, which `cp -p` keeps: hence the stamp.
        stamp = f"{file.stat().st_ino}-{file.stat().st_ctime_ns}"
        sparing = ParquetFragmentScanOptions(pre_buffer=False)  # (by default Arrow takes the whole file into memory)
        table = datasets.Dataset.from_parquet(glob.escape(str(file)), config_name=stamp, batch_size=BATCH,
                                              fragment_scan_options=sparing)
        yield from table_rows(table, str(file))


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture in a table of `datasets`, which is mapped and not read: its bytes are fetched when it is opened."""

    table: datasets.Dataset  # with_format("arrow"): nothing is decoded
    name: str  # of the file or hub data set
    row: int
    column: str
    index: int | None  # in a column of lists

    def read(self) -> bytes:
        value = self.table[self.row][self.column][0]
        value = (value if self.index is None else value[self.index]).as_py()
        return value["bytes"] if isinstance(value, dict) else value

    def __str__(self) -> str:
        return f"{self.name}#{self.row}/{self.column}" + ("" if self.index is None else f"/{self.index}")


def table_rows(table: datasets.Dataset, name: str) -> Iterator[dict]:
    """Rows of a table, with a Picture in the place of each picture's bytes: records stay small."""
    def lazy(value, row: int, column: str, index: int | None = None):
        if isinstance(value, list) and index is None:
            return [lazy(item, row, column, i) for i, item in enumerate(value)]
        held = value.get("bytes") if isinstance(value, dict) else value
        return Picture(table, name, row, column, index) if isinstance(held, bytes) else value

    table = table.with_format("arrow")
    rows = itertools.chain.from_iterable(part.to_pylist() for part in table.iter(BATCH))
    for number, row in enumerate(rows):
        yield {column: lazy(value, number, column) for column, value in row.items()}


# --- formats of others ------------------------------------------------------------------------------------------------

PICTURES = """images image image_path image_paths image_file image_files image_url image_urls img imgs img_path imgname
file_name file_names image_file_name picture pictures decoded_image""".split()  # a row's pictures, in this order
LOOKS = re.compile(r"(?i)(?:\w+_)?(?:image|img|picture|photo|figure|screenshot|video)s?"
                   r"(?:_?(?:path|file|name|url|base64|b64|bytes|list|\d+))*")  # the name of a picture
PICTURE_NAME = re.compile(r"(?i)data:image/.*|[^\n]*\.(?:png|jpe?g|webp|gif|bmp|tiff?|svg|heic|avif|mp4)")
GOLDS = ("answers", "answer", "solution", "ground_truth", "gt")
ROLES = {"human": "user", "gpt": "assistant"}
KINDS = {kind: kind for kind in RULES} | {"integer": "number", "float": "number"}  # (as MathVista calls them)
# What other trainers add to a question: where a sentence of theirs may begin, what tells it, and what makes one stay
# that the gold depends on; and the paragraph that stands before a question.
BEGINS = r"""(?x)[.?!]\s+|\n\s*(?!\.+\n)|(?:\\n)+|\s+(?=(?:You\ (?i:first|must)|Let's|A\ conversation
             |(?:Please|First|Output|Answer|Put|Think|Respond|Provide|Remember)\b))"""
INSTRUCTION = re.compile(r"""(?xi)</?(?:think|answer|observe)>|\\+boxed|\#{4}|reasoning\ process
    |own\ line|internal\ (?:monologue|dialogue)|self-reflection|were\ a\ human|(?:think|reason)\ step[ -]by[ -]step
    |with\ reasoning\.|\boption(?:'s)?\ letter|letter\ from\ the\ given|using\ a\ single\ (?:word|number)
    |from\ the\ options\ above|preceding\ multiple|of\ your\ response|in\ json|respond\ in\ the\ following\ format
    |strictly\ follow\ the\ format|between\ user\ and\ assistant|the\ assistant\ (?:first|solves)""")
NEEDED = re.compile(r"(?i)\bround|decimal|\bunits?\b|degree|nearest|<image>|\bfind\b|\bwhich of\b")
PREFACE = re.compile(r"""(?xs)^((?:\s*<image>)*)\s*
    (?:Hint:\ Please|Please\ (?:first|directly)|You\ should\ first|Solve\ the\ following)((?:(?!\n\n|\nQuestion:).)*)
    (?:\n+Question:|\n\n)\s*""")


def any_fields(row: dict, said: Counter) -> dict:
    """A row of any of FORMATS -> fields of Record, as they stand in it. said: counts what is taken off or set aside."""
    ours = {"question", "answer_type"} <= row.keys() and "pid" not in row  # (that is MathVista's)
    left = {key: value for key, value in row.items() if not (ours and key in OTHERS_COLUMNS)}  # what is read is taken
    kind = "question" if ours else next((key for key in FORMATS if key in row), None)
    if kind is None:
        known = ", ".join(f"`{key}` ({writer})" for key, writer in FORMATS.items())
        raise ValueError(f"the keys {', '.join(map(repr, row))} are of no known format; each has its own key: {known}")
    try:
        question, shown, reply = _asked(left, kind)
        fields: dict = {"id": left.pop("id", ""), "images": shown or _pictures(left),
                        "source": left.pop("data_source", left.pop("source", ""))}
        if kind == "question" or str(left.get("answer_type")) in KINDS:
            given = left.pop("answer_type", "")
            fields["answer_type"] = KINDS.get(str(given), given)
        own = ("meta", *NUMBERS) if kind == "question" else ("precision",)  # (others' `difficulty` may be "hard")
        fields |= {name: left.pop(name) for name in own if name in left}
        golds = [name for name in GOLDS if left.get(name, []) != []]
        gold = left.pop(golds[0], None) if reply is None and golds else reply
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"it is not as {FORMATS[kind]} writes `{kind}`: {error!r}") from error
    several = reply is None and golds[:1] == ["answers"]
    if several:
        gold = literal(gold) if isinstance(gold, str) and gold.startswith("[") else gold  # (a table's cell)
        if not isinstance(gold, list) or not gold:
            raise ValueError(f"its answers are {str(gold)[:80]!r}; write a list, of which any is right")
        if str(answer := left.pop("answer", gold[0])) not in map(str, gold):
            raise ValueError(f"its answer {answer!r} is none of its answers, of which any is right: {gold}")
    lettered = [left.pop(letter, "") for letter in ascii_uppercase]  # (VLMEvalKit's columns)
    choices = offered = lettered if any(lettered) else left.pop("choices", left.pop("options", ()))
    if not ours and isinstance(question, str):
        gold = _final_answer(gold)
        question, taken = without_instruction(question.replace("<IMG_CONTEXT>", "<image>"))
        said[f"the instruction of another trainer was taken off: {taken[:70]!r} ..."] += bool(taken)
        question, choices = lift_options(question, gold, offered, kind == "question")
        words = 3 if kind in ("messages", "conversations") else 8  # (a reply is easily a caption)
        if not choices and not fields.get("answer_type") and isinstance(gold, str) and len(gold.split()) > words \
                and infer_answer_type((gold,), ()) == "text":
            raise ValueError(f"its answer {gold[:80]!r} is free text, which can be said in other words; give an "
                             "`answer_type` to have it compared word by word")
        if choices and "pid" in row:
            fields["answer_type"] = ""
        if offered and not choices:
            left["options"] = offered
    rest = {key: value for key, value in left.items() if is_json(value)}
    said[f"keys that the model is not shown went into meta: {', '.join(rest)}"] += bool(rest)
    said[f"keys of no text were left out: {', '.join(left.keys() - rest.keys())}"] += len(left) > len(rest)
    return fields | {"question": question, "choices": choices, "answers" if several else "answer": gold,
                     "others": rest}


def _asked(left: dict, kind: str | None) -> tuple[Any, list, Any]:
    """What a row asks, taken out of it -> its text with `<image>` marks, the pictures that its chat holds, and the gold
    where that stands with it: the reply of a conversation, verl's ground truth."""
    asked, reply = left.pop(kind), None
    if kind in ("problem", "question", "query"):
        return asked, [], left.pop("response", None) if kind == "query" else None
    if kind == "reward_model":
        asked, reply = left.pop("prompt"), asked["ground_truth"]
    turns = asked
    if isinstance(asked, str):
        chat = kind != "prompt" or asked.startswith("[{")
        turns = json.loads(asked) if chat else [{"role": "user", "content": asked}]
    roles, said = [], []
    for turn in turns:
        role = str(turn.get("role", turn.get("from")))
        if role != "system":  # we set our own
            roles.append(ROLES.get(role, role))
            said.append(turn.get("content", turn.get("value")))
    if roles not in (["user"], ["user", "assistant"]):
        raise ValueError(f"its conversation has {len(said)} turns; only one question and its answer can be used")
    text, images = _parts(said[0])
    if len(said) == 2 and not (kind == "messages" and left.keys() & {*GOLDS}):
        reply = said[1]
        if isinstance(reply, list) and isinstance(reply[0], dict):
            reply = _parts(reply)[0]
    return text, images, reply


def _parts(content) -> tuple[str, list]:
    """A message's content -> its text with `<image>` marks, and the pictures that its parts hold, if any."""
    text, images = "", []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        # After a passage through `datasets` every part has every key, null where unused: only `type` tells.
        if part["type"] == "text":
            text += part["text"]
        elif part["type"] in ("image", "image_url"):
            text += "<image>"
            images += [part[key] for key in ("image", "image_url", "url", "path", "source") if part.get(key)][:1]
        else:
            raise ValueError(f"its chat has a part of type {part['type']}; only text and pictures can be used")
    return text, images


def _pictures(left: dict):
    """What a row has under one of PICTURES, or as image_1, image_2, ..., taken out of it. ValueError for what looks
    like a picture under another name, and for two that may be one."""
    if left.get("video") or left.get("videos"):
        raise ValueError("it has a video; only pictures can be used")
    for key in PICTURES:
        if left.get(key, 0) in ("", []):  # a table's cell of a problem without a picture
            left.pop(key)
    named = [key for key in PICTURES if key in left]
    numbered = [key for key in left if re.fullmatch(r"(?:image|img|picture)_?\d+", key)]
    if named[:2] == ["images", "image"] and isinstance(left["image"], str) and left["image"] not in str(left["images"]):
        raise ValueError("it has pictures under images and image; write all into one list, `images`")
    if named and numbered:
        raise ValueError(f"it has pictures under {named[0]} and under {numbered[0]}; write all into one list, `images`")
    if named:
        return left.pop(named[0])
    if numbered:
        return [left.pop(key) for key in sorted(numbered, key=lambda key: int(re.sub(r"\D", "", key)))]
    if re.search(r"(?i)\.(png|jpe?g|webp)$", str(left.get("path", ""))):  # (Video-R1)
        return left.pop("path")
    for key, value in left.items():
        inner = value if isinstance(value, list) else [value]
        looks = LOOKS.fullmatch(key) and isinstance(value, (str, dict, list)) and value
        if looks or any(isinstance(item, Picture) or isinstance(item, str) and PICTURE_NAME.fullmatch(item)
                        for item in inner):
            raise ValueError(f"its {key} {str(value)[:80]!r} looks like a picture, and would not be seen; call it "
                             "`images`, or take it out")
    return None


def without_instruction(question: str) -> tuple[str, str]:
    """A question without what another trainer wrote before and after it, and that: our prompts say their own. Sentences
    that tell of rounding or units stay, for the gold depends on them."""
    before = marks = ""
    told = r"(?i)e\.g\.|<think>|\banswer the question\b|last line"
    if (preface := PREFACE.match(question)) and re.search(told, preface[2]) and not NEEDED.search(preface[2]):
        before, marks = preface[0], preface[1]
    kept = question[len(before):].rstrip()
    starts = [0, *(match.end() for match in re.finditer(BEGINS, kept))]
    while starts[-1] and INSTRUCTION.search(last := kept[starts[-1]:].strip()) and not NEEDED.search(last) \
            and not re.search("[?？=]", last):
        kept = kept[:starts.pop()].rstrip()
    after = question[len(before) + len(kept):]
    return marks + kept, (before + after).strip()


def lift_options(question: str, gold, offered, own: bool) -> tuple[str, Any]:
    """A question whose options stand in its text -> its stem and they, where they hold the gold; else the question, and
    the options beside it: of rows of others only when the gold is a letter, for they were not asked with them."""
    golds = [str(item) for item in (gold if isinstance(gold, list) else [gold])]
    bare = re.sub(r"(?:\s*<image>)+\s*$", "", question)  # (pictures after the options)
    stem, options = split_options(bare)
    held = options and set_off(stem, bare[len(stem):], options) and all(chosen(item, options) for item in golds)
    if held and not (own and offered and options != read_choices(offered)):
        return stem + question[len(bare):].rstrip(), options
    lettered = all(re.fullmatch(r"\W*[A-Za-z]\W*", item) for item in golds)
    return question, offered if own or lettered else ()


def set_off(stem: str, rest: str, options: tuple[str, ...]) -> bool:
    """Do the options stand on lines of their own, or after a whole sentence and to the end? "Is (A) larger than (B)?"
    and "Here are (A) a cat and (B) a dog. Which is larger?" offer none."""
    if stem and re.match(r"(?i)[^\S\n]*\n|\s*(?:options|choices)\b", rest):
        return True
    joined = any(re.search(r"\b(?:and|or|than|is)$", option) for option in options[:-1])
    return bool(re.search(r"[?:.!)？：。]$", stem)) and not joined and not re.search("[?？]", options[-1])


def is_json(value) -> bool:
    try:
        return bool(json.dumps(value))
    except (TypeError, ValueError):
        return False


def _final_answer(solution):
    """A solution, or a list of them -> its last <answer>, else last \\boxed{}, else all of it."""
    if isinstance(solution, list):
        return [_final_answer(item) for item in solution]
    if not isinstance(solution, str):
        return solution
    text = (re.findall(r"<answer>(.*?)</answer>", solution, re.DOTALL) or [solution])[-1].strip()
    text = (stated(text, whole=False) or [text])[-1].removesuffix(".")
    if "\n" in text:  # a whole derivation: no response would ever equal it
        raise ValueError("its solution has neither <answer> nor \\boxed{}; add the final answer as `answer`")
    return text


# --- what a picture or a model lacks ----------------------------------------------------------------------------------

NO_PICTURES = {  # first bytes of what people take for pictures
    rb"(?s).{4}ftyp(?:hei|hev|mif|msf)": "HEIC", rb"(?s).{4}ftypavi": "AVIF", rb"(?s)\s*(?:<\?xml.*)?<svg": "SVG",
    rb"%PDF": "PDF", rb"%!PS": "PostScript", rb"(?i)\s*<(?:!doctype )?html": "a page of HTML",
    rb"version https://git-lfs": "a pointer of Git LFS: run `git lfs pull`"}


def what_it_is(image) -> str:
    """What a file that is none of PICTURE_FORMATS is, and what to do, as far as its first bytes tell."""
    try:
        head = image[:200] if isinstance(image, bytes) else Path(image).open("rb").read(200)
    except (OSError, TypeError):
        return ""
    found = next((name for start, name in NO_PICTURES.items() if re.match(start, head)), "of an unknown format")
    return f" (it is {found}; bring it as {', '.join(PICTURE_FORMATS)})"


def template_beside(path: str) -> str:
    """The chat template where older models have it (the tokenizer reads a .jinja itself). ValueError: there is none."""
    file = Path(path) / "chat_template.json"
    if file.exists():
        return json.loads(file.read_text("utf-8"))["chat_template"]
    raise ValueError(f"{path}: neither its tokenizer nor a chat_template.jinja beside it tells how to write a chat; "
                     "give an instruct model")


# --- written ----------------------------------------------------------------------------------------------------------

def save_records(path: str, records: Iterable[Record]) -> None:
    """Write a Parquet file with the pictures inside, one column to a field of Record; whole or not at all.

    `answer` is the first accepted answer and `answers` all, where there are several; `meta` is JSON; `images` is a
    column of pictures to `datasets`, and so to TRL and EasyR1, for which OTHERS_COLUMNS repeat the problem.
    PIL images are written as PNG, as open_image shows them. Takes records as they come: memory for BATCH of them."""
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


def stored(image) -> bytes:
    """A picture's bytes as they are stored; of a PIL image a PNG, as open_image shows it."""
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        open_image(image, "in memory").save(buffer, format="PNG")
        return buffer.getvalue()
    if isinstance(image, Picture):
        return image.read()
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def _row(record: Record) -> dict:
    """Record -> a row as save_records writes it."""
    try:
        images = [{"bytes": stored(image)} for image in record.images]
    except (OSError, ValueError) as error:
        raise ValueError(f"record {record.id}: cannot read its picture: {error}") from error
    content, gold = record.content, record.golds[0]
    return vars(record) | {
        "answer": gold, "answers": record.answer if isinstance(record.answer, tuple) else None, "images": images,
        "meta": json.dumps(record.meta), "problem": "".join(part.get("text", "<image>") for part in content),
        "solution": gold, "prompt": [{"role": "user", "content": content}]}


# --- converters -------------------------------------------------------------------------------------------------------
# Each converter turns a published row (nulls left out) into fields of Record; all shapes and traps: tests/test_sources.

MARK = r"(?<![\w°∠△\\])(?<!\w\()(?<!\b[A-Z]\.)([(\[]?)([A-J])([)\].:：．}])(?![A-Z]\.)"  # (not D.C.)


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """`How long? A. 45; B. 60 ;C: 75` -> what stands before the options, and the options; (text, ()) where they cannot
    be told: no A and B, one without a text of its own (in the picture), a letter left out, more text after the last."""
    best: list[re.Match] = []
    for opening in (r"^[^\S\n]*", ""):  # line starts; where these give no three, anywhere
        marks = list(re.finditer(f"(?m){opening}{MARK}", text))
        for style in [*dict.fromkeys((mark[1], mark[3]) for mark in marks), None]:  # None: any, if that gives more
            alike = [mark for mark in marks if style in (None, (mark[1], mark[3]))]
            for first, mark in enumerate(alike):
                row = [mark] if mark[2] == "A" else []
                for other in alike[first + 1:] if row else ():
                    row += [other] if other[2] == ascii_uppercase[len(row)] else []
                # (of equal ones the last: "A." may stand in the stem)
                best = row if len(row) >= max(2, len(best) + (style is None)) else best
        if len(best) > 2:
            break
    ends = [mark.start() for mark in best[1:]] + [len(text)]
    options = tuple(text[mark.end():end].strip(" \r\n\t;,；\x08") for mark, end in zip(best, ends))
    if not options or not all(options) or "\n" in options[-1] and not any("\n" in option for option in options[:-1]):
        return text, ()
    if re.search(rf"[;；\n]\s*[(\[]?[{ascii_uppercase[len(options)]}-J][).:：．]\s*\S", options[-1]):
        return text, ()
    return re.sub(r"\s*\b(?:Options|Choices)\s*:\s*$", "", text[:best[0].start()]).rstrip(), options


LETTER = re.compile(r"\s*\(?([A-J])\)?(?![\w'])(?!\s*(?:,|and|or|&)\s*\(?[A-J]\b)")  # "(D)  http..", but not "(A, D)"


def _inline_choice(text: str, answer) -> dict:
    """Fields of a problem whose options stand in its text; they stay there when they, or the gold's, cannot be told."""
    stem, choices = split_options(text)
    letter = LETTER.match(str(answer or ""))
    if letter and letter[1] not in ascii_uppercase[:len(choices)] and re.search(rf"\b{letter[1]}\b", text):
        stem, choices = text, ()  # (a gold E where there is no E anywhere is refused by Record)
    return {"question": stem.strip(), "choices": choices, "answer": letter[1] if letter else answer,
            "answer_type": "choice"}


def _meta(row: dict, *names: str) -> dict:
    return {name.replace(" ", "_"): row[name] for name in names if name in row}


def _mathvision(row: dict) -> dict:
    drawn = row["options"] == list("ABCDE")  # the real ones are in the picture
    return {"id": row["id"], "question": row["question"], "choices": [] if drawn else row["options"],
            "answer": row.get("answer", "").replace("\x0c", "\\f").strip(),  # (strip takes the form feed of \frac)
            "answer_type": "choice" if drawn else "",
            "images": row.get("decoded_image") or row["image"], "meta": _meta(row, "level", "subject")}


def _wemath(row: dict) -> dict:
    return _inline_choice(f"{row['question'].strip()}\n{row['option'].strip()}", row.get("answer")) | {
        "id": f"{row['ID']}@{row['key']}", "images": row["image_path"],
        "meta": _meta(row, "ID", "key", "knowledge concept", "question number")}


def _polymath(row: dict) -> dict:
    """The question is a screenshot. A digit range is offered as options 1 .. 4, so that a letter is right too: the
    authors turn letters into digits there."""
    golds = [gold.strip(" '\"") for gold in str(row.get("final_answer", "")).strip(" []").split(",")]
    fields = {"id": row.get("id", ""), "images": row["image"], "answers": golds,
              "answer_type": "choice", "meta": _meta(row, "category")}
    if str(row.get("final_answer_range", "")).replace(" ", "") in ("1-4", "1,2,3,4"):
        return fields | {"question": "Answer the question in the image.", "choices": list("1234")}
    offered = str(row.get("answer_option") or row.get("final_answer_range") or "A, B, C, D").strip("[]")
    return fields | {"question": f"Answer the question in the image. Options: {offered}"}


def _scemqa(row: dict) -> dict:
    """Rows as json_rows flattens them: their subject and number in it added."""
    told = row.get("Answer (final answer highlighted)", "")
    golds = [gold.strip() for gold in re.findall(r"\\answ?er\{((?:[^{}]|\{[^{}]*\})*)\}", told)]  # (one \anser)
    free = row["subject"].endswith("Free_Response")
    fields = {"question": row["Question"].strip(), "answers": golds} if free else _inline_choice(row["Question"], told)
    return fields | {"id": f"{row['subject']}-{row['number']}", "images": row["ImagePath"],
                     "meta": {"subject": row["subject"].split("_")[0].lower(), "free_response": free}}


def _mathv360k(row: dict) -> dict:
    human, gpt = row["conversations"]
    text = human["value"].replace("<image>", "").strip()  # of the one picture, which then comes first
    text = re.sub(r"^(?:Hint:[^\n]*\n+)?(?:Question:\s*)?", "", text)
    stem, mark, listed = text.partition("\nChoices:")
    gold = (stated(gpt["value"]) or [gpt["value"].strip()])[-1].removesuffix(".")
    choices = split_options(listed)[1] if mark else ()
    return {"question": (stem if choices else text).strip(), "choices": choices, "answer": gold,
            "images": row["image"], "meta": {"id": row.get("id"), "subset": row["image"].split("/")[0]}}


def _mathvista(row: dict) -> dict:
    gold, choices, precision = row.get("answer"), row.get("choices") or [], row.get("precision", math.nan)
    fields = {"id": row["pid"], "question": row.get("query", row["question"]).split("\nChoices:")[0],
              "choices": choices, "images": row.get("decoded_image") or row["image"],
              "meta": _meta(row["metadata"], "task", "skills", "source", "category", "grade", "language")}
    if row["question_type"] == "multi_choice":  # the gold is the text of a choice, be it "A" as the third of them
        return fields | {"answer": ascii_uppercase[choices.index(gold)] if gold in choices else gold}
    kind = {"integer": "number", "float": "number", "list": "list"}.get(row["answer_type"], "")
    known = row["answer_type"] == "float" and not math.isnan(precision)
    return fields | {"answer": gold, "answer_type": kind} | ({"precision": precision} if known else {})


def _mathverse(row: dict) -> dict:
    """Five versions of each problem; vision-only has no text of its own, and no options outside the picture."""
    text = row.get("question", "").strip() or "Answer the question in the image."
    gold = str(row.get("answer", "")).replace("掳", "°")  # (read in a wrong encoding)
    gold = re.sub(r"\\circ(?=[A-Za-z])", r"\\circ ", gold)
    gold = re.sub(r"\s*\bunits?\s*\$\^\{?[23]\}?\$", "", gold)  # 12 units $^{2}$
    bare = re.sub(r"(°|\\circ)\s*T\s*$", r"\1", gold)  # a true bearing, with its T or without
    fields: dict = {"question": text, "answers": [gold, bare] if bare != gold else [gold]}
    fields = _inline_choice(text, gold) if row["question_type"] == "multi-choice" else fields
    return fields | {"id": row["sample_index"], "images": row.get("image"),
                     "meta": _meta(row, "problem_index", "problem_version", "question_type")
                     | _meta(row["metadata"], "subject", "subfield")}


def _mmmu(row: dict) -> dict:
    """Marks `<image 1>` in the question or its options name columns; here pictures come in the order of their marks.
    Numbers are rounded to two decimals, as MMMU's own script does."""
    def given(text: str) -> str:
        return re.sub(r"<image (\d)>", lambda mark: "<image>" if f"image_{mark[1]}" in row else mark[0], text)

    choices = ast.literal_eval(row.get("options", "[]"))  # a list written as a string
    order = [f"image_{n}" for n in re.findall(r"<image (\d)>", "\n".join([row["question"], *choices]))]
    unnamed = [name for name in row if re.fullmatch(r"image_\d", name) and name not in order]
    gold = row.get("answer", "")
    several = not choices and gold.startswith("[")  # any of these is right
    return {"id": row["id"], "question": "<image>" * len(unnamed) + given(row["question"]),
            "choices": [given(choice) for choice in choices],
            "answers": ast.literal_eval(gold) if several else [gold],
            **({} if choices else {"precision": 2}),
            "images": [row[name] for name in unnamed + order if name in row],
            "meta": _meta(row, "subfield", "topic_difficulty", "question_type")
            | {"subject": re.sub(r"^[a-z]+_|_\d+$", "", row["id"])}}


def _mmstar(row: dict) -> dict:
    return _inline_choice(row["question"], row.get("answer")) | {
        "id": row["index"], "images": row["image"], "meta": _meta(row, "category", "l2_category")}


# --- published data sets: one entry each ------------------------------------------------------------------------------

TASKS = {"figure question answering": "FQA", "geometry problem solving": "GPS", "math word problem": "MWP",
         "textbook question answering": "TQA", "visual question answering": "VQA"}  # of MathVista
STEPS = {"2steps_1": "S1", "2steps_2": "S1", "2steps_multi": "S2",
         "3steps_1": "S1", "3steps_2": "S1", "3steps_3": "S1", "3steps_multi": "S3"}  # of We-Math
DOMAINS: dict[str, str] = {}  # of MMMU's subjects
for domain, subjects in {
        "Art & Design": "Art Art_Theory Design Music",
        "Business": "Accounting Economics Finance Manage Marketing",
        "Science": "Biology Chemistry Geography Math Physics",
        "Health & Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
                             "Public_Health",
        "Humanities & Social Science": "History Literature Psychology Sociology",
        "Tech & Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
                              "Materials Mechanical_Engineering"}.items():
    DOMAINS |= dict.fromkeys(subjects.split(), domain)


def read_once(tables: Iterable[Table], convert: Convert, source: str) -> Iterator[Made]:
    """MathV360K: questions about one picture that stand there with different labels are dropped, others kept once."""
    labels: dict[int, str | None] = {}  # of each question; None: several. Hashes: 360,000 texts would be 200 MB

    def asked(fields) -> int:
        return hash((fields["images"], fields["question"], fields["choices"]))

    def labelled(rows: Iterator) -> Iterator:
        kept = list(rows)
        for _, row in kept:
            with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError, RecursionError):  # (see `once`)
                fields: Any = convert(parsed(row))
                number = parse_number(fields["answer"])
                label = normal_text(fields["answer"])[:80] if number is None else f"{number:.9g}"
                if labels.setdefault(asked(fields), label) != label:
                    labels[asked(fields)] = None
        yield from kept

    def once(row: dict) -> dict | Dropped:
        fields: Any = convert(row)
        question, gold = asked(fields), fields["answer"]
        if question not in labels:
            return Dropped("", "repeated question", "its picture, question and label stand in an earlier row")
        if labels[question] is None:
            return Dropped("", "conflicting labels", f"{gold!r} here, another answer elsewhere")
        del labels[question]
        if not fields["choices"] and len(gold.split()) > 3 and not quantity(gold):
            return Dropped("", "free text", f"{gold[:80]!r} can be said in other words")
        return fields

    return read_tables(((name, folders, labelled(rows)) for name, folders, rows in tables), once, source)


@dataclass(frozen=True)
class Published:
    """A published data set: where it lies, what it is, and how it is read."""

    hub_id: str
    split: str
    convert: Convert
    size: int | None = None  # published rows; a set that has a size is a benchmark
    licence: str = "none given"  # as its authors publish it, in the hub's word where that has one
    source: bool = False  # is it one of the five that NeuraLadder was made of?
    parts: tuple[tuple[str, str, dict], ...] = ()  # of a benchmark, its sub-scores: kind, key in `meta`, other names
    mean_over: str = ""  # the kind of part whose mean is its score, where that is not the mean over rows
    by_hand: str = ""  # of a set that is no hub data set: what to do where it is not found
    reader: Callable[..., Iterator[Made]] = read_tables

    def read(self, name: str, path_or_id: str | None = None) -> Iterator[Made]:
        """Its rows, of a local copy or hub id (perhaps with @split); None: of where it is published."""
        place = path_or_id or self.hub_id
        if self.by_hand and not Path(place).exists():
            raise ValueError(f"{place}: {self.by_hand}")
        return self.reader(find_tables(place, self.split), self.convert, name)


DATASETS: dict[str, Published] = {  # (a set of your own: a converter above, an entry here)
    "mathvista": Published("AI4Math/MathVista", "testmini", _mathvista, 1000,
                           parts=(("task", "task", TASKS), ("skill", "skills", {}))),
    "mathvision": Published("MathLLMs/MathVision", "test", _mathvision, 3040, "mit", source=True,
                            parts=(("level", "level", {}), ("subject", "subject", {}))),
    "mathverse": Published("AI4Math/MathVerse", "testmini", _mathverse, 3940,
                           parts=(("version", "problem_version", {}),), mean_over="version"),
    "wemath": Published("We-Math/We-Math", "testmini", _wemath, 1740, "cc-by-nc-4.0", source=True,
                        parts=(("steps", "key", STEPS),)),
    "mmmu": Published("MMMU/MMMU", "validation", _mmmu, 900,
                      parts=(("domain", "subject", DOMAINS), ("subject", "subject", {}))),
    "mmstar": Published("Lin-Chen/MMStar", "val", _mmstar, 1500,
                        parts=(("category", "category", {}),), mean_over="category"),
    "polymath": Published("him1411/polymath", "test", _polymath, licence="afl-3.0", source=True),
    "scemqa": Published("SceMQA/SceMQA", "multiple_choice|free_response", _scemqa, licence="unstated", source=True,
                        by_hand="no multiple_choice.json or free_response.json there; clone GitHub's SceMQA/SceMQA"),
    "mathv360k": Published("Zhiqiang007/MathV360K", "train_samples_all_tuning", _mathv360k, source=True,
                           by_hand="no such folder; download Zhiqiang007/MathV360K and unpack data_images.zip",
                           reader=read_once),
}
SOURCES = [name for name, published in DATASETS.items() if published.source]
BENCHMARKS = [name for name, published in DATASETS.items() if published.size]


# --- one command: source in, usable records out -----------------------------------------------------------------------

TINY = sys.float_info.min  # the lowest bound of what must be above 0


def range_fault(value: float, low: float, high: float = math.inf) -> str:
    """What is wrong with a number that must be finite and from low to high, both allowed; empty: nothing."""
    if low <= value <= high and math.isfinite(value):  # (nan is neither)
        return ""
    bounds = f"{low} or more" if high == math.inf else f"from {low} to {high}"
    return f"{value} is out of range; give a number {'above 0' if low == TINY else bounds}"


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """The `type` of an argparse option that takes an int or float within bounds."""
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number") from None
        if fault := range_fault(value, low, high):
            raise argparse.ArgumentTypeError(fault)
        return value

    return parse


def run_program(program: Callable[[], None], stopped: str = "stopped; the same command goes on where it was",
                faults: tuple = (ValueError,)) -> None:
    """A program from the command line: what a user can mend is one line, not a stack."""
    try:
        program()
    except faults as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(stopped)


def same_picture(a: Image.Image, b: Image.Image) -> bool:
    """Are these one picture but for its encoding and size? Both are brought to the smaller size and blurred a little.

    The largest difference of grey is then, measured on drawings and screenshots: at most 11 of 255 after JPEG of
    quality 75, halving, and both; 19 and more (mostly above 40) where one digit differs. Where that copy is halved
    too, a fifth of the pairs pass for one picture (type of 10 to 16 pixels): a problem dropped in vain, no leak."""
    size, blur = min(a.size, b.size, key=math.prod), ImageFilter.BoxBlur(1.5)
    small = [image.convert("L").resize(size, Image.Resampling.BICUBIC).filter(blur) for image in (a, b)]
    return bool(np.abs(np.diff(np.array(small, np.int16), axis=0)).max() <= 12)


def thumbnail(image: Image.Image) -> np.ndarray:
    """[256] int16, 16 x 16 greys: differs by at most 10 for one picture encoded or halved, and hardly ever for two."""
    return np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BICUBIC), np.int16).ravel()


@dataclass(frozen=True)
class Held:
    """What the benchmarks hold: B pictures."""

    ids: frozenset[str]
    shapes: np.ndarray  # [B] width / height
    thumbnails: np.ndarray  # [B, 256] int16
    pictures: list[tuple]  # [B] (picture, id), opened again when the thumbnails agree

    def find(self, record: Record, images: list[Image.Image]) -> Dropped | None:
        """The record, dropped, if a benchmark holds its id or one of its pictures (given opened)."""
        if record.id in self.ids:
            return Dropped(record.id, f"in {record.id.partition('-')[0]}, by id", "the benchmark has this id")
        for image in images:
            shape, small = image.width / image.height, thumbnail(image)
            near = np.flatnonzero(np.abs(np.log(self.shapes / shape)) < 0.03)  # halving rounds odd sizes
            for cells in (slice(None, None, 17), slice(None)):  # the diagonal rules nearly all out at 1/16 of the cost
                near = near[np.abs(self.thumbnails[near, cells] - small[cells]).max(axis=1) <= 12]
            for picture, held_id in (self.pictures[i] for i in near):
                if same_picture(image, open_image(picture, held_id)):
                    return Dropped(record.id, f"in {held_id.partition('-')[0]}, by picture", f"a picture of {held_id}")
        return None


def read_held(benchmarks: str) -> Held:
    """`mathvista,mathverse=local/path,...` -> what these hold."""
    def look(made: Made) -> list[tuple]:
        if isinstance(made, Dropped) and made.reason == "picture unreadable":
            print(f"--exclude cannot look for the picture of {made.id}: {made.detail}", file=sys.stderr)
        seen = []
        for picture in made.images:
            try:
                image = open_image(picture, made.id)
                seen.append((image.width / image.height, thumbnail(image), (picture, made.id)))
            except ValueError as error:
                print(f"--exclude cannot look for it: {error}", file=sys.stderr)
        return seen

    ids: set[str] = set()
    found: list[tuple] = []
    for benchmark in filter(None, benchmarks.split(",")):
        name, _, path = benchmark.partition("=")
        if name not in BENCHMARKS:
            raise ValueError(f"--exclude {name}: no benchmark of that name; there are {', '.join(BENCHMARKS)}")
        rows = list(tqdm(DATASETS[name].read(name, path), f"reading {name}", unit=" records", disable=QUIET))
        own = {made.id for made in rows if getattr(made, "reason", "") != "malformed row"}  # (its id is made up)
        if not own:
            raise ValueError(f"--exclude {benchmark}: no row there is one of {name}, and nothing would be excluded; "
                             "give the benchmark as it is published")
        ids |= own
        found += itertools.chain.from_iterable(in_threads(look, rows, "its pictures", " records"))
    shapes, thumbnails, pictures = zip(*found) if found else ((), np.empty((0, 256), np.int16), ())
    return Held(frozenset(ids), np.array(shapes), np.array(thumbnails), list(pictures))


def save_usable(made: Iterable[Made], out: str, held: Held | None = None, **about) -> dict:
    """Save the records whose golds and pictures can be used and that no benchmark holds -> the report.

    Beside `out`, x.parquet: x.report.json, `about` and the counts; x.dropped.jsonl, a line for each other record."""
    def examine(item: Made) -> Made:
        if isinstance(item, Dropped):
            return item
        try:
            images = [open_image(image, item.id) for image in item.images]
        except ValueError as error:
            return Dropped(item.id, "picture unreadable", str(error))
        return held and held.find(item, images) or verifiable(item)

    def usable() -> Iterator[Record]:
        for batch in batches(tqdm(made, Path(out).name, unit=" records", disable=QUIET)):
            for item in pool.map(examine, batch):
                if isinstance(item, Dropped):
                    dropped[item.reason] += 1
                    print(json.dumps({"id": item.id, "reason": item.reason, "detail": item.detail}), file=lines)
                else:
                    kept[item.answer_type] += 1
                    yield item
        if not kept:
            lines.flush()
            first = json.loads(dropped_to.open().readline())["detail"] if dropped else "there are none"
            why = ", ".join(f"{reason} {count}" for reason, count in dropped.most_common(3))
            raise ValueError(f"none of the {dropped.total()} records can be used ({why}; the first: {first}); "
                             f"{dropped_to} says why")

    kept, dropped = Counter[str](), Counter[str]()
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
    option = parser.add_argument
    option("source", choices=[*SOURCES, "any"], help="any: every file format that load_records reads")
    option("--input", required=True, help="hub id (perhaps with @split), file, or folder")
    option("--out", required=True, help="Parquet file to write")
    option("--exclude", default="", help="benchmarks whose problems to drop, by id and by picture: "
           f"{','.join(BENCHMARKS)}; name=PATH reads a local copy, name=ID@SPLIT another split")
    option("--images", help="with any: folder in which the pictures lie, if not beside the file")
    args = parser.parse_args()
    if args.images and args.source != "any":
        raise ValueError(f"--images goes with any; {args.source} finds its own")
    if not args.out.endswith(".parquet"):
        raise ValueError(f"--out {args.out}: give a file that ends in .parquet")
    about, held = {"source": args.source, "input": args.input, "exclude": args.exclude}, None
    if args.exclude:
        held = read_held(args.exclude)
        about["looked_for"] = {"ids": len(held.ids), "pictures": len(held.pictures)}
    published = DATASETS.get(args.source)
    made = published.read(args.source, args.input) if published else read_any(args.input, args.images)
    name = Path(args.input).stem  # of rows that do not say where they are from: a ladder's card counts by source
    made = (one if isinstance(one, Dropped) or one.source else dataclasses.replace(one, source=name) for one in made)
    print(json.dumps(save_usable(made, args.out, held, **about), indent=1))


if __name__ == "__main__":
    run_program(main, "stopped; nothing was written", (ValueError, OSError))
