"""Faults of the machine, made on purpose: `make faults`, a row of what became of each (status 1 where one is bad).

python -m tests.faults [NAME ...]: kill_command, kill_server, disk, memory, servers, all of them without a name. Every
fault is made in processes of their own; full and read-only folders are mounts that only they see (Linux, unshare).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import httpx
from PIL import Image

from psd.record import read
from psd.ui.files import MAX_RUNS
from tests import app_server
from tests.soak import pixels

PROMPT = "a red mushroom with a white stem"
SETTINGS = {"prompt": PROMPT, "preset": "toybox-quick", "steps": 4}
LAST_S = 900.0
SLOW_S = 1.0  # a byte
FULL, READ_ONLY = "size=4k,nr_inodes=2", "size=1m,ro"  # of a mount
ADDRESSES = 1_400_000_000  # bytes: the libraries and the models take most of them


class Table:
    def __init__(self) -> None:
        self.bad = 0

    def row(self, fault: str, good: bool, told: str) -> None:
        self.bad += not good
        print(f"{'held' if good else 'FAILED':7} {fault:44} {told}", flush=True)


def command(output: Path, *flags: str, before: Sequence[str] = (), limit: int = -1) -> subprocess.Popen:
    """A run of the command line, with so many bytes of addresses; -1: as many as it wants."""
    words = [*before, sys.executable, "-m", "psd", PROMPT, "--preset", "toybox-quick", "--quiet"]
    return subprocess.Popen(
        [*words, "--output", str(output), *flags], cwd=app_server.ROOT, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Its status, and the last line that it complained in."""
    said = process.communicate(timeout=LAST_S)[1]
    lines = [line for line in said.splitlines() if line.strip()]
    return process.returncode, ("TRACEBACK " if "Traceback (most" in said else "") + (lines[-1] if lines else "")


def until(process: subprocess.Popen, happened: Callable[..., bool], *about: object) -> bool:
    """Whether it happened before the process ended."""
    give_up = time.monotonic() + LAST_S
    while not (found := happened(*about)) and time.monotonic() < give_up and process.poll() is None:
        time.sleep(0.002)
    return found


def runs(root: Path) -> list[Path]:
    return sorted(root.iterdir()) if root.is_dir() else []


def is_in(root: Path, state: str) -> bool:
    return any(read(folder).state == state for folder in runs(root))


def fewer(root: Path, count: int) -> bool:
    return len(runs(root)) < count


def judged(root: Path) -> str:
    """What the folders hold. Raises where a picture that they say they hold cannot be read."""
    told = []
    for folder in runs(root):
        result = read(folder)
        for path in result.files:
            if path.suffix in (".png", ".webp"):
                with Image.open(path) as image:
                    image.load()
        left = len(list(folder.rglob("*.partial")))
        told.append(f"{result.state or 'no manifest'}, {len(result.files)} files, {left} half-written, none listed")
    return "; ".join(told) or "nothing was left"


def kill_command(table: Table) -> None:
    """SIGKILL in every phase of the command line; then a run in the same folder."""
    with tempfile.TemporaryDirectory() as name:
        for phase, state in {"load": "", "step": "running", "export": "writing"}.items():
            root = Path(name) / phase
            process = command(root, "--arms", "with, without, selection, paper-form, negative-only", "--steps", "40")
            hit = until(process, is_in, root, state) if state else until(process, root.is_dir)
            process.kill()
            process.communicate()
            told = judged(root)
            status, said = ended(command(root, "--steps", "4"))
            table.row(
                f"SIGKILL, command line, {phase}", hit and status == 0, f"{told}; the next run: status {status} {said}"
            )


@contextlib.contextmanager
def server(cache: Path, before: list[str] | None = None) -> Iterator[tuple[subprocess.Popen, str]]:
    os.environ["GRADIO_TEMP_DIR"] = str(cache)
    process, url = app_server.start(quiet=True)
    try:
        yield process, url
    finally:
        process.kill()
        process.wait()


