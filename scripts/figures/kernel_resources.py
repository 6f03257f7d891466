"""Compile every Triton kernel ahead of time and write its resource use: docs/results/kernels.md. Needs no GPU.

    python scripts/figures/kernel_resources.py [--out docs/results/kernels.md] [--capabilities 80 90]

Needs Triton (``pip install triton``), which includes NVIDIA's assembler. Some minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geoaccel.errors import run_program

CAPABILITIES = (80, 86, 89, 90, 100, 120)
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Maximum shared memory per program, in KiB (CUDA programming guide)."""

FP8_FROM = 89
"""The first compute capability that rounds to e4m3."""

# Channels and strides of the networks are multiples of 16, for which Triton specialises at run time.
ALIGNED = {"dim", "width", "inputs", "v_stride", "group_bytes", "qkv_stride", "quarter", "token_stride"}
ALIGNED |= {f"{which}_{axis}" for which in ("first", "second") for axis in ("batch", "head", "token")}
FLOATS = {"eps", "largest_code", "smallest_scale", "least_norm", "bias"}


@dataclass(frozen=True)
class Case:
    """One kernel as launched by the full-size networks.

    Attributes:
        name: Name in the table.
        module, kernel: Its module and function.
        pointers: Type of each pointer.
        constants: Compile-time constants.
        warps, stages: Warps and stages of a program.
        first: The first compute capability that it supports.
    """

    name: str
    module: str
    kernel: str
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    first: int = 0


@dataclass(frozen=True)
class Resources:
    """Resources of a compiled kernel: registers and stack bytes per thread, shared memory per program."""

    registers: int
    stack: int
    shared: int
    products: list[str] = field(default_factory=list)


