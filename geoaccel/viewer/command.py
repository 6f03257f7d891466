"""The command ``geoaccel view``."""

from __future__ import annotations

import argparse

from geoaccel.atomic import check_output_file, write_bytes
from geoaccel.console import expand, say
from geoaccel.viewer.folder import read_results


def run(args: argparse.Namespace) -> None:
    """Write a page, or serve until Ctrl-C."""
    folder = expand(args.folder)
    out = check_output_file(args.html, ".html", overwrite=args.overwrite) if args.html else None
    results = read_results(folder, expand(args.against) if args.against else None)
    if not all(view.rated for view in results.values()):
        say("showing points only; for confidence and depth edges write geoaccel reconstruct --formats view")
    if out is not None:
        from geoaccel.viewer.page import html_page

        page = html_page(results, folder.resolve().name).encode(errors="replace")  # names may be any bytes
        write_bytes(out, page)
        print(f"wrote {out}, {len(page) / 1e6:.1f} MB; it opens in any browser, without a network")
        return
    from geoaccel.viewer.live import serve

    live = serve(results, args.host, args.port)
    print(f"showing {folder} at {live.address} (Ctrl-C to stop)", flush=True)
    try:
        live.wait()
    except KeyboardInterrupt:
        say("")
    finally:
        live.stop()
