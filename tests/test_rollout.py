"""The sampler and the trainer must see one distribution: pitfalls that change log-probs without an error.

Checks 1-8 and 14 of the field's known faults, on the shipped model and on tiny random models of the other families.
"""
from __future__ import annotations

import inspect
import io
import json
import shutil
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TOY
from PIL import Image
from plain import pad, plain_attention, plain_logprobs, plain_rollout
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

import rollout
from data import PROMPTS, Processor, Record
from rollout import CHECK, Packed, decode, draw, generation_config, load_policy, response_logprobs, sample_groups


def picture(width: int, height: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def mixed() -> list[Record]:
    """Unequal pictures, several pictures, none: rows of every kind in one batch."""
    return [
        Record("one", "What is the sum of all the digits?", "1", (picture(56, 28, 0),)),
        Record("two", "<image> Is it <image>?", "yes", (picture(28, 84, 1), picture(84, 56, 2))),
        Record("none", "What is the largest digit? " * 3, "3", ()),
        Record("large", "Which row has the largest sum?", "A", (picture(112, 84, 3),), ("row 1", "row 2")),
    ]


def encode(processor, records):
    return [processor.encode(r, "observe") for r in records]


def sample(model, processor, records, **options):
    options = {"samples": 2, "temperature": 1.0, "max_tokens": 12, "seed": 3} | options
    return sample_groups(model, processor, records, encode(processor, records), **options)


def ids(*groups) -> list[list[int]]:
    """All responses, as tokens."""
    return [s.ids for g in groups for s in g.samples]


def packed(groups, most: int = 99) -> list[Packed]:
    return [Packed(g.prompt, ids(g)[i:i + most]) for g in groups for i in range(0, len(g.samples), most)]


def padded(groups) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([s.logprobs for g in groups for s in g.samples], batch_first=True)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sampler_trainer_and_plain_forward_agree(model, processor, mixed, temperature, checkpointing):
    """Padding, image order, positions, temperature, suppressed tokens, the packed rows' mask: any slip moves these by
    0.01 or more; `generate` in train mode with checkpointing on drops its cache silently, and is off by 2."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    groups = sample(model, processor, mixed, samples=3, temperature=temperature)
    assert model.training, "the mode is handed back as it was"
    sampled, responses = padded(groups), ids(*groups)
    lengths = list(map(len, responses))
    want, mask = plain_logprobs(model, processor, [g.prompt for g in groups for _ in range(3)], responses, temperature)
    assert mask.sum(1).tolist() == lengths
    torch.testing.assert_close(sampled, want, atol=1e-5, rtol=0)
    for most, together in ((3, 1), (3, 2), (3, 4), (2, 3), (1, 12)):  # responses in a row, rows in a micro-batch
        rows, got = packed(groups, most), []
        for i in range(0, len(rows), together):
            logp, _, mask = response_logprobs(model, processor, rows[i:i + together], temperature)
            got += [row[keep] for row, keep in zip(logp, mask)]
        assert [len(row) for row in got] == lengths
        torch.testing.assert_close(torch.cat(got), want[want != 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_have_the_gradients_of_padded_ones(model, processor, mixed, checkpointing):
    """A response that sees its neighbour, or a prompt whose gradient is counted once where it serves three, moves the
    log-probs little or not at all; the gradients tell."""
    groups = sample(model, processor, mixed, samples=3)
    prompts, responses = [g.prompt for g in groups for _ in range(3)], ids(*groups)
    weights = torch.randn(len(responses), 1, generator=torch.Generator().manual_seed(0))
    (plain_logprobs(model, processor, prompts, responses, 1.0)[0] * weights).sum().backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train().zero_grad()
    (response_logprobs(model, processor, packed(groups), 1.0, chunk=7)[0] * weights).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad - want[name]).norm() <= 1e-5 * want[name].norm() + 1e-7, name


SEQUENCES = {  # lengths of queries, of keys; heads, key heads; causal
    "a prompt, and responses to it, of one token too": ([300, 5, 1, 64], [300, 305, 301, 364], 4, 2, True),
    "a response of several pieces": ([321, 700], [321, 1021], 2, 1, True),
    "windows of the vision tower": ([64, 64, 16, 64, 4], [64, 64, 16, 64, 4], 3, 3, False),
}


@pytest.mark.parametrize("lengths_q, lengths_k, heads, key_heads, causal", SEQUENCES.values(), ids=SEQUENCES)
def test_attention_of_sequences_by_its_definition(lengths_q, lengths_k, heads, key_heads, causal):
    """Aligned at its beginning, not at its end, a response sees none of its prompt, and trains all the same; heads that
    share a key head wrongly, or a piece that sees a token too few, show in the gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = (sum(lengths_q), heads), (sum(lengths_k), key_heads), (sum(lengths_k), key_heads), (sum(lengths_q), heads)
    *tensors, weights = (torch.randn(*shape, 16, generator=generator, dtype=torch.float64) for shape in shapes)
    tensors = [t.requires_grad_() for t in tensors]
    ends = [torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k)]
    want = plain_attention(*tensors, lengths_q, lengths_k, 0.3, causal)
    gradients = torch.autograd.grad((want * weights).sum(), tensors)
    got = rollout.varlen(*tensors, *ends, max(lengths_q), max(lengths_k), 0.3, causal)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.autograd.grad((got * weights).sum(), tensors), gradients, atol=1e-12, rtol=0)


