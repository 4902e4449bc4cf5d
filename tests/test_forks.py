"""What papers compare against, and what a run watches: GSPO, TIS, refill, epochs, limit, the pictures, each problem."""
from __future__ import annotations

import json
import math
import signal
from dataclasses import replace

import compare
import pytest
import torch
from conftest import lines
from PIL import Image

import train
from curriculum import Batch, Curriculum, low_complexity_cut
from data import Record, load_records, open_image
from rewards import PROMPTS, TAGS, format_reward, score
from rollout import Packed, picture_effect, response_logprobs
from train import grpo_loss, main

# --- the loss ---------------------------------------------------------------------------------------------------------


def test_one_ratio_for_a_response_by_hand():
    """GSPO: the geometric mean of the tokens' ratios, clipped as one; each token's gradient is that of the sequence.
    Averaged over padding, or not averaged at all, the ratio of a long response would clip at once."""
    old = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 0.0, 0.0]])
    logp = (old + torch.tensor([[.1, .2, .3], [.5, 9.0, 9.0]])).requires_grad_()
    mask, adv = torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([1.0, -1.0])
    loss, stats = grpo_loss(logp, old, adv, mask, ratio_of="sequence", aggregation="sequence", clip_high=0.3)
    want = [math.exp(.2), math.exp(.5)]  # the second is not clipped: its advantage is negative
    assert loss.item() == pytest.approx(-(want[0] - want[1]) / 2)
    assert stats["ratio"].item() == pytest.approx(3 * want[0] + want[1])
    [grad] = torch.autograd.grad(loss, logp)
    assert grad.tolist() == [pytest.approx([-want[0] / 3 / 2] * 3), pytest.approx([want[1] / 2, 0, 0])]
    clipped, _ = grpo_loss(logp, old, adv, mask, ratio_of="sequence", aggregation="sequence", clip_high=0.1)
    assert clipped.item() == pytest.approx(-(1.1 - want[1]) / 2)


def test_truncated_importance_weights_by_hand():
    """min(pi_old / pi_sampler, cap), of each token, on the policy's part and not on the KL's."""
    old, sampler = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-1.5, -0.5, -4.0]])
    adv, mask = torch.tensor([2.0]), torch.tensor([[1, 1, 1]])
    loss, _ = grpo_loss(old, old, adv, mask, sampler_logprobs=sampler, tis_cap=2.0)
    assert loss.item() == pytest.approx(-2 * (math.exp(.5) + math.exp(-.5) + 2) / 3)
    with_kl, stats = grpo_loss(old, old, adv, mask, sampler_logprobs=sampler, tis_cap=2.0, ref_logprobs=sampler,
                               kl_coef=0.5)
    assert with_kl.item() == pytest.approx(loss.item() + 0.5 * stats["ref_kl"].item() / 3)
    off, _ = grpo_loss(old, old, adv, mask, sampler_logprobs=sampler)
    assert off.item() == pytest.approx(-2)


# --- which problems ---------------------------------------------------------------------------------------------------


