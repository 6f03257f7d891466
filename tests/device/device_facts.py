"""What torch does on CUDA: operations that wait, that are refused, that start no kernel."""

from __future__ import annotations

# How often an operation makes the host wait, from the CUDA sources of torch.
WAITS = {
    "_local_scalar_dense": 1, "nonzero": 1, "_unique2": 2, "unique_dim": 2, "unique_consecutive": 1, "bincount": 2,
    "masked_select": 1, "equal": 1, "_linalg_svd": 2, "_linalg_eigh": 1,
}  # fmt: skip
REFUSED = {"kthvalue", "put", "histc"}
"""What ``torch.use_deterministic_algorithms`` makes an error on CUDA, besides running sums of floats."""
FREE = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "detach", "alias",
    "lift_fresh", "lift", "_reshape_alias",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
INDEXED = {"index", "index_put", "_index_put_impl", "_unsafe_index"}
ROUNDED_TO = 512
"""Bytes: an allocator's unit."""
