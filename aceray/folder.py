"""The folder that every run leaves: settings, checkpoints, journal and results, each file whole or absent."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from aceray.config import Config
from aceray.data.mrc import read_volume
from aceray.data.storage import hidden_sibling, storage_error, written_atomically
from aceray.errors import ConfigError, DataError
from aceray.presets import flat, load_config, to_yaml

if TYPE_CHECKING:
    import pandas

Existing = Literal["error", "resume", "overwrite"]
Row = dict[str, Any]
"""One step of the journal: `step`, losses and metrics; None where a number was not finite."""
# Settings that a resumed run may change: they decide where and how it runs and what is kept, not what is computed.
FREE_SETTINGS = (
    "presets",
    "name",
    "runs",
    "simulation",
    "data.path",
    "resources",
    "tracking",
    "train.evaluate_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.threads",
)
_FREE = tuple(f"{key}." for key in FREE_SETTINGS)


@dataclass(frozen=True)
class RunResult:
    """What a run left: the metrics of its evaluation, its folder with all files, and its MLflow run if tracked."""

    metrics: dict[str, float]
    folder: Path
    paths: dict[str, Path]
    mlflow_run_id: str | None

    @cached_property
    def volume(self) -> np.ndarray:
        """Reconstructed volume (d, d, d), axes z, y, x."""
        return read_volume(self.paths["volume"])[0].numpy()

    @cached_property
    def poses(self) -> "pandas.DataFrame":
        """One row per particle: RELION angles in degrees, origins in angstrom, the residual of the image."""
        import pandas

        return pandas.read_parquet(self.paths["poses"])


class RunFolder:
    """Names and atomic writes of the files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.json"
        self.history = path / "history.jsonl"
        self.volume = path / "volume.mrc"
        self.half_maps = (path / "half_1.mrc", path / "half_2.mrc")  # of refined poses
        self.mask = path / "mask.mrc"  # that the volume was cut to, the half maps not
        self.poses = path / "poses.parquet"
        self.poses_star = path / "poses.star"
        self.fsc = path / "fsc.csv"
        self.half_map_fsc = path / "half_map_fsc.csv"
        self.figures = path / "figures"
        self.checkpoints = path / "checkpoints"
        self.notes = path / "run.json"
        self.scratch = path / ".scratch"  # what a cluster keeps here while it trains
        self.trial = path / "trial.json"  # what a study knows of this run

    @property
    def paths(self) -> dict[str, Path]:
        """The files of the run that exist, by name."""
        names = (
            "config",
            "metrics",
            "history",
            "volume",
            "mask",
            "poses",
            "poses_star",
            "fsc",
            "half_map_fsc",
            "figures",
        )
        found = {name: getattr(self, name) for name in (*names, "checkpoints")}
        found |= {path.stem: path for path in self.half_maps}
        return {name: path for name, path in found.items() if path.exists()}

    def checkpoint_file(self, step: int) -> Path:
        """File of the checkpoint after `step` steps."""
        return self.checkpoints / f"step-{step:06d}.safetensors"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return sorted(int(file.stem.removeprefix("step-")) for file in self.checkpoints.glob("step-*.safetensors"))

    def is_finished(self, steps: int) -> bool:
        """Whether a run of so many steps has come to its end here, results and all."""
        return self.metrics.exists() and self.checkpoint_steps()[-1:] == [steps]

    def is_free(self) -> bool:
        """Whether a run may begin here: there is no file, or none but what a study or a kill left before its start."""
        files = (path for path in self.path.rglob("*") if not path.is_dir())
        return all(path == self.trial or path.name.endswith(".partial") for path in files)

    def write_checkpoint(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], keep: int) -> Path:
        """Write the checkpoint of `metadata["step"]` whole, with its digest, then delete all but the newest `keep`."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        described = json.dumps(metadata, sort_keys=True)
        header = {"aceray": described, "sha256": _digest(tensors, described)}
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        file = self.checkpoint_file(int(metadata["step"]))
        with written_atomically(file) as part:
            part.write_bytes(save(tensors, metadata=header))
        for step in self.checkpoint_steps()[:-keep]:
            self.checkpoint_file(step).unlink(missing_ok=True)
        return file

    def read_checkpoint(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and metadata of a checkpoint; a damaged file is a DataError that names it."""
        file = self.checkpoint_file(step)
        try:
            with safe_open(file, framework="pt") as opened:
                header = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise DataError(
                f"{file}: there is no such checkpoint; this run has steps {self.checkpoint_steps()}"
            ) from None
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file}: the checkpoint is damaged ({error}); {self._without(step)}") from error
        described = header.get("aceray")
        if described is None:
            raise DataError(f"{file}: not a checkpoint of aceray; {self._without(step)}")
        if header.get("sha256") != _digest(tensors, described):
            raise DataError(f"{file}: the checkpoint is damaged (its digest differs); {self._without(step)}")
        return tensors, json.loads(described)

    def set_aside_damaged(self) -> list[Path]:
        """Rename the newest checkpoints that are damaged, so that the newest whole one is the last; what was renamed.

        Raises DataError when none is whole.
        """
        aside: list[Path] = []
        for step in reversed(self.checkpoint_steps()):
            try:
                self.read_checkpoint(step)
            except DataError:
                if step == self.checkpoint_steps()[0]:
                    raise
                file = self.checkpoint_file(step)
                aside.append(file.replace(file.with_suffix(".damaged")))
                continue
            break
        return aside

    def drop_unrecorded(self) -> list[int]:
        """Delete the checkpoints beyond the last row of the history, where there is one before it; what was deleted.

        A kill leaves them between a checkpoint and its row; a run that went on from there would never write the row.
        """
        rows, steps = self.read_history(), self.checkpoint_steps()
        beyond = [step for step in steps if rows and step > rows[-1]["step"]]
        if len(beyond) == len(steps):
            return []
        for step in beyond:
            self.checkpoint_file(step).unlink()
        return beyond

    def _without(self, step: int) -> str:
        earlier = [other for other in self.checkpoint_steps() if other < step]
        return f"delete it and resume, which starts again from step {earlier[-1] if earlier else 0}"

    def remove_if_nothing_done(self) -> None:
        """Take the folder away when its run never made a step, so that the name is free again."""
        if not self.checkpoint_steps() and not self.read_history():
            shutil.rmtree(self.path, ignore_errors=True)

    def read_notes(self) -> dict[str, Any]:
        """What a resumed run must know: the MLflow run and the digest of the data set."""
        return json.loads(self.notes.read_text()) if self.notes.exists() else {}

    def write_notes(self, **notes: Any) -> None:
        """Add to the notes."""
        write_json(self.notes, self.read_notes() | notes)

    def read_history(self) -> list[Row]:
        """Rows of the journal, by step; a last line that was cut off by a kill is left out."""
        rows = []
        if self.history.exists():
            for line in self.history.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    rows.append(json.loads(line))
        return rows

    def cut_history(self, step: int) -> list[Row]:
        """Drop the rows after `step`, which a resumed run writes again; returns what is left."""
        rows = [row for row in self.read_history() if row["step"] <= step]
        with written_atomically(self.history) as file:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return rows


