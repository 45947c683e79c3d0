"""Every hostile file on every door that takes files: refused in one sentence or harmless, and small in memory."""

from __future__ import annotations

import contextlib
import csv
import html
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from psd import RunConfig, generate
from psd.export import export_json
from psd.record import read
from psd.safety import check_request
from psd.scene.files import read_glb
from psd.ui import api, form, parts, show, wiring
from psd.ui.watch import clear_errors
from tests import hostile

MOST_MB = 200


def restore(path: Path) -> Any:
    """On the page: the settings of a dropped file."""
    values = wiring.restore_file(str(path))[:-1]
    settings = form.named(values)
    check_request(RunConfig.from_dict(settings))
    return settings


def score(path: Path) -> Any:
    scores = api.scores(str(path), "a lamp")
    assert all(isinstance(value, float) for value in scores.values())


def start_n(path: Path) -> Any:
    with clear_errors():
        form.checked({"prompt": "a lamp", "negative_from": {"path": str(path)}})


def start_object(path: Path) -> Any:
    with clear_errors():
        form.checked({"prompt": "a lamp", "preset": "toybox-fast", "mode": "3d", "start": {"path": str(path)}})


def look_at(path: Path) -> Any:
    with clear_errors():
        read_glb(path)


DOORS: dict[str, Callable[[Path], Any]] = {
    "restore": restore, "score": score, "start n": start_n, "start an object": start_object, "look at": look_at,
}  # fmt: skip


def resident_mb(which: str) -> float:
    return int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of uploads; the models are loaded, and their first work is done."""
    root = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(root))
        (root / "first.png").write_bytes(hostile.png())
        score(root / "first.png")
        (root / "first.glb").write_bytes(hostile.mesh())
        look_at(root / "first.glb")
        yield root


@pytest.mark.parametrize("name", hostile.FILES)
def test_a_hostile_file_is_refused_in_a_sentence_or_harmless(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(wiring.gr, "Info", said.append)
    path = folder / name
    path.write_bytes(hostile.FILES[name]())
    for door in DOORS.values():
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident_mb("VmRSS")
        settings, refused = None, None
        try:
            settings = door(path)
        except gr.Error as error:
            refused = error
        if refused:
            sentence = str(refused.message)
            assert refused.title == "Please check the request" and sentence.endswith(".")
            assert "\n" not in sentence and len(sentence) < 700 and str(folder) not in html.unescape(sentence)
            said.append(sentence)
        assert resident_mb("VmHWM") - before < MOST_MB
        if settings:
            said += seen(settings)
    assert not [text for text in said if "<script" in text or "<img src=x" in text]
    path.unlink()


def seen(settings: dict[str, Any]) -> list[str]:
    """All of our own HTML that shows settings."""
    models = settings["prior"], settings["reward"]
    texts = [form.model_note(*models), show.estimate_of(settings), *map(str, form.download_box(*models).values())]
    with contextlib.suppress(gr.Error):
        wiring.check_form(*(settings[name] for name in form.NAMES), False)
    return texts


def test_what_a_run_writes_of_hostile_words_reaches_neither_a_formula_nor_the_page(tmp_path: Path):
    for index, text in enumerate((*hostile.FORMULAS, hostile.SCRIPT)):
        config = RunConfig.from_preset(prompt=text, negative_prompt=text, steps=2)
        *_, last = generate(config, tmp_path / str(index))
        with open(last.directory / "metrics.csv", newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert len(cells) > 20 and not [cell for cell in cells if cell.startswith(("=", "+", "@", "\t", "\r"))]
        assert not [cell for cell in cells if cell.startswith("-") and not re.fullmatch(r"-[\d.e-]+", cell)]
        result = read(last.directory)
        page = parts.end_status(result, ("<script>",)) + parts.downloads(result) + str(show.show_end(result))
        assert "<script" not in page and "<img src=x" not in page
        shutil.rmtree(last.directory)


def test_a_manifest_that_somebody_else_wrote_reaches_no_page(tmp_path: Path):
    """Whoever can write in the cache's folder is no stranger; still nothing of it is taken for HTML."""
    arms = {hostile.SCRIPT: {"scores": {hostile.SCRIPT: 1.0}, "files": {"picture": "a.png"}, "remarks": {}}}
    (tmp_path / "a.png").write_bytes(hostile.png())
    about = {"config": hostile.settings(**hostile.TEXTS), "state": "done", "arms": arms, "remarks": [hostile.SCRIPT]}
    export_json(tmp_path / "run.json", about)
    seen = dict(zip(show.OUTPUTS, show.show_end(read(tmp_path)), strict=True))
    page = "".join(seen[name] for name in ("status", "scores", "files", "strips"))
    assert page.count("alert(1)") > 4 and "<script" not in page and "<img src=x" not in page
