"""What goes wrong with long runs, tried: kills, full disks, damaged and changed files, data and models of others.

The verifier that hangs, the one that eats memory and the response of 100,000 brackets are in test_rewards.py, a loss
that is not finite in test_train.py, pictures that lead out of their folder or burst in test_data.py, what a model
writes into a page in test_eval.py and test_curriculum.py.
"""
from __future__ import annotations

import ast
import contextlib
import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
import torch
from conftest import ROOT, TOY, lines, weights

import eval as evaluation
import train
from data import Processor, load_records, save_records
from rollout import load_policy
from train import LOGS, checkpoints, main, mark_best_and_prune, newest_whole


def same_run(run: Path, whole: Path) -> None:
    """Log, responses, closing scores, weights and moments, to the bit."""
    assert lines(run) == lines(whole)
    for name in ("responses.jsonl", "scores.json", "best.json"):
        assert (run / name).read_text() == (whole / name).read_text(), name
    want, got = weights(whole), weights(run)
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)


@pytest.fixture
def copy(whole_run, tmp_path) -> Path:
    """A finished run of one's own."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


# --- damaged, full, changed ------------------------------------------------------------------------------------------


def goes_on_from(path: Path) -> bool:
    """Would a run go on from this checkpoint, its newest?"""
    return newest_whole(path.parent) == path


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def wipe(path: Path) -> None:
    """As a disk does that never wrote the first block: of the old length, and not to be read."""
    with open(path, "r+b") as file:
        file.write(bytes(min(4096, path.stat().st_size)))


@pytest.mark.parametrize("harm", [
    lambda path: cut(path / "model.safetensors"),
    lambda path: [cut(file) for file in (path / "trainer").glob("*.safetensors")],
    lambda path: os.truncate(path / "config.json", 100),
    lambda path: wipe(path / "model.safetensors"),
    lambda path: [wipe(file) for file in (path / "trainer").glob("*.safetensors")],
    lambda path: wipe(path / "config.json"),
    lambda path: (path / "model.safetensors").unlink(),
    lambda path: (path / "tokenizer.json").unlink(),
    lambda path: [file.unlink() for file in (path / "trainer").glob("*.safetensors")],
    lambda path: shutil.rmtree(path / "trainer")],
    ids=["weights cut", "moments cut", "json cut", "weights wiped", "moments wiped", "json wiped", "no weights",
         "no tokenizer", "no moments", "no trainer"])
def test_a_damaged_checkpoint_is_known_and_the_one_before_is_taken(copy, harm, capsys):
    """Half a folder is what a full disk leaves, or a copy that ran out of time."""
    harm(copy / "checkpoint-000006")
    assert newest_whole(copy).name == "checkpoint-000004"
    assert "checkpoint-000006 is damaged: " in capsys.readouterr().out
    assert (copy / "damaged-000006").is_dir(), "set aside, not deleted"


def test_from_the_checkpoint_before_a_damaged_one_comes_the_same_run(small, copy, whole_run):
    cut(copy / "checkpoint-000006/model.safetensors")
    main([*small, "--out", str(copy), "--resume"])
    same_run(copy, whole_run)


def test_without_a_whole_checkpoint_nothing_is_trained_over(small, copy):
    """Starting again from nothing would cut the log of the run to nothing."""
    for path in checkpoints(copy):
        cut(path / "model.safetensors")
    before = (copy / "metrics.jsonl").read_text(), checkpoints(copy)
    with pytest.raises(ValueError, match="no checkpoint of .* is whole"):
        main([*small, "--out", str(copy), "--resume"])
    assert ((copy / "metrics.jsonl").read_text(), checkpoints(copy)) == before


def state(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def spoil(path: Path, number: int) -> None:
    """Line `number` of a log, from 1, is cut in its middle; the others stay."""
    kept = path.read_bytes().splitlines(keepends=True)
    kept[number - 1] = kept[number - 1][:20] + b"\n"
    path.write_bytes(b"".join(kept))


def ends_at(path: Path, step: int) -> None:
    kept = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= step]
    path.write_text("".join(kept))


def without_checkpoints(run: Path) -> None:
    for path in checkpoints(run):
        shutil.rmtree(path)


@pytest.mark.parametrize("harm, told", [
    (without_checkpoints, "metrics.jsonl ends at step 6, the newest checkpoint is missing; .* from a copy, or start"),
    (lambda run: (without_checkpoints(run), (run / "metrics.jsonl").unlink(), shutil.rmtree(run / "held-out")),
     "responses.jsonl ends at step 6, the newest checkpoint is missing"),
    (lambda run: (without_checkpoints(run), [file.unlink() for file in run.glob("*.jsonl")]),
     "metrics.jsonl is missing or empty, the newest checkpoint is missing"),
    (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing .* is checkpoint-000006"),
    (lambda run: (run / "responses.jsonl").unlink(), "responses.jsonl is missing .* checkpoint-000006"),
    (lambda run: ends_at(run / "metrics.jsonl", 5), "metrics.jsonl ends at step 5"),
    (lambda run: ends_at(run / "responses.jsonl", 4), "responses.jsonl ends at step 4"),
    (lambda run: spoil(run / "metrics.jsonl", 3), "metrics.jsonl, line 3: broken"),
    (lambda run: spoil(run / "responses.jsonl", 20), "responses.jsonl, line 20: broken")],
    ids=["no checkpoint", "answers alone", "held-out alone", "no metrics", "no responses", "metrics end", "answers end",
         "metrics broken", "answers broken"])
def test_where_log_and_checkpoints_disagree_nothing_is_lost(small, copy, harm, told):
    """--resume of a run whose checkpoints were not copied along began at 0 and cut its log from 12 lines to 2; a line
    that cannot be read cut off all that came after it."""
    harm(copy)
    before = state(copy)
    with pytest.raises(ValueError, match=told):
        main([*small, "--out", str(copy), "--resume"])
    assert state(copy) == before


def test_what_a_killed_process_left_is_trained_again(small, copy, whole_run):
    """Steps after the newest checkpoint, and half a line; and of a run killed in its first step what it was to learn
    from."""
    shutil.rmtree(copy / "checkpoint-000006")
    for name in LOGS:
        cut(copy / name)
    main([*small, "--out", str(copy), "--resume"])
    same_run(copy, whole_run)
    without_checkpoints(copy)
    ends_at(copy / "metrics.jsonl", 0)
    for name in LOGS[1:]:
        ends_at(copy / name, 1)
    for file in (copy / "held-out").glob("step*[1-9]-*"):
        file.unlink()
    main([*small, "--out", str(copy), "--resume"])
    same_run(copy, whole_run)


def test_best_is_kept_and_the_earliest_of_equals(tmp_path):
    for step in range(1, 7):
        (tmp_path / f"checkpoint-{step:06d}").mkdir()
    mark_best_and_prune(tmp_path, {0: 0.9, 2: 0.5, 4: 0.5, 6: 0.4}, keep=1)
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["2", "6"]
    assert json.loads((tmp_path / "best.json").read_text()) == {"checkpoint": "checkpoint-000002", "accuracy": 0.5}


@contextlib.contextmanager
def failing(monkeypatch, name: str):
    """os.NAME has no room."""
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        yield


@contextlib.contextmanager
def files_of_at_most(size: int):
    """What is written beyond that fails, in whatever language."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def no_room_for_moments(monkeypatch):
    """The weights are written; the moments, in smaller files, are not."""
    real = dcp.save

    def save(*args, **options):
        with files_of_at_most(1000):
            return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(dcp, "save", save)
        yield


