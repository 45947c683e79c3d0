"""generate in mode 3d, end to end on a small multi-view prior of random weights: events, files, cancelling."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from psd import RunConfig, generate, record
from psd.contracts import Models
from psd.distil import distil
from psd.errors import RequestError
from psd.events import Finished, Preview, Shown, Started, Step
from psd.models.priors import load_prior
from psd.models.priors.mvdream import MVDreamPrior, start_from
from psd.models.priors.table import prior_info
from psd.modes import pictures
from psd.modes.object import ObjectStage
from psd.safety import check_request
from tests.gaussian import PlainReward
from tests.test_priors import make_prior_folder

OBJECT_KINDS = [kind for kind in record.KINDS if not kind.startswith("picture_")]
ARM_FILES = [".png", "_views.png", ".mp4", ".glb", ".ply", ".zip", "_field.safetensors"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = make_prior_folder(tmp_path_factory.mktemp("priors") / "tiny", "tiny", "epsilon")
    torch.manual_seed(0)
    start_from(load_prior(str(folder)).unet).save_pretrained(folder / "unet")
    return RunConfig(
        prompt="a red mushroom", mode="3d", prior=str(folder), reward="toybox/preference", steps=4, gamma=2.0,
        weighting="recon", negative_lr=1e-3, grid_size=24, render_size=16, samples=12, mesh_faces=2000,
    )  # fmt: skip


@pytest.fixture(scope="module")
def events(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list:
    return list(generate(config, tmp_path_factory.mktemp("run")))


def test_a_multi_view_folder_is_recognised(config: RunConfig):
    assert prior_info(config.prior).views == 4
    assert isinstance(load_prior(config.prior), MVDreamPrior)


def test_the_reward_reads_the_view_where_that_is_asked(config: RunConfig):
    read: list[str] = []

    @PlainReward
    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        read.extend(prompts)
        return images.mean((1, 2, 3))

    asked = replace(config, view_prompts=True)
    prior = load_prior(config.prior)
    states = distil(prior, ObjectStage(asked, {"with": asked}, Models(prior, reward, prior.decode)))
    next(states)
    states.close()
    assert read and all(re.fullmatch("a red mushroom, (front|side|back|overhead) view", prompt) for prompt in read)


def test_events_come_in_order(events: list):
    assert isinstance(events[0], Started)
    assert events[0].arms == ("with", "without")
    assert [event.step for event in events if isinstance(event, Step)] == [1, 2, 3, 4]
    previews = [event for event in events if isinstance(event, Preview)]
    assert [previews[0].step, previews[-1].step] == [1, 4]
    assert all(preview.image.shape == (128, 256, 3) and preview.image.dtype == np.uint8 for preview in previews)


def test_metrics(events: list):
    rows = [event.metrics for event in events if isinstance(event, Step)]
    assert rows[0]["reward_with"] == rows[0]["reward_without"]  # both arms start from the same field
    for row in rows:
        assert {"delta_gen", "delta_cls", "delta_pref", "beta_r", "opacity_with", "opacity_without"} <= set(row)
        assert all(np.isfinite(value) for value in row.values())


def test_files(events: list, config: RunConfig):
    last = events[-1]
    assert isinstance(last, Finished)
    expected = [f"{arm}{end}" for arm in ("with", "without") for end in ARM_FILES]
    expected += ["with_negative.safetensors", "with_pairs.webp", "metrics.csv", "run.json", "everything.zip"]
    assert sorted(path.name for path in last.directory.iterdir()) == sorted(expected)
    found = record.read(last.directory)
    assert found.arms == last.arms and found.state == "done" and len(found.rows) == 4
    assert all(path.stat().st_size > 0 for path in found.files)
    one = last.arms["with"]
    assert list(one.files) == OBJECT_KINDS and set(one.scores) == {"toybox/preference", "toybox/judge"}
    with Image.open(one.picture) as front:
        assert front.size == (256, 256)
    assert RunConfig.from_dict(record.settings_of(one.files["glb"])) == config
    assert one.remarks["glb"]["faces"] <= 2000


def test_closing_exports_the_last_state(config: RunConfig, tmp_path: Path):
    running = generate(replace(config, steps=50, arms="with"), tmp_path)
    started = next(running)
    for event in running:
        if isinstance(event, Step) and event.step == 2:
            break
    running.close()
    found = record.read(started.directory)
    assert found.stopped == "Cancelled after step 2 of 50." and list(found.arms) == ["with"]
    assert list(found.arms["with"].files) == OBJECT_KINDS


def test_every_arm_can_be_looked_at_before_any_slower_file_is_written(config: RunConfig, tmp_path: Path):
    running = generate(replace(config, steps=2), tmp_path)
    (shown,) = [event for event in running if isinstance(event, Shown) and first_look(event.directory)]
    running.close()
    assert record.read(shown.directory).state == "done"


def first_look(directory: Path) -> bool:
    """Whether the folder is as it should be when a run says that it can be looked at."""
    found = record.read(directory)
    kinds = {name: list(arm.files) for name, arm in found.arms.items()}
    assert found.state == "writing" and all(arm.scores and arm.picture for arm in found.arms.values())
    return kinds == {"with": ["picture", "negative", "pairs", "glb", "field"], "without": ["picture", "glb", "field"]}


def test_who_leaves_while_slower_files_are_written_keeps_the_meshes(config: RunConfig, tmp_path: Path):
    running = generate(replace(config, steps=2), tmp_path)
    shown = next(event for event in running if isinstance(event, Shown))
    running.close()
    found = record.read(shown.directory)
    assert found.state == "abandoned" and all("glb" in arm.files for arm in found.arms.values())


def test_a_codec_that_fails_costs_the_turntable_alone(config: RunConfig, tmp_path: Path, monkeypatch):
    def broken(path: Path, frames, fps: int) -> None:
        next(iter(frames))
        raise ValueError("no such codec")

    monkeypatch.setattr(pictures, "export_turntable", broken)
    *_, last = generate(replace(config, steps=2, arms="with"), tmp_path)
    assert last.remarks == ("with.mp4 could not be made: ValueError.",)
    assert list(last.arms["with"].files) == [kind for kind in OBJECT_KINDS if kind != "turntable"]


def test_an_object_without_a_surface_has_pictures_and_says_why_it_has_no_mesh(config: RunConfig, tmp_path: Path):
    *_, last = generate(replace(config, steps=60, arms="without", lambda_opacity=1e4, lr=1.0), tmp_path)
    assert last.failed and "the scene became empty" in last.stopped
    assert set(last.arms["without"].files) == {"picture", "field", "views", "turntable"}
    (remark,) = last.remarks
    assert remark.startswith("The scene is empty") and last.arms["without"].remarks["glb"] == {"reason": remark}


def test_same_seed_same_files(config: RunConfig, tmp_path: Path):
    """All bits of all files but the manifest's seconds; meshes and their archives too."""
    first, again = (list(generate(replace(config, arms="with", steps=2), tmp_path))[-1].arms["with"] for _ in range(2))
    for kind, path in first.files.items():
        assert path.read_bytes() == again.files[kind].read_bytes(), kind


def test_a_prior_of_single_pictures_is_refused():
    with pytest.raises(RequestError, match="'toybox/sd' draws single pictures: for mode 3d choose toybox/mvdream"):
        check_request(RunConfig(prompt="x", mode="3d"))