def history(run) -> list[dict]:
    return [json.loads(line) for line in (run / "problems.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def refilled(small, tmp_path_factory):
    """P = 2, so that a stage is four batches, of which up to three make a rollout."""
    options = [*small, "--prompts-per-rollout", "2", "--updates-per-rollout", "1", "--refill", "3", "--stage", "0-1",
               "--test", ""]
    run = tmp_path_factory.mktemp("refilled") / "run"
    main([*options, "--out", str(run)])
    return options, run


def test_refill_goes_on_until_enough_groups_have_a_signal(refilled, small):
    """And no further: not into the next stage, not beyond the factor, not when there are enough."""
    _, run = refilled
    steps: dict[int, list[dict]] = {}
    for line in history(run):
        steps.setdefault(line["step"], []).append(line)
    ladder = [r for r in load_records(small[1]) if r.stage < 2]
    assert sorted(line["id"] for line in history(run)) == sorted(r.id for r in ladder), "each once, none skipped"
    sizes, last = [], 0
    for step, problems in steps.items():
        batches = [problems[i:i + 2] for i in range(0, len(problems), 2)]
        signals = [sum(0 < line["right"] < 4 for line in batch) for batch in batches]
        assert step - last == len(batches) <= 3 and len({line["stage"] for line in problems}) == 1
        assert all(sum(signals[:i]) < 2 for i in range(1, len(batches))), "it stopped when there were enough"
        assert sum(signals) >= 2 or len(batches) == 3 or step % 4 == 0, "it stopped too early"
        sizes.append(len(batches))
        last = step
    logged = [line for line in lines(run) if "reward" in line]
    assert [line["problems"] for line in logged] == [2 * size for size in sizes] and len(set(sizes)) > 1
    cfg = train.parse_config([*refilled[0], "--out", "x"])
    assert [line["lr"] for line in logged if line["updates"]] == [
        train.learning_rate(line["step"] - 1, 8, cfg) for line in logged if line["updates"]]


def test_refill_learns_from_as_many_groups_as_ever(model, processor, monkeypatch, refilled):
    """P of them, the first with a signal, divided evenly among the updates; others would make one update larger."""
    rollout = train.Rollout(responses=[[]] * 6)
    rewards = type("Worth", (), {"signal": torch.tensor([False, True, False, True, True, True])})
    parts = []
    monkeypatch.setattr(train, "rows_of", lambda part, *_: parts.append(part.tolist()) or ([], 0, 0))
    policy = train.Policy(model, model, None, torch.optim.SGD(model.parameters()), processor)
    for refill, want in ((1, [[0, 1, 2], [3, 4, 5]]), (3, [[1], [3]])):
        parts.clear()
        train.update(policy, [None] * 6, rollout.responses, rewards, [0.0, 0.0], train.Config(refill=refill), 2)
        assert parts == want


def test_a_smaller_batch_wants_no_more_than_its_own_number():
    """A stage of 9 is three batches of 3, for P = 4: asked for 4 each, it sampled a second one and threw it away."""
    rollout, cfg = train.Rollout(), train.Config(refill=3, prompts_per_rollout=4)
    for ends, signals, more in ((False, [True, True, False], True), (False, [True] * 5 + [False], False)):
        rollout.add(Batch(0, [Record("r", "?", "1")] * 3, ends), [None] * 3, [[]] * 3)
        assert rollout.wants_more(type("Worth", (), {"signal": torch.tensor(signals)}), cfg) == more
    assert rollout.wanted == 3
    rollout.batches[-1] = Batch(0, rollout.batches[0].records, True)
    assert not rollout.wants_more(type("Worth", (), {"signal": torch.tensor([False] * 6)}), cfg), "the stage has ended"


def test_a_refilled_run_that_was_stopped_goes_on_the_same(refilled, tmp_path, monkeypatch):
    """In the second batch of a rollout: both are given back, or the first would be lost to training."""
    options, whole = refilled
    first = next(line["step"] for line in lines(whole) if line.get("problems", 0) > 2)
    batches, real, calls = first, train.sample_groups, []

    def stop(*args, **given):
        calls.append(1)
        if len(calls) == batches:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **given)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "sample_groups", stop)
        main([*options, "--out", str(run)])
    assert len(history(run)) < len(history(whole))
    main([*options, "--out", str(run), "--resume"])
    assert lines(run) == lines(whole) and history(run) == history(whole)


def test_a_refilled_run_is_the_same_when_it_is_stopped_by_max_steps(refilled, tmp_path):
    """The cut made a rollout of fewer batches than the whole run's, and so other weights."""
    options, whole = refilled
    first = next(line["step"] for line in lines(whole) if line.get("problems", 0) > 2)
    run = tmp_path / "run"
    main([*options, "--out", str(run), "--max-steps", str(first - 1)])
    assert lines(run)[-1]["step"] == first, "what has begun is finished"
    main([*options, "--out", str(run), "--max-steps", str(first - 1), "--resume"])
    assert lines(run)[-1]["step"] == first
    main([*options, "--out", str(run), "--resume"])
    assert lines(run) == lines(whole) and history(run) == history(whole)


