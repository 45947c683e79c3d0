"""The tables' arithmetic, and what is read of an object's views, against answers known by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from psd.bench import image, paired, scene
from psd.config import RunConfig
from psd.scene.cameras import Cameras
from psd.toybox import world
from psd.toybox.facts import GROUPS, labels
from psd.toybox.views import AZIMUTHS, FOVY_DEG, draw_group, group

CHAIR, LAMP = (world.Scene(world.Thing(kind, "blue")) for kind in ("chair", "lamp"))


class SaysWhatItIsTold:
    """A classifier that sees `scenes` in the views, one each, surely."""

    def __init__(self, scenes: list[world.Scene]):
        rows = torch.from_numpy(np.stack([labels(scene) for scene in scenes]))
        self.answer = {
            group: torch.nn.functional.one_hot(rows[:, i], len(values)).float().clamp(min=1e-6).log()
            for i, (group, values) in enumerate(GROUPS.items())
        } | {"azimuth": torch.zeros(len(scenes), len(AZIMUTHS))}

    def __call__(self, views: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.answer


@pytest.mark.parametrize(
    ("said", "kind", "kind_views", "consistency"),
    [
        ([CHAIR] * 12, 100, 100, 100),
        ([CHAIR] * 9 + [LAMP] * 3, 100, 75, 75),
        ([CHAIR] * 3 + [LAMP] * 9, 0, 25, 75),
    ],
)
def test_what_is_seen_in_twelve_views(monkeypatch, said, kind, kind_views, consistency):
    monkeypatch.setattr(scene, "load_attributes", lambda device, source: SaysWhatItIsTold(said))
    seen = scene.seen_in(torch.zeros(12, 3, 8, 8), CHAIR)
    assert (seen["kind"], seen["kind_views"], seen["consistency"]) == (kind, kind_views, consistency)
    assert seen["facts"] == pytest.approx(50 + kind_views / 2)  # the colour is right in every view


def test_the_interval_is_over_prompts_not_over_seeds():
    between = np.repeat(np.arange(20.0)[:, None], 2, axis=1)
    mean, low, high = paired.interval(between)
    assert mean == 9.5 and 6 < low < 8 and 11 < high < 13
    within = np.tile([[0.0, 19.0]], (20, 1))  # every prompt has the same mean
    assert paired.interval(within) == (9.5, 9.5, 9.5)


def test_the_table_states_paired_differences():
    found = {"plain": {"x": np.array([[1.0], [3.0]])}, "full": {"x": np.array([[2.0], [4.0]])}}
    lines = paired.table(
        found, {"x": paired.Column("reward", 1)}, "plain", {"seconds": {"plain": "1", "full": "2"}}
    ).splitlines()
    assert lines[0] == "| arm | reward | seconds |"
    assert lines[2].startswith("| plain | 2.0 [") and lines[2].endswith("| 1 |") and "<br>" not in lines[2]
    assert "<br>+1.0 [+1.0, +1.0]" in lines[3]


def test_jobs_come_back_under_their_prompt_and_seed(tmp_path: Path):
    scenes = paired.heldout_scenes(3)
    assert [world.caption(s) for s in scenes] == [world.caption(s) for s in paired.heldout_scenes(5)[:3]]
    order = {world.caption(s): i for i, s in enumerate(scenes)}

    def run_batch(jobs: list[paired.Job]) -> paired.Values:
        for job in jobs:
            paired.save_picture(tmp_path, job, torch.rand(3, 64, 64))
        return {"arm": {"x": [10.0 * order[world.caption(scene)] + seed for scene, seed in jobs]}}

    found = paired.measure(run_batch, scenes, seeds=2, batch=4, workers=1)
    assert found["arm"]["x"].tolist() == [[0, 1], [10, 11], [20, 21]]
    pictures = sorted(tmp_path.iterdir())
    assert len(pictures) == 6
    with Image.open(pictures[0]) as picture:
        assert picture.size == (64, 64)
    assert paired.contact_sheet(tmp_path, scenes, 2).width == 128


@pytest.mark.parametrize("bench", [image, scene])
def test_the_arms_differ_from_full_psd_only_where_they_say(bench):
    config = RunConfig.from_preset(bench.PRESET)
    arms = bench.arms_of(config)
    assert config in arms.values()
    assert arms[bench.PLAIN].method == "sds"
    assert len(set(arms.values())) == len(arms)


def test_the_world_s_own_object_is_what_the_prior_s_views_look_like():
    """As drawn for the training groups, from any cameras."""
    drawn, _ = group(90, 0, heldout=True)
    others = (torch.full((4,), float(value)) for value in (drawn.elevation_deg, drawn.distance, FOVY_DEG))
    cameras = Cameras.around(torch.tensor(drawn.azimuth_deg), *others)
    views = scene.true_views(drawn.example.scene, 0, cameras, 128)
    assert views.shape == (4, 3, 128, 128)
    original = torch.from_numpy(draw_group(90, 0, heldout=True)).permute(0, 3, 1, 2) / 255
    assert (views - original).abs().mean() < 0.03  # another instance of it: the same but for 4 % of its measures


def test_the_cost_of_a_run_is_measured_around_it():
    config = RunConfig.from_preset("toybox-image", prompt="a red mushroom", steps=2, compare=False)
    cost = scene.cost_here(config, "cpu")
    assert 0 < cost.first_preview_s < cost.seconds < 120
    assert 100 < cost.peak_mb < 20_000
