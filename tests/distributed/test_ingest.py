"""Both ways of reading give the same stack; damage is named through Ray's wrappers."""

import shutil
from pathlib import Path

import pytest
import torch

from aceray.data.particles import ParticleSet, ParticleStack, RowGroup, open_particles
from aceray.distributed import ingest
from aceray.distributed.failures import known_error
from aceray.distributed.ingest import collect, ordered, plan_reading, read_here, tasks
from aceray.errors import DataError


def assert_same(ours: ParticleStack, theirs: ParticleStack) -> None:
    assert torch.equal(ours.particle_id, theirs.particle_id)
    assert torch.equal(ours.images, theirs.images)
    assert ours.ctf is not None and theirs.ctf is not None
    for name in ingest.CTF_COLUMNS:
        assert torch.equal(getattr(ours.ctf, name), getattr(theirs.ctf, name))


def test_order_is_that_of_the_particles(particle_set: ParticleSet) -> None:
    groups = particle_set.row_groups()
    assert len(groups) == 4
    backwards = read_here(particle_set, groups[::-1], 12)
    assert backwards.images.shape == (1024, 12, 12)
    assert backwards.particle_id.tolist() == list(range(1024))
    assert_same(backwards, read_here(particle_set, groups, 12))
    some = read_here(particle_set, [RowGroup(1, 1), RowGroup(0, 0)], 16)
    assert some.particle_id.tolist() == [*range(256), *range(768, 1024)]


def test_parts_are_put_in_order(particle_set: ParticleSet) -> None:
    whole = read_here(particle_set, particle_set.row_groups(), 8)
    parts = [whole.take(torch.arange(start, 1024, 3)) for start in (2, 0, 1)]
    assert_same(ordered(parts), whole)


def test_portions_hold_every_group_once(particle_set: ParticleSet, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = particle_set.row_groups()
    assert list(tasks(particle_set, groups, 16)) == [groups]
    monkeypatch.setattr(ingest, "BYTES_A_TASK", 3 * 256 * 16 * 16 * 4)
    assert list(tasks(particle_set, groups, 16)) == [groups[:3], groups[3:]]
    monkeypatch.setattr(ingest, "BYTES_A_TASK", 1)
    assert list(tasks(particle_set, groups, 16)) == [[group] for group in groups]


def test_the_half_sets_share_no_particle_and_together_are_the_set(particle_set: ParticleSet) -> None:
    groups = particle_set.row_groups()
    halves = [read_here(open_particles(particle_set.path, half), groups, 12) for half in (1, 2)]
    first, second = (set(half.particle_id.tolist()) for half in halves)
    assert first == set(range(0, 1024, 2)) and second == set(range(1, 1024, 2))
    assert_same(ordered(halves), read_here(particle_set, groups, 12))
    columns = open_particles(particle_set.path, 2).read(groups[:1], ["particle_id"])
    assert columns.column_names == ["particle_id"] and len(columns) == 128


def test_a_half_set_without_particles_is_named(particle_set: ParticleSet) -> None:
    with pytest.raises(DataError, match=r"^data\.half_set: no particle"):
        read_here(open_particles(particle_set.path, 3), particle_set.row_groups(), 12)


@pytest.mark.usefixtures("ray_session")
def test_ray_data_reads_the_same(particle_set: ParticleSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "BYTES_A_TASK", 1)
    groups = particle_set.row_groups()[::-1]
    assert_same(collect(plan_reading(particle_set, groups, 12, 1).iterator()), read_here(particle_set, groups, 12))
    half = open_particles(particle_set.path, 2)
    assert_same(collect(plan_reading(half, groups, 12, 1).iterator()), read_here(half, groups, 12))

    shutil.copytree(particle_set.path, tmp_path / "copy")
    file = tmp_path / "copy" / particle_set.manifest.shards[1].file
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 3] ^= 1
    file.write_bytes(damaged)
    plan = plan_reading(open_particles(tmp_path / "copy"), groups, 12, 1)
    with pytest.raises(Exception) as error:
        collect(plan.iterator())
    found = known_error(error.value)
    assert isinstance(found, DataError)
    assert str(file) in str(found)
