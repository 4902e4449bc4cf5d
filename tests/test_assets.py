"""Comparison of runs and the pictures: what the scripts in assets/ make of what the six files leave."""
from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import compare
import make_toy
import numpy as np
import pictures
import pytest
import torch
from conftest import ROOT, TOY
from PIL import Image

from curriculum import stage_table
from data import Processor, Record, load_records
from eval import evaluate
from rollout import load_policy
from train import Config

STEEP = ROOT / "assets/steep"

# --- comparison -------------------------------------------------------------------------------------------------------


def test_differences_are_paired_by_problem():
    """Unpaired, two runs that differ in one problem in a hundred would seem alike."""
    base = {str(i): (str(i), float(i % 2)) for i in range(100)}
    better = base | {str(i): (str(i), 1.0) for i in range(0, 20, 2)}
    value, (low, high), count = compare.difference([better], [base])
    assert value == pytest.approx(.1) and .03 < low < high < .17 and count == 100
    assert compare.difference([better], [{"other": ("other", 1.0)}]) is None


@pytest.mark.run
def test_intervals_hold_what_new_seeds_would_come_to():
    """Seeds drawn anew from four seeds, as problems are, would give intervals that hold the truth in 78% of cases."""
    rng, held = np.random.default_rng(0), []
    for _ in range(150):
        better, worse = ([{"": ("", score)} for score in rng.normal(mean, sd, 4)] for mean, sd in ((1, 1), (0, 2)))
        for runs, base, truth in ((better, [], 1), (better, worse, 1)):
            _, (low, high), _ = compare.difference(runs, base, draws=500)
            held.append(low < truth < high)
    assert np.mean(held[::2]) == pytest.approx(.95, abs=.04) and np.mean(held[1::2]) == pytest.approx(.96, abs=.04)


@pytest.mark.run
def test_the_noise_of_responses_is_counted_once():
    """Both problems and seeds show it: counted in both spreads, intervals of many noisy problems would be as wide as
    1.4 times what new responses change."""
    rng, centers, widths = np.random.default_rng(0), [], []
    for _ in range(100):
        runs, base = ([{str(i): (str(i), float(score)) for i, score in enumerate(rng.normal(.5, .3, 200))}
                       for _ in range(20)] for _ in range(2))
        center, (low, high), _ = compare.difference(runs, base, draws=500)
        centers.append(center)
        widths.append((high - low) / 2 / 2.02)  # t's for two sides of 20
    assert np.mean(widths) == pytest.approx(np.std(centers), rel=.2)


def trained(folder: Path, sigma: float, seed: int, after: list[int]) -> Path:
    """What train.py leaves of a run."""
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"program": "train.py", "test": "x/held.parquet", "sigma": sigma,
                                                      "seed": seed, "out": str(folder), "resume": False, "model": "m",
                                                      "rollout_rows": 8 * (1 + seed)}))  # (makes no other setting)

    def end(right: list[int]) -> dict:
        return {"accuracy": sum(right) / len(right), "by_problem": {str(i): float(r) for i, r in enumerate(right)},
                "observation": 0.5 + seed / 10, "length": 40, "levels": {"0.125": {"accuracy": 0.25}}}

    (folder / "scores.json").write_text(json.dumps({name: {"greedy": end(right), "sampled": end(right)} for name, right
                                                    in (("before", [0, 0, 1, 0]), ("after", after))}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (
        {"step": 0, "eval": {}}, *({"step": i, "reward": 1, "signal": i / 4, "seconds_rollout": 30,
                                    "seconds_reward": 10, "seconds_update": 20} for i in (1, 2)))))
    return folder