@pytest.mark.parametrize("flash_attn", [False, True])
def test_a_gpus_kernel_takes_what_it_is_handed(flash_attn, monkeypatch):
    """Tensors that only say they lie on a GPU go as far as its kernel, torch's or flash-attn's where it is installed:
    an argument that the kernel does not know, in one of the versions of torch, would crash the first run on a GPU."""
    def flash(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale, causal):
        asked.append((k.shape[1] < q.shape[1], cu_seqlens_k.dtype, max_seqlen_q, max_seqlen_k, causal))
        return q * 1

    asked: list[tuple] = []
    monkeypatch.setattr(rollout, "is_flash_attn_2_available", lambda: flash_attn)
    monkeypatch.setattr(rollout, "flash_attn_varlen_func", flash, raising=False)
    with FakeTensorMode(), torch.no_grad():  # (a build for CPUs alone has no gradients of such tensors)
        def fake(*shape, dtype=torch.bfloat16):
            return torch.empty(*shape, dtype=dtype, device="cuda")

        ends = fake(4, dtype=torch.int32)
        text = rollout.varlen(fake(18, 4, 16), fake(24, 2, 16), fake(24, 2, 16), ends, ends, 7, 12, 0.3, True)
        windows = rollout.varlen(*[fake(90, 4, 16)] * 3, ends, ends, 64, 64, 0.3, False)
    for out, shape in ((text, (18, 4, 16)), (windows, (90, 4, 16))):
        assert (out.shape, out.dtype, out.device.type) == (shape, torch.bfloat16, "cuda")
    wanted = [(True, torch.int32, 7, 12, True), (False, torch.int32, 64, 64, False)]
    assert asked == wanted * flash_attn


