"""Options of ``geoaccel view``."""

from __future__ import annotations

import argparse

from geoaccel.options.common import add_overwrite

EXAMPLES = (
    "geoaccel view scene/",
    "geoaccel view fast/ --against dense/ --html scene.html",
)


def add_view(view: argparse.ArgumentParser) -> None:
    """All options of the command."""
    view.add_argument("folder", metavar="FOLDER", help="output folder of reconstruct or demo")
    view.add_argument("--against", metavar="OTHER", help="another result of the same photographs, to compare")
    page = view.add_argument_group("one file to share")
    page.add_argument("--html", metavar="FILE", help="write a page (*.html, under 20 MB) and stop")
    add_overwrite(page, "file")
    live = view.add_argument_group("in the browser, live (extra view)")
    live.add_argument("--host", default="localhost", help="0.0.0.0 allows other machines (default: %(default)s)")
    live.add_argument("--port", type=port, default=8080, help="port, or the next free one (default: %(default)s)")


def port(text: str) -> int:
    """The type of an option: a port that others can be told of."""
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is no port; give a number from 1 to 65535")
    return int(text)
