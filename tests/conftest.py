"""What the tests share: the built-in world, loaded once."""
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched: a test that tries should fail at once
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
from transformers import logging  # noqa: E402

from data import Processor, Record, load_records  # noqa: E402
from rollout import load_policy  # noqa: E402

logging.set_verbosity_error()
TOY = ROOT / "assets" / "toy"


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
