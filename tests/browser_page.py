"""Driving the page in a browser, and what no page may show: strange controls, controls without a name, faint text."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import axe_playwright_python
import numpy as np
from PIL import Image

from psd.config import ARMS, FIELDS, MODES
from psd.export import to_uint8
from psd.methods import METHODS
from psd.scene.cameras import orbit_cameras
from psd.scene.fields import ConstantBackground
from psd.scene.raster import MeshScene
from psd.ui.create import BEGIN, COPIES
from psd.ui.examples import load_prompts
from psd.ui.form import GROUPS, arm_label
from psd.ui.show import COMPARE, LOOKS, MORE, ONWARD

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

LAST_S, QUIET_S = 1500, 120  # of a run in all, and without a step or another word of the page: this machine may be slow
BEHIND = (0.86, 0.88, 0.90)  # the viewers' background
ENDS = ("Done", "Stopped", "Broke down", "broke down", "Nothing was made")
# Every control that the page is meant to have; gradio's own buttons of pictures, videos and viewers among them.
CONTROLS = {
    "Create", "Score an image", "API", "Run", "Stop", "Randomise seed", "On the left", "On the right",
    "Undo", "Fullscreen", "Download", "Adjust volume", "Reset to default value", "Use via API or MCP", "Settings",
    "Advanced", "Find a setting", "Reset to the preset", "Play", "Pause", "Clear", "Close",
    BEGIN, ONWARD, MORE, COMPARE, *LOOKS.values(),
    *COPIES.values(), "These settings", "Click to upload or drop files",
    *GROUPS.values(), "Share and restore", *map(arm_label, ARMS), *(mode.label for mode in MODES.values()), *METHODS,
    *(entry["prompt"] for entry in load_prompts()), *(field.label for field in FIELDS.values()),
    *(choice for field in FIELDS.values() for choice in field.choices),
}  # fmt: skip
PART = re.compile(r"(number input|range slider) for .+|Thumbnail \d+ of \d+|Moment of the run, .+")


def open_page(browser: Browser, url: str, width: int, theme: str, query: str = "") -> tuple[Page, list[str]]:
    """The page, ready to use, and the list that collects what it should never do."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(1000 * QUIET_S)
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
    page.get_by_role("button", name="Advanced").click()
    page.get_by_role("button", name="Sampling and guidance").click()
    page.locator("#steps input[type=number]").wait_for()
    page.wait_for_timeout(1000)  # an accordion's fields are mounted when it opens, and take their first value then
    set_number(page, "steps", steps)


def run(page: Page) -> None:
    """Press Run, and wait until the page has taken it up."""
    page.locator("#run").click()
    page.wait_for_function("document.querySelector('#stop:not([disabled])')")


def finished(page: Page, headline: str = "Done") -> str:
    """The status line once the run is over. Fails where it says nothing new for QUIET_S seconds."""
    told, begun = "", time.monotonic()
    changed = begun
    while not any(end in (text := page.locator("#status").inner_text()) for end in ENDS):
        now, step = time.monotonic(), re.sub(r"[\d.]+ (s|min|steps/s)\b", "", text)
        told, changed = step, changed if step == told else now
        assert now - changed < QUIET_S, f"the page is stuck: {text}"
        assert now - begun < LAST_S, f"the run takes too long: {text}"
        page.wait_for_timeout(100)
    assert headline in text
    page.locator("#run:enabled").wait_for()
    return text


def until(page: Page, selector: str) -> None:
    """Wait for what a run brings, as long as it goes on."""
    told, changed = "", time.monotonic()
    while not page.locator(selector).first.is_visible():
        text = page.locator("#status").inner_text()
        told, changed = text, changed if text == told else time.monotonic()
        assert time.monotonic() - changed < QUIET_S, f"no {selector}: {text}"
        page.wait_for_timeout(50)


def file_link(page: Page, name: str) -> Locator:
    """A link of the downloads by its accessible name, its menu open; it may be none."""
    link = page.get_by_role("link", name=name, exact=True, include_hidden=True)
    link.evaluate_all("links => links.forEach(link => link.closest('details')?.setAttribute('open', ''))")
    return link


def saved(page: Page, name: str, path: Path) -> Path:
    """The file behind a link of the downloads, by its accessible name."""
    with page.expect_download() as download:
        file_link(page, name).click()
    download.value.save_as(path)
    return path


def drawn(page: Page, arms: int, left: str, right: str) -> None:
    """The slider shows two pictures, those of the arms it names, and scores and curves name every arm once."""
    page.wait_for_function("[...document.querySelectorAll('#slider img')].every(image => image.naturalWidth > 0)")
    assert f"{left} (left) | {right} (right)" in page.locator("#slider").inner_text()
    assert page.locator("#scores thead th").count() == 1 + arms
    assert page.locator("#charts .psd-chart").first.locator("path.line").count() == arms


def viewer(page: Page, side: str, path: Path) -> np.ndarray:
    """What a viewer shows, float [H, W, 3] of 0 to 255, once there is more than its background."""
    canvas = page.locator(f"#{side}_model canvas")
    canvas.wait_for()
    for _ in range(240):
        canvas.screenshot(path=path)
        picture = np.asarray(Image.open(path).convert("RGB")).astype(float)[40:]  # below label and buttons
        if picture.std((0, 1)).max() > 5:
            break
        page.wait_for_timeout(500)
    return picture


