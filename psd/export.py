"""Files of a run: PNG with its settings inside, metrics.csv, run.json. Written under another name, then renamed."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, PngImagePlugin
from torch import Tensor

PNG_KEY = "psd"  # text chunk that holds the settings; dropping the file on the app restores them


def export_png(path: Path, image: np.ndarray, settings: dict[str, Any]) -> None:
    """uint8 image [H, W, 3] with `settings` as JSON in a text chunk."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PNG_KEY, to_json(settings))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    write_file(path, buffer.getvalue())


def export_metrics(path: Path, rows: list[dict[str, float]]) -> None:
    """One row a step; an empty cell where a quantity was not computed."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)
    write_file(path, buffer.getvalue().encode())


def export_archive(path: Path, files: Iterable[Path]) -> None:
    """A ZIP of these files by their names, as they are: pictures, meshes and films are compressed already."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for file in files:
            archive.write(file, file.name)
    write_file(path, buffer.getvalue())


def export_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, (to_json(content, indent=2) + "\n").encode())


def to_json(content: Any, indent: int | None = None) -> str:
    """Standard JSON, which has no NaN: a number that is not finite becomes null."""
    return json.dumps(json.loads(json.dumps(content), parse_constant=lambda _: None), indent=indent, ensure_ascii=False)


def to_uint8(images: Float[Tensor, "*batch 3 H W"]) -> UInt8[np.ndarray, "*batch H W 3"]:
    """Bytes of images in [0, 1], channels last."""
    return to_bytes(images.detach().movedim(-3, -1).float().cpu().numpy())


def to_bytes(values: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """[0, 1] as 0 to 255, rounded; what lies beyond is cut off, and NaN counts as 0."""
    return (np.nan_to_num(values).clip(0, 1) * 255).round().astype(np.uint8)


def write_file(path: Path, data: bytes) -> None:
    """All of the file or none of it."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
