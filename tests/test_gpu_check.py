"""The checks for a GPU, on the CPU at tiny sizes: what is broken here would be found in the half hour of a GPU."""
from __future__ import annotations

import json
import subprocess
import sys

import gpu_check
import pytest
from conftest import ROOT

NAMES = [check.__name__ for check in gpu_check.CHECKS]


def numbers(found) -> list:
    if isinstance(found, (dict, list)):
        return [n for part in (found.values() if isinstance(found, dict) else found) for n in numbers(part)]
    return [found] if isinstance(found, (int, float)) and not isinstance(found, bool) else []


def lines_of(capsys, *args: str) -> tuple[int, list[dict]]:
    """Exit status and lines of a run in this process."""
    with pytest.raises(SystemExit) as end:
        gpu_check.main(list(args))
    return int(end.value.code), list(map(json.loads, capsys.readouterr().out.splitlines()))


@pytest.mark.run
def test_every_check_finds_numbers(tmp_path):
    """From any directory; what is printed is in the file too."""
    command = [sys.executable, str(ROOT / "tests/gpu_check.py"), "--out", str(tmp_path / "lines.jsonl")]
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert (tmp_path / "lines.jsonl").read_text() == printed
    lines = list(map(json.loads, printed.splitlines()))
    assert [line["check"] for line in lines] == NAMES
    assert "failed" not in printed.replace("graphs that failed", "") and all(numbers(line["found"]) for line in lines)
    found = {line["check"]: line["found"] for line in lines}
    assert max(numbers(found["kernels"])) < 1e-5, "fp32 here"
    assert all(case["same"] == 1 and not case["graphs that failed"] for case in found["capture"].values())
    apart = [case["most"] for name, case in found["gap"].items() if "gradients" not in name]
    assert len(apart) == 6 and max(apart) < 1e-3


def test_a_budget_that_is_spent_leaves_all_out(capsys, tmp_path):
    status, lines = lines_of(capsys, "--budget", "0", "--out", str(tmp_path / "lines.jsonl"))
    assert status == 0 and lines == [{"check": name, "left out": "no time"} for name in NAMES]
    assert len((tmp_path / "lines.jsonl").read_text().splitlines()) == len(NAMES)


def test_only_chooses(capsys):
    status, lines = lines_of(capsys, "--only", "new_shapes,kernels")
    assert status == 0 and [line["check"] for line in lines] == ["kernels", "new_shapes"], "in the order of cost"
    assert lines_of(capsys, "--only", "nothing")[0] == 2


def test_a_check_that_fails_says_so_and_the_next_begins(capsys, monkeypatch):
    """Beside what it had found. Where the device is lost with it, the rest runs in a process of its own."""
    def broken():
        yield "before", 1.23456
        raise gpu_check.torch.OutOfMemoryError("too much")

    def sound():
        yield "all", [1, 2]

    monkeypatch.setattr(gpu_check, "CHECKS", (broken, sound))
    status, lines = lines_of(capsys)
    assert status == 1 and [line["found"] for line in lines] == [{"before": 1.235}, {"all": [1, 2]}]
    assert lines[0]["failed"] == "OutOfMemoryError('too much')" and "broken" in lines[0]["where"]
    assert "failed" not in lines[1]

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class Replaced(SystemExit):
        pass

    def replace(program, command):
        raise Replaced(command)

    monkeypatch.setattr(gpu_check, "reset", lost)
    monkeypatch.setattr(gpu_check.os, "execv", replace)
    with pytest.raises(Replaced) as end:
        gpu_check.main(["--out", "/dev/null"])
    assert end.value.code[2:5] == ["--failed", "--only", "sound"] and end.value.code[-2:] == ["--out", "/dev/null"]
    assert lines_of(capsys, "--only", "sound", "--failed")[0] == 1
