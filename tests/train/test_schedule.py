"""Schedules at their edges."""

import pytest

from aceray.train.schedule import LabelFilters, Ramp, ShiftWeight, TaskWeights, WarmupCosine, WarmupMultiStep


def test_cosine_rises_holds_and_falls_to_its_floor() -> None:
    rate = WarmupCosine(steps=1000, warmup_steps=100, hold=0.3, floor=0.05)
    assert rate.factor(0) == pytest.approx(0.01)
    assert rate.factor(99) == pytest.approx(1.0)
    assert rate.factor(300) == pytest.approx(1.0)
    assert rate.factor(650) == pytest.approx(0.525)
    assert rate.factor(1000) == pytest.approx(0.05)


def test_multistep_starts_at_a_third_and_falls_tenfold_at_each_milestone() -> None:
    rate = WarmupMultiStep(steps=1000, warmup_steps=500, milestones=(0.6, 0.85))
    assert rate.factor(0) == pytest.approx(1 / 3)
    assert rate.factor(500) == pytest.approx(1.0)
    assert rate.factor(599) == pytest.approx(1.0)
    assert rate.factor(600) == pytest.approx(0.1)
    assert rate.factor(850) == pytest.approx(0.01)


def test_pip_begins_after_its_warm_up() -> None:
    additive, convex = TaskWeights(0.9, 10, convex=False), TaskWeights(0.9, 10, convex=True)
    assert additive.at(9) == (1.0, 0.0)
    assert convex.at(9) == (1.0, 0.0)
    assert additive.at(10) == (1.0, 0.9)
    assert convex.at(10) == (pytest.approx(0.1), 0.9)


@pytest.mark.parametrize(("shape", "quarter"), [("linear", 0.25), ("cosine", 0.1464466)])
def test_a_ramp_rises_to_one_and_stays(shape, quarter: float) -> None:
    ramp = Ramp(shape, 100)
    assert [ramp.factor(step) for step in (0, 100, 101, 10**6)] == pytest.approx([0.0, 1.0, 1.0, 1.0])
    assert ramp.factor(25) == pytest.approx(quarter)
    assert ramp.factor(50) == pytest.approx(0.5)


def test_a_ramp_may_fall_and_a_constant_is_no_ramp() -> None:
    assert [Ramp("linear", 10, 3.0).factor(step) for step in (0, 5, 10)] == pytest.approx([3.0, 2.0, 1.0])
    assert [Ramp("constant", 10, 3.0).factor(step) for step in (0, 5, 10)] == [1.0, 1.0, 1.0]


def test_the_ramp_of_pip_begins_after_its_warm_up_and_takes_from_ipi_what_it_gives() -> None:
    weights = TaskWeights(0.8, 10, True, Ramp("linear", 4))
    found = [weights.at(step) for step in (0, 9, 10, 11, 12, 14, 15)]
    pip = [0.0, 0.0, 0.0, 0.2, 0.4, 0.8, 0.8]
    assert [pair[1] for pair in found] == pytest.approx(pip)
    assert [pair[0] for pair in found] == pytest.approx([1 - weight for weight in pip])


def test_tasks_take_turns_after_the_warm_up() -> None:
    weights = TaskWeights(2.0, 3, False, alternating=True)
    assert [weights.at(step) for step in range(7)] == [(1, 0), (1, 0), (1, 0), (1, 0), (0, 2), (1, 0), (0, 2)]
    convex = TaskWeights(0.25, 0, True, Ramp("cosine", 2, 2.0), alternating=True)
    assert [convex.at(step) for step in range(4)] == [(0.5, 0), (0, 0.375), (0.75, 0), (0, 0.25)]


@pytest.mark.parametrize("warmup", [0, 3, 4, 100])
def test_image_steps_counts_the_steps_with_images(warmup: int) -> None:
    weights = TaskWeights(1.0, warmup, False, alternating=True)
    counted = [sum(weights.at(before)[0] > 0 for before in range(step)) for step in range(12)]
    assert [weights.image_steps(step) for step in range(12)] == counted
    assert TaskWeights(1.0, warmup, False).image_steps(7) == TaskWeights(0.0, 0, False, alternating=True).image_steps(7)


def test_the_weight_of_the_shifts_is_constant_or_falls_to_nothing() -> None:
    assert [ShiftWeight(0.1, 50).at(step) for step in (0, 49)] == [0.1, 0.1]
    falling = ShiftWeight(0.1, 50, "linear")
    assert [falling.at(step) for step in (0, 25, 49, 50)] == pytest.approx([0.1, 0.05, 0.002, 0.0])


def test_labels_are_filtered_until_their_step_and_then_the_images() -> None:
    assert [LabelFilters([(5000, 4)]).at(step) for step in (0, 4999, 5000, 9999)] == [4, 4, 1, 1]
    several = LabelFilters([(1000, 5), (2000, 4), (3000, 3)])
    assert [several.at(step) for step in (0, 999, 1000, 1999, 2000, 2999, 3000)] == [5, 5, 4, 4, 3, 3, 1]
    assert LabelFilters().at(0) == 1
