"""The loss against hand-computed values, one update against its own algebra, and whole runs: resume, faults, learning.

Checks 9-11, 13, 15 and 17 of the field's known faults.
"""
from __future__ import annotations

import copy
import json
import math
import re
import signal
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import TOY, lines, weights
from plain import pad

import train
from curriculum import Batch
from data import Processor, Record, load_records, save_records
from eval import judge, read_responses
from rewards import Response, Rewards, group_rewards
from rollout import Packed, Policy, Sample, encode_ahead, load_policy, response_logprobs, sample_groups
from train import Config, check_config, grpo_loss, learning_rate, main, parse_config, parse_stages, update

# --- the loss --------------------------------------------------------------------------------------------------------


def test_loss_by_hand():
    """min of the two terms, for either sign: with `max` in place of `min`, bad tokens are pushed without bound."""
    old = torch.zeros(2, 3)
    logp = torch.tensor([[1.5, 1.1, 0.5], [1.5, 1.1, 0.5]]).log()
    adv = torch.tensor([1.0, -1.0])
    loss, stats = grpo_loss(logp, old, adv, torch.ones(2, 3))
    # A = +1: min(1.5, 1.2), 1.1, min(.5, .8);  A = -1: min(-1.5, -1.2), -1.1, min(-.5, -.8)
    assert loss.item() == pytest.approx(-(1.2 + 1.1 + 0.5 - 1.5 - 1.1 - 0.8) / 6)
    assert stats["clip_high"].item() == stats["clip_low"].item() == 1  # statistics are sums over tokens
    assert stats["ratio"].item() == pytest.approx(3.1 * 2)
    assert stats["approx_kl"].item() == pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 1.1, .5)) * 2)


def test_clip_low_and_high_are_two_settings():
    """Clip-higher: 1 + 0.28 above, 1 - 0.1 below; a clipped token has no gradient, an unclipped one has."""
    logp = torch.tensor([[1.5, 0.5]]).log().requires_grad_()
    for advantage, want, moved in ((1.0, -(1.28 + 0.5) / 2, [False, True]), (-1.0, (1.5 + 0.9) / 2, [True, False])):
        loss, _ = grpo_loss(logp, torch.zeros(1, 2), torch.tensor([advantage]), torch.ones(1, 2), clip_low=0.1,
                            clip_high=0.28)
        assert loss.item() == pytest.approx(want)
        [grad] = torch.autograd.grad(loss, logp)
        assert (grad != 0)[0].tolist() == moved


def test_aggregations_by_hand():
    """Lengths 1 and 3, advantages 1 and 2: token mean, sequence mean, Dr. GRPO's constant."""
    logp, adv = torch.zeros(2, 3), torch.tensor([1.0, 2.0])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    for aggregation, want in (("token", -(1 + 6) / 4), ("sequence", -(1 + 2) / 2), ("constant", -(1 + 6) / (2 * 10))):
        loss, _ = grpo_loss(logp, logp, adv, mask, aggregation=aggregation, max_tokens=10)
        assert loss.item() == pytest.approx(want), aggregation


def test_k3_by_hand():
    """KL(pi || ref) of one token: exp(ref - logp) - (ref - logp) - 1, in the loss and never negative."""
    logp, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    loss, stats = grpo_loss(logp, logp, torch.zeros(1), torch.ones(1, 2), ref_logprobs=ref, kl_coef=0.1)
    want = (math.exp(-.5) + .5 - 1) + (math.exp(1) - 1 - 1)
    assert stats["ref_kl"].item() == pytest.approx(want) and loss.item() == pytest.approx(0.1 * want / 2)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_all_masked_is_zero_and_finite(aggregation):
    logp = torch.zeros(2, 3, requires_grad=True)
    loss, stats = grpo_loss(logp, logp.detach(), torch.ones(2), torch.zeros(2, 3), aggregation=aggregation,
                            max_tokens=5)
    loss.backward()
    assert loss.item() == 0 and (logp.grad == 0).all() and all(v.isfinite() for v in stats.values())


def test_learning_rate_by_hand():
    cfg = Config(lr=1.0, warmup=0.1)
    lrs = [learning_rate(u, 100, cfg) for u in range(100)]
    assert lrs[:10] == pytest.approx([i / 10 for i in range(1, 11)]) and lrs[10] == 1.0
    assert lrs[55] == pytest.approx(0.55) and lrs[99] == pytest.approx(0.1, abs=1e-3)
    assert learning_rate(99, 100, replace(cfg, schedule="constant")) == 1.0
    assert learning_rate(0, 1, Config(lr=1.0, warmup=0.0)) == 1.0