@pytest.mark.slow
def test_a_full_disk_leaves_what_was_saved_and_says_what_to_do(small, whole_run, tmp_path, monkeypatch):
    """At the second save, while the weights, the moments and the names are written: the first two in libraries, with
    errors of their own."""
    run, real = tmp_path / "run", train.save_checkpoint
    weights_size = (whole_run / "checkpoint-000006/model.safetensors").stat().st_size
    for full in (lambda: files_of_at_most(weights_size - 1), lambda: no_room_for_moments(monkeypatch),
                 lambda: failing(monkeypatch, "fsync"), lambda: failing(monkeypatch, "replace")):

        def save(folder, step, *args, full=full):
            with full() if step == 4 else contextlib.nullcontext():
                real(folder, step, *args)

        with monkeypatch.context() as patch, pytest.raises(OSError) as error:
            patch.setattr(train, "save_checkpoint", save)
            main([*small, "--out", str(run), *(["--resume"] if run.exists() else [])])
        assert "checkpoint-000004 could not be saved: " in str(error.value)
        assert "No space left" in str(error.value) or "File too large" in str(error.value)
        assert "the newest is checkpoint-000002. Make room, or lower --keep" in str(error.value)
        assert not (run / "checkpoint.partial").exists(), "half a checkpoint only takes room"
        assert goes_on_from(run / "checkpoint-000002")
    main([*small, "--out", str(run), "--resume"])
    same_run(run, whole_run)


