"""A device in software, on which what a GPU would refuse fails: for tests of the way through a device without one.

A tensor on it holds its values on the CPU and says that they are elsewhere, so an operation that mixes both places, a
generator of the wrong one or a look at values that were not fetched is an error here as on a GPU, and results are those
of the CPU. It does not show what only a GPU has: its own kernels and their rounding, streams, memory. Built on torch's
support of backends in Python. Registering one lasts for the process, so tests start another one, which prints the
metrics of a run on the CPU and of the same on `elsewhere` or `cuda`:

    python -m tests.elsewhere DEVICE KEY=VALUE ...
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import aceray
from aceray.distributed import assign, run

DEVICE = "elsewhere"
_CROSSING = ("aten::_to_copy", "aten::copy_")
# a GPU takes indices from the CPU, but no values
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class MixedDevicesError(Exception):
    """An operation on tensors, or with a generator, of both places."""


class Elsewhere(torch.Tensor):
    """A tensor on the device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Elsewhere":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=f"{DEVICE}:0",
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def tolist(self) -> list:
        """Torch has none for its subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _execute(func, args, kwargs or {})


_places: dict[int, str] = {}  # of generators: what operations are given is not the object that was made


class Generator(torch.Generator):
    """Torch's, of which is noted where it is for."""

    def __new__(cls, device: str | torch.device = "cpu") -> "Generator":
        return super().__new__(cls, "cpu")

    def __init__(self, device: str | torch.device = "cpu") -> None:
        _places[self._cdata] = torch.device(device).type  # type: ignore[attr-defined]


class Executed(TorchDispatchMode):
    """Every operation of torch, those that make tensors included, wherever its tensors are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _execute(func, args, kwargs or {})


class Literals(TorchFunctionMode):
    """Tensors of Python's numbers: torch would fill them behind the back of the operations."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            return func(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if func is torch.Tensor.new_tensor and isinstance(args[0], Elsewhere):
            return torch.tensor(*args[1:], dtype=kwargs.get("dtype", args[0].dtype)).to(DEVICE)
        return func(*args, **kwargs)


class Backend(backend_registration._DummyBackendModule):
    """What torch asks of a backend before it turns automatic half precision off on it."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16]


def register() -> None:
    """Make the device known to this process."""
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, Backend())
    torch.Generator = Generator  # type: ignore[misc]


def _execute(func: Any, args: tuple, kwargs: dict) -> Any:
    """An operation on the values, whose results are where it is done."""
    leaves = tree_leaves((args, kwargs))
    away = {id(each.held): each for each in leaves if isinstance(each, Elsewhere)}
    asked = kwargs.get("device")
    place = torch.device(asked).type if asked is not None else DEVICE if away else "cpu"
    _check(func._schema.name, args, leaves, place)
    values = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if func._schema.name == "aten::copy_":
        return args[0]

    def placed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in away:  # what an operation in place returns is its argument
            return away[id(value)]
        return value if place == "cpu" else Elsewhere(value.resolve_conj().resolve_neg())

    return tree_map(placed, values)


def _held(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _check(name: str, args: tuple, leaves: list, place: str) -> None:
    """Single numbers alone may come from the CPU."""
    for each in leaves:
        if isinstance(each, torch._C.Generator) and _places.get(each._cdata, "cpu") != place:  # type: ignore[attr-defined]
            raise MixedDevicesError(f"{name}: a generator of the wrong device draws on {place}")
    if name in _CROSSING or not any(isinstance(each, Elsewhere) for each in leaves):
        return
    if name in _INDEXING and isinstance(args[0], Elsewhere):
        leaves = [each for number, each in enumerate(args) if number != 1]
    tensors = [each for each in leaves if isinstance(each, torch.Tensor)]
    if any(not isinstance(each, Elsewhere) and each.ndim > 0 for each in tensors):
        shapes = [(tuple(each.shape), each.device.type) for each in tensors]
        raise MixedDevicesError(f"{name}: tensors of both devices: {shapes}")


def _train_and_predict(settings: list[str], name: str) -> dict[str, float]:
    """Metrics of a run, and the mean residual of the poses that it gives its own particles once it is finished."""
    config = aceray.load_config(*settings, f"name={name}")
    metrics = aceray.train(config).metrics
    poses = Path(config.runs) / name / "predicted"
    aceray.predict(Path(config.runs) / name, config.data.path, poses)
    return metrics | {"predicted": float(pq.read_table(poses / "poses.parquet")["residual"].to_numpy().mean())}


def main(device: str, settings: list[str]) -> None:
    """Print the metrics of a run on the CPU and of one on a device."""
    torch.set_num_threads(1)
    if device == DEVICE:
        register()  # before the first gradient, for which torch counts the devices
    found = []
    for place in ("cpu", device):
        run.device_of = assign.device_of = lambda config, place=place: place
        with contextlib.ExitStack() as modes:
            if place == DEVICE:
                modes.enter_context(Executed())
                modes.enter_context(Literals())
            found.append(_train_and_predict(settings, place))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
