"""The data sets of a study: simulated when they are described but not there, and checked against its objectives."""

from collections.abc import Callable, Mapping
from pathlib import Path

from aceray.config import Config
from aceray.criteria import CRITERIA
from aceray.data.particles import ParticleSet, open_particles
from aceray.distributed import prepare
from aceray.distributed.trial import Trial
from aceray.errors import ConfigError, DataError
from aceray.study import Study

OnSimulation = Callable[[prepare.SimulationProgress], None]


def prepare_data(study: Study, trials: list[Trial], on_simulation: OnSimulation | None) -> dict[str, str]:
    """Check what the trials need of their data sets, simulate those that are not there; returns digests by path.

    Raises:
        ConfigError: the data cannot give an objective, or one folder would have to hold several data sets.
        DataError: a data set is missing or damaged, or cannot be written.
    """
    configs: dict[str, Config] = {}
    for trial in trials:
        config = trial.configs[0]
        _check_settings(study, config)
        first = configs.setdefault(config.data.path, config)
        if first.simulation != config.simulation:
            raise ConfigError(
                f"data.path: {config.data.path} would hold another data set for each trial, since the space varies "
                "its simulation; vary data.path along with it, for example by presets"
            )
    digests = {}
    for path, config in configs.items():
        # a folder that is there is taken as it is, as by `aceray train`
        if config.simulation is not None and not Path(path).exists():
            prepare.simulate(config, "keep", on_simulation)
        particles = open_particles(path)
        _check_truth(study, particles)
        digests[path] = particles.manifest.sha256
    return digests


def _check_settings(study: Study, config: Config) -> None:
    held_out = config.data.heldout_fraction
    for objective in study.objective:
        if CRITERIA[objective.metric].needs == "heldout" and not held_out:
            raise ConfigError(
                f"objective: {objective.metric} needs particles that training never sees; set data.heldout_fraction, "
                "for example to 0.1"
            )
        if CRITERIA[objective.metric].needs == "refinement" and config.refine is None:
            raise ConfigError(
                f"objective: {objective.metric} needs a refinement after the training; leave out refine=null"
            )
        if objective.metric.startswith("select/residual_loss") and held_out:
            raise ConfigError(
                f"objective: with data.heldout_fraction={held_out:g} the residual is that of held-out particles; use "
                f"{objective.metric.replace('residual_', 'heldout_')}"
            )


def _check_truth(study: Study, particles: ParticleSet) -> None:
    for objective in study.objective:
        if CRITERIA[objective.metric].needs != "truth":
            continue
        what = "volume" if objective.metric.startswith("fsc/") else "poses"
        known = particles.manifest.truth_volume if what == "volume" else particles.read_truth()
        if known is None:
            free = ", ".join(name for name, each in CRITERIA.items() if not each.needs and name.startswith("select/"))
            raise ConfigError(
                f"objective: {objective.metric} compares with the true {what}, which {particles.path} does not hold; "
                f"choose one without truth, such as {free}"
            )


def check_digests(folder: Path, digests: Mapping[str, str], before: Mapping[str, str]) -> None:
    """A study belongs to the particles it began with: DataError for a data set that is another now."""
    for path, digest in digests.items():
        if before.get(path, digest) != digest:
            raise DataError(
                f"{path}: not the particles that the study in {folder} began with (sha256 {digest[:12]}, then "
                f"{before[path][:12]}); put those back, or start a new study (name=...)"
            )
