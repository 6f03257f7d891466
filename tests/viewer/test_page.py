"""``geoaccel view --html`` in a real browser: it opens without a network, draws, and obeys controls and keys."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from browser import CHROMIUM, WHY_NOT, Page, browser
from view_scenes import two_results

from geoaccel.viewer.page import html_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
WIDE, NARROW = (900, 600), (420, 700)
DRAWN = "Number(document.body.dataset.drawn || 0)"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, str]]:
    """A browser, and the address of the page."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "scene.html").write_text(html_page(two_results(), "two <results>"))
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page, (folder / "scene.html").as_uri()


@pytest.fixture
def page(opened: tuple[Page, str]) -> Page:
    """The page as it opens, whatever was done to it before."""
    page, address = opened
    page.open("about:blank", WIDE)
    page.events.clear()
    page.open(address, WIDE)
    page.wait(f"document.readyState === 'complete' && typeof scene !== 'undefined' && {DRAWN} > 0")
    return page


def after(page: Page, act: str) -> np.ndarray:
    """What the canvas shows after something was done, panel and photographs left out."""
    drawn = page.run(DRAWN)
    page.run(act)
    page.wait(f"{DRAWN} > {drawn}")
    return canvas(page)


def canvas(page: Page) -> np.ndarray:
    page.run("for (const id of ['panel', 'strip', 'names']) document.getElementById(id).style.visibility = 'hidden'")
    picture = page.picture()
    page.run("for (const id of ['panel', 'strip', 'names']) document.getElementById(id).style.visibility = ''")
    return picture


def points(picture: np.ndarray) -> int:
    """Pixels that are not the background."""
    return int((np.abs(picture - np.array([16, 18, 22])).max(axis=2) > 12).sum())


def set_to(name: str, value: object) -> str:
    return f"(() => {{ const x = $('{name}'); x.value = '{value}'; x.dispatchEvent(new Event('input')) }})()"


def switch(name: str) -> str:
    return f"$('{name}').click()"


def test_it_draws_points_without_a_network(page: Page) -> None:
    assert points(canvas(page)) > 5000
    assert page.problems() == []
    assert all(address.startswith(("file:", "data:")) for address in page.requests())
    assert page.run("document.title") == "two <results>"
    page.wait("$('count').textContent.includes('points')")


def test_sliders_act_at_once(page: Page) -> None:
    everything = points(after(page, set_to("cut", 0)))
    surest = points(after(page, set_to("cut", 80)))
    assert surest < 0.6 * everything
    after(page, set_to("cut", 0))
    assert points(after(page, set_to("edge", 10))) < 0.9 * everything
    after(page, set_to("edge", 50))
    assert points(after(page, set_to("size", 40))) > 1.02 * everything
    assert points(after(page, set_to("size", 8))) == everything


def test_colours_and_cameras(page: Page) -> None:
    image = canvas(page)
    assert not np.array_equal(after(page, set_to("colour", "confidence")), image)
    after(page, set_to("colour", "image"))
    assert not np.array_equal(after(page, switch("frusta")), image)
    np.testing.assert_array_equal(after(page, switch("frusta")), image)


def test_side_by_side_blended_and_alone(page: Page) -> None:
    both = after(page, set_to("show", "side by side"))
    left, right = both[:, :450], both[:, 450:]
    assert points(left) > 2 * points(right) > 0  # half of the points were left out of the second
    dense, half = (points(after(page, set_to("show", name))) for name in ("dense", "accelerated"))
    after(page, set_to("show", "blended"))
    none, all_of_it = (points(after(page, set_to("mix", share))) for share in (0, 100))
    assert (none, all_of_it) == (dense, half)
    assert all_of_it < points(after(page, set_to("mix", 50))) < none
    after(page, set_to("show", "dense"))


def test_what_is_counted_and_saved_is_what_is_shown(page: Page) -> None:
    for act in (set_to("cut", 50), set_to("show", "blended"), set_to("mix", 30)):
        after(page, act)
    head = page.run("ply().slice(0, 400).text()")
    count = int(head.partition("element vertex ")[2].split()[0])
    assert page.run("ply().size") == head.index("end_header") + len("end_header\n") + 15 * count
    page.wait(f"$('count').textContent.startsWith(({count}).toLocaleString('en'))")
    dense, fast = map(len, two_results().values())
    assert count == pytest.approx((0.7 * dense + 0.3 * fast) / 2, rel=0.05)
    for act in (set_to("cut", 0), set_to("show", "dense")):
        after(page, act)


def test_two_sizes_of_window(page: Page) -> None:
    counts = []
    for width, height in (NARROW, WIDE):
        drawn = page.run(DRAWN)
        page.resize((width, height))
        page.wait(f"{DRAWN} > {drawn} && canvas.width === {width} && canvas.height === {height}")
        counts.append(points(canvas(page)))
        box = page.run("['left', 'top', 'right', 'bottom'].map((side) => $('panel').getBoundingClientRect()[side])")
        assert 0 <= box[0] < box[2] <= width
        assert 0 <= box[1] < box[3] <= height
    assert min(counts) > 2000


def test_everything_is_reached_by_the_keyboard(page: Page) -> None:
    page.run("document.activeElement.blur(); canvas.focus()")
    before = canvas(page)
    for key in ("ArrowRight", "+"):
        drawn = page.run(DRAWN)
        page.press(key)
        page.wait(f"{DRAWN} > {drawn}")
        now = canvas(page)
        assert not np.array_equal(now, before), key
        before = now
    seen = []
    for _ in range(40):
        page.press("Tab")
        seen.append(page.run("document.activeElement.id || document.activeElement.getAttribute('aria-label')"))
        if seen[-1] == "fly to b.jpg":
            break
    controls = ["show", "cut", "edge", "size", "colour", "frusta", "photographs", "home", "screenshot", "export"]
    assert [name for name in seen if name in controls] == controls
    drawn = page.run(DRAWN)
    page.press("Enter")
    page.wait(f"{DRAWN} > {drawn} && inside === scene.cameras[1]")
    page.run("$('cut').focus()")
    value = int(page.run("$('cut').value"))
    page.press("ArrowRight")
    assert int(page.run("$('cut').value")) == value + 1


def test_a_click_on_a_camera_flies_there(page: Page) -> None:
    page.run("fly(home)")
    page.wait("inside === null && now.eye[0] === home.eye[0]")
    middle = (
        "(() => { const c = scene.cameras[0].corners; const m = c[0].map((_, k) => (c[0][k] + c[2][k]) / 2);"
        "const pane = panes()[0], at = onScreen(matrixOf(pane.width / canvas.height), m, pane.width, canvas.height);"
        "return [at[0] + pane.x, at[1]] })()"
    )
    page.click(*page.run(middle))
    page.wait("inside === scene.cameras[0]")
    eye, there = page.run("now.eye"), page.run("scene.cameras[0].eye")
    np.testing.assert_allclose(eye, there, atol=1e-6)
