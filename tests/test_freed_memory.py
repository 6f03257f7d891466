"""Freed memory goes back to the system."""

from __future__ import annotations

import platform

import psutil
import pytest
import torch

from geoaccel import freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
def test_freed_pieces_between_kept_ones_go_back() -> None:
    process, size = psutil.Process(), 100_000
    pieces = [torch.ones(size // 4) for _ in range(2000)]  # below the size that glibc maps by itself
    del pieces[:-1:2]
    held = process.memory_info().rss
    freed_memory.give_back_freed_memory()
    assert process.memory_info().rss < held - 500 * size
    assert all(float(piece[0]) == 1 for piece in pieces)


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    freed_memory._trim.cache_clear()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    freed_memory.give_back_freed_memory()
    assert freed_memory._trim() is None
    freed_memory._trim.cache_clear()
