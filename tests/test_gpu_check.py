"""The checks that need a GPU, tried on a CPU at a tiny size: a slip in them would cost the half hour of a GPU."""
from __future__ import annotations

import json
import math
import subprocess
import sys

import gpu_check
import pytest
import torch
from conftest import ROOT

NAMES = ["environment", "kernels", "cudnn_nan", "new_lengths", "attention_of_a_row", "attention_of_a_step", "capture",
         "vision_tower", "gap", "memory_of_sampling", "decode_share", "memory_of_an_update"]


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    """Give the lines of the checks with these options, run in this process -> by name; and the exit status."""
    def run(*options: str) -> tuple[dict[str, dict], int]:
        out = tmp_path / "gpu.jsonl"
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(out), *options])
        with pytest.raises(SystemExit) as end:
            gpu_check.main()
        assert capsys.readouterr().out == out.read_text(), "what is printed is what is kept"
        return {line["check"]: line for line in map(json.loads, out.read_text().splitlines())}, int(end.value.code)

    return run


def numbers(found) -> list[float]:
    if isinstance(found, dict):
        return [n for value in found.values() for n in numbers(value)]
    if isinstance(found, list):
        return [n for value in found for n in numbers(value)]
    return [found] if isinstance(found, (int, float)) else []


@pytest.mark.run
def test_every_check_runs_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "tests/gpu_check.py")], capture_output=True, text=True,
                          cwd=tmp_path)
    lines = {line["check"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0 and list(lines) == NAMES
    for name, line in lines.items():
        assert numbers(line["found"]) and all(map(math.isfinite, numbers(line["found"]))), name
    found = {name: line["found"] for name, line in lines.items()}
    assert max(numbers(found["kernels"])) < 1e-5 and found["gap"]["toy"]["largest"] < 1e-4
    for line in found["capture"].values():
        assert line["the same"] == line["of"] == 64 and line["log-probs differ by"] < 1e-5
    assert found["vision_tower"]["differ by"] < 1e-5 and set(found["cudnn_nan"].values()) == {0}


def test_a_budget_and_a_choice_are_kept_to(checked):
    lines, status = checked("--budget", "-1", "--only", "kernels,gap")
    assert {name: line["left out"] for name, line in lines.items()} == {"kernels": "no time", "gap": "no time"}
    assert status == 0


def test_a_check_that_fails_is_told_and_the_next_begins(checked, monkeypatch):
    """A wrong kernel is a check that failed; and what is lent for half an hour does not end with it."""
    real = gpu_check.rollout.varlen
    monkeypatch.setattr(gpu_check.rollout, "varlen",
                        lambda q, *rest: real(q, *rest) * (1 if q.dtype == torch.float64 else 1.1))
    lines, status = checked("--only", "kernels,cudnn_nan")
    assert status == 1 and "not the attention that it should be" in lines["kernels"]["failed"]
    assert "test_gpu_check" not in lines["kernels"]["where"] and "found" in lines["cudnn_nan"]
