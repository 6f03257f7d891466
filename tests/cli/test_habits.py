"""Habits of the command line: help and typos at once, every choice explained, what was meant, quiet, verbose, tab."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import checkpoint, refused, run, write_images  # noqa: F401 (a fixture)

import geoaccel
from geoaccel import conditions, console, export, runtime
from geoaccel.attention_kernels import KERNELS
from geoaccel.cli import parser
from geoaccel.eval.tools.sensitivity import Sensitivity
from geoaccel.export.formats import FORMATS
from geoaccel.merging.method import MERGING
from geoaccel.options import SHELLS, names, subcommands
from geoaccel.options.parser import Parser
from geoaccel.quantization import QUANTIZATION
from geoaccel.refine import check_tracks

AT_ONCE = """
import sys
from geoaccel.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
print("loaded:", [name for name in ("torch", "numpy", "hydra", "PIL") if name in sys.modules], code, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("args", "says", "code"),
    [
        (["--help"], "examples:", 0),
        (["--version"], f"geoaccel {geoaccel.__version__}", 0),
        (["reconstruct", "--help"], "--conf-percentile PERCENT", 0),
        (["quantize", "calibrate", "--help"], "--rounding", 0),
        (["recnstruct"], "Did you mean 'reconstruct'?", 2),
        (["reconstruct", "a", "--outt", "b"], "unrecognized arguments: --outt. Did you mean '--out'?", 2),
        (["reconstruct", "a", "--out", "b", "--merging", "htm"], "Did you mean 'httm'?", 2),
        (["reconstruct", "a", "--out", "b", "--quantization", "fp9"], "Did you mean 'fp8'?", 2),
        (["demo", "--merging", "none,asymetric"], "Did you mean 'asymmetric'?", 2),
        (["reconstruct", "a", "--out", "b", "--dtype", "bfloat"], "Did you mean 'bfloat16'?", 2),
        (["eval", "modell=vggt-mini"], "unknown setting 'modell' in 'modell=vggt-mini'. Did you mean 'model'?", 2),
        (["bench", "frame=[8]"], "Did you mean 'frames'?", 2),
        (["eval", "--config", "nosuch"], "known: ablation, bench, eval", 2),
        (["eval", "merging"], "'merging' is no setting; give KEY=VALUE", 2),
        (["quantize", "exprt"], "Did you mean 'export'?", 2),
        (["info", "-q", "-v"], "--quiet and --verbose were both given; give one of them", 2),
    ],
)
def test_it_answers_before_torch_is_there(args: list[str], says: str, code: int) -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", AT_ONCE, *args], capture_output=True, text=True)
    took = time.monotonic() - began
    assert says in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == f"loaded: [] {code}"
    assert took < 20  # 0.1 s on an idle machine


def test_names_are_imported_when_they_are_used() -> None:
    code = (
        "import sys, geoaccel; before = 'torch' in sys.modules; names = dir(geoaccel);"
        "geoaccel.accelerate, geoaccel.models.build;"
        "print(before, 'torch' in sys.modules, set(geoaccel.__all__) <= set(names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]
    with pytest.raises(AttributeError, match="no attribute 'acelerate'"):
        _ = geoaccel.acelerate  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="cannot import name 'acelerate'"):
        exec("from geoaccel import acelerate")


def test_every_choice_that_there_is_is_explained() -> None:
    """In tables that help reads without the registries."""
    assert set(names.MERGING) == set(MERGING)
    assert set(names.QUANTIZATION) == set(QUANTIZATION)
    assert set(names.ATTENTION) == set(KERNELS)
    assert set(names.FORMATS) == set(FORMATS)
    assert tuple(names.DTYPES) == runtime.DTYPES
    assert tuple(names.IMAGES) == export.IMAGES
    for name in names.TRACKS:
        check_tracks(name)
    assert conditions.KINDS == ("poses", "intrinsics", "depths")
    assert Sensitivity.__dataclass_fields__["rank_by"].default == "pose_deg"


def commands_of(top: argparse.ArgumentParser) -> dict[str, Parser]:
    found: dict[str, Parser] = {}
    for name, command in subcommands(top).items():
        deeper = subcommands(command) if name == "quantize" else {}
        found |= {f"{name} {action}": one for action, one in deeper.items()} or {name: command}
    return found


def test_every_command_has_two_examples_that_parse() -> None:
    top = parser()
    for name, command in {"": top, **commands_of(top)}.items():
        _, *examples = (line.strip() for line in (command.epilog or "").splitlines())
        assert len(examples) >= 2, name
        for line in examples:
            assert line.startswith(f"geoaccel {name}".strip()), line
            if "--help" not in line:
                top.parse_args(line.partition(" > ")[0].split()[1:])
        assert all(line in command.format_help() for line in examples), name


