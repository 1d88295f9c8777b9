"""The command line: parse, call `aceray.api`, print, and turn errors into exit codes. Nothing else."""

import atexit
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import BaseModel
from rich.console import Console

from aceray import api
from aceray.display import RunDisplay, StudyDisplay
from aceray.errors import AcerayError, ConfigError
from aceray.preparation import Prediction, Preparation
from aceray.printing import from_here, metrics_table, print_markdown, print_report, print_result, print_study

if TYPE_CHECKING:
    from aceray.distributed.study_run import StudyResult

USER_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Ab initio cryo-EM reconstruction with ACE-EM. Settings are presets (`demo`, a YAML file) and `key=value`s.",
)
Settings = Annotated[
    list[str],
    typer.Argument(metavar="PRESET_OR_KEY=VALUE", help="presets, merged from left to right, and overrides, which win"),
]


def _with_options(settings: type[BaseModel]) -> Callable[[Callable], Callable]:
    """Give a command whose last parameter is **options an option for every field of the settings."""

    def extended(command: Callable) -> Callable:
        own = list(signature(command).parameters.values())[:-1]
        more = []
        for name, field in settings.model_fields.items():
            kind = list[str] if field.annotation == tuple[str, ...] else field.annotation
            default = list(field.default) if kind == list[str] else field.default
            flag = f"--{name.replace('_', '-')}"
            if kind == bool | None:
                flag = f"{flag}/--no-{flag[2:]}"
            option = Annotated[kind, typer.Option(flag, help=field.description)]
            more.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=option))
        command.__signature__ = Signature([*own, *more])  # pyright: ignore[reportFunctionMemberAccess]
        return command

    return extended


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _leave_at_once(INTERRUPTED)
        raise


def _leave_at_once(code: int) -> None:
    """End without the interpreter's own clean-up, which takes seconds on a busy machine; all contexts are closed."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _version(asked: bool) -> bool:
    if asked:
        print(version("aceray"))
        raise typer.Exit
    return asked


@app.callback()
def _common(
    _show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command()
def simulate(
    settings: Settings,
    existing: Annotated[
        Literal["error", "keep", "overwrite"], typer.Option(help="what to do with a dataset that is there already")
    ] = "error",
) -> None:
    """Make a dataset of noisy projections of an atomic model."""
    with _readable(f"to make the dataset: {_again('simulate', settings, existing)}"):
        config = api.load_config(*settings)
        with RunDisplay("simulate", "particles") as display:
            folder = api.simulate(config, existing, display.simulated)
    print(f"dataset      {from_here(folder)}")


@app.command()
@_with_options(Preparation)
def prepare(
    source: Annotated[str, typer.Argument(help="a .star, .cs, .txt (list of stacks), .mrcs or .mrc")],
    out: Annotated[str | None, typer.Option(help="folder of the dataset")] = None,
    check: Annotated[bool, typer.Option("--check", help="only look: all that would go wrong, and the fix")] = False,
    existing: Annotated[
        Literal["error", "keep", "overwrite"], typer.Option(help="what to do with a dataset that is there already")
    ] = "error",
    **options: Any,
) -> None:
    """Make a dataset of real particles: of RELION, cryoSPARC or MRC stacks."""
    with _readable("repeat the command to go on where it stopped"):
        if check == (out is not None):
            raise ConfigError("prepare: give either --out, the folder of the dataset, or --check")
        if check:
            checked = api.check(source, **options)
            print_report(checked.markdown())
            if checked.findings.errors:
                raise typer.Exit(USER_ERROR)
            return
        with RunDisplay("prepare", "particles") as display:
            prepared = api.prepare(source, str(out), existing, display.simulated, **options)
    print_report(prepared.report)
    print(f"dataset      {from_here(prepared.path)}")


@app.command()
def train(
    settings: Settings,
    existing: Annotated[
        Literal["error", "resume", "overwrite"], typer.Option(help="what to do with a run of the same name")
    ] = "error",
) -> None:
    """Reconstruct a volume and the pose of every particle."""
    with _readable(f"to go on from the last checkpoint: {_again('train', settings, 'resume')}"):
        config = api.load_config(*settings)
        if config.seeds > 1:
            with StudyDisplay(config.label_free_score) as starts:
                result = api.train(config, existing, starts.happened)
            print_markdown(api.leaderboard_of_starts(config))
        else:
            with RunDisplay(config.name, "steps", config.train.steps) as display:
                result = api.train(config, existing, display.trained)
    print_result(result)


@app.command()
def evaluate(
    run_folder: Annotated[str | None, typer.Argument(help="folder of a run, for example runs/demo")] = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="show the best any method could do beside it (simulated sets)")
    ] = False,
    dataset: Annotated[str | None, typer.Option(help="score files of another program on this dataset")] = None,
    poses: Annotated[
        str | None, typer.Option(help="its poses: a .star, .cs or .pkl of RELION, cryoSPARC, cryoDRGN")
    ] = None,
    volume: Annotated[str | None, typer.Option(help="its volume, an MRC file")] = None,
    half_map: Annotated[
        str | None, typer.Option(metavar="OTHER_RUN", help="FSC with the volume of the run on the other half set")
    ] = None,
    mask: Annotated[
        Literal["none", "sphere", "auto"], typer.Option(help="of --half-map, corrected by random phases")
    ] = "none",
) -> None:
    """Evaluate the last checkpoint of a run and renew its results, or score the files of another program."""
    with _readable("to start again, repeat the command"):
        if dataset and poses and volume and not (run_folder or oracle or half_map):
            Console(highlight=False).print(metrics_table(api.score(dataset, poses, volume)))
            return
        if not run_folder or dataset or poses or volume:
            raise ConfigError("evaluate: give either the folder of a run, or --dataset, --poses and --volume")
        if (half_map and oracle) or (mask != "none" and not half_map):
            raise ConfigError("evaluate: --mask goes with --half-map, and --half-map without --oracle")
        if half_map:
            result = api.evaluate_half_maps(run_folder, half_map, mask)
        elif oracle:
            with RunDisplay("oracle", "particles") as display:
                result = api.evaluate_with_oracle(run_folder, None, display.searched)
        else:
            result = api.evaluate(run_folder)
    print_result(result)


@app.command()
def export(
    run_folder: Annotated[str, typer.Argument(help="folder of a run, for example runs/demo")],
    out: Annotated[str, typer.Option(help="folder for the files")],
    spread: Annotated[
        bool, typer.Option("--spread", help="with the disagreement of an image's eight turns and mirrors, degrees")
    ] = False,
) -> None:
    """Write a run's results for RELION, cryoSPARC and ChimeraX: volume, FSC tables, poses of the original particles."""
    with _readable("to start again, repeat the command"):
        exported = api.export(run_folder, out, spread)
    for name, path in exported.paths.items():
        print(f"{name:12} {from_here(path)}")


