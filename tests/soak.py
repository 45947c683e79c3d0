"""Four clients at once, some of which cancel or hang up: `make soak` (250 runs).

python -m tests.soak [RUNS] [URL PID]: without a URL the app is started for it. Every run that ends must have its own
settings, equal settings equal bits: status 1 where one is lost, failed or mixed up. Also told: the server's memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
from PIL import Image

from tests import app_server

CLIENTS, SEEDS = 4, 6
PROMPTS = ("a red mushroom with a white stem", "a blue chair with yellow legs", "a green lamp")
WAIT_S = 600.0


class Soak:
    def __init__(self, url: str, pid: int):
        self.url, self.pid = url, pid
        self.ends: Counter[str] = Counter()
        self.bits: dict[tuple, str] = {}
        self.bad: list[str] = []
        self.memory_mb: list[float] = []
        self.lock, self.left = threading.Lock(), 0

    def client(self, number: int) -> None:
        rng = random.Random(number)
        while self.take():
            settings = {
                "prompt": rng.choice(PROMPTS), "seed": rng.randrange(SEEDS), "preset": "toybox-quick",
                "steps": rng.choice([2, 4, 6]),
            }  # fmt: skip
            if rng.random() < 0.1:
                settings |= {"preset": "toybox-fast", "mode": "3d", "steps": 2, "arms": "with"}
            try:
                end = self.run(settings, rng.choice(["stay", "stay", "stay", "hang up", "cancel"]))
            except httpx.HTTPError as error:
                end = f"LOST: {type(error).__name__}"
            with self.lock:
                self.ends[end] += 1
                self.memory_mb.append(resident_mb(self.pid))

    def take(self) -> bool:
        with self.lock:
            self.left -= 1
            return self.left >= 0

    def run(self, settings: dict, how: str) -> str:
        with httpx.Client(base_url=self.url, timeout=WAIT_S) as client:
            while (asked := client.post("/gradio_api/call/v2/generate", json=settings)).status_code == 503:
                time.sleep(1.0)
            event, name, items = asked.json()["event_id"], "", 0
            with client.stream("GET", f"/gradio_api/call/generate/{event}") as stream:
                for line in stream.iter_lines():
                    if line.startswith("event: "):
                        name, items = line.removeprefix("event: "), items + 1
                    elif line.startswith("data: ") and name in ("complete", "error"):
                        return self.ended(settings, name, json.loads(line.removeprefix("data: ")), client)
                    if items >= 3 and how == "hang up":
                        return "hung up"
                    if items >= 3 and how == "cancel":
                        client.post("/gradio_api/cancel", json={
                            "event_id": event, "session_hash": event, "fn_index": 0,
                        })  # fmt: skip
                        return "cancelled"
            return "LOST: no end"

    def ended(self, settings: dict, name: str, data: object, client: httpx.Client) -> str:
        if name == "error":
            self.bad.append(f"{settings}: {data}")
            return "FAILED"
        _, status, _, files = data
        got = {key: status["config"][key] for key in settings}
        picture = next(file for file in files if file["orig_name"] == "with.png")
        address = f"/gradio_api/file={picture['path']}"
        bits = hashlib.sha256(pixels(client.get(address).content)).hexdigest()
        with self.lock:
            known = self.bits.setdefault(tuple(settings.values()), bits)
        if got != settings or known != bits:
            self.bad.append(f"{settings}: got {got}, {'other' if known != bits else 'the same'} bits")
            return "MIXED UP"
        return "finished"


def pixels(png: bytes) -> bytes:
    return Image.open(io.BytesIO(png)).convert("RGB").tobytes()


def resident_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in status.splitlines() if line.startswith("VmRSS")), 0.0)


def main(runs: int = 250, url: str = "", pid: int = 0) -> int:
    process = None
    if not url:
        process, url = app_server.start(quiet=True)
        pid = process.pid
    soak = Soak(url, pid)
    soak.left = runs
    clients = [threading.Thread(target=soak.client, args=(number,)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    if process:
        app_server.stop(process)
    print("".join(f"{count:6} {end}\n" for end, count in soak.ends.most_common()), end="")
    memory = soak.memory_mb
    marks = [0, len(memory) // 5, len(memory) // 2, len(memory) - 1]
    print("resident memory (MB) after so many runs:", {mark + 1: round(memory[mark]) for mark in marks})
    print(*soak.bad[:20], sep="\n")
    return int(bool(soak.bad) or any(end.startswith(("LOST", "FAILED", "MIXED")) for end in soak.ends))


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(main(*map(int, given[:1]), *given[1:2], *map(int, given[2:3])))
