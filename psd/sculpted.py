"""The file of an object's field and background, from which another run can go on: written and read here alone.

field.voxels                 [1, 4, R, R, R]: raw density and raw rgb of a voxel grid, whatever its learning rates
field.*                      of a hash grid the parameters by their names
background.*                 what is learned behind it
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from psd.config import FIELDS
from psd.errors import shown
from psd.tensors import Kind, export_tensors, read_tensors

FIELD, BACKGROUND, VOXELS = "field.", "background.", "voxels"
# A grid of 160^3 has 33 MB, the paper's hash grid as many.
FILE = Kind("start", "an ARM_field.safetensors", 64 * 2**20, ("F16", "F32"))

State = dict[str, Float32[np.ndarray, "..."]]


class Sculpted(NamedTuple):
    field: State
    background: State

    @property
    def kind(self) -> str:
        """As the setting `field` calls it."""
        return "voxels" if VOXELS in self.field else "hashgrid"

    @property
    def resolution(self) -> int:
        """Of a voxel grid."""
        return self.field[VOXELS].shape[-1]


def export_sculpted(path: Path, field: State, background: State, about: dict[str, Any]) -> None:
    """Half the bytes of what is optimised, to three digits; parameters of networks in full."""
    arrays = {FIELD + name: values for name, values in field.items()}
    arrays |= {BACKGROUND + name: values for name, values in background.items()}
    export_tensors(path, {name: halved(values) for name, values in arrays.items()}, about)


def halved(values: Float32[np.ndarray, "..."]) -> np.ndarray:
    if values.size <= 2**16:
        return values
    largest = np.finfo(np.float16).max
    return values.clip(-largest, largest).astype(np.float16)


def read_sculpted(path: str | Path) -> Sculpted:
    """What a file holds, checked but for the field that is to take it. Raises RequestError, never naming the folder."""
    arrays, _ = read_tensors(path, FILE)
    field, background = (
        {name.removeprefix(start): values for name, values in arrays.items() if name.startswith(start)}
        for start in (FIELD, BACKGROUND)
    )
    if not field or len(field) + len(background) < len(arrays):
        raise FILE.refusal(path, f"holds {shown(sorted(arrays))}, no field")
    if VOXELS in field:
        low, high, shape = FIELDS["grid_size"].low, FIELDS["grid_size"].high, field[VOXELS].shape
        if len(field) > 1 or shape != (1, 4, *3 * shape[-1:]) or not low <= shape[-1] <= high:
            sides = f"[1, 4, R, R, R] with R from {low} to {high} is needed"
            raise FILE.refusal(path, f"holds an array of {shown(list(shape))}, {sides}")
    return Sculpted(field, background)
