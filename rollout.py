"""What the policy does: load it, sample groups of responses, score their tokens.

    load_policy        a Qwen-VL checkpoint in fp32, flash-attention where it is installed
    sample_groups      G responses to each prompt, through transformers' `generate`
    response_logprobs  log pi(o_t | q, o_<t) of given responses, with gradients

The sampler and the trainer must agree to rounding, or the update is not the policy's own gradient. So both divide
logits by the temperature and give the vision tokens probability 0, token ids go from one to the other without passing
through text, and the generation settings that a checkpoint brings along (Qwen's: top_k 1, repetition penalty 1.05)
are replaced whole.

    python rollout.py --model CHECKPOINT --image x.png --question "..."

Shapes: P prompts, G responses of a group, N = P * G rows, T response tokens, H hidden size, V vocabulary.
"""
from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from data import PROMPTS, Processor, Prompt, Record

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # each is tested tiny; any other is refused by name


@dataclass
class Group:
    """G responses to one prompt."""

    record: Record
    prompt: Prompt
    responses: list[list[int]]  # G lists of token ids, each with its stop token where one came
    texts: list[str]  # the same as text, without the stop token
    truncated: list[bool]  # whether max_tokens cut it off: no stop token came


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU. (Not Apple's: nothing here was ever tried on it.)"""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_policy(path: str, device: torch.device | str = "cpu", *, freeze_vision: bool = False,
                gradient_checkpointing: bool = False) -> PreTrainedModel:
    """Load a policy with fp32 weights (in bf16 a step of lr 1e-6 would move 2% of them at all).

    freeze_vision: the vision tower gets no gradient. Raises ValueError when path is no Qwen vision-language model.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise ValueError(f"{path}: no config.json inside; --model wants a Hugging Face model folder or hub id")
    try:
        family = AutoConfig.from_pretrained(path).model_type
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a model folder, and no model of that name can be fetched: {error}") from error
    if family not in FAMILIES:
        raise ValueError(f"{path} is a {family!r} model; this code knows {', '.join(FAMILIES)}")
    flash = torch.device(device).type == "cuda" and is_flash_attn_2_available()
    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, attn_implementation="flash_attention_2" if flash else "sdpa").to(device)
    if freeze_vision:
        model.model.visual.requires_grad_(False)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def autocast(model: PreTrainedModel):
    """bf16 compute on a GPU, fp32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if model.device.type == "cuda" else contextlib.nullcontext()


def generation_config(processor: Processor, *, samples: int, temperature: float, max_tokens: int) -> GenerationConfig:
    """Every setting that shapes sampling, stated. temperature 0 is greedy."""
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    return GenerationConfig(
        **(sampling if temperature > 0 else {"do_sample": False}), num_return_sequences=samples, num_beams=1,
        max_new_tokens=max_tokens, repetition_penalty=1.0, use_cache=True, bos_token_id=None,
        eos_token_id=processor.stop_ids, pad_token_id=processor.pad_id,
        suppress_tokens=processor.vision_ids)  # a sampled <|image_pad|> would be an image without pixels


