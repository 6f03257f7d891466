"""`compare_peers.py`: published code beside ours. Here theirs are our own tiny network in their folders."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "figures"

# Our network with what adopting reads off theirs, and with parts that are called as theirs are.
NETWORK = """
from types import SimpleNamespace
import torch
from geoaccel.models.vggt import VGGT as Ours, VGGTConfig

class VGGT(Ours):
    def __init__(self, **switches):
        super().__init__(VGGTConfig(img_size=56, embed_dim=48, depth=2, num_heads=2, vit_depth=15, vit_num_heads=2,
                                    dpt_layers=(0, 0, 1, 1), dpt_features=16, dpt_out_channels=(8, 8, 8, 8),
                                    heads=("camera", "depth"), camera_trunk_depth=1))
        self.switches = switches
        self.aggregator.rope = SimpleNamespace(base_frequency=100)
        self.depth_head.intermediate_layer_idx = list(self.depth_head.layers)
        aggregate, dense = self.aggregator.forward, self.depth_head.forward
        self.aggregator.forward = lambda images, keep=(0, 1): aggregate(images, keep=keep)
        self.depth_head.forward = lambda tokens, images, patch_start_idx, chunk=8: dense(
            tokens, images, patch_start_idx, chunk)

    def update_patch_dimensions(self, width, height):
        self.grid = (height, width)
