"""Each setting changes what it says and nothing else; then values that one wrong line would change in silence.

A run of eight problems, whose responses are made up, is watched: the plain arguments of what train.py calls, its
optimizer's steps, and the files that it leaves. A new field of Config needs a line in CASES: what is given, and all
that is seen to differ then.
"""
from __future__ import annotations

import copy
import inspect
import itertools
import json
import math
import os
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import accelerate
import pytest
import torch
from conftest import TOY, lines
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import curriculum
import eval as eval_
import rollout
import train
from curriculum import build_ladder, level_of
from data import Record, load_records, save_records
from eval import Result, evaluate, judge
from rewards import Response, Rewards, group_rewards, score_groups
from rollout import Group, Policy, Sample, load_policy, load_trainer, sample_groups, stop_processes
from train import Config, grpo_loss, main, parse_config, update

MODEL = str(TOY / "model")
BASE = ("--prompts-per-rollout 4 --group-size 3 --updates-per-rollout 2 --data WORLD/ladder.parquet "
        "--test WORLD/a.parquet")
WATCHED = ("start_processes Processor load_records check_records Curriculum load_trainer encode_ahead sample_groups "
           "judge flip_coins group_rewards response_logprobs grpo_loss roll_out save_checkpoint "
           "mark_best_and_prune").split()


@dataclass
class Case:
    """A setting, given otherwise."""

    option: str
    differs: dict  # what is seen to differ then, with its values; ANY: with another one
    given: str = ""  # options of both runs
    first: str = ""  # options of a run that is made before, in the same folder