def test_runs_side_by_side_by_setting_over_seeds(tmp_path, capsys):
    runs = [trained(tmp_path / "a", 0.0, 0, [1, 0, 1, 0]), trained(tmp_path / "b", 1.8, 0, [1, 1, 1, 0]),
            trained(tmp_path / "c", 1.8, 1, [1, 1, 1, 1])]
    compare.main([*map(str, runs), "--out", str(tmp_path / "out")])
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert table[0][:6] == ["setting", "seeds", "held, greedy, %", "gain by training", "against the first",
                            "paired problems"]
    plain, weighted = table[2], table[3]
    assert plain[:2] == ["sigma 0.0", "1"] and plain[2].startswith("50.0 [") and plain[3].startswith("+25.0 [")
    assert weighted[:2] == ["sigma 1.8", "2"] and weighted[2].startswith("87.5 [") and plain[4] == "-"
    assert weighted[4].startswith("+37.5 [") and weighted[5] == "4"
    assert ["setting", "observation, T=1, %", "tokens, T=1", "groups with signal, %", "minutes"] in table
    assert ["sigma 1.8", "55.0 ± 5.0", "40.0 ± 0.0", "37.5 ± 0.0", "2.0 ± 0.0"] in table  # of seeds: 50 and 60
    assert ["accuracy by difficulty", "0.125, T=1, %"] in table and ["sigma 0.0", "25.0"] in table
    assert ["sigma", "0.0", "1.8"] in table and (tmp_path / "out/compare.md").exists()
    assert (tmp_path / "out/compare.png").read_bytes().startswith(b"\x89PNG")
    compare.main([*map(str, [runs[1], runs[0], trained(tmp_path / "d", 1.0, 0, [1, 1, 1, 0])]), "--against", "previous",
             "--out", str(tmp_path / "out")])
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert table[0][4] == "against the previous"
    assert [row[4].split(" ")[0] for row in table[2:5]] == ["-", "-25.0", "+25.0"]
    with pytest.raises(ValueError, match="b and .*b are of the same settings and seed"):
        compare.main([str(runs[1]), str(runs[1])])
    with pytest.raises(ValueError, match="no finished run"):
        compare.main([str(tmp_path)])


def evaluation(folder: Path, benchmarks: str, trained: dict | None = None) -> Path:
    """The part that compare reads of what eval.py leaves."""
    folder.mkdir()
    scores = [{"benchmark": name, "prompt": "none", "sampling": "greedy", "by_problem": {"1": 1.0, "2": 0.0, "3": 0.0},
               "drawn_with": {"1": "one", "2": "one"}} for name in benchmarks]
    (folder / "scores.json").write_text(json.dumps({"scores": scores, "settings": {
        "program": "eval.py", "trained": trained, "model": "m", "responses": None, "seed": 0}}))
    return folder


