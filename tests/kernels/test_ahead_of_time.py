"""Every Triton kernel compiles for GPUs that are not here, and the table in the docs names all of them."""

from __future__ import annotations

import importlib
import importlib.util
import os
from importlib.metadata import version
from pathlib import Path

import pytest

import kernel_resources

PAGE = Path(__file__).parents[2] / "docs" / "results" / "kernels.md"
FIRST_TRITON = (3, 3)
"""From which on constants are named as `kernel_resources` names them."""

HAS_TRITON = importlib.util.find_spec("triton") is not None
compiles = pytest.mark.skipif(
    not HAS_TRITON
    or tuple(map(int, version("triton").split(".")[:2])) < FIRST_TRITON
    or os.environ.get("TRITON_INTERPRET") == "1",
    reason="triton is not installed, old, or interprets",
)


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("capability", kernel_resources.CAPABILITIES)
def test_kernels_compile_for_every_gpu_without_spilling(capability: int) -> None:
    fits = []
    for case in kernel_resources.cases():
        if capability < case.first:
            continue
        used = kernel_resources.compiled(case, capability)
        fits.append(used.shared <= kernel_resources.SHARED_KIB[capability] * 1024)
        tuned = case.kernel == "_match_kernel"  # where one configuration does not fit another is taken
        assert tuned or fits[-1], (case.name, used)
        assert tuned or used.stack <= 64, (case.name, used)
        assert used.products or "attention" not in case.name, "products on tensor cores"
    assert fits[0], "the first configuration is for every GPU"


@pytest.mark.slow
@compiles
def test_sizes_of_one_compile_too() -> None:
    """The interpreter does not specialise on them."""
    for case in kernel_resources.cases():
        assert kernel_resources.compiled(case, 90, ones=True).registers


@compiles
def test_one_kernel_compiles() -> None:
    """The cheapest of the above: arguments and their types are still those of the kernels."""
    (case,) = (case for case in kernel_resources.cases() if case.name == "distance from means")
    used = kernel_resources.compiled(case, 80)
    assert 0 < used.registers < 255
    assert used.stack == 0


@compiles
def test_every_kernel_is_in_the_table() -> None:
    import triton

    page = PAGE.read_text()
    cases = list(kernel_resources.cases())
    assert all(f"| {case.name} |" in page for case in cases)
    listed = {(case.module, case.kernel) for case in cases}
    for path in (Path(__file__).parents[2] / "geoaccel" / "kernels").glob("*.py"):
        module = f"geoaccel.kernels.{path.stem}"
        if "@triton.jit" not in path.read_text():
            continue
        for name, value in vars(importlib.import_module(module)).items():
            if isinstance(value, triton.runtime.JITFunction) and value.fn.__module__ == module and name[0] == "_":
                assert (module, name) in listed, name


def test_the_table_marks_what_spills_and_what_is_too_much() -> None:
    used = kernel_resources.Resources
    found = {("one", 80): used(40, 0, 8192), ("one", 86): used(255, 16, 120 * 1024), ("two", 80): None}
    assert kernel_resources.table(found, [80, 86]).splitlines() == [
        "| kernel | sm_80 | sm_86 |",
        "| --- | ---: | ---: |",
        "| one | 40, 8 | 255 + 16 B, 120 (too much) |",
        "| two | - | - |",
    ]
