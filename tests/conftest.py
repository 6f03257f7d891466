"""Switches of the test suite, and tiny networks."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # As many workers as cores: each keeps to one, and so do the processes that its tests start. Before torch is read.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# What a method decides must not depend on how fast this machine is.
os.environ["GEOACCEL_RATES"] = "built-in"

from one_checkout import mixture

if mixed := mixture():  # before anything of the package is imported
    raise SystemExit(mixed)

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from another_processor import AnotherProcessor
from references import Golden
from torch import nn

from geoaccel.models import BACKBONES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")
    parser.addoption("--gpu", action="store_true", help="also run tests marked gpu")
    parser.addoption("--weights", action="store_true", help="also run tests marked weights")
    parser.addoption("--processor", type=int, help="sum as some other processor would, by number")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    seed = item.config.getoption("--processor")
    with nullcontext() if seed is None else AnotherProcessor(seed):
        return (yield)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for mark in ("slow", "gpu", "weights"):
        if not config.getoption(f"--{mark}"):
            skip = pytest.mark.skip(reason=f"run with --{mark}")
            for item in items:
                if mark in item.keywords:
                    item.add_marker(skip)


@pytest.fixture
def this_processor(request: pytest.FixtureRequest) -> None:
    """For what is compiled, compares bits, or can be summed without rounding: `--processor` does not reach these."""
    if request.config.getoption("--processor") is not None:
        pytest.skip("it sums as this machine does")


@pytest.fixture(scope="session", params=sorted(BACKBONES))
def golden(request: pytest.FixtureRequest) -> Golden:
    """The golden file of every backbone."""
    return Golden(f"{request.param}_tiny", request.param)


@pytest.fixture
def tiny(golden: Golden) -> nn.Module:
    """Every backbone at a tiny size with upstream's random weights."""
    return golden.network()
