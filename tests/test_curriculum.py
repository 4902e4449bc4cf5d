"""The ladder and the order of training: shares, nothing twice, and the same batches after a stop."""
from __future__ import annotations

import numpy as np
import pytest

from curriculum import MIXING, STAGE_SHARES, Curriculum, allot, build_ladder, level_of, measure
from data import Record
from rewards import accuracy_reward
from rollout import sample_groups

PAPER_SHARES = np.array([.015, .035, .05, .075, .135, .15, .15, .20, .19])


def measured(per_level: list[int], seed: int = 0) -> list[Record]:
    rng = np.random.default_rng(seed)
    records = [Record(f"{level}-{i}", "?", "1", difficulty=level / 8, complexity=float(rng.integers(20, 300)))
               for level, count in enumerate(per_level) for i in range(count)]
    return [records[i] for i in rng.permutation(len(records))]


def counts(ladder: list[Record]) -> np.ndarray:
    table = np.zeros((9, 9), int)
    for record in ladder:
        table[record.stage, level_of(record)] += 1
    return table


def test_the_tables_give_back_the_papers_shares():
    """A typo in either table would shift the mixture for good; the paper's level shares are the check."""
    np.testing.assert_allclose(MIXING.sum(1), 1)
    assert STAGE_SHARES.sum() == pytest.approx(1)
    np.testing.assert_allclose(STAGE_SHARES @ MIXING, PAPER_SHARES, atol=.005)
    assert all((row > 0).sum() == 5 or k == 3 for k, row in enumerate(MIXING))  # windows of five levels
    assert (np.diff(MIXING @ np.arange(9)) > 0).all(), "stages get harder"


def test_ladder_holds_the_shares_when_supply_allows():
    ladder = build_ladder(measured([400] * 9), size=1500)
    table = counts(ladder)
    assert len(ladder) == 1500 == len({r.id for r in ladder})
    np.testing.assert_allclose(table.sum(1), 1500 * STAGE_SHARES, atol=1)
    np.testing.assert_allclose(table, table.sum(1, keepdims=True) * MIXING, atol=1.01)
    assert [r.stage for r in ladder] == sorted(r.stage for r in ladder)


def test_default_size_is_the_largest_that_over_draws_no_level():
    supply = np.array([50, 60, 90, 100, 300, 260, 300, 280, 400])
    ladder = build_ladder(measured(list(supply)))
    assert len(ladder) == int(min(supply / (STAGE_SHARES @ MIXING)))
    table = counts(ladder)
    np.testing.assert_allclose(table, table.sum(1, keepdims=True) * MIXING, atol=2)


def test_a_scarce_level_gives_what_it_has_and_its_stages_are_filled(capsys):
    """Level 4 is scarce: every stage still has its size, nothing twice, and it is said aloud."""
    supply = [200, 200, 200, 200, 20, 300, 300, 300, 300]
    ladder = build_ladder(measured(supply), size=1000)
    table = counts(ladder)
    assert table[:, 4].sum() == 20 and len({r.id for r in ladder}) == 1000
    np.testing.assert_allclose(table.sum(1), 1000 * STAGE_SHARES, atol=1)
    assert (table[MIXING == 0] == 0).all(), "filled from the window only"
    assert "level 4" in capsys.readouterr().err


def test_an_exhausted_window_is_said_aloud(capsys):
    ladder = build_ladder(measured([5] * 5 + [300] * 4), size=1000)
    assert len(ladder) < 1000 and "short of" in capsys.readouterr().err


def test_empty_levels_do_not_empty_the_ladder():
    ladder = build_ladder(measured([100, 0, 100, 100, 100, 100, 100, 100, 100]))
    assert len(ladder) > 300 and (counts(ladder)[:, 1] == 0).all()


def test_allot_by_hand():
    mixing = np.array([[.5, .5, 0], [0, .5, .5]])
    assert allot(np.array([10, 10, 10]), np.array([4, 4]), mixing).tolist() == [[2, 2, 0], [0, 2, 2]]
    # level 1 has 2 for a demand of 4: shared out, 1 each; the rest of each stage comes from its own window
    assert allot(np.array([10, 2, 10]), np.array([4, 4]), mixing).tolist() == [[3, 1, 0], [0, 1, 3]]
    assert allot(np.array([1, 2, 10]), np.array([4, 4]), mixing).sum(1).tolist()[0] < 4


def test_ladder_depends_on_the_seed_and_not_on_the_order_of_the_input():
    records = measured([60] * 9)
    first = build_ladder(records, size=200, seed=1)
    assert build_ladder(records[::-1], size=200, seed=1) == first
    assert build_ladder(records, size=200, seed=2) != first


def test_earlier_stages_take_the_less_complex_of_a_level():
    ladder = build_ladder(measured([200] * 9), size=900)
    means = [np.mean([r.complexity for r in ladder if r.stage == k and level_of(r) == 4]) for k in range(9)]
    assert means == sorted(means)


