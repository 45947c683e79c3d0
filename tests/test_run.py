"""generate, end to end on the embedded models: events, files, cancelling, budgets, reproducibility."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from psd import RunConfig, generate
from psd.errors import RequestError
from psd.events import Finished, Preview, Started, Step
from psd.export import PNG_KEY
from psd.models.priors import load_prior

CONFIG = RunConfig.from_preset(prompt="a red mushroom with a white stem", steps=6, seed=3)


def run(config: RunConfig, root: Path) -> Finished:
    *_, last = generate(config, root)
    assert isinstance(last, Finished)
    return last


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list:
    return list(generate(CONFIG, tmp_path_factory.mktemp("run")))


def test_events_come_in_order(events: list):
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    assert events[0].arms == ("with", "without")
    assert events[0].warnings == ()
    steps = [event for event in events if isinstance(event, Step)]
    assert [step.step for step in steps] == list(range(1, 7))
    assert isinstance(events[2], Preview)  # the first picture is there after the first step
    previews = [event for event in events if isinstance(event, Preview)]
    assert all(preview.image.shape == (128, 256, 3) and preview.image.dtype == np.uint8 for preview in previews)
    assert previews[-1].step == 6


def test_metrics(events: list):
    rows = [event.metrics for event in events if isinstance(event, Step)]
    assert rows[0]["reward_with"] == rows[0]["reward_without"]  # both arms start from the same x_c
    for row in rows[1:]:
        assert {"t", "delta_gen", "delta_cls", "delta_pref", "beta_r", "reward_gap", "negative_drift"} <= set(row)
        assert all(np.isfinite(value) for value in row.values())
    assert rows[-1]["negative_drift"] > 0
    assert rows[-1]["reward_with"] != rows[-1]["reward_without"]


def test_files(events: list):
    last: Finished = events[-1]
    assert set(last.files) == {"with.png", "without.png", "metrics.csv", "run.json"}
    assert sorted(path.name for path in last.directory.iterdir()) == sorted(last.files)
    with open(last.files["metrics.csv"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 7))
    about = json.loads(last.files["run.json"].read_text())
    assert RunConfig.from_dict(about["config"]) == CONFIG
    assert about["scores"] == last.scores
    assert about["stopped"] == ""


def test_the_settings_travel_in_the_picture(events: list):
    last: Finished = events[-1]
    for arm in ("with", "without"):
        with Image.open(last.images[arm]) as image:
            settings = json.loads(image.text[PNG_KEY])
        assert settings["arm"] == arm
        assert RunConfig.from_dict(settings) == CONFIG


def test_scores_hold_the_target_and_the_held_out_judge(events: list):
    for scores in events[-1].scores.values():
        assert set(scores) == {"toybox/preference", "toybox/judge"}
        assert all(np.isfinite(value) for value in scores.values())


def test_same_seed_same_bits(events: list, tmp_path: Path):
    again = run(CONFIG, tmp_path)
    for arm, path in events[-1].images.items():
        assert np.array_equal(pixels(path), pixels(again.images[arm]))
    assert again.scores == events[-1].scores
    other = run(replace(CONFIG, seed=4), tmp_path)
    assert not np.array_equal(pixels(other.images["with"]), pixels(again.images["with"]))


def test_preference_switched_off_reproduces_the_plain_arm(events: list, tmp_path: Path):
    off = run(replace(CONFIG, method="sds"), tmp_path)
    assert np.array_equal(pixels(off.images["with"]), pixels(off.images["without"]))
    assert off.scores["with"] == off.scores["without"]
    alone = run(replace(CONFIG, method="sds", arms="with"), tmp_path)
    assert set(alone.images) == {"with"}
    # In a batch of another size the same sums are rounded in another order: one grey level at most.
    for other in (events[-1].images["without"], alone.images["with"]):
        assert np.abs(pixels(other).astype(int) - pixels(off.images["with"])).max() <= 1


def test_forward_passes_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One batched UNet forward a step for all conditions, noises and arms; one with gradient per update of n."""
    unet = load_prior("toybox/sd", "cpu").unet
    rows: dict[bool, list[int]] = {True: [], False: []}
    handle = unet.register_forward_pre_hook(lambda _, args: rows[torch.is_grad_enabled()].append(len(args[0])))
    try:
        run(CONFIG, tmp_path)
    finally:
        handle.remove()
    assert rows[False] == [2, 6, 6, 6, 6, 6]
    assert rows[True] == [1] * 5


def test_cancelling_keeps_the_last_state(tmp_path: Path):
    events = generate(replace(CONFIG, steps=40), tmp_path)
    for event in events:
        if isinstance(event, Step) and event.step == 3:
            break
    events.close()
    (directory,) = tmp_path.iterdir()
    assert sorted(path.name for path in directory.iterdir()) == ["metrics.csv", "run.json", "with.png", "without.png"]
    about = json.loads((directory / "run.json").read_text())
    assert about["stopped"] == "Cancelled after step 3 of 40."
    assert pixels(directory / "with.png").std() > 1


def test_the_time_budget_is_kept(tmp_path: Path):
    last = run(replace(CONFIG, steps=400, time_budget_s=4.0), tmp_path)
    assert 1 <= last.steps_done < 400
    assert last.seconds < 8.0
    assert last.stopped == f"The time budget of 4 s was nearly used: stopped after step {last.steps_done} of 400."
    assert last.images["with"].exists()


def test_numbers_that_overflow_are_named_and_the_last_good_state_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prior = load_prior("toybox/sd", "cpu")
    predict, calls = prior.eps, []

    def eps(*args):
        calls.append(args)
        return predict(*args) * (float("inf") if len(calls) > 6 else 1.0)

    monkeypatch.setattr(prior, "eps", eps)
    last = run(replace(CONFIG, negative_lr=0.0, steps=30), tmp_path)
    assert last.steps_done == 6
    assert last.stopped == "Stopped at step 7: numbers overflowed; lower gamma, pref_weight or lr."
    assert np.isfinite(list(last.scores["with"].values())).all()


def test_unknown_words_are_named_before_the_run(tmp_path: Path):
    events = generate(replace(CONFIG, prompt="a red mushrom with a white stem"), tmp_path)
    started = next(events)
    events.close()
    assert started.warnings == (
        "toybox/sd was never trained on the word 'mushrom' of the prompt; near to it: mushroom.",
    )


def test_a_long_prompt_is_said_to_be_cut(tmp_path: Path):
    events = generate(replace(CONFIG, prompt="a red mushroom with a white stem and " * 8), tmp_path)
    started = next(events)
    events.close()
    assert started.warnings == ("The prompt is cut after the 32 tokens that toybox/sd reads.",)


def test_a_bad_request_costs_nothing(tmp_path: Path):
    with pytest.raises(RequestError, match="gamma"):
        next(generate(replace(CONFIG, gamma=float("nan")), tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [64, 192])
def test_other_image_sizes(size: int, tmp_path: Path):
    last = run(replace(CONFIG, image_size=size, steps=2), tmp_path)
    assert pixels(last.images["with"]).shape == (size, size, 3)
