"""3D mode (Algorithm 1, single stage): a radiance field optimised so that its renders please a multi-view prior.

All arms start from the same field and share cameras, timesteps, noises and jitter.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from psd.config import FINER_FROM, RunConfig
from psd.contracts import Answer, Arm, Artefact, Ask, Drawn, Guided, Models, Observed, Setup
from psd.export import to_uint8
from psd.methods import METHODS
from psd.methods.negative import starting_negative
from psd.modes import pictures
from psd.modes.sculpture import Sculpture, resume, start_background, start_field
from psd.scene.cameras import camera_embedding, camera_rays, sample_cameras
from psd.scene.losses import image_loss
from psd.scene.mesh import Mesh, extract_mesh
from psd.scene.noise import SurfaceNoise
from psd.scene.render import Rendering
from psd.schedule import NoiseSchedule, further_noise
from psd.score import BoundScore
from psd.sculpted import export_sculpted

RANDOM_BACKGROUND_SHARE = 0.5  # of the steps, where a background is learned: it must not do the object's work
PREVIEW_PX = 64
NOISE_TEXELS = 4  # of consistent noise along a latent's side


class ObjectStage:
    """Every arm's scene. Camera, timestep and size settings are the first arm's."""

    preview_every_s = 1.0

    def __init__(self, config: RunConfig, arms: dict[str, RunConfig], models: Models) -> None:
        self.config, self.models, prior = config, models, models.prior
        self.frame, self.steps = prior.frame, config.steps
        self.generator = torch.Generator().manual_seed(config.seed)
        self.schedule = NoiseSchedule(prior.alphas_cumprod)
        torch.manual_seed(config.seed)  # modules draw their first weights from the global generator
        field = start_field(config, self.frame.radius).to(prior.device)
        background = start_background(config, self.frame).to(prior.device)
        if config.start:
            resume(field, background, config.start)
        y, n_0 = prior.embed([config.prompt]), starting_negative(config, prior)
        self.sculptures: dict[str, Sculpture] = {}
        self.arms: dict[str, Arm] = {}
        self.surface_noise: SurfaceNoise | None = None
        self.surfaces: dict[str, tuple[Tensor, Tensor]] = {}  # points and opacity of this step's renders
        for name, arm in arms.items():
            score = BoundScore(models.decode, models.reward, [config.prompt], arm.rank, arm.view_prompts)
            setup = Setup(arm, prior, y, n_0, score, self.schedule, prior.views)
            self.arms[name] = Arm(name, arm, METHODS[arm.method].load()(setup), score)
            if not METHODS[arm.method].samples:
                self.sculptures[name] = Sculpture.start(arm, field, background, prior.device)
        self.renders: dict[str, Tensor] = {}
        self.opacity: dict[str, float] = {}

    def start(self) -> Generator[Ask, Answer, None]:
        yield from ()

    def draw(self, step: int) -> Drawn:
        prior, generator, share = self.models.prior, self.generator, step / self.steps
        cameras = sample_cameras(self.frame.rig, prior.views, generator).to(prior.device)
        for arm in self.arms.values():
            arm.score.cameras = cameras
        u = torch.rand((), generator=generator).item()
        t = anneal_timestep(self.config, share, len(prior.alphas_cumprod), u)
        noise = torch.randn((2, prior.views, *prior.latent_shape), generator=generator).to(prior.device)
        jitter_seed = int(torch.randint(2**62, (), generator=generator))
        drawn = torch.rand(4, generator=generator)
        colour = drawn[:3].to(prior.device) if drawn[3] < RANDOM_BACKGROUND_SHARE else None
        return Drawn(step, share, t, noise, cameras, camera_embedding(cameras.c2w), jitter_seed, colour)

    def noises(self, drawn: Drawn, arm: str, count: int) -> Float[Tensor, "N V C h w"]:
        """All fresh, the same for every arm; where it is consistent the first is what lies on the arm's object."""
        shape = tuple(drawn.noise.shape[1:])
        more = [further_noise(self.config.seed, drawn.step, index, shape)[None] for index in range(2, count)]
        noise = torch.cat([drawn.noise, *(noise.to(drawn.noise.device) for noise in more)])[:count]
        if arm not in self.surfaces:
            return noise
        return torch.cat([self.surface_noise.seen(*self.surfaces.pop(arm), self.frame.radius)[None], noise[1:]])

    def observe(self, drawn: Drawn) -> Observed:
        """Render and encode every arm from the same cameras."""
        late = drawn.share >= FINER_FROM
        size = (late and self.config.render_size_end) or self.config.render_size
        if late and self.config.grid_size_end and self.config.field == "voxels":
            for sculpture in self.sculptures.values():
                sculpture.refine(self.config.grid_size_end)
        renders = {name: each.render(drawn, size) for name, each in self.sculptures.items()}
        images = {name: self._resized(seen.rgb) for name, seen in renders.items()}
        self._lay_noise(drawn, renders)
        x_c = {name: self.models.prior.encode(each) for name, each in images.items()}
        sampled = {name: arm.method.x_c for name, arm in self.arms.items() if name not in self.sculptures}
        return Observed(x_c | sampled, renders, images)

    @torch.no_grad()
    def _lay_noise(self, drawn: Drawn, renders: dict[str, Rendering]) -> None:
        """Surface points of the arms whose noise is consistent, and the step's renewal of that."""
        laid = [name for name, each in self.sculptures.items() if each.config.noise == "consistent"]
        if not laid:
            return
        if self.surface_noise is None:
            shape, device = self.models.prior.latent_shape, self.models.prior.device
            self.laying = torch.Generator().manual_seed(self.config.seed)
            self.surface_noise = SurfaceNoise(shape, NOISE_TEXELS * shape[1], self.laying, device)
        self.surface_noise.refresh(self.config.noise_refresh, self.laying)
        for name in laid:
            seen, size = renders[name], renders[name].rgb.shape[-1]
            origins, directions = (rays.movedim(-1, 1) for rays in camera_rays(drawn.cameras, size, size))
            points = origins + directions * seen.depth / seen.opacity.clamp(min=1e-5)
            self.surfaces[name] = (points, seen.opacity)

    def apply(self, drawn: Drawn, observed: Observed, guided: dict[str, Guided]) -> str:
        """Surrogate (x_c * g).sum() / views and the losses; one backward for all arms, which share no parameter."""
        if not self.sculptures:
            return ""
        loss: Tensor | float = 0.0
        for name, sculpture in self.sculptures.items():
            x_c, g = observed.x_c[name], guided[name].g
            loss = loss + (x_c * g).sum() / len(x_c)
            loss = loss + sculpture.regularisers(observed.renders[name], drawn.share)
            if sculpture.config.lambda_rgb:
                with torch.no_grad():  # weighting recon: x_c - g is the guided x0-hat
                    target = self.models.prior.decode(x_c - g)
                loss = loss + sculpture.config.lambda_rgb * image_loss(observed.images[name], target)
        for sculpture in self.sculptures.values():
            sculpture.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.renders = {name: seen.rgb.detach() for name, seen in observed.renders.items()}
        # Only now numbers that the host waits for, all at once: a GPU had the whole step queued.
        opacity = [seen.opacity.mean() for seen in observed.renders.values()]
        finite = [each.is_finite().to(opacity[0].dtype) for each in self.sculptures.values()]
        numbers = torch.stack([*opacity, *finite]).tolist()
        self.opacity = dict(zip(self.sculptures, numbers))
        failures = [
            each.advance(self.opacity[name], bool(fine), drawn.share)
            for (name, each), fine in zip(self.sculptures.items(), numbers[len(opacity) :])
        ]
        return next(filter(None, failures), "")

    def report(self, arm: str) -> dict[str, float]:
        return {"opacity": self.opacity[arm]} if arm in self.opacity else {}

    @torch.no_grad()
    def views(self) -> dict[str, Float[Tensor, "V 3 H W"]]:
        """The last step's renders, at the prior's size; of an arm that has no object what it draws."""
        return {
            name: self._resized(self.renders[name])
            if name in self.renders
            else self.models.decode(arm.method.x_c).float()
            for name, arm in self.arms.items()
        }

    def preview(self, views: dict[str, Float[Tensor, "V 3 H W"]]) -> UInt8[np.ndarray, "height width 3"]:
        """Four sides of every arm's object, a row an arm; always from the same cameras, so that nothing jumps."""
        cameras = pictures.around(self.frame, pictures.SHEET_VIEWS)
        rows = [
            self.sculptures[name].scene.render(cameras, PREVIEW_PX, samples=self.config.samples).rgb
            if name in self.sculptures
            else pictures.resized(views[name], PREVIEW_PX)
            for name in self.arms
        ]
        return to_uint8(torch.cat([torch.cat(list(row), -1) for row in rows], -2))

    def scored(self, arm: str) -> tuple[Float[Tensor, "V 3 H W"], list[str]]:
        """An arm's object from all around, of the prior's size; without one the views that were drawn."""
        if arm not in self.sculptures:
            views = self._drawn(arm)
            return views, [self.config.prompt] * len(views)
        scene, size = self.sculptures[arm].scene, self.models.prior.image_size
        views = pictures.scored_views(scene, self.frame, size, 2 * self.config.samples)
        return views, [self.config.prompt] * len(views)

    @torch.no_grad()
    def _drawn(self, arm: str) -> Float[Tensor, "V 3 H W"]:
        """What an arm without an object has drawn."""
        return self.models.prior.decode(self.arms[arm].method.x_c).float().clamp(0, 1)

    def artefacts(self, arm: str) -> Iterator[Artefact]:
        if arm not in self.sculptures:
            yield from pictures.artefacts_of_views(self._drawn(arm))
            return
        scene, samples, size = self.sculptures[arm].scene, self.config.samples, self.models.prior.image_size

        def mesh() -> Mesh:
            views = pictures.painting_views(scene, self.frame, size, samples)
            return extract_mesh(scene.field, target_faces=self.config.mesh_faces, views=views)

        yield from pictures.artefacts_of(scene, self.frame, samples, mesh)
        yield Artefact("field", partial(self._write_sculpted, arm))

    def _write_sculpted(self, arm: str, path: Path, about: dict[str, Any]) -> None:
        sculpture = self.sculptures[arm]
        states = (sculpture.field.state(), sculpture.background.state_dict())
        arrays = ({name: each.float().cpu().numpy() for name, each in state.items()} for state in states)
        export_sculpted(path, *arrays, {name: about[name] for name in ("arm", "prompt", "prior") if name in about})

    def _resized(self, images: Float[Tensor, "V 3 h w"]) -> Float[Tensor, "V 3 H W"]:
        return pictures.resized(images, self.models.prior.image_size)


def anneal_timestep(config: RunConfig, share: float, total: int, u: float) -> int:
    """t ~ U(low, high) from a uniform u; low falls from t_max to t_min, high from t_max to t_max_end (App. F.1)."""
    done = min(1.0, share / config.t_anneal) if config.t_anneal else 1.0
    low = config.t_max + done * (config.t_min - config.t_max)
    high = config.t_max + done * (config.t_max_end - config.t_max)
    return min(max(round((low + u * (high - low)) * total), 0), total - 1)
