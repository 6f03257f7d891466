"""Registries: one style, reloads, and what other packages add."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from geoaccel.registry import Registry, make

# Every module that registers something is loaded again; in a process of its own, as classes are others afterwards.
RELOAD = """
import importlib, sys
import geoaccel, geoaccel.export, geoaccel.eval.data.registry as data, geoaccel.mllm.baselines
from geoaccel.attention_kernels import KERNELS
from geoaccel.backbone import BACKBONES
from geoaccel.merging import MERGING
from geoaccel.quantization import QUANTIZATION
registries = [MERGING, QUANTIZATION, data.DATASETS, geoaccel.export.FORMATS, KERNELS, geoaccel.mllm.baselines.BASELINES]
before = [dict(registry) for registry in registries]
names = {thing.__module__ for entries in before for thing in entries.values()}
names -= {"geoaccel.attention", "geoaccel.mllm.baselines"}  # these hold their registry, which begins anew
for name in sorted(names):
    importlib.reload(sys.modules[name])
assert [set(registry) for registry in registries] == [set(entries) for entries in before]
for registry in registries[:4]:
    assert all(registry[name] is getattr(sys.modules[registry[name].__module__], registry[name].__name__, None)
               for name in registry if "." not in registry[name].__qualname__)
print(len(names))
"""


def test_modules_of_methods_reload() -> None:
    run = subprocess.run([sys.executable, "-c", RELOAD], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 20


def test_decorator_and_call_are_one() -> None:
    registry: Registry[Any] = Registry("thing")

    @registry.register("first")
    def first() -> int:
        return 1

    assert registry.register("second", first) is first
    assert dict(registry) == {"first": first, "second": first}


def test_the_same_again_replaces_and_another_is_refused() -> None:
    def again() -> type:
        class Method:
            pass

        return Method

    class Other:
        pass

    registry: Registry[Any] = Registry("thing")
    registry.register("name", again())
    newer = registry.register("name", again())
    assert registry["name"] is newer
    for different in (Other, 3, lambda: 1):
        with pytest.raises(ValueError, match="thing 'name' is already registered"):
            registry.register("name", different)
    registry.register("lambda", lambda: 1)
    with pytest.raises(ValueError, match="already registered"):
        registry.register("lambda", lambda: 2)


def test_knobs_that_there_are_not_name_those_that_there_are() -> None:
    registry: Registry[Any] = Registry("thing", {"mine": lambda stride=1: stride})
    assert make(registry, "mine", {"stride": 4}) == 4
    with pytest.raises(ValueError, match=r"unknown knob of mine 'strid'; known: stride\. Did you mean 'stride'"):
        make(registry, "mine", {"strid": 4})


def packaged(folder: Path, name: str, group: str, points: dict[str, str], modules: dict[str, str]) -> None:
    """An installed package by hand."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "".join(f"{point} = {value}\n" for point, value in points.items())
    (info / "entry_points.txt").write_text(f"[geoaccel.{group}]\n{lines}")
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)


def test_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Read at the first look-up, once; what is broken is a line that names the package and harms nothing else."""
    group = "test_entry_points"
    registry: Registry[Any] = Registry("thing", {"own": 0}, group=group)
    good = "import registry_under_test\nregistry_under_test.registry.register('good', object())\n"
    packaged(tmp_path, "good-things", group, {"good": "good_things"}, {"good_things": good})
    packaged(
        tmp_path, "broken-things", group, {"bad": "broken_things"}, {"broken_things": "import nowhere.to_be_found"}
    )
    packaged(tmp_path, "idle-things", group, {"idle": "idle_things"}, {"idle_things": ""})
    monkeypatch.syspath_prepend(tmp_path)
    stand_in = type(sys)("registry_under_test")
    stand_in.registry = registry  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "registry_under_test", stand_in)
    with caplog.at_level(logging.WARNING):
        assert "good_things" not in sys.modules
        assert set(registry) == {"own", "good"}
        assert registry["good"] is not None
    broken, idle = sorted(record.getMessage() for record in caplog.records)
    assert "idle_things of the package idle-things does not register the thing 'idle'" in broken + idle
    assert "thing 'bad' of the package broken-things is ignored: ModuleNotFoundError: No module named" in broken + idle
    assert "\n" not in broken + idle
    caplog.clear()
    with pytest.raises(ValueError, match="unknown thing 'bad'; known: good, own"):
        registry["bad"]
    assert not caplog.records
