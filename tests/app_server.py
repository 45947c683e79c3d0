"""The app in a process of its own, as `make run` starts it; once for all tests of a session."""

from __future__ import annotations

import atexit
import functools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
MAX_RUN_S = "5000"  # on a machine thirty times slower than most a short run is still one
LAST_S = 600.0  # a machine that also trains is slow


@functools.cache
def address() -> str:
    """URL of the running app; it ends with the session. Its cache is GRADIO_TEMP_DIR."""
    process, url = start()
    atexit.register(stop, process)
    return url


def start(quiet: bool = False, before: Sequence[str] = ()) -> tuple[subprocess.Popen, str]:
    """A process of the app, and its URL once it answers; a quiet one keeps what gradio has to say to itself.

    `before` is what its command line begins with.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "PSD_MAX_RUN_S": MAX_RUN_S,
    }  # fmt: skip
    said = subprocess.DEVNULL if quiet else None
    words = [*before, sys.executable, "app.py"]
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=said, stderr=said)
    url, give_up = f"http://127.0.0.1:{port}", time.monotonic() + LAST_S
    while True:
        assert process.poll() is None, f"the app ended with status {process.returncode}"
        assert time.monotonic() < give_up, "the app did not start"
        try:
            httpx.get(url).raise_for_status()
        except httpx.HTTPError:
            time.sleep(0.2)
        else:
            return process, url


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