@app.command()
@_with_options(Prediction)
def predict(
    run_folder: Annotated[str, typer.Argument(help="folder of a run, for example runs/demo")],
    source: Annotated[str, typer.Argument(help="a dataset, or a .star, .cs, .txt, .mrcs or .mrc")],
    out: Annotated[str, typer.Option(help="folder for the poses")],
    **options: Any,
) -> None:
    """Assign poses to new particles with the encoder and the map of a run: STAR, .cs and Parquet."""
    with _readable("to start again, repeat the command"), RunDisplay("predict", "particles") as display:
        found = api.predict(run_folder, source, out, display.predicted, **options)
    for name, path in found.paths.items():
        print(f"{Path(name).suffix[1:]:12} {from_here(path)}")
    left = f", {found.refused:,} images refused" if found.refused else ""
    print(f"{'particles':12} {found.particles:,}, {found.particles_per_second:,.0f} a second{left}")
    print(f"{'poses':12} {found.method}")


@app.command()
def tune(
    study: Annotated[str, typer.Argument(help="a study: `smoke`, or the path of a YAML file")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="of the study (`search.trials=8`) or, any other key, of all trials"),
    ] = None,
    address: Annotated[
        str, typer.Option(help="local: a Ray of its own; auto, HOST:PORT, ray://HOST:PORT: a cluster; none: no Ray")
    ] = "local",
    resume: Annotated[bool, typer.Option("--resume", help="go on with the study of that name")] = False,
) -> None:
    """Compare settings: run a study's trials, here or on a cluster, and rank them."""
    settings = settings or []
    again = shlex.join(["aceray", "tune", study, *settings, *([] if address == "local" else ["--address", address])])
    with _readable(f"to go on: {again} --resume"):
        whole = api.load_study(study, *settings)
        with StudyDisplay(whole.objective[0].metric) as display:
            result = api.tune(
                whole,
                address=address,
                resume=resume,
                on_event=display.happened,
                on_simulation=display.simulated,
                on_oracle=display.searched,
            )
    print_study(result)
    _fail_if_all_failed(result)


@app.command()
def compare(study_folder: Annotated[str, typer.Argument(help="folder of a study, for example studies/smoke")]) -> None:
    """Rank the trials of an earlier study again and renew its leaderboard, tables and figures."""
    with _readable("to start again, repeat the command"), StudyDisplay() as display:
        result = api.compare(study_folder, display.searched)
    print_study(result)
    _fail_if_all_failed(result)


@app.command()
def sync(folder: Annotated[str, typer.Argument(help="folder of a run or of a study")]) -> None:
    """Send to MLflow what an outage kept back."""
    with _readable("to start again, repeat the command"):
        synced = api.sync(folder)
    print(f"{'sent':12} {synced.records:,} records; MLflow has everything of run {synced.run_id}")


def _again(verb: str, settings: list[str], existing: str) -> str:
    return shlex.join(["aceray", verb, *settings, "--existing", existing])


@contextmanager
def _readable(advice: str) -> Iterator[None]:
    """A user's mistake becomes one line and exit code 2, Ctrl-C one line and 130; our own bugs keep their traceback."""
    try:
        yield
    except AcerayError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(USER_ERROR) from None
    except KeyboardInterrupt:
        print(f"interrupted; {advice}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _fail_if_all_failed(result: "StudyResult") -> None:
    """Exit code 2 when every trial of a study failed."""
    if result.trials and all(notes["status"] == "failed" for notes in result.trials.values()):
        first = next(iter(result.trials.values()))["reason"]
        print(
            f"error: {result.study.name}: all {len(result.trials)} trials failed; the first: {first}", file=sys.stderr
        )
        raise typer.Exit(USER_ERROR)
