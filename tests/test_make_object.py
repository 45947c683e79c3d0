"""generate in mode 3d, end to end on a small multi-view prior of random weights: events, files, cancelling."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from psd import RunConfig, generate
from psd.errors import RequestError
from psd.events import Finished, Preview, Started, Step
from psd.make_object import MakeObject
from psd.models.priors import load_prior
from psd.models.priors.mvdream import MVDreamPrior, start_from
from psd.models.priors.table import prior_info
from psd.safety import check_request
from psd.scene.files import read_glb_extras
from tests.test_priors import make_prior_folder

ARM_FILES = [".png", "_views.png", ".mp4", ".glb", ".ply", ".zip"]


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

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        read.extend(prompts)
        return images.mean((1, 2, 3))

    asked = replace(config, view_prompts=True)
    prior = load_prior(config.prior)
    steps = MakeObject(asked, {"with": asked}, prior, reward, prior.decode).steps()
    next(steps)
    steps.close()
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
    assert sorted(last.files) == sorted([*expected, "metrics.csv", "run.json"])
    assert all(path.stat().st_size > 0 for path in last.files.values())
    assert set(last.scores["with"]) == {"toybox/preference", "toybox/judge"}
    with Image.open(last.images["with"]) as front:
        assert front.size == (256, 256)
    extras = read_glb_extras(last.files["with.glb"])
    assert extras["arm"] == "with" and RunConfig.from_dict(extras) == config
    found = json.loads(last.files["run.json"].read_text())
    assert found["meshes"]["with"]["faces"] <= 2000
    with open(last.files["metrics.csv"], newline="") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_cancelling_exports_the_last_state(config: RunConfig, tmp_path: Path):
    running = generate(replace(config, steps=50, arms="with"), tmp_path)
    started = next(running)
    for event in running:
        if isinstance(event, Step) and event.step == 2:
            break
    running.close()
    found = json.loads((started.directory / "run.json").read_text())
    assert found["stopped"] == "Cancelled after step 2 of 50."
    assert (started.directory / "with.glb").exists() and not (started.directory / "without.glb").exists()


def test_same_seed_same_pictures(config: RunConfig, tmp_path: Path):
    first, again = (
        list(generate(replace(config, arms="with", steps=2), tmp_path))[-1].images["with"] for _ in range(2)
    )
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(again)))


def test_a_prior_of_single_pictures_is_refused():
    with pytest.raises(RequestError, match="'toybox/sd' draws single pictures: for mode 3d choose toybox/mvdream"):
        check_request(RunConfig(prompt="x", mode="3d"))
