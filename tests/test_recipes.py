"""RECIPES.md: every diff applies to the code as it is, is as short as promised, and its command runs."""
from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TOY
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Pillow

from data import load_records, save_records

pytestmark = pytest.mark.slow
FILES = ("data.py", "rewards.py", "rollout.py", "eval.py", "curriculum.py", "train.py")
RECIPES = re.findall(r"^## (.*?)\n.*?```diff\n(.*?)```\n\n    (.*?)\n", (ROOT / "RECIPES.md").read_text(), re.M | re.S)


def patch(text: str, folder: Path) -> None:
    """Apply a diff whose hunks are found by their text (git's own numbers would be stale at every commit)."""
    file = None
    for part in re.split(r"^(?=@@|--- )", text, flags=re.M):
        if part.startswith("--- "):
            file = folder / re.search(r"^\+\+\+ b/(.*)$", part, re.M)[1]
        elif part.strip():
            lines = part.splitlines()[1:]
            old, new = ("\n".join(line[1:] for line in lines if line[:1] in (" ", sign)) for sign in "-+")
            source = file.read_text()
            assert source.count(old) == 1, f"{file.name} has no such lines, or several:\n{old}"
            file.write_text(source.replace(old, new))


def chartqa(folder: Path) -> None:
    picture = io.BytesIO()
    Pillow.new("RGB", (56, 56), "white").save(picture, "PNG")
    rows = [{"image": {"bytes": picture.getvalue(), "path": None}, "query": f"What is bar {i}?", "label": [str(i)]}
            for i in range(3)]
    features = Features({"image": Image(), "query": Value("string"), "label": Sequence(Value("string"))})
    Dataset.from_list(rows, features=features).to_parquet(folder / "chartqa.parquet")


@pytest.mark.parametrize("name, diff, command", RECIPES, ids=[name.split(":")[0] for name, _, _ in RECIPES])
def test_recipe(name, diff, command, tmp_path):
    """A recipe that no longer applies, or whose change does nothing, would be found by a reader first."""
    changed = [line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("---", "+++")]
    assert len(changed) <= 10
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "assets").symlink_to(TOY.parent)
    patch(diff, tmp_path)
    chartqa(tmp_path)
    ladder = {r.id: r for r in load_records(str(TOY / "ladder")) if r.stage == 0}
    save_records(str(tmp_path / "small.parquet"), list(ladder.values())[:32])
    run = [sys.executable, *shlex.split(command)[1:]]
    run += ["--out", "run", "--data", "small.parquet"] if "train.py" in command else []
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "train.py" not in command:
        assert json.loads((tmp_path / "raw/chartqa.report.json").read_text())["kept"] == 3
        return
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (tmp_path / "run/responses.jsonl").read_text().splitlines()]
    shown = [line for line in lines if (line["step"], line["id"]) == (1, lines[0]["id"])]
    if name.startswith("A new reward"):
        assert any(r["reward"] > r["accuracy"] + .5 * r["format"] + r["bonus"] + 1e-6 for r in shown)
    elif name.startswith("A new weight"):
        d = sum(r["accuracy"] for r in shown) / len(shown)
        assert len(shown) == 8 and shown[0]["weight"] == pytest.approx(2 * 1.8 * (d * (1 - d)) ** .5)
    else:
        complexity = [ladder[line["id"]].complexity for line in lines]
        assert len(steps) == 2 and len(lines) == 4 * 8 and complexity == sorted(complexity)


def test_all_recipes_are_found():
    assert len(RECIPES) == (ROOT / "RECIPES.md").read_text().count("```diff") == 4
