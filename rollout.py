"""What the policy does: sample groups of responses, score their tokens; and where it lies: devices, processes, shards.

    sample_groups      G responses to each prompt, through transformers' `generate` with a decode loop of our own
    response_logprobs  log pi(o_t | q, o_<t) of given responses, with gradients
    load_policy        a Qwen-VL checkpoint, in fp32 to train, with attention of our own: no mask, flash on any GPU
    load_trainer       the policy in shares (FSDP2), a plain replica that samples, a reference, AdamW -> Policy
    on_rank_0, ...     what the processes of torchrun tell each other

The sampler and the trainer must agree to rounding, or the update is not the policy's own gradient. So both take
log-probs from one function (`log_distribution`: temperature, vision tokens excluded), token ids go from one to the
other without passing through text, and the generation settings that a checkpoint brings along (Qwen's: top_k 1,
repetition penalty 1.05) are replaced whole.

Departure from the official code: vision tokens have probability 0 in the sampler and in the loss; there they may be
sampled, and a later forward that meets one without pixels fails.

Two things make it fast, and neither changes a number. A prompt with its picture is computed once for its G responses:
when sampling, its keys and values are repeated, never the work; when scoring, the responses stand side by side in one
row, each seeing the prompt and itself. And a row leaves the batch when its response has ended.

    row of the trainer    [ prompt and picture | o_1 | o_2 | ... | o_G ]     each o_g sees the prompt and o_g alone

There is no mask: the prompt is a sequence of attention, each response is another, whose keys are the prompt's and its
own (`Sequences`). The kernel is flash-attention's or torch's own on a GPU, and one SDPA call a sequence on a CPU.

    python rollout.py --model CHECKPOINT --image x.png --question "..."

Shapes: P prompts, G responses of a group, N = P * G responses, T response tokens, L tokens of all rows that the trainer
packs together, S slots of the sampler's cache, H hidden size, V vocabulary.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention.varlen import varlen_attn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel
from transformers import logging as hf_logging
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils import is_flash_attn_2_available

from data import PROMPTS, QUIET, Processor, Prompt, Record, number, open_image, pictures_of, run_program

if is_flash_attn_2_available():
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # each is tested tiny; any other is refused by name
# Below so many parameters one thread is set on a CPU, unless the user has set some: OpenMP's threads spin while they
# wait for one that is not running. Toy, 2 cores, s, alone and beside a busy process: 1 thread 7.5, 8.2; 2: 5.8, 60.
SMALL, THREADS = 20_000_000, {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}
# (from torch 2.12 on it must be told that heads may share a key head)
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
PIECE = 256  # queries of a causal sequence at a time, on a CPU: what is masked is computed all the same
CHECK = 16  # decode steps between two looks at which rows have ended: on a GPU each look waits for the device


@dataclass
class Sample:
    """One response as it was sampled, not judged yet."""

    text: str  # without the stop token
    ids: list[int]  # [T] token ids, with the stop token where one came
    truncated: bool  # whether max_tokens cut it off: no stop token came
    logprobs: torch.Tensor  # [T] the sampler's own


@dataclass
class Group:
    """G responses to one prompt."""

    record: Record
    prompt: Prompt
    samples: list[Sample]


def log_distribution(logits: torch.Tensor, temperature: float, excluded: torch.Tensor) -> torch.Tensor:
    """Logits [..., V] -> log-probs of the distribution that is sampled from, in fp32. The sampler's and the trainer's.

    excluded: vision tokens, which get probability 0: a sampled <|image_pad|> would be an image without pixels."""
    return (logits.float() / temperature).index_fill_(-1, excluded, float("-inf")).log_softmax(-1)


# --- sampling ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def sample_groups(model: PreTrainedModel, processor: Processor, records: list[Record], prompts: list[Prompt], *,
                  samples: int, temperature: float, max_tokens: int, seed: int, max_rows: int = 256) -> list[Group]:
    """Sample `samples` responses to each of P prompts, at most max_rows rows, but a group, at a time -> P groups.

    On a GPU fewer, where that would not fit (prompts_that_fit). A response depends on seed, record id and its number in
    the group, and on nothing that is sampled beside it (but for rounding): not on batch, order, max_rows or processes.
    No global random state is used."""
    config = generation_config(processor, temperature=temperature, max_tokens=max_tokens)
    was_training, inherited = model.training, model.generation_config
    model.eval()  # in train mode gradient checkpointing silently drops the cache, and the text comes out wrong
    model.generation_config = config  # `generate` fills unset fields from here: nothing inherited may be left
    stops = set(processor.stop_ids)
    groups = [Group(record, prompt, []) for record, prompt in zip(records, prompts, strict=True)]
    # Neighbours in length share a batch, so that little of it is padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    per_batch = max(1, min(max_rows // samples, prompts_that_fit(model, prompts, samples, max_tokens)))
    try:
        with autocast(model):
            for start in range(0, len(order), per_batch):
                chosen = order[start:start + per_batch]
                uniform = np.stack([uniforms(seed, records[i].id, g, max_tokens) for i in chosen
                                    for g in range(samples)])
                loop = partial(decode, repeats=samples, uniform=torch.from_numpy(uniform).to(model.device),
                               graph=capture if model.device.type == "cuda" else None)
                inputs = processor.collate([prompts[i] for i in chosen])
                tokens, logprobs = model.generate(**{k: v.to(model.device) for k, v in inputs.items()},
                                                  generation_config=config, custom_generate=loop)
                tokens, logprobs = tokens.tolist(), logprobs.cpu()  # [N, T]
                for j, i in enumerate(chosen):
                    for n in range(j * samples, (j + 1) * samples):
                        end = next((t + 1 for t, token in enumerate(tokens[n]) if token in stops), None)
                        ids, text = tokens[n][:end], processor.decode(tokens[n][:end])
                        groups[i].samples.append(Sample(text, ids, end is None, logprobs[n, :end].clone()))
    finally:
        model.generation_config = inherited
        model.model.rope_deltas = None  # the prompts' positions, left there, would leak into another forward
        model.train(was_training)
    return groups


def generation_config(processor: Processor, *, temperature: float, max_tokens: int) -> GenerationConfig:
    """Every setting that shapes sampling, stated. temperature 0 is greedy."""
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    return GenerationConfig(
        **(sampling if temperature > 0 else {"do_sample": False}), num_return_sequences=1, num_beams=1,
        max_new_tokens=max_tokens, repetition_penalty=1.0, use_cache=True, bos_token_id=None,
        eos_token_id=processor.stop_ids, pad_token_id=processor.pad_id, suppress_tokens=processor.vision_ids)


def uniforms(seed: int, record_id: str, response: int, count: int) -> np.ndarray:
    """[count] float64 in [0, 1), one a position: of this response alone, whatever is sampled beside it, and where."""
    key = hashlib.sha256(f"{seed} {record_id} {response}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big"))).random(count)


def draw(logp: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Log-probs [N, V], uniforms [N, 1] -> tokens [N], by inverse CDF: no generator whose state a batch would share.

    In float64, where the sum's rounding (on a GPU it need not even be monotone) cannot hit a token of probability 0."""
    cdf = logp.double().exp().cumsum(-1)
    total = cdf[:, -1:]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True)[:, 0]  # the first token whose cdf lies above