def ask(url: str, **settings) -> str:
    """The event of a queued run."""
    answer = httpx.post(f"{url}/gradio_api/call/v2/generate", json=SETTINGS | settings, timeout=LAST_S)
    return answer.json().get("event_id") or answer.text


def listen(url: str, event: str) -> tuple[str, object]:
    """(complete or error, data) of a run."""
    name = ""
    with httpx.stream("GET", f"{url}/gradio_api/call/generate/{event}", timeout=LAST_S) as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: ") and name in ("complete", "error"):
                return name, json.loads(line.removeprefix("data: "))
    return "lost", None


def kill_server(table: Table) -> None:
    """SIGKILL in every phase of a server's run; then the next server on its cache, which is killed in the next one."""
    with tempfile.TemporaryDirectory() as name:
        root, phase, hit, told = Path(name) / "psd-runs", "", True, ""
        for index in range(30 * MAX_RUNS):  # so many that removing them takes a moment
            (root / f"{index:012x}").mkdir(parents=True)
            shutil.copy(app_server.ROOT / "README.md", root / f"{index:012x}" / "run.json")
            os.utime(root / f"{index:012x}", (index, index))
        for next_phase in ("prune", "load", "step", "export", ""):
            with server(Path(name)) as (process, url):
                if phase:
                    end, _ = listen(url, ask(url))
                    kept = len(runs(root))
                    good = hit and end == "complete" and kept <= MAX_RUNS + 1
                    table.row(f"SIGKILL, server, {phase}", good, f"{told}; the next one's run: {end}, {kept} folders")
                    shutil.rmtree(root)
                if next_phase:
                    many = len(runs(root))
                    steps, arms = (4, "with, without, selection") if next_phase == "export" else (200, "with")
                    listener = threading.Thread(target=silent, args=(url, ask(url, steps=steps, arms=arms)))
                    listener.start()
                    hit = reached(next_phase, process, root, many)
            if phase := next_phase:
                listener.join()
                left = len(runs(root))
                told = judged(root) if left < 5 else f"{left} of {many} folders were left"


def reached(phase: str, process: subprocess.Popen, root: Path, many: int) -> bool:
    """Whether the server came to this phase of its run."""
    if phase == "prune":
        return until(process, fewer, root, many)
    return phase == "load" or until(process, is_in, root, {"step": "running", "export": "writing"}[phase])


def silent(url: str, event: str) -> None:
    with contextlib.suppress(httpx.HTTPError):
        listen(url, event)


def mounted(folder: Path, options: str) -> list[str]:
    """What a command begins with that is to see a small or a read-only disk there."""
    folder.mkdir(parents=True, exist_ok=True)
    return ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"', str(folder)]


