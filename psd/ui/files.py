"""Where the app's runs are written, and how many are kept. Knows nothing of gradio or models.

Gradio serves only its own cache folder, so runs live inside it: one folder a run, named by a random id.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

MAX_RUNS = 64
MAX_BYTES = 1_000_000_000
MAX_UPLOADS = 256
# Younger entries may belong to a run or an upload still in progress.
MIN_AGE_S = 900.0


def cache_root() -> Path:
    """Gradio's cache folder (GRADIO_TEMP_DIR)."""
    return Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio")


def output_root() -> Path:
    """Folder of the app's run folders; created, and pruned to the newest runs."""
    root = cache_root() / "psd-runs"
    root.mkdir(parents=True, exist_ok=True)
    prune(root)
    # A shared default cache may hold other apps' files: only a folder that was given to this one is tidied.
    if os.environ.get("GRADIO_TEMP_DIR"):
        prune(cache_root(), max_entries=MAX_UPLOADS, keep=(root,))
    return root


def prune(
    root: Path,
    max_entries: int = MAX_RUNS,
    max_bytes: int = MAX_BYTES,
    min_age_s: float = MIN_AGE_S,
    keep: tuple[Path, ...] = (),
) -> None:
    """Remove root's oldest entries, files AND directories, beyond max_entries or max_bytes; empty directories too.

    Entries younger than min_age_s seconds and those in `keep` are never removed.
    """
    entries = [(entry.stat().st_mtime, entry) for entry in root.iterdir() if entry not in keep]
    total_bytes = 0
    for rank, (modified, entry) in enumerate(sorted(entries, reverse=True)):
        size = _bytes(entry)
        total_bytes += size
        surplus = rank >= max_entries or total_bytes > max_bytes or (entry.is_dir() and size == 0)
        if not surplus or time.time() - modified < min_age_s:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _bytes(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
