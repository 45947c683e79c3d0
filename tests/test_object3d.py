"""The 3D loop on an exact prior: what it shares between arms, how many forwards it takes, what ends it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from psd.config import FIELDS, RunConfig, arms_of, varied_name
from psd.contracts import Models
from psd.distil import distil
from psd.modes.object import ObjectStage, anneal_timestep
from psd.modes.sculpture import Sculpture, annealed_rate, start_background, start_field
from psd.scene.cameras import orbit_cameras
from psd.scene.fields import ConstantBackground, DirectionalBackground
from psd.scene.losses import SEEN
from psd.scene.render import Rendering, render
from psd.scene.rig import Frame, Rig
from psd.score import BoundScore
from tests import gaussian
from tests.gaussian import OTHER, PlainReward

SIDE = 8
CONFIG = RunConfig(
    prompt="a longer prompt", negative_prompt="bad", mode="3d", steps=6, gamma=2.0, weighting="recon", lr=0.05,
    negative_lr=1e-2, grid_size=16, render_size=SIDE, samples=12,
)  # fmt: skip
FRAME = Frame(0.7, Rig((40.0, 40.0), (0.7, 0.8), (0.0, 30.0)), background=(0.9, 0.9, 0.9))


@dataclass
class ExactPrior(gaussian.ExactPrior):
    """On plain pixels, of four views; keeps the cameras it was told, and answers `spoil` times what is right."""

    views: int = 4
    image_size: int = SIDE
    frame: Frame = FRAME
    latent_shape: tuple[int, int, int] = (3, SIDE, SIDE)
    cameras: list[Tensor] = field(default_factory=list)
    spoil: float = 1.0

    def eps(self, x_t: Tensor, t: int, cond: Tensor, cameras: Tensor | None = None) -> Tensor:
        self.cameras.append(cameras)
        return self.spoil * super().eps(x_t, t, cond, cameras)


@PlainReward
def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    assert len(images) == len(prompts)
    return images.mean((1, 2, 3)) * 3


class Seen(NamedTuple):
    """A state of the loop and this step's renders."""

    step: int
    views: dict[str, Tensor]
    failure: str


def run(
    arms: dict[str, RunConfig], prior: ExactPrior | None = None, seed: int = 0, reward=brightness
) -> tuple[list[Seen], dict[str, Sculpture]]:
    stage = stage_of({name: replace(config, seed=seed) for name, config in arms.items()}, prior or ExactPrior(), reward)
    states = [
        Seen(state.step, {name: each.clone() for name, each in stage.renders.items()}, state.failure)
        for state in distil(stage.models.prior, stage)
    ]
    return states, stage.sculptures


def stage_of(arms: dict[str, RunConfig], prior: ExactPrior, reward=brightness) -> ObjectStage:
    return ObjectStage(next(iter(arms.values())), arms, Models(prior, reward, prior.decode))


def plain(config: RunConfig) -> RunConfig:
    return replace(config, method="sds")


def weights(arm: Sculpture) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in arm.field.parameters()])


@pytest.mark.parametrize("apart", [True, False])
def test_forward_passes(apart: bool, monkeypatch: pytest.MonkeyPatch):
    """(2 noises + 1 noise) x (y, n) x 4 views a step; 4 rows with gradient per update of n."""
    prior = ExactPrior()
    monkeypatch.setattr("psd.distil.apart", lambda prior: apart)
    run({"with": CONFIG, "without": plain(CONFIG)}, prior)
    assert prior.plain_rows == ([16, 8] if apart else [24]) * 6
    assert prior.gradient_rows == [4] * 6


def test_intervals_save_forwards():
    prior = ExactPrior()
    run({"with": replace(CONFIG, pref_interval=2, negative_interval=2)}, prior)
    assert prior.plain_rows == [16, 8, 16, 8, 16, 8]
    assert len(prior.gradient_rows) == 2


