"""Real particles to datasets: what is stored, what is refused, and that a stop changes nothing."""

import gzip
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import aceray
from aceray.data.images import prepared
from aceray.data.particles import CTF_UNITS, IDENTITY_UNITS, OBSERVED_COLUMNS, open_particles, stack_from_table
from aceray.distributed import convert
from aceray.em.formation import shift_image
from aceray.em.fourier import crop_images
from aceray.em.projection import project_slice
from aceray.errors import ConfigError, DataError
from tests.data.conftest import children
from tests.data.inputs import SIDE, some_images, with_nan, write_stack, write_star
from tests.distributed.particles import write_particles

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not there")
COUNTS = {"a.mrcs": 500, "b.mrcs": 301}


@pytest.fixture
def star(tmp_path):
    """801 particles of two stacks, shuffled, with poses and half sets; at tmp_path / "in" / "p.star"."""
    for name, count in COUNTS.items():
        write_stack(tmp_path / "in" / name, some_images(count, seed=count))
    names = [f"{index + 1:06d}@{name}" for name, count in COUNTS.items() for index in range(count)]
    np.random.default_rng(5).shuffle(names)
    angles = np.random.default_rng(6).uniform(0, 180, (3, len(names)))
    columns = {
        name: list(values) for name, values in zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), angles, strict=True)
    }
    columns |= {"rlnOriginXAngst": [1.0] * len(names), "rlnOriginYAngst": [-4.0] * len(names)}
    columns["rlnRandomSubset"] = [1 + index % 2 for index in range(len(names))]
    return write_star(tmp_path / "in" / "p.star", names, **columns)


def rows_of(path, columns=("particle_id", "half_set", *IDENTITY_UNITS)):
    particles = open_particles(path)
    particles.verify()
    return particles.read(particles.row_groups(), columns).to_pandas()


def test_every_particle_is_stored_once_under_its_own_name(star, tmp_path):
    seen = []
    found = aceray.prepare(star, tmp_path / "set", on_progress=seen.append, shard_mib=1, dtype="float32")
    particles = open_particles(found.path)
    table = particles.read(particles.row_groups(), [*OBSERVED_COLUMNS, *IDENTITY_UNITS])
    stack = stack_from_table(table, particles.manifest, SIDE)
    rows = table.select(["stack_name", "stack_index", "source_row", *CTF_UNITS]).to_pandas()
    assert stack.particle_id.tolist() == list(range(801))
    assert sorted(rows["source_row"]) == list(range(801))
    # one permutation of the whole set: neighbours of the file are no neighbours here
    assert abs(np.corrcoef(rows["source_row"], np.arange(801))[0, 1]) < 0.15
    raw = {name: some_images(count, seed=count) for name, count in COUNTS.items()}
    for place in (0, 17, 400, 800):
        row = rows.iloc[place]
        expected, _ = prepared(
            torch.from_numpy(raw[row["stack_name"]][[row["stack_index"]]]),
            SIDE,
            SIDE,
            invert=False,
            normalise="background",
        )
        torch.testing.assert_close(stack.images[place], expected[0])
        assert row["defocus_u_angstrom"] == 15000 + row["source_row"]
    assert particles.manifest.noise_std == pytest.approx(1, abs=0.01) and particles.manifest.ctf
    assert particles.read_truth() is None
    assert [progress.particles_done for progress in seen] == [0, 801]


def test_the_files_beside_the_images(star, tmp_path):
    found = aceray.prepare(star, tmp_path / "set")
    names = {path.name for path in found.path.iterdir()}
    pictures = {"particles.png", "power_spectra.png", "defocus.png", "view_directions.png"}
    assert names == {"manifest.json", "particles-00000.parquet", "report.md", "refused.csv", "source.star"} | pictures
    assert (found.path / "source.star").read_bytes() == star.read_bytes()
    assert (
        "801" in found.report
        and "1.45 to 1.53 um" in found.report
        and found.report == (found.path / "report.md").read_text()
    )
    # it may be replaced as any other dataset
    with pytest.raises(DataError, match="not empty"):
        aceray.prepare(star, tmp_path / "set")
    aceray.prepare(star, tmp_path / "set", existing="keep")
    with pytest.raises(DataError, match="another input or other settings"):
        aceray.prepare(star, tmp_path / "set", existing="keep", seed=2)
    aceray.prepare(star, tmp_path / "set", existing="overwrite", box=8)
    assert open_particles(found.path).manifest.pixel_size_angstrom == pytest.approx(4.0)


