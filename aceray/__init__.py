"""Scalable ab initio cryo-EM reconstruction with ACE-EM, on Ray, tracked in MLflow.

    config = aceray.load_config("demo", "pip.weight=0.07")
    aceray.simulate(config)
    result = aceray.train(config)
    result.metrics, result.volume, result.poses

Nothing heavy is imported before it is needed.
"""

from types import ModuleType
from typing import TYPE_CHECKING, Any

import aceray.train as _train_package

if TYPE_CHECKING:
    from aceray.api import (
        OnProgress,
        check,
        compare,
        evaluate,
        evaluate_half_maps,
        evaluate_with_oracle,
        export,
        load_config,
        load_study,
        predict,
        prepare,
        score,
        simulate,
        sync,
        train,
        tune,
    )
    from aceray.config import Config
    from aceray.folder import Existing, RunResult

__all__ = [
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


class _TrainVerb(ModuleType):
    """`aceray.train` is the package of the training loop and also the verb: `aceray.train(config)`."""

    def __call__(
        self, config: "Config", existing: "Existing" = "error", on_progress: "OnProgress | None" = None
    ) -> "RunResult":
        """See `aceray.api.train`."""
        from aceray.api import train

        return train(config, existing, on_progress)


# An import of any module below aceray.train binds this name to the package, so the package itself must be callable.
_train_package.__class__ = _TrainVerb


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'aceray' has no attribute {name!r}")
    from aceray import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