@torch.no_grad()
def sample_groups(model: PreTrainedModel, processor: Processor, records: list[Record], prompts: list[Prompt], *,
                  samples: int, temperature: float, max_tokens: int, seed: int, max_rows: int = 256) -> list[Group]:
    """Sample `samples` responses to each of P prompts, at most max_rows rows at a time -> P groups, in order.

    The global random state is left as it was; equal seeds give equal responses.
    """
    config = generation_config(processor, samples=samples, temperature=temperature, max_tokens=max_tokens)
    was_training, inherited = model.training, model.generation_config
    model.eval()  # in train mode gradient checkpointing silently drops the cache, and the text comes out wrong
    model.generation_config = config  # `generate` fills unset fields from here: nothing inherited may be left
    stops, groups = set(processor.stop_ids), [None] * len(prompts)
    # Neighbours in length share a batch, so that little of it is padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    per_batch = max(1, max_rows // samples)
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), autocast(model):
            torch.manual_seed(seed)
            for start in range(0, len(order), per_batch):
                chosen = order[start:start + per_batch]
                inputs = processor.collate([prompts[i] for i in chosen])
                model.model.rope_deltas = None  # positions of an earlier call must not leak into this one
                output = model.generate(**{k: v.to(model.device) for k, v in inputs.items()}, generation_config=config)
                rows = output[:, inputs["input_ids"].shape[1]:].tolist()  # [N, T], padded after the stop token
                for j, i in enumerate(chosen):
                    responses, cut = [], []
                    for row in rows[j * samples:(j + 1) * samples]:
                        end = next((t for t, token in enumerate(row) if token in stops), None)
                        responses.append(row if end is None else row[:end + 1])
                        cut.append(end is None)
                    texts = [processor.decode(r) for r in responses]
                    groups[i] = Group(records[i], prompts[i], responses, texts, cut)
    finally:
        model.generation_config = inherited
        model.model.rope_deltas = None
        model.train(was_training)
    return groups


def response_logprobs(model: PreTrainedModel, processor: Processor, prompts: list[Prompt], responses: list[list[int]],
                      temperature: float, chunk: int = 2048) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score N responses, each after its prompt -> (log-probs, entropy, mask), each [N, T].

    log-probs are of the sampling distribution (temperature, vision tokens excluded) and carry gradients; entropy is
    that distribution's, in nats, without gradients. mask is 1 on response tokens, the stop token among them, by
    position and never by token value: the stop token may be the pad token too.
    """
    lengths = torch.tensor([len(r) for r in responses], device=model.device)
    inputs = {k: v.to(model.device) for k, v in processor.collate(prompts, responses).items()}
    steps = int(lengths.max())
    mask = torch.arange(steps, device=model.device) < lengths[:, None]  # [N, T]
    targets = inputs["input_ids"][:, -steps:][mask]  # [n], all response tokens in a row
    vision = torch.tensor(processor.vision_ids, device=model.device)

    def head(hidden: torch.Tensor, target: torch.Tensor):  # [n, H], [n] -> [n], [n]
        logits = model.lm_head(hidden).float() / temperature
        logp = logits.index_fill(-1, vision, float("-inf")).log_softmax(-1)  # [n, V]
        entropy = torch.special.entr(logp.detach().exp()).sum(-1)
        return logp.gather(-1, target[:, None])[:, 0], entropy

    with autocast(model):
        model.model.rope_deltas = None
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, -steps - 1:-1][mask]  # [n, H]
        # In checkpointed chunks: [n, V] logits of a whole batch would be the largest tensor of the step.
        parts = [checkpoint(head, h, t, use_reentrant=False) for h, t in zip(hidden.split(chunk), targets.split(chunk))]
    logprobs = torch.zeros(mask.shape, device=model.device)
    entropy = torch.zeros(mask.shape, device=model.device)
    logprobs = logprobs.masked_scatter(mask, torch.cat([p[0] for p in parts]))
    entropy = entropy.masked_scatter(mask, torch.cat([p[1] for p in parts]))
    return logprobs, entropy, mask


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a checkpoint one question about a picture.")
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--image", nargs="*", default=[], help="picture files")
    parser.add_argument("--question", required=True)
    parser.add_argument("--prompt", choices=sorted(PROMPTS), default="observe", help="prompt style")
    parser.add_argument("--samples", type=int, default=1, help="responses to sample")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest response")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    processor = Processor(args.model)
    model = load_policy(args.model, best_device())
    # (a record needs a gold answer; none is known here and none is used)
    record = Record("command line", args.question, "unknown", images=tuple(args.image))
    prompts = [processor.encode(record, args.prompt)]
    [group] = sample_groups(model, processor, [record], prompts, samples=args.samples, temperature=args.temperature,
                            max_tokens=args.max_tokens, seed=args.seed)
    print("\n\n".join(group.texts))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
