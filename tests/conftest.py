"""What the tests share: the built-in world, loaded once."""
import json
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched: a test that tries should fail at once
# The tests compare to the bit, in fp32, and start two processes: on the CPU, also where there is a GPU, of which the
# programs that they start see nothing either. What only a GPU can show, tests/gpu_check.py shows.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# OpenMP's threads spin while they wait: beside another busy process two of them took 10 times as long, one no longer.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# `datasets` keeps a copy of every file it reads; that of a test is not to be there in the next run, nor at home.
CACHE = tempfile.TemporaryDirectory(prefix="observe-r1-tests-", ignore_cleanup_errors=True)
os.environ.setdefault("HF_DATASETS_CACHE", CACHE.name)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import logging as hf_logging  # noqa: E402

import train  # noqa: E402
from data import Processor, Record, load_records, save_records  # noqa: E402
from rollout import load_policy  # noqa: E402

hf_logging.set_verbosity_error()
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel("WARNING")  # (4 lines for each weight that is saved)
TOY = ROOT / "assets" / "toy"


def pytest_report_header() -> str:
    return "on the CPU, also where there is a GPU: for that, python tests/gpu_check.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks: `run` for what needs a run or a program of its own, `fast` for the rest; see pyproject.toml."""
    for item in items:
        if {"small", "torchrun", "two", "started"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("run")
        if not {"run", "slow"} & {mark.name for mark in item.iter_markers()}:
            item.add_marker("fast")


@pytest.fixture(scope="session")
def processor() -> Processor:
    return Processor(str(TOY / "model"))


@pytest.fixture(scope="session")
def shipped():
    """The shipped model, not to be changed; `model` gives a copy that may be."""
    return load_policy(str(TOY / "model")).eval()


@pytest.fixture
def model(shipped):
    import copy

    return copy.deepcopy(shipped)


@pytest.fixture(scope="session")
def test_set() -> list[Record]:
    return load_records(str(TOY / "test.parquet"))


@pytest.fixture(scope="session")
def small(tmp_path_factory, test_set) -> list[str]:
    """Options of a run of six rollouts on three stages of a small ladder."""
    folder = tmp_path_factory.mktemp("small")
    ladder = load_records(str(TOY / "ladder"))
    records = [r for stage in (0, 1, 2) for r in [x for x in ladder if x.stage == stage][:8]]
    save_records(str(folder / "ladder.parquet"), records)
    save_records(str(folder / "test.parquet"), test_set[:6])
    return ["--data", str(folder), "--test", str(folder / "test.parquet"), "--prompts-per-rollout", "4", "--group-size",
            "4", "--updates-per-rollout", "2", "--max-response-tokens", "60", "--eval-samples", "2", "--lr", "1e-4"]


def lines(run: Path) -> list[dict]:
    """metrics.jsonl without the clock."""
    clock = ("seconds", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(clock)}
            for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def whole_run(small, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    train.main([*small, "--out", str(run)])
    return run


@pytest.fixture
def stopped_run(small, tmp_path, monkeypatch):
    """Gives a run that was sent SIGTERM in the middle of the given step."""
    def start(step: int) -> Path:
        real, calls = train.update, []

        def stop_there(*args):
            calls.append(1)
            if len(calls) == step:
                signal.raise_signal(signal.SIGTERM)
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(train, "update", stop_there)
            train.main([*small, "--out", str(tmp_path / "run")])
        (tmp_path / "run/lock").open().close()  # lets go of the lock, as the end of a process does
        return tmp_path / "run"

    return start


def weights(run: Path) -> dict:
    """Weights and moments of the newest checkpoint: "exp_avg NAME", "exp_avg_sq NAME" are those of the weight NAME."""
    newest = max(run.glob("checkpoint-0*"))
    return {name: value for file in newest.rglob("*.safetensors") for name, value in load_file(file).items()}
