"""The views that a multi-view prior draws by itself, beside objects: an arm of mode 3d."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from psd import RunConfig, generate, guidance, record
from psd.config import arms_of
from psd.distil import distil
from psd.errors import RequestError
from psd.methods.negative import starting_negative
from psd.modes.object import ObjectStage
from psd.safety import check_request
from psd.scene.cameras import camera_embedding, orbit_cameras
from psd.schedule import NoiseSchedule, descending_timesteps
from tests.test_object3d import CONFIG, ExactPrior, stage_of


def ended(**arms: RunConfig) -> ObjectStage:
    stage = stage_of(arms, ExactPrior())
    list(distil(stage.models.prior, stage))
    return stage


@pytest.mark.parametrize("steps", [6, 120])
def test_it_is_ddim_from_cameras_that_stay(steps: int):
    """Its levels, fifty at most, spread over the run's steps."""
    config = replace(CONFIG, method="sampling", steps=steps, seed=3)
    stage, prior = ended(sampling=config), ExactPrior()
    schedule, levels = NoiseSchedule(prior.alphas_cumprod), min(50, steps)
    y, n = prior.embed([config.prompt]), starting_negative(config, prior)
    poses = camera_embedding(orbit_cameras(4, **prior.frame.portrait).c2w)
    x_t = torch.randn((4, *prior.latent_shape), generator=torch.Generator().manual_seed(3))
    ts = descending_timesteps(levels, config.t_max, config.t_min, len(prior.alphas_cumprod)).tolist()
    for t, following in zip(ts, [*ts[1:], None]):
        eps_y, eps_n = (prior.eps(x_t, t, cond.expand(4, -1, -1), poses) for cond in (y, n))
        eps = guidance.cfg(eps_y, eps_n, config.gamma)
        x_c = guidance.x0_hat(x_t, eps, schedule.alpha_t(t), schedule.sigma_t(t))
        if following is not None:
            x_t = schedule.alpha_t(following) * x_c + schedule.sigma_t(following) * eps
    assert torch.allclose(stage.arms["sampling"].method.x_c, x_c, atol=1e-5)
    asked = stage.models.prior
    assert sum(asked.plain_rows) == 2 * 4 * levels
    assert all(torch.equal(told, poses.repeat(2, 1)) for told in asked.cameras)


def test_it_neither_moves_its_neighbours_nor_is_moved():
    sampling = replace(CONFIG, method="sampling")
    alone, beside, without = ended(sampling=sampling), ended(with_=CONFIG, sampling=sampling), ended(with_=CONFIG)
    assert torch.equal(alone.arms["sampling"].method.x_c, beside.arms["sampling"].method.x_c)
    assert torch.equal(beside.scored("with_")[0], without.scored("with_")[0])
    assert beside.scored("sampling")[0].shape[0] == 4 and list(beside.sculptures) == ["with_"]


def test_noise_that_lies_on_objects_is_for_arms_that_have_one():
    config = replace(CONFIG, noise="consistent", steps=2)
    stage = ended(with_=config, sampling=replace(config, method="sampling"))
    assert torch.isfinite(stage.scored("sampling")[0]).all() and list(stage.sculptures) == ["with_"]


def test_a_run_shows_it_beside_an_object(tmp_path: Path):
    config = RunConfig.from_preset(
        "toybox-fast", prompt="a red mushroom", arms="without, sampling", steps=2, grid_size=16, render_size=16,
        samples=8, mesh_faces=500,
    )  # fmt: skip
    *_, last = generate(config, tmp_path)
    arms = last.arms
    assert list(arms["sampling"].files) == ["picture", "views"] and "glb" in arms["without"].files
    assert arms["sampling"].scores.keys() == arms["without"].scores.keys() and last.remarks == ()
    with Image.open(arms["sampling"].files["views"]) as views:
        assert views.size == (4 * 192, 192)
    rows = record.read(last.directory).rows
    assert {"reward_sampling", "opacity_without"} <= rows[-1].keys() and "opacity_sampling" not in rows[-1]


def test_in_mode_image_the_arm_is_ddim_and_the_method_is_refused():
    config = RunConfig(prompt="a red cube", arms="sampling", update="adam")
    assert arms_of(config)["sampling"] == replace(config, method="sds", update="ddim")
    check_request(config)
    with pytest.raises(RequestError, match="method sampling draws several views at once, got mode image: choose mode"):
        check_request(replace(config, arms="with", method="sampling"))