@torch.no_grad()
def decode(model: PreTrainedModel, input_ids: torch.Tensor, *, generation_config: GenerationConfig, repeats: int,
           uniform: torch.Tensor, graph: Callable[[Callable], Callable] | None, logits_processor=None,
           stopping_criteria=None, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """`custom_generate` of transformers: P prompts [P, L], padded left -> tokens and their log-probs, [P * repeats, T].

    uniform [P * repeats, T]. graph: what makes one step fast (`capture`; on a CPU None). What stands after a row's stop
    token is of no meaning. Ours in place of transformers' loop: a prompt is prefilled once, not once a response; rows
    that have ended leave; the host waits for the device once in CHECK steps; the step can be captured."""
    device, steps = input_ids.device, generation_config.max_new_tokens
    temperature = generation_config.temperature if generation_config.do_sample else None
    excluded, stops = (torch.tensor(ids, device=device) for ids in
                       (generation_config.suppress_tokens, generation_config.eos_token_id))
    text, mask = model.model.language_model, inputs.pop("attention_mask")  # (None where nothing is padded)
    real = torch.ones_like(input_ids) if mask is None else mask  # [P, L] 0: padding
    position = (inputs["position_ids"][-1, :, -1] + 1).repeat_interleave(repeats)  # [N] of the first response token
    places = [row.nonzero()[:, 0] + p * len(row) for p, row in enumerate(real.cpu())]
    own = Sequences.of([(place, place) for place in places], device)  # (each prompt sees itself alone)
    output = model._prefill(input_ids, generation_config, inputs | {"sequences": own})
    cache = getattr(output, "cache", None) or output.past_key_values  # (renamed in transformers 5.2x)
    slots = Slots(cache.layers, (real == 0).sum(1), repeats, output.logits.dtype, steps)
    logits = output.logits[:, -1].repeat_interleave(repeats, 0)
    del output, cache

    rows = torch.arange(len(logits), device=device)  # [n] those still in the batch, by their place in the result
    t = torch.zeros(1, dtype=torch.long, device=device)
    tokens = torch.full((len(rows), steps), int(stops[0]), device=device)
    logprobs = torch.zeros(len(rows), steps, device=device)

    def step() -> None:  # all that changes, changes in place: a captured step knows addresses only
        logp = log_distribution(logits, temperature or 1.0, excluded)  # [n, V]
        token = logp.argmax(-1) if temperature is None else draw(logp, uniform[rows, t][:, None])  # [n]
        tokens[rows, t] = token
        logprobs[rows, t] = logp.gather(-1, token[:, None])[:, 0]
        hidden = text(inputs_embeds=text.embed_tokens(token)[:, None], attention_mask=slots.mask(), slots=slots,
                      position_ids=(position + t).expand(3, -1)[..., None], use_cache=False).last_hidden_state
        logits.copy_(model.lm_head(hidden[:, 0]))
        t.add_(1)
        slots.lengths.add_(1)

    run, warm, chunk = None, False, CHECK if graph is None else 16 * CHECK  # (every size is captured anew)
    for start in range(0, steps, CHECK):
        ended = torch.isin(tokens[rows, :start], stops).any(1) if start else torch.zeros_like(rows, dtype=torch.bool)
        left = int((~ended).sum())
        if not left:
            break
        if start % chunk == 0:
            slots.size += min(chunk, steps - start)
            run, warm = None, False
        # A graph is worth a new capture when half of the rows are gone; without one, they leave at once.
        count = left if graph is None else min(len(rows), 1 << (left - 1).bit_length())
        if count < len(rows):
            kept = ended.int().argsort(stable=True)[:count]
            slots.select(kept)
            rows, position, logits = rows[kept], position[kept], logits[kept]
            run, warm = None, False
        for _ in range(min(CHECK, steps - start)):
            if graph is None or not warm:  # what is captured must have run before
                step()
                warm = True
            else:
                run = run or graph(step)
                run()
    return tokens, logprobs


class Slots:
    """Keys and values of N rows, a slot for each token: every row fills its own from the left, however long it is.

    Memory is taken once, for the longest response, and used as far as `size`: to grow or to lose rows copies nothing
    beside it, and an allocator is left no holes."""

    def __init__(self, layers: list, padding: torch.Tensor, repeats: int, dtype: torch.dtype, room: int):
        """layers: of transformers' cache after the prefill, [P, heads, L, D] each, which is emptied; padding [P], left
        of each prompt; repeats: rows for each prompt; dtype: of the computation (the cache may hold another); room:
        slots for the response."""
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        prompts, heads, self.size, width = layers[0].keys.shape
        places = torch.arange(self.size, device=padding.device) + padding[:, None]  # [P, L]
        places = places.clamp(max=self.size - 1)[:, None, :, None].expand_as(layers[0].keys)
        for layer in layers:
            for mine, theirs in ((self.keys, layer.keys), (self.values, layer.values)):
                mine.append(theirs.new_zeros(prompts * repeats, heads, self.size + room, width, dtype=dtype))
                mine[-1].unflatten(0, (prompts, repeats))[:, :, :, :self.size] = theirs.gather(2, places)[:, None]
            layer.keys = layer.values = None
        self.lengths = (self.size - padding).repeat_interleave(repeats)  # [N] slots filled

    def select(self, rows: torch.Tensor) -> None:
        self.lengths = self.lengths[rows]
        for tensors in (self.keys, self.values):
            for i, t in enumerate(tensors):
                t[:len(rows), :, :self.size] = t[rows, :, :self.size]
                tensors[i] = t[:len(rows)]

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put each row's newest key and value, [N, heads, 1, D], into its next slot -> the layer's slots in use."""
        rows = torch.arange(len(key), device=key.device)
        self.keys[layer][rows, :, self.lengths] = key[:, :, 0]
        self.values[layer][rows, :, self.lengths] = value[:, :, 0]
        return self.keys[layer][:, :, :self.size], self.values[layer][:, :, :self.size]

    def mask(self) -> torch.Tensor:
        """[N, 1, 1, S]: the slots that are filled, the newest token's own among them."""
        return (torch.arange(self.size, device=self.lengths.device) <= self.lengths[:, None])[:, None, None]


def capture(step: Callable) -> Callable:
    """One decode step as a CUDA graph: one launch where Python would make a thousand. The step itself, where that
    fails, which is said."""
    stream = torch.cuda.current_stream()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
        return graph.replay
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # (a failed capture may leave its own in force)
        warnings.warn(f"decoding step by step, slowly: the CUDA graph failed: {error}", stacklevel=2)
        return step


# --- scoring ----------------------------------------------------------------------------------------------------------

@dataclass
class Packed:
    """One row of the trainer: a prompt, responses to it side by side, and what the loss takes with each of them."""

    prompt: Prompt
    responses: list[list[int]]  # [T] token ids each
    advantages: list[float] = field(default_factory=list)
    sampled: list[torch.Tensor] = field(default_factory=list)  # [T] each, the sampler's log-probs
    old: list[torch.Tensor] | None = None  # [T] each, the policy's log-probs at sampling time; None: its present ones
    counted: bool = True  # False: fills up a rank's micro-batches, and is nothing to the loss

    def __len__(self) -> int:
        return len(self.prompt.ids) + sum(map(len, self.responses))


@dataclass
class Sequences:
    """Who sees whom among the tokens of a batch: sequences of queries and keys, causal and aligned at their ends."""

    queries: torch.Tensor  # [n] places in the batch, flat, in order, sequence after sequence; padding is in none
    keys: torch.Tensor  # [m] the same for their keys
    ends_q: torch.Tensor  # [sequences + 1] int32, where each begins and ends
    ends_k: torch.Tensor  # [sequences + 1]
    longest_q: int
    longest_k: int

    @classmethod
    def of(cls, parts: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> Sequences:
        """parts: of each sequence the places of its queries and of its keys."""
        queries, keys = zip(*parts)
        ends_q, ends_k = (torch.tensor([0, *map(len, of)]).cumsum(0).int().to(device) for of in (queries, keys))
        return cls(torch.cat(queries).to(device), torch.cat(keys).to(device), ends_q, ends_k, max(map(len, queries)),
                   max(map(len, keys)))


@dataclass
class Packing:
    """Packed rows as the model is fed them: in one, one after the other, L tokens without padding."""

    inputs: dict[str, torch.Tensor]  # input_ids [1, L], position_ids [3, 1, L], pixel_values, image_grid_thw
    sequences: Sequences
    before: torch.Tensor  # [n] for each response token the place whose hidden state foretells it
    targets: torch.Tensor  # [n] the token


def pack(model: PreTrainedModel, processor: Processor, rows: list[Packed]) -> Packing:
    """A prompt sees itself, a response its prompt and itself, and its positions begin where the prompt's end."""
    ids: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    before: list[torch.Tensor] = []
    end = 0
    for row in rows:
        prompt, own = row.prompt.ids, end + torch.arange(len(row.prompt.ids))
        position = torch.arange(len(prompt)).expand(3, -1)
        if row.prompt.grid is not None:
            pictured = (prompt == processor.image_id).int()[None]
            position = model.model.get_rope_index(
                prompt[None], mm_token_type_ids=pictured, image_grid_thw=row.prompt.grid)[0][:, 0]
        ids.append(prompt)
        positions.append(position)
        parts.append((own, own))
        end += len(prompt)
        for response in map(torch.tensor, row.responses):
            count = torch.arange(len(response))
            ids.append(response)
            positions.append((position.max() + 1 + count).expand(3, -1))
            parts.append((end + count, torch.cat([own, end + count])))
            before += [own[-1:], end + count[:-1]]
            end += len(response)
    inputs = {"input_ids": torch.cat(ids)[None], "position_ids": torch.cat(positions, 1)[:, None]}
    inputs |= pictures_of([row.prompt for row in rows])
    device = device_of(model)
    targets = torch.cat([torch.tensor(response) for row in rows for response in row.responses])
    return Packing({name: x.to(device) for name, x in inputs.items()}, Sequences.of(parts, device),
                   torch.cat(before).to(device), targets.to(device))


def response_logprobs(model: PreTrainedModel, processor: Processor, rows: list[Packed], temperature: float,
                      chunk: int = 1024, blank: Prompt | None = None,
                      ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score the N responses of packed rows, in order -> (log-probs, entropy, mask), each [N, T].

    log-probs are of the sampling distribution (temperature, vision tokens excluded) and carry gradients; entropy is
    that distribution's, in nats, without gradients. mask is 1 on response tokens, the stop token among them, by
    position and never by token value: the stop token may be the pad token too. At most chunk x V logits exist at a
    time, in the backward pass too, however long the responses are. blank: its picture goes through the vision tower
    where no row has one, and counts nothing: processes that share a sharded model must make the same calls."""
    packing, device = pack(model, processor, rows), device_of(model)
    excluded = torch.tensor(processor.vision_ids, device=device)

    def head(hidden: torch.Tensor, target: torch.Tensor):  # [n, H], [n] -> [n], [n]
        logp = log_distribution(model.lm_head(hidden), temperature, excluded)  # [n, V]
        return logp.gather(-1, target[:, None])[:, 0], torch.special.entr(logp.detach().exp()).sum(-1)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:  # [n], [n]
        seen = []
        if blank and blank.pixels is not None and blank.grid is not None and "pixel_values" not in packing.inputs:
            seen = tree_leaves(model.model.visual(blank.pixels.to(device), grid_thw=blank.grid.to(device)))
        hidden = model.model(**packing.inputs, sequences=packing.sequences,
                             use_cache=False).last_hidden_state[0, packing.before]  # [n, H]
        for features in seen:  # (a gradient of 0, and not none)
            hidden = hidden + 0 * features.sum() if features.is_floating_point() else hidden
        parts = [checkpoint(head, h, t, use_reentrant=False)
                 for h, t in zip(hidden.split(chunk), packing.targets.split(chunk))]
        logp, entropy = zip(*parts)
        return torch.cat(logp), torch.cat(entropy)

    with autocast(model):
        logp, entropy = model.inside(forward) if hasattr(model, "inside") else forward()  # (inside: shard)
    lengths = torch.tensor([len(r) for row in rows for r in row.responses])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)  # [N, T]
    nothing = torch.zeros(mask.shape, device=device)
    return nothing.masked_scatter(mask, logp), nothing.masked_scatter(mask, entropy), mask


# === the fold: below, attention, memory, how a policy is loaded, and how several processes share it ===================

# --- attention --------------------------------------------------------------------------------------------------------

def attention(module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
              attention_mask: torch.Tensor | None = None, *, slots: Slots | None = None,
              sequences: Sequences | None = None, cu_seq_lens_q: torch.Tensor | None = None, max_length_q: int = 0,
              **options) -> tuple[torch.Tensor, None]:
    """transformers' attention: query [B, heads, L, D], key and value [B, key heads, L, D] -> [B, L, heads, D].

    slots: the sampler's; the query is each row's newest token. sequences: of a prefill and of the trainer's rows.
    cu_seq_lens_q, max_length_q: ends and longest of the vision tower's windows, which are not causal. None of these: as
    transformers has it."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # (under autocast the rotation has left them in fp32)
    if slots is not None:
        keys, values = slots.write(module.layer_idx, key, value)  # [N, key heads, S, D]
        if query.is_cuda and is_flash_attn_2_available() and value.dtype != torch.float32:
            return flash_attn_with_kvcache(query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2),
                                           cache_seqlens=(slots.lengths + 1).int(), softmax_scale=module.scaling), None
        # The heads that share a key head stand as its queries: one read of the cache, and no copy of it for each head.
        shared = query.view(len(query), keys.shape[1], -1, query.shape[-1])  # [N, key heads, heads of each, D]
        out = F.scaled_dot_product_attention(shared, keys, values, attn_mask=attention_mask, scale=module.scaling)
        return out.reshape(len(query), 1, -1, query.shape[-1]), None
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B * L, heads, D]
    if cu_seq_lens_q is not None:  # (first: the other arguments of the language model reach the vision tower too)
        ends, longest = cu_seq_lens_q.int(), int(max_length_q)
        return varlen(q, k, v, ends, ends, longest, longest, module.scaling, causal=False)[None], None
    if sequences is not None:
        s, whole = sequences, len(sequences.queries) == len(q)  # whole: nothing is padded, the queries are as they lie
        out = varlen(q if whole else q[s.queries], k[s.keys], v[s.keys], s.ends_q, s.ends_k, s.longest_q, s.longest_k,
                     module.scaling, causal=True)
        out = out if whole else torch.zeros_like(q).index_copy(0, s.queries, out)
        return out.unflatten(0, (len(query), -1)), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends_q: torch.Tensor, ends_k: torch.Tensor,
           longest_q: int, longest_k: int, scale: float, causal: bool) -> torch.Tensor:
    """Attention of sequences that stand one after the other; causal: aligned at their ends.

    q [n, heads, D], k and v [m, key heads, D]; ends [sequences + 1] int32 -> [n, heads, D]."""
    if q.is_cuda and q.dtype != torch.float32:
        if is_flash_attn_2_available():
            return flash_attn_varlen_func(q, k, v, ends_q, ends_k, longest_q, longest_k, softmax_scale=scale,
                                          causal=causal)
        return varlen_attn(q, k, v, ends_q, ends_k, longest_q, longest_k, scale=scale,
                           window_size=(-1, 0) if causal else (-1, -1), **GROUPED)  # type: ignore[return-value]
    out, lengths_q, lengths_k = [], ends_q.diff().tolist(), ends_k.diff().tolist()
    for queries, keys, values in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k)):
        seen = len(keys) - len(queries)
        for piece in queries.split(PIECE if causal else len(queries)):
            seen = seen + len(piece) if causal else len(keys)
            a, b, c = (x.transpose(0, 1)[None] for x in (piece, keys[:seen], values[:seen]))  # [1, heads, length, D]
            square = len(piece) == seen
            mask = a.new_ones(len(piece), seen, dtype=torch.bool).tril(seen - len(piece)) if causal > square else None
            part = F.scaled_dot_product_attention(a, b, c, mask, is_causal=causal and square, scale=scale,
                                                  enable_gqa=True)
            out.append(part[0].transpose(0, 1))
    return torch.cat(out)


