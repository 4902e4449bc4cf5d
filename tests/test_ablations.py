"""The evidence in assets/ablations and in the README is what the commands make of the runs."""
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "assets"))

import ablations  # noqa: E402

from train import parse_config  # noqa: E402


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_rows_differ_in_what_they_say():
    """A switch misspelt, or two rows of one setting, would show after hours; a row must change one thing only."""
    settings = {row: vars(parse_config(["--out", "x", *switches.split()])) for row, switches in ablations.ROWS.items()}
    changed = {row: {key for key in now if now[key] != settings["Observe-R1"][key]} for row, now in settings.items()}
    assert len({str(sorted(now.items())) for now in settings.values()}) == len(settings)
    assert all(len(changed[row]) == 1 for row in ablations.TABLES["take-away"][1][1:])
    _, rows = ablations.TABLES["build-up"]
    for one, next_one in zip(rows, rows[1:]):
        assert len(changed[one] ^ changed[next_one]) == 1, f"{one} -> {next_one}"


def test_weight_and_bonus_act_where_the_method_says():
    """On groups that the runs sampled: (d (1 - d))^0.5 and ^1.5; weighted, no bonus where all or none are right."""
    text = ablations.mechanisms()
    powers = [float(x) for x in re.findall(r"power ([\d.]+), with the weight ([\d.]+)\.", text)[0]]
    assert powers == pytest.approx([.5, 1.5], abs=.1)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if " of 8 " in line]
    acts = [float(row[-1]) for row in rows]
    assert acts[0] == acts[8] == 0 < acts[1] < min(acts[2:8])


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_the_readme_shows_what_the_runs_came_to():
    """Numbers in a README outlive the runs that they came from: each must stand in a table that compare made."""
    readme = cells((ROOT / "README.md").read_text())
    tables = {name: cells((ROOT / "assets/ablations" / name / "compare.md").read_text()) for name in ablations.TABLES}
    for name in ("build-up", "take-away"):
        for row in ablations.TABLES[name][1]:
            shown = [line for line in readme if line[0] == row]
            assert shown, f"{row} of {name} is missing"
            folder = ablations.name_of(row, 0).removesuffix("-seed0")
            made = {cell for table in tables.values() for line in table if line[0] == folder for cell in line}
            for line in shown:
                assert set(line[2:]) - {""} <= made, f"{line} is not of {made}"