# Of a rollout's two updates the first has two groups of 5 + 6 + 7 tokens, the second one, and one without signal.
# Values in parentheses follow each other in the run, equal neighbours are one. lr is 1e-4, 1e-4, .775e-4, .325e-4.
CASES = {
    "preset": Case("--preset 3b", {}, "--preset toy --max-pixels 50176 --max-prompt-tokens 256 --bonus-floor 40 "
                   "--max-response-tokens 160 --lr 1e-4 --no-gradient-checkpointing --micro-tokens 8192 "
                   "--rollout-rows 64 --save-every 10 --model WORLD/model"),  # (what is given beside it prevails)
    "model": Case("--model WORLD/model", {"Processor.path": "WORLD/model", "load_trainer.source": "WORLD/model",
                                            "load_trainer.start": "WORLD/model"}),
    "data": Case("--data WORLD/b.parquet", {"load_records.path_or_id": ("WORLD/b.parquet", "WORLD/a.parquet")}),
    "test": Case("--test WORLD/b.parquet", {"load_records.path_or_id": ("WORLD/ladder.parquet", "WORLD/b.parquet"),
                                            "check_records.records": 8, "roll_out.records": 8}),
    "out": Case("--out WORLD/out/elsewhere", {"folder": "elsewhere"}),
    "resume": Case("--resume", {
        "Processor.path": "OUT/checkpoint-000001", "load_trainer.source": "OUT/checkpoint-000001",
        "sample_groups.seed": 2, "steps": 2, "lr": pytest.approx((.775e-4, .325e-4)),
        "grpo_loss.num_tokens": (36, 18), "grpo_loss.num_sequences": (6, 3), "response_logprobs.rows": (1, 2, 1),
        "roll_out.name": ("step000002-greedy", "step000002-sampled"), "roll_out.temperature": (0, 1),
        "roll_out.samples": (1, 4), "save_checkpoint.step": 2}, first="--max-steps 1"),
    "skip_bad": Case("--skip-bad", {"load_records.skip_bad": True, "check_records.skip_bad": True}),
    "limit": Case("--limit 6", {  # of each batch three problems, and so of its second update none with a signal
        "check_records.records": (6, 2), "Curriculum.records": 6, "sample_groups.records": 3,
        "sample_groups.prompts": 3, "judge.groups": 3, "group_rewards.responses": 3, "response_logprobs.rows": 2,
        "grpo_loss.num_tokens": 36, "grpo_loss.num_sequences": 6, "lr": pytest.approx((1e-4, .775e-4)), "steps": 2,
        "batches": ANY}),
    "epochs": Case("--epochs 2", {
        "Curriculum.epochs": 2, "batches": ANY, "steps": 8, "sample_groups.seed": (1, 2, 3, 4),
        "grpo_loss.num_tokens": (36, 18) * 4, "grpo_loss.num_sequences": (6, 3) * 4,
        "response_logprobs.rows": (1, 2) * 4 + (1,), "save_checkpoint.step": (1, 2, 3, 4), "checkpoints": [1, 3, 4],
        "roll_out.name": ANY, "lr": ANY}),
    "refill": Case("--refill 2", {"group_rewards.responses": (2, 4, 2, 4), "lr": ANY}, "--prompts-per-rollout 2"),
    "ratio": Case("--ratio sequence", {"grpo_loss.ratio_of": "sequence"}),
    "tis_cap": Case("--tis-cap 2", {"grpo_loss.tis_cap": 2}),
    "lora_rank": Case("--lora-rank 4", {"load_trainer.lora_rank": 4}),
    "stage": Case("--stage 0-1", {"Curriculum.stages": range(0, 2)}),
    "order": Case("--order reverse", {"Curriculum.order": "reverse", "batches": ANY}),
    "prompt": Case("--prompt think", {f"{name}.style": "think" for name in (
        "check_records", "encode_ahead", "judge", "roll_out")}),
    "group_size": Case("--group-size 4", {"sample_groups.samples": 4, "grpo_loss.num_tokens": (52, 26, 52, 26),
                                          "grpo_loss.num_sequences": (8, 4, 8, 4)}),
    "prompts_per_rollout": Case("--prompts-per-rollout 8", {"Curriculum.batch_size": 8}),  # (a stage has four problems)
    "temperature": Case("--temperature .5", {f"{name}.temperature": .5 for name in (
        "sample_groups", "response_logprobs", "generation")}),
    "max_prompt_tokens": Case("--max-prompt-tokens 250", {"check_records.max_tokens": 250}),
    "max_response_tokens": Case("--max-response-tokens 99", {
        "sample_groups.max_tokens": 99, "roll_out.max_tokens": 99, "grpo_loss.max_tokens": 99,
        "generation.max_new_tokens": 99}),
    "max_pixels": Case("--max-pixels 40000", {"Processor.max_pixels": 40000}),
    "rollout_rows": Case("--rollout-rows 9", {"sample_groups.max_rows": 9, "roll_out.max_rows": 9}),
    "format_weight": Case("--format-weight .3", {"group_rewards.format_weight": .3}),
    "bonus": Case("--bonus .1", {"group_rewards.bonus_coef": .1}),
    "bonus_floor": Case("--bonus-floor 7", {"group_rewards.bonus_min_length": 7}),
    "sigma": Case("--sigma 0", {"group_rewards.sigma": None}),
    "normalize_std": Case("--no-normalize-std", {"group_rewards.normalize_std": False}),
    "random_rewards": Case("--random-rewards", {  # (which groups have a signal is the coins')
        "flip_coins.step": (1, 2), "flip_coins.responses": 4, "grpo_loss.num_tokens": ANY,
        "grpo_loss.num_sequences": ANY, "response_logprobs.rows": ANY}),
    "rejection_sampling": Case("--rejection-sampling", {"group_rewards.rejection_sampling": True}),
    "updates_per_rollout": Case("--updates-per-rollout 1", {
        "steps": 2, "lr": 1e-4, "grpo_loss.num_tokens": 54, "grpo_loss.num_sequences": 9, "response_logprobs.rows": 3}),
    "clip_low": Case("--clip-low .1", {"grpo_loss.clip_low": .1}),
    "clip_high": Case("--clip-high .3", {"grpo_loss.clip_high": .3}),
    "aggregation": Case("--aggregation constant", {"grpo_loss.aggregation": "constant"}),
    "kl_coef": Case("--kl-coef .1", {  # and all groups are forwarded, by two models
        "load_trainer.kl": True, "grpo_loss.kl_coef": .1, "grpo_loss.ref_logprobs": "Tensor",
        "grpo_loss.num_tokens": 36, "grpo_loss.num_sequences": 6, "response_logprobs.rows": 2}),
    "count_no_signal": Case("--count-no-signal", {"grpo_loss.num_tokens": 36, "grpo_loss.num_sequences": 6}),
    "mask_truncated": Case("--mask-truncated", {"grpo_loss.num_tokens": (22, 11, 22, 11),  # without those of 7 tokens
                                                "grpo_loss.num_sequences": (4, 2, 4, 2)}),
    "freeze_vision": Case("--freeze-vision", {"load_trainer.freeze_vision": True, "trained": ["language_model"],
                                              "moved": ["language_model"]}),
    "lr": Case("--lr 1e-3", {"load_trainer.lr": 1e-3, "lr": pytest.approx((1e-3, .775e-3, .325e-3))}),
    "warmup": Case("--warmup .5", {"lr": pytest.approx((.5e-4, 1e-4, .55e-4))}),
    "schedule": Case("--schedule constant", {"lr": 1e-4}),
    "grad_clip": Case("--grad-clip .1", {"clip_grad_norm_.max_norm": .1}),
    "gradient_checkpointing": Case("--gradient-checkpointing", {"load_trainer.gradient_checkpointing": True,
                                                                "checkpointed": True}),
    "micro_tokens": Case("--micro-tokens 1", {"response_logprobs.rows": 1}),
    "offload": Case("--offload", {"start_processes.offload": True, "load_trainer.offload": True, "replica": True}),
    "eval_samples": Case("--eval-samples 2", {"roll_out.samples": (1, 2, 1, 2)}),
    "eval_limit": Case("--eval-limit 1", {"roll_out.records": (2, 1, 2)}),
    "save_every": Case("--save-every 1", {"save_checkpoint.step": (1, 2, 3, 4), "checkpoints": [1, 2, 3, 4]},
                       "--prompts-per-rollout 2 --keep 9"),
    "keep": Case("--keep 3", {"mark_best_and_prune.keep": 3, "checkpoints": [2, 3, 4]},
                 "--prompts-per-rollout 2 --save-every 1 --test="),
    "max_steps": Case("--max-steps 1", {  # lr is that of the whole run
        "sample_groups.seed": 1, "steps": 2, "lr": 1e-4, "grpo_loss.num_tokens": (36, 18),
        "grpo_loss.num_sequences": (6, 3), "response_logprobs.rows": (1, 2, 1), "roll_out.temperature": (0, 1, 0),
        "roll_out.name": ("step000000-greedy", "step000000-sampled", "step000001-greedy"),
        "roll_out.samples": (1, 4, 1), "save_checkpoint.step": 1, "checkpoints": [1],
        "files": ANY}),  # (no scores.json)
    "tracker": Case("--tracker tensorboard", {"Accelerator.log_with": "tensorboard", "tracked": [1, 2]}),
    "seed": Case("--seed 3", {"Curriculum.seed": 3, "load_trainer.seed": 3,
                              "sample_groups.seed": (3_000_010, 3_000_011), "batches": ANY}),
}