def test_refill_and_counting_what_it_replaces_are_refused():
    with pytest.raises(ValueError, match="--refill .* --count-no-signal"):
        train.parse_config(["--refill", "2", "--count-no-signal"])


def test_epochs_walk_the_ladder_again_in_another_shuffle(small):
    """The same stages with the same problems, easy to hard each time; and one epoch is what it was."""
    records = load_records(small[1])
    once, twice = Curriculum(records, 4, seed=3), Curriculum(records, 4, seed=3, epochs=2)
    ids = [[r.id for r in batch.records] for batch in twice.batches]
    assert ids[:6] == [[r.id for r in batch.records] for batch in once.batches]
    assert [batch.stage for batch in twice.batches] == [0, 0, 1, 1, 2, 2] * 2
    assert sorted(sum(ids[:2], [])) == sorted(sum(ids[6:8], [])) and ids[6:8] != ids[:2]
    assert once.digest() != twice.digest(), "or a run of one epoch could be resumed as one of two"


def test_a_limit_is_taken_evenly(small, processor):
    """The first problems of a ladder are all of stage 0: a trial on them would see none of the others."""
    for limit, stages in ((6, [0, 0, 1, 1, 2, 2]), (0, [0] * 8 + [1] * 8 + [2] * 8), (99, [0] * 8 + [1] * 8 + [2] * 8)):
        cfg = train.parse_config([*small, "--limit", str(limit), "--out", "x"])
        problems, _ = train.load_problems(cfg, processor)
        assert [r.stage for r in problems] == stages


def test_low_complexity_cut_by_tokens():
    """The paper's figure drops problems of 2 and 23 tokens and keeps one of 56; only always solved ones are dropped."""
    records = [Record(str(n), "?", "1", difficulty=d, complexity=n)
               for n, d in ((2, 0), (23, 0), (56, 0), (70, 0), (5, .5))]
    assert [r.id for r in low_complexity_cut(records, 0, 50)] == ["56", "70", "5"]
    assert [r.id for r in low_complexity_cut(records, 0)] == ["2", "23", "56", "70", "5"]
    assert [r.id for r in low_complexity_cut(records, .5)] == ["56", "70", "5"]


# --- a style is said in one place -------------------------------------------------------------------------------------


def test_a_style_is_its_prompt():
    """A tag that stood in a prompt and not in the format's table left the format reward at 0 without a word."""
    assert TAGS == {"none": ("answer",), "steps": (), "think": ("think", "answer"),
                    "observe": ("observe", "think", "answer")}
    for style, tags in TAGS.items():
        assert all(f"<{tag}> </{tag}>" in PROMPTS[style] for tag in tags)
        text = " ".join(f"<{tag}>3</{tag}>" for tag in tags) or "It is 3."
        assert format_reward(text, style) == 1 and score(text, Record("r", "?", "3"), style).accuracy == 1
    assert format_reward("<think>x</think> It is 3.", "steps") == format_reward(" ", "steps") == 0


# --- what a run watches -----------------------------------------------------------------------------------------------


def test_grey_pictures_by_hand(model, processor, test_set):
    """The change is that of a prompt whose pictures were grey files of the same size; none without a picture."""
    record = next(r for r in test_set if r.images)
    prompt, ids = processor.encode(record, "observe"), processor.tokenizer("<observe>3 red</observe>").input_ids
    [image] = record.images
    grey = replace(record, images=(Image.new("RGB", open_image(image, "r").size, (128, 128, 128)),))
    with torch.no_grad():
        seen, blind = (response_logprobs(model, processor, [Packed(p, [ids])], 1.0)[0]
                       for p in (prompt, processor.encode(grey, "observe")))
    want = (seen - blind).abs().mean().item()
    assert picture_effect(model, processor, prompt, ids, 1.0) == pytest.approx(want, rel=0.02) and want > 0.1
    assert picture_effect(model, processor, replace(prompt, pixels=None, grid=None), ids, 1.0) == 0