class PatchEmbedding(torch.nn.Conv3d):
    """The vision tower's: the kernel is the patch, and the convolution a product. (In bf16 cuDNN may take seconds.)"""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:  # [n, C, frames, h, w] -> [n, D, 1, 1, 1]
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


AttentionInterface.register("sequences", attention)
AttentionInterface.register("sequences_flash", attention)  # (with "flash" in its name it is handed all windows at once)
AttentionMaskInterface.register("sequences", sdpa_mask)  # (of a forward that is none of ours)


def use_own_kernels(model: PreTrainedModel) -> None:
    """Give a model of transformers the attention and the patch embedding above. What it computes stays the same."""
    model.model.language_model.config._attn_implementation = "sequences"
    model.model.visual.config._attn_implementation = "sequences_flash"
    model.model.visual.patch_embed.proj.__class__ = PatchEmbedding


# --- memory and pictures ----------------------------------------------------------------------------------------------

def prompts_that_fit(model: PreTrainedModel, prompts: list[Prompt], samples: int, max_tokens: int) -> int:
    """Prompts, each like the longest, that four fifths of the GPU memory that is free hold: while they are prefilled,
    and while `samples` rows of each decode, with keys and values as long as they may become."""
    if model.device.type != "cuda" or not prompts:
        return sys.maxsize
    config, size = model.config.text_config, model.dtype.itemsize
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * width * size
    longest = max(len(prompt.ids) for prompt in prompts)
    pixels = max((prompt.pixels for prompt in prompts if prompt.pixels is not None), key=len, default=torch.empty(0, 0))
    # A block holds some four tensors as wide as its widest layer at a time; pixels stay until the rows have ended.
    text, vision = (4 * size * max(len(weight) for weight in blocks[0].parameters())
                    for blocks in (model.model.language_model.layers, model.model.visual.blocks))
    prefill = longest * (token + text) + len(pixels) * vision + 2 * pixels.nbytes
    decoding = samples * (longest + max_tokens) * token + pixels.nbytes
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # (torch's, of no tensor)
    return int(0.8 * (torch.cuda.mem_get_info()[0] + unused)) // max(prefill, decoding)


