"""The file of a learned negative embedding n: one float32 tensor [L, D], written and read here alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from psd.errors import shown
from psd.tensors import Kind, export_tensors, read_tensors

KEY = "negative"  # of the tensor
# Stable Diffusion's 77 x 768 numbers have 0.2 MB.
FILE = Kind("negative_from", "an ARM_negative.safetensors", 4 * 2**20, ("F32",))


class Embedding(NamedTuple):
    values: Float32[np.ndarray, "L D"]
    sha256: str  # of the file


def export_embedding(path: Path, values: Float32[np.ndarray, "L D"], about: dict[str, Any]) -> None:
    """n, with `about`, what it is of."""
    export_tensors(path, {KEY: values}, about)


def read_embedding(path: str | Path) -> Embedding:
    """The n in a file, checked but for the prior that is to read it. Raises RequestError, never naming the folder."""
    arrays, sha256 = read_tensors(path, FILE)
    if set(arrays) != {KEY}:
        raise FILE.refusal(path, f"holds {shown(sorted(arrays))}, not {KEY!r} alone")
    values = arrays[KEY]
    if values.ndim != 2 or 0 in values.shape:
        raise FILE.refusal(path, f"holds an array of {shown(list(values.shape))}, [tokens, width] is needed")
    return Embedding(values, sha256)
