"""What a front end shows of a run: `watch` while it goes; `psd.record.read` tells of its folder afterwards.

A run goes in a thread of its own and hands Views over through a queue: whoever listens may leave at any moment, on the
server's event loop even, and waits for nothing. Shared by the page and the public API. Knows no components.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import queue
import secrets
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import gradio as gr
import torch

from psd.config import MODES, RunConfig
from psd.errors import NO_MEMORY, Abandoned, RequestError, is_out_of_memory
from psd.events import Downloading, Finished, Preview, Shown, Started, Step
from psd.models.hub import STRANGER
from psd.models.needs import fetch_models, missing_models
from psd.models.priors import load_prior
from psd.models.rewards import load_reward
from psd.models.rewards.table import REWARDS
from psd.record import write_preview
from psd.run import Event, generate
from psd.ui import estimate, files

log = logging.getLogger(__name__)

SHOW_EVERY_S = 0.45
HEARTBEAT_S = 1.0  # a listener that left is noticed at its next View: one comes this often at least
FEEL_EVERY_S = 15.0
LEAVE_S = 5.0  # what an abandoned run may take to write its numbers
ON_ZERO_GPU = estimate.ON_ZERO_GPU
DEVICE = threading.Lock()  # one run at a time, its files included
running: set[Run] = set()


@dataclass(frozen=True)
class View:
    """A run at one moment. `rows` are the lines of metrics.csv so far."""

    config: RunConfig
    download: Downloading | None = None
    directory: Path | None = None
    step: Step | None = None
    preview: Path | None = None
    rows: tuple[dict[str, float], ...] = ()
    warnings: tuple[str, ...] = ()
    waiting: bool = False  # for another run to leave the device
    shown: bool = False  # the folder holds what is looked at first
    finished: bool = False


def watch(config: RunConfig, allow_download: bool = False, token: str = "") -> Iterator[View]:
    """Run a checked `config` and yield a View at the start, at the first preview, at 1-2 Hz and at the end.

    Closing it returns at once and abandons the run: it ends after its step or its file, with numbers alone.
    `stop(token)` ends it after its step with results, and the stream with a finished View. Raises RequestError.
    """
    view = View(config)
    yield view
    estimate.check_work(config)
    deadline_s = estimate.MAX_RUN_S
    if ON_ZERO_GPU:
        if missing := missing_models(config):
            names = " and ".join(missing)
            raise RequestError(
                f"{names} must be downloaded first, which is no work for a GPU: Run on the page does it."
            )
        deadline_s = float(estimate.gpu_seconds(config))  # the GPU is taken away when the declared time is over
    run = Run(config, allow_download, token, deadline_s)
    run.start()
    try:
        while not view.finished:
            with contextlib.suppress(queue.Empty):
                told = run.views.get(timeout=HEARTBEAT_S)
                if isinstance(told, BaseException):
                    raise told
                view = told
            yield view
    finally:
        run.abandoned.set()
        if view.finished:  # it has only to give the device back
            run.join()
        elif ON_ZERO_GPU:  # a worker process of one request, without an event loop: its GPU must be idle when it goes
            run.join(LEAVE_S)


def stop(token: object) -> None:
    """Ask the run of this token to end after its step; from any process of this server."""
    files.ask_to_stop(token)


class Run(threading.Thread):
    """A run in progress. `views` are its Views, the last one finished; or what it raised."""

    def __init__(self, config: RunConfig, allow_download: bool, token: str, deadline_s: float):
        super().__init__(name="run", daemon=True)
        self.config, self.allow_download, self.token, self.deadline_s = config, allow_download, token, deadline_s
        self.views: queue.SimpleQueue[View | BaseException] = queue.SimpleQueue()
        self.abandoned = threading.Event()
        self.done = 0  # steps

    def run(self) -> None:
        running.add(self)
        try:
            self.wait_for_device()
            try:
                self.follow()
            finally:
                trim_heap()
                DEVICE.release()
        except Abandoned:
            self.views.put(RequestError("The run was given up: the server is closing."))
        except Exception as error:  # noqa: BLE001  raised again where somebody listens
            traceback.clear_frames(error.__traceback__)  # what it held may be what there was no room for
            self.views.put(error)
        finally:
            running.discard(self)
            files.forget_stop(self.token)

    def wait_for_device(self) -> None:
        """Take DEVICE; tells that it waits. Raises Abandoned, or RequestError where it was stopped meanwhile."""
        if not DEVICE.acquire(blocking=False):
            self.views.put(View(self.config, waiting=True))
            while not DEVICE.acquire(timeout=SHOW_EVERY_S):
                self.check_wanted()
        try:
            self.check_wanted()
        except Exception:
            DEVICE.release()
            raise

    def check_wanted(self) -> None:
        """Raise Abandoned where nobody listens, RequestError where the run was stopped before it began."""
        if self.abandoned.is_set():
            raise Abandoned
        if files.is_asked_to_stop(self.token):
            raise RequestError("Stopped before the first step.")

    def stopped(self) -> str:
        asked = files.is_asked_to_stop(self.token)
        return f"Stopped after step {self.done} of {self.config.steps}." if asked else ""

    def follow(self) -> None:
        """Drain the run's events into Views, until its end or until nobody listens. Raises Abandoned."""
        view, rows, shown_at, stepped_at = View(self.config), [], 0.0, time.monotonic()
        events = generate(
            self.config, files.output_root(), allow_download=self.allow_download, access=STRANGER,
            uploads=files.cache_root(), deadline_s=self.deadline_s, stop=self.stopped,
            heard=lambda: not self.abandoned.is_set(),
        )  # fmt: skip
        with contextlib.closing(events):
            for event in events:
                urgent = isinstance(event, Started | Shown | Finished) or (
                    isinstance(event, Preview) and view.preview is None
                )
                view = seen(view, event, rows)
                if isinstance(event, Step):
                    self.done, stepped_at = event.step, time.monotonic()
                elif isinstance(event, Finished):
                    estimate.note_speed(event.config, event.seconds, event.steps_done)
                    estimate.note_export(event.config, time.monotonic() - stepped_at)
                if urgent or time.monotonic() - shown_at >= SHOW_EVERY_S:
                    shown_at = time.monotonic()
                    self.views.put(replace(view, rows=tuple(rows)))


