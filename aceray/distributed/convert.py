"""Real particles to a dataset: checked first, converted shard by shard, here or by Ray Data; a stop can be resumed."""

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from aceray.data.convert import (
    Conversion,
    ConvertedShard,
    Sample,
    Treatment,
    convert_shard,
    plan_conversion,
    take_sample,
)
from aceray.data.location import Location, location
from aceray.data.manifest import Shard
from aceray.data.particle_table import Findings
from aceray.data.particles import open_particles
from aceray.data.report import facts_of_conversion, facts_of_source, markdown
from aceray.data.source import Source, SourceFiles, open_source
from aceray.data.stacks import open_stack, unpack
from aceray.data.storage import local_copy, written_atomically
from aceray.data.writer import ResumableWriter, WrittenShard, renumber_shard
from aceray.distributed.monitor import DataMonitor
from aceray.distributed.prepare import SimulationProgress, aceray_version, results_of_tasks
from aceray.em.rotation import rotation_from_relion
from aceray.errors import DataError
from aceray.preparation import InputParts, Preparation

Existing = Literal["error", "keep", "overwrite"]
_OWN_POSES = "input"


@dataclass(frozen=True)
class Checked:
    """What a look at an input found: facts by name, and everything that is wrong."""

    facts: dict[str, str]
    findings: Findings
    refused: tuple[tuple[int, str], ...]

    def markdown(self) -> str:
        """The report in words."""
        return markdown(self.facts, self.findings, self.refused)


@dataclass(frozen=True)
class Prepared:
    """A dataset that was made of real particles, and the report that is beside it."""

    path: Location
    report: str


def check(source: str | Path, settings: Preparation) -> Checked:
    """Find everything that would go wrong, all at once, before any work is done: nothing is written.

    All metadata and headers are read, and a few images. Raises DataError when the input cannot be read at all.
    """
    findings = Findings()
    opened = open_source(source_files(source, settings, settings.poses), findings)
    facts = facts_of_source(opened)
    try:
        plan = plan_conversion(opened, _treatment(settings), findings)
    except DataError as error:
        if error.line not in findings.errors and not any(error.line.startswith(each) for each in findings.errors):
            findings.errors.append(error.line)
        return Checked(facts, findings, ())
    sample = take_sample(plan, findings, source)
    if settings.strict and (plan.refused or sample.refused):
        findings.errors.append(_strict(source, plan.refused))
    return Checked(facts | facts_of_conversion(plan, sample), findings, plan.refused)


def prepare_particles(
    source: str | Path,
    out: str | Path,
    settings: Preparation,
    existing: Existing = "error",
    on_progress: Callable[[SimulationProgress], None] | None = None,
) -> Prepared:
    """Write the particles of a .star, .cs, .txt or stack as a dataset at `out`.

    A conversion that was stopped, even killed, goes on when it is called again and gives the same bytes.
    existing="keep" leaves a dataset of the same input and settings as it is.

    Raises:
        DataError: something is wrong with the input, `out` holds something else, or a disk refuses.
        ClusterError: Ray cannot be reached or lost a task for good.
    """
    findings = Findings()
    opened = open_source(source_files(source, settings, settings.poses), findings)
    plan = plan_conversion(opened, _treatment(settings), findings)
    findings.raise_errors()
    path = location(out).expanduser().resolve()
    if existing == "keep" and (path / "manifest.json").exists():
        return _kept(path, plan)
    if settings.strict and plan.refused:
        raise DataError(_strict(source, plan.refused))
    with ResumableWriter(path, plan.layout, plan.sha256, "overwrite" if existing == "overwrite" else "error") as writer:
        plan = _unpacked(plan, writer.work)
        sample = take_sample(plan, findings, source)
        made = _converted(plan, writer, source, settings, on_progress)
        refused = [*plan.refused, *(each for shard in made for each in shard.refused)]
        facts = facts_of_source(opened) | facts_of_conversion(plan, sample)
        report = markdown(facts, findings, refused)
        with written_atomically(writer.folder / "report.md") as file:
            file.write_text(report, encoding="utf-8")
        _write_refused(writer.folder / "refused.csv", opened, refused)
        _draw(writer.folder, opened, plan, sample)
        original = _copy_original(writer.folder, opened)
        particles = writer.finish(_origin(opened, plan, original, len(refused)))
    return Prepared(particles.path, report)


