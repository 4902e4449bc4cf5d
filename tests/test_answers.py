"""Answers as people and models write them, right ones and wrong ones, by kind of fault: tests/answers.jsonl.

They were written by someone who had not seen rewards.py, and by two who were to break it. Kinds that begin with 1 are
whole responses, the others what stands in <answer>.
"""
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import rewards
from data import Record
from rewards import accuracy_reward, gold_fault

ROWS = [json.loads(line) for line in (Path(__file__).parent / "answers.jsonl").read_text().splitlines()]


def misjudged(row: dict) -> list[str]:
    """What is judged otherwise than by a person; a gold that is refused as well."""
    gold, choices, decimals = row["gold"], tuple(row.get("choices", ())), row.get("precision")
    record = Record("r1", "What is it?", tuple(gold) if isinstance(gold, list) else gold, choices=choices,
                    precision=decimals)
    if fault := gold_fault(record):
        return [fault]
    faults = []
    for verdict in ("right", "wrong"):
        for text in row.get(verdict, ()):
            response = text if row["kind"].startswith("1") else f"<think>so</think><answer>{text}</answer>"
            if accuracy_reward(response, record) != (verdict == "right"):
                faults.append(f"gold {gold!r} {choices or ''}: {text!r} is {verdict}")
    return faults


@pytest.mark.parametrize("kind", sorted({row["kind"] for row in ROWS}))
def test_answers_are_judged_as_a_person_does(kind):
    with ThreadPoolExecutor(rewards.VERIFIER.workers) as pool:
        found = pool.map(misjudged, [row for row in ROWS if row["kind"] == kind])
        faults = [fault for row in found for fault in row]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("precision", [-1, -3, 16])
def test_decimals_that_make_any_number_right_are_refused(precision):
    with pytest.raises(ValueError, match=f"record r1: its precision is {precision}"):
        Record("r1", "What is it?", "12", precision=precision)


def test_a_list_of_numbers_is_one_answer():
    """VLM-R1's boxes: 74 alone was right, and the box wrong."""
    record = Record("r1", "Where is it?", [74.0, 302.0, 181.0, 500.0])
    assert record.answer_type == "list"
    assert accuracy_reward("<answer>[74, 302, 181, 500]</answer>", record) == 1
    for wrong in ("74", "[74, 302, 181]", "[74, 302, 500, 181]", "[74, 302, 181, 501]"):
        assert accuracy_reward(f"<answer>{wrong}</answer>", record) == 0
