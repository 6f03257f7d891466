"""Copies of networks: tests make thousands of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def duplicate(network: nn.Module) -> nn.Module:
    """What ``copy.deepcopy`` makes of a network, in a quarter of the time: most of what a module holds is empty."""
    if any(hasattr(module, "__deepcopy__") for module in network.modules()):
        return copy.deepcopy(network)
    memo: dict[int, Any] = {id(module): object.__new__(type(module)) for module in network.modules()}
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if type(tensor) is nn.Parameter:
                memo[id(tensor)] = nn.Parameter(tensor.clone(), tensor.requires_grad)
            else:
                memo[id(tensor)] = tensor.clone() if type(tensor) is Tensor else copy.deepcopy(tensor)
    for module in network.modules():
        state = vars(memo[id(module)])
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                state[key] = {name: None if part is None else memo[id(part)] for name, part in value.items()}
            else:  # most are empty: hooks
                plain = isinstance(value, bool | int | float | str | None)
                empty = isinstance(value, dict | set) and not value
                state[key] = value if plain else type(value)() if empty else copy.deepcopy(value, memo)
    return memo[id(network)]
