"""Files of arrays that a stranger may have made: their bytes are read by safetensors, and nothing is ever unpickled.

Loads no torch to read: who only checks a request does not need it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from psd.errors import RequestError, shown

ABOUT = "psd"  # of the metadata, all in one JSON text: safetensors writes several in an order that changes
FORMAT = 1
DTYPES = {"F16": "<f2", "F32": "<f4"}


class Kind(NamedTuple):
    """What a file is for."""

    setting: str  # that names it, and is blamed
    wanted: str  # what would do, for the end of a sentence: "an ARM_negative.safetensors"
    max_bytes: int
    dtypes: tuple[str, ...]  # of DTYPES

    def refusal(self, path: str | Path, why: str, writer: str = "a run") -> RequestError:
        """One sentence about this file, and what would do; it never names the folder."""
        name = shown(Path(path).name)
        return RequestError(f"{self.setting} {name} {why}: give {self.wanted} that {writer} has written.", self.setting)


def export_tensors(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Arrays with `about`, what they are of, as JSON in the metadata; the same arrays give the same bytes."""
    from psd.export import to_json, write_file

    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    write_file(path, save(contiguous, {ABOUT: to_json({"format": FORMAT, **about})}))


def read_tensors(path: str | Path, kind: Kind) -> tuple[dict[str, Float32[np.ndarray, "..."]], str]:
    """(array by name, SHA-256 of the file), finite and of its kind's types. Raises RequestError."""
    data = read_bytes(Path(path), kind)
    try:
        tensors = dict(deserialize(data))
    except SafetensorError as error:
        raise kind.refusal(path, "is not a safetensors file") from error
    arrays = {}
    for name, tensor in tensors.items():
        if tensor["dtype"] not in kind.dtypes:
            wanted = " or ".join(kind.dtypes)
            raise kind.refusal(path, f"holds numbers of type {tensor['dtype']}, {wanted} is needed")
        values = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]]).reshape(tensor["shape"]).astype(np.float32)
        if not np.isfinite(values).all():
            raise kind.refusal(path, "holds numbers that are not finite")
        arrays[name] = values
    return arrays, hashlib.sha256(data).hexdigest()


def read_bytes(path: Path, kind: Kind) -> bytes:
    """All of a file that is not too large. Raises RequestError."""
    try:
        if not path.is_file():
            raise kind.refusal(path, "is not a file")
        size = path.stat().st_size
        if size > kind.max_bytes:
            limit = kind.max_bytes // 2**20
            raise kind.refusal(path, f"has {size / 2**20:.1f} MB, at most {limit} MB are allowed")
        return path.read_bytes()
    except OSError as error:
        raise kind.refusal(path, f"cannot be read ({(error.strerror or type(error).__name__).lower()})") from error