"""
FASTVGGT = f"""{NETWORK}
    def forward(self, images):
        assert self.switches == {{"merging": 0, "enable_point": False}}
        assert self.grid == (images.shape[-2] // 14, images.shape[-1] // 14)
        assert torch.zeros(1, device="cuda").device == images.device
        torch.cuda.synchronize()
        return super().forward(images)
"""
LITEVGGT = f"""{NETWORK}
from transformer_engine.common.recipe import DelayedScaling, Format
import transformer_engine.pytorch as te

DelayedScaling(fp8_format=Format.E4M3, amax_history_len=80)

def nothing(x):
    return x

class WithScales(te.LayerNormMLP):
    # The real one has the scales of its FP8 among its state.

    def get_extra_state(self):
        return torch.zeros(8, dtype=torch.uint8)

class LiteVGGT(VGGT):
    def __init__(self, **switches):
        super().__init__(**switches)
        blocks = [module for module in self.aggregator.modules() if hasattr(module, "mlp")]
        assert blocks
        for block in blocks:
            block.normMlp = WithScales(48, block.mlp.fc1.out_features)
            del block.norm2, block.mlp
            object.__setattr__(block, "norm2", nothing)
            object.__setattr__(block, "mlp", block.normMlp)
        aggregate = self.aggregator.forward

        def forward(images):
            assert self.grid == (images.shape[-2] // 14, images.shape[-1] // 14)
            with torch.random.fork_rng(devices=[images.device]), te.fp8_autocast(enabled=True):
                return aggregate(images)

        self.aggregator.forward = forward

VGGT = LiteVGGT
LiteVGGT.__name__ = "VGGT"
"""
COME = {
    "src/__init__.py": "",
    "src/thirdparty/vggt/models/vggt.py": NETWORK,
    "src/cuda_extension/flash_attn/__init__.py": "from . import flash_attn_fwd_cuda as kernel\ncalled = kernel",
    "src/cuda_extension/co_me/__init__.py": "from . import co_me_cuext",
    "src/utility/feature.py": """
import contextlib
from ..cuda_extension.co_me import co_me_cuext

class CUDAExtension:
    disabled = False

    @classmethod
    @contextlib.contextmanager
    def disable(cls):
        cls.disabled = True
        yield
        cls.disabled = False
""",
    "src/accelerate/vggt/__init__.py": """
import torch.cuda.nvtx as nvtx
from ...utility.feature import CUDAExtension
from . import module

def fused_accelerate(model, merger, encoder_layer):
    assert (encoder_layer, merger.group_h, merger.group_w, merger.threshold) == (14, 3, 3, 0.5)
    attention = module.bias_attention.flash_attn_varlen_qkvpacked_func_w_perkey_bias
    assert attention.__name__ == "attention_in_segments"
    aggregate = model.aggregator.forward

    def forward(images):
        assert CUDAExtension.disabled
        with nvtx.range("aggregator"):
            return aggregate(images)

    model.aggregator.forward = forward
    return model
""",
    "src/accelerate/vggt/module/__init__.py": "from . import bias_attention",
    "src/accelerate/vggt/module/bias_attention.py": """
from ....cuda_extension.flash_attn import called as flash_attn_varlen_qkvpacked_func_w_perkey_bias
""",
    "src/accelerate/token_merger/co_me_2d.py": """
import json
from pathlib import Path
import torch

class GlobalAttentionConfidence(torch.nn.Module):
    def __init__(self, hidden_dims, activation):
        super().__init__()
        self.proj1 = torch.nn.Linear(*hidden_dims[::2])

class CoMe_2D_TokenMerger:
    def __init__(self, start_idx, group_h, group_w, threshold, ckpt_path, device):
        assert start_idx == 5
        config = json.loads((Path(ckpt_path) / "config.json").read_text())
        assert config["loss_function"] == "pairwise-rank"
        self.group_h, self.group_w, self.threshold = group_h, group_w, threshold
        self.predictor = GlobalAttentionConfidence(config["predictor_dims"], config["predictor_active"])
        self.predictor.load_state_dict(torch.load(Path(ckpt_path) / "checkpoint.pth"))
""",
}
CLONES = {
    "fastvggt": {"vggt/models/vggt.py": FASTVGGT, "merging/__init__.py": ""},
    "litevggt": {"vggt/models/vggt.py": LITEVGGT, "merging/__init__.py": ""},
    "come": COME,
}
REPLACED = {"fastvggt": [], "litevggt": ["Transformer Engine"], "come": ["Co-Me's CUDA kernels"]}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module
    for name in ("compare_peers", "peers"):
        sys.modules.pop(name, None)


@pytest.fixture
def compare(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the script: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compare_peers.py", *arguments])
        code = 0
        try:
            load("compare_peers").main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


def clone(name: str, folder: Path) -> Path:
    for path, text in CLONES[name].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


@pytest.mark.parametrize("name", CLONES)
def test_a_peer_runs_beside_ours_on_the_same_weights(
    name: str, compare: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    options = ["--frames", "2", "--size", "84", "84", "--device", "cpu"]
    code, out, err = compare(f"--{name}", str(clone(name, tmp_path)), *options)
    assert code == 0, err
    row = json.loads(out)
    assert (row["peer"], row["frames"], row["size"]) == (name, 2, [84, 84])
    assert row["replaced_by_torch"] == REPLACED[name]
    # So few tokens are left dense: ours must output what the peer does, whose network is the same.
    assert row["pose_enc_difference"] < 0.02
    assert row["depth_difference"] < 0.02
    assert row["ours_over_peer"] == pytest.approx(row["ours_s"] / row["peer_s"], rel=0.01)
    packages = {module.partition(".")[0] for module in sys.modules}
    assert not packages & {"vggt", "merging", "src", "transformer_engine"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no peer to compare with; give --fastvggt PATH or --litevggt PATH or --come PATH"),
        (["--fastvggt", "nowhere"], "has no vggt/"),
        (["--come", "nowhere"], "--size 392 518: come needs multiples of 42 (252 336 suits all)"),
        (["--fastvggt", "nowhere", "--size", "392", "520"], "fastvggt needs multiples of 14"),
        (["--come", "nowhere", "--size", "0", "42"], "needs multiples of 42"),
        (["--litevggt", "empty"], "No module named 'vggt.models'; install the requirements of the authors' repository"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    message: str,
    compare: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "vggt").mkdir(parents=True)
    code, _, err = compare(*arguments)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_attention_in_segments_is_that_of_each_segment(load: Callable[[str], ModuleType]) -> None:
    qkv, bias = torch.randn(7, 3, 2, 4), torch.randn(7)
    got = load("peers").attention_in_segments(
        qkv, torch.tensor([0, 3, 7]), 4, perkey_bias=bias, dropout_p=0.0, softmax_scale=0.3
    )
    for first, last in ((0, 3), (3, 7)):
        q, k, v = qkv[first:last].unbind(1)
        for head in range(2):
            scores = 0.3 * q[:, head] @ k[:, head].T + bias[first:last]
            torch.testing.assert_close(got[first:last, head], scores.softmax(-1) @ v[:, head])


def test_layers_in_place_of_transformer_engines(load: Callable[[str], ModuleType]) -> None:
    modules = load("peers").transformer_engine()
    layers = modules["transformer_engine.pytorch"].__dict__
    joined = layers["LayerNormMLP"](6, 24)
    for parameter in joined.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, 6)
    hidden = F.layer_norm(x, (6,), joined.layer_norm_weight, joined.layer_norm_bias, 1e-5)
    hidden = F.gelu(hidden @ joined.fc1_weight.T + joined.fc1_bias, approximate="tanh")
    torch.testing.assert_close(joined(x), hidden @ joined.fc2_weight.T + joined.fc2_bias)

    q, k, v = torch.randn(3, 2, 5, 2, 4)
    attention = layers["DotProductAttention"](num_attention_heads=2, kv_channels=4)
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).div(2).softmax(-1)
    expected = torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)
    torch.testing.assert_close(attention(query_layer=q, key_layer=k, value_layer=v), expected)