def test_half_sets_are_drawn_or_those_of_the_input(star, tmp_path):
    rows = rows_of(aceray.prepare(star, tmp_path / "own", half="rlnRandomSubset").path)
    assert (rows["half_set"] == 1 + rows["source_row"] % 2).all()
    rows = rows_of(aceray.prepare(star, tmp_path / "drawn").path)
    assert abs((rows["half_set"] == 1).sum() - 400.5) < 1
    assert 0.4 < (rows["half_set"] == 1 + rows["source_row"] % 2).mean() < 0.6
    plain = write_star(star.with_name("plain.star"), ["1@a.mrcs", "2@a.mrcs"])
    with pytest.raises(DataError, match=r"no rlnRandomSubset.*--half random"):
        aceray.prepare(plain, tmp_path / "none", half="rlnRandomSubset")


def test_reference_poses_are_kept_only_when_asked_for(star, tmp_path):
    truth = open_particles(aceray.prepare(star, tmp_path / "set", poses="input", box=8).path).read_truth()
    assert truth is not None
    # minus the origin of (1, -4) A in pixels of 4 A
    torch.testing.assert_close(truth.shift_px, torch.tensor([[-0.25, 1.0]]).expand(801, 2))


def spoil(star: Path) -> None:
    """Three bad images in a.mrcs; b.mrcs is cut off in its last image but one."""
    images = with_nan(some_images(500, seed=500), 7)
    images[33] = 1.0
    images[[250, 251]] = np.inf
    write_stack(star.with_name("a.mrcs"), images)
    os.truncate(star.with_name("b.mrcs"), 1024 + 300 * SIDE * SIDE * 4 - 5)


def test_bad_images_are_left_out_and_named(star, tmp_path):
    spoil(star)
    found = aceray.prepare(star, tmp_path / "set")
    rows = rows_of(found.path)
    names = {f"{index + 1:06d}@{name}" for name, index in zip(rows["stack_name"], rows["stack_index"], strict=True)}
    lines = (found.path / "refused.csv").read_text().splitlines()[1:]
    refused = {line.split(",")[0]: line.split(",")[2] for line in lines}
    assert set(refused) == {
        "000008@a.mrcs",
        "000034@a.mrcs",
        "000251@a.mrcs",
        "000252@a.mrcs",
        "000300@b.mrcs",
        "000301@b.mrcs",
    }
    assert refused["000034@a.mrcs"] == "is constant" and refused["000301@b.mrcs"] == "the file is truncated"
    assert len(rows) == 795 and not names & set(refused)
    assert rows["particle_id"].tolist() == list(range(795))
    assert "Refused: 6 images" in found.report
    with pytest.raises(DataError, match=r"images would be refused .*leave out --strict"):
        aceray.prepare(star, tmp_path / "strict", strict=True)
    write_stack(star.with_name("b.mrcs"), some_images(301, seed=301))
    with pytest.raises(DataError, match=r"images would be refused \(row \d+ (is constant|holds values)"):
        aceray.prepare(star, tmp_path / "strict", strict=True)
    os.truncate(star.with_name("b.mrcs"), 1024 + 300 * SIDE * SIDE * 4 - 5)
    checked = aceray.check(star)
    assert len(checked.refused) == 2 and any("will be refused" in text for text in checked.findings.warnings)
    assert list(tmp_path.glob("strict*")) == []


def test_poses_that_the_input_does_not_have_cannot_be_kept(tmp_path):
    path = write_stack(tmp_path / "a.mrcs", some_images(20), pixel_size=2.0)
    with pytest.raises(DataError, match="has no poses to keep"):
        aceray.prepare(path, tmp_path / "set", poses="input")


def test_another_list_of_rows_is_another_set(star, tmp_path):
    (tmp_path / "rows.txt").write_text("1 2 3")
    aceray.prepare(star, tmp_path / "set", subset=str(tmp_path / "rows.txt"))
    assert sorted(rows_of(tmp_path / "set")["source_row"]) == [1, 2, 3]
    (tmp_path / "rows.txt").write_text("1 2 4")
    with pytest.raises(DataError, match="another input"):
        aceray.prepare(star, tmp_path / "set", existing="keep", subset=str(tmp_path / "rows.txt"))