def test_every_row_is_told_the_camera_of_its_view():
    prior = ExactPrior()
    run({"with": replace(CONFIG, negative_lr=0.0), "without": plain(CONFIG)}, prior)
    for told in prior.cameras:
        assert told.shape in ((16, 16), (8, 16))
        assert torch.equal(told, told[:4].repeat(len(told) // 4, 1))
        assert len(told[:4].unique(dim=0)) == 4


def test_arms_start_from_one_field_and_see_it_from_the_same_cameras():
    states, _ = run({"with": CONFIG, "without": plain(CONFIG)})
    assert torch.equal(states[0].views["with"], states[0].views["without"])
    assert not torch.equal(states[-1].views["with"], states[-1].views["without"])


@pytest.mark.parametrize("rank", ["view", "group"])
def test_preference_switched_off_is_the_plain_arm_bit_for_bit(rank: str):
    """The pair's first noise wins where all rewards are equal; weight 0 and a fixed n leave plain distillation."""
    off = replace(CONFIG, pref_weight=0.0, negative_lr=0.0, reward_scale=0.0, rank=rank)

    @PlainReward
    def indifferent(images: Tensor, prompts: list[str]) -> Tensor:
        return images.new_zeros(len(images))

    _, states = run({"with": off, "without": plain(off)}, reward=indifferent)
    assert torch.equal(weights(states["with"]), weights(states["without"]))


def test_same_seed_same_bits():
    (_, first), (_, again), (_, other) = (run({"with": CONFIG}, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(weights(first["with"]), weights(again["with"]))
    assert not torch.equal(weights(first["with"]), weights(other["with"]))


def test_an_arm_does_not_depend_on_its_neighbours():
    _, alone = run({"with": CONFIG})
    _, beside = run({"without": plain(CONFIG), "with": CONFIG, "other": replace(CONFIG, pref_form="paper")})
    assert torch.equal(weights(alone["with"]), weights(beside["with"]))


def test_the_scene_moves_towards_what_the_prior_expects():
    """The prior's pictures are of one grey, the mean of the prompt's embedding: 1.5, brighter than any colour."""
    config = replace(plain(CONFIG), steps=60, gamma=1.0)
    states, _ = run({"with": config})
    before, after = (state.views["with"].mean().item() for state in (states[0], states[-1]))
    assert after > before + 0.04


def test_the_image_loss_alone_pulls_as_the_latent_one_does_where_pixels_are_latents():
    """Between a render and its x_c - g lies g: the same gradient by another way than through the encoder."""

    class Blind(ExactPrior):
        def encode(self, images: Tensor) -> Tensor:
            return images.detach()

    _, by_latents = run({"with": CONFIG})
    _, by_images = run({"with": replace(CONFIG, lambda_rgb=1.0)}, Blind())
    torch.testing.assert_close(weights(by_images["with"]), weights(by_latents["with"]), rtol=0, atol=1e-5)
    _, by_both = run({"with": replace(CONFIG, lambda_rgb=1.0, lambda_opacity=10.0)})
    _, by_latents = run({"with": replace(CONFIG, lambda_opacity=5.0)})  # Adam: twice the gradient is the same step
    torch.testing.assert_close(weights(by_both["with"]), weights(by_latents["with"]), rtol=0, atol=1e-5)


FINER = replace(CONFIG, grid_size_end=31, render_size_end=2 * SIDE)


def test_the_second_half_has_a_finer_grid_and_larger_renders():
    stage = stage_of({"with": FINER, "without": plain(FINER)}, ExactPrior())
    seen = []
    for _ in distil(stage.models.prior, stage):
        grids = {tuple(arm.field.voxels.shape[2:]) for arm in stage.sculptures.values()}
        seen.append((*grids, {each.shape[-1] for each in stage.renders.values()}))
    assert seen == 3 * [((16, 16, 16), {SIDE})] + 3 * [((31, 31, 31), {2 * SIDE})]


def test_a_finer_grid_is_the_same_scene_and_learns_on():
    """31 points hold the 16: at the step that refines, every arm's renders are those of the coarse grid."""
    coarse, fine = (run({"with": c})[0][3].views["with"] for c in (CONFIG, replace(CONFIG, grid_size_end=31)))
    torch.testing.assert_close(fine, coarse, rtol=0, atol=1e-5)
    stage = stage_of({"with": FINER}, ExactPrior())
    sculpture = stage.sculptures["with"]
    for state in distil(stage.models.prior, stage):
        if state.step == 4:
            refined = sculpture.field.voxels.detach().clone()
    (group,) = (group for group in sculpture.optimizer.param_groups if group["lr"] == CONFIG.lr)
    assert group["params"] == [sculpture.field.voxels] and len(sculpture.optimizer.state) == 1
    assert not torch.equal(refined, sculpture.field.voxels)


def test_a_finer_grid_depends_on_the_seed_alone():
    arms = {"without": plain(FINER), "with": FINER, "other": replace(FINER, pref_form="paper")}
    (_, first), (_, again), (_, beside) = run({"with": FINER}), run({"with": FINER}), run(arms)
    assert torch.equal(weights(first["with"]), weights(again["with"]))
    assert torch.equal(weights(first["with"]), weights(beside["with"]))


def test_a_hash_field_has_no_grid_to_refine():
    run({"with": replace(FINER, field="hashgrid", steps=2)})


def test_density_has_a_rate_of_its_own():
    """Adam's first step is the rate, wherever there is a gradient."""
    _, arms = run({"without": replace(plain(CONFIG), steps=1, lr_density=10 * CONFIG.lr)})
    field = arms["without"].field
    corners = field.radius * torch.stack(torch.meshgrid(*3 * [torch.linspace(-1, 1, 16)], indexing="ij"), -1)
    density, rgb = field.raw_features(corners.view(-1, 3))
    assert density.abs().max().item() == pytest.approx(10 * CONFIG.lr, rel=1e-3)
    assert rgb.abs().max().item() == pytest.approx(CONFIG.lr, rel=1e-3)


def test_group_ranking_gives_every_view_the_mean():
    prior, x_0 = ExactPrior(), torch.rand(2, 4, 3, SIDE, SIDE)
    by_view, by_group = (BoundScore(prior.decode, brightness, ["x"], rank)(x_0) for rank in ("view", "group"))
    torch.testing.assert_close(by_group, by_view.mean(1, keepdim=True).expand(2, 4))
    assert by_view.std(1).min() > 0


@pytest.mark.parametrize("view_prompts", [False, True])
def test_the_reward_is_told_the_view(view_prompts: bool):
    read = []

    @PlainReward
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        read.append(prompts)
        return brightness(images, prompts)

    score = BoundScore(ExactPrior().decode, reward, ["a cat"], "view", view_prompts)
    score.cameras = orbit_cameras(4, azimuth_start_deg=10)
    score(torch.rand(2, 4, 3, SIDE, SIDE))
    views = ["a cat, front view", "a cat, side view", "a cat, back view", "a cat, side view"]
    assert read == [2 * (views if view_prompts else ["a cat"] * 4)]
    score.cameras = orbit_cameras(4, elevation_deg=70)
    score(torch.rand(1, 4, 3, SIDE, SIDE))
    assert read[1] == 4 * ["a cat, overhead view" if view_prompts else "a cat"]


def test_what_is_seen_is_made_solid_once_the_first_30_percent_are_over():
    """Steps on that loss alone: a faint grey ball before white becomes an opaque one, of the same outline."""
    config = replace(plain(CONFIG), lambda_solid=300.0, lr=0.3)
    start, white = start_field(config, radius=0.7), ConstantBackground((0.99,) * 3).requires_grad_(False)
    arm = Sculpture.start(config, start, white, torch.device("cpu"))

    def seen() -> Rendering:
        return render(
            arm.field, white, orbit_cameras(4), 16, samples=32, jitter=None, with_normals=False, occupancy=None
        )

    before = seen()
    assert arm.regularisers(before, 0.29).item() == 0
    for _ in range(40):
        arm.optimizer.zero_grad()
        arm.regularisers(seen(), 0.3).backward()
        arm.optimizer.step()
    after, inside = seen(), before.contrast > SEEN
    assert 0.02 < inside.float().mean() < 0.9 and before.opacity[inside].mean() < 0.8
    assert after.opacity[inside].mean() > 0.95


@pytest.mark.parametrize(("rate", "learned"), [(0.0, 0), (0.3, 2)])
def test_a_shadow_is_learned_where_it_has_a_rate_and_the_prior_one_background(rate: float, learned: int):
    _, arms = run({"with": replace(CONFIG, lr_shadow=rate)})
    parameters = [each for each in arms["with"].background.parameters() if each.requires_grad]
    assert len(parameters) == learned and all(each.grad.abs().max() > 0 for each in parameters)
    anywhere = start_background(replace(CONFIG, lr_shadow=rate), replace(FRAME, background=None))
    assert isinstance(anywhere, DirectionalBackground)


def test_learning_rates_fall_in_the_second_half():
    assert [annealed_rate(0.1, share) for share in (0, 0.5, 0.75, 1)] == pytest.approx([1, 1, 0.55, 0.1])
    assert annealed_rate(1.0, 0.9) == 1
    _, arms = run({"with": replace(CONFIG, lr_end=0.0), "other": CONFIG})
    rates = {name: [group["lr"] for group in arm.optimizer.param_groups] for name, arm in arms.items()}
    assert rates["other"] == arms["other"].rates
    assert rates["with"] == pytest.approx([annealed_rate(0.0, 5 / 6) * rate for rate in arms["with"].rates])


def test_a_hash_field_with_a_learned_background_learns_both():
    config = replace(CONFIG, field="hashgrid", steps=3, lambda_orient=1.0, lambda_opacity=0.1, lambda_z_variance=0.1)
    _, states = run({"with": config}, ExactPrior(frame=replace(FRAME, background=None)))
    first = DirectionalBackground()
    moved = [parameter for parameter in states["with"].background.parameters() if parameter.grad is not None]
    assert len(moved) == len(list(first.parameters()))
    assert torch.isfinite(weights(states["with"])).all()


def test_gradients_that_overflow_spoil_nothing_and_end_the_run():
    prior = ExactPrior(spoil=float("nan"))
    states, arms = run({"with": replace(CONFIG, steps=60, method="sds")}, prior)
    assert states[-1].step == 20
    assert states[-1].failure == "Stopped at step 20: gradients overflowed; lower gamma, pref_weight or lr."
    assert torch.isfinite(weights(arms["with"])).all()


def test_an_empty_scene_ends_the_run():
    states, _ = run({"with": replace(plain(CONFIG), steps=200, lambda_opacity=1e4, lr=1.0)})
    assert states[-1].failure.startswith(f"Stopped at step {states[-1].step}: the scene became empty;")
    assert states[-1].step < 100


def test_timesteps_anneal_as_in_the_papers_configuration():
    """10,000 steps: low 0.98 -> 0.02 and high 0.98 -> 0.50 over the first 8,000."""
    config = replace(CONFIG, t_max=0.98, t_min=0.02, t_max_end=0.5, t_anneal=0.8)
    edges = {share: [anneal_timestep(config, share, 1000, u) for u in (0.0, 1.0)] for share in (0.0, 0.4, 0.8, 1.0)}
    assert edges == {0.0: [980, 980], 0.4: [500, 740], 0.8: [20, 500], 1.0: [20, 500]}


@pytest.mark.parametrize("name", [name for name, setting in FIELDS.items() if setting.varies in ("any", "3d")])
def test_a_number_that_varies_acts_on_its_own_arm_as_in_a_run_alone(name: str):
    config = replace(CONFIG, arms="with", vary=f"{name}: {OTHER[name]}")
    arms, varied = arms_of(config), varied_name(name, OTHER[name])
    (_, beside), (_, alone) = run(arms), run({"alone": arms[varied]})
    assert torch.equal(weights(beside[varied]), weights(alone["alone"]))
    assert not torch.equal(weights(beside[varied]), weights(beside["with"]))
