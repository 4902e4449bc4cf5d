"""The benchmark itself, at a tiny size: every way runs, at the lengths that it was told, and is written as it comes."""
from __future__ import annotations

import json
import logging
import sys

import bench
import pytest
import torch


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """Give the lines of a benchmark with these options, run in this process."""
    def run(*options: str) -> list[dict]:
        out = tmp_path / "bench.jsonl"
        monkeypatch.setattr(sys, "argv", ["bench.py", "--size", "tiny", "--repeats", "1", "--out", str(out), *options])
        bench.main()
        return list(map(json.loads, out.read_text().splitlines()))

    yield run
    logging.disable(logging.NOTSET)


def test_the_benchmark_runs(figures, capsys):
    """The one command for a GPU must not be broken when a GPU is at hand. (The ways themselves assert the lengths.)"""
    lines = figures("--no-trl")
    conclusions = lines[-1]["conclusions"]
    assert {"rollout, plain / ours", "score + backward, plain / ours"} <= conclusions.keys()
    assert all(value > 0 for value in conclusions.values()) and conclusions["decode, share of its floor"] < 1
    assert sum("seconds" in line for line in lines) == sum("gib" in line for line in lines) == 6
    assert {"size", "device", "torch", "transformers"} <= lines[0].keys()
    assert not [line for line in lines if "left_out" in line]
    written = capsys.readouterr()
    assert "| step, ours | " in written.out and len(written.err.splitlines()) >= len(lines)


def test_a_budget_that_is_spent_ends_it(figures):
    """A GPU is lent for ten minutes: what was measured by then is on disk, and nothing begins after."""
    assert [line["left_out"] for line in figures("--budget", "0") if "way" in line] == ["no time"]
    rows = figures("--growth", "--budget", "0")[3:]
    assert len(rows) == 13 and all(line["left_out"] == "no time" and line["part"].startswith("tiny, ") for line in rows)


def test_a_budget_that_runs_out_in_the_middle(tmp_path, monkeypatch):
    found = bench.Figures(tmp_path / "x.jsonl", 600)
    monkeypatch.setattr(bench, "decode_bounds", lambda *_: setattr(found, "end", 0) or (1.0, 1.0))
    bench.compare("tiny", 1, found, with_trl=True)
    assert [line["left_out"] for line in found.lines if "way" in line] == ["no time"] * 12
    assert "conclusions" in found.lines[-1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=repr)
def test_a_way_that_runs_out_of_memory_is_said_so_and_leaves(tmp_path, error):
    """It once was a KeyError where that way was ours, and a loop without an end where all were."""
    def too_much() -> None:
        raise error

    found = bench.Figures(tmp_path / "x.jsonl", 600)
    ways = {"ours": too_much, "plain": lambda: None}
    for _ in range(3):
        found.once(ways, "update")
    assert list(ways) == ["plain"] and list(found.times("update")) == ["plain"]
    bench.conclude({}, 1.0, 1.0, 1.0, 1.0, found)
    lines = list(map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines()))
    assert lines[0] == {"part": "update", "way": "ours", "left_out": "out of memory"} and len(lines) == 5


def test_what_ran_out_of_memory_leaves_no_gradients(monkeypatch):
    """12 GB of 3B's: the figures after them were of less memory than the machine has."""
    world = bench.Bench("tiny")
    real, calls = torch.Tensor.backward, []

    def backward(*args) -> None:
        real(*args)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    for score in (world.ours_score, world.plain_score):
        with pytest.raises(torch.OutOfMemoryError):
            score(world.given_groups())
        calls.append(score)
        assert all(p.grad is None for p in world.model.parameters())
    assert len(calls) == 2


def test_the_bounds_by_hand():
    """Of one prompt and two responses: layers' weights once a token, the merger's once for four patches, the head on
    the responses alone, half a square of pairs; three times, for the backward pass is two forward ones. Decode reads
    weights and cache once for each token but the first, which the prefill gives."""
    world = bench.Bench("small", group=2, prompts=1, visual=64, mean=4)
    world.lengths = [[3, 1]]
    p, text = len(world.prompts[0].ids), world.model.config.text_config
    layers = sum(w.numel() for n, w in world.model.named_parameters() if "language_model.layers" in n)
    weights = world.model.named_parameters()
    vision = sum(w.numel() * (0.25 if "merger" in n else 1) for n, w in weights if "visual" in n)
    for ours, times in ((True, 1), (False, 2)):
        pairs = times * p * p / 2 + (3 * p + 4.5) + (p + 0.5)
        forward = 2 * layers * (times * p + 4) + 2 * 256 * vision * times + 2 * 512 * 8192 * 4 + pairs * 4 * 8 * 64 * 8
        assert bench.update_flops(world, ours) == pytest.approx(3 * forward)
    read = sum(w.numel() for w in world.model.model.language_model.parameters())
    slot = 2 * text.num_hidden_layers * text.num_key_value_heads * 64 * 4
    rows = (1, 1)
    cache = slot * (p * sum(rows) + 1 + 2)
    memory, both = bench.decode_bounds(world, 1e9, 1e9)
    assert memory == pytest.approx((4 * read * len(rows) + cache) / 1e9)
    assert both == pytest.approx((4 * read * len(rows) + cache) / 1e9), "two operations a weight, and four bytes"
    assert bench.decode_bounds(world, 1e9, 1e8)[1] == pytest.approx(2 * read * sum(rows) / 1e8 + cache / 1e9)
