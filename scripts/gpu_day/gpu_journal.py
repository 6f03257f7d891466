"""Measurements as lines of JSON, written to disk at once, so that nothing is lost if the process is killed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geoaccel.fingerprint import of_json

Line = dict[str, Any]


class Journal:
    """A file of lines, of which only those with the present provenance count.

    Args:
        path: The file; created with its folder.
        made: Provenance; lines from other code, another machine or other settings stay in the file but are ignored.
    """

    def __init__(self, path: Path, made: Mapping[str, Any]) -> None:
        self.path, self.made = path, of_json(made)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.exists() else b""
        self.lines = [line for text in whole.splitlines() if (line := read_line(text)).get("made") == self.made]
        if whole and not whole.endswith(b"\n"):  # killed while it wrote
            with path.open("ab") as file:
                file.write(b"\n")

    def write(self, kind: str, **values: Any) -> Line:
        """Add a line; it is on disk when this returns."""
        line = {"kind": kind, **values, "made": self.made, "at": time.strftime("%Y-%m-%d %H:%M:%S")}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)
        return line

    def of(self, kind: str, **values: Any) -> list[Line]:
        """Lines of a kind with these values, in the order written."""
        wanted = {"kind": kind, **values}
        return [line for line in self.lines if all(line.get(key) == value for key, value in wanted.items())]


def in_short(error: Exception) -> str:
    """The exception's class and the first line of its message, which may be empty."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:500]


def read_line(text: str | bytes) -> Line:
    """Content of a line; None if truncated or invalid."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