def three_shards(monkeypatch) -> None:
    monkeypatch.setattr("aceray.data.convert.ROWS_PER_GROUP", 256)
    monkeypatch.setattr(
        "aceray.data.convert.Conversion.shards",
        property(lambda plan: [range(s, min(s + 256, len(plan.table))) for s in range(0, len(plan.table), 256)]),
    )


def test_a_conversion_that_was_stopped_goes_on_with_the_same_bytes(star, tmp_path, monkeypatch):
    """Bad images in the first shards: the later ones are numbered the same, whatever was known when they were made."""
    spoil(star)
    three_shards(monkeypatch)
    whole = children(aceray.prepare(star, tmp_path / "one" / "set").path)
    assert sum(name.endswith(".parquet") for name in whole) == 4

    def stop(progress):
        if progress.shards_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        aceray.prepare(star, tmp_path / "two" / "set", on_progress=stop)
    left = tmp_path / "two" / ".set.preparing"
    assert not (tmp_path / "two" / "set").exists() and len(list(left.iterdir())) == 2
    # one of two is lost, so the other's numbers were counted with particles that are unknown again
    (left / "particles-00000.parquet").unlink()
    with pytest.raises(DataError, match="unfinished conversion of other settings"):
        aceray.prepare(star, tmp_path / "two" / "set", seed=9)
    made = []
    monkeypatch.setattr(convert, "convert_shard", counted(convert.convert_shard, made))
    assert children(aceray.prepare(star, tmp_path / "two" / "set").path) == whole
    assert made == [0, 2, 3]
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["set"]


def counted(function, made):
    def counting(plan, shard, *rest):
        made.append(shard)
        return function(plan, shard, *rest)

    return counting


def test_shards_made_in_any_order_are_numbered_without_gaps(star, tmp_path, monkeypatch):
    """As with Ray tasks: each shard is made as if nothing were refused, then numbered again where it was wrong."""
    spoil(star)
    three_shards(monkeypatch)
    whole = children(aceray.prepare(star, tmp_path / "one").path)

    def backwards(plan, missing, made, folder, settings):
        for shard in reversed(missing):
            yield shard, convert.convert_shard(plan, shard, plan.shards[shard].start, folder)

    monkeypatch.setattr(convert, "_make", backwards)
    assert children(aceray.prepare(star, tmp_path / "two").path) == whole


def test_a_killed_conversion_goes_on_with_the_same_bytes(star, tmp_path):
    """SIGKILL in the middle, then the same command."""
    whole = children(aceray.prepare(star, tmp_path / "one").path)
    program = (
        "import sys, time, aceray, aceray.distributed.convert as c\n"
        "real = c.take_sample\n"
        "def slow(*a):\n    print('at work', flush=True)\n    time.sleep(60)\n"
        "c.convert_shard = slow\n"
        "aceray.prepare(sys.argv[1], sys.argv[2])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(aceray.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(star), str(tmp_path / "two")],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "at work\n"
        # while it lives nobody else writes there
        with pytest.raises(DataError, match="another process is writing"):
            aceray.prepare(star, tmp_path / "two")
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / ".two.preparing").is_dir()
    assert children(aceray.prepare(star, tmp_path / "two").path) == whole


