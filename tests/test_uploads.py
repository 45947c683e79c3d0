"""Uploads are bounded for every caller, by number and by bytes, and the folder that they lie in is tidied."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from psd.ui import files, uploads
from psd.ui.uploads import UploadLimit


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    moved = Clock()
    monkeypatch.setattr(uploads, "time", moved)
    monkeypatch.setattr(uploads, "MAX_FILES", 3)
    monkeypatch.setattr(uploads, "MAX_BYTES", 1000)
    return moved


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Reads the whole body, as gradio does."""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})


def answer(
    limit: UploadLimit, client: str = "a", size: int = 10, path: str = "/gradio_api/upload", headers: tuple = ()
) -> int:
    """Status of a POST whose body comes in two parts, unannounced; 0 where it was cut off."""
    parts = [
        {"type": "http.request", "body": b"x" * (size // 2), "more_body": True},
        {"type": "http.request", "body": b"x" * (size - size // 2)},
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return parts.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers), "client": (client, 1)}
    asyncio.run(limit(scope, receive, send))
    return sent[0]["status"] if sent else 0


def test_a_caller_may_send_so_many_files_a_minute(clock: Clock):
    limit = UploadLimit(app)
    assert [answer(limit) for _ in range(4)] == [200, 200, 200, 429]
    assert answer(limit, client="b") == 200
    assert answer(limit, path="/gradio_api/queue/join") == 200  # no upload
    clock.now = 60.0
    assert answer(limit) == 200


def test_a_caller_may_send_so_many_bytes_a_minute(clock: Clock):
    limit = UploadLimit(app)
    assert answer(limit, size=900) == 200
    assert answer(limit, headers=((b"content-length", b"101"),)) == 429
    assert answer(limit, size=200) == 0  # what was not announced is counted as it comes
    assert answer(limit, client="b", size=900) == 200
    clock.now = 60.0
    assert answer(limit, size=900) == 200


@pytest.mark.parametrize(("announced", "status"), [(b"\xb2", 200), (b"-5", 200), (b"", 200), (b"9" * 5000, 429)])
def test_what_announces_no_number_is_counted_as_it_comes(clock: Clock, announced: bytes, status: int):
    assert answer(UploadLimit(app), headers=((b"content-length", announced),)) == status


def test_behind_the_proxy_of_a_space_it_is_the_address_that_the_proxy_adds(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    def from_(address: str) -> int:
        return answer(limit, headers=((b"x-forwarded-for", address.encode()),))

    limit = UploadLimit(app)
    assert [from_(f"10.0.0.{n}") for n in range(4)] == [200, 200, 200, 429]  # elsewhere anybody writes that header
    monkeypatch.setenv("SPACE_ID", "org/name")
    assert [from_(f"made up {n}, 10.0.0.1") for n in range(4)] == [200, 200, 200, 429]
    assert from_("10.0.0.2") == 200


def test_callers_that_stay_away_are_forgotten(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(uploads, "MAX_CALLERS", 5)
    limit = UploadLimit(app)
    for number in range(5):
        answer(limit, client=f"caller {number}")
    clock.now = 61.0
    answer(limit, client="new")
    assert set(limit.seen) == {"new"}


def test_an_upload_pushes_the_oldest_ones_out(clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(files, "MAX_UPLOADED_BYTES", 250)
    for index in range(4):
        folder = tmp_path / f"upload{index}"
        folder.mkdir()
        (folder / "picture.png").write_bytes(b"x" * 100)
        os.utime(folder, (index, index))
    run = tmp_path / "psd-runs"
    run.mkdir()
    os.utime(run, (0, 0))
    answer(UploadLimit(app))
    assert {path.name for path in tmp_path.iterdir()} == {"upload2", "upload3", "psd-runs"}
