"""Rules about whole models with a method in them, compared with the dense model."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geoaccel.api import Action, accelerate, describe, restore
from geoaccel.backbone import Backbone
from geoaccel.errors import UserError
from geoaccel.merging.method import AttentionMerging
from geoaccel.precision import cast
from geoaccel.testing.rules import Trial, must, must_be_close, must_equal, rule, run, tensors_of

GRIDS = ((4, 6), (5, 7), (7, 4))
FLAGS: dict[str, Callable[[], Any]] = {
    "gradients": torch.is_grad_enabled,
    "default dtype": torch.get_default_dtype,
    "number of threads": torch.get_num_threads,
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "autocast": torch.is_autocast_enabled,
    "precision of matrix products": torch.get_float32_matmul_precision,
    "cudnn.benchmark": lambda: torch.backends.cudnn.benchmark,
    "cudnn.deterministic": lambda: torch.backends.cudnn.deterministic,
    "torch's generator": lambda: torch.get_rng_state().tolist(),
    "NumPy's generator": lambda: str(np.random.get_state()),  # noqa: NPY002
    "Python's generator": random.getstate,
}
"""State of the process that a method must not change."""


@rule()
def knobs_are_checked(trial: Trial) -> None:
    """A method is a frozen dataclass that prints, hashes and compares, and refuses invalid knobs."""
    method: Any = trial.make()
    must(dataclasses.is_dataclass(method), "it is not a dataclass")
    must(type(method).__dataclass_params__.frozen, "it can be changed; write @dataclass(frozen=True)")
    again = trial.make()
    must(method == again and hash(method) == hash(again), "two objects with the same knobs are not equal")
    must("bypass=False" in repr(method), f"it prints as {method!r}, without its knob bypass")
    must(bool(getattr(method, "name", "")), "it has no name")
    _must_refuse(lambda: trial.make(bypass="no"), "bypass='no', which counts as true")
    _must_refuse(lambda: trial.make(min_gain=2.0), "min_gain=2.0 with bypass=False, which would ignore it")
    if "ratio" in trial.nothing:
        _must_refuse(lambda: trial.make(ratio=1.5), "ratio=1.5")


def _must_refuse(make: Callable[[], Any], what: str) -> None:
    try:
        made = make()
    except UserError as error:
        must("\n" not in str(error), f"it refuses {what} in more than one line")
        return
    raise AssertionError(f"it takes {what}, as {made!r}; raise a geoaccel.errors.UserError")


@rule()
def parameters_are_left_alone(trial: Trial) -> None:
    """Accelerating and running change no parameter, no buffer and no key of the state dict."""
    model = trial.dense()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerate(model, merging=trial.make())
    run(model, trial.images())
    after = model.state_dict()
    must(list(after) == list(before), f"the state dict changed: {sorted(after.keys() ^ before.keys())[:3]}")
    for name, tensor in before.items():
        must(torch.equal(after[name], tensor), f"{name} changed")


@rule()
def it_acts_and_keeps_every_shape(trial: Trial) -> None:
    """With ``bypass=False`` it merges: every prediction changes, but not its shape or dtype."""
    dense, model = run(trial.dense(), trial.images()), trial.model()
    merged = run(model, trial.images())
    _must_be_like(merged, dense, "3 frames")
    for key, value in merged.items():
        must(not torch.equal(value, dense[key]), f"{key} is the same as for the dense model")
    (action,) = describe(model).merging
    must(not action.bypassed, f"it was bypassed: {action.bypassed}")
    must(_removed(action) > 0.1, f"it removed {_removed(action):.0%} of queries or keys, expected over 10 %")


@rule()
def it_can_merge_nothing(trial: Trial) -> None:
    """With ``ratio=0`` it equals the dense model bit for bit, and says why."""
    model = trial.model(trial.make_idle())
    must_equal(run(model, trial.images()), run(trial.dense(), trial.images()), f"{trial.make_idle()!r}")
    (action,) = describe(model).merging
    must((action.effective_ratio, action.effective_key_ratio) == (0, 0), f"it reports that it removed tokens: {action}")
    must(bool(action.bypassed), "it does not report why it was bypassed")


@rule()
def restore_is_exact(trial: Trial) -> None:
    """``restore`` gives the dense model bit for bit."""
    model = trial.model()
    run(model, trial.images())
    must_equal(run(restore(model), trial.images()), run(trial.dense(), trial.images()), "after restore")
    must(describe(model).merging == (), "it still acts after restore")


@rule()
def a_forward_leaves_nothing_to_the_next(trial: Trial) -> None:
    """The output for some images does not depend on earlier inputs."""
    images, model = trial.images(), trial.model()
    first = run(model, images)
    must_equal(run(model, images), first, "the second forward on the same images")
    run(model, trial.images(2, (7, 4), seed=1))
    run(model, trial.images(seed=2))
    must_equal(run(model, images), first, "after forwards on other images")
    must_equal(run(trial.model(), images), first, "another copy of the model")


@rule()
def a_later_call_replaces(trial: Trial) -> None:
    """Accelerating twice is accelerating once, and another method replaces the first."""
    once, model = run(trial.model(), trial.images()), trial.model()
    must_equal(run(accelerate(model, merging=trial.make()), trial.images()), once, "accelerated twice")
    found = [action.method for action in describe(accelerate(model, merging=trial.make_idle())).merging]
    must(found == [trial.make_idle()], f"after another method there are {found}")


@rule(AttentionMerging)
def every_attention_has_an_object_of_its_own(trial: Trial) -> None:
    """One for each global attention, and none elsewhere."""
    model = trial.model()
    sites = _backbone(model).sites(model)
    mixers = [site.mixer for site in sites["global"]]
    must(len({id(mixer) for mixer in mixers}) == len(mixers), "attentions share an object, and so its state")
    must(all(mixer.method == trial.make() for mixer in mixers), "a mixer has another method")  # type: ignore[union-attr]
    others = [site.mixer for kind in ("encoder", "frame") for site in sites[kind]]
    must(not any(hasattr(mixer, "method") for mixer in others), "it acts outside global attention")


@rule()
def nothing_global_is_touched(trial: Trial) -> None:
    """Flags and random generators of the process are not changed, and do not affect the output."""
    outputs = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = {name: flag() for name, flag in FLAGS.items()}
            outputs.append(run(trial.model(), trial.images()))
            for name, flag in FLAGS.items():
                must(flag() == before[name], f"it changed {name}")
    must_equal(outputs[1], outputs[0], "under another seed of torch")


@rule()
def other_defaults_of_torch_change_nothing(trial: Trial) -> None:
    """A default dtype or device of the process does not reach the model."""
    model = trial.model()
    expected, before = run(model, trial.images()), torch.get_default_dtype()
    images = trial.images()
    for default in (torch.float64, torch.bfloat16):
        try:
            torch.set_default_dtype(default)
            found = run(model, images)
        finally:
            torch.set_default_dtype(before)
        must_equal(found, expected, f"with {default} as default")
    with torch.device("meta"):
        found = run(model, images)
    must_equal(found, expected, "with meta as default device")


@rule()
def scenes_do_not_see_each_other(trial: Trial) -> None:
    """A batch of two scenes is two runs."""
    images, model = trial.images(batch=2), trial.model()
    both, first, second = run(model, images), run(model, images[:1]), run(model, images[1:])
    must_be_close(both, {key: torch.cat([first[key], second[key]]) for key in both}, 1e-5, "two scenes in a batch")


@rule()
def copies_are_independent(trial: Trial) -> None:
    """``copy.deepcopy`` and pickle give a model with the same output that shares no objects."""
    model = trial.model()
    expected = run(model, trial.images())
    equivalents: dict[str, Callable[[nn.Module], nn.Module]] = {
        "a deep copy": copy.deepcopy,
        "a pickle": lambda model: pickle.loads(pickle.dumps(model)),
    }
    for what, equivalent in equivalents.items():
        other = equivalent(model)
        must(not _mixers(model) & _mixers(other), f"{what} shares an object with the original")
        must_equal(run(other, trial.images()), expected, what)
        must(describe(other).merging == describe(model).merging, f"{what} has a different description")


@rule()
def every_size_and_dtype_works(trial: Trial) -> None:
    """Any grid, any number of frames, float32 and bfloat16: shapes are unchanged, and outputs finite."""
    sizes = [(frames, grid) for grid in GRIDS for frames in (1, 2, 3, 5)]
    shapes = [run(trial.dense(), trial.images(*size)) for size in sizes]
    for dtype in (torch.float32, torch.bfloat16):
        model, dtypes = cast(trial.model(), dtype), run(cast(trial.dense(), dtype), trial.images(*sizes[0]))
        for size, shape in zip(sizes, shapes, strict=True):
            frames, grid = size
            what = f"{frames} frames of {grid[0]} x {grid[1]} patches in {dtype}"
            expected = {key: value.to(dtypes[key].dtype) for key, value in shape.items()}
            _must_be_like(run(model, trial.images(*size)), expected, what)
            (action,) = describe(model).merging
            must(_removed(action) > 0 or frames == 1, f"{what}: nothing was merged")


@rule()
def inference_mode_and_back(trial: Trial) -> None:
    """A model accelerated in inference mode runs in two dtypes."""
    with torch.inference_mode():
        model = accelerate(trial.dense().bfloat16(), merging=trial.make())
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
            found = run(model.to(dtype), trial.images().to(dtype))
            must(all(value.isfinite().all() for value in found.values()), f"not finite in {name}")


@rule()
def gradients_reach_every_attention(trial: Trial) -> None:
    """The weights of every global attention get a gradient, the same with and without checkpointing."""
    from torch.utils.checkpoint import checkpoint

    model = trial.model().requires_grad_(True)
    images, sites = trial.images(), _backbone(model).sites(model)

    def gradient() -> Tensor:
        model.zero_grad()
        sum(value.square().mean() for value in tensors_of(model(images)).values()).backward()  # type: ignore[union-attr]
        weights: list[Any] = [site.qkv.weight for site in sites["global"]]  # type: ignore[union-attr]
        for number, weight in enumerate(weights):
            must(weight.grad is not None and bool(weight.grad.any()), f"global attention {number} gets no gradient")
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    expected = gradient()
    acting = {site for kind in ("frame", "global") for site in sites[kind]}
    for block in model.modules():
        if acting & set(block.children()):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    must_be_close({"gradient": gradient()}, {"gradient": expected}, 1e-4, "layers that run again in the backward pass")


@rule(AttentionMerging)
def one_frame_is_dense(trial: Trial) -> None:
    """A scene of one frame has nothing to merge across, and the method says so."""
    images, model = trial.images(1), trial.model()
    must_equal(run(model, images), run(trial.dense(), images), "one frame")
    (action,) = describe(model).merging
    must(list(action.bypassed) == ["one frame"], f"it says {list(action.bypassed)}, expected ['one frame']")


@rule()
def it_is_bypassed_where_it_buys_too_little(trial: Trial) -> None:
    """So few tokens stay dense, bit for bit, by default and with a ``min_gain`` that cannot be reached."""
    expected = run(trial.dense(), trial.images())
    for what, knobs in (("by default", {}), ("with min_gain=1e9", {"min_gain": 1e9})):
        model = trial.model(trial.method(**{**trial.knobs, **knobs}))
        must_equal(run(model, trial.images()), expected, what)
        (action,) = describe(model).merging
        whole = sum(action.bypassed.values()) == len(action.effects)
        must(whole, f"{what} not every attention was bypassed: {action.bypassed}")


def _backbone(model: nn.Module) -> Backbone:
    found = model.backbone
    assert isinstance(found, Backbone)
    return found


def _removed(action: Action) -> float:
    """Fraction of the queries or of the keys that were removed, whichever is larger."""
    return max(action.effective_ratio or 0, action.effective_key_ratio or 0)


def _mixers(model: nn.Module) -> set[int]:
    slots = (getattr(module, "mixer", None) for module in model.modules())
    return {id(mixer) for mixer in slots if hasattr(mixer, "method")}


def _must_be_like(found: dict[str, Tensor], dense: dict[str, Tensor], what: str) -> None:
    must(found.keys() == dense.keys(), f"{what}: predicts {list(found)}, expected {list(dense)}")
    for key, value in found.items():
        kind, expected = ((list(t.shape), t.dtype) for t in (value, dense[key]))
        must(kind == expected, f"{what}: {key} is {kind}, expected {expected}")
        must(bool(value.isfinite().all()), f"{what}: {key} is not finite")