def encode_ahead(processor: Processor, batches: Iterable[list[Record]], style: str) -> Iterator[list[Prompt]]:
    """The prompts of each batch. Threads make those of the next one, a picture of 1 MP in a tenth of a second, while
    the policy works on this. Raises ValueError as Processor.encode does."""
    pool, coming = ThreadPoolExecutor(4), None
    try:
        for batch in batches:
            now, coming = coming, [pool.submit(processor.encode, record, style) for record in batch]
            if now is not None:
                yield [prompt.result() for prompt in now]
        if coming is not None:
            yield [prompt.result() for prompt in coming]
    finally:
        pool.shutdown(cancel_futures=True)


@torch.no_grad()
def picture_effect(model: PreTrainedModel, processor: Processor, prompt: Prompt, response: list[int],
                   temperature: float) -> float:
    """Is the picture seen? Mean |change| of the log-probs of a response's tokens, in nats, when grey pictures of the
    same size stand in the prompt; 0.0 where it has none."""
    if prompt.pixels is None:
        return 0.0
    scale = zip(processor.image_processor.image_mean, processor.image_processor.image_std)
    grey = torch.tensor([(0.5 - mean) / std for mean, std in scale])  # [C]; a patch lies channel after channel
    grey = grey.repeat_interleave(prompt.pixels.shape[1] // len(grey)).expand_as(prompt.pixels)
    seen, blind = (response_logprobs(model, processor, [Packed(each, [response])], temperature)[0]
                   for each in (prompt, replace(prompt, pixels=grey)))
    return (seen - blind).abs().mean().item()


# --- the policy -------------------------------------------------------------------------------------------------------

def load_policy(path: str, device: torch.device | str = "cpu", *, dtype: torch.dtype = torch.float32,
                freeze_vision: bool = False, gradient_checkpointing: bool = False, base: str = "", lora_rank: int = 0,
                seed: int = 0) -> PreTrainedModel:
    """Load a policy; to be trained in fp32 weights (in bf16 a step of lr 1e-6 would move 2% of them at all).

    freeze_vision: the vision tower gets no gradient. path may be a folder of LoRA adapters, whose model is `base`, or
    what they name. lora_rank: give the model new ones, drawn by seed (add_adapters). A small model on a CPU sets the
    process to one thread (SMALL). Raises ValueError when path is no Qwen vision-language model."""
    adapters = path if has_adapters(path) else ""
    if adapters:
        path = base or json.loads((Path(path) / ADAPTERS).read_text())["base_model_name_or_path"]
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise ValueError(f"{path}: no config.json inside; --model wants a Hugging Face model folder or hub id")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        named = f", of which the adapters in {adapters} are" if adapters else ""
        raise ValueError(f"{path}{named}: not a model folder, and no model of that name can be fetched: {error}"
                         ) from error
    if config.model_type not in FAMILIES:
        raise ValueError(f"{path} is a {config.model_type!r} model; this code knows {', '.join(FAMILIES)}")
    if "sliding_attention" in (getattr(config.text_config, "layer_types", None) or ()):
        raise ValueError(f"{path}: some of its layers see a sliding window only, which this code does not compute")
    if not QUIET:  # (transformers' own bars are off: it has one for each copy of the toy, too)
        print(f"loading {path}", file=sys.stderr)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, trust_remote_code=False).to(device)
    use_own_kernels(model)
    if model.device.type == "cpu" and model.num_parameters() < SMALL and not THREADS & os.environ.keys():
        os.environ["OMP_NUM_THREADS"] = "1"  # (the processes it starts, and accelerate, heed this)
        torch.set_num_threads(1)
    if freeze_vision:
        model.model.visual.requires_grad_(False)
    if adapters or lora_rank:
        add_adapters(model, adapters, lora_rank, freeze_vision, seed)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


