"""Hostile requests to a running app: `make fuzz` (5,000 of them, a table of the answers; status 1 where one is bad).

python -m tests.fuzz [REQUESTS] [SEED] [URL]: without a URL the app is started for it. Bad are an answer of 5xx, an
error without a sentence, a traceback, and a run that never ends.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter

import httpx

from tests import app_server

STREAM_S = 60.0
READ_BYTES = 200_000
LEAKS = ("Traceback (most recent", "site-packages")
NESTED = json.loads(50 * "[" + 50 * "]")
VALUES = [
    None, True, False, 0, -1, 1, 2, 3.5, 1e308, -1e308, 10**30, "", "a lamp", 5000 * "x", "<img src=x>", "NaN", "\x00",
    "../../etc/passwd", "/etc/passwd", "\U0001f600", [], {}, [1, 2], {"path": "/etc/passwd"}, {"path": None}, NESTED,
    {"a": {"b": 1}}, {"__type__": "update"}, {"url": "http://127.0.0.1:1/x", "path": "x"}, "image", "3d", "with",
    "toybox/sd", "hpsv2.1",
]  # fmt: skip
POSTED = [
    "/gradio_api/call/v2/generate", "/gradio_api/call/generate", "/gradio_api/call/scores",
    "/gradio_api/call/v2/scores", "/gradio_api/run/generate", "/gradio_api/api/generate", "/gradio_api/run/predict",
    "/gradio_api/queue/join",
    "/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/component_server", "/gradio_api/upload", "/gradio_api/mcp/",
    "/gradio_api/call/nobody", "/gradio_api/call/v2/nobody", "/gradio_api/process_recording", "/gradio_api/stream/a",
    "/gradio_api/vibe-code", "/login",
]  # fmt: skip
GOT = [
    "/gradio_api/file=/etc/passwd", "/gradio_api/file=../../etc/passwd", "/gradio_api/file=%00", "/gradio_api/file=",
    f"/gradio_api/file={3000 * 'a'}", "/gradio_api/file=http://127.0.0.1:1/", "/gradio_api/call/generate/nobody",
    "/gradio_api/call/generate/", "/gradio_api/queue/status", "/gradio_api/queue/data?session_hash=x", "/monitoring",
    "/monitoring/summary", "/monitoring/x", "/gradio_api/info?all_endpoints=x", "/gradio_api/deep_link?session_hash=x",
    "/?run=../x", "/?__theme=x", "/?prompt=%00&steps=x", "/static/../x", "/assets/../../x", "/svelte/..%2f",
    "/gradio_api/app_id", "/gradio_api/stream/a/b/c/playlist.m3u8", "/gradio_api/custom_component/a/b/c/d",
    "/gradio_api/dev/reload", "/pwa_icon/x", "/gradio_api/vibe-code/", "/gradio_api/mcp/schema", "/openapi.json",
    "/docs",
    "/gradio_api/proxy=http://127.0.0.1:1/x", "/logout", "/login/callback", "/config?page=x",
]  # fmt: skip


class Fuzz:
    def __init__(self, url: str, seed: int):
        self.rng = random.Random(seed)
        self.client = httpx.Client(base_url=url, timeout=STREAM_S)
        endpoints = self.client.get("/gradio_api/info").json()["named_endpoints"]
        self.names = [each["parameter_name"] for each in endpoints["/generate"]["parameters"]]
        self.functions = [each["id"] for each in self.client.get("/config").json()["dependencies"]]
        self.answers: Counter[str] = Counter()
        self.bad: list[str] = []

    def request(self) -> None:
        path = self.rng.choice(GOT) if self.rng.random() < 0.12 else self.rng.choice(POSTED)
        if path in GOT:
            self.judge(path, *self.get(path))
            return
        content, kind = self.sent(path)
        answer = self.client.post(path, content=content, headers={"Content-Type": kind})
        about = f"{path} {kind} {content[:200]!r}"
        self.judge(about, answer.status_code, answer.text)
        if answer.status_code == 200 and "/call/" in path and "event_id" in answer.text:
            self.follow(about, path, answer.json()["event_id"])

    def get(self, path: str) -> tuple[int, str]:
        read = b""
        with self.client.stream("GET", path, timeout=3) as answer:
            try:
                for part in answer.iter_raw():
                    read += part
                    if len(read) > READ_BYTES:
                        break
            except httpx.ReadTimeout:  # a stream that waits for events
                pass
            return answer.status_code, read.decode("utf-8", "replace")

    def sent(self, path: str) -> tuple[bytes, str]:
        """A body and its type: mostly JSON of settings, often of another shape, sometimes no JSON at all."""
        rng = self.rng
        if rng.random() < 0.15:
            content = rng.choice([b"", b"{", b"\xff\xfe", 1000 * b"[", b"[]" * 1000, 2_000_000 * b" "])
        elif path.endswith("/queue/join") and rng.random() < 0.7:
            content = json.dumps({
                "data": self.values(60), "fn_index": rng.choice([*self.functions, None, -1, 9999, "x"]),
                "session_hash": rng.choice(["abc", None, 5, 1000 * "x"]), "trigger_id": self.value(),
                "event_data": self.value(),
            }).encode()  # fmt: skip
        else:
            content = json.dumps(self.shaped(self.settings())).encode()
        kinds = ["application/json", "text/plain", "multipart/form-data; boundary=x", ""]
        return content, rng.choice(kinds) if rng.random() < 0.15 else kinds[0]

    def settings(self) -> dict:
        rng = self.rng
        prompt = rng.choice([*5 * ["a lamp"], "", None, 5, 5000 * "x"])
        settings = {"prompt": prompt, "steps": 2, "preset": "toybox-quick"}
        settings |= {rng.choice(self.names): self.value() for _ in range(rng.randrange(4))}
        if rng.random() < 0.3:
            settings[rng.choice(["nobody", "data", "__class__", "session_hash"])] = self.value()
        return settings

    def shaped(self, settings: dict) -> object:
        if self.rng.random() < 0.5:
            return settings
        shapes = [
            [], [settings], {}, {"data": settings}, {"data": None}, {"data": 5}, {"data": [settings]}, {"data": [[]]},
            {"data": {}}, None, 5, "x", [[]], NESTED, {"data": self.values(70)}, {"event_data": settings, "data": []},
            {"fn_index": self.value(), "data": []},
        ]  # fmt: skip
        return self.rng.choice(shapes)

    def value(self) -> object:
        return self.rng.choice(VALUES)

    def values(self, most: int) -> list:
        return [self.value() for _ in range(self.rng.randrange(most))]

    def judge(self, about: str, status: int, text: str) -> None:
        kind = "answered" if status < 400 else "refused (4xx)" if status < 500 else "FAILED (5xx)"
        self.answers[kind] += 1
        if status >= 500 or any(leak in text for leak in LEAKS):
            self.bad.append(f"{status} {about}: {text[:200]}")

    def follow(self, about: str, path: str, event: str) -> None:
        """What becomes of a queued request: its result, or a sentence."""
        told = ""
        try:
            with self.client.stream("GET", f"/gradio_api/call/{path.rpartition('/')[2]}/{event}") as stream:
                for line in stream.iter_lines():
                    told += line + "\n"
                    if line.startswith("event: generating"):  # it runs: leave
                        break
        except httpx.ReadTimeout:
            self.answers["NO END"] += 1
            self.bad.append(f"no end of {about}")
            return
        _, failed, error = told.partition("event: error")
        wordless = failed and ("null" in error[:40] or not error.strip())
        self.answers["ERROR WITHOUT A SENTENCE" if wordless else "refused in a sentence" if failed else "ran"] += 1
        if wordless or any(leak in error for leak in LEAKS):
            self.bad.append(f"{about}: {error.strip()[:200]}")


def main(requests: int = 5000, seed: int = 0, url: str = "") -> int:
    process = None
    if not url:
        process, url = app_server.start(quiet=True)
    fuzz = Fuzz(url, seed)
    for _ in range(requests):
        fuzz.request()
    if process:
        app_server.stop(process)
    print("".join(f"{count:6} {kind}\n" for kind, count in fuzz.answers.most_common()), end="")
    print(*fuzz.bad[:20], sep="\n")
    return int(bool(fuzz.bad))


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(main(*map(int, given[:2]), *given[2:]))
