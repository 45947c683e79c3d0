"""3D mode (Algorithm 1, single stage): a radiance field optimised so that its renders please a multi-view prior.

All arms start from the same field and share cameras, timesteps, noises and jitter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from psd.config import FINER_FROM, RunConfig
from psd.contracts import Answer, Arm, Artefact, Ask, Drawn, Guided, Models, Observed, Setup
from psd.export import to_uint8
from psd.methods import METHODS
from psd.methods.negative import starting_negative
from psd.modes import pictures
from psd.scene.cameras import camera_embedding, camera_rays, sample_cameras
from psd.scene.fields import (
    ConstantBackground,
    DirectionalBackground,
    Field,
    HashField,
    ShadowedBackground,
    VoxelField,
    upsampled,
)
from psd.scene.losses import image_loss, opacity_loss, orientation_loss, solid_loss, z_variance_loss
from psd.scene.mesh import Mesh, extract_mesh
from psd.scene.noise import SurfaceNoise
from psd.scene.render import Background, Occupancy, Rendering, render
from psd.scene.rig import Frame
from psd.scene.scene import FieldScene
from psd.schedule import NoiseSchedule, further_noise
from psd.score import BoundScore
from psd.sculpted import FILE, export_sculpted, read_sculpted

BLOB_DENSITY = 10.0  # in the middle of the ball that a field starts from
OCCUPANCY_EVERY = 16  # steps
RANDOM_BACKGROUND_SHARE = 0.5  # of the steps, where a background is learned: it must not do the object's work
SOLID_FROM = 0.3  # of the run; before, it is the ball a field starts from that is seen
BAD_STEPS = 20  # in a row until a run is given up
PREVIEW_PX = 64
NOISE_TEXELS = 4  # of consistent noise along a latent's side


@dataclass
class Sculpture:
    """One arm's trainable scene: field and background with their optimiser."""

    config: RunConfig
    field: nn.Module
    background: nn.Module
    optimizer: torch.optim.Optimizer
    occupancy: Occupancy
    rates: list[float]  # of the optimiser's groups, as they start
    bad_steps: int = field(default=0, init=False)  # in a row without a finite gradient, or with nothing to see

    @classmethod
    def start(cls, config: RunConfig, field: nn.Module, background: nn.Module, device: torch.device) -> Sculpture:
        field, background = copy.deepcopy(field), copy.deepcopy(background)
        groups = field.parameter_groups() + background.parameter_groups()
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-15, weight_decay=0.01, fused=True)
        rates = [group["lr"] for group in groups]
        return cls(config, field, background, optimizer, Occupancy(field.radius, device), rates)

    @property
    def scene(self) -> FieldScene:
        return FieldScene(self.field, self.background, self.occupancy)

    def render(self, drawn: Drawn, size: int) -> Rendering:
        """This step's renders, differentiable."""
        jitter = torch.Generator(self.occupancy.density.device).manual_seed(drawn.jitter_seed)
        if drawn.step % OCCUPANCY_EVERY == 0:
            self.occupancy.update(self.field, jitter)
        plain = drawn.colour is None or not isinstance(self.background, DirectionalBackground)
        return render(
            self.field, self.background if plain else painted(drawn.colour), drawn.cameras, size,
            samples=self.config.samples, jitter=jitter, occupancy=self.occupancy,
            with_normals=bool(self.config.lambda_orient or self.config.lambda_orient_end),
        )  # fmt: skip

    def refine(self, resolution: int) -> None:
        """The voxel grid on `resolution` points a side, once, and Adam's moments with it.

        A point then has the gradients of a smaller part of the box: moments as they were would stand still for a
        hundred steps, and fresh ones shake the grid by its whole rate.
        """
        field, state = self.field, self.optimizer.state
        if field.resolution == resolution:
            return
        old, share = field.voxels, ((field.resolution - 1) / (resolution - 1)) ** 3
        field.refine(resolution)
        for group in self.optimizer.param_groups:
            group["params"] = [field.voxels if each is old else each for each in group["params"]]
        if moments := state.pop(old, None):
            moments["exp_avg"] = share * upsampled(moments["exp_avg"], resolution)
            moments["exp_avg_sq"] = share**2 * upsampled(moments["exp_avg_sq"], resolution)
            state[field.voxels] = moments

    def is_finite(self) -> Bool[Tensor, ""]:
        """Whether every gradient is."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all()

    def advance(self, opacity: float, finite: bool, share: float) -> str:
        """One optimiser step, left out where a gradient is not finite; what is wrong once that has gone on."""
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * annealed_rate(self.config.lr_end, share)
        if finite:
            self.optimizer.step()
        settled = share > 0.1  # a field may fill or empty the box on its way
        empty, full = settled and opacity < 0.002, settled and opacity > 0.98
        self.bad_steps = self.bad_steps + 1 if not finite or empty or full else 0
        if self.bad_steps < BAD_STEPS:
            return ""
        if not finite:
            return "gradients overflowed; lower gamma, pref_weight or lr."
        if empty:
            return "the scene became empty; lower lambda_opacity or lr, or try another seed."
        return "the scene filled with fog; raise lambda_opacity, lower lr, or try another seed."

    def regularisers(self, seen: Rendering, share: float) -> Float[Tensor, ""]:
        """The weighted losses on this step's renders; `share` of the run is over."""
        c, total = self.config, seen.rgb.new_zeros(())
        if c.lambda_orient or c.lambda_orient_end:
            weight = c.lambda_orient + min(1.0, 2 * share) * (c.lambda_orient_end - c.lambda_orient)
            total = total + weight * orientation_loss(*seen.samples, seen.opacity)
        if c.lambda_opacity:
            total = total + c.lambda_opacity * opacity_loss(seen.opacity)
        if c.lambda_solid and share >= SOLID_FROM:
            total = total + c.lambda_solid * solid_loss(seen.contrast, seen.opacity)
        if c.lambda_z_variance:
            total = total + c.lambda_z_variance * z_variance_loss(seen.z_variance, seen.opacity)
        if c.lambda_smooth and c.field == "voxels":
            total = total + c.lambda_smooth * self.field.total_variation()
        return total


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
        laid = [name for name, arm in self.arms.items() if arm.config.noise == "consistent"]
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


