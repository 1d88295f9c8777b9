"""A Ray cluster on this machine, in a process of its own: `python nodes.py COUNT` starts nodes of one core each.

Its first line is the address, that of its Ray Client server and the process that runs the last node. For every line
that it reads it loses a node, as if its cable were pulled. It ends with its input. A process of its own, for the end of
a cluster would take the Ray session of the tests along.
"""

import socket
import sys

from ray.cluster_utils import Cluster


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def main(count: int) -> None:
    cluster = Cluster()
    try:
        client = free_port()
        cluster.add_node(num_cpus=1, include_dashboard=True, dashboard_port=free_port(), ray_client_server_port=client)
        nodes = [cluster.add_node(num_cpus=1) for _ in range(count - 1)]
        last = (nodes or [cluster.head_node])[-1]
        print(cluster.address, f"ray://127.0.0.1:{client}", last.all_processes["raylet"][0].process.pid, flush=True)
        for _ in sys.stdin:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            print("lost", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