# --- a run, watched --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory, test_set) -> Path:
    """A ladder of two stages of four problems, held-out ones, and the model under another name."""
    folder = tmp_path_factory.mktemp("world")
    ladder = load_records(str(TOY / "ladder"))
    records = [r for stage in (0, 1) for r in [x for x in ladder if x.stage == stage][:4]]
    save_records(str(folder / "ladder.parquet"), records)
    save_records(str(folder / "a.parquet"), test_set[:2])
    shutil.copy(folder / "ladder.parquet", folder / "b.parquet")
    (folder / "model").symlink_to(TOY / "model")
    save_records(str(folder / "raw.parquet"), [replace(r, difficulty=None, complexity=None) for r in records])
    shutil.copy(folder / "raw.parquet", folder / "more.parquet")
    (folder / "review.csv").write_text("id,decision,new_gold\n")
    return folder


def made_up(model, processor, records, prompts, *, samples, **_) -> list[Group]:
    """In place of sample_groups: responses of 5, 6, 7, .. tokens, of which the first is right and the third right, bare
    and cut off; those to the last problem are all wrong."""
    groups = []
    for record, prompt in zip(records, prompts):
        right, wrong = (f"<observe>o</observe><think>t</think><answer>{answer}</answer>"
                        for answer in (record.golds[0], "none of these"))
        texts = [right, wrong, f"<answer>{record.golds[0]}</answer>", wrong]
        texts = [wrong] * 4 if record is records[-1] else texts
        groups.append(Group(record, prompt, [Sample(text, [40 + g] * (5 + g), g == 2, torch.full((5 + g,), -1.0))
                                             for g, text in enumerate(texts[:samples])]))
    return groups


def answered(folder, name, records, load, attempt=None, *, samples, **_) -> list[Result]:
    """In place of roll_out: all wrong."""
    return [Result(r, [Response(None, 0, 0, None, "", 3, False)] * samples) for r in records]


LOADED: dict = {}  # the shipped model, by how it was loaded
READ = cache(load_records)


@pytest.fixture
def stage(monkeypatch):
    """Stand-ins for what takes long: sampling, answering, drawing, the disk, listing what is installed, and reading
    the same again."""
    def load(path, device="cpu", **given):
        key = str((path, device, given))
        if not path.startswith(MODEL):
            return load_policy(path, device, **given)
        LOADED[key] = LOADED.get(key) or load_policy(path, device, **given)
        return copy.deepcopy(LOADED[key])

    monkeypatch.setattr(rollout, "load_policy", load)
    for module in (train, curriculum):
        monkeypatch.setattr(module, "load_records", READ)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for name, stand_in in {"sample_groups": made_up, "roll_out": answered, "environment": dict,
                           "plot_curves": lambda *_: None, "write_responses": lambda *_: None}.items():
        monkeypatch.setattr(train, name, stand_in)
    yield monkeypatch
    stop_processes()


def told(value):
    """What is kept of an argument: a plain value, how many a list holds, that there is a tensor; else None."""
    if isinstance(value, torch.Tensor):
        return "Tensor"
    value = str(value) if isinstance(value, Path) else len(value) if isinstance(value, list) else value
    return value if isinstance(value, (int, float, str, range)) else None


def watch(monkeypatch, seen: dict[str, list], name: str, signature: inspect.Signature, where=train) -> None:
    """From now on the plain arguments of `where`.name are noted as name.argument."""
    call = getattr(where, name)

    def noted(*args, **given):
        bound = signature.bind(*args, **given)
        bound.apply_defaults()
        for argument, value in bound.arguments.items():
            many = signature.parameters[argument].kind is inspect.Parameter.VAR_KEYWORD
            for key, item in value.items() if many else [(argument, value)]:
                seen[f"{name}.{key}"].append(told(item))
        result = call(*args, **given)
        seen[name].append(result)
        return result

    monkeypatch.setattr(where, name, noted)


