"""The file of a learned negative embedding n: one float32 tensor [L, D], written and read here alone.

A stranger may have made it: its bytes are read by safetensors, and nothing is ever unpickled. Loads no torch to read.
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

KEY = "negative"  # of the tensor
ABOUT = "psd"  # of the metadata, all in one JSON text: safetensors writes several in an order that changes
FORMAT = 1
MAX_BYTES = 4 * 2**20  # Stable Diffusion's 77 x 768 numbers have 0.2 MB
FIELD = "negative_from"  # is blamed


class Embedding(NamedTuple):
    values: Float32[np.ndarray, "L D"]
    sha256: str  # of the file


def export_embedding(path: Path, values: Float32[np.ndarray, "L D"], about: dict[str, Any]) -> None:
    """n with `about`, what it is of, as JSON in the metadata; the same n gives the same bytes."""
    from psd.export import to_json, write_file  # which loads torch: whoever only reads does not need it

    write_file(path, save({KEY: np.ascontiguousarray(values)}, {ABOUT: to_json({"format": FORMAT, **about})}))


def read_embedding(path: str | Path) -> Embedding:
    """The n in a file, checked but for the prior that is to read it. Raises RequestError, never naming the folder."""
    data = read_bytes(Path(path))
    try:
        tensors = dict(deserialize(data))
    except SafetensorError as error:
        raise refusal(path, "is not a safetensors file") from error
    if set(tensors) != {KEY}:
        raise refusal(path, f"holds {shown(sorted(tensors))}, not {KEY!r} alone")
    tensor = tensors[KEY]
    if tensor["dtype"] != "F32":
        raise refusal(path, f"holds numbers of type {tensor['dtype']}, F32 is needed")
    if len(tensor["shape"]) != 2 or 0 in tensor["shape"]:
        raise refusal(path, f"holds an array of {shown(tensor['shape'])}, [tokens, width] is needed")
    values = np.frombuffer(tensor["data"], "<f4").reshape(tensor["shape"]).astype(np.float32)
    if not np.isfinite(values).all():
        raise refusal(path, "holds numbers that are not finite")
    return Embedding(values, hashlib.sha256(data).hexdigest())


def read_bytes(path: Path) -> bytes:
    """All of a file that is not too large. Raises RequestError."""
    try:
        if not path.is_file():
            raise refusal(path, "is not a file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise refusal(path, f"has {size / 2**20:.1f} MB, at most {MAX_BYTES // 2**20} MB are allowed")
        return path.read_bytes()
    except OSError as error:
        raise refusal(path, f"cannot be read ({(error.strerror or type(error).__name__).lower()})") from error


def refusal(path: str | Path, why: str, writer: str = "a run") -> RequestError:
    """One sentence about this file, and what would do."""
    name = shown(Path(path).name)
    return RequestError(f"{FIELD} {name} {why}: give an ARM_negative.safetensors that {writer} has written.", FIELD)
