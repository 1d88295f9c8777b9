"""Simulated datasets, shard by shard: in this process, or one Ray task for each shard. Both give the same bytes."""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from aceray.config import Config, Resources, Simulation
from aceray.data.location import Location, location
from aceray.data.manifest import ImageLayout
from aceray.data.particles import open_particles
from aceray.data.simulate import CtfRanges, Plan, Recipe, plan, simulate_shard
from aceray.data.storage import exclusive
from aceray.data.writer import ParticleWriter, WrittenShard, write_shard
from aceray.distributed.monitor import DataMonitor
from aceray.errors import ClusterError, ConfigError, DataError

# Below this Ray takes longer to start than the images to compute: 32,768 images of 32 px, 2,048 of 128 px.
_PIXELS_WORTH_RAY = 2**25

Made = TypeVar("Made")


@dataclass(frozen=True)
class SimulationProgress:
    """How far the writing of a dataset is."""

    shards_done: int
    shards: int
    particles_done: int
    particles: int


def simulate(
    config: Config,
    existing: Literal["error", "keep", "overwrite"] = "error",
    on_progress: Callable[[SimulationProgress], None] | None = None,
) -> Location:
    """Write the dataset that `config.simulation` describes to `config.data.path` and return that folder.

    existing="keep" leaves a dataset made by the same recipe as it is. With `resources.workers` = 0, or for a small set,
    the shards are made in this process, otherwise by Ray tasks, which must see the folder under the same path.

    Raises:
        ConfigError: there is no simulation to do, or a value of it makes no sense.
        DataError: the model cannot be used, the folder holds something else, or the disk refuses.
        ClusterError: Ray cannot be reached or lost a task for good.
    """
    if config.simulation is None:
        raise ConfigError("simulation: is null; add a preset such as data/spliceosome_32.")
    recipe = recipe_from(config.simulation)
    path = location(config.data.path).expanduser().resolve()
    digest = recipe.sha256()
    if existing == "keep" and _is_kept(path, digest):
        return path
    overwrite: Literal["overwrite", "error"] = "overwrite" if existing == "overwrite" else "error"
    # nothing keeps a second process out of an object store
    alone = exclusive(path) if isinstance(path, Path) else nullcontext()
    writing = ParticleWriter(path, recipe.layout, overwrite)
    with alone, writing as writer, closing(DataMonitor(path.name)) as monitor:
        planned = plan(recipe)
        done = 0
        monitor.report(done, recipe.particles, 0)
        for index, written in _make_shards(planned, writer.folder, config.resources):
            writer.add(index, written)
            done += written.shard.particles
            monitor.report(done, recipe.particles, 0)
            if on_progress is not None:
                on_progress(SimulationProgress(writer.shards, len(recipe.shards), done, recipe.particles))
        writer.write_truth_volume(planned.volume)
        return writer.finish(_source(planned, digest)).path


def recipe_from(simulation: Simulation) -> Recipe:
    """The recipe of a validated configuration."""
    values = simulation.model_dump()
    if values["ctf"] is not None:
        values["ctf"] = CtfRanges(**values["ctf"])
    return Recipe(**values)


def _is_kept(path: Location, digest: str) -> bool:
    """Whether the very dataset is there; False where there is nothing yet. Raises DataError for anything else."""
    try:
        if not any(path.iterdir()):
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return False  # the writer says what is wrong with it
    if open_particles(path).manifest.source.get("recipe_sha256") != digest:
        raise DataError(
            f"{path}: holds a dataset of another recipe; choose another data.path, or --existing overwrite."
        )
    return True


def aceray_version() -> str:
    """What made a dataset, for its manifest."""
    try:
        return importlib.metadata.version("aceray")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _source(planned: Plan, digest: str) -> dict[str, Any]:
    """What the manifest says about where the images come from."""
    return {
        "kind": "simulated",
        "molecule": planned.molecule,
        "recipe": dataclasses.asdict(planned.recipe),
        "recipe_sha256": digest,
        "aceray": aceray_version(),
    }


def _make_shards(planned: Plan, folder: Location, resources: Resources) -> Iterator[tuple[int, WrittenShard]]:
    recipe = planned.recipe
    small = recipe.particles * recipe.box**2 <= _PIXELS_WORTH_RAY
    if resources.workers == 0 or small:
        for shard in range(len(recipe.shards)):
            yield shard, _make_shard(planned, shard, folder, recipe.layout)
    else:
        yield from _make_shards_on_ray(planned, folder, resources)


def _make_shard(planned: Plan, shard: int, folder: Location, layout: ImageLayout) -> WrittenShard:
    images, columns = simulate_shard(planned, shard)
    return write_shard(folder, shard, layout, images, columns)


def _make_shards_on_ray(planned: Plan, folder: Location, resources: Resources) -> Iterator[tuple[int, WrittenShard]]:
    """Shards in the order in which the cluster finishes them."""
    layout, shards = planned.recipe.layout, range(len(planned.recipe.shards))
    arguments = {shard: (shard, folder, layout) for shard in shards}
    return results_of_tasks(_make_shard, planned, arguments, resources.address, len(arguments))


def results_of_tasks(
    function: Callable[..., Made], plan: Any, arguments: Mapping[int, tuple], address: str | None, at_once: int
) -> Iterator[tuple[int, Made]]:
    """`function(plan, *arguments[key])` by Ray Data, a core each and so many at once; key and result as they come.

    Raises:
        AcerayError: what a task raised.
        ClusterError: Ray cannot be reached or lost a task for good.
    """
    import ray

    from aceray.distributed.cluster import connect, prepare_ray_data
    from aceray.distributed.failures import known_error

    with connect(address):
        prepare_ray_data()
        keys = ray.data.from_items([{"key": key} for key in arguments], override_num_blocks=len(arguments))
        made = keys.map_batches(
            _Make(function, ray.put(plan), dict(arguments)),
            batch_size=1,
            num_cpus=1,
            compute=ray.data.TaskPoolStrategy(size=min(at_once, len(arguments))),
        )
        try:
            for row in made.iter_rows():
                yield int(row["key"]), row["made"]
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise known_error(error) or ClusterError(
                f"Ray lost a task that makes a shard ({reason}); check the nodes' memory."
            ) from error


class _Make:
    """What a task of Ray Data does: the results of the keys it is given."""

    def __init__(self, function: Callable[..., Any], plan: Any, arguments: Mapping[int, tuple]) -> None:
        self._function, self._plan, self._arguments = function, plan, arguments

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import ray

        keys = batch["key"].tolist()
        made = np.empty(len(keys), dtype=object)
        made[:] = [self._function(ray.get(self._plan), *self._arguments[key]) for key in keys]
        return {"key": batch["key"], "made": made}