# --- LoRA (2106.09685), by peft ---------------------------------------------------------------------------------------

ADAPTERS = "adapter_config.json"  # tells a folder of adapters
ALPHA = 32  # their product counts alpha / rank; so the best lr hardly depends on the rank ("LoRA Without Regret")


def has_adapters(folder: str) -> bool:
    return (Path(folder) / ADAPTERS).exists()


def add_adapters(model: PreTrainedModel, folder: str, rank: int, freeze_vision: bool, seed: int) -> None:
    """Put beside each matrix of the blocks a product of two of this rank, in fp32, that alone is trained. folder: those
    that were saved there, else new ones, which change nothing yet."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict  # (its import takes seconds)
    from peft.utils import load_peft_weights

    blocks = r"language_model\.layers" if freeze_vision else r"(language_model\.layers|visual\.blocks)"
    base = model.name_or_path
    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=rf"model\.{blocks}\..*(proj|qkv|fc1|fc2)",
                        base_model_name_or_path=os.path.abspath(base) if os.path.isdir(base) else base)
    if folder:
        config = LoraConfig.from_pretrained(folder)
        config.inference_mode = False
    with torch.random.fork_rng(devices=[]):  # (peft draws on the CPU)
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if folder:
        set_peft_model_state_dict(model, load_peft_weights(folder, device=str(model.device)))


@contextlib.contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """The model as it was before it was given any; of one that has none, itself."""
    layers: list = []
    if hasattr(model, "peft_config"):
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_weights(model: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """A model's weights, by name, as transformers saves them; of one with adapters these, as peft does."""
    if not hasattr(model, "peft_config"):
        model.save_pretrained(folder, state_dict=weights)
        return
    from peft import get_peft_model_state_dict

    adapters = get_peft_model_state_dict(model, state_dict=weights)
    model.peft_config["default"].save_pretrained(folder)
    save_file({f"base_model.model.{name}": weight for name, weight in adapters.items()},
              folder / "adapter_model.safetensors")


