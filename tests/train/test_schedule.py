"""Schedules at their edges."""

import pytest

from aceray.train.schedule import TaskWeights, WarmupCosine, WarmupMultiStep


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
