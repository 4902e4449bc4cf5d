"""RECIPES.md: every diff applies to the code as it is, is as short as promised, and its command runs; the first run,
which needs a GPU, is made of commands that there are."""
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

import curriculum
import data
import eval as evaluation
import train
from data import load_records, open_image, save_records

FILES = ("data.py", "rewards.py", "rollout.py", "eval.py", "curriculum.py", "train.py")
TEXT = (ROOT / "RECIPES.md").read_text()
RECIPES = re.findall(r"^## ([^\n]*)\n(?:(?!^## ).)*?```diff\n(.*?)```\n\n    (.*?)\n", TEXT, re.M | re.S)
# A box is read, is compared, and its gold is refused; a text is split into sentences: no ten lines hold that.
LINES = {"A new answer type": 20, "A reward that reads the text": 12}


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


BOXES = {  # an answer to [10, 20, 110, 220]: is it right?
    "[10, 20, 110, 220]": 1, "[10.0,20.0,110.0,220.0]": 1, "[10, 20, 110, 120]": 1, "[10, 20, 110, 119]": 0,
    "[10, 20, 210, 220]": 1, "[60, 20, 160, 220]": 0, "[0, 0, 300, 300]": 0, "[300, 300, 400, 400]": 0,
    "[110, 220, 10, 20]": 0, "[10, 20, 110]": 0, "[10, 20, 110, 220] or [0, 0, 9, 9]": 0, "10": 0}


