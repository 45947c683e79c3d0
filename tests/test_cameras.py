"""Cameras and rays against MVDream's own numbers (tests/golden/mvdream_camera) and against the toybox's renderer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from psd.scene.cameras import (
    Cameras,
    camera_embedding,
    camera_rays,
    cameras_from_draws,
    look_at,
    orbit_cameras,
    sample_cameras,
    view_names,
)
from psd.scene.rig import Rig
from psd.toybox.raster import Primitive, Surface, camera_to_world, render

GOLDEN = Path(__file__).parent / "golden" / "mvdream_camera"

helper, eval_rays, train = (
    load_file(GOLDEN / f"{name}.safetensors") for name in ("helper", "eval_rays", "train_sampler")
)
ABOUT = {name: json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("helper", "eval_rays", "train_sampler")}


HELPER_ZERO_DEG = -90  # MVDream's helper counts azimuths from -y, its data and we from +x; the world is the same


def pose(azimuth_deg: float, elevation_deg: float, distance: float) -> torch.Tensor:
    return look_at(*(torch.tensor([value], dtype=torch.float32) for value in (azimuth_deg, elevation_deg, distance)))


def assert_same_rays(cameras: Cameras, fixture: dict[str, torch.Tensor], name: str) -> None:
    origins, directions = camera_rays(cameras, *fixture[f"{name}.rays_d"].shape[1:3])
    torch.testing.assert_close(directions, fixture[f"{name}.rays_d"], rtol=5e-6, atol=1e-6)
    torch.testing.assert_close(origins, fixture[f"{name}.rays_o"], rtol=5e-6, atol=1e-6)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(directions.shape[:-1]))


@pytest.mark.parametrize("case", ABOUT["helper"]["get_camera"], ids=lambda case: f"get_camera_{case['index']}")
def test_embedding_of_a_ring_is_mvdreams_get_camera(case):
    step = case["azimuth_span"] / case["num_frames"]
    start = case["azimuth_start"] + HELPER_ZERO_DEG
    azimuth = start + step * torch.arange(case["num_frames"], dtype=torch.float32)
    same = torch.ones_like(azimuth)
    poses = look_at(azimuth, case["elevation"] * same, 2.5 * same)
    want = helper[f"get_camera.{case['index']}.blender"]
    torch.testing.assert_close(camera_embedding(poses), want, rtol=0, atol=2e-6)
    if case["azimuth_span"] == 360:
        orbit = orbit_cameras(case["num_frames"], case["elevation"], azimuth_start_deg=start)
        torch.testing.assert_close(camera_embedding(orbit.c2w), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", ABOUT["helper"]["single"], ids=lambda case: f"single_{case['index']}")
def test_pose_and_embedding_are_mvdreams(case):
    name = f"single.{case['index']}"
    azimuth = case["azimuth"] + HELPER_ZERO_DEG
    got = pose(azimuth, case["elevation"], case["distance"])
    torch.testing.assert_close(got, helper[f"{name}.c2w_blender_at_distance_torch"], rtol=0, atol=2e-6)
    torch.testing.assert_close(
        pose(azimuth, case["elevation"], 1.0)[0], helper[f"{name}.c2w_blender"].float(), rtol=0, atol=2e-6
    )
    torch.testing.assert_close(camera_embedding(got), helper[f"{name}.normalized_torch"], rtol=0, atol=2e-6)


def test_embedding_leaves_the_pose_alone():
    c2w = helper["normalize_inplace.before"].clone()
    torch.testing.assert_close(camera_embedding(c2w), helper["normalize_inplace.returned"], rtol=0, atol=2e-6)
    assert torch.equal(c2w, helper["normalize_inplace.before"])
    assert not torch.equal(c2w, helper["normalize_inplace.argument_after_call"])


@pytest.mark.parametrize("case", ABOUT["eval_rays"]["cases"], ids=lambda case: case["split"] + str(case["index"]))
def test_evaluation_poses_and_rays(case):
    name = f"eval.{case['index']}"
    fovy_deg = torch.full((case["n"],), float(case["fovy"]))
    cameras = Cameras.around(
        eval_rays[f"{name}.azimuth"], eval_rays[f"{name}.elevation"], eval_rays[f"{name}.camera_distances"], fovy_deg
    )
    torch.testing.assert_close(cameras.c2w, eval_rays[f"{name}.c2w"], rtol=0, atol=2e-6)
    torch.testing.assert_close(
        camera_embedding(cameras.c2w), eval_rays[f"{name}.normalize_camera_of_c2w"], rtol=0, atol=2e-6
    )
    assert_same_rays(cameras, eval_rays, name)
    if case["split"] == "val":
        orbit = orbit_cameras(case["n"], case["elev"], case["fovy"], case["dist"])
        torch.testing.assert_close(orbit.c2w, eval_rays[f"{name}.c2w"], rtol=0, atol=2e-6)


def test_training_cameras_of_given_draws_are_mvdreams():
    laws = set()
    for case in ABOUT["train_sampler"]["cases"]:
        name = f"train.{case['index']}"
        draw = {key: train[f"{name}.draw.u_{key}"] for key in ("elevation", "azimuth", "fovy", "distance")}
        u_law = torch.full_like(draw["elevation"], case["python_random_u"])
        rig = Rig(tuple(case["fovy"]), tuple(case["dist"]), tuple(case["elev"]))
        got = cameras_from_draws(rig, case["n_view"], torch.stack([u_law, *draw.values()], 1))
        laws.add((case["branch"], case["relative"]))
        torch.testing.assert_close(got.azimuth_deg, train[f"{name}.azimuth"], rtol=5e-6, atol=2e-5)
        torch.testing.assert_close(got.elevation_deg, train[f"{name}.elevation"], rtol=5e-6, atol=2e-5)
        if not case["relative"]:  # absolute distances, zoom and jitter: not in a Rig
            continue
        torch.testing.assert_close(got.fovy_deg, train[f"{name}.fovy"], rtol=5e-6, atol=0)
        torch.testing.assert_close(got.distance, train[f"{name}.camera_distances"], rtol=5e-6, atol=0)
        torch.testing.assert_close(got.c2w[:, :3, 3], train[f"{name}.camera_positions"], rtol=5e-6, atol=2e-6)
        torch.testing.assert_close(got.c2w, train[f"{name}.c2w"], rtol=0, atol=2e-6)
        assert_same_rays(got, train, name)
    assert laws == {("uniform in degrees", True), ("asin branch", True), ("asin branch", False)}


def test_rays_of_jittered_cameras_follow_the_pose_not_the_angles():
    c2w, fovy_deg = train["train.2.c2w"], train["train.2.fovy"]
    nowhere = torch.zeros_like(fovy_deg)
    assert_same_rays(Cameras(c2w, fovy_deg, nowhere, nowhere, nowhere), train, "train.2")


def test_poses_are_the_toyboxs():
    for azimuth, elevation, distance in ((0, 0, 1), (20, 10, 1.95), (70, 30, 1.95), (-133, -45, 3), (300, 89, 0.5)):
        want = torch.from_numpy(camera_to_world(azimuth, elevation, distance))
        torch.testing.assert_close(pose(azimuth, elevation, distance)[0], want, rtol=0, atol=2e-6)


def test_rays_meet_what_the_toybox_draws():
    """A ball off the axes is drawn around the pixel whose ray passes nearest to its centre: nothing is mirrored."""
    centre = torch.tensor([0.1, 0.3, 0.2])
    ball = Surface(Primitive("sphere", 0.05 * np.eye(3), centre.numpy(), "main"), np.zeros(3))
    cameras = orbit_cameras(3, elevation_deg=20, distance=2, azimuth_start_deg=25)
    origins, directions = camera_rays(cameras, 48, 48)
    past = torch.linalg.cross(directions, centre - origins).norm(dim=-1)
    for camera, (azimuth, distances) in enumerate(zip(cameras.azimuth_deg.tolist(), past)):
        drawn = render([ball], camera_to_world(azimuth, 20, 2), 48).sum(-1) < 300
        middle = np.argwhere(drawn).mean(0)
        nearest = np.unravel_index(distances.argmin().item(), (48, 48))
        assert np.abs(middle - nearest).max() < 1, camera


def test_poses_by_hand():
    from_x, from_y, above = pose(0, 0, 2)[0], pose(90, 0, 2)[0], pose(0, 90, 2)[0]
    torch.testing.assert_close(from_x[:3, 3], torch.tensor([2.0, 0, 0]))
    torch.testing.assert_close(from_x[:3, 0], torch.tensor([0.0, 1, 0]))  # seen from +x, +y is on the right
    torch.testing.assert_close(from_y[:3, 3], torch.tensor([0.0, 2, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(above[:3, 3], torch.tensor([0.0, 0, 2]), atol=1e-6, rtol=0)
    torch.testing.assert_close(above[:3, 1], torch.tensor([-1.0, 0, 0]), atol=1e-6, rtol=0)


def test_poses_are_rotations_that_look_at_the_origin():
    cameras = sample_cameras(Rig(elevation_deg=(-90, 90)), 4, torch.Generator().manual_seed(0), groups=16)
    rotation, position = cameras.c2w[:, :3, :3], cameras.c2w[:, :3, 3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(64))
    torch.testing.assert_close(position, cameras.distance[:, None] * rotation[:, :, 2])
    assert not cameras.c2w[:, 2, 0].any()  # level horizon


def test_a_group_shares_all_but_the_azimuth():
    cameras = sample_cameras(Rig(), 4, torch.Generator().manual_seed(3), groups=5)
    assert len(cameras) == 20
    for shared in (cameras.fovy_deg, cameras.elevation_deg, cameras.distance):
        groups = shared.view(5, 4)
        assert torch.equal(groups, groups[:, :1].expand(5, 4)) and groups[:, 0].unique().numel() == 5
    steps = cameras.azimuth_deg.view(5, 4).diff(dim=1)
    torch.testing.assert_close(steps, torch.full((5, 3), 90.0))


def test_random_cameras_cover_the_rig():
    cameras = sample_cameras(Rig((30, 50), (0.5, 2.0), (-20, 40)), 1, torch.Generator().manual_seed(0), groups=4000)
    multiple = cameras.distance * torch.tan(torch.deg2rad(cameras.fovy_deg) / 2)
    for values, low, high in (
        (cameras.fovy_deg, 30, 50),
        (multiple, 0.5, 2.0),
        (cameras.azimuth_deg, -180, 180),
        (cameras.elevation_deg, -20, 40),
    ):
        span = high - low
        assert low - 1e-4 <= values.min() < low + 0.01 * span and high - 0.01 * span < values.max() <= high + 1e-4
    on_sphere = math.degrees(math.asin(40 / 90))  # where the second law ends
    above = (cameras.elevation_deg > on_sphere).float().mean().item()
    assert above == pytest.approx(0.5 * (40 - on_sphere) / 60, abs=0.02)


def test_random_cameras_are_the_generators():
    first, again = (sample_cameras(Rig(), 4, torch.Generator().manual_seed(7), groups=2) for _ in range(2))
    other = sample_cameras(Rig(), 4, torch.Generator().manual_seed(8), groups=2)
    assert torch.equal(first.c2w, again.c2w) and not torch.equal(first.c2w, other.c2w)


def test_views_are_named_as_threestudio_names_them():
    """Its prompt processor with thresholds of 30 degrees, on angles at, below and above each of them."""
    golden = load_file(GOLDEN.parent / "losses" / "prompt_views.safetensors")
    azimuth_deg, elevation_deg, index = (
        golden[f"thresholds_30.{name}"] for name in ("azimuth_deg", "elevation_deg", "direction_index")
    )
    one = torch.ones_like(azimuth_deg)
    names = view_names(Cameras.around(azimuth_deg, elevation_deg, one, 40 * one))
    assert names == [("side", "front", "back", "overhead")[i] for i in index.tolist()]


def test_rays_by_hand():
    """A 2 x 4 image with fovy 90: the rows' centres are at +-1/2, the columns' at -3/2 ... 3/2 of unit depth."""
    cameras = orbit_cameras(1, elevation_deg=0, fovy_deg=90, distance=2)
    origins, directions = camera_rays(cameras, 2, 4)
    torch.testing.assert_close(origins, torch.tensor([2.0, 0, 0]).expand(1, 2, 4, 3))
    top_left = torch.tensor([-1.0, -1.5, 0.5])  # look -x, right +y, up +z
    torch.testing.assert_close(directions[0, 0, 0], top_left / top_left.norm())
    torch.testing.assert_close(directions[0, 1, 3], -torch.tensor([1.0, -1.5, 0.5]) / top_left.norm())


def test_some_of_the_cameras():
    cameras = orbit_cameras(6)
    assert torch.equal(cameras[2:4].azimuth_deg, torch.tensor([120.0, 180]))
    picked = cameras[torch.tensor([5, 0])]
    assert len(picked) == 2 and torch.equal(picked.c2w, cameras.c2w[[5, 0]])
    assert torch.equal(cameras[cameras.azimuth_deg < 100].distance, torch.full((2,), 3.0))
    assert torch.equal(cameras.to("cpu").fovy_deg, cameras.fovy_deg)


@pytest.mark.parametrize("ranges", [{"fovy_deg": (60, 15)}, {"distance": (-1, 1)}, {"elevation_deg": (0, 100)}])
def test_ranges_that_are_none_are_refused(ranges):
    with pytest.raises(ValueError, match=f"{next(iter(ranges))} must be a range within"):
        Rig(**ranges)
