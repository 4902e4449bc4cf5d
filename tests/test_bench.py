"""The benchmark itself, at a tiny size: every way runs, and gives the lengths that it was told."""
from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.run
def test_the_benchmark_runs(tmp_path):
    """The one command for a GPU must not be broken when a GPU is at hand. (compare() asserts the lengths.)"""
    out = tmp_path / "bench.json"
    command = [sys.executable, str(ROOT / "tests/bench.py"), "--size", "tiny", "--repeats", "1", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert all(seconds > 0 for seconds in found["seconds"].values()) and 0 < found["decode_floor_share"] < 1
    assert {"rollout, plain / ours", "score + backward, plain / ours"} <= {k for k, v in found["ratios"].items() if v}