# --- one update ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rollout(processor, shipped, test_set):
    """Four groups of four sampled responses, judged; rewards made up so that every group but the last has a signal."""
    records = test_set[:4]
    prompts = [processor.encode(r, "observe") for r in records]
    groups = sample_groups(shipped, processor, records, prompts, samples=4, temperature=1.0, max_tokens=40, seed=0)
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(4, 4, generator=generator)
    advantages[3] = 0
    nothing = torch.zeros(4, 4)
    return groups, judge(groups, "observe"), Rewards(nothing, nothing, nothing, nothing, torch.ones(4), advantages,
                                                     torch.tensor([True, True, True, False]), nothing)


def config(**changes) -> Config:
    return Config(**({"prompts_per_rollout": 4, "group_size": 4, "micro_tokens": 900, "lr": 1e-3, "grad_clip": 1e9,
                      "max_response_tokens": 40} | changes))


def policy(model, processor, optimizer=None, reference=None) -> Policy:
    """One that samples with the trained model itself, as on one CPU."""
    return Policy(model, model, reference, optimizer or torch.optim.SGD(model.parameters()), processor)


def gradients(model, processor, rollout, cfg, reference=None) -> tuple[dict[str, torch.Tensor], dict]:
    """Gradients of one update, caught where the optimizer would use them."""
    caught = {}

    class Catch(torch.optim.SGD):
        def step(self):
            caught.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    catching = policy(model, processor, Catch(model.parameters(), lr=0.0), reference)
    stats = update(catching, *rollout, [0.0], cfg)
    return caught, stats


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_gradients_do_not_depend_on_the_micro_batch(model, processor, rollout, aggregation):
    """Normalised per micro-batch, the loss changes with the split: TRL, EasyR1 and the official code all had this."""
    reference = load_policy(str(TOY / "model"))
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.01)
    for kl_coef in (0.0, 0.1):
        cfg, ref = config(aggregation=aggregation, kl_coef=kl_coef), reference if kl_coef else None
        want, want_stats = gradients(model, processor, rollout, replace(cfg, micro_tokens=10**6), ref)
        for micro in (1, 200, 1000):  # a response a row, several rows a group, several groups a micro-batch
            got, stats = gradients(model, processor, rollout, replace(cfg, micro_tokens=micro), ref)
            scale = max(g.abs().max() for g in want.values())
            for name in want:
                torch.testing.assert_close(got[name], want[name], atol=1e-5 * scale.item(), rtol=1e-4, msg=name)
            assert stats == pytest.approx(want_stats, rel=1e-4, abs=1e-6)


def test_first_update_is_reinforce(model, processor, rollout):
    """Ratio exactly 1, nothing clipped, and the gradient that of -sum adv log pi / tokens, made the plain way."""
    got, stats = gradients(model, processor, rollout, config())
    assert stats["ratio"] == pytest.approx(1, abs=1e-6) and stats["clip_low"] == stats["clip_high"] == 0
    assert stats["approx_kl"] == 0
    groups, _, rewards = rollout
    model.zero_grad()
    tokens = sum(len(s.ids) for g in groups[:3] for s in g.samples)
    for group, advantages in zip(groups[:3], rewards.advantages):
        for response, advantage in zip([s.ids for s in group.samples], advantages):
            inputs = pad(processor, [group.prompt], [response])
            logp = model(**inputs).logits[0, -len(response) - 1:-1].index_fill(
                -1, torch.tensor(processor.vision_ids), float("-inf")).log_softmax(-1)
            chosen = logp[torch.arange(len(response)), response]
            (-(advantage * chosen).sum() / tokens).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_rows_and_micro_batches_keep_to_the_budget(rollout):
    """A group over the budget is split, its prompt repeated; a response over it stands alone; none is lost."""
    groups, *_ = rollout
    for budget in (1, 150, 400, 1000, 10**6):
        rows = [row for g in groups for row in train.pack_group(g, [0.1, 0.2, 0.3, 0.4], [0, 1, 3], budget)]
        for row in rows:  # what stands side by side is of one response
            assert len(row.responses) == len(row.advantages) == len(row.sampled)
        packed = [(r, a, s.tolist()) for row in rows for r, a, s in zip(row.responses, row.advantages, row.sampled)]
        kept = [(g.samples[i], a) for g in groups for i, a in ((0, 0.1), (1, 0.2), (3, 0.4))]
        assert sorted(packed) == sorted((s.ids, a, s.logprobs.tolist()) for s, a in kept)
        assert all(len(row) <= budget or len(row.responses) == 1 for row in rows)
        micros = train.micro_batches(rows, budget)
        assert sorted(map(id, sum(micros, []))) == sorted(map(id, rows))
        assert all(sum(map(len, m)) <= budget or len(m) == 1 for m in micros)
    assert len(micros) == 1 and len(rows) == len(groups)