def test_packed_stacks_give_the_same_images(star, tmp_path):
    whole = rows_of(aceray.prepare(star, tmp_path / "one").path, ["image", "stack_index"])
    for name in COUNTS:
        path = star.with_name(name)
        path.with_name(f"{name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        path.unlink()
    star.write_text(star.read_text().replace(".mrcs", ".mrcs.gz"))
    assert rows_of(aceray.prepare(star, tmp_path / "two").path, ["image", "stack_index"]).equals(whole)


def test_several_pixel_sizes_become_one(tmp_path):
    for side, name in ((32, "a"), (24, "b")):
        write_stack(tmp_path / f"{name}.mrcs", some_images(40, side=side))
    text = write_star(tmp_path / "p.star", ["1@a.mrcs", "2@b.mrcs", "3@a.mrcs"], rlnOpticsGroup=[1, 2, 1]).read_text()
    (tmp_path / "p.star").write_text(text.replace("0.1 2.0", "0.1 1.5\n2 opticsGroup2 300.0 2.7 0.1 2.0"))
    manifest = open_particles(aceray.prepare(tmp_path / "p.star", tmp_path / "set", box=16).path).manifest
    # 32 px of 1.5 A and 24 px of 2 A are both 48 A wide
    assert (manifest.box, manifest.pixel_size_angstrom) == (16, 3.0)


def test_a_check_finds_everything_and_writes_nothing(star, tmp_path):
    star.with_name("b.mrcs").unlink()
    star.write_text(star.read_text().replace("opticsGroup1 300.0", "opticsGroup1 -3"))
    checked = aceray.check(star, box=64)
    assert len(checked.findings.errors) == 3
    text = checked.markdown()
    for part in ("b.mrcs", "--datadir", "voltage_kv", "--box 64: is larger"):
        assert part in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    with pytest.raises(DataError, match="1 more error: see --check"):
        aceray.prepare(star, tmp_path / "set")
    with pytest.raises(ConfigError, match=r"--shard-mib: .*greater than or equal to 1.*found 0"):
        aceray.check(star, shard_mib=0)


def test_dark_particles_are_noticed(tmp_path):
    dark = -some_images(300, bright=1.0)
    path = write_stack(tmp_path / "a.mrcs", dark, pixel_size=2.0)
    assert any("look dark" in text and "give --invert" in text for text in aceray.check(path).findings.warnings)
    assert not any("look dark" in text for text in aceray.check(path, invert=True).findings.warnings)


@needs_shared
@pytest.mark.parametrize(
    ("name", "offset"), [("rln_proj_65", 1.0), ("rln_proj_65_shifted", 1.0), ("rln_proj_64_shifted", 0.0)]
)
def test_relions_projections_are_reproduced(tmp_path, name, offset):
    """relion_project's images from its volume with the angles and origins of the STAR file: the whole box.

    `offset` (px, along x and y) is that of RELION's 65-px images, whose origin is one pixel off the centre d // 2.
    """
    folder = SHARED / "relion_projections"
    made = aceray.prepare(folder / f"{name}.star", tmp_path / "set", pixel_size=1.0, normalise="none", poses="input",
                          dtype="float32")  # fmt: skip
    particles = open_particles(made.path)
    table = particles.read(particles.row_groups())
    images = stack_from_table(table, particles.manifest, particles.manifest.box).images
    truth = particles.read_truth()
    volume = torch.from_numpy(np.asarray(load_volume(folder / "aspire_clean70SRibosome_vol_65p.mrc")))
    # the 64-px images are Fourier crops, and their origins are in the pixels of the crop
    clean = crop_images(project_slice(volume, truth.rotation), images.shape[-1])
    expected = shift_image(clean, truth.shift_px + offset)
    for found, wanted in zip(images, expected, strict=True):
        assert float(torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1]) > 0.999


def load_volume(path):
    import mrcfile

    with mrcfile.open(path, permissive=True) as file:
        return np.array(file.data, dtype=np.float32)


def test_a_prepared_set_trains_as_any_other(tmp_path):
    """Images of a simulated set written as a stack and prepared: the run reads them, CTF and all."""
    particles = write_particles(tmp_path / "simulated", truth=True)
    table = particles.read(particles.row_groups())
    stack = stack_from_table(table, particles.manifest, 16)
    write_stack(tmp_path / "p.mrcs", stack.images.numpy())
    star = write_star(tmp_path / "p.star", [f"{index + 1}@p.mrcs" for index in range(1024)])
    aceray.prepare(star, tmp_path / "set")
    config = aceray.load_config(
        f"data.path={tmp_path / 'set'}", f"runs={tmp_path / 'runs'}", "tracking.enabled=false", "train.steps=6",
        "train.batch=32", "encoder.width=32", "encoder.depth=2", "optim.warmup_steps=2",
        "data.shift_sigma_fraction=0.02",
    )  # fmt: skip
    result = aceray.train(config)
    assert result.poses["particle_id"].tolist() == list(range(1024)) and result.volume.shape == (16, 16, 16)


@pytest.mark.usefixtures("ray_session")
def test_ray_tasks_make_the_same_bytes_as_this_process(star, tmp_path):
    spoil(star)
    options = {"shard_mib": 1, "dtype": "float32"}
    whole = children(aceray.prepare(star, tmp_path / "here", **options).path)
    assert children(aceray.prepare(star, tmp_path / "there", workers=2, **options).path) == whole