SIGNATURES = {name: inspect.signature(getattr(train, name)) for name in WATCHED}  # (before any stand-in)


def observe(stage, world: Path, options: str) -> dict:
    """Make a run with these options -> all that was seen of it."""
    seen: dict[str, list] = defaultdict(list)
    tracked: list[int] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: seen["lr"].append(optimizer.param_groups[0]["lr"]))
    with stage.context() as patch:
        for name, signature in SIGNATURES.items():
            watch(patch, seen, name, signature)
        clip = torch.nn.utils.clip_grad_norm_
        watch(patch, seen, "clip_grad_norm_", inspect.signature(clip), torch.nn.utils)
        tracker = SimpleNamespace(init_trackers=lambda *_, **__: None, end_training=lambda: None,
                                  log=lambda values, step: tracked.append(step))
        patch.setattr(accelerate, "Accelerator", lambda *, log_with, **_:
                      seen["Accelerator.log_with"].append(log_with) or tracker)
        find = train.importlib.util.find_spec
        patch.setattr(train.importlib.util, "find_spec", lambda name, *more: name == "tensorboard" or find(name, *more))
        main(f"{BASE} --out WORLD/out/run {options}".replace("WORLD", str(world)).split())
    hook.remove()
    [folder] = [path.parent for path in (world / "out").glob("*/settings.json")]
    policy, order = seen["load_trainer"][0], seen["Curriculum"][0]
    found = in_turn(seen)
    found |= {f"settings.{key}": value for key, value in json.loads((folder / "settings.json").read_text()).items()}
    found |= {f"generation.{key}": value for key, value in
              json.loads((folder / "generation_config.json").read_text()).items()}
    saved = sorted(folder.glob("checkpoint-*"))
    before, after = ({key: value for file in path.glob("*.safetensors") for key, value in load_file(file).items()}
                     for path in (TOY / "model", saved[-1]))
    found |= {
        "folder": folder.name, "steps": len(seen["lr"]), "tracked": tracked,
        "replica": policy.sampler is not policy.model,
        "batches": [[r.id for r in batch.records] for batch in order.batches],
        "checkpoints": [int(path.name[-6:]) for path in saved],
        "files": sorted(path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")),
        "trained": parts(name for name, p in policy.model.named_parameters() if p.requires_grad),
        "moved": parts(name for name in after if name not in before or not torch.equal(before[name], after[name])),
        "checkpointed": any(getattr(part, "gradient_checkpointing", False) for part in policy.model.modules()),
        "optimizer": {key: value for key, value in policy.optimizer.defaults.items() if key != "lr"}}
    return {key: placed(value, folder, world) for key, value in found.items()}


def in_turn(seen: dict[str, list]) -> dict:
    """The values of each argument, one for equal neighbours; without the results of calls."""
    found = {key: tuple(value for value, _ in itertools.groupby(values)) for key, values in seen.items()
             if "." in key or key == "lr"}
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()}


def parts(names) -> list[str]:
    return sorted({"visual" if "visual" in name else "language_model" for name in names})


def placed(value, folder: Path, world: Path):
    """Paths inside of the test's folders by their place there."""
    if isinstance(value, tuple):
        return tuple(placed(item, folder, world) for item in value)
    return value.replace(str(folder), "OUT").replace(str(world), "WORLD") if isinstance(value, str) else value


BASES: dict = {}  # what is seen of the runs that the cases are compared with, by what is given to both, or program


@pytest.mark.run
@pytest.mark.parametrize("name", [field.name for field in fields(Config)])
def test_a_setting_changes_what_it_says_and_nothing_else(stage, world, name):
    """A switch that main or update ignores, hands to another, or that moves something beside."""
    assert name in CASES, f"{name} is a new setting: tell in CASES what it changes"
    case = CASES[name]
    for given, first in dict.fromkeys([(case.given, ""), (f"{case.given} {case.option}", case.first)]):
        if given not in BASES or case.option in given:
            shutil.rmtree(world / "out", ignore_errors=True)
            if first:
                main(f"{BASE} --out WORLD/out/run {case.given} {first}".replace("WORLD", str(world)).split())
            BASES[given] = observe(stage, world, given)
    base, got = BASES[case.given], BASES.pop(f"{case.given} {case.option}")
    changed = {key: got.get(key) for key in base | got if base.get(key) != got.get(key)}
    # (the settings are kept; but --resume, which is no part of a run, and the default of another preset)
    assert changed == case.differs | ({} if name in ("resume", "out") else {f"settings.{name}": ANY})