def test_unmeasured_or_too_few_problems_are_refused():
    with pytest.raises(ValueError, match="record raw has no difficulty"):
        build_ladder([Record("raw", "?", "1")])
    with pytest.raises(ValueError, match="cannot build a ladder of 100 problems from 9"):
        build_ladder(measured([1] * 9), size=100)


def test_measure_counts_its_own_rollouts(shipped, processor, test_set):
    """Difficulty is 1 - pass rate and complexity the mean length of the very responses that were sampled."""
    records = test_set[:3]
    got = list(measure(shipped, processor, records, style="observe", max_tokens=160, seed=4))
    prompts = [processor.encode(r, "observe") for r in records]
    groups = sample_groups(shipped, processor, records, prompts, samples=8, temperature=1.0, max_tokens=160, seed=4)
    for record, group in zip(got, groups):
        assert record.difficulty == 1 - sum(accuracy_reward(t, record) for t in group.texts) / 8
        assert record.complexity == sum(len(r) for r in group.responses) / 8


# --- the order of training -------------------------------------------------------------------------------------------


@pytest.fixture
def ladder() -> list[Record]:
    return build_ladder(measured([60] * 9), size=200)


def test_batches_use_every_problem_once_and_never_cross_a_stage(ladder):
    curriculum = Curriculum(ladder, 16)
    batches = list(curriculum)
    assert sorted(r.id for b in batches for r in b.records) == sorted(r.id for r in ladder)
    assert all({r.stage for r in b.records} == {b.stage} for b in batches)
    assert [b.stage for b in batches] == sorted(b.stage for b in batches)
    assert [b.ends_stage for b in batches] == [
        i + 1 == len(batches) or batches[i + 1].stage != b.stage for i, b in enumerate(batches)]
    for stage in range(9):
        sizes = [len(b.records) for b in batches if b.stage == stage]
        assert max(sizes) <= 16 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("order", ["ladder", "sorted", "random", "reverse"])
def test_a_stopped_run_goes_on_where_it_was(ladder, order):
    """Off-by-one replays: the classic fault of resumed runs."""
    whole = list(Curriculum(ladder, 16, order, seed=3))
    first = Curriculum(ladder, 16, order, seed=3)
    seen = [batch for batch, _ in zip(first, range(5))][:5]
    state = first.state_dict() | {"position": 5}
    second = Curriculum(ladder, 16, order, seed=3)
    second.load_state_dict(state)
    assert seen + list(second) == whole


def test_state_says_how_many_batches_were_handed_out(ladder):
    curriculum = Curriculum(ladder, 16)
    for i, _ in enumerate(curriculum):
        assert curriculum.state_dict()["position"] == i + 1


def test_orders(ladder):
    def stages(order):
        return [b.stage for b in Curriculum(ladder, 16, order)]

    assert stages("reverse") == sorted(stages("ladder"), reverse=True)
    assert set(stages("random")) == {None}
    keys = [(r.difficulty, r.complexity) for b in Curriculum(ladder, 16, "sorted") for r in b.records]
    assert keys == sorted(keys)
    by_level = [r.difficulty for b in Curriculum(ladder, 16, "random") for r in b.records]
    assert by_level != sorted(by_level)


def test_one_stage_alone_is_what_it_is_in_the_whole_run(ladder):
    whole = [b.records for b in Curriculum(ladder, 16, seed=1) if b.stage == 4]
    assert [b.records for b in Curriculum(ladder, 16, seed=1, stages=range(4, 5))] == whole
    assert [b.records for b in Curriculum(ladder, 16, seed=2, stages=range(4, 5))] != whole


def test_changed_data_is_refused_on_resume(ladder):
    state = Curriculum(ladder, 16).state_dict()
    with pytest.raises(ValueError, match="changed since the checkpoint"):
        Curriculum(ladder[:-1], 16).load_state_dict(state)
    with pytest.raises(ValueError, match="changed since the checkpoint"):
        Curriculum(ladder, 16, seed=1).load_state_dict(state)


def test_unmeasured_data_trains_in_random_order_only():
    raw = [Record(str(i), "?", "1") for i in range(10)]
    assert len(list(Curriculum(raw, 4, "random"))) == 3
    with pytest.raises(ValueError, match="--order random"):
        Curriculum(raw, 4)
    with pytest.raises(ValueError, match="has no difficulty"):
        Curriculum(raw, 4, "sorted")
    with pytest.raises(ValueError, match="knows no stages"):
        Curriculum(raw, 4, "random", stages=range(2))


def test_a_stage_that_the_data_lacks_is_named(ladder):
    with pytest.raises(ValueError, match="the data has no stage 3"):
        Curriculum([r for r in ladder if r.stage != 3], 16, stages=range(2, 5))