def device_of(model: PreTrainedModel) -> torch.device:
    """Where it computes: weights may be off-loaded to the CPU meanwhile (shard)."""
    return getattr(model, "computes_on", model.device)


def autocast(model: PreTrainedModel):
    """bf16 compute where fp32 weights lie on a GPU; elsewhere the weights' own precision."""
    # (a sharded model's blocks compute in bf16 by themselves)
    masters = device_of(model).type == "cuda" and model.dtype == torch.float32 and not hasattr(model, "inside")
    # (without its cache of cast weights while sampling: a captured step would keep their addresses)
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=model.training) if masters else contextlib.nullcontext()


# --- the policy in training -------------------------------------------------------------------------------------------

@dataclass
class Policy:
    """The policy in its several forms, and what moves it."""

    model: PreTrainedModel  # fp32, in shares where there are several processes
    sampler: PreTrainedModel  # a plain replica to sample with; on one CPU, or one GPU with LoRA, the policy itself
    reference: PreTrainedModel | None  # with a KL: the model that the run began with (its adapters are then put off)
    optimizer: torch.optim.AdamW
    processor: Processor


def load_trainer(source: str, processor: Processor, device: torch.device, *, lr: float, start: str = "",
                 kl: bool = False, freeze_vision: bool = False, gradient_checkpointing: bool = False,
                 offload: bool = False, lora_rank: int = 0, seed: int = 0) -> Policy:
    """Load a checkpoint to be trained; start: the folder or hub id of the model that the run began with, to which a KL
    is, and LoRA's adapters. With these the weights are in bf16 on a GPU, which need no replica, and are the reference
    when the adapters are off. A collective."""
    if lora_rank == 0 and has_adapters(source) or has_adapters(start):
        raise ValueError(f"{start or source} holds LoRA adapters, not a model to train: merge them first, "
                         "PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(...)")
    sharded, half = rank_and_world()[1] > 1 or offload, torch.bfloat16 if device.type == "cuda" else torch.float32

    def ready(model: PreTrainedModel) -> PreTrainedModel:  # each is shared out before the next is loaded: together,
        if sharded:  # whole, they may be too much
            shard(model, device, offload)
        return model

    home = torch.device("cpu") if sharded else device
    load = partial(load_policy, source, base=start, lora_rank=lora_rank, freeze_vision=freeze_vision, seed=seed)
    model = ready(load(home, dtype=half if lora_rank else torch.float32, gradient_checkpointing=gradient_checkpointing))
    reference = model if kl and lora_rank else None
    if kl and not lora_rank:
        reference = ready(load_policy(start, home, dtype=half).requires_grad_(False).eval())
    sampler = model
    if sharded or device.type == "cuda" and not lora_rank:
        sampler = load(device, dtype=half).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=device.type == "cuda" and not offload)
    return Policy(model, sampler, reference, optimizer, processor)