def start_field(config: RunConfig, radius: float) -> nn.Module:
    """The field that a run starts from: a faint ball of density, grey."""
    if config.field == "hashgrid":
        return HashField(radius=radius, density_bias=(BLOB_DENSITY, 0.5 * radius))
    gain = (config.lr_density or config.lr) / config.lr
    return VoxelField(config.grid_size, radius, (BLOB_DENSITY, 0.5 * radius), config.lr, gain)


def resume(field: Field, background: nn.Module, path: str) -> None:
    """Go on from a file's field, and from its background where that is of the same kind. Raises RequestError."""
    given = read_sculpted(path)
    state, behind = (
        {name: torch.from_numpy(values) for name, values in part.items()} for part in (given.field, given.background)
    )
    try:
        field.take(state)
    except RuntimeError as error:
        raise FILE.refusal(path, "holds a field of other sizes") from error
    own = background.state_dict()
    if {name: each.shape for name, each in own.items()} == {name: each.shape for name, each in behind.items()}:
        background.load_state_dict(behind)


def annealed_rate(end: float, share: float) -> float:
    """What learning rates are multiplied by: 1 in the first half of a run, then half a cosine down to `end`."""
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * max(0.0, 2 * share - 1)))


def painted(colour: Float[Tensor, " 3"]) -> Background:
    """A background of one colour."""
    return lambda directions: colour.expand_as(directions)


def start_background(config: RunConfig, frame: Frame) -> nn.Module:
    """The frame's one colour, fixed, maybe with a shadow to learn; or one to learn that depends on the direction."""
    if frame.background and config.lr_shadow:
        return ShadowedBackground(frame.background, frame.radius, config.lr_shadow)
    if frame.background:
        return ConstantBackground(frame.background).requires_grad_(False)
    return DirectionalBackground()


def anneal_timestep(config: RunConfig, share: float, total: int, u: float) -> int:
    """t ~ U(low, high) from a uniform u; low falls from t_max to t_min, high from t_max to t_max_end (App. F.1)."""
    done = min(1.0, share / config.t_anneal) if config.t_anneal else 1.0
    low = config.t_max + done * (config.t_min - config.t_max)
    high = config.t_max + done * (config.t_max_end - config.t_max)
    return min(max(round((low + u * (high - low)) * total), 0), total - 1)