def test_options_may_stand_between_what_has_no_name(capsys: Any) -> None:
    settings = ["data=synthetic", "data.scenes=1", "merging=none,httm"]
    for command in ("eval", "bench"):
        for place in range(4):
            args = parser().parse_args(
                [command, *settings[:place], "--multirun", *settings[place:], "--config", "eval"]
            )
            assert (args.overrides, args.multirun, args.config) == (settings, True, "eval")
    args = parser().parse_args(["tune", "a", "--model", "m", "b", "--out", "plan.yaml", "c"])
    assert (args.input, args.model, args.out) == (["a", "b", "c"], "m", "plan.yaml")
    for left in (["info", "x", "y"], ["view", "a", "--port", "80", "b", "c"]):
        with pytest.raises(SystemExit):
            parser().parse_args(left)
        assert "unrecognized arguments: " in capsys.readouterr().err


def test_every_option_is_explained() -> None:
    for name, command in commands_of(parser()).items():
        text = command.format_help()
        for action in command._actions:
            assert action.help, (name, action)
            if action.option_strings and action.default not in (None, False, argparse.SUPPRESS, []):
                shown = f"default: {action.default}" in " ".join(text.split()) or "(default)" in str(action.help)
                assert shown, (name, action.option_strings)
            if action.choices is not None and not isinstance(action, argparse._SubParsersAction):
                assert all(str(choice) in text for choice in action.choices), (name, action)


def test_names_of_other_packages_are_left_to_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    take = names.one_of("merging method", names.MERGING, "merging")
    assert take("alike, httm") == "alike, httm"
    with pytest.raises(argparse.ArgumentTypeError, match="unknown merging method 'mine'"):
        take("mine")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [group])
    assert take("mine") == "mine"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["quantize", "export", "--model", "vggt-mini", "--out", "x.safetensors"],
         "give --quantization fp8 or w4a16, or --allocation FILE, and not both"),
        (["quantize", "sensitivity", "--model", "vggt-mini", "--out", "x.json"], "give --quantization fp8 or w4a16"),
        (["reconstruct", "photos", "--out", "scene", "--size", "0"], "size=0 (--size) is not allowed; give"),
        (["bench", "device=cuda:99"], "(device=cpu in settings)"),
        (["eval", "data.frams=3"], "Could not override 'data.frams'"),
        (["eval", "data=synthetik"], "Did you mean 'synthetic'?"),
        (["eval", "merging=htm"], "Did you mean 'httm'?"),
        (["eval", "merging=httm", "merging.httm.query_kep=0.2"], "Did you mean 'merging.httm.query_keep'?"),
        (["bench", "methods=[htm]"], "Did you mean 'httm'?"),
    ],
)  # fmt: skip
def test_messages(args: list[str], says: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", 1)
    refused(capsys, *args, says=says)


def test_info_of_a_packed_file_counts_parameters(tmp_path: Path, capsys: Any) -> None:
    packed = tmp_path / "packed.safetensors"
    assert run(capsys, "quantize", "export", "--model", "vggt-mini", "--quantization", "w4a16", "--out", packed)[0] == 0
    said = [run(capsys, "info", name)[1].splitlines()[0] for name in ("vggt-mini", packed)]
    counts = [line.partition("vggt, ")[2].partition(" parameters")[0] for line in said]
    assert counts[0] == counts[1] == f"{sum(p.numel() for p in geoaccel.load_model('vggt-mini').parameters()):,}"


def test_info_names_a_card_that_is_there(capsys: Any) -> None:
    """In a wheel, too: the folder is not the repository's."""
    (card,) = (line for line in run(capsys, "info", "pi3-mini")[1].splitlines() if line.startswith("card: "))
    assert Path(card.removeprefix("card: ")).read_text().startswith("#")


def test_info_says_once_why_a_kernel_does_not_run(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    (line,) = (line for line in run(capsys, "info")[1].splitlines() if line.startswith("  xformers: does not work"))
    assert line.count("pip install 'geoaccel[cuda]'") == 1


def test_quiet_and_verbose(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    photos = write_images(tmp_path / "photos")
    args = ("reconstruct", photos, "--model", checkpoint, "--formats", "npz", "--out")
    code, out, err = run(capsys, *args, tmp_path / "a", "--quiet")
    assert (code, err, json.loads(out)["frames"]) == (0, "", 3)
    assert "wrote" in run(capsys, *args, tmp_path / "b")[2]
    assert console.is_quiet() is False
    run(capsys, *args, tmp_path / "c", "-v")
    assert logging.getLogger("geoaccel.reconstruction").isEnabledFor(logging.INFO)
    run(capsys, *args, tmp_path / "d")
    assert not logging.getLogger("geoaccel.reconstruction").isEnabledFor(logging.INFO)
    refused(capsys, *args, tmp_path / "d", "-q", says="not empty")


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_and_options(shell: str, capsys: Any) -> None:
    code, out, _ = run(capsys, "completion", shell)
    assert code == 0
    for word in ("reconstruct", "conf-percentile", "quantize", "calibrate"):
        assert word in out


def test_bash_completes(capsys: Any, tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(run(capsys, "completion", "bash")[1])
    ask = f"source {script}; COMP_WORDS=(geoaccel reconstruct --conf); COMP_CWORD=2; _shtab_geoaccel; echo $COMPREPLY"
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert done.stdout.strip() == "--conf-percentile", done.stderr
