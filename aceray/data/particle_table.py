"""Particles as another program's file describes them: one typed column for each thing, whatever the dialect."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from aceray.data.particles import CTF_UNITS
from aceray.errors import DataError

POSE_COLUMNS = ("rot_deg", "tilt_deg", "psi_deg", "origin_x_angstrom", "origin_y_angstrom")


@dataclass
class Findings:
    """What is wrong with an input, all of it: errors, which stop a conversion, and warnings, which do not."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def raise_errors(self) -> None:
        """Raise the first error, if there is one, as DataError that says how many there are."""
        if self.errors:
            more = len(self.errors) - 1
            hint = f" ({more} more {'error' if more == 1 else 'errors'}: see --check)" if more else ""
            raise DataError(self.errors[0] + hint)


@dataclass(frozen=True)
class ParticleTable:
    """n particles in the order of the file's rows; a column that the file lacks is None.

    `stack` indexes `stack_names`, which are as the file gives them; `stack_index` counts images from 0.
    `pixel_size_angstrom` is NaN where it is not stated. `ctf` has the columns of CTF_UNITS, `pose` those of
    POSE_COLUMNS (angles of RELION; origin: minus the content's shift), both float64. `half_set` is 1 or 2.
    """

    stack_names: tuple[str, ...]
    stack: Int[np.ndarray, "n"]
    stack_index: Int[np.ndarray, "n"]
    source_row: Int[np.ndarray, "n"]
    pixel_size_angstrom: Float[np.ndarray, "n"]
    ctf: Mapping[str, Float[np.ndarray, "n"]] | None = None
    pose: Mapping[str, Float[np.ndarray, "n"]] | None = None
    half_set: Int[np.ndarray, "n"] | None = None

    def __len__(self) -> int:
        return len(self.stack)

    def take(self, rows: Int[np.ndarray, "m"]) -> "ParticleTable":
        """A selection of the particles, in that order."""

        def chosen(columns: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray] | None:
            return None if columns is None else {name: values[rows] for name, values in columns.items()}

        return ParticleTable(
            stack_names=self.stack_names,
            stack=self.stack[rows],
            stack_index=self.stack_index[rows],
            source_row=self.source_row[rows],
            pixel_size_angstrom=self.pixel_size_angstrom[rows],
            ctf=chosen(self.ctf),
            pose=chosen(self.pose),
            half_set=None if self.half_set is None else self.half_set[rows],
        )

    def replace(self, **columns: object) -> "ParticleTable":
        """The same particles with other columns."""
        return dataclasses.replace(self, **columns)  # pyright: ignore[reportArgumentType]

    def label(self, row: int) -> str:
        """How an error names a particle: its number in the stack, from 1, and the stack, as in RELION's files."""
        return f"{self.stack_index[row] + 1:06d}@{self.stack_names[self.stack[row]]}"


def check_values(table: ParticleTable, path: object, findings: Findings) -> None:
    """Note values that no microscope has, and missing or doubtful columns, with what to do about them."""
    if table.ctf is None:
        findings.warnings.append(
            f"{path}: has no CTF parameters; the images are taken as they are, without a contrast transfer function."
        )
    bounds = {
        "voltage_kv": (1, 2000),
        "spherical_aberration_mm": (0, 20),
        "amplitude_contrast": (0, 1),
        "defocus_u_angstrom": (-2e5, 2e5),
        "defocus_v_angstrom": (-2e5, 2e5),
    }
    for name, values in (table.ctf or {}).items():
        low, high = bounds.get(name, (-np.inf, np.inf))
        bad = ~np.isfinite(values) | (values < low) | (values > high)
        if bad.any():
            row = int(bad.argmax())
            findings.errors.append(
                f"{path}: {name} of {table.label(row)} is {values[row]:g} (and of {int(bad.sum()) - 1} others); "
                f"correct the file ({CTF_UNITS[name]})."
            )
    if table.pose is not None:
        lost = {name for name, values in table.pose.items() if not np.isfinite(values).all()}
        if lost:
            findings.errors.append(f"{path}: {min(lost)} holds a value that is not a finite number; correct the file.")
    if (table.stack_index < 0).any():
        row = int((table.stack_index < 0).argmax())
        findings.errors.append(f"{path}: particle {row + 1} has image number {table.stack_index[row] + 1}; from 1 on.")
