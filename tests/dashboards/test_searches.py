"""The saved searches of dashboards/README.md, each in a real MLflow store that aceray has written."""

import json
from collections.abc import Iterator

import pytest
from mlflow import MlflowClient

from aceray.distributed.study_run import run_study
from aceray.errors import NonFiniteLoss
from aceray.folder import create_run_folder
from aceray.presets import load_config
from aceray.tracking.run import start_tracking
from aceray.tracking.study import start_study_tracking
from tests.dashboards.test_boards import table
from tests.distributed.particles import write_particles
from tests.distributed.test_study_run import Make

pytestmark = pytest.mark.slow
SEARCHES = {what: search.strip("`") for what, search in table("## Saved searches")}
# the names and values that a reader puts in, and what is found then
EXPECTED = {
    "all trials of a study": ({"pip_schedule": "tiny"}, {"weight_0.0", "weight_2.0"}),
    "trials that the scheduler stopped": ({"pip_schedule": "tiny"}, {"weight_2.0"}),
    "runs that failed": ({}, {"broken"}),
    "good poses, where the truth is known": ({}, {"good"}),
    "to Nyquist, where the truth is known": ({}, {"good"}),
    "good without truth": ({}, {"good"}),
    "refined to the end": ({}, {"good"}),
    "runs without PIP": ({}, {"broken", "weight_0.0"}),
    "runs of a preset": ({}, {"good"}),
    "runs on a dataset": ({}, {"good"}),
    "runs of a commit": ({}, {"good"}),
    "longer than an hour": ({}, {"good"}),
}
GOOD = {
    "pose/rotation_sqfrob_median": 0.01,
    "fsc/resolution_px_0.5": 2.0,
    "select/d4_consistency": 0.25,
    "pose/coverage": 1.0,
    "refine/moved": 0.001,
    "train/wall_seconds": 4000.0,
}
BAD = {
    "pose/rotation_sqfrob_median": 5.0,
    "fsc/resolution_px_0.5": 6.0,
    "select/d4_consistency": 3.0,
    "pose/coverage": 0.5,
    "refine/moved": 0.5,
    "train/wall_seconds": 60.0,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowClient]:
    """A study of two trials, one of which a scheduler stopped; a good run, and one that failed."""
    folder = tmp_path_factory.mktemp("searches")
    uri = f"sqlite:///{folder / 'ml.db'}"
    make = Make(folder, write_particles(folder / "blobs"))
    make.defaults, make.more = {"objective": "pose/coverage"}, ("tracking.enabled=true", f"tracking.uri={uri}")
    result = run_study(make(), "none")
    stopped = result.folder / "trials" / "weight_2.0"
    notes = json.loads((stopped / "trial.json").read_text())
    (stopped / "trial.json").write_text(json.dumps({**notes, "status": "stopped"}))
    with start_study_tracking(load_config(*make.more), "tiny", result.folder, {}) as study:
        study.follow(stopped)
    single = [f"runs={folder / 'runs'}", f"tracking.uri={uri}"]
    good = load_config("demo", "name=good", *single)
    commit = {"mlflow.source.git.commit": "41762d4" + 33 * "0"}
    tags = {"aceray.presets": "demo, method/ace_em", "aceray.dataset_sha256": "3f2a" + 60 * "0", **commit}
    with start_tracking(good, create_run_folder(good), tags) as tracker:
        tracker.summarise(1, GOOD)
    broken = load_config("name=broken", "pip.weight=0", *single)
    with pytest.raises(NonFiniteLoss), start_tracking(broken, create_run_folder(broken), {}) as tracker:
        tracker.summarise(1, BAD)
        raise NonFiniteLoss("training step 1: loss_ipi is nan")
    yield MlflowClient(tracking_uri=uri)


def test_every_search_of_the_table_is_tried() -> None:
    assert set(SEARCHES) == set(EXPECTED)


@pytest.mark.parametrize("what", SEARCHES)
def test_a_saved_search_finds_what_it_says(store: MlflowClient, what: str) -> None:
    put_in, expected = EXPECTED[what]
    search = SEARCHES[what]
    for name, value in put_in.items():
        assert name in search
        search = search.replace(name, value)
    experiment = store.get_experiment_by_name("aceray")
    assert experiment is not None
    found = {run.info.run_name for run in store.search_runs([experiment.experiment_id], search)}
    assert found == expected