def test_a_group_is_packed_into_few_rows(rollout):
    """Each row computes the prompt and its picture again: taken as they come, these responses made three rows."""
    group = rollout[0][0]
    samples = [Sample("", [40] * n, False, torch.zeros(n)) for n in (70, 60, 30, 40)]
    rows = train.pack_group(replace(group, samples=samples), [0.0] * 4, [0, 1, 2, 3], len(group.prompt.ids) + 100)
    assert [list(map(len, row.responses)) for row in rows] == [[70, 30], [60, 40]]


@pytest.mark.parametrize("updates, forwards, rows", [(1, 1, 3), (2, 3, 4), (4, 5, 5)])
def test_nothing_is_forwarded_in_vain(model, processor, rollout, monkeypatch, updates, forwards, rows):
    """One forward an update; one more for "old" log-probs from the second on; none for the group without signal."""
    calls, real = [], train.response_logprobs
    monkeypatch.setattr(train, "response_logprobs",
                        lambda *args, rows, **given: calls.append(len(rows)) or real(*args, rows=rows, **given))
    update(policy(model, processor), *rollout, [0.0] * updates, config(micro_tokens=10**6))
    assert len(calls) == forwards and sum(calls) == rows


def test_logits_of_a_whole_batch_never_exist(model, processor, rollout):
    """[tokens, V] of a micro-batch would be the largest tensor of the step, growing with the responses."""
    sizes = []
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape))
    rows = [Packed(g.prompt, [s.ids for s in g.samples]) for g in rollout[0]]
    response_logprobs(model, processor, rows, 1.0, chunk=50)[0].sum().backward()
    tokens = sum(len(r) for row in rows for r in row.responses)
    assert max(shape[0] for shape in sizes) <= 50 and sum(shape[0] for shape in sizes) == 2 * tokens  # and in backward


def test_the_sampler_gap_is_nil_in_fp32(model, processor, rollout):
    """The one figure that tells, in a run's log, that sampler and trainer are no longer the same policy."""
    assert gradients(model, processor, rollout, config())[1]["sampler_gap"] < 1e-5
    groups = [replace(g, samples=[replace(s, logprobs=s.logprobs - 0.5) for s in g.samples]) for g in rollout[0]]
    stats = gradients(model, processor, (groups, *rollout[1:]), config())[1]
    assert stats["sampler_gap"] == pytest.approx(0.5, abs=1e-4)


def test_groups_without_signal_are_not_counted_unless_asked(model, processor, rollout):
    """The official code's weight-0 groups still shrink everyone else's step, by their share of the tokens."""
    tokens = [sum(len(s.ids) for s in g.samples) for g in rollout[0]]
    dropped, _ = gradients(model, processor, rollout, config())
    counted, stats = gradients(model, processor, rollout, config(count_no_signal=True))
    assert stats["ratio"] == pytest.approx(1), "a mean over the tokens that were scored, whatever is counted"
    name = "model.language_model.norm.weight"
    torch.testing.assert_close(counted[name] * sum(tokens), dropped[name] * sum(tokens[:3]), rtol=1e-4, atol=1e-5)


def test_no_signal_anywhere_takes_no_step(model, processor, rollout):
    """Adam's momentum alone would move the weights: with no signal, and with every response cut off and masked."""
    groups, responses, rewards = rollout
    moved = policy(model, processor, torch.optim.AdamW(model.parameters(), lr=1e-4))
    update(moved, *rollout, [1e-4], config())  # gives Adam its momentum
    before = copy.deepcopy(model.state_dict())
    nothing = replace(rewards, signal=torch.zeros(4, dtype=torch.bool), advantages=torch.zeros(4, 4))
    cut = [[replace(r, truncated=True) for r in group] for group in responses]
    for given, worth, changes in ((responses, nothing, {}), (cut, rewards, {"mask_truncated": True})):
        assert update(moved, groups, given, worth, [1.0], config(**changes)) == {"updates": 0}
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_truncated_responses_can_be_left_out(model, processor, rollout):
    """Masked, they count neither in the sum nor in the denominator; unmasked they do."""
    groups, responses, rewards = rollout
    cut = [[replace(r, truncated=g == 0) for g, r in enumerate(group)] for group in responses]
    zeroed = replace(rewards, advantages=rewards.advantages.clone())
    zeroed.advantages[:, 0] = 0
    masked, _ = gradients(model, processor, (groups, cut, rewards), config(mask_truncated=True))
    by_hand, _ = gradients(model, processor, (groups, cut, zeroed), config())
    tokens = sum(len(s.ids) for g in groups[:3] for s in g.samples)
    kept = sum(len(s.ids) for g in groups[:3] for s in g.samples[1:])
    name = "model.language_model.norm.weight"
    torch.testing.assert_close(masked[name] * kept, by_hand[name] * tokens, rtol=1e-4, atol=1e-5)


