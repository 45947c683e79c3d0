"""What a caller may upload in a minute: an ASGI layer in front of gradio, which bounds a single file alone."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from psd.ui import files

WINDOW_S = 60.0
MAX_FILES, MAX_BYTES = 30, 100_000_000  # of one caller in that time
MAX_CALLERS = 10_000  # remembered at once
REFUSED = b'{"detail": "Too many uploads: wait a minute, then send fewer or smaller files."}'

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class UploadLimit:
    """Answers 429 to an upload beyond the limits, and keeps the folder of uploads small after each of them."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]):
        self.app = app
        self.seen: dict[str, deque[list[float]]] = {}  # caller -> [when, bytes] of each of its requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].rstrip("/").endswith("/upload"):
            await self.app(scope, receive, send)
            return
        recent = self.recent(caller_of(scope))
        if len(recent) >= MAX_FILES or sum(bytes_ for _, bytes_ in recent) + announced_bytes(scope) > MAX_BYTES:
            await send({"type": "http.response.start", "status": 429, "headers": [
                (b"content-type", b"application/json"), (b"retry-after", b"60"),
            ]})  # fmt: skip
            await send({"type": "http.response.body", "body": REFUSED})
            return
        entry = [time.monotonic(), 0.0]
        recent.append(entry)

        async def counted() -> dict[str, Any]:
            message = await receive()
            entry[1] += len(message.get("body", b""))  # what comes, whatever was announced
            if sum(bytes_ for _, bytes_ in recent) > MAX_BYTES:
                return {"type": "http.disconnect"}
            return message

        await self.app(scope, counted, send)
        files.prune_uploads()

    def recent(self, caller: str) -> deque[list[float]]:
        """The caller's requests of the last minute; who has not come for as long is forgotten."""
        now = time.monotonic()
        if len(self.seen) >= MAX_CALLERS:
            self.seen = {name: seen for name, seen in self.seen.items() if seen and now - seen[-1][0] < WINDOW_S}
        seen = self.seen.setdefault(caller, deque())
        while seen and now - seen[0][0] >= WINDOW_S:
            seen.popleft()
        return seen


def caller_of(scope: Scope) -> str:
    """Its address; on a Space the one that its proxy adds, the last: what stands before may be made up."""
    forwarded = header(scope, b"x-forwarded-for").split(",")[-1].strip() if os.environ.get("SPACE_ID") else ""
    return forwarded or (scope.get("client") or ("", 0))[0]


def announced_bytes(scope: Scope) -> float:
    """Of the body; 0 where nothing, or no number, is announced."""
    announced = header(scope, b"content-length")
    if not (announced.isascii() and announced.isdigit()):
        return 0
    return int(announced) if len(announced) < 20 else math.inf


def header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name), "")
