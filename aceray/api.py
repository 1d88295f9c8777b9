"""The verbs of aceray in Python; the command line calls these and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aceray.config import Config
from aceray.errors import ConfigError
from aceray.presets import load_config
from aceray.study import Study, load_study

if TYPE_CHECKING:
    from aceray.data.location import Location
    from aceray.distributed.assign import Predicted
    from aceray.distributed.convert import Checked, Prepared
    from aceray.distributed.convert import Existing as ExistingDataset
    from aceray.distributed.export import Exported
    from aceray.distributed.study_run import StudyResult
    from aceray.folder import Existing, RunResult
    from aceray.tracking.sync import Synced

__all__ = [
    "OnProgress",
    "check",
    "compare",
    "evaluate",
    "evaluate_half_maps",
    "evaluate_with_oracle",
    "export",
    "load_config",
    "load_study",
    "predict",
    "prepare",
    "score",
    "simulate",
    "sync",
    "train",
    "tune",
]

OnProgress = Callable[[Any], None]


def simulate(
    config: Config, existing: Literal["error", "keep", "overwrite"] = "error", on_progress: OnProgress | None = None
) -> "Location":
    """Make the dataset that `config.simulation` describes and write it to `config.data.path`; returns that folder.

    A folder that holds something is an error, is kept as it is if it holds this very dataset, or is overwritten.
    `on_progress` is called after every shard.

    Raises:
        ConfigError: the configuration describes no simulation.
        DataError: the model cannot be read, does not fit the box, or the folder cannot be written.
    """
    if config.simulation is None:
        raise ConfigError("simulation: null, so there is nothing to simulate; add a preset such as data/spliceosome_32")
    from aceray.distributed import prepare

    return prepare.simulate(config, existing, on_progress)


def check(source: str | Path, **options: Any) -> "Checked":
    """What is in an input of real particles and everything that is wrong with it, before any work is done.

    `options` are those of `aceray.preparation.Preparation`. Nothing is written.

    Raises:
        ConfigError: an option is unknown or out of range.
        DataError: the input cannot be read at all.
    """
    from aceray.distributed import convert
    from aceray.preparation import preparation

    return convert.check(source, preparation(**options))


def prepare(
    source: str | Path,
    out: str | Path,
    existing: "ExistingDataset" = "error",
    on_progress: OnProgress | None = None,
    **options: Any,
) -> "Prepared":
    """Make a dataset at `out` of the particles of a .star, .cs, .txt (list of stacks) or stack of another program.

    `options` are those of `aceray.preparation.Preparation`: box, datadir, subset, invert, half, strict, …. A conversion
    that was stopped goes on when it is called again. `on_progress` is called after every shard.

    Raises:
        ConfigError: an option is unknown or out of range.
        DataError: the input is wrong (the first reason; `check` gives all), or the folder cannot be written.
        ClusterError: Ray cannot be reached or lost a task for good.
    """
    from aceray.distributed import convert
    from aceray.preparation import preparation

    return convert.prepare_particles(source, out, preparation(**options), existing, on_progress)


def train(config: Config, existing: "Existing" = "error", on_progress: OnProgress | None = None) -> "RunResult":
    """Train on the dataset at `config.data.path` and evaluate; everything is in the run folder `runs/<name>`.

    An earlier run of that name is an error, is resumed from its last checkpoint, or is overwritten. `on_progress` is
    called with the `Progress` of every step. With `config.seeds` above 1 several starts are trained side by side and
    the best is the run; `on_progress` is then called with the `TrialEvent`s of the study that they are.

    Raises:
        ConfigError: a setting contradicts the dataset or the run to resume.
        DataError: the dataset or a checkpoint is missing or damaged, or the run folder cannot be written.
        ClusterError: Ray cannot give what `config.resources` asks for.
        NonFiniteLoss: a loss is not a number.
    """
    if config.seeds > 1:
        from aceray.distributed import starts

        return starts.train_starts(config, existing, on_progress)
    from aceray.distributed import run

    return run.run(config, existing, on_progress)


def leaderboard_of_starts(config: Config) -> Path:
    """The leaderboard (Markdown) that a run with `config.seeds` above 1 leaves beside its folder."""
    from aceray.distributed import starts

    return starts.folder_of_starts(config) / "leaderboard.md"


def export(run_folder: str | Path, out: str | Path, spread: bool = False) -> "Exported":
    """Write volume, half maps, FSC tables and poses of a run to `out` for RELION, cryoSPARC and ChimeraX.

    Poses refer to the original stacks, pixel size and particle names where the dataset was made by `prepare`. With
    `spread` they have a further column: how far the encoder's poses of an image's eight turns and mirrors disagree.

    Raises:
        DataError: this is no finished run, its dataset is missing, or `out` holds something else.
    """
    from aceray.distributed import export as exporting

    return exporting.export_run(run_folder, out, spread)


def predict(
    run_folder: str | Path, source: str | Path, out: str | Path, on_progress: OnProgress | None = None, **options: Any
) -> "Predicted":
    """Assign poses to new particles with a finished run: poses.star, poses.cs and poses.parquet in `out`.

    `source` is a dataset or what `prepare` takes; `options` are those of `aceray.preparation.Prediction`: refine,
    eightfold, workers, datadir, …. Images are treated as those the run was trained on. `on_progress` is called with the
    `PredictionProgress` of every portion.

    Raises:
        ConfigError: an option is unknown or out of range.
        DataError: the run has no checkpoint or, to refine, no map; or the particles do not fit it.
        ClusterError: Ray cannot give the workers.
    """
    from aceray.distributed import assign, convert
    from aceray.preparation import prediction

    settings = prediction(**options)
    return assign.predict_poses(run_folder, convert.source_files(source, settings), out, settings, on_progress)


def evaluate(run_folder: str | Path, on_progress: OnProgress | None = None) -> "RunResult":
    """Evaluate the last checkpoint of a run again: poses, volume, metrics and figures in its folder are renewed.

    Raises:
        DataError: this is no run folder, it has no checkpoint, or one of its files is damaged.
    """
    from aceray.distributed import run

    return run.evaluate_run(Path(run_folder), on_progress)


def evaluate_with_oracle(
    run_folder: str | Path, on_progress: OnProgress | None = None, on_search: OnProgress | None = None
) -> "RunResult":
    """Evaluate a run again, with the metrics of the oracle on its particles beside its own, under oracle/….

    The oracle is the best any method could do on these images. `on_search` is called with the `OracleProgress` of
    every batch of particles.

    Raises:
        DataError: as for `evaluate`, or the dataset's truth is not known.
    """
    from aceray.distributed import run

    return run.evaluate_run_with_oracle(Path(run_folder), on_progress, on_search)


def evaluate_half_maps(
    run_folder: str | Path, other_run: str | Path, mask: Literal["none", "sphere", "auto"] = "none"
) -> "RunResult":
    """FSC at 0.143 between the volumes of two runs, on data.half_set 1 and 2 of a dataset, after alignment and hand.

    The result is written to the first run's folder. A mask is corrected for by random phases.

    Raises:
        DataError: a run is not finished, or the runs share particles, or differ in dataset or box.
    """
    from aceray.distributed import run

    return run.compare_half_runs(run_folder, other_run, mask)


def score(dataset: str | Path, poses: str | Path, volume: str | Path) -> dict[str, float]:
    """Metrics of poses and a volume (MRC) that any program made of a simulated dataset.

    Poses are those of RELION (.star), cryoSPARC (.cs) or cryoDRGN (.pkl; nothing but arrays is unpickled).

    Raises:
        DataError: a file is missing or not of this dataset, or the dataset's truth is not known.
    """
    from aceray.distributed import results

    return results.score_files(dataset, poses, volume)


def tune(
    study: Study | str,
    *overrides: str,
    address: str = "local",
    resume: bool = False,
    on_event: OnProgress | None = None,
    on_simulation: OnProgress | None = None,
    on_oracle: Callable[[Path, Any], None] | None = None,
) -> "StudyResult":
    """Run a study (`study/smoke`, a path, or what `load_study` gave); everything is in its folder `studies/<name>`.

    `address` is `local` (a Ray of its own), that of a cluster (`auto`, `HOST:PORT`, or `ray://HOST:10001` from outside
    it), or `none`: in this process, one trial after another.
    With `resume` an earlier study of that name goes on. `on_event` is called with the `TrialEvent` of every evaluation
    and change of status, `on_simulation` after every shard of a data set that is made, `on_oracle` with the folder of a
    data set and the `OracleProgress` of its search.

    Raises:
        ConfigError: the study has a mistake, its data cannot give the objective, or it is not the one to resume.
        DataError: a data set or the study's folder is missing, damaged, not free, or cannot be written.
        ClusterError: Ray cannot give what the trials ask for.
    """
    whole = load_study(study, *overrides) if isinstance(study, str) else study
    if address.startswith("ray://"):
        from aceray.distributed import steer

        return steer.steer_study(whole, address, resume, on_event, on_simulation, on_oracle)
    from aceray.distributed import study_run

    return study_run.run_study(whole, address, resume, on_event, on_simulation, on_oracle)


def compare(study_folder: str | Path, on_oracle: Callable[[Path, Any], None] | None = None) -> "StudyResult":
    """Write the leaderboard, the tables and the figures of an earlier study again; `on_oracle` as for `tune`.

    Raises:
        DataError: this is no folder of a study.
    """
    from aceray.distributed import study_run

    return study_run.open_study(study_folder, on_oracle)


def sync(folder: str | Path) -> "Synced":
    """Send to MLflow what an outage kept back: the journal in the folder of a run or of a study.

    Raises:
        DataError: there is no journal, or the run is still going on and sends by itself.
        ConfigError: the store cannot be used.
        TrackingError: the store does not answer, or does not take everything.
    """
    from aceray.tracking import sync as syncing

    return syncing.sync(folder)