def test_the_untrained_model_differs_in_the_model_and_not_in_all_settings_of_training(tmp_path, capsys):
    runs = [evaluation(tmp_path / "base", "a")] + [
        evaluation(tmp_path / f"{sigma}{seed}", "a", {"program": "train.py", "sigma": sigma, "lr": 1e-6,
                                                           "seed": seed, "model": "m"})
        for sigma in (0, 1) for seed in (0, 1)]
    compare.main([*map(str, runs), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "| model m, trained with sigma - " in printed and "trained with sigma 1 | 2 " in printed
    assert "trained with lr" not in printed and "program" not in printed


def test_other_pictures_are_columns_and_no_other_setting(tmp_path):
    """A look at one checkpoint with other pictures is of the run's setting; what stands beside is of those given."""
    kinds = {"a": ("given", "none", "swapped"), "b": ("given",)}
    for name, asked in kinds.items():
        file = evaluation(tmp_path / name, "x") / "scores.json"
        told = json.loads(file.read_text())
        told["settings"] |= {"pictures": ",".join(asked), "seed": int(name == "b")}
        told["scores"] = [told["scores"][0] | {"pictures": kind, "length": 10 + i} for i, kind in enumerate(asked)]
        file.write_text(json.dumps(told))
    runs = [run for name in kinds for run in compare.read_runs(tmp_path / name)]
    assert [list(run.problems) for run in runs] == [
        ["x, greedy", "x, greedy, pictures none", "x, greedy, pictures swapped"], ["x, greedy"]]
    assert [run.beside for run in runs] == [{"tokens, greedy": 10}] * 2
    assert [len(group) for group in compare.by_setting(runs)] == [2]


def test_many_benchmarks_make_a_plot_that_can_be_read(tmp_path):
    """Eight panels in one row were 4,600 pixels wide; and versions of one problem are drawn together here too."""
    folder = evaluation(tmp_path / "a", "abcdefgh")
    [run] = compare.read_runs(folder)
    assert run.problems["a, greedy"] == {"1": ("one", 1.0), "2": ("one", 0.0), "3": ("3", 0.0)}
    compare.main([str(folder), "--out", str(tmp_path / "out")])
    with Image.open(tmp_path / "out/compare.png") as image:
        assert image.width < 2000 and image.height < 2000


def test_a_long_label_is_wrapped_and_the_panels_keep_their_room(tmp_path):
    """Labels as long as a folder's name were cut at the edge, and left the panels no width at all."""
    found = {"a": [(.5, [.4, .6], 10)]}
    for length in (10, 150):
        compare.draw(["x" * length], found, tmp_path / f"{length}.png")
    dark = []
    for length in (10, 150):
        with Image.open(tmp_path / f"{length}.png") as image:
            pixels = np.asarray(image.convert("L")) < 128
        assert not pixels[:, 0].any(), "cut at the left edge"
        dark.append(int(pixels.any(0).nonzero()[0].min()))
        frame = pixels.sum(1).max()  # the longest line is a side of the panel
        assert frame > 300
    assert all(dark)


def test_technical_settings_are_settings():
    """One misspelt, or not marked as technical, would make of every value of it another setting."""
    assert set(compare.TECHNICAL) < asdict(Config()).keys()
    assert set(compare.TECHNICAL) == {"micro_tokens", "rollout_rows", "gradient_checkpointing", "save_every", "keep",
                                      "max_steps", "tracker", "offload"}


# --- pictures ---------------------------------------------------------------------------------------------------------


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def answered(folder: Path, test: str, *steps: list[bool]) -> Path:
    """What train.py leaves of a run that answered the first two problems of the test set at some steps."""
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"program": "train.py", "test": test}))
    lines = [{"step": 1, "reward": 1.0}] + [
        {"step": i, "eval": {}, "shown": [{"id": f"test-{n:04d}", "text": f"<answer>${n} is {r}</answer>", "right": r}
                                          for n, r in enumerate(right)]} for i, right in enumerate(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_strip_is_drawn_from_a_run_s_own_files(tmp_path, monkeypatch, capsys):
    """From any folder, and with a lone $, which matplotlib takes for mathematics."""
    monkeypatch.chdir(tmp_path)
    test = "assets/toy/test.parquet"  # as settings.json names what lies in the repository
    for name, steps in (("two", ([False, False], [False, True])), ("three", ([True, False],) * 3)):
        run = answered(tmp_path / name, test, *steps)
        pictures.main(["strip", str(run)])
        assert is_png(run / "strip.png") and str(run / "strip.png") in capsys.readouterr().out
    with Image.open(tmp_path / "two/strip.png") as two, Image.open(tmp_path / "three/strip.png") as three:
        assert two.width < three.width, "before and last; before, midway and last"
    with pytest.raises(ValueError, match="did not answer held-out problems twice"):
        pictures.main(["strip", str(answered(tmp_path / "once", test, [True, True]))])
    with pytest.raises(ValueError, match="no run of train.py"):
        pictures.main(["strip", str(tmp_path)])


def test_the_strip_shows_a_problem_that_was_learned(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(pictures, "open_image", lambda image, name: chosen.append(name) or Image.new("RGB", (4, 4)))
    for name, steps, wanted in (("a", ([True, False], [True, True]), "test-0001"),
                                ("b", ([True, False], [True, False]), "test-0000")):
        pictures.main(["strip", str(answered(tmp_path / name, str(TOY / "test.parquet"), *steps))])
        assert chosen.pop() == wanted


@pytest.mark.run
def test_a_ladder_is_drawn_beside_it(tmp_path, monkeypatch):
    """Not over a ladder.png of the current folder."""
    shutil.copytree(TOY / "ladder", tmp_path / "a", ignore=shutil.ignore_patterns("*.png"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    pictures.main(["ladder", str(tmp_path / "a")])
    assert is_png(tmp_path / "a/ladder.png")
    (tmp_path / "a/ladder.png").unlink()
    pictures.main(["ladder", str(tmp_path / "a/ladder.parquet")])
    assert is_png(tmp_path / "a/ladder.png") and not any((tmp_path / "here").iterdir())
    for out, path in (("made", "made/ladder.png"), ("x.png", "x.png")):
        pictures.main(["ladder", str(tmp_path / "a"), "--out", out])
        assert is_png(tmp_path / "here" / path)
    with pytest.raises(ValueError, match="give --out"):
        pictures.main(["ladder", "some/hub-id@train"])


def test_a_ladder_is_drawn_with_empty_levels_and_stray_dollars(tmp_path, test_set):
    ladder = [replace(test_set[0], question="Is it $5 or $x_?", difficulty=0.0, complexity=9.0, stage=0),
              Record("text", "?", "1", difficulty=.125, complexity=8.0, stage=0)]
    pictures.plot_ladder(ladder, tmp_path / "ladder.png")
    assert is_png(tmp_path / "ladder.png")


# --- the built-in world -----------------------------------------------------------------------------------------------


def test_the_cold_start_learns_the_responses_and_nothing_else(processor: Processor, shipped, test_set):
    """Labels on a prompt or on padding would teach the model to write questions; a row is what it is by itself."""
    prompts = [processor.encode(record, style) for record, style in zip(test_set, ("observe", "none", "think"))]
    responses = [processor.tokenizer(text).input_ids for text in ("<answer> 8</answer>", " 1", "<think> 3, 5</think>")]
    inputs = make_toy.with_responses(processor.collate(prompts), responses, processor.pad_id)
    width = max(len(prompt.ids) for prompt in prompts)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        seen = inputs["attention_mask"][row].bool()
        assert inputs["input_ids"][row][seen].tolist() == [*prompt.ids.tolist(), *response]
        assert inputs["labels"][row][inputs["labels"][row] != -100].tolist() == response
        assert inputs["labels"][row, width:width + len(response)].tolist() == response, "all begin in one column"
        assert (inputs["mm_token_type_ids"][row] == (inputs["input_ids"][row] == processor.image_id)).all()
    alone = [make_toy.with_responses(processor.collate([p]), [r], processor.pad_id) for p, r in zip(prompts, responses)]
    tokens = [len(response) for response in responses]
    each = [shipped(**row).loss.item() for row in alone]
    assert shipped(**inputs).loss.item() == pytest.approx(np.average(each, weights=tokens), rel=1e-4)


def test_a_lean_cold_start_has_the_same_gradients(processor: Processor, monkeypatch):
    """A batch in quarters, each weighted by its tokens: with quarters of equal weight the short responses would count
    twice. What bf16 rounds away is not seen in training."""
    gradients = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: gradients.append(
        torch.cat([p.grad.flatten() for p in parameters])))
    digits = {d: [np.full((8, 8), d / 9)] for d in range(10)}
    world = make_toy.World((("problems", 1, make_toy.Manner()),), make_toy.ALIKE, seed=0)
    for lean in (False, True):
        make_toy.cold_start(load_policy(str(TOY / "model")), processor, digits, replace(world, lean=lean), 0)
    plain, lean = gradients
    assert (lean - plain).norm() < .05 * plain.norm()


def test_a_glance_goes_on_as_patience_has_it():
    """steep stands on this: a fifth sees two rows, a twenty-fifth three; the first world's glance never goes on."""
    rows = [[("red", 1), ("blue", 2)], [("red", 3)], [("green", 4)]]
    rng = random.Random(0)
    looked = [len(make_toy.glance(rows, False, .2, rng)) for _ in range(5000)]
    assert [round(looked.count(n) / 5000, 2) for n in (1, 2, 3)] == pytest.approx([.8, .16, .04], abs=.015)
    bars = [[("red", n) for n in (4, 1, 2, 3)]]
    looked = [len(make_toy.glance(bars, True, .2, rng)[0]) for _ in range(5000)]
    assert [round(looked.count(n) / 5000, 2) for n in (2, 3, 4)] == pytest.approx([.8, .16, .04], abs=.015)
    before = rng.getstate()
    assert make_toy.glance(rows, False, 0, rng) == rows[:1] and make_toy.glance(bars, True, 0, rng) == [bars[0][:2]]
    assert rng.getstate() == before, "the first world's draws are what they were"


def test_what_think_says_first_is_the_worlds_one_difference(processor: Processor):
    """Tags, content or length: steep's two styles differ in their tags alone, filler's in what is said, token for
    token, terse's think says nothing first, as the first world's; observe is the same in all."""
    record = make_toy.make_problem(random.Random(1), {d: [np.ones((8, 8))] for d in range(10)}, "x", ("sum",), (2, 2))
    seen = make_toy.described(record.meta["rows"])
    says = {"toy": "", "steep": f"{seen}\n", "terse": "", "filler": " a digit, a digit; a digit, a digit\n"}
    assert len(processor.tokenizer(says["filler"]).input_ids) == len(processor.tokenizer(says["steep"]).input_ids)
    for world, first in says.items():
        manner = replace(make_toy.Manner(), preface=make_toy.WORLDS[world].phases[-1][2].preface)
        observe, think = (make_toy.write_trace(record, style, random.Random(3), manner)
                          for style in ("observe", "think"))
        reasoned = observe.partition("<think>")[2]
        assert observe == f"<observe>{seen}</observe>\n<think>{reasoned}"
        assert think == f"<think>{first}{reasoned}"


def test_starts_differ_in_what_they_are_to_differ_in():
    """A phase that forgets what is said first, other shares of the styles or another seed would be a second change."""
    worlds = make_toy.WORLDS
    for name, first in (("steep", "described"), ("terse", ""), ("filler", "hollow")):
        assert {manner.preface for _, _, manner in worlds[name].phases} == {first}
        plain = [(show, steps, replace(manner, preface="")) for show, steps, manner in worlds[name].phases]
        assert plain == [*worlds["terse"].phases]
        assert [getattr(worlds[name], key) == getattr(worlds["steep"], key) for key in ("styles", "seed", "start")] == [
            True] * 3
    assert replace(worlds["longer"], styles=worlds["even"].styles) == worlds["even"]
    assert worlds["longer"].styles == worlds["toy"].styles and worlds["even"].styles[0] == worlds["even"].styles[1]
    assert worlds["even"].start == "assets/toy/model" and worlds["even"].phases[-1] == worlds["toy"].phases[-1]
    [steeper] = worlds["steeper"].phases
    assert steeper == ("problems", 150, replace(worlds["steep"].phases[-1][2], patience=.03))
    assert (worlds["steeper"].start, worlds["steeper"].styles) == ("assets/steep/model", worlds["steep"].styles)
    assert replace(worlds["large"], width=128, lean=False) == replace(worlds["toy"], problems=0, held_out=0)


def test_the_large_model_is_four_times_as_large(tmp_path):
    """One that is wider in one part alone would ask another question than of size."""
    shutil.copytree(TOY / "model", tmp_path / "model")
    size = {part: [sum(p.numel() for name, p in model.named_parameters() if part in name)
                   for model in (make_toy.make_model(tmp_path / "model", make_toy.WORLDS[world].width)
                                 for world in ("toy", "large"))] for part in ("visual.blocks", "layers", "")}
    assert size[""][0] == load_policy(str(TOY / "model")).num_parameters()
    assert all(large / toy == pytest.approx(4, rel=.1) for toy, large in size.values())


@pytest.mark.run
def test_a_cold_start_that_is_killed_goes_on_from_its_last_phase(tmp_path, monkeypatch):
    """The large model's takes an hour. The model that comes of it is the one that comes without the kill, and of that
    world: another's phases in the folder once were taken for its own."""
    digits = {d: [np.full((8, 8), d / 9)] for d in range(10)}
    monkeypatch.setattr(make_toy, "load_glyphs", lambda: (digits, digits))
    for name, preface in (("one", "hollow"), ("other", "")):
        world = make_toy.World((("rows", 2, make_toy.Manner()), ("problems", 1, make_toy.Manner(preface=preface))),
                               make_toy.ALIKE, seed=1, start="assets/toy/model")
        monkeypatch.setitem(make_toy.WORLDS, name, world)
    real, shown, killed_at = make_toy.cold_start, [], [2, 4]

    def cold_start(model, processor, glyphs, world, phase):
        shown.append((world.phases[1][2].preface, phase))
        if len(shown) in killed_at:
            raise KeyboardInterrupt
        real(model, processor, glyphs, world, phase)

    def make(world: str, folder: str) -> dict:
        monkeypatch.setattr("sys.argv", ["make_toy.py", "--world", world, "--out", str(tmp_path / folder)])
        make_toy.main()
        return load_policy(str(tmp_path / folder / "model")).state_dict()

    monkeypatch.setattr(make_toy, "cold_start", cold_start)
    for world in ("other", "one"):
        with pytest.raises(KeyboardInterrupt):
            make(world, "killed")
    assert shown == [("", 0), ("", 1), ("hollow", 0), ("hollow", 1)]
    again = make("one", "killed")
    assert shown[4:] == [("hollow", 1)], "the first phase is not done again"
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {"model", "making-other"}
    straight = make("one", "straight")
    assert all((again[name] == weight).all() for name, weight in straight.items())
    start = load_policy(str(TOY / "model")).state_dict()
    assert any((weight != straight[name]).any() for name, weight in start.items())


def test_steep_is_the_start_it_is_said_to_be():
    """Where a ladder should win: hard problems at nearly 0 at temperature 1, easy ones with a signal."""
    held_out, ladder = load_records(str(STEEP / "test.parquet")), load_records(str(STEEP / "ladder"))
    assert len(held_out) == 500 and len(ladder) == 1200 == len({r.id for r in ladder})
    assert {record.source for record in [*held_out, *ladder]} == {"toy/sum", "toy/colour", "toy/bars"}
    sums = [np.mean([1 - r.difficulty for r in held_out if r.source == "toy/sum" and len(r.meta["rows"]) == rows])
            for rows in (1, 2, 3)]
    assert .55 < sums[0] < .8 and sums[1] < .2 and sums[2] < .03
    assert np.mean([r.difficulty >= .875 for r in held_out]) > .5
    size = sum(file.stat().st_size for file in STEEP.rglob("*") if file.is_file())
    assert size < 12e6 and stage_table(ladder).sum() == 1200


@pytest.mark.run
def test_steeps_think_is_as_long_as_its_observe():
    """Were one longer, what its description is worth could not be told from what its length is."""
    model, processor = load_policy(str(STEEP / "model")), Processor(str(STEEP / "model"))
    lengths = {}
    for style in ("observe", "think"):
        results = evaluate(model, processor, load_records(str(STEEP / "test.parquet"))[:60], style=style, temperature=1,
                           samples=2, max_tokens=160)
        lengths[style] = np.mean([response.tokens for result in results for response in result.responses])
    assert lengths["think"] == pytest.approx(lengths["observe"], rel=.15)


def test_the_test_set_is_as_the_builder_leaves_it(test_set):
    """Its rollouts are of the one schema, and what they say is what its difficulties were counted from."""
    for record in test_set:
        rollouts = record.meta["rollouts"]
        assert all(rollout.keys() == {"answer", "accuracy", "tokens"} for rollout in rollouts) and len(rollouts) == 8
        assert record.difficulty == 1 - np.mean([rollout["accuracy"] for rollout in rollouts])
        assert record.complexity == np.mean([rollout["tokens"] for rollout in rollouts])