def test_later_updates_of_a_rollout_use_the_sampling_policys_logprobs(model, processor, rollout):
    """With "old" recomputed at each update the ratio would be 1 forever and clipping inert."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stats = update(policy(model, processor, optimizer), *rollout, [1e-2, 1e-2], config())
    assert stats["updates"] == 2 and abs(stats["ratio"] - 1) > 1e-6 and stats["approx_kl"] > 0


def test_old_logprobs_stay_with_their_responses(model, processor, rollout):
    """Handed to a neighbour of the same row, they make ratios that clip at random in every update but the first."""
    stats = update(policy(model, processor), *rollout, [0.0, 0.0], config(micro_tokens=10**6))
    assert stats["updates"] == 2 and stats["ratio"] == pytest.approx(1, abs=1e-5) and abs(stats["approx_kl"]) < 1e-8


def test_every_weight_moves_at_the_papers_learning_rate(model, processor, rollout):
    """In bf16 a step of 1e-6 rounds away: 2% of the weights would move at all."""
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)
    update(policy(model, processor, optimizer), *rollout, [1e-6], config())
    moved = {n: (before[n] != p).float().mean().item() for n, p in model.named_parameters()}
    weights = [m for n, m in moved.items() if "embed_tokens" not in n]  # (rows of unused tokens stay)
    assert sum(weights) / len(weights) > 0.5 and min(weights) > 0


def test_frozen_vision_tower_stays(processor, rollout):
    model = load_policy(str(TOY / "model"), freeze_vision=True)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    update(policy(model, processor, optimizer), *rollout, [1e-3], config())
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value) == ("visual" in name), name


def test_a_non_finite_loss_leaves_the_weights_alone(model, processor, rollout):
    groups, responses, rewards = rollout
    before = copy.deepcopy(model.state_dict())
    bad = replace(rewards, advantages=rewards.advantages.clone())
    bad.advantages[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="loss is nan"):
        update(policy(model, processor, torch.optim.AdamW(model.parameters())), groups, responses, bad, [1.0], config())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.run
def test_it_can_learn(model, processor, test_set):
    """One prompt that is mostly failed: from under 0.5 to over 0.9, or the chain from sampling to step points wrong."""
    record = next(r for r in test_set if 0.6 < r.difficulty < 0.8)
    prompt = processor.encode(record, "observe")
    learner = policy(model, processor, torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0))
    cfg = config(group_size=16, micro_tokens=8192)
    history = []
    for step in range(40):
        groups = sample_groups(model, processor, [record, replace(record, id="again")], [prompt] * 2, samples=16,
                               temperature=1.0, max_tokens=160, seed=step)
        responses = judge(groups, "observe")
        lengths = torch.tensor([[r.tokens for r in group] for group in responses])
        rewards = group_rewards(responses, lengths, bonus_coef=0)
        history.append(rewards.accuracy.mean().item())
        if len(history) > 3 and min(history[-3:]) > 0.9:
            break
        update(learner, groups, responses, rewards, [1e-4], cfg)
    assert history[0] < 0.5 and min(history[-3:]) > 0.9, history


# --- settings --------------------------------------------------------------------------------------------------------


def test_presets_then_options_prevail():
    assert parse_config([]).lr == train.PRESETS["toy"]["lr"]
    assert train.as_kept(parse_config([]))["model"] == "assets/toy/model", "no machine's path: clones are compared"
    assert parse_config(["--lr", "0.5"]).lr == 0.5 and not parse_config(["--no-normalize-std"]).normalize_std
    paper = parse_config(["--preset", "3b", "--data", "ladder"])
    assert (paper.lr, paper.group_size, paper.prompts_per_rollout, paper.updates_per_rollout) == (1e-6, 8, 128, 16)
    assert (paper.sigma, paper.bonus, paper.bonus_floor, paper.format_weight, paper.kl_coef) == (1.8, .2, 100, .5, 0)
    assert (paper.clip_low, paper.clip_high, paper.temperature, paper.warmup) == (.2, .2, 1, .03)


@pytest.mark.parametrize("args, told", [
    (["--group-size", "1"], "--group-size 1"),
    (["--rollout-rows", "4"], "--rollout-rows 4 is below --group-size 8"),
    (["--prompts-per-rollout", "10", "--updates-per-rollout", "4"], "divide"),
    (["--stage", "9"], "--stage 9"), (["--stage", "3-1"], "--stage 3-1"), (["--stage", "first"], "--stage first"),
    (["--temperature", "0"], "--temperature"), (["--preset", "3b"], "needs --data"), (["--lr", "-1"], "--lr"),
    (["--bonus", "-0.1"], "--bonus"), (["--max-pixels", "0"], "--max-pixels"), (["--lr", "nan"], "--lr"),
    (["--bonus-floor", "-5"], "--bonus-floor -5 is out of range"), (["--seed", "-1"], "--seed -1 is out of range"),
    (["--lr", "inf"], "--lr inf"), (["--updates-per-rollout", "0"], "--updates-per-rollout 0"),
    (["--max-steps", "-1"], "--max-steps"), (["--model", ""], "--model is empty"),
    (["--warmup", "5"], "--warmup"), (["--eval-limit", "-3"], "--eval-limit"), (["--tracker", "wandb"], "pip install")])
def test_settings_that_cannot_be_meant_are_refused(args, told):
    with pytest.raises(ValueError, match=told):
        parse_config(args)


@pytest.mark.parametrize("args", [["--learning-rate", "1"], ["--order", "easy"], ["--preset", "70b"], ["--group", "8"],
                                  ["--max_pixels", "9999"]])
def test_unknown_options_exit(args, capsys):
    """A misspelt option that is ignored costs a run; `--group` must not silently mean --group-size."""
    with pytest.raises(SystemExit):
        parse_config(args)
    assert args[0] in capsys.readouterr().err


def test_another_model_asks_for_a_preset(tmp_path, monkeypatch):
    """Without one a model of 3B was trained at the toy's lr of 1e-4, on pictures of 224 x 224, without a word."""
    with pytest.raises(ValueError, match="--model Qwen/Qwen2.5-VL-3B-Instruct: give a --preset .*lr 0.0001"):
        parse_config(["--model", "Qwen/Qwen2.5-VL-3B-Instruct", "--data", "d"])
    assert parse_config(["--model", "other", "--preset", "toy"]).lr == 1e-4
    assert parse_config(["--model", "other", "--preset", "3b", "--data", "d"]).lr == 1e-6
    monkeypatch.chdir(TOY.parent)
    assert parse_config(["--model", "toy/model"]).preset == "toy", "the toy itself, however it is named"