def cases(dtype: str = "bf16") -> Iterator[Case]:
    """Every kernel in every shape that the package launches, on tokens of one dtype."""
    match, rows, heads, blocks, joins, picks, flash, nibbles = (
        importlib.import_module(f"geoaccel.kernels.{name}")
        for name in ("match", "rows", "heads", "blocks", "joins", "picks", "fp8_flash", "nibbles")
    )
    x, whole, wide = f"*{dtype}", "*i64", "*fp32"

    def case(
        name: str, module: Any, kernel: str, types: dict[str, str], constants: Any, *rest: int, **more: int
    ) -> Case:
        pointers = {key: kind for keys, kind in types.items() for key in keys.split()}
        return Case(name, module.__name__, kernel, pointers, constants, *rest, **more)

    for n, m, d, warps, stages in match.CONFIGURATIONS:
        types = {"source target": x, "best": wide, "where": whole}
        tiles = {"TILE_N": n, "TILE_M": m, "TILE_D": d}
        yield case(f"match, {n} x {m} x {d}, {stages} stages", match, "_match_kernel", types, tiles, warps, stages)
    types = {"x out": x, "members starts counts": whole}
    for width in (64, 256):
        yield case(f"mean, {width} channels", match, "_mean_kernel", types, {"TILE_C": width}, width // 64)
    types = {"x": x, "sources targets where": whole}
    tiles = {"TILE_S": blocks.TILE_SOURCES, "TILE_M": blocks.TILE_TARGETS, "TILE_D": 64}
    yield case("match in blocks", blocks, "_match_blocks_kernel", types, tiles)
    types = {"x merged": x, "group_of": whole, "out": wide}
    yield case("distance from means", blocks, "_deviation_kernel", types, {"TILE_T": blocks.TILE_TOKENS, "TILE_D": 64})
    types = {"first second": x, "first_sum second_sum": wide}
    yield case("joined attentions", joins, "_join_kernel", types, {"TILE_N": joins.TILE_QUERIES, "TILE_D": 64})
    types, tiles = {"k v keys values": x, "index": whole}, {"OWN": True, "TILE_M": picks.TILE_TOKENS, "TILE_D": 64}
    yield case("chosen keys and values", picks, "_pick_kernel", types, tiles)
    types = {"qkv q_weight q_bias k_weight k_bias cos sin q_out k_out": x}
    settings = {"NORM": True, "ROTATE": True, "TILE_R": heads.TILE_ROWS, "TILE_C": 32}
    yield case("norm and rotation of heads", heads, "_rotate_kernel", types, settings)
    types = {"x y gamma weight bias total normed": x}
    settings = {"SCALED": True, "TILE_C": 1024}
    yield case("residual and norm, 1024", rows, "_add_norm_kernel", types, settings, rows.warps(1024))
    types = {"x": x, "codes": "*fp8e4nv", "scales": wide}
    for width, gelu in ((1024, False), (4096, True)):
        settings = {"GELU": gelu, "NATIVE": True, "TILE_K": width}
        name = f"rows to e4m3, {width}{', of GELU' if gelu else ''}"
        yield case(name, rows, "_quantize_kernel", types, settings, rows.warps(width), first=FP8_FROM)
    types = {"packed": "*u8", "scale zero": "*bf16", "out": x}
    tiles = {"TILE_R": nibbles.TILE_ROWS, "TILE_B": nibbles.TILE_BYTES}
    yield case("4-bit weights", nibbles, "_decode_kernel", types, tiles)
    types = {"q k v": "*fp8e4nv", "q_scale k_scale v_scale bias": wide, "out": x}
    for biased in (False, True):
        settings = {"BIASED": biased, "NATIVE": True, "WEIGHT_BITS": flash.WEIGHT_BITS}
        settings |= {"TILE_N": flash.QUERIES, "TILE_M": flash.KEYS, "TILE_D": 64}
        name = f"attention in FP8{', biased' if biased else ''}"
        yield case(name, flash, "_flash_kernel", types, settings, 8, first=FP8_FROM)


def compiled(case: Case, capability: int, *, ones: bool = False) -> Resources:
    """Compile one kernel for one compute capability, without a GPU.

    Args:
        case: The kernel.
        capability: 90 for 9.0.
        ones: All sizes are 1, for which Triton specialises.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(case.module), case.kernel)
    kinds, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        is_float = "fp32" if name in FLOATS else "i32"
        kinds[name] = "constexpr" if name in case.constants else case.pointers.get(name, is_float)
        if name in case.pointers or name in ALIGNED:
            aligned[(place,)] = [["tt.divisibility", 16]]
    constants = dict(case.constants)
    for place, name in enumerate(kernel.arg_names):
        if ones and kinds[name] == "i32":
            kinds[name], constants[name] = "constexpr", 1
            aligned.pop((place,), None)
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _usage(made.asm["cubin"])
    products = sorted(set(re.findall(r"wgmma|mma\.sync|tcgen05\.mma", made.asm["ptx"])))
    return Resources(registers, stack, made.metadata.shared, products)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack of a compiled kernel, read with NVIDIA's tool."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([_tool(), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), int(found[2])


@functools.cache
def _tool() -> str:
    import triton

    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


def table(found: dict[tuple[str, int], Resources | None], capabilities: list[int]) -> str:
    """One row per kernel, one column per capability: registers, bytes of stack if any, KiB of shared memory."""
    lines = [f"| kernel | {' | '.join(f'sm_{capability}' for capability in capabilities)} |"]
    lines.append("| --- |" + " ---: |" * len(capabilities))
    for name in dict.fromkeys(name for name, _ in found):
        cells = []
        for capability in capabilities:
            used = found.get((name, capability))
            if used is None:
                cells.append("-")
                continue
            spilled = f" + {used.stack} B" if used.stack else ""
            too_much = " (too much)" if used.shared > SHARED_KIB.get(capability, 0) * 1024 else ""
            cells.append(f"{used.registers}{spilled}, {used.shared / 1024:.0f}{too_much}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


PAGE = """# What the Triton kernels take

Compiled ahead of time by Triton {version} for GPUs that were not there; tokens in bfloat16, sizes of the full-size
networks. Nothing here was run or timed on a GPU.

{table}

Each cell: registers of a thread (255 at most), plus the bytes of its stack where registers spilled into it, then the
shared memory of a program in KiB. *Too much*: more than that GPU has; such a configuration of `match` is left out there
when the fastest is chosen. A dash: the kernel is for GPUs that round to e4m3.

    python scripts/figures/kernel_resources.py
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/kernels.md"))
    parser.add_argument("--capabilities", type=int, nargs="+", default=list(CAPABILITIES))
    args = parser.parse_args()
    import triton

    found: dict[tuple[str, int], Resources | None] = {}
    for case in cases():
        for capability in args.capabilities:
            used = compiled(case, capability) if capability >= case.first else None
            found[case.name, capability] = used
            print(f"sm_{capability} {case.name}: {used}", file=sys.stderr, flush=True)
    args.out.write_text(PAGE.format(version=triton.__version__, table=table(found, args.capabilities)))


if __name__ == "__main__":
    sys.exit(run_program("kernel_resources", main))
