"""What a problem is: the record, where records come from, and what the model is fed.

    Record         one problem: question, pictures, gold answer, and what was measured of it
    load_records   every file format people bring, told apart by the keys of a row
    PROMPTS        the three system prompts: answer only, think, observe
    Processor      tokenizer and image processor of a checkpoint: Record -> Prompt -> a padded batch

Shapes: B rows, T tokens, I pictures, N vision patches, D values of a patch.
"""
from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
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


# --- golds -----------------------------------------------------------------------------------------------------------


# --- readers ---------------------------------------------------------------------------------------------------------


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
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"record {record_id}: cannot use its picture: {error}") from error


class Processor:
    """Tokenizer and image processor of a Qwen-VL checkpoint.

    Placeholders are written by hand, grid.prod() / merge_size^2 to a picture, because transformers' own processor
    class demands torchvision for videos, which we never feed.
    """

    VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")

    def __init__(self, path: str, max_pixels: int | None = None):
        """path: a Hugging Face folder or hub id; max_pixels: area above which pictures are shrunk (None: its own)."""
        from transformers import AutoImageProcessor, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        if max_pixels is not None:
            smallest = self.image_processor.size["shortest_edge"]  # (areas, in spite of the names)
            if max_pixels < smallest:
                raise ValueError(f"max_pixels {max_pixels} is below the image processor's minimum {smallest}")
            self.image_processor.size = {"shortest_edge": smallest, "longest_edge": max_pixels}
        vocab = self.tokenizer.get_vocab()
        self.image_id: int = vocab["<|image_pad|>"]
        self.vision_ids: list[int] = [vocab[t] for t in self.VISION_TOKENS if t in vocab]
        stops = ("<|im_end|>", "<|endoftext|>", self.tokenizer.eos_token)  # chat models end with any of them
        self.stop_ids: list[int] = sorted({vocab[t] for t in stops if t in vocab})
        self.pad_id: int = self.tokenizer.pad_token_id

    def encode(self, record: Record, style: str, max_tokens: int | None = None) -> Prompt:
        """Record -> Prompt, in prompt style `style`. Never truncates: cutting a prompt would cut image tokens.

        Raises ValueError naming the record: pictures and `<image>` marks that differ in number, vision tokens written
        in the question, a prompt over max_tokens.
        """
        question = record.question
        if record.choices:
            question += "\n" + "\n".join(f"({chr(65 + i)}) {text}" for i, text in enumerate(record.choices))
        if any(token in question for token in self.VISION_TOKENS):
            raise ValueError(f"record {record.id}: its text holds one of the model's vision tokens; remove it")
        parts = question.split("<image>")
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
