"""The house stays readable: lines, tokens, the fold, complexity, the direction of imports, and what the README says."""
from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize

import pytest
from conftest import ROOT

# In the order of imports: each file takes from those before it only. Lines in all and above the fold, at most. (The
# plan of the house wants 620, 960, 640, 700, 600, 760 lines and 40,000 tokens. The caps are to go down; they went up
# four times: by 6% when the judge learned to read answers as people write them, tests/answers.jsonl, by 9% when
# data.py learned to read, or to refuse by name, what people bring, tests/test_loading.py, by 4% for what forks ask for:
# LoRA, refill, GSPO, the sentinel, tests/test_forks.py, and by 2% for three orders, a coin, and the question whether
# the picture is used. Above the fold they held, but in curriculum.py, for the orders.)
HOUSE = {"rewards": (1015, 280), "data": (1526, 350), "rollout": (844, 420), "eval": (1053, 280),
         "curriculum": (726, 320), "train": (1154, 380)}
LINES, ABOVE, TOKENS, README = 6318, 2000, 57_500, 16_400
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def lines_of(name: str) -> int:
    return len(source(name).splitlines())


def fold_of(name: str) -> int:
    """The line of the fold, of which there is one."""
    [line] = [n for n, text in enumerate(source(name).splitlines(), 1) if text.startswith("# === the fold")]
    return line


def tokens_of(name: str) -> int:
    """Python tokens without layout, comments and docstrings."""
    tree, text = ast.parse(source(name)), source(name)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = sum(ast.get_docstring(node) is not None for node in ast.walk(tree) if isinstance(node, kinds))
    return sum(t.type not in LAYOUT for t in tokenize.generate_tokens(io.StringIO(text).readline)) - docstrings


@pytest.mark.parametrize("name", HOUSE)
def test_a_file_can_be_read_in_one_sitting(name):
    """It once was 2,420 lines in all, and grew to 5,304, with the loop at line 1,008 of train.py."""
    lines, above = HOUSE[name]
    assert lines_of(name) <= lines
    assert fold_of(name) <= above


def test_all_six_together():
    """Fewer lines by denser lines is no gain: the tokens are the honest measure."""
    assert sum(map(lines_of, HOUSE)) <= LINES
    assert sum(map(fold_of, HOUSE)) <= ABOVE
    assert sum(map(tokens_of, HOUSE)) <= TOKENS


def test_no_other_file_at_the_top():
    assert {path.stem for path in ROOT.glob("*.py")} == set(HOUSE)


@pytest.mark.parametrize("name", HOUSE)
def test_imports_run_one_way(name):
    """data.py imported rewards.py, which imported data.py, which then had to import itself."""
    imported = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    order = list(HOUSE)
    assert imported & set(order) <= set(order[:order.index(name)])


def test_no_function_is_a_maze():
    """eval.compare once had a cyclomatic complexity of 54. update and main are the algorithm, and may have more."""
    branches = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.FunctionDef)  # McCabe's, as ruff counts them (C901)
    for name in HOUSE:
        for function in ast.walk(ast.parse(source(name))):
            if isinstance(function, ast.FunctionDef) and function.name not in ("update", "main"):
                ways = sum(isinstance(node, branches) for node in ast.walk(function))  # (itself, too)
                assert ways <= 15, f"{name}.{function.name} has a cyclomatic complexity of {ways}"


def test_the_concept_comes_first():
    """A reader of train.py meets the loss, the update and the loop, in this order, before anything else."""
    names = [node.name for node in ast.parse(source("train")).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert names[:2] == ["grpo_loss", "update"]
    main = next(n for n in ast.parse(source("train")).body if isinstance(n, ast.FunctionDef) and n.name == "main")
    assert main.end_lineno < fold_of("train")
    assert not [node for node in ast.walk(main) if isinstance(node, (ast.Lambda, ast.Nonlocal))]
    body = "\n".join(source("train").splitlines()[main.lineno:main.end_lineno])
    assert re.findall(r"# (\d)\. ", body) == list("12345")


def test_the_readme_is_a_first_page_and_true():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.encode()) <= README
    for name in HOUSE:
        assert f"| `{name}.py` | {lines_of(name)} |" in readme
    for file, thing in re.findall(r"`(rewards|data|rollout|eval|curriculum|train)\.([a-zA-Z_]{3,})`", readme):
        assert re.search(rf"^(?:def |class )?{thing}\b", source(file), re.M), f"{file}.{thing}"


def test_what_users_complain_of_is_shown_by_tests_that_there_are():
    """A table of promises outlives the tests that kept them."""
    rows = re.findall(r"^\| (?!complaint).*\w#\d+.*\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    missing = set()
    for row in rows:
        named = re.findall(r"`(tests/\w+\.py)::(test_\w+)`", row)
        assert named and row.count("`tests/") == len(named), f"no test shows it: {row}"
        for file, test in named:
            tree = ast.parse((ROOT / file).read_text() if (ROOT / file).exists() else "")
            if test not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
                missing.add(f"{file}::{test}")
    assert len(rows) == 15 and not missing


def test_few_files():
    """520 of 580 files once were logs of ablation runs: who opened the repository scrolled through 104 folders."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a checkout")
    assert len(done.stdout.splitlines()) <= 130
