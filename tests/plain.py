"""The plain way to sample and to score: rows and pictures repeated, left padding, all logits at once.

What rollout.py must equal, and what tests/bench.py measures it against.
"""
from __future__ import annotations

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from data import Processor, Prompt
from rollout import autocast, generation_config, log_distribution


@torch.no_grad()
def plain_rollout(model: PreTrainedModel, processor: Processor, prompts: list[Prompt], *, samples: int,
                  temperature: float, max_tokens: int, scores: bool = True,
                  logits_processor: LogitsProcessorList | None = None):
    """transformers' own loop on P * samples repeated rows -> (tokens, log-probs of its own scores), each [N, T].

    scores=False: no log-probs, for the loop keeps all logits to make them.
    """
    inputs = processor.collate([p for p in prompts for _ in range(samples)])
    model.model.rope_deltas = None
    config = generation_config(processor, temperature=temperature, max_tokens=max_tokens)
    with autocast(model):
        out = model.eval().generate(
            **{k: v.to(model.device) for k, v in inputs.items()}, generation_config=config,
            logits_processor=logits_processor, return_dict_in_generate=True, output_scores=scores)
    tokens = out.sequences[:, inputs["input_ids"].shape[1]:]
    return tokens, scores and torch.stack(out.scores, 1).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def plain_logprobs(model: PreTrainedModel, processor: Processor, prompts: list[Prompt], responses: list[list[int]],
                   temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """N prompts, each followed by its response -> log-probs and mask, each [N, T]."""
    lengths = torch.tensor([len(r) for r in responses], device=model.device)
    inputs = {k: v.to(model.device) for k, v in processor.collate(prompts, responses).items()}
    steps = int(lengths.max())
    model.model.rope_deltas = None
    with autocast(model):
        logits = model(**inputs, use_cache=False).logits[:, -steps - 1:-1]
    logp = log_distribution(logits, temperature, torch.tensor(processor.vision_ids, device=model.device))
    mask = torch.arange(steps, device=model.device) < lengths[:, None]
    return logp.gather(-1, inputs["input_ids"][:, -steps:, None])[..., 0] * mask, mask