def shard(model, device: torch.device, offload: bool) -> None:
    """FSDP2: each rank keeps 1/world of every weight, gradient and moment in fp32, and gathers a block at a time, in
    bf16 on a GPU, to compute. offload: they lie in the CPU's memory meanwhile."""
    from torch.distributed import fsdp  # (here: it would be a second of every program's start)

    # (Inputs are not cast: rounded rotary angles would make another policy than the replica's.)
    half = fsdp.MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(device.type, (rank_and_world()[1],))
    precision = half if device.type == "cuda" else fsdp.MixedPrecisionPolicy()
    place = fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else fsdp.OffloadPolicy()
    for part in [*model.model.visual.blocks, *model.model.language_model.layers, model]:
        fsdp.fully_shard(part, mesh=mesh, mp_policy=precision, offload_policy=place)
    # What is outside of the blocks (embeddings, head, norms) is gathered when this is called.
    model.computes_on, model.inside = device, lambda work: work()
    fsdp.register_fsdp_forward_method(model, "inside")


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded. A collective."""
    if hasattr(value, "full_tensor"):  # (a DTensor)
        return value.to(value.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
    return value


@torch.no_grad()
def copy_weights(policy: Policy) -> None:
    """Give the replica that samples the policy's weights. It is a plain model: generating with the sharded one would
    gather every layer for every token. A collective."""
    if policy.sampler is not policy.model:
        for copy, weight in zip(policy.sampler.parameters(), policy.model.parameters(), strict=True):
            copy.copy_(full_tensor(weight.to(copy.dtype)))


def load_to_sample(path: str, max_pixels: int | None) -> tuple[PreTrainedModel, Processor]:
    """A model to sample with, on this process's own GPU where there are any, and its processor."""
    processor, device = Processor(path, max_pixels), claim_device()
    return load_policy(path, device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32), processor


