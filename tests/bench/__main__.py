"""`python -m tests.bench [NAME …]`: accuracy, physics, steps, refine, sharing and training or those named."""

import importlib
import importlib.util
import sys

import torch


def main() -> None:
    """Run the benchmarks on one thread; one that is not there is left out. `stacks` and `rivals` are named alone."""
    torch.set_num_threads(1)
    named = sys.argv[1:2] if sys.argv[1:2] in (["stacks"], ["rivals"]) else sys.argv[1:]
    for name in named or ("accuracy", "physics", "steps", "refine", "sharing", "training"):
        if importlib.util.find_spec(f"tests.bench.{name}") is not None:
            importlib.import_module(f"tests.bench.{name}").main()


if __name__ == "__main__":
    main()
