"""What was measured, a line of JSON each, on disk as soon as it is there: killed at any time, nothing is lost."""

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
    """A file of lines, and those of them that count here and now.

    Args:
        path: Made with its folder.
        made: What a measurement depends on besides itself; lines of other code, another machine or other settings stay
            in the file and do not count.
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
        """Add a line; it is on the disk when this returns."""
        line = {"kind": kind, **values, "made": self.made, "at": time.strftime("%Y-%m-%d %H:%M:%S")}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)
        return line

    def of(self, kind: str, **values: Any) -> list[Line]:
        """Lines of a kind that hold these values, in the order in which they were written."""
        wanted = {"kind": kind, **values}
        return [line for line in self.lines if all(line.get(key) == value for key, value in wanted.items())]


def in_short(error: Exception) -> str:
    """Its class and the first line of what it says; some say nothing."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:500]


def read_line(text: str | bytes) -> Line:
    """What a line says; nothing where it is cut off or something else."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
