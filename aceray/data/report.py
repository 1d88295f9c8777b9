"""What was found in an input of real particles, in words: for the terminal, and as report.md beside the dataset."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from aceray.data.convert import Conversion, Sample
from aceray.data.particle_table import Findings
from aceray.data.source import Source

_MOST_GROUPS = 8


def facts_of_source(source: Source) -> dict[str, str]:
    """The input: how many particles and stacks, boxes, pixel sizes, microscopes, poses and half sets it has."""
    table = source.table
    found = [stack for stack in source.stacks if stack is not None]
    stored = sum(stack.images * stack.image_bytes for stack in found)
    missing = len(source.stacks) - len(found)
    boxes = sorted({stack.box for stack in found})
    sizes = np.unique(table.pixel_size_angstrom[np.isfinite(table.pixel_size_angstrom)].round(4))
    facts = {
        "input": str(source.files.path),
        "particles": f"{len(table):,}",
        "stacks": f"{len(source.stacks):,}, {stored / 1e9:.3g} GB{f', {missing:,} missing' if missing else ''}",
        "box": ", ".join(f"{box} px" for box in boxes) or "unknown",
        "pixel size": ", ".join(f"{size:g} A" for size in sizes[:_MOST_GROUPS]) or "unknown",
    }
    if table.ctf is not None:
        facts["microscope"] = "; ".join(_microscopes(table.ctf))
        mean = (table.ctf["defocus_u_angstrom"] + table.ctf["defocus_v_angstrom"]) / 2
        low, middle, high = np.nanquantile(mean, [0, 0.5, 1]) / 1e4
        facts["defocus"] = f"{low:.2f} to {high:.2f} um, median {middle:.2f} um"
    else:
        facts["CTF"] = "none"
    facts["poses"] = "none" if table.pose is None else "in the input"
    if table.half_set is not None:
        halves = Counter(table.half_set.tolist())
        facts["half sets"] = "in the input: " + ", ".join(f"{halves[half]:,} in {half}" for half in sorted(halves))
    return facts


def _microscopes(ctf: dict[str, np.ndarray]) -> list[str]:
    names = ("voltage_kv", "spherical_aberration_mm", "amplitude_contrast")
    rows, counts = np.unique(np.stack([ctf[name] for name in names], axis=1).round(4), axis=0, return_counts=True)
    lines = [
        f"{voltage:g} kV, Cs {aberration:g} mm, amplitude contrast {contrast:g} ({count:,})"
        for (voltage, aberration, contrast), count in zip(rows[:_MOST_GROUPS], counts[:_MOST_GROUPS], strict=True)
    ]
    return lines + ([f"and {len(rows) - _MOST_GROUPS} more"] if len(rows) > _MOST_GROUPS else [])


def facts_of_conversion(plan: Conversion, sample: Sample | None) -> dict[str, str]:
    """What becomes of it: images, order, half sets, brightness."""
    layout = plan.layout
    facts = {
        "images": f"{layout.box} px of {layout.pixel_size_angstrom:.4g} A, {layout.image_dtype}, "
        f"{len(plan.table):,} in {len(plan.shards)} shards",
        "background": "mean 0, deviation 1" if plan.treatment.normalise == "background" else "as it was",
    }
    if len(plan.field.crop_px) > 1:
        crops = ", ".join(f"{crop} px" for crop in plan.field.crop_px)
        facts["common field"] = f"centres of {crops}, pixel sizes equal to {plan.field.misfit:.1e}"
    if sample is not None and len(sample.images):
        turned = " after --invert" if plan.treatment.invert else ""
        facts["brightness"] = (
            f"centre {sample.brightness:+.3f} +- {sample.brightness_error:.3f} above the background{turned} "
            f"({len(sample.images)} images; protein must be bright)"
        )
    return facts


def markdown(facts: dict[str, str], findings: Findings, refused: Sequence[tuple[int, str]]) -> str:
    """The report: a table of facts, what was refused and why, warnings and errors."""
    lines = ["# What was found", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", f"Refused: {len(refused):,} images" + (" (refused.csv names them)." if refused else ".")]
    lines += [f"- {count:,}: {reason}" for reason, count in Counter(reason for _, reason in refused).most_common()]
    for name, texts in (("Warnings", findings.warnings), ("Errors", findings.errors)):
        if texts:
            lines += ["", f"{name}:", *(f"- {text}" for text in texts)]
    return "\n".join(lines) + "\n"
