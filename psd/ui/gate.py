"""What stands in front of gradio: an ASGI layer that closes what nobody needs, bounds bodies, ends what nobody hears,
and answers in a sentence where gradio would say Internal Server Error."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

from psd.ui.uploads import Receive, Scope, Send, announced_bytes

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 1_000_000  # of anything but an upload: a run's settings are 3 KB
UNHEARD_S = 5.0  # after which a request that nobody listens to is taken out of the queue, or its run ended
# The framework's own extras: usage figures, editing of the app's code, recordings, profiles, a proxy, a login.
CLOSED = re.compile(
    r"/(monitoring|login|logout|gradio_api/(dev|vibe-[a-z-]+|undo-vibe-edit|process_recording|proxy=.*|stream|profiling"
    r"|runs|run-history|component_server|custom_component|deep_link|token|user|login_check))(/.*)?"
)
UNREADABLE = "The request could not be read: it has another shape than the parameters that /gradio_api/info lists"
BUSY = "The server is busy: as many requests as it takes are waiting already. Try again in a few minutes."
NULL_ERROR = b'{"error": null}'


class Gate:
    """In front of gradio's app."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]):
        self.app = app
        self.heard: dict[str, int] = {}  # an event or a session -> how many listen to it
        self.waiting: set[asyncio.Task] = set()  # kept here, or they would be collected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].rstrip("/")
        if CLOSED.fullmatch(path):
            await answer(send, 404, "There is nothing here.")
            return
        if not path.endswith("/upload") and announced_bytes(scope) > MAX_BODY_BYTES:
            await answer(send, 413, f"The request is too large: at most {MAX_BODY_BYTES:,} bytes, files as uploads.")
            return
        exchange = Exchange(scope, receive, send)
        listened = listened_to(scope)
        self.heard[listened] = self.heard.get(listened, 0) + 1
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except Exception:  # noqa: BLE001  whatever gradio raises, a stranger gets a sentence
            await exchange.fail()
        finally:
            self.heard[listened] -= 1
            if not self.heard[listened]:
                del self.heard[listened]
        if asked := exchange.asked:
            task = asyncio.create_task(self.drop_unheard(scope["app"], *asked))
            self.waiting.add(task)
            task.add_done_callback(self.waiting.discard)

    async def drop_unheard(self, app: Any, event: str, session: str) -> None:
        """Where nobody listens to an event in time: as if its listener had left."""
        await asyncio.sleep(UNHEARD_S)
        if not self.heard.keys() & {event, session}:
            await app.get_blocks()._queue.clean_events(event_id=event)


def listened_to(scope: Scope) -> str:
    """The event or the session whose stream a request is; "" of every other one."""
    parts = scope["path"].strip("/").split("/")
    if scope["method"] != "GET":
        return ""
    if parts[-2:] == ["queue", "data"]:
        return parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
    return parts[-1] if "call" in parts else ""


class Exchange:
    """One request and what is said to it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self.path, self._receive, self._send = scope["path"].rstrip("/"), receive, send
        self.bounded = not self.path.endswith("/upload")
        self.read, self.started, self.replaced, self.streams = 0, False, False, False
        self.body = b""  # of a request that was queued
        self.queued = b""  # the answer to it

    async def receive(self) -> dict[str, Any]:
        message = await self._receive()
        self.read += len(message.get("body", b""))
        if self.bounded and self.read > MAX_BODY_BYTES:  # whatever was announced
            return {"type": "http.disconnect"}
        if self.joins:
            self.body += message.get("body", b"")
        return message

    @property
    def joins(self) -> bool:
        """Whether it asks for something to be computed in the queue."""
        return "/call/" in self.path or self.path.endswith("/queue/join")

    @property
    def asked(self) -> tuple[str, str] | None:
        """The event that was queued, and its session; None where none was."""
        found, session = fields(self.queued), fields(self.body).get("session_hash")
        event = found.get("event_id")
        return (event, session if isinstance(session, str) else event) if isinstance(event, str) else None

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 500:
                await self.refuse(message["status"])
                return
            self.started = True
            kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            self.streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
        elif message["type"] == "http.response.body":
            if self.replaced:
                return
            body = message.get("body", b"")
            if self.streams and NULL_ERROR in body:
                sentence = json.dumps({"error": self.sentence()}).encode()
                message = message | {"body": body.replace(NULL_ERROR, sentence)}
            elif self.joins and not self.streams:
                self.queued += body
        await self._send(message)

    async def fail(self) -> None:
        """Gradio raised: what it was given is not what it takes."""
        if self.started:  # a stream that breaks off
            error = (
                f"event: error\ndata: {json.dumps({'error': self.sentence(exc_info=True)})}\n\n" if self.streams else ""
            )
            with contextlib.suppress(Exception):  # its listener may be gone
                await self._send({"type": "http.response.body", "body": error.encode()})
        elif not self.replaced:
            await self.refuse(500, exc_info=True)

    async def refuse(self, status: int, exc_info: bool = False) -> None:
        self.replaced = True
        if status == 503:
            await answer(self._send, 503, BUSY)
        else:
            await answer(self._send, 400, self.sentence(exc_info))

    def sentence(self, exc_info: bool = False) -> str:
        reference = secrets.token_hex(4)
        log.warning("unreadable request to %s, reference %s", self.path, reference, exc_info=exc_info)
        return f"{UNREADABLE} (reference {reference})."


def fields(body: bytes) -> dict[str, Any]:
    """Of a JSON object; of anything else none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


async def answer(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"detail": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
