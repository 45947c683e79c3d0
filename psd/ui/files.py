"""Where the app's runs are written, and how many are kept. Knows nothing of gradio or models.

Gradio serves only its own cache folder, so runs live inside it: one folder a run, named by a random id. Others rename
and remove what lies here at any moment: whatever has vanished is passed over.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from psd.errors import RequestError

MAX_RUNS = 64
MAX_BYTES = 1_000_000_000
MAX_UPLOADS = 256
MAX_UPLOADED_BYTES = 500_000_000
MAX_STOPS = 256
# Younger entries may belong to a run or an upload still in progress.
MIN_AGE_S, MIN_UPLOAD_AGE_S = 900.0, 120.0
TOKEN = re.compile(r"[0-9a-f]{8,64}")
RUN = re.compile(r"[0-9a-f]{12}")


def cache_root() -> Path:
    """Gradio's cache folder (GRADIO_TEMP_DIR)."""
    return Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio")


def output_root() -> Path:
    """Folder of the app's run folders; created, and pruned to the newest runs. Raises RequestError."""
    root = made("psd-runs")
    prune(root)
    prune_uploads()
    return root


def run_folder(name: object) -> Path | None:
    """A run's folder by its name, which anybody may send; None where there is none."""
    valid = isinstance(name, str) and RUN.fullmatch(name)
    folder = cache_root() / "psd-runs" / name if valid else None
    return folder if folder is not None and folder.is_dir() else None


def run_and_arm(name: object) -> tuple[Path, str] | None:
    """The folder and the arm that "RUN" or "RUN/ARM" names; None where there is no such run."""
    run, _, arm = name.partition("/") if isinstance(name, str) else ("", "", "")
    folder = run_folder(run)
    return (folder, arm) if folder else None


def prune_uploads() -> None:
    """Keep the newest uploads alone. A shared default cache may hold other apps' files: only a folder that was given
    to this one is tidied."""
    if os.environ.get("GRADIO_TEMP_DIR"):
        own = (cache_root() / "psd-runs", cache_root() / "psd-stops")
        prune(cache_root(), MAX_UPLOADS, MAX_UPLOADED_BYTES, MIN_UPLOAD_AGE_S, keep=own)


def ask_to_stop(token: object) -> None:
    """Leave a mark for the run of this token, which may go on in another process. Of anything else: nothing."""
    if mark := mark_of(token):
        made(mark.parent.name)
        prune(mark.parent, MAX_STOPS, min_age_s=0.0)
        mark.touch()


def is_asked_to_stop(token: object) -> bool:
    mark = mark_of(token)
    return mark is not None and mark.exists()


def forget_stop(token: object) -> None:
    if mark := mark_of(token):
        with contextlib.suppress(OSError):
            mark.unlink()


def mark_of(token: object) -> Path | None:
    """The file that asks the run of a token to stop; of what is no token, which anybody may send, none."""
    valid = isinstance(token, str) and TOKEN.fullmatch(token)
    return cache_root() / "psd-stops" / token if valid else None


def made(name: str) -> Path:
    """A folder of the cache. Raises RequestError."""
    folder = cache_root() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or "no reason is given").lower()
        raise RequestError(f"The server cannot store results: {reason}; tell whoever runs it.") from error
    return folder


def prune(
    root: Path,
    max_entries: float = MAX_RUNS,
    max_bytes: float = MAX_BYTES,
    min_age_s: float = MIN_AGE_S,
    keep: tuple[Path, ...] = (),
) -> None:
    """Remove root's oldest entries, files AND directories, beyond max_entries or max_bytes; empty directories too.

    Entries younger than min_age_s seconds and those in `keep` are never removed.
    """
    now = time.time()
    try:
        entries = [(age_s(entry, now), entry) for entry in root.iterdir() if entry not in keep]
    except OSError:
        return
    total_bytes = 0
    for rank, (age, entry) in enumerate(sorted(entries)):
        size = size_bytes(entry)
        total_bytes += size
        surplus = rank >= max_entries or total_bytes > max_bytes or (size == 0 and entry.is_dir())
        if surplus and age >= min_age_s:
            remove(entry)


def remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            entry.unlink()


def age_s(path: Path, now: float) -> float:
    """Since it changed, or until it will have: a clock that ran ahead and was put back leaves entries of the future,
    which would never grow old. What has vanished has none: it is nobody's to remove."""
    try:
        return abs(now - path.stat().st_mtime)
    except OSError:
        return 0.0


def size_bytes(path: Path) -> int:
    """Of a file, or of all files in a folder and below; what has vanished has none."""
    total = 0
    with contextlib.suppress(OSError):
        if not path.is_dir():
            return path.stat().st_size
        for folder, _, names in os.walk(path):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.stat(os.path.join(folder, name)).st_size
    return total
