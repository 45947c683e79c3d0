"""How a front end follows a run: one at a time, in a thread of its own; stopping, leaving, what is said of failures."""

from __future__ import annotations

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch

from psd.config import RunConfig
from psd.errors import Abandoned, RequestError
from psd.events import Finished, Preview, Started, Step
from psd.models.hub import STRANGER
from psd.record import read
from psd.ui import estimate, files, watch
from tests import app_server

PROMPT = "a red mushroom with a white stem"
CONFIG = RunConfig(prompt=PROMPT, steps=5)
TOKEN = "0123456789abcdef"
LAST_S = 60.0


class Runs:
    """Stands in for psd.run.generate: a step each time it is let go, and an export that takes until it is let go."""

    def __init__(self, root: Path) -> None:
        self.root, self.going, self.asked = root, 0, []
        self.steps, self.export = queue.SimpleQueue(), threading.Event()
        self.ended: list[str] = []
        self.fail: Exception | None = None

    def generate(self, config: RunConfig, output_root: Path, **asked) -> Iterator[object]:
        self.asked.append(asked)
        self.going += 1
        assert self.going == 1, "two runs at once"
        end = "closed"
        try:
            yield Started("id", self.root, config, ("with",), ("a warning",))
            for step in range(1, config.steps + 1):
                self.steps.get(timeout=LAST_S)
                if self.fail:
                    raise self.fail
                if not asked["heard"]():
                    raise Abandoned
                yield Step(step, config.steps, 0.1 * step, 0.0, {"reward_with": float(step)})
                yield Preview(step, np.zeros((4, 8, 3), np.uint8))
                if sentence := asked["stop"]():
                    break
            assert self.export.wait(LAST_S)
            if not asked["heard"]():
                raise Abandoned
            yield Finished("id", self.root, config, {}, step, 0.1 * step, sentence)
            end = sentence or "done"
        except Abandoned:
            end = "abandoned"
            raise
        finally:
            self.going -= 1
            self.ended.append(end)

    def let_go(self, steps: int) -> None:
        for _ in range(steps):
            self.steps.put(None)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Runs]:
    fake = Runs(tmp_path)
    monkeypatch.setattr(watch, "generate", fake.generate)
    monkeypatch.setattr(watch, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(watch, "SHOW_EVERY_S", 0.0)
    monkeypatch.setattr(estimate, "check_work", lambda config: None)
    monkeypatch.setattr(estimate, "steps", {})
    monkeypatch.setattr(estimate, "exports", {})
    yield fake
    fake.export.set()
    fake.let_go(100)
    watch.abandon_all(LAST_S)
    assert not watch.DEVICE.locked()


def until(condition: Callable[[], object], views: Iterator[watch.View] | None = None) -> watch.View | None:
    """Wait, while the stream is read where there is one."""
    give_up, view = time.monotonic() + LAST_S, None
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        view = next(views) if views else time.sleep(0.005)
    return view


def test_a_run_is_told_from_its_start_to_its_end(runs: Runs):
    runs.let_go(5)
    runs.export.set()
    first, *_, last = watch.watch(CONFIG)
    assert first == watch.View(CONFIG)
    assert last.finished and last.directory == runs.root and last.warnings == ("a warning",)
    assert [row["step"] for row in last.rows] == [1, 2, 3, 4, 5]
    assert last.preview.exists()
    (asked,) = runs.asked
    assert asked["access"] == STRANGER and asked["deadline_s"] == estimate.MAX_RUN_S
    assert asked["allow_download"] is False


def test_leaving_returns_at_once_and_abandons_the_run_at_its_next_event(runs: Runs):
    views = watch.watch(CONFIG)
    until(lambda: runs.going, views)
    closing = threading.Thread(target=views.close)
    closing.start()
    closing.join(LAST_S)  # the run sits in a step that nobody lets go
    assert not closing.is_alive() and runs.going == 1
    runs.let_go(1)
    until(lambda: runs.ended == ["abandoned"])


def test_leaving_during_the_export_blocks_nothing_and_the_next_run_waits_for_it(runs: Runs):
    runs.let_go(5)
    views = watch.watch(CONFIG)
    for view in views:
        if view.step and view.step.step == 5:
            break
    views.close()
    following = watch.watch(CONFIG)
    for view in following:
        if view.waiting:
            break
    assert runs.going == 1
    runs.let_go(5)
    runs.export.set()
    *_, last = following
    assert last.finished and runs.ended == ["abandoned", "done"]


def test_a_stop_lets_the_run_write_everything(runs: Runs):
    views = watch.watch(CONFIG, token=TOKEN)
    runs.let_go(2)
    until(lambda: runs.going, views)
    for view in views:
        if view.step and view.step.step == 2:
            break
    watch.stop(TOKEN)
    runs.let_go(1)
    runs.export.set()
    *_, last = views
    assert last.finished and runs.ended[0] in ("Stopped after step 2 of 5.", "Stopped after step 3 of 5.")
    until(lambda: not files.is_asked_to_stop(TOKEN))


def test_a_run_stopped_while_it_waits_never_begins(runs: Runs):
    first, second = watch.watch(CONFIG), watch.watch(CONFIG, token=TOKEN)
    until(lambda: runs.going, first)
    for view in second:
        if view.waiting:
            break
    watch.stop(TOKEN)
    with pytest.raises(RequestError, match="Stopped before the first step"):
        until(lambda: False, second)
    assert len(runs.asked) == 1


@pytest.mark.parametrize(
    "token", ["", "../../../etc/passwd", "0" * 7, "0" * 65, "XYZ" * 5, "0123456789abcdef\n", None, 7]
)
def test_no_other_token_than_ours_reaches_the_disk(token: object):
    before = set(files.cache_root().rglob("*"))
    watch.stop(token)
    assert not files.is_asked_to_stop(token)
    assert set(files.cache_root().rglob("*")) == before


def test_a_failure_is_raised_where_somebody_listens_and_frees_the_device(runs: Runs):
    runs.fail = KeyError("broken")
    runs.let_go(1)
    with pytest.raises(KeyError, match="broken"):
        list(watch.watch(CONFIG))
    until(lambda: not watch.DEVICE.locked())


def test_what_a_failed_run_held_is_freed(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    freed = threading.Event()

    class Held:
        def __del__(self) -> None:
            freed.set()

    def generate(config: RunConfig, output_root: Path, **asked) -> Iterator[object]:
        held = Held()
        yield Started("id", runs.root, config, ("with",), ())
        raise RuntimeError(f"CUDA out of memory {type(held)}")

    monkeypatch.setattr(watch, "generate", generate)
    with pytest.raises(gr.Error, match="out of memory"), watch.clear_errors():
        list(watch.watch(CONFIG))
    assert freed.wait(LAST_S)


def test_a_finished_run_corrects_the_estimate(runs: Runs):
    runs.let_go(5)
    runs.export.set()
    list(watch.watch(CONFIG))
    assert estimate.step_s(CONFIG) == pytest.approx(0.1)
    assert ("image", "toybox") in estimate.exports


def test_the_warm_up_gives_way_to_a_run_between_its_parts(runs: Runs):
    begun, go_on, order = threading.Event(), threading.Event(), []

    def parts() -> Iterator[None]:
        begun.set()
        assert go_on.wait(LAST_S)
        order.append("first part")
        yield
        order.append(f"second part after {runs.ended}")
        yield

    warming = threading.Thread(target=watch.give_way, args=[parts()])
    warming.start()
    assert begun.wait(LAST_S)
    views = watch.watch(CONFIG)
    for view in views:
        if view.waiting:
            break
    go_on.set()
    runs.let_go(5)
    runs.export.set()
    *_, last = views
    warming.join(LAST_S)
    assert last.finished and order == ["first part", "second part after ['done']"]


def test_on_zero_gpu_a_run_has_its_seconds_and_downloads_nothing(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "ON_ZERO_GPU", True)
    monkeypatch.setattr(estimate, "gpu_seconds", lambda config: 40)
    runs.let_go(5)
    runs.export.set()
    list(watch.watch(CONFIG))
    assert runs.asked[0]["deadline_s"] == 40
    with pytest.raises(RequestError, match=r"stable-diffusion-v1-5 and hpsv2\.1 must be downloaded first"):
        list(watch.watch(RunConfig.from_preset("sd15-paper", prompt=PROMPT), allow_download=True))


def test_the_embedded_models_run_stop_and_are_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Live: a stopped run has its pictures, an abandoned one has its numbers alone."""
    monkeypatch.setattr(files, "output_root", lambda: tmp_path)
    monkeypatch.setattr(watch, "SHOW_EVERY_S", 0.0)
    config = RunConfig.from_preset("toybox-image", prompt=PROMPT, steps=500)
    for view in (views := watch.watch(config, token=TOKEN)):
        if view.step and view.step.step == 2:
            watch.stop(TOKEN)
    result = read(view.directory)
    assert view.finished and result.state == "done"
    assert result.stopped == f"Stopped after step {result.steps_done} of 500."
    assert all(arm.picture.exists() for arm in result.arms.values()) and len(result.arms) == 2

    for view in (views := watch.watch(config)):
        if view.step and view.step.step == 2:
            break
    views.close()
    until(lambda: not watch.DEVICE.locked())
    result = read(view.directory)
    assert result.state == "abandoned" and result.steps_done < 10
    assert {path.name for path in view.directory.iterdir()} == {"run.json", "metrics.csv", "previews"}


def test_ending_the_app_lets_runs_write_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from gradio_client import Client

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    process, url = app_server.start()
    try:
        job = Client(url, verbose=False, download_files=False, httpx_kwargs={"timeout": 600}).submit(
            prompt=PROMPT, steps=900, api_name="/generate"
        )
        give_up = time.monotonic() + app_server.LAST_S
        while not (job.outputs() and job.outputs()[-1][1]["step"] >= 2):
            assert not job.done() and time.monotonic() < give_up, job.outputs()
            time.sleep(0.05)
    finally:
        app_server.stop(process)
    assert process.returncode == 143
    (folder,) = (tmp_path / "psd-runs").iterdir()
    assert read(folder).state == "abandoned" and len(read(folder).rows) >= 2


def test_unexpected_failures_show_a_reference_and_no_internals(caplog: pytest.LogCaptureFixture):
    with pytest.raises(gr.Error) as shown, watch.clear_errors():
        raise KeyError("/secret/path")
    assert "secret" not in str(shown.value)
    (reference,) = re.findall(r"reference ([0-9a-f]{8})", str(shown.value))
    assert reference in caplog.text and "secret" in caplog.text


def test_what_came_from_outside_is_no_html_in_a_message():
    with pytest.raises(gr.Error) as shown, watch.clear_errors():
        raise RequestError("prior '<img src=x onerror=alert(1)>' is not known.")
    assert "<img" not in shown.value.message and "&lt;img src=x onerror=alert(1)&gt;" in shown.value.message


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["python", "gpu", "cpu"],
)
def test_want_of_memory_is_told_as_such(error: Exception):
    with pytest.raises(gr.Error, match="ran out of memory: choose fewer arms"), watch.clear_errors():
        raise error


def test_old_runs_are_removed_files_and_folders(tmp_path: Path):
    for index in range(12):
        folder = tmp_path / f"run{index:02d}"
        folder.mkdir()
        (folder / "result.png").write_bytes(b"x" * 100)
        os.utime(folder, (index, index))
    (tmp_path / "empty").mkdir()
    os.utime(tmp_path / "empty", (0, 0))
    (tmp_path / "young").mkdir()
    files.prune(tmp_path, max_entries=6)
    assert {path.name for path in tmp_path.iterdir()} == {"young", *(f"run{index:02d}" for index in range(7, 12))}
    files.prune(tmp_path, max_entries=64, max_bytes=250)
    assert {path.name for path in tmp_path.iterdir()} == {"young", "run10", "run11"}


def test_pruning_passes_over_what_has_vanished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another request renames or removes an entry after it was listed."""
    old = tmp_path / "old"
    old.touch()
    os.utime(old, (0, 0))
    listed = [tmp_path / "gone", old, tmp_path / "gone too"]
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(listed))
    files.prune(tmp_path, max_entries=0)
    assert not old.exists()
    files.prune(tmp_path / "nowhere")


def test_a_disk_that_takes_nothing_is_told_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "file"))
    with pytest.raises(RequestError, match=r"^The server cannot store results: .*; tell whoever runs it\.$"):
        files.output_root()
