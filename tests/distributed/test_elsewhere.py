"""Runs on other devices than the CPU: nothing is mixed up, and the results are the CPU's.

One is in software (tests/elsewhere.py); a GPU is the other where there is one. It draws the noise of rendered images by
its own generator, so losses agree there within what noise makes of them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.particles import write_particles

ROOT = Path(__file__).parent.parent.parent
RUN = (
    "train.steps=4",
    "train.batch=16",
    "train.evaluate_every=100",
    "tracking.enabled=false",
    "data.shift_sigma_fraction=0.03",
)
SMALL = ("encoder.width=32", "encoder.depth=2")
FEW_ROUNDS = ("refine.search_rounds=1", "refine.polish_rounds=1")
SHOWN = (
    "train/loss_ipi",
    "train/loss_shift",
    "train/loss_pip",
    "train/loss_total",
    "select/residual_whitened",
    "predicted",
)
REFUSED = """
import torch
from tests import elsewhere
elsewhere.register()
here = torch.arange(3.0)
with elsewhere.Executed(), elsewhere.Literals():
    there, generator = here.to(elsewhere.DEVICE), torch.Generator().manual_seed(1)
    for name, call in {
        "sum": lambda: there + here,
        "sum with a number": lambda: there + here.sum(),
        "indices from the CPU": lambda: there[torch.tensor([0, 2])],
        "values from the CPU": lambda: there.index_put((torch.tensor([0]),), here[:1]),
        "indices on the device": lambda: here[torch.tensor([0, 2]).to(elsewhere.DEVICE)],
        "generator": lambda: torch.randn(3, generator=generator, device=elsewhere.DEVICE),
        "a look": lambda: there.numpy(),
    }.items():
        try:
            call()
        except (elsewhere.MixedDevicesError, TypeError, RuntimeError) as error:
            print(name)
    assert (2 * there).cpu().tolist() == [0, 2, 4] and torch.tensor([7], device=elsewhere.DEVICE).tolist() == [7]
"""


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def here_and_there(tmp_path: Path, device: str, *settings: str, truth: bool = False) -> list[dict[str, float]]:
    """Metrics of one run on the CPU and on another device."""
    write_particles(tmp_path / "set", truth=truth)
    folders = (f"data.path={tmp_path / 'set'}", f"runs={tmp_path / 'runs'}")
    return json.loads(python("-m", "tests.elsewhere", device, *folders, *RUN, *settings).splitlines()[-1])


def check_alike(here: dict[str, float], there: dict[str, float], device: str, *names: str) -> None:
    """Compare metrics, those of the run that there are."""
    present = [name for name in names if name in here]
    expected = {name: here[name] for name in present}
    assert {name: there[name] for name in present} == pytest.approx(
        expected, rel=1e-3 if device == "elsewhere" else 0.1
    )


on_each_device = pytest.mark.parametrize(
    "device",
    ["elsewhere", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    refused = ["sum", "values from the CPU", "indices on the device", "generator", "a look"]
    assert python("-c", REFUSED).splitlines() == refused


@on_each_device
def test_the_fourier_decoder_trains(device: str, tmp_path: Path) -> None:
    decoder = ("decoder/siren", "decoder.width=16", "decoder.projector=lattice")
    losses = ("ipi.loss=generalised", "pip.noise.kind=background")
    here, there = here_and_there(tmp_path, device, *decoder, *SMALL, *losses, "refine=null")
    check_alike(here, there, device, *SHOWN)


@on_each_device
def test_streamed_images_are_refined(device: str, tmp_path: Path) -> None:
    rounds = (*FEW_ROUNDS, "refine.registers=false", "refine.halves=independent")
    here, there = here_and_there(tmp_path, device, "data.memory_gib=0.0005", *SMALL, *rounds)
    check_alike(here, there, device, "train/loss_total")
    # slopes there are finite differences, so single poses differ
    assert there["refine/energy"] == pytest.approx(here["refine/energy"], rel=0.02)
    assert there["predicted"] == pytest.approx(here["predicted"], rel=0.02)


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize(
    "settings",
    [
        (
            "decoder/siren",
            "decoder.width=16",
            *SMALL,
            "ipi.loss=symmetric",
            "pip.shifts=matched",
            "ipi.train_shift=true",
        ),
        ("decoder.projector=rotate", "encoder.kind=resnet18", "optim.clip_norm=1", "decoder.nonnegative=true"),
        ("method/cryoai", "decoder.width=16"),
        ("method/cryoposenet", "pip.weight=1", "pip.train_decoder=true", "pip.turns=alternating"),
    ],
    ids=["points", "rotated voxels", "cryoai", "cryoposenet"],
)
def test_other_networks_and_losses_train(settings: tuple[str, ...], device: str, tmp_path: Path) -> None:
    here, there = here_and_there(tmp_path, device, *settings, "refine=null")
    check_alike(here, there, device, *SHOWN)


@pytest.mark.slow
@on_each_device
def test_registers_and_truth(device: str, tmp_path: Path) -> None:
    here, there = here_and_there(tmp_path, device, *SMALL, *FEW_ROUNDS, "refine.near_symmetry=0.1", truth=True)
    assert there["refine/near_symmetry_order"] == here["refine/near_symmetry_order"] > 1
    assert there["refine/energy"] == pytest.approx(here["refine/energy"], rel=0.02)
    assert there["fsc/auc"] == pytest.approx(here["fsc/auc"], rel=0.05)
