"""A Ray cluster of two nodes on this machine, with one CPU each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


@contextmanager
def two_nodes(module: str) -> Iterator[Any]:
    """The cluster, joined by this process; skips where Ray is not installed.

    Args:
        module: Of the tests, which workers cannot import: what is sent from it goes along by value.
    """
    os.environ.setdefault("RAY_worker_niceness", "0")  # workers give way to all else by default, and tests wait
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[module])
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False)
    try:
        assert len(ray.nodes()) == 2
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


@contextmanager
def one_thread() -> Iterator[None]:
    """As many threads as each worker has: sums in another order differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
