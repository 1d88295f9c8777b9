import errno
from pathlib import Path

import numpy as np
import pytest

from aceray.config import Config, CtfRanges
from aceray.data import simulate
from aceray.data.particles import OBSERVED_COLUMNS, TRUTH_COLUMNS, open_particles
from aceray.distributed import prepare
from aceray.errors import ConfigError, DataError
from aceray.presets import load_config
from tests.data.conftest import children
from tests.data.test_atoms import pdb_text


@pytest.fixture
def molecule(tmp_path: Path) -> Path:
    generator = np.random.default_rng(8)
    path = tmp_path / "molecule.pdb"
    path.write_text(pdb_text(*(("C", *generator.normal(0, 4, 3).clip(-8, 8)) for _ in range(50))))
    return path


@pytest.fixture
def describe(tmp_path: Path, molecule: Path):
    """A set of 90 small images in three shards, at tmp_path / "out" / "set"; overrides win."""

    def make(*overrides: str) -> Config:
        quick = ("box=16", "pixel_size_angstrom=2.5", "particles=90", "rows_per_shard=40", f"model={molecule}")
        fixed = [f"data.path={tmp_path / 'out' / 'set'}", *(f"simulation.{setting}" for setting in quick)]
        return load_config("data/spliceosome_32", *fixed, *overrides)

    return make


def test_the_dataset_is_what_the_configuration_says(describe, tmp_path):
    seen = []
    path = prepare.simulate(describe("simulation.snr_db=-6"), on_progress=seen.append)
    assert path == tmp_path / "out" / "set"
    particles = open_particles(path)
    particles.verify()
    manifest = particles.manifest
    assert (manifest.particles, manifest.box, manifest.pixel_size_angstrom, manifest.ctf) == (90, 16, 2.5, True)
    assert [shard.particles for shard in manifest.shards] == [40, 40, 10]
    assert manifest.image_dtype == "float16"
    assert particles.read_truth() is not None and particles.read_truth_volume() is not None
    assert manifest.source["recipe"]["snr_db"] == -6 and manifest.source["molecule"] == "molecule.pdb"
    assert [(p.shards_done, p.shards, p.particles_done, p.particles) for p in seen] == [
        (1, 3, 40, 90),
        (2, 3, 80, 90),
        (3, 3, 90, 90),
    ]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["set"]


def test_the_noise_level_is_measured_on_the_images_not_copied_from_the_recipe(describe, monkeypatch):
    path = prepare.simulate(describe("simulation.snr_db=-20"))
    assert open_particles(path).manifest.noise_std == pytest.approx(10.0, rel=0.03)
    monkeypatch.setattr(simulate, "noise_std_for_snr", lambda *_: 4.0)
    path = prepare.simulate(describe("simulation.snr_db=-20"), "overwrite")
    assert open_particles(path).manifest.noise_std == pytest.approx(4.0, rel=0.05)


def test_the_settings_and_the_recipe_have_the_same_fields_and_defaults():
    simulation = load_config("data/spliceosome_32").simulation
    assert simulation is not None
    recipe = prepare.recipe_from(simulation)
    assert recipe.model == "5NRL" and recipe.ctf == simulate.CtfRanges()
    assert CtfRanges().model_dump() == vars(simulate.CtfRanges())


def test_without_a_simulation_there_is_nothing_to_do():
    with pytest.raises(ConfigError, match="simulation: is null"):
        prepare.simulate(load_config())


# ---- what is there already ----------------------------------------------------------------------------------------


def test_an_existing_set_is_an_error_by_default(describe, tmp_path):
    prepare.simulate(describe())
    before = children(tmp_path)
    with pytest.raises(DataError, match="set: the folder exists and is not empty"):
        prepare.simulate(describe("simulation.seed=9"))
    assert children(tmp_path) == before


def test_a_set_of_the_same_recipe_is_kept_without_any_work(describe, tmp_path, monkeypatch):
    prepare.simulate(describe())
    before = children(tmp_path)
    monkeypatch.setattr(prepare, "plan", lambda *_: pytest.fail("the set was planned again"))
    assert prepare.simulate(describe(), "keep") == tmp_path / "out" / "set"
    assert children(tmp_path) == before


