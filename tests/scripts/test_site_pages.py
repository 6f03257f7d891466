"""Pages of the site: links to files that are no pages become names, roles of docstrings go."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import site_pages

CONFIG = {"docs_dir": str(site_pages.ROOT / "docs")}


@pytest.mark.parametrize(
    ("page", "text", "made"),
    [
        ("tune.md", "see [methods](methods.md#knobs)", "see [methods](methods.md#knobs)"),
        ("tune.md", "[rules](../CONTRIBUTING.md)", "rules (`CONTRIBUTING.md`)"),
        ("results/merging.md", "![plot](../../benchmarks/a.png)", "plot (`benchmarks/a.png`)"),
        ("results/merging.md", "![plot](../demo.png)", "![plot](../demo.png)"),
        ("index.md", "[tune](tune.md), [rules](CONTRIBUTING.md)", "[tune](tune.md), rules (`CONTRIBUTING.md`)"),
        ("index.md", "[paper](https://arxiv.org/abs/1)", "[paper](https://arxiv.org/abs/1)"),
    ],
)
def test_links_stay_within_the_site(page: str, text: str, made: str) -> None:
    where = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert site_pages.on_page_markdown(text, where, CONFIG, None) == made


def test_roles_go() -> None:
    assert site_pages.on_page_content("a :func:<code>b</code> c", None, None, None) == "a <code>b</code> c"
