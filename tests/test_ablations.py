"""The evidence in assets/ablations and in the README is what the commands make of the runs."""
import re
import sys
from functools import partial

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "assets"))

import ablations  # noqa: E402

import eval  # noqa: E402
from train import parse_config  # noqa: E402


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_rows_differ_in_what_they_say():
    """A switch misspelt, or two rows of one setting, would show after hours; a row must change one thing only."""
    settings = {row: vars(parse_config(["--out", "x", *switches.split()])) for row, switches in ablations.ROWS.items()}

    def changed(one: str, other: str) -> list[str]:
        return [key for key in settings[one] if settings[one][key] != settings[other][key]]

    assert len({str(sorted(now.items())) for now in settings.values()}) == len(settings)
    for name in ("build-up", "take-away", "order", "constant-lr"):
        against, rows = ablations.TABLES[name]
        for one, other in zip(rows, rows[1:]):
            base = one if against == "previous" else rows[0]
            assert len(changed(base, other)) == 1, f"{name}: {base} -> {other}"


def test_a_stopped_run_is_not_kept(tmp_path, monkeypatch):
    """train.py ends well when it is stopped; half a run would stand in the tables as a whole one."""
    monkeypatch.setattr(ablations, "OUT", tmp_path / "out")
    monkeypatch.setattr(ablations, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(ablations, "run", lambda *command, **options: 0)
    with pytest.raises(SystemExit, match="Observe-R1, seed 0, was stopped"):
        ablations.train("Observe-R1", 0, 1)
    assert not (tmp_path / "kept").exists()


def test_weight_and_bonus_act_where_the_method_says():
    """On groups that the runs sampled: (d (1 - d))^0.5 and ^1.5; weighted, no bonus where all or none are right."""
    text = ablations.mechanisms()
    assert text == (ablations.KEPT / "mechanisms.md").read_text()
    powers = [float(x) for x in re.findall(r"power ([\d.]+), with the weight ([\d.]+)\.", text)[0]]
    assert powers == pytest.approx([.5, 1.5], abs=.1)
    acts = [float(row[-1]) for row in cells(text) if row[0].endswith(" of 8")]
    assert acts[0] == acts[8] == 0 < acts[1] < min(acts[2:8])


def test_tables_follow_from_the_kept_runs(tmp_path, monkeypatch):
    """A table is not to outlive the runs that it was made of (intervals are drawn, which numpy may do otherwise)."""
    monkeypatch.setattr(eval, "difference", partial(eval.difference, draws=2))
    for name, (against, rows) in ablations.TABLES.items():
        folders = [str(run) for row in rows for run in ablations.kept(row)]
        eval.compare([*folders, "--out", str(tmp_path / name), "--against", against])
        now, kept = (re.sub(r" \[.*?\]|-{3,}| {2,}", "", (folder / name / "compare.md").read_text())
                     for folder in (tmp_path, ablations.KEPT))
        assert now == kept, name
    assert ablations.by_difficulty() == (ablations.KEPT / "levels.md").read_text().strip()
    for row in ablations.STAGES:
        assert ablations.by_stage(row) in (ablations.KEPT / "stages.md").read_text()


def test_the_readme_shows_what_the_runs_came_to():
    """Numbers in a README outlive the runs that they came from: each row must be that of the table from compare."""
    readme = cells((ROOT / "README.md").read_text())
    for name in ("build-up", "take-away"):
        against, rows = ablations.TABLES[name]
        made = cells((ablations.KEPT / name / "compare.md").read_text())
        second = next(i for i, line in enumerate(made) if i and line[0] == "setting")
        first, then = made[0], made[second]
        score = {kind: next(i for i, title in enumerate(first) if title.endswith(f", {kind}, %"))
                 for kind in ("T=1", "greedy")}
        change = {kind: first.index(f"against the {against}", at) for kind, at in score.items()}
        places = [score["T=1"], change["T=1"], score["greedy"], change["greedy"]]
        more = [then.index(title) for title in ("observation, T=1, %", "tokens, T=1", "groups with signal, %",
                                             "minutes")]
        for row in rows:
            folder = ablations.name_of(row, 0).removesuffix("-seed0")
            one, two = (next(line for line in part if line[0] == folder) for part in (made[:second], made[second:]))
            wanted = ["" if cell == "-" else cell for cell in [*(one[i] for i in places), *(two[i] for i in more)]]
            assert wanted in [line[2:] for line in readme if line[0] == row], f"{name}: {row}: {wanted}"