def changed(small: list[str], tmp_path: Path, which: str, change) -> list[str]:
    """The options, with one file of data rewritten with `change` done to its records."""
    index = small.index(which) + 1
    source = Path(small[index])
    file = source / "ladder.parquet" if source.is_dir() else source
    save_records(str(tmp_path / file.name), change(load_records(str(file))))
    return [*small[:index], str(tmp_path / file.name), *small[index + 1:]]


@pytest.mark.parametrize("which, told", [("--data", "train"), ("--test", "test")])
def test_data_changed_between_save_and_resume_is_refused(small, copy, tmp_path, which, told):
    """Gold, order, number, question, picture. At another place the same data are welcome: folders move."""
    before = (copy / "metrics.jsonl").read_text()
    for change in (lambda r: [replace(r[0], answer="77"), *r[1:]], lambda r: r[::-1], lambda r: r[:-1],
                   lambda r: [replace(r[0], question=r[0].question + " "), *r[1:]],
                   lambda r: [replace(r[0], images=r[1].images), *r[1:]]):
        with pytest.raises(ValueError, match=f"{told}: .* problems .* there, .* now"):
            main([*changed(small, tmp_path, which, change), "--out", str(copy), "--resume"])
    assert (copy / "metrics.jsonl").read_text() == before and goes_on_from(copy / "checkpoint-000006")
    main([*changed(small, tmp_path, which, list), "--out", str(copy), "--resume"])


def test_what_does_not_change_the_steps_may_change_on_resume(small, copy, capsys):
    main([*small, "--out", str(copy), "--resume", "--keep", "1", "--save-every", "3"])
    assert "resumed from" in capsys.readouterr().out and json.loads((copy / "settings.json").read_text())["keep"] == 1
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        main([*small, "--out", str(copy), "--resume", "--seed", "1"])