def test_stages():
    assert parse_stages("all") is None and list(parse_stages("0-3")) == [0, 1, 2, 3] and list(parse_stages("8")) == [8]


def test_help_tells_the_defaults_of_the_preset(capsys):
    """--help said lr 1e-06 where the toy's 1e-4 was used."""
    for args, lr in (([], "0.0001"), (["--preset", "3b"], "1e-06")):
        with pytest.raises(SystemExit):
            parse_config([*args, "--help"])
        assert f"peak learning rate of AdamW (default: {lr})" in " ".join(capsys.readouterr().out.split())


def test_help_names_each_option_once(capsys):
    """A switch stood there as `--resume, --no-resume` with one text for both, and four times in all."""
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    told = capsys.readouterr().out
    assert "--no-SWITCH" in told and "--no-resume" not in told
    for name in Config.__dataclass_fields__:
        assert len(re.findall(rf"^  --{name.replace('_', '-')}\b(?!-)", told, re.M)) == 1, name
    for name in ("skip-bad", "gradient-checkpointing"):
        on, off = parse_config([f"--{name}"]), parse_config([f"--no-{name}"])
        assert (vars(on)[name.replace("-", "_")], vars(off)[name.replace("-", "_")]) == (True, False)


def test_every_setting_has_help_and_a_checked_default():
    for setting in Config.__dataclass_fields__.values():
        assert len(setting.metadata["help"]) > 5, setting.name
    check_config(Config(model="m", data="d"))


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_leaves_everything_behind(whole_run):
    names = {p.name for p in whole_run.iterdir()}
    assert names >= {"settings.json", "environment.json", "generation_config.json", "metrics.jsonl", "responses.jsonl",
                     "responses.html", "curves.png", "scores.json", "best.json", "held-out", "checkpoint-000006",
                     "checkpoint-000004"}
    best = json.loads((whole_run / "best.json").read_text())
    greedy = {line["step"]: line["eval"]["greedy"]["accuracy"] for line in lines(whole_run) if "eval" in line}
    steps = [step for step in greedy if step and greedy[step] == max(greedy[s] for s in (2, 4, 6))]
    assert best == {"checkpoint": f"checkpoint-{steps[0]:06d}", "accuracy": greedy[steps[0]]}
    assert ("checkpoint-000002" in names) == (steps[0] == 2), "the newest --keep 2 stay, and the best"
    assert "checkpoint.partial" not in names
    kept = json.loads((whole_run / "settings.json").read_text())
    assert kept.pop("program") == "train.py" and kept["lr"] == 1e-4 and set(kept) == set(Config.__dataclass_fields__)
    environment = json.loads((whole_run / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"].split("+")[0])
    log = lines(whole_run)
    assert [line["step"] for line in log] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert [line["stage"] for line in log if "eval" not in line] == [0, 0, 1, 1, 2, 2]
    assert [line["step"] for line in log if "eval" in line] == [0, 2, 4, 6]
    page = (whole_run / "responses.html").read_text()
    assert page.count("<section>") == 12 and "src=\"data:image/png" in page and "http" not in page
    again = load_policy(str(whole_run / "checkpoint-000006"))  # a plain Hugging Face folder, with its processor
    assert again.num_parameters() > 1e6 and Processor(str(whole_run / "checkpoint-000006")).image_id


def test_responses_are_logged_one_a_line(small, whole_run):
    """Two groups a rollout; a file that eval.py's `--responses` reads too."""
    logged = [json.loads(line) for line in (whole_run / "responses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [step for step in range(1, 7) for _ in range(2 * 4)]
    assert [line["sample"] for line in logged] == [0, 1, 2, 3] * 12 and len({line["id"] for line in logged}) == 12
    for line in logged:
        assert set(line) == {"step", "stage", "weight", "id", "sample", "response", "answer", "accuracy", "format",
                             "observation", "tokens", "truncated", "bonus", "reward", "advantage"}
        assert line["reward"] == pytest.approx(line["accuracy"] + 0.5 * line["format"] + line["bonus"])
    read = read_responses(str(whole_run / "responses.jsonl"), "ladder", load_records(small[1]))
    assert [len(responses) for responses in read.values()] == [4] * 12


def test_logged_numbers_by_hand():
    """The official log leaves the bonus out of the reward; others show one micro-batch as the step."""
    responses = [[Response(None, 0, 0, None, tokens=n, truncated=cut and n == 40) for n in lengths]
                 for lengths, cut in (([10, 20, 30, 40], True), ([50, 60, 70, 80], False), ([5, 5, 5, 5], False))]
    accuracy = torch.tensor([[1., 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    bonus = torch.tensor([[.2, 0, 0, 0], [0] * 4, [0] * 4])
    form = torch.ones(3, 4)
    observation = torch.tensor([[.5, 1, math.nan, math.nan], [math.nan] * 4, [math.nan] * 4])
    rewards = Rewards(accuracy, form, bonus, accuracy + .5 * form + bonus, torch.tensor([1.8, 0, 0]), torch.zeros(3, 4),
                      torch.tensor([True, False, False]), observation)
    assert train.step_metrics(responses, rewards) == pytest.approx({
        "reward": (6 + 6 + .2) / 12, "accuracy": .5, "format": 1, "bonus": 1 / 12, "all_right": 1 / 3,
        "all_wrong": 1 / 3, "signal": 1 / 3, "weight": .6, "advantage_std": 0, "length": 380 / 12, "length_max": 80,
        "truncated": 1 / 12, "observation": .75, "problems": 3})
    rollout = train.Rollout()
    rollout.add(Batch(1, [Record("r", "?", "1", difficulty=.5)] * 3, False), [None] * 3, responses)
    logged = train.group_lines(rollout, rewards, step=3, count=1)
    assert [line["reward"] for line in logged] == pytest.approx([1.7, 1.5, .5, .5])
    assert train.problem_lines(rollout, rewards, step=3)[0] == pytest.approx({
        "step": 3, "id": "r", "stage": 1, "difficulty": .5, "right": 2, "of": 4, "reward": 4.2 / 4, "length": 25})


@pytest.mark.run
def test_adaptive_resumes_to_the_bit(small, tmp_path):
    """Its batches hang on what was met: the checkpoint must carry that, and the batch whose prompts were made ahead."""
    options = [*small, "--order", "adaptive", "--test=", "--save-every", "1", "--keep", "9"]
    main([*options, "--out", str(tmp_path / "whole")])
    for more in (["--max-steps", "3"], ["--resume"]):
        main([*options, "--out", str(tmp_path / "run"), *more])
    met = [(tmp_path / name / "problems.jsonl").read_text() for name in ("whole", "run")]
    assert met[0] == met[1] and lines(tmp_path / "whole") == lines(tmp_path / "run")
    ids = [json.loads(line)["id"] for line in met[0].splitlines()]
    assert len(set(ids)) < len(ids) == 24, "problems come again, in as many rollouts"
    one, other = (weights(tmp_path / name) for name in ("whole", "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_resume_equals_the_run_that_was_never_stopped(small, whole_run, stopped_run):
    """Stopped by a signal in the middle of a stage: same log, same weights, same moments, to the bit."""
    run = stopped_run(3)
    assert [line["step"] for line in lines(run)] == [0, 1, 2, 2, 3]
    with open(run / "metrics.jsonl", "a") as file:  # a step that was logged and then lost with the process
        file.write(json.dumps({"step": 4, "reward": 99}) + "\n")
    with pytest.raises(ValueError, match="holds another run; add --resume"):
        main([*small, "--out", str(run)])
    with pytest.raises(ValueError, match="lr: 0.0001 there, 0.0002 now"):
        main([*small, "--out", str(run), "--resume", "--lr", "2e-4"])
    main([*small, "--out", str(run), "--resume"])
    assert lines(run) == lines(whole_run)
    for name in ("responses.jsonl", "problems.jsonl"):
        assert (run / name).read_text() == (whole_run / name).read_text()
    want, got = weights(whole_run), weights(run)
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)


def test_max_steps_is_the_same_run_stopped_earlier(small, whole_run, tmp_path, capsys):
    """Its learning rates are the whole run's; given again, it takes no step too many."""
    run = tmp_path / "run"
    for _ in range(2):
        main([*small, "--out", str(run), "--max-steps", "3", *(["--resume"] if run.exists() else [])])
        told = capsys.readouterr().out
        assert "stopped after step 3, saved; the same command with --resume and a larger --max-steps goes on" in told
        assert lines(run) == lines(whole_run)[:5] and "the weights are what they were" not in told
    main([*small, "--out", str(run), "--resume"])
    assert lines(run) == lines(whole_run)


def test_a_checkpoint_has_the_image_processor_of_its_base(small, tmp_path):
    """With the training's max_pixels in it, plain transformers would shrink every picture to a toy's 224 x 224."""
    run, base = tmp_path / "run", json.loads((TOY / "model/preprocessor_config.json").read_text())
    for step, resume in ((1, []), (2, ["--resume"])):
        main([*small, "--max-pixels", "3136", "--max-steps", str(step), "--out", str(run), *resume])
        assert json.loads((run / f"checkpoint-00000{step}/preprocessor_config.json").read_text()) == base


def test_a_non_finite_loss_stops_the_run_and_names_its_problems(small, tmp_path, monkeypatch):
    """At the third step: the checkpoint of the second is whole, and the run can be resumed from it."""
    real, run = train.group_rewards, tmp_path / "nan"
    calls: list[int] = []

    def poison(*args, **options):
        rewards = real(*args, **options)
        calls.append(1)
        if len(calls) == 3:
            rewards.signal[:] = True
            rewards.advantages[:] = float("nan")
        return rewards

    monkeypatch.setattr(train, "group_rewards", poison)
    with pytest.raises(SystemExit, match=r"step 3: the loss is nan. Its problems: train-\d+.*checkpoint-000002"):
        main([*small, "--out", str(run)])
    logged = [json.loads(line)["step"] for line in (run / "responses.jsonl").read_text().splitlines()]
    assert logged[-1] == 3, "what it was to learn from is what one looks at first"
    main([*small, "--out", str(run), "--resume"])
    assert [line["step"] for line in lines(run) if "reward" in line] == [1, 2, 3, 4, 5, 6]


def test_a_stop_while_sampling_saves_the_step_before(small, whole_run, tmp_path, monkeypatch):
    """torchrun kills 30 seconds after Ctrl-C: waiting for an update to come would lose what there is."""
    run, real, calls = tmp_path / "run", train.sample_groups, []

    def stop_at_four(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **options)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "sample_groups", stop_at_four)
    main([*small, "--out", str(run)])
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) == before and max(run.glob("checkpoint-0*")).name == "checkpoint-000003"
    main([*small, "--out", str(run), "--resume"])
    assert lines(run) == lines(whole_run)


def test_a_stop_reaches_a_wait_for_pictures(small, whole_run, tmp_path, monkeypatch):
    """128 pictures may take longer than torchrun's 30 seconds: the wait is cut short, and its batch given back."""
    def stopped_at_four(*args):
        for i, prompts in enumerate(encode_ahead(*args), 1):
            if i == 4:
                signal.raise_signal(signal.SIGTERM)
                raise AssertionError("the wait went on")
            yield prompts

    with monkeypatch.context() as patch:
        patch.setattr(train, "encode_ahead", stopped_at_four)
        main([*small, "--out", str(tmp_path / "run")])
    assert max((tmp_path / "run").glob("checkpoint-0*")).name == "checkpoint-000003"
    main([*small, "--out", str(tmp_path / "run"), "--resume"])
    assert lines(tmp_path / "run") == lines(whole_run)


def test_pictures_of_two_batches_are_in_memory_and_not_of_three(small, tmp_path, monkeypatch):
    """A batch of 128 pictures of 2.5 MP is 8 GB."""
    made: list[weakref.ref] = []
    encode, sample = Processor.encode, train.sample_groups
    alive: list[int] = []

    def noted(*args):
        prompt = encode(*args)
        if threading.current_thread() is not threading.main_thread():
            made.append(weakref.ref(prompt.ids))
        return prompt

    def counted(*args, **options):
        while len(made) - first < min(24, 4 * (len(alive) + 2)):  # the next ones are made
            time.sleep(0.01)
        alive.append(sum(ref() is not None for ref in made[first:]))
        return sample(*args, **options)

    def ahead(*args):
        nonlocal first
        first = len(made)  # (before it all problems were checked, in threads too)
        yield from encode_ahead(*args)

    first = 0
    monkeypatch.setattr(Processor, "encode", noted)
    monkeypatch.setattr(train, "sample_groups", counted)
    monkeypatch.setattr(train, "encode_ahead", ahead)
    main([*small[:2], *small[4:], "--test", "", "--out", str(tmp_path / "run")])
    assert len(alive) == 6 and max(alive) <= 8


def test_bad_data_stops_before_training_and_says_what_to_do(small, tmp_path, test_set):
    data = tmp_path / "data.jsonl"
    options = [*small[2:], "--order", "random"]
    with pytest.raises(ValueError, match="nowhere.jsonl"):
        main(["--data", str(tmp_path / "nowhere.jsonl"), *options, "--out", str(tmp_path / "a")])
    assert not (tmp_path / "a").exists(), "nothing in the way of the mended command"
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt/config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="gpt: not a Qwen vision-language model"):
        main(["--preset", "toy", "--model", str(tmp_path / "gpt"), *small, "--out", str(tmp_path / "a")])
    data.write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": \n')
    with pytest.raises(ValueError, match="data.jsonl, line 2"):
        main(["--data", str(data), *options, "--out", str(tmp_path / "b")])
    data.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    with pytest.raises(ValueError, match="is on no stage"):
        main(["--data", str(data), *small[2:], "--out", str(tmp_path / "c")])
    long = Record("long", "word " * 500, "2")
    save_records(str(tmp_path / "long.parquet"), [long])
    with pytest.raises(ValueError, match="record long: its prompt is .* --max-prompt-tokens"):
        main(["--data", str(tmp_path / "long.parquet"), *options, "--out", str(tmp_path / "d")])


def test_trains_on_text_without_a_ladder(small, tmp_path, capsys):
    """Any verifiable data, unmeasured and without pictures; and a first rollout that cannot teach says so."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"Word {i}?", "answer": "99999"}) + "\n" for i in range(4)))
    options = ["--data", str(data), *small[4:], "--test", "", "--order", "random", "--out"]
    main([*options, str(tmp_path / "run"), "--kl-coef", "0.1"])
    told = capsys.readouterr()
    assert "no group of the first rollout has a signal" in told.out
    assert "the weights are what they were" not in told.out, "a KL, which every group has, moves them"
    assert "none of the 4 problems has a picture" in told.err, "lost on the way, they would be missed by nobody"
    log = lines(tmp_path / "run")
    assert [line["stage"] for line in log] == [None] and log[0]["ref_kl"] >= 0 and "observation" not in log[0]
    main([*options, str(tmp_path / "still")])
    assert "the weights are what they were" in capsys.readouterr().out, "it ended as any other run does"
