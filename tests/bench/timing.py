"""Medians of CPU time, what this machine's core can do at most, and tables for people."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


def cpu_seconds(function: Callable[[], object], budget_seconds: float = 1.5) -> float:
    """Median CPU seconds of one call after a warm-up call: 3 to 30 repeats, as many as the budget allows."""
    function()
    start = time.process_time()
    function()
    first = time.process_time() - start
    times = [first]
    for _ in range(max(2, min(29, int(budget_seconds / max(first, 1e-9))))):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


@dataclass(frozen=True)
class Machine:
    """Best measured rates of one core: floating-point operations and bytes per second."""

    flops: float
    bytes: float

    def floor_seconds(self, flops: float, moved_bytes: float) -> float:
        """Time that neither arithmetic nor memory can beat."""
        return max(flops / self.flops, moved_bytes / self.bytes)


def measure_machine() -> Machine:
    """Rate of a 1024 x 1024 float32 matrix product, and of copying 256 MiB (read and written)."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    source = torch.zeros(2**26)
    target = torch.empty_like(source)
    return Machine(
        flops=2 * 1024**3 / cpu_seconds(lambda: left @ right),
        bytes=2 * source.numel() * 4 / cpu_seconds(lambda: target.copy_(source)),
    )


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table with aligned columns, the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    print(f"\n{title}\n")
    for index, row in enumerate([header, *rows]):
        cells = [
            cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("| " + " | ".join(cells) + " |")
        if index == 0:
            rules = ["-" * w if c == 0 else "-" * (w - 1) + ":" for c, w in enumerate(widths)]
            print("| " + " | ".join(rules) + " |")
