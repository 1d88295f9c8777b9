"""Wait until a Ray cluster has so many nodes: `await_nodes.py HOST:PORT COUNT`; exit code 1 after ten minutes."""

import sys
import time

import ray

PATIENCE_SECONDS = 600.0


def alive(address: str) -> int:
    """Nodes that are alive; none while the head itself is starting."""
    try:
        ray.init(address, log_to_driver=False, logging_level="CRITICAL")
        return sum(node["Alive"] for node in ray.nodes())
    except ConnectionError:
        return 0
    finally:
        ray.shutdown()


def main(address: str, count: int) -> int:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (found := alive(address)) < count:
        if time.monotonic() > deadline:
            print(f"error: {found} of {count} nodes joined the cluster at {address}", file=sys.stderr)
            return 1
        time.sleep(2.0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
