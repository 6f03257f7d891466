"""Switches of the test suite, and tiny networks."""

from __future__ import annotations

import os
import re

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
from pathlib import Path

import pytest
from another_processor import AnotherProcessor
from references import Golden
from torch import nn

from geoaccel.models import BACKBONES

ON_EVERY_BACKBONE = re.compile(
    r"models/(?!test_tracker|test_weights)|merging/test_confidence_predictor|mllm/test_mllm_geometry|test_cost"
    r"|eval/tuning/test_choices"
    r"|models/test_weights.py::test_(adopt|own_file|full_size|narrow|tensors_that)|merging/test_conformance.py::test_rule"
    r"|quantization/test_quantized_(models|outputs).py::test_(every_linear|commutes|predictions|upstream|a_narrow)"
)
"""Tests that run on all backbones without ``--every-backbone``; the others know networks from outside."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")
    parser.addoption("--gpu", action="store_true", help="also run tests marked gpu")
    parser.addoption("--weights", action="store_true", help="also run tests marked weights")
    parser.addoption("--every-backbone", action="store_true", help="run every test of networks on every backbone")
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Golden files: of every backbone where networks themselves are tested, of one with and one without a reference
    frame where what is around them is."""
    if "golden" in metafunc.fixturenames:
        place = metafunc.definition.path.relative_to(Path(__file__).parent).as_posix()
        every = ON_EVERY_BACKBONE.match(f"{place}::{metafunc.definition.name}")
        every = every or metafunc.config.getoption("--every-backbone")
        metafunc.parametrize("golden", sorted(BACKBONES if every else ("pi3", "vggt")), indirect=True, scope="session")


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Golden:
    """The golden file of a backbone."""
    return Golden(f"{request.param}_tiny", request.param)


@pytest.fixture
def tiny(golden: Golden) -> nn.Module:
    """Every backbone at a tiny size with upstream's random weights."""
    return golden.network()