def as_the_viewer_looks(scene: MeshScene, size: int) -> np.ndarray:
    """Our own render from where Babylon's viewer first stands, [size, size, 3] of 0 to 255: 15 degrees above the front,
    1.1 diagonals of the mesh's box from the box's middle, 0.8 rad from the lower to the upper edge."""
    used = scene.vertices[scene.faces].view(-1, 3)
    low, high = used.amin(0), used.amax(0)
    distance, fovy_deg = 1.1 * (high - low).norm().item(), math.degrees(0.8)
    camera = orbit_cameras(1, elevation_deg=15.0, fovy_deg=fovy_deg, distance=distance)
    centred = replace(scene, vertices=scene.vertices - (low + high) / 2, background=ConstantBackground(BEHIND))
    return to_uint8(centred.render(camera, size, samples=1).rgb[0]).astype(float)


def mean_colour(picture: np.ndarray) -> np.ndarray:
    """Of the object, [3], where it differs from the background."""
    return picture[np.abs(picture - 255 * np.array(BEHIND)).max(-1) > 25].mean(0)


def upright_and_coloured(picture: np.ndarray) -> None:
    """A mushroom: much red, in the middle, and what is neither red nor background is below it."""
    red = (picture[..., 0] > 90) & (picture[..., 0] > 1.8 * picture[..., 1:].max(-1))
    background = np.median(picture.reshape(-1, 3), axis=0)
    rest = (np.abs(picture - background).max(-1) > 25) & ~red
    assert red.mean() > 0.03, f"{red.mean():.3f} of the viewer is red"
    rows, columns = np.nonzero(red)
    assert abs(columns.mean() / picture.shape[1] - 0.5) < 0.1
    assert np.nonzero(rest)[0].mean() > rows.mean(), "the cap is not above the stem"


def shift(page: Page) -> tuple[float, list[str]]:
    """How far the page has moved under its reader since the last call, and what moved: CLS, the largest sum of layout
    shifts within five seconds, none a second after the one before, without those half a second after an input."""
    return page.evaluate(
        """async () => {
          const entries = await new Promise(done => {
            const watch = new PerformanceObserver(list => { watch.disconnect(); done(list.getEntries()); });
            watch.observe({type: 'layout-shift', buffered: true});
            setTimeout(() => done([]), 1000);
          });
          const about = ({node, previousRect: a, currentRect: b}) => {
            const element = node?.nodeType === 1 ? node : node?.parentElement;
            const name = element?.closest('[id]')?.id + ' ' + element?.tagName + '.' + element?.className;
            return `${name.slice(0, 60)} ${[a.x, a.y, a.height]} -> ${[b.x, b.y, b.height]}`;
          };
          let [sum, start, last, most] = [0, -Infinity, -Infinity, 0];
          const moved = [];
          for (const each of entries) {
            if (each.hadRecentInput || each.startTime <= (window.told ?? 0)) continue;
            if (each.startTime - last > 1000 || each.startTime - start > 5000) [sum, start] = [0, each.startTime];
            [sum, last] = [sum + each.value, each.startTime];
            most = Math.max(most, sum);
            if (each.value > 0.01) moved.push(each.value.toFixed(3), ...each.sources.map(about));
          }
          window.told = performance.now();
          return [most, moved];
        }"""
    )


def copied_link(page: Page, awaited: str) -> str:
    """The link that Copy link makes once the form's last change has reached it."""
    box = page.locator("#link textarea, #link input").first
    for _ in range(30):
        page.locator("#copy_link").click()
        page.wait_for_timeout(300)
        if awaited in box.input_value():
            break
    return box.input_value()


def uninvited(page: Page) -> list[str]:
    """Visible buttons and fields that the page is not meant to have, by accessible name; a second Run among them."""
    names = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea, select')].filter(control =>
            control.offsetParent && control.type !== 'hidden' && !control.closest('[role=listbox]')
            && getComputedStyle(control).visibility !== 'hidden'
        ).map(control => control.getAttribute('aria-label')
            || [...control.labels ?? []].map(label => label.innerText.trim()).join(' ')
            || control.closest('label')?.innerText.trim() || control.title || control.innerText.trim()
        ).map(name => name.split('\\n')[0])"""
    )
    assert len(names) > 20
    strangers = [name for name in names if name not in CONTROLS and not PART.fullmatch(name)]
    return strangers + [name for name in ("Run", "Stop", "Prompt") if names.count(name) != 1]


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


def inaccessible(page: Page) -> list[str]:
    """What axe-core finds that is serious or critical, with the elements."""
    script = next(Path(axe_playwright_python.__file__).parent.rglob("axe.min.js"))
    page.evaluate(script.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [
        f"{each['id']}: {node['html'][:160]}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


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
              '.psd-header *, .psd-status *, .psd-chart li, .psd-chart figcaption, .psd-scores *, .psd-files *,'
              + '.psd-caption, .psd-grid figcaption, .psd-estimate, .psd-note p, [data-testid=block-info], #run,'
              + '.tab-wrapper button')]
            .filter(node => node.offsetParent && node.innerText?.trim())
            .map(node => { const [a, b] = [light(rgba(getComputedStyle(node).color)), light(behind(node))];
              const what = node.className + ': ' + node.innerText.slice(0, 40);
              return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), what]; })
            .filter(([ratio]) => ratio < 4.5).map(([ratio, what]) => ratio.toFixed(1) + ' ' + what);
        }"""
    )
