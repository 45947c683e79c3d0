"""Pictures and meshes of any scene, as a run keeps them: front, views with depth and normals, turntable, mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from psd.contracts import Artefact
from psd.export import export_png, to_uint8
from psd.scene.cameras import Cameras, orbit_cameras
from psd.scene.files import export_glb, export_obj_zip, export_ply
from psd.scene.mesh import Mesh
from psd.scene.rig import Frame
from psd.scene.scene import Scene
from psd.scene.texture import Views
from psd.scene.turntable import depth_picture, export_turntable, normal_picture, turntable_frames

SCORED_VIEWS, SHEET_VIEWS = 12, 4
SIDES = 4  # of an object, as multi-view priors draw them and rewards judge them
PAINTING_RINGS = ((15.0, 8), (40.0, 4), (-40.0, 4))  # elevation in degrees, views: what a mesh's colours are taken from
# A multiple of 64: of 144 and 160 px libx264 makes other bits each time, it reads beyond the rows.
FRONT_PX, SHEET_PX, TURNTABLE_PX = 256, 192, 128
TURNTABLE_FRAMES, FPS = 36, 12
FRONT_AZIMUTH_DEG = 30.0  # of the still picture: a little from the side says more than straight from the front


def around(frame: Frame, count: int, azimuth_deg: float = 0.0) -> Cameras:
    """Cameras on a circle around an object of this frame."""
    return orbit_cameras(count, azimuth_start_deg=azimuth_deg, **frame.portrait)


def scored_cameras(frame: Frame) -> Cameras:
    """A circle in groups of SIDES a quarter turn apart, which a reward can judge together: 0, 3, 6, 9, 1, ..."""
    order = torch.arange(SCORED_VIEWS).view(SIDES, -1).T.flatten()
    return around(frame, SCORED_VIEWS)[order]


def scored_views(scene: Scene, frame: Frame, size: int, samples: int) -> Float[Tensor, "12 3 H W"]:
    """A scene from all around, as it is scored; in [0, 1]."""
    return scene.render(scored_cameras(frame), size, samples=samples).rgb.clamp(0, 1)


def painting_views(scene: Scene, frame: Frame, size: int, samples: int) -> Views:
    """A scene from around, above and below."""
    rings = [
        orbit_cameras(count, azimuth_start_deg=FRONT_AZIMUTH_DEG, **frame.portrait | {"elevation_deg": elevation_deg})
        for elevation_deg, count in PAINTING_RINGS
    ]
    seen = [scene.render(cameras, size, samples=samples) for cameras in rings]
    rgb, opacity, depth = (torch.cat([getattr(ring, name) for ring in seen]) for name in ("rgb", "opacity", "depth"))
    return Views(Cameras.joined(rings), rgb.clamp(0, 1), opacity, depth)


def resized(images: Float[Tensor, "V 3 h w"], side: int) -> Float[Tensor, "V 3 H W"]:
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False)


def artefacts_of_views(views: Float[Tensor, "V 3 H W"]) -> Iterator[Artefact]:
    """The files of views that show no scene: the first, and all of them."""

    def front(path: Path, about: dict[str, Any]) -> None:
        export_png(path, to_uint8(resized(views[:1], FRONT_PX))[0], about)

    def sheet(path: Path, about: dict[str, Any]) -> None:
        export_png(path, np.concatenate(list(to_uint8(resized(views, SHEET_PX))), 1), about)

    yield Artefact("picture", front)
    yield Artefact("views", sheet)


def artefacts_of(scene: Scene, frame: Frame, samples: int, mesh: Callable[[], Mesh]) -> Iterator[Artefact]:
    """Every file of a scene, the quickest first. `mesh` is made once, when the first file of it is written."""
    made = cache(mesh)

    def front(path: Path, about: dict[str, Any]) -> None:
        seen = scene.render(around(frame, 1, FRONT_AZIMUTH_DEG), FRONT_PX, samples=2 * samples)
        export_png(path, to_uint8(seen.rgb)[0], about)

    def glb(path: Path, about: dict[str, Any]) -> dict[str, Any]:
        export_glb(made(), path, about)
        return made().report

    def sheet(path: Path, about: dict[str, Any]) -> None:
        """Four views: colours, depth, normals, a row each."""
        seen = scene.render(around(frame, SHEET_VIEWS), SHEET_PX, samples=samples, with_normals=True)
        rows = (to_uint8(seen.rgb), depth_picture(seen), normal_picture(seen))
        export_png(path, np.concatenate([np.concatenate(list(row), 1) for row in rows]), about)

    def turntable(path: Path, about: dict[str, Any]) -> None:
        frames = turntable_frames(
            scene, TURNTABLE_FRAMES, TURNTABLE_PX, samples=samples, azimuth_start_deg=FRONT_AZIMUTH_DEG,
            **frame.portrait,
        )  # fmt: skip
        export_turntable(path, frames, FPS)

    yield Artefact("picture", front)
    yield Artefact("glb", glb)
    yield Artefact("views", sheet)
    yield Artefact("turntable", turntable)
    yield Artefact("ply", lambda path, about: export_ply(made(), path))
    yield Artefact("obj", lambda path, about: export_obj_zip(made(), path))