def test_coins_are_even_and_hang_on_seed_step_and_place_only():
    """The control of random rewards: a coin that follows the answer, or the batch's other groups, is none."""
    cfg = replace(Config(), group_size=8, seed=5)
    wrong, right = ([[Response("1", value, .5, .25, "t", 9, False)] * 8 for _ in range(500)] for value in (0.0, 1.0))
    flipped = [[[r.accuracy for r in group] for group in train.flip_coins(responses, 3, cfg)]
               for responses in (wrong, right, wrong[:100])]
    assert flipped[0] == flipped[1] and flipped[2] == flipped[0][:100]
    coins = torch.tensor(flipped[0])
    assert set(coins.unique().tolist()) == {0, 1} and abs(coins.mean() - .5) < .03
    assert abs(torch.corrcoef(coins.T).fill_diagonal_(0)).max() < .2, "no place in a group follows another"
    for other in (train.flip_coins(wrong, 4, cfg), train.flip_coins(wrong, 3, replace(cfg, seed=6))):
        assert .4 < (torch.tensor([[r.accuracy for r in group] for group in other]) == coins).float().mean() < .6
    told = train.flip_coins(wrong, 3, cfg)[0][0]
    assert replace(told, accuracy=0.0) == wrong[0][0], "nothing else of a response changes"


@pytest.mark.run
def test_an_adaptive_order_is_told_of_every_batch_what_it_came_to(stage, world, tmp_path):
    """Never, of the batches of a refilled rollout the first alone, or the last with the first one's answers."""
    told = []
    learned = train.Curriculum.learned
    stage.setattr(train.Curriculum, "learned", lambda order, rates: told.append((
        [r.id for r in order.batches[order.position - 1].records], rates)) or learned(order, rates))
    main(f"{BASE} --out {tmp_path}/run --prompts-per-rollout 2 --order adaptive --refill 2 --test=".replace(
        "WORLD", str(world)).split())
    history = [json.loads(line) for line in (tmp_path / "run/problems.jsonl").read_text().splitlines()]
    assert [(one, rate) for ids, rates in told for one, rate in zip(ids, rates, strict=True)] == [
        (line["id"], pytest.approx(line["right"] / line["of"])) for line in history]
    assert len(told) > len({line["step"] for line in history}) > 1, "rollouts of several batches"


def test_defaults_are_the_papers_but_for_the_row_of_a_preset():
    """A number of a preset in another's row, or the toy's in a run of 3B."""
    toy, small, large = (vars(parse_config(["--preset", name, "--data", "d"])) for name in ("toy", "3b", "7b"))
    paper = vars(Config())
    assert {key: toy[key] for key in toy if toy[key] != paper[key]} == {
        "model": MODEL, "data": "d", "test": str(TOY / "test.parquet"), "max_pixels": 50176,
        "max_prompt_tokens": 256, "max_response_tokens": 160, "bonus_floor": 40, "prompts_per_rollout": 16,
        "updates_per_rollout": 1, "lr": 1e-4, "gradient_checkpointing": False, "micro_tokens": 8192, "out": ANY}
    for name, got, rows in (("3b", small, 64), ("7b", large, 32)):
        assert {key: got[key] for key in got if got[key] != paper[key]} == {
            "preset": name, "model": f"Qwen/Qwen2.5-VL-{name.upper()}-Instruct", "data": "d", "rollout_rows": rows,
            "save_every": 10, "out": ANY}


def test_a_folder_is_named_by_what_tells_runs_apart():
    """Two seeds, orders or prompts in one folder: the second run is refused after the model is loaded."""
    assert parse_config([]).out == "out/toy-ladder-observe-seed0"
    options = "--preset 7b --data d --order random --prompt think --seed 5"
    assert parse_config(options.split()).out == "out/7b-random-think-seed5"


# --- the options of the other programs -------------------------------------------------------------------------------

PROGRAMS = {  # what is given to all of their runs, and what of theirs is watched
    curriculum: (f"--data WORLD/raw.parquet --model {MODEL} --size 2", "Processor load_records check_records "
                 "load_to_sample roll_out low_complexity_cut build_ladder read_corrections"),
    eval_: (f"--model {MODEL} --benchmark WORLD/a.parquet",
            "Processor read_benchmark raise_or_skip load_to_sample roll_out other_pictures")}
