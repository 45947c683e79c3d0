"""What stands in front of gradio, on apps that misbehave; and the whole app's answers to strangers."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from psd.ui import gate
from tests import app_server


def told(app: Any, path: str = "/gradio_api/call/generate", body: bytes = b"{}", method: str = "POST") -> tuple:
    """(status, headers, body) that a stranger gets of `app` behind the gate."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "headers": [], "query_string": b"", "app": None}
    asyncio.run(gate.Gate(app)(scope, receive, send))
    starts = [message for message in sent if message["type"] == "http.response.start"]
    assert len(starts) == 1
    text = b"".join(message.get("body", b"") for message in sent).decode()
    return starts[0]["status"], dict(starts[0]["headers"]), text


def speaks(status: int, *parts: bytes, kind: bytes = b"application/json", fails: bool = False) -> Any:
    async def app(scope: dict, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        if fails:
            raise KeyError("/nobody")

    return app


async def raises(scope: dict, receive: Any, send: Any) -> None:
    raise KeyError("/nobody")


@pytest.mark.parametrize("app", [raises, speaks(500, b"Internal Server Error"), speaks(500, fails=True)])
def test_an_internal_error_becomes_a_refusal_with_a_sentence(app: Any):
    status, _, text = told(app)
    assert status == 400
    assert json.loads(text)["detail"].startswith(gate.UNREADABLE) and "nobody" not in text


def test_a_full_queue_gets_our_own_sentence():
    status, _, text = told(speaks(503, b'{"detail": "Queue is full."}'))
    assert status == 503 and json.loads(text)["detail"] == gate.BUSY


def test_other_answers_pass_as_they_are():
    assert told(speaks(200, b"[1, ", b"2]"))[::2] == (200, "[1, 2]")
    assert told(speaks(422, b'{"detail": "no"}'))[::2] == (422, '{"detail": "no"}')


def test_an_error_without_words_gets_some():
    _, _, text = told(speaks(200, b'event: error\ndata: {"error": null}\n\n', kind=b"text/event-stream"))
    assert gate.UNREADABLE in text and "null" not in text
    assert told(speaks(200, b'{"error": null}'))[2] == '{"error": null}'  # no stream: somebody's own data


def test_a_stream_that_breaks_off_ends_with_a_sentence():
    _, _, text = told(speaks(200, b"event: generating\n\n", kind=b"text/event-stream; charset=utf-8", fails=True))
    assert text.startswith("event: generating") and text.count("event: error") == 1 and gate.UNREADABLE in text


@pytest.mark.parametrize("path", ["/monitoring/summary", "/login/", "/gradio_api/vibe-code", "/gradio_api/dev/reload"])
def test_the_frameworks_extras_are_closed(path: str):
    assert told(speaks(200, b"secrets"), path)[0] == 404


@pytest.mark.parametrize("path", ["/", "/config", "/monitor", "/gradio_api/info", "/gradio_api/file=/login"])
def test_what_the_page_needs_is_open(path: str):
    assert told(speaks(200, b"fine"), path)[0] == 200


def test_a_body_is_bounded_whatever_it_announces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gate, "MAX_BODY_BYTES", 10)
    heard: list[str] = []

    async def app(scope: dict, receive: Any, send: Any) -> None:
        heard.append((await receive())["type"])
        await speaks(200)(scope, receive, send)

    told(app, body=11 * b"x")
    told(app, "/gradio_api/upload", body=11 * b"x")  # bounded by uploads.py
    assert heard == ["http.disconnect", "http.request"]


@pytest.mark.parametrize(
    ("joined", "listened", "query", "dropped"),
    [
        ("/gradio_api/call/v2/generate", None, b"", True),
        ("/gradio_api/call/v2/generate", "/gradio_api/call/generate/e1", b"", False),
        ("/gradio_api/call/v2/generate", "/gradio_api/call/generate/e2", b"", True),
        ("/gradio_api/queue/join", "/gradio_api/queue/data", b"session_hash=s1", False),
        ("/gradio_api/queue/join", "/gradio_api/queue/data", b"session_hash=s2", True),
    ],
)
def test_what_nobody_listens_to_is_dropped(
    monkeypatch: pytest.MonkeyPatch, joined: str, listened: str | None, query: bytes, dropped: bool
):
    monkeypatch.setattr(gate, "UNHEARD_S", 0.05)
    cleaned: list[str] = []

    async def clean_events(event_id: str) -> None:
        cleaned.append(event_id)

    queue = SimpleNamespace(clean_events=clean_events)
    blocks = SimpleNamespace(get_blocks=lambda: SimpleNamespace(_queue=queue))
    over = asyncio.Event()

    async def app(scope: dict, receive: Any, send: Any) -> None:
        if scope["method"] == "GET":
            await over.wait()
        else:
            await speaks(200, b'{"event_id": "e1"}')(scope, receive, send)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"session_hash": "s1"}', "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        pass

    async def scene() -> None:
        guarded = gate.Gate(app)
        common = {"type": "http", "headers": [], "query_string": query, "app": blocks}
        await guarded({**common, "path": joined, "method": "POST"}, receive, send)
        stream = asyncio.create_task(guarded({**common, "path": listened, "method": "GET"}, receive, send))
        if listened is None:
            stream.cancel()
        await asyncio.gather(*guarded.waiting)
        over.set()
        await asyncio.gather(stream, return_exceptions=True)
        assert guarded.heard == {} and guarded.waiting == set()

    asyncio.run(scene())
    assert cleaned == (["e1"] if dropped else [])


def test_requests_of_another_shape_are_refused_in_a_sentence():
    """Against the app itself: each had been an Internal Server Error, or an error without a word."""
    with httpx.Client(base_url=app_server.address(), timeout=60) as client:
        for path, content in (
            ("/gradio_api/call/v2/generate", b"[]"),
            ("/gradio_api/call/v2/scores", b'{"prompt": null}'),
            ("/gradio_api/call/v2/nobody", b"{}"),
            ("/gradio_api/api/generate", b"5"),
            ("/gradio_api/call/generate", 100_000 * b"["),
        ):
            answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
            assert 400 <= answer.status_code < 500 and len(str(answer.json()["detail"])) > 20, (path, answer.text)
        event = client.post("/gradio_api/call/scores", json={"data": [[]]}).json()["event_id"]
        assert "null" not in client.get(f"/gradio_api/call/scores/{event}").text
        assert client.get("/monitoring/summary").status_code == 404