def seen(view: View, event: Event, rows: list[dict[str, float]]) -> View:
    """The View after an event; a step's row is appended to `rows`, a preview is written to the run's folder."""
    match event:
        case Downloading():
            return replace(view, download=event)
        case Started():
            return replace(view, config=event.config, directory=event.directory, warnings=event.warnings)
        case Step():
            rows.append({"step": event.step, **event.metrics})
            return replace(view, step=event)
        case Preview():
            with contextlib.suppress(OSError):  # a full disk: the run goes on without being seen
                return replace(view, preview=write_preview(view.directory, event))
        case Shown():
            return replace(view, shown=True)
        case Finished():
            return replace(view, finished=True)
    return view


def abandon_all(limit_s: float = LEAVE_S) -> None:
    """Before the process ends: every run writes its numbers, as far as `limit_s` allows."""
    give_up, left = time.monotonic() + limit_s, list(running)
    for run in left:
        run.abandoned.set()
    for run in left:
        run.join(max(0.0, give_up - time.monotonic()))


def fetch(config: RunConfig, allow_download: bool) -> Iterator[View]:
    """Download the models that a run of `config` needs: a View at 1-2 Hz, none where everything is here.

    Apart from `watch`, so that on ZeroGPU no GPU second goes into it.
    """
    shown_at = 0.0
    for event in fetch_models(config, allow_download, STRANGER):
        if time.monotonic() - shown_at >= SHOW_EVERY_S:
            shown_at = time.monotonic()
            yield View(config, download=event)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Turn every failure into one sentence: refusals as they are, the unexpected with an id for the log.

    Escaped: gradio shows it as HTML, and it may repeat what came from outside.
    """
    try:
        yield
    except RequestError as error:
        raise gr.Error(escape(str(error)), title="Please check the request", print_exception=False) from error
    except gr.Error:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            sentence = NO_MEMORY
            free_memory(error)
        else:
            reference = secrets.token_hex(4)
            log.exception("run failed, reference %s", reference)
            sentence = f"The run failed on our side; try again, and quote reference {reference} if it happens twice."
        raise gr.Error(sentence, title="The run stopped", print_exception=False) from error


def free_memory(error: BaseException) -> None:
    """Let go of what the frames of a failure hold."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trim_heap() -> None:
    """Give the system back what a run has freed: each run has a thread of its own, and glibc keeps its heap.

    Over forty runs a server holds 270 MB more without it, and goes on growing. Nothing where there is no glibc.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def warm() -> None:
    """Load both modes' default priors and every embedded reward, and measure how quick this machine is at them.

    Measured in small parts, between which a visitor's run goes first. A failure is only logged: the first run says it
    again, to somebody.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        for mode in MODES:
            load_prior(RunConfig.from_preset(mode=mode).prior, device)
        for name in embedded_rewards():
            load_reward(name, device)
        for mode in () if ON_ZERO_GPU else MODES:  # there a GPU is only lent to runs
            give_way(estimate.measuring(mode, device))
    except RequestError as error:
        log.warning("default models are not loaded: %s", error)


def feel_load() -> None:
    """Every so often, while no run is going, feel how busy this machine is, for the estimates; without end."""
    while True:
        time.sleep(FEEL_EVERY_S)
        if DEVICE.acquire(blocking=False):
            try:
                estimate.feel()
            finally:
                DEVICE.release()


def give_way(parts: Iterator[None]) -> None:
    """Drain `parts`, each of them alone on the device; whoever waits for it has it before the next one."""
    more = True
    while more:
        with DEVICE:
            more = next(parts, parts) is not parts
        time.sleep(0.05)


def embedded_rewards() -> list[str]:
    """Rewards of single pictures whose weights ship with this repository: scoring with them downloads nothing."""
    return [name for name, info in REWARDS.items() if info.embedded and info.views == 1]
