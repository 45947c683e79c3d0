"""3D mode as `psd.run` drives it: from RunConfig to the states of psd.object3d, pictures of them, and files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from psd.config import RunConfig
from psd.contracts import Decode, Prior, Reward
from psd.export import export_png, to_uint8
from psd.models.priors.table import prior_info
from psd.object3d import ObjectArm, ObjectStep, distil_object, start_field, view_scorer
from psd.scene.cameras import Cameras, orbit_cameras
from psd.scene.fields import ConstantBackground, DirectionalBackground
from psd.scene.files import export_glb, export_obj_zip, export_ply
from psd.scene.mesh import EmptyScene, extract_mesh
from psd.scene.render import Rendering
from psd.scene.rig import Frame, Rig
from psd.scene.scene import FieldScene
from psd.scene.turntable import depth_picture, export_turntable, normal_picture, turntable_frames

SCORED_VIEWS = 12
PREVIEW_VIEWS, PREVIEW_PX = 4, 64
FRONT_PX, SHEET_PX, TURNTABLE_PX = 256, 192, 160
TURNTABLE_FRAMES, FPS = 48, 16
FRONT_AZIMUTH_DEG = 30.0  # of the still picture: a little from the side says more than straight from the front


class MakeObject:
    """One 3D run. The fields are optimised in place: what is exported is their last state.

    `decode` makes the pictures that are ranked; all others are renders.
    """

    preview_every_s = 1.0

    def __init__(
        self, config: RunConfig, arms: dict[str, RunConfig], prior: Prior, reward: Reward, decode: Decode
    ) -> None:
        self.config, self.prior, self.reward, self.decode = config, prior, reward, decode
        self.frame: Frame = prior_info(config.prior).frame
        n_0 = prior.embed([config.negative_prompt])
        torch.manual_seed(config.seed)  # modules draw their first weights from the global generator
        field = start_field(config, self.frame.radius).to(prior.device)
        background = self._background().to(prior.device)
        self.arms = {name: ObjectArm.start(arm, field, background, n_0) for name, arm in arms.items()}

    def steps(self) -> Iterator[ObjectStep]:
        config, prior, frame = self.config, self.prior, self.frame
        score = view_scorer(self.decode, self.reward, config.prompt, config.rank, config.view_prompts)
        rig = Rig(frame.fovy_deg, frame.distance, frame.elevation_deg)
        generator = torch.Generator().manual_seed(config.seed)
        return distil_object(prior, score, prior.embed([config.prompt]), self.arms, rig, generator)

    def trouble(self, state: ObjectStep) -> str:
        return state.failure

    def views(self, state: ObjectStep) -> Float[Tensor, "A V 3 H W"]:
        """This step's renders, at the prior's size."""
        pixels = torch.stack(list(state.views.values()))
        size = (self.prior.image_size,) * 2
        resized = F.interpolate(pixels.flatten(0, 1), size, mode="bilinear", align_corners=False)
        return resized.unflatten(0, pixels.shape[:2])

    def preview(self, state: ObjectStep, views: Tensor) -> np.ndarray:
        """Four sides of every arm's object, a row an arm; always from the same cameras, so that nothing jumps."""
        rows = [self._look(arm, self._around(PREVIEW_VIEWS), PREVIEW_PX, fine=1).rgb for arm in self.arms.values()]
        return to_uint8(torch.cat([torch.cat(list(row), -1) for row in rows], -2))

    def export(
        self, state: ObjectStep, directory: Path, settings: dict[str, Any], rewards: dict[str, Reward]
    ) -> tuple[dict[str, Path], dict[str, dict[str, float]], dict[str, Path], dict[str, Any]]:
        """Score each object from 12 sides, and write its pictures, turntable and mesh.

        (arm -> front picture, arm -> scores, name -> file, remarks for run.json). `rewards` empty: a run that was
        stopped, whose visitor waits: no scores.
        """
        images, scores, files, remarks = {}, {}, {}, {"meshes": {}}
        for name, arm in self.arms.items():
            scores[name] = self._scores(name, rewards)
            about = {**settings, "arm": name, "scores": scores[name]}
            images[name] = files[f"{name}.png"] = directory / f"{name}.png"
            front = self._look(arm, self._around(1, FRONT_AZIMUTH_DEG), FRONT_PX)
            export_png(images[name], to_uint8(front.rgb)[0], about)
            files |= self._pictures(name, arm, directory, about)
            made, remarks["meshes"][name] = self._mesh(name, arm, directory, about)
            files |= made
        return images, scores, files, remarks

    @property
    def scored_cameras(self) -> Cameras:
        return self._around(SCORED_VIEWS)

    def scored_views(self, name: str) -> Float[Tensor, "12 3 H W"]:
        """An arm's object from all around, as it is scored; in [0, 1], of the prior's size."""
        return self._look(self.arms[name], self.scored_cameras, self.prior.image_size).rgb.clamp(0, 1)

    @torch.no_grad()
    def _scores(self, name: str, rewards: dict[str, Reward]) -> dict[str, float]:
        if not rewards:
            return {}
        views = self.scored_views(name)
        prompts = [self.config.prompt] * len(views)
        return {each: reward(views, prompts).mean().item() for each, reward in rewards.items()}

    def _pictures(self, name: str, arm: ObjectArm, directory: Path, about: dict[str, Any]) -> dict[str, Path]:
        """Four sides in colour, depth and normals; the turntable."""
        seen = self._look(arm, self._around(4), SHEET_PX, with_normals=True)
        rows = [
            np.concatenate(list(to_uint8(seen.rgb)), 1),
            np.concatenate(list(depth_picture(seen)), 1),
            np.concatenate(list(normal_picture(seen)), 1),
        ]
        sheet, video = directory / f"{name}_views.png", directory / f"{name}.mp4"
        export_png(sheet, np.concatenate(rows), about)
        frames = turntable_frames(
            scene_of(arm), TURNTABLE_FRAMES, TURNTABLE_PX,
            samples=self.config.samples, azimuth_start_deg=FRONT_AZIMUTH_DEG, **self.frame.portrait,
        )  # fmt: skip
        export_turntable(video, frames, FPS)
        return {path.name: path for path in (sheet, video)}

    def _mesh(
        self, name: str, arm: ObjectArm, directory: Path, about: dict[str, Any]
    ) -> tuple[dict[str, Path], dict[str, Any]]:
        """GLB, PLY and OBJ of an arm, and what its mesh is like; of an empty scene only why there is none."""
        try:
            mesh = extract_mesh(arm.field, target_faces=self.config.mesh_faces)
        except EmptyScene as error:
            return {}, {"reason": str(error)}
        files = {f"{name}.{kind}": directory / f"{name}.{kind}" for kind in ("glb", "ply", "zip")}
        export_glb(mesh, files[f"{name}.glb"], about)
        export_ply(mesh, files[f"{name}.ply"])
        export_obj_zip(mesh, files[f"{name}.zip"])
        return files, mesh.report

    def _look(
        self, arm: ObjectArm, cameras: Cameras, size: int, with_normals: bool = False, fine: int = 2
    ) -> Rendering:
        """With `fine` times the samples of a training render."""
        return scene_of(arm).render(cameras, size, samples=fine * self.config.samples, with_normals=with_normals)

    def _around(self, count: int, azimuth_deg: float = 0.0) -> Cameras:
        return orbit_cameras(count, azimuth_start_deg=azimuth_deg, **self.frame.portrait)

    def _background(self) -> nn.Module:
        if self.frame.background:
            return ConstantBackground(self.frame.background).requires_grad_(False)
        return DirectionalBackground()


def scene_of(arm: ObjectArm) -> FieldScene:
    return FieldScene(arm.field, arm.background, arm.occupancy)