def source_files(source: str | Path, settings: InputParts, poses: str | None = None) -> SourceFiles:
    """What the settings say about the parts of an input."""

    def path(name: str | None) -> Path | None:
        return None if name is None else Path(name).expanduser()

    datadir = None if settings.datadir is None else location(settings.datadir).expanduser()

    return SourceFiles(
        path=location(source).expanduser(),
        datadir=datadir,
        passthrough=tuple(location(name).expanduser() for name in settings.passthrough),
        ctf=path(settings.ctf),
        poses=path(None if poses == _OWN_POSES else poses),
        pixel_size_angstrom=settings.pixel_size,
    )


def _treatment(settings: Preparation) -> Treatment:
    return Treatment(
        box=settings.box,
        invert=settings.invert,
        normalise=settings.normalise,
        image_dtype=settings.dtype,
        half=settings.half,
        subset=settings.subset,
        keep_poses=settings.poses is not None,
        seed=settings.seed,
        shard_mib=settings.shard_mib,
    )


def _strict(source: str | Path, refused: tuple[tuple[int, str], ...]) -> str:
    first = f"row {refused[0][0] + 1} {refused[0][1]}" if refused else "see the warnings"
    return f"{source}: {len(refused) or 'some'} images would be refused ({first}); repair them or leave out --strict."


def _kept(path: Location, plan: Conversion) -> Prepared:
    if open_particles(path).manifest.source.get("recipe_sha256") != plan.sha256:
        raise DataError(
            f"{path}: holds a dataset of another input or other settings; choose another --out, or overwrite."
        )
    report = path / "report.md"
    return Prepared(path, report.read_text(encoding="utf-8") if report.exists() else "")


def _unpacked(plan: Conversion, work: Location) -> Conversion:
    """The plan with every compressed stack unpacked in the working folder, unless that was done before."""
    stacks = list(plan.stacks)
    for number in np.unique(plan.table.stack).tolist():
        stack = stacks[number]
        if stack is not None and stack.compression is not None:
            if not isinstance(work, Path):
                raise DataError(f"{stack.path}: is compressed, which needs a local --out; unpack it first.")
            target = work / f"unpacked-{number:06d}.mrcs"
            if not target.exists():
                unpack(stack, target)
            stacks[number] = open_stack(target)
    return dataclasses.replace(plan, stacks=tuple(stacks))


def _converted(
    plan: Conversion,
    writer: ResumableWriter,
    source: str | Path,
    settings: Preparation,
    on_progress: Callable[[SimulationProgress], None] | None,
) -> list[ConvertedShard]:
    """All shards, in order and numbered without gaps; those of an earlier attempt are taken over."""
    made = {shard: found for shard in range(len(plan.shards)) if (found := _read_record(writer, shard)) is not None}

    def tell(monitor: DataMonitor) -> None:
        done = sum(len(plan.shards[shard]) for shard in made)
        refused = len(plan.refused) + sum(len(converted.refused) for converted in made.values())
        monitor.report(done, len(plan.table), refused)
        if on_progress is not None:
            on_progress(SimulationProgress(len(made), len(plan.shards), done, len(plan.table)))

    missing = [shard for shard in range(len(plan.shards)) if shard not in made]
    with closing(DataMonitor(writer.path.name)) as monitor:
        tell(monitor)
        for shard, converted in _make(plan, missing, made, writer.folder, settings):
            if settings.strict and converted.refused:
                raise DataError(_strict(source, converted.refused))
            _write_record(writer, shard, converted)
            made[shard] = converted
            tell(monitor)
    first_id, finished = 0, []
    for shard in sorted(made):
        converted = made[shard]
        if converted.first_id != first_id:
            written = renumber_shard(writer.folder, converted.written, first_id)
            converted = dataclasses.replace(converted, written=written, first_id=first_id)
            _write_record(writer, shard, converted)
        writer.add(shard, converted.written)
        finished.append(converted)
        first_id += converted.written.shard.particles
    return finished


