"""One Ray session and one small data set for all tests of a run."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aceray.config import Config
from aceray.data.particles import ParticleSet
from aceray.presets import load_config
from tests.distributed.particles import write_particles

QUICK = (
    "seed=3",
    "train.steps=40",
    "train.batch=32",
    "train.evaluate_every=40",
    "train.checkpoint_every=10",
    "train.threads=1",
    "encoder.width=32",
    "encoder.depth=2",
    "optim.warmup_steps=5",
    "tracking.enabled=false",
    "refine=null",
)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of two cores; starting it takes seconds, so all tests share it."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def particle_set(tmp_path_factory: pytest.TempPathFactory) -> ParticleSet:
    return write_particles(tmp_path_factory.mktemp("data") / "blobs")


@pytest.fixture
def configure(tmp_path: Path, particle_set: ParticleSet) -> Callable[..., Config]:
    """A short run on the small set, below tmp_path; overrides win."""

    def make(*overrides: str) -> Config:
        return load_config(f"data.path={particle_set.path}", f"runs={tmp_path / 'runs'}", *QUICK, *overrides)

    return make
