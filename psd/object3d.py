"""3D mode (Algorithm 1, single stage): a radiance field optimised so that its renders please a multi-view prior.

All arms start from the same field and share cameras, timesteps, noises and jitter; one batched forward of the prior a
step serves every condition, noise, arm and view. Knows nothing of files, clocks, meshes or prompts' words.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from psd.config import RunConfig
from psd.contracts import Decode, Prior, Reward
from psd.lockstep import eps_of_arms, score_noises, update_negative
from psd.methods import METHODS, Predictions
from psd.negative import NegativeEmbedding
from psd.scene.cameras import Cameras, camera_embedding, sample_cameras, view_names
from psd.scene.fields import HashField, VoxelField
from psd.scene.losses import image_loss, opacity_loss, orientation_loss, solid_loss, z_variance_loss
from psd.scene.render import Occupancy, Rendering, render
from psd.scene.rig import Rig
from psd.schedule import NoiseSchedule

BLOB_DENSITY = 10.0  # in the middle of the ball that a field starts from
OCCUPANCY_EVERY = 16  # steps
RANDOM_BACKGROUND_SHARE = 0.5  # of the steps, where a background is learned: it must not do the object's work
SOLID_FROM = 0.3  # of the run; before, it is the ball a field starts from that is seen
BAD_STEPS = 20  # in a row until a run is given up

ViewScore = Callable[[Float[Tensor, "N V C h w"], Cameras], Float[Tensor, "N V"]]  # psd.methods.Score, once bound


class ObjectStep(NamedTuple):
    """State after a step. `terms` holds the norms, weights and rewards of psd.methods, one value a view."""

    step: int  # 1-based
    t: int
    views: dict[str, Float[Tensor, "V 3 H W"]]  # this step's renders
    opacity: dict[str, float]  # mean over the views
    terms: dict[str, dict[str, Float[Tensor, " V"]]]
    drift: dict[str, float]  # |n - n_0| of the arms that learn n
    failure: str  # how the optimisation broke down and what to change, one sentence; the last state then


@dataclass
class ObjectArm:
    """One arm's trainable state: field, background, negative embedding n."""

    config: RunConfig
    field: nn.Module
    background: nn.Module
    negative: NegativeEmbedding
    optimizer: torch.optim.Optimizer
    occupancy: Occupancy
    bad_steps: int = field(default=0, init=False)  # in a row without a finite gradient, or with nothing to see

    @classmethod
    def start(cls, config: RunConfig, field: nn.Module, background: nn.Module, n_0: Tensor) -> ObjectArm:
        field, background = copy.deepcopy(field), copy.deepcopy(background)
        lr = config.negative_lr if METHODS[config.method].learns_negative else 0.0
        negative = NegativeEmbedding(n_0, lr, config.negative_optimizer, config.negative_decay_steps)
        groups = field.parameter_groups() + background.parameter_groups()
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-15, weight_decay=0.01)
        occupancy = Occupancy(field.radius, n_0.device)
        return cls(config, field, background, negative, optimizer, occupancy)

    @property
    def learns_background(self) -> bool:
        return any(parameter.requires_grad for parameter in self.background.parameters())

    def noises(self, step: int, fresh: Float[Tensor, "2 V C h w"]) -> Float[Tensor, "N V C h w"]:
        """The pair of this step, or its first noise alone where no reward is asked."""
        pair = METHODS[self.config.method].noises == 2 and step % self.config.pref_interval == 0
        return fresh if pair else fresh[:1]

    def advance(self, opacity: float, share: float) -> str:
        """One optimiser step, left out where a gradient is not finite; what is wrong once that has gone on."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = bool(torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all())  # one wait for all
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
    return VoxelField(config.grid_size, radius, (BLOB_DENSITY, 0.5 * radius), learning_rate=config.lr)


def painted(colour: Float[Tensor, " 3"]) -> Callable[[Float[Tensor, "R 3"]], Float[Tensor, "R 3"]]:
    """A background of one colour."""
    return lambda directions: colour.expand_as(directions)


def view_scorer(decode: Decode, reward: Reward, prompt: str, rank: str, view_prompts: bool = False) -> ViewScore:
    """r(y, decode(x_0)) of every noise and view; with rank "group" every view of a noise has their mean.

    With `view_prompts` the reward reads y as "y, front view" and so on, by the view's camera.
    """

    def score(x_0: Float[Tensor, "N V C h w"], cameras: Cameras) -> Float[Tensor, "N V"]:
        suffixes = [f", {name} view" for name in view_names(cameras)] if view_prompts else len(cameras) * [""]
        rewards = score_noises(decode, reward, x_0, [prompt + suffix for suffix in suffixes])
        return rewards.mean(1, keepdim=True).expand_as(rewards) if rank == "group" else rewards

    return score


def distil_object(
    prior: Prior,
    view_score: ViewScore,
    y: Float[Tensor, "1 L D"],
    arms: dict[str, ObjectArm],
    rig: Rig,
    generator: torch.Generator,
) -> Iterator[ObjectStep]:
    """Optimise every arm's field in place; yields after each step, and ends early at a failure.

    All arms share the first arm's camera, timestep and size settings. Forward passes of the prior: one batched one a
    step without gradient, and one with gradient through n for every update of a negative embedding.
    """
    shared = next(iter(arms.values())).config
    schedule = NoiseSchedule(prior.alphas_cumprod)
    device, views = prior.device, prior.views
    y_views = y.expand(views, -1, -1)

    for step in range(shared.steps):
        share = step / shared.steps
        cameras = sample_cameras(rig, views, generator).to(device)
        poses, score = camera_embedding(cameras.c2w), partial(view_score, cameras=cameras)
        t = anneal_timestep(shared, share, len(prior.alphas_cumprod), torch.rand((), generator=generator).item())
        alpha_t, sigma_t = schedule.alpha_t(t), schedule.sigma_t(t)
        fresh = torch.randn((2, views, *prior.latent_shape), generator=generator).to(device)
        jitter_seed = int(torch.randint(2**62, (), generator=generator))
        drawn = torch.rand(4, generator=generator)
        colour = drawn[:3].to(device) if drawn[3] < RANDOM_BACKGROUND_SHARE else None

        # Render and encode, every arm from the same cameras.
        size = shared.render_size_end if shared.render_size_end and share >= 0.5 else shared.render_size
        seen: dict[str, Rendering] = {}
        for name, arm in arms.items():
            jitter = torch.Generator(device).manual_seed(jitter_seed)
            if step % OCCUPANCY_EVERY == 0:
                arm.occupancy.update(arm.field, jitter)
            background = arm.background if colour is None or not arm.learns_background else painted(colour)
            with_normals = bool(arm.config.lambda_orient or arm.config.lambda_orient_end)
            seen[name] = render(
                arm.field, background, cameras, size, samples=shared.samples, jitter=jitter,
                with_normals=with_normals, occupancy=arm.occupancy,
            )  # fmt: skip
        pixels = torch.cat([rendering.rgb for rendering in seen.values()])
        pixels = F.interpolate(pixels, (prior.image_size, prior.image_size), mode="bilinear", align_corners=False)
        encoded = dict(zip(arms, prior.encode(pixels).split(views)))
        images = dict(zip(arms, pixels.split(views)))

        # Noise the pair (eq. 11) of every arm; one batched forward.
        noises = {name: arm.noises(step, fresh) for name, arm in arms.items()}
        noisy = {name: alpha_t * encoded[name].detach() + sigma_t * noise for name, noise in noises.items()}
        n = {name: arm.negative.value.expand(views, -1, -1) for name, arm in arms.items()}
        predicted = eps_of_arms(prior, t, noisy, y_views, n, poses)

        terms, loss = {}, pixels.new_zeros(())
        for name, arm in arms.items():
            p = Predictions(noisy[name], noises[name], *predicted[name], alpha_t, sigma_t)
            guided = METHODS[arm.config.method].step(p, arm.config, score)
            loss = loss + (encoded[name] * guided.g).sum() / views + arm.regularisers(seen[name], share)
            if arm.config.lambda_rgb:
                with torch.no_grad():  # weighting recon: x_c - g is the guided x0-hat
                    target = prior.decode(encoded[name] - guided.g)
                loss = loss + arm.config.lambda_rgb * image_loss(images[name], target)
            terms[name] = guided.terms
            if step % (arm.config.pref_interval * arm.config.negative_interval) == 0:
                update_negative(prior, score, arm.negative, p, guided, arm.config.gamma, t, step, poses)

        # One backward for all arms: they share no parameter.
        for arm in arms.values():
            arm.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # Only now numbers that the host waits for: a GPU had all of the step queued.
        drift = {name: arm.negative.drift for name, arm in arms.items() if arm.negative.lr_0}
        opacity = {name: rendering.opacity.mean().item() for name, rendering in seen.items()}
        failures = [failure for name, arm in arms.items() if (failure := arm.advance(opacity[name], share))]
        failure = f"Stopped at step {step + 1}: {failures[0]}" if failures else ""
        renders = {name: rendering.rgb.detach() for name, rendering in seen.items()}
        yield ObjectStep(step + 1, t, renders, opacity, terms, drift, failure)
        if failure:
            return


def anneal_timestep(config: RunConfig, share: float, total: int, u: float) -> int:
    """t ~ U(low, high) from a uniform u; low falls from t_max to t_min, high from t_max to t_max_end (App. F.1)."""
    done = min(1.0, share / config.t_anneal) if config.t_anneal else 1.0
    low = config.t_max + done * (config.t_min - config.t_max)
    high = config.t_max + done * (config.t_max_end - config.t_max)
    return min(max(round((low + u * (high - low)) * total), 0), total - 1)
