"""Several processes: the same steps as one takes, whatever their number; none hangs, and none outlives another's death.

Two gloo processes on the CPU, under torchrun; ranks.py is what they run. Checks 9 and 15 of the field's known faults.
"""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from conftest import ROOT, lines, weights
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

import train
from train import checkpoints, damage, main

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


@pytest.fixture(scope="module")
def torchrun():
    """Starts a command on two processes; what still runs at the end is ended."""
    started = []

    def start(*args: str) -> subprocess.Popen:
        started.append(subprocess.Popen([*TORCHRUN, *args], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def two(torchrun, tmp_path_factory) -> Path:
    """What two processes make of every scenario."""
    folder = tmp_path_factory.mktemp("two")
    process = torchrun("tests/ranks.py", ",".join(ranks.SCENARIOS), str(folder))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return folder


def saved(folder: Path) -> dict:
    """A scenario's outcome, from its checkpoint."""
    path = folder / "checkpoint-000000"
    state = json.loads((path / "trainer/state.json").read_text())
    moments = {f"{kind} {name}": value for kind in train.MOMENTS
               for name, value in load_file(path / f"trainer/{kind}.safetensors").items()}
    return state | {"weights": dict(ranks.load_policy(str(path)).named_parameters()), "moments": moments}


def assert_same(got: dict, want: dict) -> None:
    """Weights to 1e-5 where steps moved them by 1e-4 and more; moments, which are linear in the gradients and tell what
    Adam's division hides, to 1e-4 of a tensor's largest; the statistics; and what is sampled then."""
    assert got["weights"].keys() == want["weights"].keys() and got["moments"].keys() == want["moments"].keys()
    for name, value in want["weights"].items():
        torch.testing.assert_close(got["weights"][name], value, atol=1e-5, rtol=0, msg=name)
    for name, value in want["moments"].items():
        torch.testing.assert_close(got["moments"][name], value, atol=1e-4 * value.abs().max().item(), rtol=0, msg=name)
    assert got["stats"] == pytest.approx(want["stats"], rel=1e-4, abs=1e-6)
    assert got["sampled"] == want["sampled"]


@pytest.mark.parametrize("name", [name for name in ranks.SCENARIOS if name not in ("offload", "half")])
def test_two_processes_take_the_steps_of_one(two, name):
    """Each aggregation; uneven lengths; a group dropped on one rank only, one rank without any, text on one rank only;
    a sharded reference. Normalised per rank, or with an Adam step for gradients that nobody has, they would differ."""
    assert_same(saved(two / name), ranks.run(name))


def test_gathered_in_bf16_as_on_gpus(two):
    """Masters stay fp32, or steps of 1e-6 would round away; what is scored differs by bf16's rounding and no more."""
    half, full = saved(two / "half"), saved(two / "token")
    for name in ("ratio", "entropy", "loss", "grad_norm"):
        assert half["stats"][name] == pytest.approx(full["stats"][name], rel=0.1), name
    assert all(value.dtype == torch.float32 and (value - full["weights"][name]).abs().max() < 1e-3
               for name, value in half["weights"].items())
    assert any((value != value.bfloat16()).any() for value in half["weights"].values())


def test_off_loading_changes_nothing(two):
    """FSDP of one process, for a GPU too small for the moments; and of two."""
    want = ranks.run("token")
    try:
        assert_same(ranks.run("offload"), want)
    finally:
        torch.distributed.destroy_process_group()
    assert_same(saved(two / "offload"), want)


def test_a_checkpoint_knows_nothing_of_the_number_of_processes(two):
    """Two processes restore what two saved, to the bit; the next step of one process is that of two."""
    path = two / "token/checkpoint-000000"
    before, restored = saved(two / "token"), saved(two / "restored")
    for kind in ("weights", "moments"):
        assert all(torch.equal(value, restored[kind][name]) for name, value in before[kind].items())
    assert {"lm_head.weight", "config.json"} & {p.name for p in path.iterdir()}, "a plain Hugging Face folder"
    assert_same(saved(two / "resumed"), ranks.run("token", source=str(path), lrs=(1e-4,)))


def close_to(run: Path, whole: Path) -> None:
    """The same log, responses and weights, to rounding."""
    for got, want in zip(lines(run), lines(whole), strict=True):
        got.pop("sampler_gap", 0), want.pop("sampler_gap", 0)  # (rounding, and nothing else)
        assert got == (want if "eval" in want else pytest.approx(want, rel=1e-3, abs=1e-5))
    texts = [[[r["text"] for r in json.loads(line)["responses"]]
              for line in (folder / "responses.jsonl").read_text().splitlines()] for folder in (run, whole)]
    assert texts[0] == texts[1]
    got, want = weights(run), weights(whole)
    for name, value in want.items():
        if name.startswith("model "):
            torch.testing.assert_close(got[name], value, atol=1e-5, rtol=0, msg=name)


def test_a_run_may_go_on_with_another_number_of_processes(torchrun, small, whole_run, stopped_run):
    """Two steps of one process, some of two until the cluster takes them away (SIGTERM goes to torchrun alone, which
    hands it on), and the rest of one: the run that one process made in one go."""
    run = stopped_run(2)
    assert checkpoints(run)[-1].name == "checkpoint-000002"
    process, start = torchrun("train.py", *small, "--out", str(run), "--resume"), time.time()
    while process.poll() is None and lines(run)[-1]["step"] < 4 and time.time() < start + 100:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "resumed from" in output and "stopped after step" in output, output
    assert 4 <= int(checkpoints(run)[-1].name[-6:]) < 6 and damage(checkpoints(run)[-1]) is None
    main([*small, "--out", str(run), "--resume"])
    close_to(run, whole_run)


def test_a_rank_that_fails_ends_the_others_with_its_error(torchrun, small, tmp_path):
    """And a rank to which no prompt fell hangs nobody: here a rollout is one prompt."""
    options = [*small, "--prompts-per-rollout", "1", "--updates-per-rollout", "1", "--test", ""]
    process = torchrun("tests/ranks.py", "die", str(tmp_path), *options, "--out", str(tmp_path / "run"))
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0 and "RuntimeError: rank 1 has had enough" in output
    assert [line["step"] for line in lines(tmp_path / "run")] == [1]


# --- memory ----------------------------------------------------------------------------------------------------------

VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)  # of the published config.json
MODELS = {"3b": (3_754_622_976, VISION | {"out_hidden_size": 2048}, dict(
    hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008,
    vocab_size=151936, tie_word_embeddings=True)), "7b": (8_292_166_656, VISION | {"out_hidden_size": 3584}, dict(
        hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
        vocab_size=152064, tie_word_embeddings=False))}
OFFLOAD = "--offload --rollout-rows 8 --max-prompt-tokens 4096 --max-response-tokens 1024 --micro-tokens 8192"


def model_config(preset: str) -> Qwen2_5_VLConfig:
    _, vision, text = MODELS[preset]
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"])


def table() -> dict[str, dict[str, float]]:
    """README's columns -> what train.memory says."""
    columns = {"3B on 8 x 80 GB": ("3b", 8, "--kl-coef 0.01"), "7B on 8 x 80 GB": ("7b", 8, "--kl-coef 0.01"),
               "3B on 1 x 141 GB": ("3b", 1, "--kl-coef 0.01"), "3B on 1 x 24 GB, off-loaded": ("3b", 1, OFFLOAD)}
    return {column: train.memory(model_config(preset), train.parse_config(
        ["--preset", preset, "--data", "ladder/", *options.split()]), processes)
        for column, (preset, processes, options) in columns.items()}


def test_the_readmes_memory_table_is_computed():
    """And says that the presets fit: 2% are left for what torch keeps for itself."""
    found, readme = table(), (ROOT / "README.md").read_text()
    assert f"| GB a GPU | {' | '.join(found)} |" in readme and OFFLOAD in readme
    for part in next(iter(found.values())):
        assert f"| {part} | {' | '.join(f'{found[column][part]:.1f}' for column in found)} |" in readme
    for column, parts in found.items():
        assert parts["peak"] < 0.98 * float(column.split(" x ")[1].split()[0]), column


@pytest.mark.parametrize("preset", MODELS)
def test_the_table_counts_the_published_models(preset):
    """To the parameter, as the hub has them."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(model_config(preset))
    assert sum(p.numel() for p in model.parameters()) == MODELS[preset][0]


def test_memory_by_hand():
    """A cache of two rows of ten tokens of the toy; and shares, moments and gradients of its weights."""
    toy = ranks.load_policy(str(ranks.TOY / "model"))
    n, text = toy.num_parameters(), toy.config.text_config
    cfg = train.Config(rollout_rows=2, max_prompt_tokens=6, max_response_tokens=4, kl_coef=0.1)
    found = train.memory(toy.config, cfg, 4)
    keys = text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    assert found["cache"] * 1e9 == 2 * 10 * 2 * keys * 2  # rows, tokens, keys and values, bytes
    assert [found[name] * 1e9 for name in ("weights", "gradients", "moments", "replica", "reference")] == pytest.approx(
        [n, n, 2 * n, 2 * n, n / 2])


# --- kills (slow) ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_within_a_minute(torchrun, small, whole_run, tmp_path):
    """As the kernel does when memory runs out. The run goes on from the last save and is the same."""
    run = tmp_path / "run"
    process = torchrun("train.py", *small, "--out", str(run), "--save-every", "1")
    while process.poll() is None and not checkpoints(run):
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ours = [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ours) == 2
    os.kill(ours[1], signal.SIGKILL)
    start = time.time()
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in output and time.time() - start < 60
    assert damage(checkpoints(run)[-1]) is None
    main([*small, "--out", str(run), "--resume", "--save-every", "1"])
    close_to(run, whole_run)