def test_no_tensor_is_as_wide_as_a_row_both_ways(shipped, processor, mixed):
    """A mask [L, L] of a row of 17,000 tokens is 300 MB, its scores as many more, and on a GPU it shuts the fast
    kernels out: neither the prefill of padded prompts nor the scoring of packed responses makes one."""
    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            seen.extend(tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    seen: list[tuple] = []
    large = replace(mixed[0], question="What is the sum of all the digits? " * 150)
    with Shapes(), torch.no_grad():
        groups = sample(shipped, processor, [large, mixed[1]], max_tokens=40)
    length = len(groups[0].prompt.ids)
    assert length > 1200 and any(length in shape for shape in seen)
    assert not [shape for shape in seen if sum(n >= length for n in shape) > 1]
    seen.clear()
    with Shapes():
        response_logprobs(shipped, processor, packed(groups), 1.0)[0].sum().backward()
    shipped.zero_grad(set_to_none=True)
    row = sum(map(len, packed(groups)))
    assert any(row in shape for shape in seen) and not [shape for shape in seen if sum(n >= length for n in shape) > 1]


def test_the_sampler_equals_transformers_own_loop(shipped, processor, mixed):
    """Greedy, token for token, on repeated and padded rows: what the cache's slots and leaving rows must not change."""
    tokens, logprobs = plain_rollout(shipped, processor, encode(processor, mixed), samples=2, temperature=0,
                                     max_tokens=60)
    groups = sample(shipped, processor, mixed, temperature=0, max_tokens=60)
    for n, s in enumerate(s for g in groups for s in g.samples):
        assert s.ids == tokens[n, :len(s.ids)].tolist()
        torch.testing.assert_close(s.logprobs, logprobs[n, :len(s.ids)], atol=1e-5, rtol=0)


def test_a_captured_decode_gives_the_same_tokens(shipped, processor, mixed, monkeypatch):
    """All but the capture itself, which needs a GPU, runs here: rows that ended are kept until half are gone, the cache
    grows in larger pieces. A captured step knows addresses: replayed after one has changed, it writes to freed memory.
    """
    def addresses(step) -> list[int]:
        held = inspect.getclosurevars(step).nonlocals
        slots, tensors = held["slots"], [value for value in held.values() if isinstance(value, torch.Tensor)]
        return [tensor.data_ptr() for tensor in (*tensors, slots.lengths, *slots.keys, *slots.values)]

    def captured(step):
        at, rows = addresses(step), len(inspect.getclosurevars(step).nonlocals["rows"])
        sizes.append(rows)

        def replay():
            assert addresses(step) == at
            step()
            assert addresses(step) == at

        return replay

    sizes: list[int] = []
    options = {"samples": 3, "temperature": 8.0, "max_tokens": 300, "seed": 5}
    want = sample(shipped, processor, mixed[:2], **options)
    monkeypatch.setattr(rollout, "decode", lambda *args, **given: decode(*args, **given | {"graph": captured}))
    got = sample(shipped, processor, mixed[:2], **options)
    assert ids(*got) == ids(*want)
    torch.testing.assert_close(padded(got), padded(want), atol=1e-5, rtol=0)
    lengths = sorted(map(len, ids(*want)), reverse=True)
    assert lengths[0] > 256 and sizes == captures(lengths, 300), "captured anew only where a size changes"


def captures(lengths: list[int], steps: int) -> list[int]:
    """Rows at each capture: at the start, where the cache grows, and where half of the rows are gone."""
    found, rows = [], len(lengths)
    for start in range(0, steps, CHECK):
        left = sum(n > start for n in lengths)
        if not left:
            break
        kept = min(rows, 1 << (left - 1).bit_length())
        if start % (16 * CHECK) == 0 or kept < rows:
            found.append(kept)
        rows = kept
    return found


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bf16_as_on_a_gpu(processor, mixed, monkeypatch, weights):
    """fp32 weights under autocast, as they are trained, and bf16 ones, as they sample: rotated keys of another dtype
    than the cache's crash there, and would do so first on a GPU."""
    policy = load_policy(str(TOY / "model"), dtype=weights)
    monkeypatch.setattr(rollout, "autocast", lambda model: torch.autocast(
        "cpu", torch.bfloat16, enabled=model.dtype == torch.float32))
    groups = sample(policy, processor, mixed, samples=4)
    logp, _, mask = response_logprobs(policy, processor, packed(groups), 1.0)
    assert logp.dtype == torch.float32 and (logp - padded(groups)).abs()[mask].mean() < 0.05
    logp.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == weights for p in policy.parameters())


