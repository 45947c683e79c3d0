"""What pictures are taken of: anything that renders from cameras. A field here, a mesh in raster.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from psd.scene.cameras import Cameras
from psd.scene.fields import Field
from psd.scene.render import Background, Occupancy, Rendering, render_views


@runtime_checkable
class Scene(Protocol):
    """Something in the box of half-width `radius` around the origin, z-up, its front towards +x.

    `render` is for looking at: no gradient, bounded memory, and cameras may be on any device. `samples` is how many a
    ray takes through what has no surface; a mesh has no use for it.
    """

    radius: float

    def render(self, cameras: Cameras, size: int, *, samples: int, with_normals: bool = False) -> Rendering: ...


@dataclass(frozen=True)
class FieldScene:
    """A field before its background; only occupied cells are looked at."""

    field: Field
    background: Background
    occupancy: Occupancy | None = None

    @property
    def radius(self) -> float:
        return self.field.radius

    def render(self, cameras: Cameras, size: int, *, samples: int, with_normals: bool = False) -> Rendering:
        return render_views(
            self.field, self.background, cameras.to(self.field.device), size,
            samples=samples, occupancy=self.occupancy, with_normals=with_normals,
        )  # fmt: skip