def test_a_run_is_trained_by_one_process_at_a_time(small, copy):
    """A job that the cluster starts again while the old one still writes would interleave two logs."""
    code = f"import fcntl, time; f = open({str(copy / 'lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', " \
           "flush=True); time.sleep(60)"
    with subprocess.Popen([os.sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process is at work there"):
            main([*small, "--out", str(copy), "--resume"])
        other.kill()


def test_a_stop_during_an_evaluation_loses_no_step(small, whole_run, tmp_path, monkeypatch):
    """An evaluation may take longer than a cluster waits: that of the start, and that of a stage's end, whose steps are
    saved before it. What was cut short is made up for."""
    run, real, calls = tmp_path / "run", evaluation.answer_to_disk, []

    def stop(*args, **options):
        calls.append(1)
        if len(calls) in (1, 4):  # at the start; then greedy and sampled at the start, and the end of the first stage
            signal.raise_signal(signal.SIGINT if len(calls) == 1 else signal.SIGTERM)
        return real(*args, **options)

    monkeypatch.setattr(evaluation, "answer_to_disk", stop)
    main([*small, "--out", str(run)])
    assert lines(run) == [] and checkpoints(run)[-1].name == "checkpoint-000000"
    main([*small, "--out", str(run), "--resume"])
    assert [line["step"] for line in lines(run)] == [0, 1, 2] and checkpoints(run)[-1].name == "checkpoint-000002"
    main([*small, "--out", str(run), "--resume"])
    same_run(run, whole_run)


def test_a_stop_before_the_run_begins_leaves_no_folder(small, tmp_path, monkeypatch):
    """Checking 40,000 prompts takes minutes; Ctrl-C finished them, made the folder and saved a checkpoint in it."""
    def stop(*args, **options):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train, "check_records", stop)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            main([*small, "--out", str(tmp_path / "run")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "run").exists()


def test_strange_files_do_not_stop_a_run(small, copy):
    """A .DS_Store beside the held-out answers, of a folder that was looked at on a laptop."""
    (copy / "held-out" / ".DS_Store").write_text("?")
    main([*small, "--out", str(copy), "--resume"])


def test_held_out_problems_that_were_answered_before_a_stop_are_not_answered_again(small, tmp_path, monkeypatch):
    """The unit on disk is the record, so --rollout-rows may change meanwhile."""
    answered, real = [], evaluation.sample_groups

    def stop(model, processor, records, *args, **options):
        answered.append([r.id for r in records])
        if len(answered) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(model, processor, records, *args, **options)

    monkeypatch.setattr(evaluation, "sample_groups", stop)
    options = [*small, "--out", str(tmp_path / "run"), "--stage", "0", "--rollout-rows"]
    main([*options, "4"])
    assert list(map(len, answered)) == [4, 2]
    main([*options, "8", "--resume"])
    assert answered[2] == answered[1]


def test_a_run_of_an_older_version_is_refused_in_one_line(small, tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "checkpoint-000002").mkdir()
    with pytest.raises(ValueError, match="older version of this code; .* or give another --out") as error:
        main([*small, "--out", str(tmp_path), "--resume"])
    assert "\n" not in str(error.value)


# --- data and models of others ---------------------------------------------------------------------------------------


def test_no_code_of_others_is_run():
    """No eval, no exec, no shell, no pickle, no remote code: read off the syntax of the six files."""
    for file in sorted(ROOT.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            where = f"{file.name}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}, where
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "compile", "os.system", "__import__", "torch.load"), where
                assert not name.endswith(("torch.save", "allow_pickle")), where
                for option in node.keywords:
                    assert option.arg != "trust_remote_code" or option.value.value is False, where
                    assert option.arg not in ("shell", "allow_pickle"), where


def test_a_model_folder_that_brings_code_runs_none_of_it(tmp_path, shipped):
    """`auto_map` names a Python file in the folder; transformers would ask on a terminal whether to run it."""
    folder = Path(shutil.copytree(TOY / "model", tmp_path / "model"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        config = json.loads((folder / name).read_text())
        config["auto_map"] = {kind: "evil.Evil" for kind in (
            "AutoConfig", "AutoModelForImageTextToText", "AutoImageProcessor")} | {"AutoTokenizer": ["evil.Evil"] * 2}
        (folder / name).write_text(json.dumps(config))
    Processor(str(folder))
    model = load_policy(str(folder))
    assert torch.equal(model.lm_head.weight, shipped.lm_head.weight)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(ValueError, match="not a model folder"):
        load_policy(str(folder))
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_pickled_code_are_refused(tmp_path, shipped):
    """An old .bin file is a pickle: transformers reads tensors from it and nothing else."""
    folder = Path(shutil.copytree(TOY / "model", tmp_path / "model"))
    (folder / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_policy(str(folder))
    assert not (tmp_path / "ran").exists()


def test_rows_of_a_hundred_thousand_brackets_are_bad_records(tmp_path):
    """They overflow json's stack, which is no ValueError."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "2"}\n' + "[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="x.jsonl, line 2"):
        load_records(str(path))


def test_a_run_that_died_before_its_settings_were_written_is_no_run(tmp_path):
    """Its lock alone would keep the very command that began it out."""
    (tmp_path / "lock").touch()
    assert train.find_run(train.parse_config(["--out", str(tmp_path)])) is None
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="is not empty"):
        train.find_run(train.parse_config(["--out", str(tmp_path)]))


# --- kills (slow) ----------------------------------------------------------------------------------------------------

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["train"])  # so that each of some thirty processes starts at once


def undrawn(options: list[str]) -> None:
    train.plot_curves = lambda *_: None  # it takes longer than all the rest
    main(options)


def start(options: list[str], run: Path):
    if (run / "settings.json").exists() and not checkpoints(run) and "reward" in (run / "metrics.jsonl").read_text():
        with pytest.raises(ValueError, match="metrics.jsonl ends at step .* the newest checkpoint is missing"):
            train.find_run(train.parse_config([*options, "--out", str(run), "--resume"]))
        shutil.rmtree(run)  # killed between its first step and its first checkpoint: it begins anew
    resume = ["--resume"] if (run / "settings.json").exists() else []
    process = context.Process(target=undrawn, args=([*options, "--out", str(run), *resume],))
    process.start()
    return process


def partial(run: Path) -> bool:
    return (run / "checkpoint.partial").exists()


def freeze_in_a_save(process, run: Path, skip: int, within: float) -> None:
    """Lets `skip` saves go by, then stops the process in the middle of one: what was stopped is looked at, and sent on
    where the save had ended meanwhile, so how fast the machine saves decides nothing."""
    for here in [False, True] * (skip + 1):
        while process.is_alive() and partial(run) != here:
            time.sleep(0.0005)
    time.sleep(within)
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        while process.is_alive():
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(0.01)  # (a system call under way ends first)
            if partial(run):
                return
            os.kill(process.pid, signal.SIGCONT)
            while process.is_alive() and not partial(run):
                time.sleep(0.0005)


@pytest.fixture
def brief(small) -> list[str]:
    return [*small, "--max-response-tokens", "24", "--eval-samples", "1", "--save-every", "1"]


@pytest.mark.slow
def test_kill_9_at_random_moments_of_ten_runs(brief, tmp_path):
    """Each run is killed twice, once of them in the middle of saving, then left to end: the same run."""
    start(brief, tmp_path / "warm").join()
    began = time.time()
    whole = start(brief, tmp_path / "whole")
    whole.join()
    seconds, rng, saving = time.time() - began, random.Random(0), 0
    for n in range(10):
        run = tmp_path / str(n)
        for kill in range(2):
            process, since = start(brief, run), time.time()
            if (n + kill) % 2:
                freeze_in_a_save(process, run, skip=rng.randrange(3), within=rng.uniform(0, 0.05))
            else:
                process.join(rng.uniform(0.2, seconds))
            process.kill()
            process.join()
            saving += partial(run) and (run / "checkpoint.partial").stat().st_ctime > since
            if checkpoints(run):
                assert goes_on_from(checkpoints(run)[-1]), "nothing half-written has a whole one's name"
        last = start(brief, run)
        last.join()
        assert last.exitcode == 0
        same_run(run, tmp_path / "whole")
    print(f"\n20 kills, {saving} of them in the middle of saving; a run takes {seconds:.1f} s")
    assert saving >= 5, "every odd run's first kill; the even runs' second may come after the last save"


@pytest.mark.slow
def test_a_disk_that_is_really_full(brief, tmp_path):
    """A file system of 32 MB holds two checkpoints of the toy and not three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", disk], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    try:
        process = start(brief, disk / "run")
        process.join()
        assert process.exitcode == 1
        kept = checkpoints(disk / "run")
        assert kept and goes_on_from(kept[-1]) and not (disk / "run/checkpoint.partial").exists()
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        process = start(brief, disk / "run")
        process.join()
        assert process.exitcode == 0
        whole = start(brief, tmp_path / "whole")
        whole.join()
        same_run(disk / "run", tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)
