"""A Ray cluster of several nodes on this machine, as a process of its own that is told what to do line by line.

So nothing of Ray is in the process of the tests, and all of the cluster ends with this one. RAY_TMPDIR says where Ray
keeps its files: besides a cluster's own folder Ray writes into its default one, which RAY_TMPDIR makes the same.
"""

from __future__ import annotations

import json
import socket
import sys
from typing import Any

import ray
from ray.cluster_utils import Cluster

NODES = 3
CPUS = 2


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def main() -> None:
    port = free_port()
    # The head trains nothing, so that each of the others can be lost.
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [raylet(cluster.add_node(num_cpus=CPUS)) for _ in range(NODES)]
    print(json.dumps({"address": cluster.address, "jobs": f"http://127.0.0.1:{port}", "nodes": nodes}), flush=True)
    for line in sys.stdin:
        if line.strip() == "left":
            ray.init(address=cluster.address, log_to_driver=False)
            groups = [each for each in ray.util.placement_group_table().values() if each["state"] != "REMOVED"]
            free = ray.available_resources().get("CPU", 0), ray.cluster_resources()["CPU"]
            ray.shutdown()
            print(json.dumps({"groups": groups, "free": free[0], "of": free[1]}), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
