"""What a visitor sees: the page in the system's Chromium, on a phone and on a desk, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from tests import app_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

PROMPT = "a red mushroom with a white stem"
RUN_MS = 120_000


@pytest.fixture(scope="module")
def app_url(psd_home: Path) -> str:
    return app_server.address()


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser: Browser, url: str, width: int, theme: str, query: str = "") -> tuple[Page, list[str]]:
    """The page, ready to use, and the list that collects what it should never do."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(30_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(f"script error: {error}"))
    ours = (url, "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(ours) else faults.append(request.url))
    page.goto(f"{url}/?__theme={theme}{query}")
    page.locator("#run").wait_for()
    return page, faults


def set_number(page: Page, name: str, value: int) -> None:
    """Typed as a visitor types it: Gradio takes a value set in one go for its own when the field has just appeared."""
    field = page.locator(f"#{name} input[type=number]")
    field.click()
    field.press("ControlOrMeta+a")
    field.press_sequentially(str(value), delay=50)
    field.press("Tab")
    page.wait_for_timeout(300)
    assert field.input_value() == str(value)


def set_steps(page: Page, steps: int) -> None:
    page.get_by_role("button", name="Sampling and guidance").click()
    page.locator("#steps input[type=number]").wait_for()
    page.wait_for_timeout(1000)  # an accordion's fields are mounted when it opens, and take their first value then
    set_number(page, "steps", steps)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_run_from_prompt_to_slider(browser: Browser, app_url: str, tmp_path: Path, width: int, theme: str):
    page, faults = open_page(browser, app_url, width, theme)
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    page.screenshot(path=tmp_path / "start.png", full_page=True)

    set_steps(page, 12)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Run", exact=True).click()
    page.locator("#preview img").wait_for(timeout=RUN_MS)
    page.locator("#charts svg").first.wait_for(timeout=RUN_MS)
    page.locator("#slider img").first.wait_for(timeout=RUN_MS)
    page.get_by_text("Done", exact=True).wait_for(timeout=RUN_MS)
    page.wait_for_function("[...document.querySelectorAll('#slider img')].every(image => image.naturalWidth > 0)")

    scores = page.locator("#scores").inner_text()
    assert "target" in scores and "held-out: reward-hacking check" in scores
    assert page.locator("#seed input").input_value() in page.locator("#status").inner_text()
    for name in ("with_png", "without_png", "metrics_csv", "run_json"):
        assert page.locator(f"#{name}").is_visible()
    assert page.locator("#run").is_enabled()
    page.locator("#history img").first.wait_for()
    assert page.locator("#history img").count() == 1

    for tab in ("API", "Score an image", "Create"):
        page.get_by_role("tab", name=tab).click()
        page.screenshot(path=tmp_path / f"{tab}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{tab} scrolls sideways"
    assert unlabelled(page) == []
    assert low_contrast(page) == []
    assert faults == []
    page.close()


def test_stop_keeps_the_partial_result_and_run_works_again(browser: Browser, app_url: str):
    page, faults = open_page(browser, app_url, 1440, "light")
    set_steps(page, 1000)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.locator("#run").click()
    page.locator("#preview img").wait_for(timeout=RUN_MS)
    page.locator("#stop").click()
    page.get_by_text("Stopped: the partial result is kept").wait_for(timeout=15_000)
    page.locator("#slider img").first.wait_for()
    with page.expect_download() as download:
        page.locator("#metrics_csv").click()
    assert Path(download.value.path()).read_text().startswith("step,")

    set_number(page, "steps", 4)
    page.locator("#run:enabled").click()
    page.get_by_text("Done", exact=True).wait_for(timeout=RUN_MS)
    assert faults == []
    page.close()


def test_refusals_links_and_dropped_files(browser: Browser, app_url: str, tmp_path: Path):
    page, faults = open_page(browser, app_url, 1440, "light")
    page.locator("#run").click()
    page.get_by_text("prompt is empty").wait_for()
    assert page.locator("#run").is_enabled()

    set_steps(page, 3)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Randomise seed").uncheck()
    set_number(page, "seed", 123)
    page.get_by_role("button", name="Share and restore").click()
    link = copied_link(page, "steps=3")
    if "steps=3" not in link:  # the form's first state may have come late and overwritten the field: type it again
        set_number(page, "steps", 4)
        set_number(page, "steps", 3)
        link = copied_link(page, "steps=3")
    assert "steps=3" in link and "seed=123" in link and "gamma" not in link

    page.locator("#run").click()
    page.get_by_text("Done", exact=True).wait_for(timeout=RUN_MS)
    with page.expect_download() as download:
        page.locator("#with_png").click()
    result = tmp_path / "with.png"
    download.value.save_as(result)
    page.close()

    page, _ = open_page(browser, app_url, 1440, "light", query="&" + link.partition("?")[2])
    page.wait_for_function("document.querySelector('#seed input')?.value === '123'")
    assert page.get_by_label("Prompt", exact=True).input_value() == PROMPT
    assert not page.get_by_label("Randomise seed").is_checked()
    page.close()

    page, _ = open_page(browser, app_url, 1440, "light")
    page.get_by_role("button", name="Share and restore").click()
    page.locator("#restore input[type=file]").set_input_files(result)
    page.wait_for_function("document.querySelector('#seed input')?.value === '123'")
    assert page.get_by_label("Prompt", exact=True).input_value() == PROMPT
    assert faults == []
    page.close()


def test_a_download_is_asked_for_with_size_and_licences(browser: Browser, app_url: str):
    page, faults = open_page(browser, app_url, 390, "light", "&prompt=a+lamp&preset=sd15-paper")
    box = page.get_by_label("Download 6250 MB first, once")
    box.wait_for()
    assert not box.is_checked()
    assert "CreativeML OpenRAIL-M" in page.locator("#allow_download").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box.check()
    page.locator("#run").click()
    page.get_by_text("HF_HUB_OFFLINE forbids").wait_for()  # the server of the tests has no network

    page.locator("#preset input").click()
    page.get_by_role("option", name="toybox-image", exact=True).click()
    box.wait_for(state="hidden")
    assert faults == []
    page.close()


def test_an_object_ends_upright_and_coloured_in_both_viewers(browser: Browser, app_url: str, tmp_path: Path):
    """The preset with fewer steps: a red cap over a white stem in both arms; a drag of one turns both."""
    page, faults = open_page(browser, app_url, 1440, "light")
    page.get_by_label("3D object").check()
    page.get_by_text("toybox/mvdream", exact=False).first.wait_for()
    set_steps(page, 60)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Randomise seed").uncheck()
    page.locator("#run").click()
    page.locator("#preview img").wait_for(timeout=RUN_MS)
    page.get_by_text("Done", exact=True).wait_for(timeout=RUN_MS)
    for arm in ("with", "without"):
        page.locator(f"#{arm}_video video").wait_for()
        upright_and_coloured(viewer(page, arm, tmp_path / f"{arm}.png"))
    assert page.locator("#object_files").get_by_text(".glb").count() >= 2
    front = page.locator("#slider img").first.get_attribute("src")
    set_number(page, "angle", 90)
    page.wait_for_function("front => document.querySelector('#slider img').src !== front", arg=front)

    before = {arm: viewer(page, arm, tmp_path / f"{arm}-before.png") for arm in ("with", "without")}
    box = page.locator("#with_model canvas").bounding_box()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.9 * box["height"], steps=8)
    page.mouse.up()
    page.wait_for_timeout(2000)
    for arm, picture in before.items():
        turned = viewer(page, arm, tmp_path / f"{arm}-turned.png")
        assert np.abs(turned - picture).mean() > 2, f"the object {arm} preference did not turn"
    assert unlabelled(page) == []
    assert faults == []
    page.close()


def viewer(page: Page, arm: str, path: Path) -> np.ndarray:
    """What an arm's viewer shows, float [H, W, 3] of 0 to 255, once there is more than its background."""
    canvas = page.locator(f"#{arm}_model canvas")
    canvas.wait_for(timeout=RUN_MS)
    for _ in range(60):
        canvas.screenshot(path=path)
        picture = np.asarray(Image.open(path).convert("RGB")).astype(float)[40:]  # below label and buttons
        if picture.std((0, 1)).max() > 5:
            break
        page.wait_for_timeout(500)
    return picture


def upright_and_coloured(picture: np.ndarray) -> None:
    """A mushroom: much red, in the middle, and what is neither red nor background is below it."""
    red = (picture[..., 0] > 90) & (picture[..., 0] > 1.8 * picture[..., 1:].max(-1))
    background = np.median(picture.reshape(-1, 3), axis=0)
    rest = (np.abs(picture - background).max(-1) > 25) & ~red
    assert red.mean() > 0.03, f"{red.mean():.3f} of the viewer is red"
    rows, columns = np.nonzero(red)
    assert abs(columns.mean() / picture.shape[1] - 0.5) < 0.1
    assert np.nonzero(rest)[0].mean() > rows.mean(), "the cap is not above the stem"


def copied_link(page: Page, awaited: str) -> str:
    """The link that Copy link makes once the form's last change has reached it."""
    box = page.locator("#link textarea, #link input").first
    for _ in range(30):
        page.locator("#copy_link").click()
        page.wait_for_timeout(300)
        if awaited in box.input_value():
            break
    return box.input_value()


def unlabelled(page: Page) -> list[str]:
    """Visible form controls that a screen reader could not name."""
    return page.evaluate(
        """() => [...document.querySelectorAll('input, textarea, select, button')].filter(control =>
            control.offsetParent && control.type !== 'hidden'
            && !control.labels?.length && !control.closest('label')
            && !control.getAttribute('aria-label') && !control.getAttribute('aria-labelledby')
            && !control.title && !control.innerText?.trim()
        ).map(control => control.outerHTML.slice(0, 160))"""
    )


def low_contrast(page: Page) -> list[str]:
    """Text of ours below 4.5 : 1 against the nearest opaque background (WCAG AA)."""
    return page.evaluate(
        """() => {
          const rgba = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
          const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
            .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
          const behind = node => { for (; node; node = node.parentElement) {
            const colour = rgba(getComputedStyle(node).backgroundColor); if (colour[3] > .99) return colour; }
            return [255, 255, 255]; };
          return [...document.querySelectorAll(
              '.psd-header *, .psd-status *, .psd-chart li, .psd-chart figcaption, .psd-scores th, .psd-scores td,'
              + '.psd-tag, .psd-estimate, .psd-note p, [data-testid=block-info], #run, .tab-wrapper button')]
            .filter(node => node.offsetParent && node.innerText?.trim())
            .map(node => { const [a, b] = [light(rgba(getComputedStyle(node).color)), light(behind(node))];
              const what = node.className + ': ' + node.innerText.slice(0, 40);
              return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), what]; })
            .filter(([ratio]) => ratio < 4.5).map(([ratio, what]) => ratio.toFixed(1) + ' ' + what);
        }"""
    )