OPTIONS = {
    curriculum: {
        "data": Case("--data WORLD/more.parquet", {"load_records.path_or_id": "WORLD/more.parquet"}),
        "model": Case("--model WORLD/model", {"Processor.path": "WORLD/model", "load_to_sample.path": "WORLD/model"}),
        "out": Case("--out WORLD/out/elsewhere", {"folder": "elsewhere"}),
        "filter_model": Case("--filter-model WORLD/model", {"Processor.path": ANY,
                                                            "load_to_sample.path": ("WORLD/model", MODEL)}),
        "keep_simple": Case("--keep-simple", {
            "roll_out.name": "rollouts", "roll_out.samples": 8, "roll_out.temperature": 1, "roll_out.style": "observe",
            "roll_out.max_tokens": 8192}),
        "corrections": Case("--corrections WORLD/review.csv", {"read_corrections.path": "WORLD/review.csv",
                                                               "read_corrections.records": 8}),
        "low_complexity": Case("--low-complexity .5", {"low_complexity_cut.quantile": .5}),
        "min_complexity": Case("--min-complexity 9", {"low_complexity_cut.least": 9}),
        "size": Case("--size 3", {"build_ladder.size": 3}),
        "limit": Case("--limit 7", {"load_records.limit": 7} | dict.fromkeys(
            [f"{name}.records" for name in ("check_records", "roll_out", "low_complexity_cut", "build_ladder")], 7)),
        "skip_bad": Case("--skip-bad", {"load_records.skip_bad": True, "check_records.skip_bad": True}),
        "seed": Case("--seed 4", {"roll_out.seed": -5, "build_ladder.seed": 4}),
        "prompt": Case("--prompt think", {"check_records.style": "think", "roll_out.style": ("none", "think")}),
        "temperature": Case("--temperature .7", {"roll_out.temperature": (0, .7)}),
        "max_tokens": Case("--max-tokens 999", {"roll_out.max_tokens": (128, 999)}),
        "max_pixels": Case("--max-pixels 40000", {"Processor.max_pixels": 40000, "load_to_sample.max_pixels": 40000}),
        "rows": Case("--rows 9", {"roll_out.max_rows": 9})},
    eval_: {
        "model": Case("--model WORLD/model", {"Processor.path": "WORLD/model", "load_to_sample.path": "WORLD/model"}),
        "benchmark": Case("--benchmark WORLD/b.parquet", {
            "read_benchmark.spec": "WORLD/b.parquet", "roll_out.name": "b-observe-greedy", "roll_out.records": 8,
            "raise_or_skip.name": "b", "raise_or_skip.good": 8}),
        "prompt": Case("--prompt think,none", {"roll_out.name": ("a-think-greedy", "a-none-greedy"),
                                               "roll_out.style": ("think", "none")}),
        "pictures": Case("--pictures swapped,none", {
            "other_pictures.kind": ("swapped", "none"), "other_pictures.rows": 2,
            "roll_out.name": ("a-observe-greedy-swapped", "a-observe-greedy-none")}),
        "temperature": Case("--temperature .7", {"roll_out.temperature": .7, "roll_out.name": "a-observe-T=0.7"}),
        "samples": Case("--samples 3", {"roll_out.samples": 3, "roll_out.temperature": 1,
                                        "roll_out.name": "a-observe-T=1"}),
        "max_tokens": Case("--max-tokens 99", {"roll_out.max_tokens": 99}),
        "max_pixels": Case("--max-pixels 40000", {"Processor.max_pixels": 40000, "load_to_sample.max_pixels": 40000}),
        "rows": Case("--rows 9", {"roll_out.max_rows": 9}),
        "limit": Case("--limit 1", {"read_benchmark.limit": 1, "roll_out.records": 1, "raise_or_skip.good": 1}),
        "skip_bad": Case("--skip-bad", {"raise_or_skip.skip_bad": True}),
        "seed": Case("--seed 4", {"roll_out.seed": 4}),
        "out": Case("--out WORLD/out/elsewhere", {"folder": "elsewhere"})}}
ELSEWHERE = {"sampling_seed", "responses"}  # (made of --seed; test_benchmarks.py)


def told_of(module, stage, world: Path, options: str) -> dict:
    """Run a program with these options -> all that was seen of it; nothing is sampled."""
    def answers(folder, name, records, load, *, samples, **_):  # the first is wrong: none is simple
        load()
        return [Result(r, [Response("x", float(0 < g <= i), 0, None, "", 5, False) for g in range(samples)])
                for i, r in enumerate(records)]

    seen: dict[str, list] = defaultdict(list)
    given, names = PROGRAMS[module]
    shutil.rmtree(world / "out", ignore_errors=True)
    with stage.context() as patch:
        for name in names.split():
            signature = SIGNATURES[name] if name in SIGNATURES else inspect.signature(getattr(module, name))
            if stand_in := {"roll_out": answers, "load_to_sample": lambda *_: (None, None)}.get(name):
                patch.setattr(module, name, stand_in)
            watch(patch, seen, name, signature, module)
        command = f"{module.__name__}.py {given} --out WORLD/out/run {options}".replace("WORLD", str(world))
        patch.setattr(sys, "argv", command.split())
        module.main()
    [folder] = [path.parent for path in (world / "out").glob("*/settings.json")]
    return {key: placed(value, folder, world) for key, value in (in_turn(seen) | {"folder": folder.name}).items()}


@pytest.mark.parametrize("module, name", [(module, name) for module in OPTIONS for name in OPTIONS[module]])
def test_an_option_changes_what_it_says_and_nothing_else(stage, world, module, name):
    """Hours of measuring or answering with another setting than the command's, and than the card's."""
    if module not in BASES:
        BASES[module] = told_of(module, stage, world, "")
    base, got = BASES[module], told_of(module, stage, world, OPTIONS[module][name].option)
    changed = {key: got.get(key) for key in base | got if base.get(key) != got.get(key)}
    assert changed == OPTIONS[module][name].differs


def test_every_option_has_a_case(monkeypatch):
    """A new option that is parsed, and then forgotten."""
    monkeypatch.setattr(sys, "argv", "x --data d --model m --out o".split())
    assert set(vars(curriculum.parse_args())) - ELSEWHERE == set(OPTIONS[curriculum])
    monkeypatch.setattr(sys, "argv", ["x"])
    assert set(vars(eval_.parse_args())) - ELSEWHERE == set(OPTIONS[eval_])