def test_rows_leave_when_they_end(shipped, processor, mixed, monkeypatch):
    """A straggler must not hold the others: no decode step may have more rows than are unfinished (within CHECK)."""
    sizes, forward = [], shipped.model.language_model.embed_tokens.forward
    monkeypatch.setattr(shipped.model.language_model.embed_tokens, "forward",
                        lambda ids: (sizes.append(len(ids)) if ids.ndim == 1 else None, forward(ids))[1])
    groups = sample(shipped, processor, mixed, samples=6, max_tokens=160)
    lengths = sorted(map(len, ids(*groups)))
    for step, rows in enumerate(sizes):
        assert rows == sum(n > step // CHECK * CHECK for n in lengths), step
    assert sizes[-1] < len(lengths)


def test_one_prefill_for_a_group(shipped, processor, mixed, monkeypatch):
    """Repeated before the prefill, the vision tower and the prompt are computed G times over."""
    seen, forward = [], shipped.model.visual.forward
    monkeypatch.setattr(shipped.model.visual, "forward",
                        lambda pixels, *args, **kw: (seen.append(len(pixels)), forward(pixels, *args, **kw))[1])
    groups = sample(shipped, processor, mixed, samples=7)
    patches = sum(len(p.pixels) for p in encode(processor, mixed) if p.pixels is not None)
    assert seen == [patches]
    with torch.no_grad():
        response_logprobs(shipped, processor, packed(groups), 1.0)
    assert seen == [patches, patches]


def test_inverse_cdf_by_hand():
    """Probabilities 0.2, 0, 0.5, 0.3: edges, and never the impossible token."""
    logp = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(7, 4)
    u = torch.tensor([0.0, 0.199, 0.2001, 0.6999, 0.7001, 1 - 2**-53, 1.0], dtype=torch.float64)[:, None]
    assert draw(logp, u).tolist() == [0, 0, 2, 2, 3, 3, 3]


def test_sampled_frequencies_are_the_models(shipped, processor, mixed):
    """400 first tokens against their probabilities: a biased draw trains on a policy that is not the model's."""
    [group] = sample(shipped, processor, mixed[:1], samples=400, temperature=2.0, max_tokens=1)
    vocabulary = range(len(processor.tokenizer))
    with torch.no_grad():
        logp = shipped(**pad(processor, [group.prompt], [[]])).logits[0, -1] / 2.0
    logp[processor.vision_ids] = float("-inf")
    p = logp.softmax(-1)
    counts = torch.bincount(torch.tensor([r[0] for r in ids(group)]), minlength=len(vocabulary))
    chi2 = ((counts - 400 * p) ** 2 / (400 * p))[p > 0.01].sum().item()
    assert chi2 < 3 * (p > 0.01).sum(), (chi2, int((p > 0.01).sum()))


def test_every_position_draws_anew(shipped, processor, mixed):
    """One uniform for all positions of a response would tie its tokens together."""
    [group] = sample(shipped, processor, mixed[:1], samples=200, temperature=50.0, max_tokens=2)
    first, second = np.array([r for r in ids(group) if len(r) == 2]).T
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.3


def test_a_response_does_not_depend_on_rows_that_leave(shipped, processor, mixed):
    """Hot enough that lengths differ: where rows leave, those that stay must keep their own uniforms."""
    options = {"samples": 3, "temperature": 4.0, "max_tokens": 60}
    want = sample(shipped, processor, mixed, **options)
    assert len({-(-len(r) // CHECK) for r in ids(*want)}) > 1
    for record, group in zip(mixed, want):
        assert ids(*sample(shipped, processor, [record], **options)) == ids(group)


def test_a_response_does_not_depend_on_its_batch(shipped, processor, mixed):
    """Drawn from one stream, a response changes with what stands beside it, with batch sizes and processes."""
    want = {g.record.id: ids(g) for g in sample(shipped, processor, mixed, samples=3)}
    for chosen, options in ((mixed[::-1], {}), (mixed, {"max_rows": 3}), (mixed[1:2], {}), (mixed, {"samples": 2}),
                            (mixed, {"max_tokens": 7})):
        for g in sample(shipped, processor, chosen, **{"samples": 3} | options):
            cut = options.get("max_tokens")
            assert ids(g) == [r[:cut] for r in want[g.record.id][:len(g.samples)]]


def test_a_row_alone_is_the_row_in_a_batch(shipped, processor, mixed):
    """Left padding must not leak into positions or attention."""
    together = sample(shipped, processor, mixed, samples=1, temperature=0)
    for i, record in enumerate(mixed):
        assert ids(*sample(shipped, processor, [record], samples=1, temperature=0)) == ids(together[i])


def test_swapped_and_removed_pictures_are_noticed(shipped, processor, mixed):
    """A batch with pictures in the wrong order raises no error: only the log-probs tell."""
    prompts = encode(processor, mixed[:1] + [replace(mixed[0], images=(picture(56, 28, 9),))])
    responses = [[40, 41, 42]] * 2
    with torch.no_grad():
        right = response_logprobs(shipped, processor, [Packed(p, responses) for p in prompts], 1.0)[0]
        swapped = [Packed(replace(a, pixels=b.pixels), responses) for a, b in zip(prompts, prompts[::-1])]
        wrong = response_logprobs(shipped, processor, swapped, 1.0)[0]
    assert (right - wrong).abs().max() > 1e-3
    with pytest.raises(ValueError):
        blind = [replace(prompts[0], pixels=None, grid=None), prompts[1]]
        response_logprobs(shipped, processor, [Packed(p, responses) for p in blind], 1.0)


def test_placeholders_match_the_grid(processor, mixed):
    """One placeholder per merged patch, and the model told which they are."""
    prompts = encode(processor, mixed)
    for prompt in prompts:
        want = 0 if prompt.grid is None else int(prompt.grid.prod(1).sum()) // 4
        assert (prompt.ids == processor.image_id).sum() == want
    batch = processor.collate(prompts)
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == processor.image_id)
    assert batch["pixel_values"].shape[0] == batch["image_grid_thw"].prod(1).sum()
    assert batch["attention_mask"].sum(1).tolist() == [len(p.ids) for p in prompts]
    assert (batch["attention_mask"][:, -1] == 1).all(), "padded on the left"


def test_a_hostile_generation_config_is_not_inherited(model, processor, mixed):
    """Qwen ships temperature 1e-6, top_k 1, repetition_penalty 1.05: all G rollouts would be one."""
    want = sample(model, processor, mixed[:1], samples=8, temperature=2.0)
    model.generation_config = hostile = GenerationConfig(
        do_sample=True, temperature=1e-6, top_k=1, top_p=0.001, repetition_penalty=1.5, min_new_tokens=12,
        eos_token_id=9, forced_eos_token_id=7, no_repeat_ngram_size=1)
    got = sample(model, processor, mixed[:1], samples=8, temperature=2.0)
    assert ids(*got) == ids(*want) and len({tuple(r) for r in ids(*got)}) == 8
    assert model.generation_config is hostile


def test_generation_config_states_everything_that_shapes_sampling(processor):
    config = generation_config(processor, temperature=0.9, max_tokens=50)
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (True, 0.9, 1.0, 0)
    assert (config.repetition_penalty, config.num_return_sequences, config.max_new_tokens) == (1.0, 1, 50)
    assert config.eos_token_id == processor.stop_ids and set(config.suppress_tokens) == set(processor.vision_ids)
    assert not generation_config(processor, temperature=0, max_tokens=5).do_sample


def test_vision_tokens_have_probability_zero(model, processor, mixed):
    """A sampled <|image_pad|> is an image without pixels: scoring crashes. So neither side may give it any mass."""
    with torch.no_grad():
        model.lm_head.weight[processor.vision_ids] = 10 * model.lm_head.weight.abs().mean()  # make them attractive
    groups = sample(model, processor, mixed[:1], samples=16)
    assert not set(processor.vision_ids) & {t for r in ids(*groups) for t in r}
    [prompt] = encode(processor, mixed[:1])
    logp, _, _ = response_logprobs(model, processor, [Packed(prompt, [[processor.vision_ids[0]]])], 1.0)
    assert logp.item() == float("-inf")


def test_responses_end_at_the_first_of_several_stop_tokens(shipped, processor, mixed, monkeypatch):
    """EOS, second EOS (which is the pad token), none, at position 0, pad after the end: the mask is positional."""
    im_end, eot = (processor.tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    assert processor.pad_id == eot and set(processor.stop_ids) == {im_end, eot}
    rows = torch.tensor([[60, 61, im_end, eot], [60, eot, eot, eot], [60, 61, 62, 63], [im_end, eot, eot, eot]])
    steps = iter(rows.T)
    monkeypatch.setattr(rollout, "draw", lambda logp, uniform: next(steps))
    [group] = sample(shipped, processor, mixed[:1], samples=4, max_tokens=4)
    assert ids(group) == [[60, 61, im_end], [60, eot], [60, 61, 62, 63], [im_end]]
    assert [s.truncated for s in group.samples] == [False, False, True, False]


def test_mask_counts_the_stop_token_even_where_it_is_the_pad_token(shipped, processor, mixed):
    """A mask made from token values would drop a real <|endoftext|>, and with it the only push to stop."""
    with torch.no_grad():
        logp, entropy, mask = response_logprobs(
            shipped, processor, [Packed(encode(processor, mixed)[0], [[60, processor.pad_id], [60]]),
                                 Packed(encode(processor, mixed)[2], [[61, 62, 63]])], 1.0)
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert (logp[~mask] == 0).all() and (logp[mask] < 0).all()
    assert (entropy[mask] > 0).all() and entropy.max() <= np.log(len(processor.tokenizer))


def test_entropy_is_of_the_sampling_distribution(shipped, processor, mixed):
    """By hand, from the full logits of one position."""
    [prompt] = encode(processor, mixed[:1])
    with torch.no_grad():
        _, entropy, _ = response_logprobs(shipped, processor, [Packed(prompt, [[60]])], 0.5)
        logits = shipped(**pad(processor, [prompt], [[]])).logits[0, -1] / 0.5
    logits[processor.vision_ids] = float("-inf")
    p = logits.softmax(-1)
    assert entropy.item() == pytest.approx(-(p[p > 0] * p[p > 0].log()).sum().item(), abs=1e-5)


def test_seeds_decide_and_the_global_random_state_is_left_alone(shipped, processor, mixed):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (sample(shipped, processor, mixed, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert ids(*first) == ids(*again) != ids(*other)


def test_prompts_in_batches_come_back_in_order(shipped, processor, mixed):
    """Batches are made by length; what comes back must stand by its own record."""
    records = mixed * 2
    greedy = {"samples": 1, "temperature": 0}
    small, large = (sample(shipped, processor, records, **greedy, max_rows=rows) for rows in (1, 64))
    assert [g.record.id for g in small] == [r.id for r in records]
    assert ids(*small) == ids(*large)


def test_saved_and_loaded_again_gives_the_same_logits(shipped, processor, mixed, tmp_path):
    """A tied head saved twice, or a renamed key, loads as noise without an error."""
    shipped.save_pretrained(tmp_path)
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    inputs = processor.collate(encode(processor, mixed))
    again = load_policy(str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, shipped(**inputs).logits)


def test_other_model_families_score_as_they_sample(processor, mixed, tmp_path):
    """Qwen2-VL and Qwen3-VL, tiny and random, with the toy's tokenizer."""
    shape = {"vocab_size": len(processor.tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}
    marks = {"image_token_id": processor.image_id, "vision_start_token_id": processor.vision_ids[0],
             "vision_end_token_id": processor.vision_ids[1], "video_token_id": processor.vision_ids[-1]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    families = {
        "qwen2_vl": {"text_config": shape | {"rope_parameters": rope},
                     "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}},
        "qwen3_vl": {"text_config": shape | {"head_dim": 32, "rope_parameters": rope},
                     "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                                       "out_hidden_size": 64, "patch_size": 14, "deepstack_visual_indexes": [0]}},
    }
    for family, settings in families.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **settings, **marks)
        AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / family)
        policy = load_policy(str(tmp_path / family)).eval()
        groups = sample(policy, processor, mixed, samples=3)
        want, _ = plain_logprobs(policy, processor, [g.prompt for g in groups for _ in range(3)], ids(*groups), 1.0)
        torch.testing.assert_close(padded(groups), want, atol=1e-5, rtol=0, msg=family)
        got = response_logprobs(policy, processor, packed(groups), 1.0)[0]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0, msg=family)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    """Two on one GPU would run out of its memory hours later, or wait for each other."""
    for name, value in (("is_available", True), ("device_count", 2), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert rollout.claim_device().type == "cuda"
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "it plans anew for every length, and has returned NaN gradients"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes for 2 GPUs"):
        rollout.claim_device()


def test_what_is_no_vision_language_model_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        load_policy(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="'gpt2' model"):
        load_policy(str(tmp_path))
    with pytest.raises(ValueError, match="not a model folder"):
        load_policy(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2')
    for load in (load_policy, Processor):
        with pytest.raises(ValueError, match="/config.json' is not a valid JSON"):
            load(str(tmp_path))


def test_a_sliding_window_is_refused(tmp_path):
    """Whatever mask transformers makes for it, none is used here: the policy would be another than the checkpoint's."""
    for file in (TOY / "model").iterdir():
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    config["text_config"].pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="sliding window"):
        load_policy(str(tmp_path))


@pytest.fixture
def command(monkeypatch):
    """Run rollout.py with these arguments, in this process."""
    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["rollout.py", "--question", "?", *map(str, arguments)])
        rollout.main()

    return run


@pytest.mark.parametrize("option, value", [
    ("samples", "0"), ("temperature", "-1"), ("temperature", "nan"), ("max-tokens", "0"), ("max-pixels", "0"),
    ("seed", "-1"), ("seed", "x")])
def test_numbers_that_cannot_be_meant_are_refused_by_option(command, capsys, option, value):
    """--temperature -1 was greedy, --samples 0 divided by zero."""
    with pytest.raises(SystemExit):
        command("--model", "m", f"--{option}={value}")
    assert f"argument --{option}: " in capsys.readouterr().err


def test_a_picture_is_looked_at_before_the_model_is_loaded(command, tmp_path):
    """A wrong path was told after minutes of loading, and not by name."""
    (tmp_path / "page.png").write_text("<html>")
    for name in ("page.png", "none.png"):
        with pytest.raises(ValueError, match=f"{name}: cannot use its picture"):
            command("--model", tmp_path / "nowhere", "--image", tmp_path / name)


def test_a_picture_is_shrunk_as_in_training_if_asked(command, tmp_path, capsys):
    """What a policy saw at --max-pixels it could not be asked about; and it says what it is at."""
    (tmp_path / "x.png").write_bytes(picture(112, 84, 0))
    said = []
    for options in ([], ["--max-pixels", 4 * 28 * 28]):
        command("--model", TOY / "model", "--image", tmp_path / "x.png", "--max-tokens", 160, *options)
        said.append(capsys.readouterr())
    assert said[0].out != said[1].out and all("loading" in s.err and "answering" in s.err for s in said)


def test_prompts_are_refused_never_cut(processor, mixed):
    """Cutting a prompt cuts image tokens; the error says which record and what to do."""
    length = len(processor.encode(mixed[0], "observe").ids)
    assert len(processor.encode(mixed[0], "observe", max_tokens=length).ids) == length
    with pytest.raises(ValueError, match="record one: its prompt is .* --max-prompt-tokens"):
        processor.encode(mixed[0], "observe", max_tokens=length - 1)
    with pytest.raises(ValueError, match="record one: 2 <image> marks for 1 pictures"):
        processor.encode(replace(mixed[0], question="<image><image> ?"), "observe")
    with pytest.raises(ValueError, match="the model.s own token"):
        processor.encode(replace(mixed[0], question="<|image_pad|> ?"), "observe")


def test_max_pixels_is_obeyed():
    """An ignored limit shows only as memory: 12 tiles must become at most 4 tokens."""
    small = Processor(str(TOY / "model"), max_pixels=4 * 28 * 28)
    record = Record("x", "?", "1", (picture(112, 84, 0),))
    assert (small.encode(record, "observe").ids == small.image_id).sum() <= 4
    with pytest.raises(ValueError, match="below the image processor's minimum"):
        Processor(str(TOY / "model"), max_pixels=100)


def test_prompt_styles_ask_for_their_tags(processor, mixed):
    styles = {"none": ["answer"], "think": ["think", "answer"], "observe": ["observe", "think", "answer"]}
    for style, tags in styles.items():
        text = processor.tokenizer.decode(processor.encode(mixed[0], style).ids)
        assert PROMPTS[style] in text
        assert [t for t in ("observe", "think", "answer") if f"<{t}>" in text] == tags


def test_the_caches_memory_is_taken_once(shipped, processor, mixed, monkeypatch):
    """Grown by copying, a cache of 40 GB leaves holes that its next size does not fit into: reserved memory doubled."""
    storages: list[list[tuple[int, int]]] = []
    real = rollout.Slots.mask

    def mask(slots):
        held = [t.untyped_storage() for t in (*slots.keys, *slots.values)]
        storages.append([(storage.data_ptr(), storage.nbytes()) for storage in held])
        return real(slots)

    monkeypatch.setattr(rollout.Slots, "mask", mask)
    groups = sample(shipped, processor, mixed, samples=6, max_tokens=160)
    config, rows = shipped.config.text_config, 6 * len(mixed)
    longest = max(len(g.prompt.ids) for g in groups) + 160
    width = config.hidden_size // config.num_attention_heads
    assert len({len(ids) // CHECK for ids in ids(*groups)}) > 1 and storages.count(storages[0]) == len(storages)
    assert {size for _, size in storages[0]} == {rows * config.num_key_value_heads * longest * width * 4}


def test_prompts_that_fit_by_hand(shipped, processor, mixed, monkeypatch):
    """--rows 256 at 3B's limits wants 164 GB of keys and values: 17,408 slots of 36,864 bytes a row. And 256 prompts of
    one answer each, as evaluation has them, want as much to be prefilled: the vision tower's patches and the language
    model's tokens, four tensors of 3,840 and of 11,008 each. Of 80 GB with 7.5 taken by the model, and 4 held by torch
    for no tensor, 58 are four fifths of what is free."""
    gigabyte = 10**9
    for name, value in (("mem_get_info", (68.5 * gigabyte, 80 * gigabyte)), ("memory_reserved", 11.5 * gigabyte),
                        ("memory_allocated", 7.5 * gigabyte)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    config = SimpleNamespace(num_hidden_layers=36, num_key_value_heads=2, hidden_size=2048, num_attention_heads=16)
    wide, tower = torch.nn.Linear(2048, 11008, device="meta"), torch.nn.Linear(1280, 3840, device="meta")
    body = SimpleNamespace(language_model=SimpleNamespace(layers=[wide]), visual=SimpleNamespace(blocks=[tower]))
    model = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, model=body,
                            config=SimpleNamespace(text_config=config))
    picture = rollout.Prompt(torch.zeros(9216, dtype=torch.long), torch.empty(36_864, 1176, device="meta"), None)
    text, pixels = rollout.Prompt(torch.zeros(500, dtype=torch.long), None, None), 36_864 * 1176 * 4
    row = 17_408 * 36_864
    assert rollout.prompts_that_fit(model, [text, picture], 8, 8192) == int(58 * gigabyte / (8 * row + pixels)) == 10
    prefill = 9216 * (36_864 + 4 * 2 * 11_008) + 36_864 * 4 * 2 * 3840 + 2 * pixels
    assert rollout.prompts_that_fit(model, [text, picture], 1, 8192) == int(58 * gigabyte / prefill) == 22
    assert rollout.prompts_that_fit(model, [text], 8, 100) == int(58 * gigabyte / (8 * 600 * 36_864))
    config.head_dim = 256  # (Qwen3-VL's may be another than hidden size / heads)
    assert rollout.prompts_that_fit(model, [picture], 8, 8192) == int(58 * gigabyte / (16 * row + pixels))
    assert rollout.prompts_that_fit(shipped, encode(processor, mixed), 8, 8192) > 10**9, "on a CPU what is asked for"


def test_fewer_rows_where_memory_is_short_change_nothing(shipped, processor, mixed, monkeypatch):
    want = sample(shipped, processor, mixed, samples=3)
    rows: list[int] = []
    monkeypatch.setattr(rollout, "prompts_that_fit", lambda model, prompts, samples, max_tokens: 0)
    monkeypatch.setattr(rollout, "decode", lambda model, prompts, **given: rows.append(given["repeats"] * len(prompts))
                        or decode(model, prompts, **given))
    assert ids(*sample(shipped, processor, mixed, samples=3)) == ids(*want)
    assert rows == [3] * 4, "a group at least"


def test_the_next_pictures_are_made_ahead(processor, mixed, monkeypatch):
    """3 to 33 s a rollout the policy once waited for 128 pictures, made one after the other."""
    begun = threading.Semaphore(0)
    real = Processor.encode

    def encode(self, record, style):
        begun.release()
        return real(self, record, style)

    monkeypatch.setattr(Processor, "encode", encode)
    batches = [mixed[:2], [], mixed[2:], mixed[::-1]]
    got = rollout.encode_ahead(processor, batches, "think")
    for batch, following in zip(batches, [*batches[1:], []]):
        prompts = next(got)
        for _ in range(len(batch) * (batch is batches[0]) + len(following)):
            assert begun.acquire(timeout=60), "this batch's and the next one's are under way before it is asked for"
        for record, prompt in zip(batch, prompts, strict=True):
            want = real(processor, record, "think")
            assert torch.equal(prompt.ids, want.ids)
            assert prompt.pixels is want.pixels is None or torch.equal(prompt.pixels, want.pixels)
    assert next(got, None) is None


def test_a_fault_of_a_picture_made_ahead_is_told_in_its_turn(processor, mixed):
    """And no thread is left working for a run that has ended."""
    before = threading.active_count()
    got = rollout.encode_ahead(processor, [mixed, [replace(mixed[0], question="<image><image> ?")]], "observe")
    assert len(next(got)) == 4
    with pytest.raises(ValueError, match="record one: 2 <image> marks for 1 pictures"):
        next(got)
    left = rollout.encode_ahead(processor, [mixed] * 50, "observe")
    next(left)
    left.close()
    assert threading.active_count() == before
