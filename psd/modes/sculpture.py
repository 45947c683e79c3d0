"""One arm's object while it is optimised: field and background with their optimiser, and what they start from."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from psd.config import RunConfig
from psd.contracts import Drawn
from psd.scene.fields import (
    ConstantBackground,
    DirectionalBackground,
    Field,
    HashField,
    ShadowedBackground,
    VoxelField,
    upsampled,
)
from psd.scene.losses import opacity_loss, orientation_loss, solid_loss, z_variance_loss
from psd.scene.render import Background, Occupancy, Rendering, render
from psd.scene.rig import Frame
from psd.scene.scene import FieldScene
from psd.sculpted import FILE, read_sculpted

BLOB_DENSITY = 10.0  # in the middle of the ball that a field starts from
OCCUPANCY_EVERY = 16  # steps
SOLID_FROM = 0.3  # of the run; before, it is the ball a field starts from that is seen
BAD_STEPS = 20  # in a row until a run is given up


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