# --- values ----------------------------------------------------------------------------------------------------------


def test_a_weight_is_of_the_answers_and_not_of_the_reward():
    """d as the share of rewards of 1 and more: with --format-weight 1 an all-wrong group weighed 1.8."""
    texts = [["<observe>o</observe><think>t</think><answer>8</answer>", "<answer>8</answer>"]]
    scored, lengths = score_groups(texts, [Record("r", "?", "7")], "observe"), torch.tensor([[5, 5]])
    got = group_rewards(scored, lengths, format_weight=1)
    assert got.total.tolist() == [[1, 0]] and got.weight.tolist() == [0]
    assert got.advantages.tolist() == [[0, 0]] and got.signal.tolist() == [False]


def test_lr_falls_over_the_run_and_not_over_each_rollout(stage, world, tmp_path):
    """A schedule that starts anew in each rollout looks right in any single one."""
    main(f"{BASE} --out {tmp_path / 'run'}".replace("WORLD", str(world)).split())
    assert [line["lr"] for line in lines(tmp_path / "run") if "lr" in line] == pytest.approx([1e-4, .55e-4])


def test_with_a_kl_too_a_run_that_goes_on_is_the_run_that_was_never_stopped(stage, world, tmp_path):
    """The KL was to the checkpoint that the run went on from, and so began at 0 again."""
    options = f"{BASE} --kl-coef .1 --lr 1e-3 --out {tmp_path}/".replace("WORLD", str(world))
    main(f"{options}whole".split())
    main(f"{options}parts --max-steps 1".split())
    main(f"{options}parts --resume".split())
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert [line["ref_kl"] for line in lines(tmp_path / "whole") if "ref_kl" in line][1] > 1e-4


def test_a_checkpoint_and_the_log_before_it_are_on_disk_when_it_gets_its_name(stage, world, tmp_path):
    """Named first, a checkpoint that a power cut leaves empty is the newest, and the one before it may be gone."""
    synced: list[str] = []
    named: dict[str, tuple[set[str], set[str]]] = {}  # checkpoint -> what is in it and the logs; what was synced then
    rename = os.replace

    def noted(source, target):
        if "checkpoint-" in str(target):
            inside = [*Path(source).rglob("*"), Path(source), *Path(source).parent.glob("*.jsonl")]
            named[Path(target).name] = {str(path) for path in inside}, {*synced}
            synced.clear()
        rename(source, target)

    stage.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    stage.setattr(os, "replace", noted)
    run = tmp_path / "run"
    main(f"{BASE} --max-steps 1 --out {run}".replace("WORLD", str(world)).split())
    [(there, on_disk)] = named.values()
    assert len(there) > 8 and there <= on_disk
    assert str(run) in synced, "the name itself"


@pytest.fixture(scope="module")
def work(processor, shipped, test_set) -> tuple[list[Group], list[list[Response]], Rewards]:
    """Two groups of three responses, sampled at a temperature of .7; advantages made up."""
    records = test_set[:2]
    prompts = [processor.encode(r, "observe") for r in records]
    groups = sample_groups(shipped, processor, records, prompts, samples=3, temperature=.7, max_tokens=20, seed=0)
    nothing, advantages = torch.zeros(2, 3), torch.tensor([[1., -1, 2], [-2, 1, 1]])
    return groups, judge(groups, "observe"), Rewards(nothing, nothing, nothing, nothing, torch.ones(2), advantages,
                                                     torch.tensor([True, True]), nothing)


def test_all_logprobs_of_an_update_are_at_the_temperature_of_sampling(model, processor, work):
    """Those of policy, old policy or reference at temperature 1: a gap of .016, ratios that clip at random, a KL from
    nothing."""
    cfg = Config(temperature=.7, kl_coef=.1, micro_tokens=4096, max_response_tokens=20)
    policy = Policy(model, model, copy.deepcopy(model), torch.optim.SGD(model.parameters()), processor)
    stats = update(policy, *work, [0.0, 0.0], cfg)
    assert stats["updates"] == 2 and stats["sampler_gap"] < 1e-5 and stats["ref_kl"] < 1e-9
    assert stats["ratio"] == pytest.approx(1, abs=1e-5) and stats["approx_kl"] < 1e-9


def test_a_kl_is_shared_out_as_the_loss_is():
    """A KL that is a mean over tokens whatever --aggregation says: many times too strong beside Dr. GRPO's loss."""
    away = torch.tensor([[.5, 0, 0], [1, -1, .2]])  # reference - policy, of responses of 1 and 3 tokens
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    first, *others = (math.exp(x) - 1 - x for x in (.5, 1, -1, .2))
    for aggregation, want in (("token", (first + sum(others)) / 4), ("sequence", (first + sum(others) / 3) / 2),
                              ("constant", (first + sum(others)) / (2 * 10))):
        loss, stats = grpo_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), mask, ref_logprobs=away,
                                kl_coef=.3, aggregation=aggregation, max_tokens=10)
        assert loss.item() == pytest.approx(.3 * want), aggregation
        assert stats["ref_kl"].item() == pytest.approx(first + sum(others)), "the statistic is a sum over tokens"