def boxes(folder: Path) -> None:
    """A problem for each of BOXES and one whose gold is no box; without an answer type it is a list, as ever."""
    rows = [{"id": str(i), "question": "Where?", "answer": "[10, 20, 110, 220]", "answer_type": "box"}
            for i in range(len(BOXES))]
    rows += [{"id": "bad", "question": "Where?", "answer": "[110, 20, 10, 220]", "answer_type": "box"},
             {"id": "list", "question": "Where?", "answer": [10, 20, 110, 220]}]
    answers = [{"id": str(i), "response": f"<answer>{answer}</answer>"} for i, answer in enumerate(BOXES)]
    answers.append({"id": "list", "response": "<answer>[10, 20, 110, 219]</answer>"})
    for name, lines in (("boxes", rows), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


REPEATED = """import torch, rewards
texts = ["It is 3. It is  3. IT IS 3! So\\nSo", "It is 3. So 3.5", ""]
record = __import__("data").Record("r", "?", "3")
group = [rewards.score(text, record, "observe") for text in texts]
print([r.repeated for r in group], rewards.group_rewards([group], torch.tensor([[9, 9, 9]])).total.tolist())
"""  # (of a text without tags nothing else pays: an answer and then more is none)


CAPTIONED = """from rewards import format_reward
print(*(format_reward(text, "caption") for text in (
    "<caption>a</caption> <answer>3</answer>", "<answer>3</answer>", "<caption>a</CAPTION> <answer>3</answer>")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, diff, command", RECIPES, ids=[name.split(":")[0] for name, _, _ in RECIPES])
def test_recipe(name, diff, command, tmp_path):
    """A recipe that no longer applies, or whose change does nothing, would be found by a reader first."""
    changed = [line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("---", "+++")]
    assert len(changed) <= LINES.get(name.split(":")[0], 10)
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "assets").symlink_to(TOY.parent)
    patch(diff, tmp_path)
    chartqa(tmp_path)
    boxes(tmp_path)
    ladder = {r.id: r for r in load_records(str(TOY / "ladder")) if r.stage == 0}
    save_records(str(tmp_path / "small.parquet"), list(ladder.values())[:32])
    run = [sys.executable, *shlex.split(command)[1:]]
    run += ["--out", "run", "--data", "small.parquet"] if "train.py" in command else []
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if name.startswith("A new source"):
        assert json.loads((tmp_path / "raw/chartqa.report.json").read_text())["kept"] == 3
        return
    if name.startswith("A new answer type"):
        [answers] = (tmp_path / "boxes").glob("responses*.jsonl")
        judged = {line["id"]: line["accuracy"] for line in map(json.loads, answers.read_text().splitlines())}
        assert judged == {str(i): right for i, right in enumerate(BOXES.values())} | {"list": 0}
        assert "is no box [left, top, right, bottom]" in done.stdout + done.stderr
        return
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in (tmp_path / "run/responses.jsonl").read_text().splitlines()]
    shown = [line for line in lines if (line["step"], line["id"]) == (1, lines[0]["id"])]
    if name.startswith("A new prompt style"):
        told = subprocess.run([sys.executable, "-c", CAPTIONED], cwd=tmp_path, capture_output=True, text=True)
        assert told.stdout == "1.0 0.0 0.0\n", told.stderr
        assert json.loads((tmp_path / "run/settings.json").read_text())["prompt"] == "caption"
    elif name.startswith("A new reward"):
        assert any(r["reward"] > r["accuracy"] + .5 * r["format"] + r["bonus"] + 1e-6 for r in shown)
    elif name.startswith("A reward that reads"):
        told = subprocess.run([sys.executable, "-c", REPEATED], cwd=tmp_path, capture_output=True, text=True)
        repeated, total = json.loads(f"[{told.stdout.replace('] [', '], [')}]")
        assert repeated == pytest.approx([.6, 0, 0]) and total == [pytest.approx([-.3, 0, 0])], told.stderr
        for r in lines:
            parts = [" ".join(part.split()).lower() for part in re.split(r"[.!?\n]+", r["response"]) if part.strip()]
            lost = .5 * (1 - len(set(parts)) / len(parts))
            assert r["reward"] == pytest.approx(r["accuracy"] + .5 * r["format"] + r["bonus"] - lost)
    elif name.startswith("A new weight"):
        d = sum(r["accuracy"] for r in shown) / len(shown)
        assert len(shown) == 8 and shown[0]["weight"] == pytest.approx(2 * 1.8 * (d * (1 - d)) ** .5)
    else:
        complexity = [ladder[line["id"]].complexity for line in lines]
        assert len(steps) == 2 and len(lines) == 4 * 8 and complexity == sorted(complexity)


def test_all_recipes_are_found():
    assert len(RECIPES) == TEXT.count("```diff") == 7


FIRST_RUN = TEXT.partition("\n## Geometry3K")[2].replace("\\\n", "")
COMMANDS = [shlex.split(line) for line in re.findall(r"^    (.*)", FIRST_RUN, re.M)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[-6:]))
def test_the_first_run_is_made_of_commands(command, monkeypatch):
    """No GPU runs them here: an option that is renamed would be found by whoever rents one."""
    [at] = [i for i, word in enumerate(command) if word.endswith(".py")]
    program, options = command[at], command[at + 1:]
    assert command[:at] in (["python"], ["torchrun"], ["torchrun", "--nproc-per-node", "8"])
    monkeypatch.setattr("sys.argv", [program, *options])
    if program == "train.py":
        assert train.parse_config(options).preset == "3b"
    elif program == "curriculum.py":
        assert curriculum.parse_args().model == "Qwen/Qwen2.5-VL-3B-Instruct"
    elif program == "eval.py":
        specs, prompts, kinds = evaluation.check_args(evaluation.parse_args())
        known = {*data.BENCHMARKS, "raw/geo3k-test.parquet"}
        assert {spec.partition("=")[0] for spec in specs} <= known and (prompts, kinds) == (["observe"], ["given"])
    else:
        read = []
        monkeypatch.setattr(data, "read_any", lambda *given: read.append(given) or [])
        monkeypatch.setattr(data, "save_usable", lambda made, out, held, **about: {"out": out})
        data.main()
        assert [path.partition("@")[0] for path, _ in read] == ["hiyouga/geometry3k"]


def test_the_first_run_is_one_run():
    """What a command reads, one before it has written; a ladder is measured as it is trained on."""
    written = set()
    for command in COMMANDS:
        given = dict(zip(command, command[1:]))
        for option in ("--data", "--test", "--benchmark"):
            for path in given.get(option, "").split(","):
                assert path in written or not path.startswith(("raw/", "ladder", "out/")), path
        if "train.py" in command and given["--data"].startswith("ladder"):
            measured = next(other for other in COMMANDS[:COMMANDS.index(command)][::-1] if "curriculum.py" in other)
            built = dict(zip(measured, measured[1:]))
            assert (built["--max-tokens"], built["--max-pixels"]) == (
                given["--max-response-tokens"], given["--max-pixels"])
        written.add(given.get("--out"))
    assert len(COMMANDS) == 10 and sum("train.py" in command for command in COMMANDS) == 3


@pytest.mark.slow
def test_the_first_run_from_end_to_end(tmp_path, monkeypatch, test_set):
    """The very commands, on the built-in model and its problems in the columns of Geometry3K."""
    features = Features({"images": Sequence(Image()), "problem": Value("string"), "answer": Value("string")})
    (tmp_path / "hub").mkdir()
    for split, records in (("train", test_set[:60]), ("validation", test_set[60:68]), ("test", test_set[68:76])):
        rows = [{"images": [open_image(record.images[0], "")], "problem": f"<image>{record.question}",
                 "answer": record.golds[0]} for record in records]
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"hub/{split}-00000-of-00001.parquet")
    small = {"--max-tokens": "60", "--max-response-tokens": "60", "--max-prompt-tokens": "256", "--preset": "toy",
             "--max-pixels": "50176", "--benchmark": "raw/geo3k-test.parquet", "--nproc-per-node": "1"}
    programs = {"data.py": data.main, "curriculum.py": curriculum.main, "eval.py": evaluation.main}
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        program = next(word for word in command if word.endswith(".py"))
        words = [small.get(option, word) for option, word in zip(["", *command], command)]
        words = [word.replace("hiyouga/geometry3k", "hub").replace("Qwen/Qwen2.5-VL-3B-Instruct", str(TOY / "model"))
                 for word in words[words.index(program) + 1:]]
        words = [str(trained(word)) if word.endswith("/CHECKPOINT") else word for word in words]
        if program == "curriculum.py" and Path("ladder-geo3k").exists():
            shutil.rmtree("ladder-geo3k")  # (that of one GPU, with other limits)
        if program == "train.py":
            train.main([*words, "--model", str(TOY / "model"), "--prompts-per-rollout", "16", "--updates-per-rollout",
                        "2", "--eval-samples", "1", "--max-steps", "1"])
            continue
        monkeypatch.setattr("sys.argv", [program, *words])
        sys.argv += ["--size", "24"] if program == "curriculum.py" else []
        programs[program]()
    for run in ("geo3k", "geo3k-random"):
        [step] = [line for line in map(json.loads, Path(f"out/{run}/metrics.jsonl").open()) if "reward" in line]
        assert step["signal"] > 0 and step["grad_norm"] > 0
    [scores] = [json.loads(path.read_text()) for path in Path("out/eval").glob("geo3k-checkpoint*/scores.json")]
    assert [(s["benchmark"], s["problems"]) for s in scores["scores"]] == [("geo3k-test", 8)]


def trained(path: str) -> Path:
    """out/RUN/CHECKPOINT -> the folder that the run's best.json names, or its only one."""
    run = Path(path).parent
    best = run / "best.json"
    return run / json.loads(best.read_text())["checkpoint"] if best.exists() else max(run.glob("checkpoint-0*"))