def test_a_set_of_another_recipe_is_not_kept(describe, tmp_path):
    prepare.simulate(describe())
    before = children(tmp_path)
    with pytest.raises(DataError, match="holds a dataset of another recipe"):
        prepare.simulate(describe("simulation.seed=9"), "keep")
    assert children(tmp_path) == before


def test_a_damaged_set_is_not_kept(describe):
    path = prepare.simulate(describe())
    (path / "particles-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"particles-00001\.parquet: is missing"):
        prepare.simulate(describe(), "keep")


def test_a_foreign_folder_is_neither_kept_nor_overwritten(describe, tmp_path):
    folder = tmp_path / "out" / "set"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("precious")
    before = children(tmp_path)
    for existing in ("error", "keep", "overwrite"):
        with pytest.raises(DataError, match="set: "):
            prepare.simulate(describe(), existing)
    assert children(tmp_path) == before


def test_where_there_is_nothing_keep_makes_the_set(describe):
    assert open_particles(prepare.simulate(describe(), "keep")).manifest.particles == 90


def test_overwriting_gives_the_other_set(describe):
    prepare.simulate(describe())
    path = prepare.simulate(describe("simulation.seed=9", "simulation.ctf=null"), "overwrite")
    assert not open_particles(path).manifest.ctf


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_leaves_nothing(describe, tmp_path, monkeypatch):
    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("aceray.data.writer.pq.write_table", no_space)
    with pytest.raises(DataError, match=r"No space left on device.*free some space") as caught:
        prepare.simulate(describe())
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("simulation.model=nowhere.pdb", r"nowhere\.pdb: there is no such file"),
        ("simulation.pixel_size_angstrom=0.5", "needs .* A in every direction"),
    ],
)
def test_a_model_that_cannot_be_used_leaves_nothing(describe, tmp_path, override, message):
    with pytest.raises(DataError, match=message):
        prepare.simulate(describe(override))
    assert not (tmp_path / "out" / "set").exists()
    assert list((tmp_path / "out").iterdir()) == []


def test_stopping_half_way_leaves_nothing(describe, tmp_path):
    def stop(progress):
        if progress.shards_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.simulate(describe(), on_progress=stop)
    assert list((tmp_path / "out").iterdir()) == []


# ---- Ray ----------------------------------------------------------------------------------------------------------


def refuse(planned, shard, folder, layout):
    """Stands in for a shard whose disk is full, in a Ray worker."""
    raise DataError(f"{folder.name}/shard {shard}: cannot write it (No space left on device)")


@pytest.mark.usefixtures("ray_session")
def test_ray_tasks_make_the_same_bytes_as_this_process(describe, tmp_path, monkeypatch):
    here = prepare.simulate(describe("simulation.snr_db=0"))
    content = children(here)
    monkeypatch.setattr(prepare, "_PIXELS_WORTH_RAY", 0)
    monkeypatch.setattr(prepare, "simulate_shard", lambda *_: pytest.fail("made in this process"))
    seen = []
    there = prepare.simulate(describe("simulation.snr_db=0", "resources.workers=2"), "overwrite", seen.append)
    assert children(there) == content
    assert sorted(p.particles_done for p in seen)[-1] == 90 and len(seen) == 3


@pytest.mark.usefixtures("ray_session")
def test_a_failing_ray_task_is_the_one_line_it_raised(describe, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_PIXELS_WORTH_RAY", 0)
    monkeypatch.setattr(prepare, "_make_shard", refuse)
    with pytest.raises(DataError, match=r"^\.set\.\w+\.partial/shard \d: cannot write it \(No space left on device\)$"):
        prepare.simulate(describe("resources.workers=2"))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_small_set_does_not_start_ray(describe, monkeypatch):
    monkeypatch.setattr(prepare, "_make_shards_on_ray", lambda *_: pytest.fail("Ray was asked"))
    assert prepare.simulate(describe("resources.workers=2")).is_dir()


def test_columns_of_every_shard_are_there(describe):
    particles = open_particles(prepare.simulate(describe()))
    table = particles.read(particles.row_groups(), [*OBSERVED_COLUMNS, *TRUTH_COLUMNS])
    assert table.num_rows == 90 and not any(table[name].null_count for name in table.column_names)
