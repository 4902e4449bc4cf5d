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

from train import checkpoints, main, newest_whole

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
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return folder


def saved(folder: Path) -> dict:
    """A scenario's outcome, from its checkpoint."""
    return ranks.saved(folder / "checkpoint-000000", "lora" if folder.name == "lora" else "token")


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
    a sharded reference, and adapters put off. Normalised per rank, or with an Adam step for gradients that nobody has,
    they would differ."""
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
        assert got.pop("picture_effect", 0) == pytest.approx(want.pop("picture_effect", 0), rel=1e-3)
        assert got == (want if "eval" in want else pytest.approx(want, rel=1e-3, abs=1e-5))
    texts = [[json.loads(line)["response"] for line in (folder / "responses.jsonl").read_text().splitlines()]
             for folder in (run, whole)]
    assert texts[0] == texts[1]
    got, want = weights(run), weights(whole)
    for name, value in want.items():
        if not name.startswith("exp_avg"):
            torch.testing.assert_close(got[name], value, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
def test_a_run_may_go_on_with_another_number_of_processes(torchrun, small, whole_run, stopped_run):
    """Two steps of one process, some of two until the cluster takes them away (SIGTERM goes to torchrun alone, which
    hands it on), and the rest of one: the run that one process made in one go."""
    run = stopped_run(2)
    assert checkpoints(run)[-1].name == "checkpoint-000002"
    process = torchrun("train.py", *small, "--out", str(run), "--resume")
    while process.poll() is None and lines(run)[-1]["step"] < 4:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert "resumed from" in output and "stopped after step" in output, output
    newest = checkpoints(run)[-1]
    assert 4 <= int(newest.name[-6:]) < 6 and newest_whole(run) == newest
    main([*small, "--out", str(run), "--resume"])
    close_to(run, whole_run)


@pytest.mark.slow
def test_refill_does_not_depend_on_the_number_of_processes(torchrun, small, tmp_path):
    """Three problems a batch over two ranks: which rank holds what changes from batch to batch of one rollout."""
    options = [*small, "--prompts-per-rollout", "3", "--updates-per-rollout", "1", "--refill", "3", "--stage", "0-1"]
    main([*options, "--out", str(tmp_path / "one")])
    output, _ = torchrun("train.py", *options, "--out", str(tmp_path / "two")).communicate()
    assert "accuracy, greedy" in output, output
    close_to(tmp_path / "two", tmp_path / "one")
    assert any(line.get("problems", 0) > 3 for line in lines(tmp_path / "one"))


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others_with_its_error(torchrun, small, tmp_path):
    """And a rank to which no prompt fell hangs nobody: here a rollout is one prompt."""
    options = [*small, "--prompts-per-rollout", "1", "--updates-per-rollout", "1", "--test", ""]
    process = torchrun("tests/ranks.py", "die", str(tmp_path), *options, "--out", str(tmp_path / "run"))
    output, _ = process.communicate()
    assert process.returncode != 0 and "RuntimeError: rank 1 has had enough" in output
    assert [line["step"] for line in lines(tmp_path / "run")] == [1]


# --- kills (slow) ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others(torchrun, small, whole_run, tmp_path):
    """As the kernel does when memory runs out. The run goes on from the last save and is the same."""
    run = tmp_path / "run"
    process = torchrun("train.py", *small, "--out", str(run), "--save-every", "1")
    while process.poll() is None and not checkpoints(run):
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ours = [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ours) == 2
    os.kill(ours[1], signal.SIGKILL)
    output, _ = process.communicate()  # (ends)
    newest = checkpoints(run)[-1]
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in output and newest_whole(run) == newest
    main([*small, "--out", str(run), "--resume", "--save-every", "1"])
    close_to(run, whole_run)
