"""The plain way to sample and to score: rows and pictures repeated, left padding, all logits at once.

What rollout.py must equal, and what tests/bench.py measures it against.
"""
from __future__ import annotations

import contextlib

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from data import Processor, Prompt
from rollout import autocast, generation_config, log_distribution, use_own_kernels


@contextlib.contextmanager
def transformers_own(model: PreTrainedModel):
    """The model as transformers has it: SDPA with masks, the vision tower's windows one by one, a convolution."""
    text, tower = model.model.language_model.config, model.model.visual.config
    text._attn_implementation = tower._attn_implementation = "sdpa"
    model.model.visual.patch_embed.proj.__class__ = torch.nn.Conv3d
    try:
        yield
    finally:
        use_own_kernels(model)


def pad(processor: Processor, prompts: list[Prompt], responses: list[list[int]]) -> dict[str, torch.Tensor]:
    """Prompts, padded on the left, each followed by its response, padded on the right -> the model's inputs."""
    before, after = (max(map(len, part)) for part in ([p.ids for p in prompts], responses))
    ids = torch.full((len(prompts), before + after), processor.pad_id)
    mask = torch.zeros_like(ids)
    for n, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        place = slice(before - len(prompt.ids), before + len(response))
        ids[n, place] = torch.cat([prompt.ids, torch.tensor(response, dtype=torch.long)])
        mask[n, place] = 1
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == processor.image_id).int()}
    pictured = [p for p in prompts if p.pixels is not None]
    if pictured:
        inputs |= {"pixel_values": torch.cat([p.pixels for p in pictured]),
                   "image_grid_thw": torch.cat([p.grid for p in pictured])}
    return inputs


@torch.no_grad()
def plain_rollout(model: PreTrainedModel, processor: Processor, prompts: list[Prompt], *, samples: int,
                  temperature: float, max_tokens: int, scores: bool = True,
                  logits_processor: LogitsProcessorList | None = None):
    """transformers' own loop on P * samples repeated rows -> (tokens, log-probs of its own scores), each [N, T].

    scores=False: no log-probs, for the loop keeps all logits to make them.
    """
    repeated = [p for p in prompts for _ in range(samples)]
    inputs = pad(processor, repeated, [[]] * len(repeated))
    model.model.rope_deltas = None
    config = generation_config(processor, temperature=temperature, max_tokens=max_tokens)
    with autocast(model), transformers_own(model):
        out = model.eval().generate(
            **{k: v.to(model.device) for k, v in inputs.items()}, generation_config=config,
            logits_processor=logits_processor, return_dict_in_generate=True, output_scores=scores)
    tokens = out.sequences[:, inputs["input_ids"].shape[1]:]
    return tokens, scores and torch.stack(out.scores, 1).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def plain_logprobs(model: PreTrainedModel, processor: Processor, prompts: list[Prompt], responses: list[list[int]],
                   temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """N prompts, each followed by its response -> log-probs and mask, each [N, T]."""
    lengths = torch.tensor([len(r) for r in responses], device=model.device)
    inputs = {k: v.to(model.device) for k, v in pad(processor, prompts, responses).items()}
    steps = int(lengths.max())
    model.model.rope_deltas = None
    with autocast(model), transformers_own(model):
        logits = model(**inputs, use_cache=False).logits[:, -steps - 1:-1]
    logp = log_distribution(logits, temperature, torch.tensor(processor.vision_ids, device=model.device))
    mask = torch.arange(steps, device=model.device) < lengths[:, None]
    return logp.gather(-1, inputs["input_ids"][:, -steps:, None])[..., 0] * mask, mask


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths_q: list[int], lengths_k: list[int],
                    scale: float, causal: bool) -> torch.Tensor:
    """rollout.varlen by its definition, one sequence after the other: q [n, heads, D], k and v [m, key heads, D]."""
    out = []
    for a, b, c in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k)):
        b, c = (x.repeat_interleave(a.shape[1] // x.shape[1], 1) for x in (b, c))
        scores = torch.einsum("qhd,khd->hqk", a, b) * scale
        if causal:
            later = torch.ones(len(a), len(b), dtype=torch.bool, device=a.device).triu(len(b) - len(a) + 1)
            scores = scores.masked_fill(later, -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), c))
    return torch.cat(out)