def _make(
    plan: Conversion, missing: list[int], made: dict[int, ConvertedShard], folder: Location, settings: Preparation
) -> Iterator[tuple[int, ConvertedShard]]:
    """The missing shards. Particles are numbered as if none of an unknown shard were refused; corrected later."""
    if settings.workers > 0:
        arguments = {shard: (shard, plan.shards[shard].start, folder) for shard in missing}
        yield from results_of_tasks(convert_shard, plan, arguments, settings.address, settings.workers)
        return
    for shard in missing:
        before = [made.get(earlier) for earlier in range(shard)]
        known = sum(each.written.shard.particles for each in before if each is not None)
        guessed = sum(len(plan.shards[earlier]) for earlier, each in enumerate(before) if each is None)
        yield shard, convert_shard(plan, shard, known + guessed, folder)


def _record(writer: ResumableWriter, shard: int) -> Location:
    return writer.work / f"shard-{shard:05d}.json"


def _write_record(writer: ResumableWriter, shard: int, converted: ConvertedShard) -> None:
    with written_atomically(_record(writer, shard)) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(converted)))


def _read_record(writer: ResumableWriter, shard: int) -> ConvertedShard | None:
    """What an earlier attempt wrote of a shard, if the shard itself is there in full."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        values = json.loads(_record(writer, shard).read_text())
        stored = Shard(**values["written"]["shard"])
        if (writer.folder / stored.file).stat().st_size == stored.bytes:
            written = WrittenShard(stored, values["written"]["background_variance"])
            refused = tuple((int(row), str(reason)) for row, reason in values["refused"])
            return ConvertedShard(written, values["first_id"], refused)
    return None


def _write_refused(path: Location, source: Source, refused: list[tuple[int, str]]) -> None:
    with written_atomically(path) as file, open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image", "row", "reason"])
        writer.writerows([source.table.label(row), row, reason] for row, reason in sorted(refused))


def _draw(folder: Location, source: Source, plan: Conversion, sample: Sample) -> None:
    """particles.png, power_spectra.png and, where the input has what they show, defocus.png and view_directions.png."""
    from aceray.train.figures import view_figure
    from aceray.train.particle_figures import contact_sheet, defocus_figure, power_figure

    size = plan.layout.pixel_size_angstrom
    figures = {"particles": contact_sheet(sample.images, size), "power_spectra": power_figure(sample.images, size)}
    if plan.table.ctf is not None:
        figures["defocus"] = defocus_figure(plan.table.ctf)
    pose = source.table.pose
    if pose is not None and np.ptp(pose["tilt_deg"]) > 0:
        angles = [torch.from_numpy(pose[name][plan.table.source_row]) for name in ("rot_deg", "tilt_deg", "psi_deg")]
        figures["view_directions"] = view_figure(rotation_from_relion(*angles))
    for name, figure in figures.items():
        with written_atomically(folder / f"{name}.png") as file:
            figure.savefig(file, format="png", metadata={"Software": None})


def _copy_original(folder: Location, source: Source) -> str | None:
    """What the input said, kept with the dataset, so that poses can go back into it; the file's name, or None."""
    if source.original is None:
        return None
    if isinstance(source.original, np.ndarray):
        # with the columns of the passthrough files
        with written_atomically(folder / "source.cs") as file, open(file, "wb") as stream:
            np.save(stream, source.original, allow_pickle=False)
        return "source.cs"
    with written_atomically(folder / "source.star") as file, local_copy(source.files.path) as copy:
        shutil.copyfile(copy, file)
    return "source.star"


def _origin(source: Source, plan: Conversion, original: str | None, refused: int) -> dict[str, Any]:
    """What the manifest says about where the images come from."""
    found = [stack for stack in source.stacks if stack is not None]
    return {
        "kind": "prepared",
        "input": str(source.files.path.absolute()),
        "original": original,
        "original_pixel_size_angstrom": source.files.pixel_size_angstrom,
        "boxes": sorted({stack.box for stack in found}),
        "pixel_sizes_angstrom": np.unique(plan.table.pixel_size_angstrom.round(6)).tolist(),
        "treatment": dataclasses.asdict(plan.treatment),
        "refused": refused,
        "recipe_sha256": plan.sha256,
        "aceray": aceray_version(),
    }