def create_run_folder(config: Config, existing: Existing = "error") -> RunFolder:
    """The folder of the run that `config` describes, with its config.yaml.

    A folder that holds something is an error, unless it is a run to resume (with the same settings) or to overwrite.

    Raises:
        DataError: the folder is not empty, is no run, or cannot be written.
        ConfigError: the run to resume had another value of a setting that changes the result.
    """
    if existing not in get_args(Existing):
        raise ConfigError(f'existing: found {existing!r}; expected one of "error", "resume", "overwrite"')
    folder = RunFolder(run_path(config))
    if folder.path.exists() and not folder.path.is_dir():
        raise DataError(f"{folder.path}: is a file; the run needs a folder there, choose another name or runs")
    if folder.path.exists() and not folder.is_free():
        match existing:
            case "error":
                raise DataError(f"{folder.path}: {_describe(folder)}")
            case "resume":
                check_same_settings(open_run_folder(folder.path), config)
            case "overwrite":
                take_away(open_run_folder(folder.path).path)
    try:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        for left in folder.path.rglob(".*.partial"):
            left.unlink()
        shutil.rmtree(folder.scratch, ignore_errors=True)
    except OSError as error:
        raise storage_error(folder.path, error) from error
    with written_atomically(folder.config) as file:
        file.write_text(to_yaml(config))
    return folder


def run_path(config: Config) -> Path:
    """Where the run that `config` describes leaves its folder."""
    return Path(config.runs).absolute() / config.name


def open_run_folder(path: str | Path) -> RunFolder:
    """The folder of an earlier run; DataError when there is none."""
    folder = RunFolder(Path(path).absolute())
    if not folder.config.exists():
        raise DataError(f"{folder.path}: not the folder of a run (config.yaml is missing); nothing was touched")
    return folder


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically; numbers that are not finite become null, which JSON can hold."""
    with written_atomically(path) as file:
        file.write_text(json.dumps(finite_or_none(content), indent=2) + "\n")


def finite_or_none(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same mapping with None for floats that are not finite."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in content.items()
    }


def _digest(tensors: Mapping[str, Tensor], described: str) -> str:
    digest = hashlib.sha256(described.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _describe(folder: RunFolder) -> str:
    if not folder.config.exists():
        return "the folder is not empty and holds no run of aceray; nothing was touched, choose another name or runs"
    steps = folder.checkpoint_steps()
    state = "is finished" if folder.metrics.exists() else f"is at step {steps[-1] if steps else 0}"
    return (
        f"a run of this name {state}; nothing was touched. To continue it, resume (--existing resume); "
        "to throw it away, overwrite (--existing overwrite); or choose another name (name=...)"
    )


def check_same_settings(folder: RunFolder, config: Config) -> None:
    """Raise a ConfigError when the run in the folder had another value of a setting that changes the result."""
    before, now = _fixed_settings(load_config(str(folder.config))), _fixed_settings(config)
    for key in now | before:
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"{key}: {now.get(key)!r} would change the result of the run in {folder.path}, which has "
                f"{before.get(key)!r}; set it back to resume, or start a new run (name=...)"
            )


def _fixed_settings(config: Config) -> dict[str, Any]:
    """Settings that change the result; lanes that follow the number of workers count as that number."""
    settings = flat(config) | {"train.lanes": config.train.lanes or max(1, config.resources.workers)}
    return {key: value for key, value in settings.items() if not f"{key}.".startswith(_FREE)}


def take_away(path: Path) -> None:
    """Take a folder away under another name first, so that a kill leaves no half of it under its own.

    Raises:
        DataError: the system refuses.
    """
    aside = hidden_sibling(path)
    try:
        os.replace(path, aside)
        shutil.rmtree(aside)
    except OSError as error:
        raise storage_error(path, error, "remove") from error
