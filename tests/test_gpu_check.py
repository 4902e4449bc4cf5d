"""The checks that need a GPU, tried on a CPU at a tiny size: a slip in them would cost the half hour of a GPU."""
from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from conftest import ROOT

NAMES = ["environment", "kernels", "cudnn_nan", "new_lengths", "attention_of_a_row", "attention_of_a_step", "capture",
         "vision_tower", "gap", "memory_of_sampling", "decode_share", "memory_of_an_update"]


def lines_of(tmp_path, *options: str, status: int = 0) -> dict[str, dict]:
    out = tmp_path / "gpu.jsonl"
    done = subprocess.run([sys.executable, str(ROOT / "tests/gpu_check.py"), "--out", str(out), *options],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert done.stdout == out.read_text(), "what is printed is what is kept"
    return {line["check"]: line for line in map(json.loads, out.read_text().splitlines())}


def numbers(found) -> list[float]:
    if isinstance(found, dict):
        return [n for value in found.values() for n in numbers(value)]
    if isinstance(found, list):
        return [n for value in found for n in numbers(value)]
    return [found] if isinstance(found, (int, float)) else []


@pytest.mark.run
def test_every_check_runs_from_any_folder(tmp_path):
    lines = lines_of(tmp_path)
    assert list(lines) == NAMES
    for name, line in lines.items():
        assert "failed" not in line, line
        assert numbers(line["found"]) and all(map(math.isfinite, numbers(line["found"]))), name
    assert max(numbers(lines["kernels"]["found"])) < 1e-5 and lines["gap"]["found"]["toy"]["largest"] < 1e-4
    for line in lines["capture"]["found"].values():
        assert line["the same"] == line["of"] == 64 and line["log-probs differ by"] < 1e-5
    assert lines["vision_tower"]["found"]["differ by"] < 1e-5
    assert set(lines["cudnn_nan"]["found"].values()) == {0}


@pytest.mark.run
def test_a_budget_and_a_choice_are_kept_to(tmp_path):
    lines = lines_of(tmp_path, "--budget", "-1", "--only", "kernels,gap")
    assert {name: line["left out"] for name, line in lines.items()} == {"kernels": "no time", "gap": "no time"}


@pytest.mark.run
def test_a_check_that_fails_is_told_and_the_next_begins(tmp_path):
    """A lease of a GPU once would have ended with the first that fails."""
    program = (f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(ROOT)!r}]\n"
               "import gpu_check, rollout\n"
               "rollout.varlen = lambda q, *_: q * 1.5\n"
               f"sys.argv = ['x', '--only', 'kernels,environment,cudnn_nan', '--out', {str(tmp_path / 'x.jsonl')!r}]\n"
               "gpu_check.main()")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    lines = list(map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines()))
    assert done.returncode == 1 and [line["check"] for line in lines] == NAMES[:3]
    assert "RuntimeError" in lines[1]["failed"] and "found" in lines[2]
