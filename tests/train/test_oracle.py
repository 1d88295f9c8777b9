import pytest
import torch

from aceray.data.particles import Truth
from aceray.em.fourier import HalfDisc
from aceray.em.random import named_generator
from aceray.em.rotation import random_rotations
from aceray.errors import DataError
from aceray.train import oracle
from aceray.train.oracle import OracleProgress, run_oracle
from tests.train.phantom import BOX, PIXEL_SIZE_ANGSTROM, chiral_volume, projections

COUNT = 600


@pytest.fixture(autouse=True)
def _small_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "_SEARCH_RADIUS", 5.0)
    monkeypatch.setattr(oracle, "_SEARCH_NSIDE", 2)
    monkeypatch.setattr(oracle, "SEARCHED_PARTICLES", 300)


def scored(noise: float, rotation: torch.Tensor | None = None, sign: int = 1) -> tuple[dict, list[OracleProgress]]:
    particles, true, shift = projections(COUNT, noise=noise)
    events: list[OracleProgress] = []
    # the number of a particle, not its place, says which truth is its own
    back = torch.arange(COUNT - 1, -1, -1)
    truth = Truth((true if rotation is None else rotation)[back], sign * shift[back], back)
    result = run_oracle(
        particles, HalfDisc(BOX), truth, 3.0 * chiral_volume(), noise, PIXEL_SIZE_ANGSTROM, events.append
    )
    return result.metrics, events


def test_clean_images_are_solved() -> None:
    metrics, events = scored(1e-3)
    assert metrics["oracle/pose/rotation_sqfrob_median"] < 1e-5
    assert metrics["oracle/pose/rotation_sqfrob_mean"] < 1e-3
    assert metrics["oracle/pose/shift_sq_px_median"] < 1e-4
    assert metrics["oracle/fsc/resolution_px_0.5"] == 2
    assert metrics["oracle/fsc/nyquist_minus_4"] > 0.98
    assert metrics["oracle/particles"] == 300
    assert metrics["oracle/search_missed"] < 0.2
    assert [event.done for event in events] == sorted({event.done for event in events})
    assert events[-1] == OracleProgress(300, 300)


def test_noise_is_what_limits_it() -> None:
    less, _ = scored(0.2)
    more, _ = scored(1.0)
    assert less["oracle/pose/rotation_sqfrob_median"] < 0.3 * more["oracle/pose/rotation_sqfrob_median"]
    assert less["oracle/fsc/auc"] > more["oracle/fsc/auc"]


def test_a_wrong_truth_makes_no_map() -> None:
    wrong = random_rotations(COUNT, named_generator("tests/oracle"))
    assert scored(0.05, wrong)[0]["oracle/fsc/auc"] < 0.6
    assert scored(0.05, sign=-1)[0]["oracle/fsc/auc"] < scored(0.05)[0]["oracle/fsc/auc"] - 0.05


def test_every_particle_needs_its_truth() -> None:
    particles, rotation, shift = projections(COUNT)
    truth = Truth(rotation[:-1], shift[:-1], torch.arange(COUNT - 1))
    with pytest.raises(DataError, match="particle 599"):
        run_oracle(particles, HalfDisc(BOX), truth, chiral_volume(), 0.1, PIXEL_SIZE_ANGSTROM)
