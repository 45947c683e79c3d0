"""Where things stand on the page: nothing moves under its reader, what matters is in view, every control takes keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.browser_page import LAST_S, finished, open_page, run, shift, until, viewer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.browser, pytest.mark.timeout(LAST_S + 200)]

MOST = 0.1  # layout shift of a phase, by web.dev's measure of a good page
QUICK = {
    "image": "&preset=toybox-quick&steps=24&prompt=a+red+mushroom",
    "3d": "&mode=3d&preset=toybox-fast&steps=3&prompt=a+red+mushroom",
}


def in_view(page: Page, *selectors: str) -> list[str]:
    """Those of the elements that are not seen as a whole without scrolling."""
    return page.evaluate(
        """names => names.filter(name => {
            const box = document.querySelector(name)?.getBoundingClientRect();
            return !box || !box.height || box.top < 0 || box.bottom > innerHeight;
        })""",
        list(selectors),
    )


def edges(picture: np.ndarray) -> float:
    """How much neighbouring pixels of a viewer differ: more where it draws lines."""
    return np.abs(np.diff(picture, axis=1)).mean()


@pytest.mark.parametrize("mode", QUICK)
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_moves_and_a_run_is_in_view(browser: Browser, app_url: str, width: int, mode: str):
    page, faults = open_page(browser, app_url, width, "light", QUICK[mode])
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a red mushroom'")
    page.locator("#slider img").first.wait_for()
    page.wait_for_timeout(2000)
    moved = {"load": shift(page)}
    run(page)
    until(page, "#preview img")
    matters = ["#status", "#run", "#stop", "#scores table", *(f"#charts figure:nth-child({i})" for i in (1, 2))]
    hidden = in_view(page, "#preview", *matters)
    finished(page)
    page.get_by_text("archives follow").wait_for(state="hidden")
    page.wait_for_timeout(2000)
    hidden += in_view(page, "#slider", *matters, *(["#models"] if mode == "3d" else []))
    moved["run"] = shift(page)
    assert max(most for most, _ in moved.values()) < MOST, moved
    assert width < 860 or hidden == []
    assert faults == []
    page.close()


def test_keys_and_looks_of_both_viewers(browser: Browser, app_url: str, tmp_path: Path):
    """The line between two pictures, the meshes' camera and look, and the full screen, without a pointer."""
    page, faults = open_page(browser, app_url, 1440, "light")
    line = page.locator("#slider .outer[tabindex='0']")
    line.wait_for()
    page.wait_for_function("[...document.querySelectorAll('#slider img')].every(image => image.naturalWidth > 0)")
    page.wait_for_timeout(1000)  # it is set in the middle of the pictures once it knows their width
    before = line.bounding_box()["x"]
    line.press("ArrowRight")
    step = line.bounding_box()["x"] - before
    assert step == pytest.approx(page.locator("#slider .content").bounding_box()["width"] / 20, abs=2)
    line.press("ArrowLeft")
    assert line.bounding_box()["x"] == pytest.approx(before, abs=2)

    page.locator("#examples_3d button").filter(has_text="in 3D").first.click()
    page.locator("#compare").press("Enter")  # the lines of a small picture have no room between them
    page.wait_for_function("document.fullscreenElement?.id === 'object'")
    page.wait_for_timeout(1000)
    surface = edges(viewer(page, "left", tmp_path / "surface.png"))
    page.locator("#look").get_by_label("Wireframe").press("Space")
    page.wait_for_timeout(3000)
    for _ in range(60):
        if edges(viewer(page, "left", tmp_path / "lines.png")) > 2 * surface:
            break
        page.wait_for_timeout(500)
    else:
        pytest.fail("no wireframe has come")
    before = {side: viewer(page, side, tmp_path / f"{side}.png") for side in ("left", "right")}
    page.locator("#left_model canvas").focus()
    page.keyboard.down("ArrowRight")
    page.wait_for_timeout(2000)
    page.keyboard.up("ArrowRight")
    page.wait_for_timeout(2000)
    for side, picture in before.items():
        assert np.abs(viewer(page, side, tmp_path / f"{side}-turned.png") - picture).mean() > 1, f"{side} did not turn"
    page.locator("#compare").press("Enter")
    page.wait_for_function("!document.fullscreenElement")

    page.locator("#views summary").press("Enter")
    page.wait_for_function("[...document.querySelectorAll('#views img')].every(each => each.naturalWidth > 0)")
    assert page.locator("#views img").count() == 2
    assert faults == []
    page.close()