def disk(table: Table) -> None:
    """Full and read-only: the output of the command line, the cache and the temporary folder of a server."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for kind, options, wanted in (
            ("nearly full", "size=48k", (0, 1)),
            ("full", FULL, (2,)),
            ("read-only", READ_ONLY, (2,)),
        ):
            status, said = ended(command(root / kind, "--steps", "4", before=mounted(root / kind, options)))
            good = status in wanted and said.startswith(("error: ", "warning: ")) and said.endswith(".")
            table.row(f"output {kind}", good, f"status {status}: {said.replace(name, '')}")
        for what, variable in {"cache": "GRADIO_TEMP_DIR", "temporary folder": "TMPDIR"}.items():
            for kind, options in (("full", FULL), ("read-only", READ_ONLY)):
                folder = root / f"{what} {kind}"
                told = served(folder, variable, mounted(folder, options))
                good = told == "complete" or (told.startswith("error: ") and told.endswith("."))
                table.row(f"{what} {kind}", good, told[:150])


def served(folder: Path, variable: str, before: list[str]) -> str:
    """What a server on such a disk answers to a run."""
    others = {"GRADIO_TEMP_DIR": str(folder.parent / "other"), "TMPDIR": str(folder.parent)}
    os.environ.update(others | {variable: str(folder)})
    try:
        process, url = app_server.start(quiet=True, before=before)
    except AssertionError:  # it ended: why, it says again
        again = subprocess.run([*before, sys.executable, "app.py"], cwd=app_server.ROOT, capture_output=True, text=True)
        return again.stderr.strip()
    try:
        end, data = listen(url, ask(url))
        return f"error: {data['error']}" if end == "error" else end
    finally:
        process.kill()
        process.wait()
        for each in others:
            del os.environ[each]


def memory(table: Table) -> None:
    """RLIMIT_AS for the largest runs that the bounds allow: a sentence, not a crash."""
    largest = {
        "image, 8 of 1,024 px": ["--image-size", "1024", "--images", "8", "--steps", "2"],
        "3d, grid 160, renders 512 px": [
            "--preset", "toybox-fast", "--grid-size", "160", "--render-size", "512", "--samples", "512", "--steps", "2",
        ],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        for what, flags in largest.items():
            status, said = ended(command(Path(name), *flags, limit=ADDRESSES))
            good = status == 0 or (status == 1 and "memory" in said and not said.startswith("TRACEBACK"))
            table.row(f"1.4 GB of addresses, {what}", good, f"status {status}: {said[:150]}")


def servers(table: Table) -> None:
    """Two on one cache; then clients of a byte a second beside another one."""
    with tempfile.TemporaryDirectory() as name, server(Path(name)) as (_, one), server(Path(name)) as (_, other):
        ends, bits = [], set()

        def client(url: str) -> None:
            for _ in range(3):
                end, data = listen(url, ask(url, seed=1))
                ends.append(end)
                if end == "complete":
                    path = next(each["path"] for each in data[3] if each["orig_name"] == "with.png")
                    bits.add(pixels(httpx.get(f"{url}/gradio_api/file={path}", timeout=LAST_S).content))

        clients = [threading.Thread(target=client, args=(url,)) for url in (one, other)]
        for each in clients:
            each.start()
        for each in clients:
            each.join()
        good = ends == 6 * ["complete"] and len(bits) == 1
        table.row(
            "two servers on one cache", good, f"{ends.count('complete')} of 6 runs finished, {len(bits)} pictures"
        )
        alone_s, _ = timed(one)
        with slow_reader(one, ask(one, steps=40)), slow_sender(one):
            beside_s, end = timed(one)
        told = f"another's run, after the 40 steps of theirs: {end} after {beside_s:.1f} s, {alone_s:.1f} s alone"
        table.row("clients of a byte a second, reading and sending", end == "complete", told)


def timed(url: str) -> tuple[float, str]:
    began = time.monotonic()
    end, _ = listen(url, ask(url))
    return time.monotonic() - began, end


@contextlib.contextmanager
def slow_reader(url: str, event: str) -> Iterator[None]:
    yield from trickle(url, f"GET /gradio_api/call/generate/{event} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), b"")


@contextlib.contextmanager
def slow_sender(url: str) -> Iterator[None]:
    head = b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n"
    yield from trickle(url, head + b"Content-Type: multipart/form-data; boundary=x\r\n\r\n", 10**6 * b"-")


def trickle(url: str, head: bytes, body: bytes) -> Iterator[None]:
    """While the caller does something else: a byte read, or one of `body` sent, every SLOW_S."""
    over = threading.Event()
    with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.sendall(head)

        def go() -> None:
            place = 0
            while not over.wait(SLOW_S):
                if body:
                    connection.sendall(body[place : place + 1])
                    place += 1
                else:
                    connection.recv(1)

        thread = threading.Thread(target=go, daemon=True)
        thread.start()
        yield
        over.set()
        thread.join()


FAULTS = {each.__name__: each for each in (kill_command, kill_server, disk, memory, servers)}


def main(names: list[str]) -> int:
    table = Table()
    for name in names or FAULTS:
        FAULTS[name](table)
    return int(table.bad > 0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(sys.argv[1:]))