def test_dropped_pictures_are_noticed(small, tmp_path, monkeypatch, capsys):
    """Trainers have trained for weeks on text alone: the pictures were lost between the loader and the model."""
    real = train.encode_ahead
    dropped = [*small, "--max-steps", "1", "--stage", "0", "--test", "", "--out"]
    main([*dropped, str(tmp_path / "seen")])
    assert lines(tmp_path / "seen")[0]["picture_effect"] > 0.1 and "not seen" not in capsys.readouterr().out
    monkeypatch.setattr(train, "encode_ahead", lambda processor, shares, style: real(
        processor, [[replace(r, images=()) for r in share] for share in shares], style))
    main([*dropped, str(tmp_path / "lost")])
    assert lines(tmp_path / "lost")[0]["picture_effect"] == 0
    assert "warning: the pictures are not seen" in capsys.readouterr().out


def test_a_blind_tower_is_noticed_at_each_evaluation(small, tmp_path, monkeypatch, capsys):
    """The pictures reach the model, and their features do not reach the text."""
    real = train.load_trainer

    def blind(*args, **options):
        policy = real(*args, **options)
        policy.sampler.model.visual.merger.register_forward_hook(lambda module, args, output: output * 0)
        return policy

    monkeypatch.setattr(train, "load_trainer", blind)
    main([*small, "--stage", "0", "--out", str(tmp_path / "run")])
    effects = [line["picture_effect"] for line in lines(tmp_path / "run") if "picture_effect" in line]
    assert effects == [0, 0, 0] and capsys.readouterr().out.count("the pictures are not seen") == 3


def test_what_a_response_spells_out_does_not_hurt_the_sentinel(small, tmp_path, monkeypatch):
    """A model may write "<|image_pad|>" letter by letter; read back as the token, it is a picture without pixels."""
    def odd(*args):
        line = real(*args)
        spelt = ("<|image_pad|> 3", "<|vision_start|>")
        line["shown"] = [told | {"text": text} for told, text in zip(line["shown"], spelt)]
        return line

    real = train.held_out
    monkeypatch.setattr(train, "held_out", odd)
    main([*small, "--stage", "0", "--max-steps", "1", "--out", str(tmp_path / "run")])
    assert all(0 < line["picture_effect"] < 100 for line in lines(tmp_path / "run") if "eval" in line)


def test_every_problem_has_its_history(small, whole_run):
    """Of all 24, and not of two a rollout: what a ladder calls hard can be compared with what was met in training."""
    ladder, told = {r.id: r for r in load_records(small[1])}, history(whole_run)
    assert sorted(line["id"] for line in told) == sorted(ladder) and {line["of"] for line in told} == {4}
    logged = [json.loads(line) for line in (whole_run / "responses.jsonl").read_text().splitlines()]
    for line in told:
        record = ladder[line["id"]]
        assert (line["stage"], line["difficulty"]) == (record.stage, record.difficulty)
        shown = [r for r in logged if r["id"] == line["id"]]
        if shown:
            assert line["right"] == sum(r["accuracy"] for r in shown)
            assert line["length"] == sum(r["tokens"] for r in shown) / 4
            assert line["reward"] == pytest.approx(sum(r["reward"] for r in shown) / 4)
    steps = [line for line in lines(whole_run) if "reward" in line]
    for step in steps:
        mine = [line["right"] / 4 for line in told if line["step"] == step["step"]]
        assert sum(mine) / len(mine) == pytest.approx(step["accuracy"])
    [run] = compare.read_runs(whole_run)
    easy = [100 * line["right"] / 4 for line in told if line["difficulty"] == 0]
    assert run.beside["0.000, in training, %"] == pytest.approx(sum(easy) / len(easy))