# --- several processes ------------------------------------------------------------------------------------------------

def claim_device() -> torch.device:
    """Take this process's own GPU where there are any, else the CPU. (Not Apple's: nothing here was ever tried on it.)

    Raises ValueError where the processes of this machine are more than its GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local > gpus:
        raise ValueError(f"{local} processes for {gpus} GPUs; start at most one on each")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # cuDNN's attention, which torch takes first on an H100 or newer, plans anew for every length, and has returned NaN
    # gradients (pytorch issue 196678; trl 7181) and wrong tokens (193893).
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda")


def start_processes(offload: bool = False) -> torch.device:
    """Meet the other processes of torchrun, where there are any -> this one's device. Every program calls it first."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # (a single process saves by itself, and may)
    device = claim_device()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if dist.is_initialized():
        return device
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # (one rank may answer, or save, for long while others wait for it;
        dist.init_process_group(backend, timeout=timedelta(days=7))  # one that dies ends all at once: torchrun)
    elif offload:  # off-loading is FSDP's, which wants a group, be it of one
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_rank_0(work: Callable):
    """Rank 0 does the work; every rank gets its result. A collective: every rank must call it.

    Raises ValueError on rank 0 for a ValueError or OSError of the work, SystemExit on the others: rank 0 alone prints.
    """
    rank, world = rank_and_world()
    result, fault, cause = None, None, None
    if rank == 0:
        try:
            result = work()
        except (ValueError, OSError) as error:  # OSError: a full disk, a folder that may not be written to
            fault, cause = str(error), error
    if world > 1:
        box = [result, fault]
        dist.broadcast_object_list(box)
        result, fault = box
    if fault is not None:
        if rank > 0:
            raise SystemExit(1)
        raise ValueError(fault) from cause
    return result


def gather_shares(share: list) -> list:
    """Each rank's share [rank::world] of a list -> the whole list, on all ranks. A collective."""
    _, world = rank_and_world()
    shares = [share] * world
    if world > 1:
        dist.all_gather_object(shares, share)
    return [shares[i % world][i // world] for i in range(sum(map(len, shares)))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a checkpoint one question about a picture.")
    positive = number(int, 1)
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--image", nargs="*", default=[], help="picture files")
    parser.add_argument("--question", required=True)
    parser.add_argument("--prompt", choices=sorted(PROMPTS), default="observe", help="prompt style")
    parser.add_argument("--samples", type=positive, default=1, help="responses to sample")
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, help="0: greedy")
    parser.add_argument("--max-tokens", type=positive, default=1024, help="longest response")
    parser.add_argument("--max-pixels", type=positive, help="area above which pictures are shrunk (default: its own)")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    args = parser.parse_args()
    # (a record needs a gold answer; none is known here and none is used)
    record = Record("command line", args.question, "unknown", images=tuple(map(open_image, args.image, args.image)))
    start_processes()
    model, processor = load_to_sample(args.model, args.max_pixels)
    prompts = [processor.encode(record, args.prompt)]
    print("answering", file=sys.stderr)
    [group] = sample_groups(model, processor, [record], prompts, samples=args.samples, temperature=args.temperature,
                            max_tokens=args.max_tokens, seed=args.seed)
    print("\n\n".join(sample.text for sample in group.samples))


if __name__ == "__main__":
    run_program(main, "stopped")
