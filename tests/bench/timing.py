"""Medians of CPU time, what this machine's core can do at most, and tables for people."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CPU = torch.device("cpu")


def best_device() -> torch.device:
    """A GPU where there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def clock_of(device: torch.device) -> Callable[[], float]:
    """CPU seconds of this process, or those of the clock on the wall once another device has done its work."""
    if device.type == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return synchronised


def cpu_seconds(function: Callable[[], object], budget_seconds: float = 1.5) -> float:
    """Median CPU seconds of one call after a warm-up call: 3 to 30 repeats, as many as the budget allows."""
    return median_seconds(function, time.process_time, budget_seconds)


def median_seconds(function: Callable[[], object], clock: Callable[[], float], budget_seconds: float = 1.5) -> float:
    """The same by another clock."""
    function()
    start = clock()
    function()
    first = clock() - start
    times = [first]
    for _ in range(max(2, min(29, int(budget_seconds / max(first, 1e-9))))):
        start = clock()
        function()
        times.append(clock() - start)
    return statistics.median(times)


@dataclass(frozen=True)
class Machine:
    """Best measured rates of one core, or of a GPU: floating-point operations and bytes per second."""

    flops: float
    bytes: float

    def floor_seconds(self, flops: float, moved_bytes: float) -> float:
        """Time that neither arithmetic nor memory can beat."""
        return max(flops / self.flops, moved_bytes / self.bytes)


def measure_machine(device: torch.device = CPU) -> Machine:
    """Rate of a float32 matrix product, and of copying 256 MiB (read and written)."""
    side, clock = 1024 if device.type == "cpu" else 8192, clock_of(device)
    left, right = torch.randn(2, side, side, device=device)
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)
    return Machine(
        flops=2 * side**3 / median_seconds(lambda: left @ right, clock),
        bytes=2 * source.numel() * 4 / median_seconds(lambda: target.copy_(source), clock),
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