def test_a_gradient_reaches_the_optimizer_at_the_norm_it_may_have(model, processor, work):
    """Not clipped, or measured only: one bad rollout then undoes a run."""
    norms, rates = [], []

    class Measured(torch.optim.SGD):
        def step(self):
            norms.append(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).sqrt().item())
            rates.append(self.param_groups[0]["lr"])

    optimizer = Measured(model.parameters(), lr=1.0)
    cfg = Config(temperature=.7, micro_tokens=4096, max_response_tokens=20)
    for most in (.01, 1e9):
        stats = update(Policy(model, model, None, optimizer, processor), *work, [.2], replace(cfg, grad_clip=most))
    assert norms == pytest.approx([.01, stats["grad_norm"]], rel=1e-3) and stats["grad_norm"] > .1 and rates == [.2, .2]


def test_an_infinite_gradient_leaves_the_weights_alone(model, processor, work):
    """The loss is finite; scaled to its norm, the gradient would be 0 everywhere and nan where it was infinite."""
    before = copy.deepcopy(model.state_dict())
    policy = Policy(model, model, None, torch.optim.SGD(model.parameters()), processor)
    for factor in (math.inf, math.nan):  # (on the hook of the turn before too: nan)
        model.model.language_model.norm.weight.register_hook(lambda gradient, factor=factor: gradient * factor)
        with pytest.raises(FloatingPointError, match="gradient's norm is"):
            update(policy, *work, [.1], Config(temperature=.7, micro_tokens=4096, max_response_tokens=20))
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_optimizer_is_adamw_of_the_papers_settings(processor):
    """torch's own, betas of .9 and .999 and a weight decay of .01, trains too, and otherwise."""
    policy = load_trainer(MODEL, processor, torch.device("cpu"), lr=3e-5, freeze_vision=True)
    [group] = policy.optimizer.param_groups
    assert type(policy.optimizer) is torch.optim.AdamW
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (3e-5, (.9, .95), 0, 1e-8)
    assert not group["amsgrad"] and not group["maximize"]
    trained = [p for name, p in policy.model.named_parameters() if "visual" not in name]
    assert set(map(id, group["params"])) == set(map(id, trained)) and all(p.dtype == torch.float32 for p in trained)


@pytest.mark.run
def test_problems_are_measured_as_the_command_says(monkeypatch, shipped, processor, test_set, tmp_path):
    """Measured greedily, at temperature 1, in another style or with another seed, difficulties are another policy's."""
    records = sorted((replace(r, difficulty=None, complexity=None) for r in test_set[8:10]), key=lambda r: r.id)
    save_records(str(tmp_path / "raw.parquet"), records)
    options = (f"--data {tmp_path / 'raw.parquet'} --out {tmp_path / 'out'} --model {MODEL} --keep-simple "
               "--size 1 --temperature .7 --max-tokens 90 --prompt think --seed 4 --low-complexity 0")
    monkeypatch.setattr(sys, "argv", ["curriculum.py", *options.split()])
    curriculum.main()
    want = evaluate(shipped, processor, records, style="think", temperature=.7, samples=8, max_tokens=90, seed=-5)
    got = {r.id: r.meta["rollouts"] for r in load_records(str(tmp_path / "out/measured.parquet"))}
    assert got == {result.record.id: [{"answer": r.answer, "accuracy": r.accuracy, "tokens": r.tokens}
                                      for r in result.responses] for result in want}
    assert len({(r["answer"], r["tokens"]) for r in got[records[0].id]}) > 1, "eight, and not one eight times"


def test_a_small_ladder_draws_its_problems_from_all():
    """The first of each level by id, and other problems for no seed: a ladder of one source where files are joined."""
    records = [Record(f"{level}-{i:03d}", "?", "1", difficulty=level / 8, complexity=1.0) for level in range(9)
               for i in range(300)]
    taken = [{r.id for r in build_ladder(records, size=300, seed=seed)} for seed in (0, 1)]
    places = torch.tensor([float(name[2:]) for name in taken[0]])
    assert len(taken[0] & taken[1]) < 100 and 130 < places.mean() < 170 and places.max() > 280


def test_inside_a_stage_the_ladder_is_shuffled():
    """Level by level, a stage would be sorted by difficulty, which is another order of training."""
    records = [Record(f"{level}-{i}", "?", "1", difficulty=level / 8, complexity=float(i)) for level in range(9)
               for i in range(60)]
    ladder = build_ladder(records, size=300)
    for stage in range(9):
        rows = [r for r in ladder if r.stage == stage]
        for key in (level_of, lambda r: r.complexity):
            values = torch.tensor([float(key(r)) for r in rows])
            rises = (values.diff() >= 0).float().mean().item()
            assert len(rows) > 9 and .2 < rises < .9, f"stage {stage} is sorted"
