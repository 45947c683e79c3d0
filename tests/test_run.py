"""generate, end to end on the embedded models: events, files, cancelling, budgets, reproducibility."""

from __future__ import annotations

import errno
import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from psd import RunConfig, generate, record
from psd.config import MAX_SEED
from psd.errors import Abandoned, RequestError
from psd.events import Finished, Preview, Started, Step
from psd.export import PNG_KEY
from psd.models.priors import load_prior
from psd.models.rewards import load_reward
from psd.modes import image
from psd.ui.parts import picture_grid

CONFIG = RunConfig.from_preset(
    prompt="a red mushroom with a white stem", steps=6, seed=3, pref_interval=1, negative_interval=1
)


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
    names = ["everything.zip", "metrics.csv", "run.json", "with.png", "with_negative.safetensors", "with_pairs.webp"]
    names.append("without.png")
    assert sorted(path.name for path in last.directory.iterdir()) == names
    found = record.read(last.directory)
    assert found.arms == last.arms and sorted(path.name for path in found.files) == names
    assert [row["step"] for row in found.rows] == list(range(1, 7))
    assert RunConfig.from_dict(found.settings) == CONFIG
    assert (found.state, found.stopped, found.failed, found.remarks, found.steps_done) == ("done", "", False, (), 6)


def test_the_settings_travel_in_the_picture(events: list):
    last: Finished = events[-1]
    for arm in ("with", "without"):
        with Image.open(last.arms[arm].picture) as image:
            settings = json.loads(image.text[PNG_KEY])
        assert settings["arm"] == arm
        assert RunConfig.from_dict(settings) == CONFIG


def test_scores_hold_the_target_and_the_held_out_judge(events: list):
    for arm in events[-1].arms.values():
        assert set(arm.scores) == {"toybox/preference", "toybox/judge"}
        assert all(np.isfinite(value) for value in arm.scores.values())


def picture(last: Finished, arm: str = "with") -> np.ndarray:
    return pixels(last.arms[arm].picture)


def test_same_seed_same_bits(events: list, tmp_path: Path):
    again = run(CONFIG, tmp_path)
    for name, arm in events[-1].arms.items():
        assert np.array_equal(pixels(arm.picture), picture(again, name))
        assert arm.scores == again.arms[name].scores
    other = run(replace(CONFIG, seed=4), tmp_path)
    assert not np.array_equal(picture(other), picture(again))


def test_offload_changes_no_bit_on_a_cpu(events: list, tmp_path: Path):
    again = run(replace(CONFIG, offload=True), tmp_path)
    for name, arm in events[-1].arms.items():
        assert np.array_equal(pixels(arm.picture), picture(again, name))
        assert arm.scores == again.arms[name].scores


def test_an_arm_does_not_depend_on_which_others_run_beside_it(events: list, tmp_path: Path):
    """To the last bit of its latents, on a CPU: also its place among them does not matter."""
    many = run(replace(CONFIG, arms="without, selection, paper-form, negative-only, no-negative, with"), tmp_path)
    assert list(many.arms) == ["without", "selection", "paper-form", "negative-only", "no-negative", "with"]
    for name, arm in events[-1].arms.items():
        assert np.array_equal(pixels(arm.picture), picture(many, name))
    assert len({arm.picture.read_bytes() for arm in many.arms.values()}) == 6
    rewards = [row for row in record.read(many.directory).rows[-1] if row.startswith("reward_") and "-" not in row]
    assert {"reward_with", "reward_without", "reward_selection"} <= set(rewards)


def test_several_pictures_are_those_of_as_many_seeds_and_each_restores_its_own(tmp_path: Path):
    config = replace(CONFIG, images=3, seed=MAX_SEED - 1, negative_lr=0.0)  # Adam would enlarge last bits
    events = list(generate(config, tmp_path))
    kinds, arm = ("picture", "picture_2", "picture_3"), events[-1].arms["with"]
    assert list(arm.files) == [*kinds, "pairs"]
    assert {event.image.shape for event in events if isinstance(event, Preview)} == {(3 * 128, 256, 3)}
    alone = [RunConfig.from_dict(record.settings_of(arm.files[kind])) for kind in kinds]
    assert [(one.seed, one.images) for one in alone] == [(MAX_SEED - 1, 1), (MAX_SEED, 1), (0, 1)]
    for one, kind in zip(alone, kinds):  # rows of a batch are those of single runs but for their last bits
        own, others = pixels(arm.files[kind]).astype(int), pixels(arm.files[kinds[kinds.index(kind) - 1]])
        assert np.abs(own - picture(run(one, tmp_path))).mean() < 0.5 < np.abs(own - others).mean()
    grid = picture_grid(events[-1].arms, 5)
    assert grid.count("<img") == 6 and "with preference, seed 7" in grid


def test_preference_switched_off_reproduces_the_plain_arm(events: list, tmp_path: Path):
    off = run(replace(CONFIG, method="sds"), tmp_path)
    assert off.arms["with"].scores == off.arms["without"].scores
    for last, arm in ((off, "with"), (off, "without"), (events[-1], "without")):
        assert np.array_equal(picture(last, arm), picture(run(replace(CONFIG, arms="without"), tmp_path), "without"))


def test_forward_passes_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """(y, n) x a pair for the arm with preference, x one noise for the other; one row with gradient per update of n."""
    unet = load_prior("toybox/sd", "cpu").unet
    rows: dict[bool, list[int]] = {True: [], False: []}
    handle = unet.register_forward_pre_hook(lambda _, args: rows[torch.is_grad_enabled()].append(len(args[0])))
    try:
        run(CONFIG, tmp_path)
    finally:
        handle.remove()
    assert rows[False] == [2] + [4, 2] * 5
    assert rows[True] == [1] * 5


class Broken(Exception):
    """Some defect of ours."""


WAYS_OUT = {
    "an error in a step": (Broken("x"), "Failed after step 3 of 40: Broken.", True),
    "Ctrl-C": (KeyboardInterrupt(), "Interrupted after step 3 of 40.", False),
    "SIGTERM": (SystemExit(143), "Interrupted after step 3 of 40.", False),
    "no memory left": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        "Out of memory after step 3 of 40: choose fewer arms, a smaller image or render size, or a smaller grid.",
        True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS_OUT)
def test_every_way_out_writes_what_there_is(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    error, stopped, failed = WAYS_OUT[way]
    prior = load_prior("toybox/sd", "cpu")
    predict, steps = prior.eps, []

    def eps(x_t, t, *rest):
        steps.append(t)
        if len(set(steps)) == 4:
            raise error
        return predict(x_t, t, *rest)

    monkeypatch.setattr(prior, "eps", eps)
    with pytest.raises(type(error)):
        run(replace(CONFIG, steps=40, negative_lr=0.0), tmp_path)
    (directory,) = tmp_path.iterdir()
    found = record.read(directory)
    assert (found.state, found.stopped, found.failed, found.steps_done) == ("done", stopped, failed, 3)
    assert set(found.arms) == {"with", "without"} and len(found.rows) == 3
    assert all(pixels(arm.picture).std() > 1 for arm in found.arms.values())


def test_what_a_failed_step_held_is_freed_although_its_error_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    held: list[weakref.ref] = []

    def eps(x_t, t, *rest):
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(load_prior("toybox/sd", "cpu"), "eps", eps)
    with pytest.raises(RuntimeError) as kept:
        run(CONFIG, tmp_path)
    assert kept.value.__traceback__ is not None and [reference() for reference in held] == [None]


@pytest.mark.parametrize("name", ["run.json", "bomb.png", "other.glb"])
def test_files_that_carry_no_settings_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A picture that would unfold into gigabytes among them: its pixels are never read."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    if name.endswith(".png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    else:
        (tmp_path / name).write_text("{}")
    with pytest.raises(RequestError, match="carries no settings"):
        record.settings_of(tmp_path / name)


def test_closing_keeps_the_last_state(tmp_path: Path):
    events = generate(replace(CONFIG, steps=40), tmp_path)
    for event in events:
        if isinstance(event, Step) and event.step == 3:
            break
    events.close()
    (directory,) = tmp_path.iterdir()
    found = record.read(directory)
    assert (found.state, found.stopped) == ("done", "Cancelled after step 3 of 40.")
    names = ["with.png", "with_negative.safetensors", "with_pairs.webp", "without.png", "metrics.csv", "run.json"]
    assert [path.name for path in found.files] == [*names, "everything.zip"]


def test_a_run_that_nobody_hears_writes_its_numbers_alone(tmp_path: Path):
    events = generate(replace(CONFIG, steps=40), tmp_path)
    for event in events:
        if isinstance(event, Step) and event.step == 3:
            break
    with pytest.raises(Abandoned):
        events.throw(Abandoned())
    (directory,) = tmp_path.iterdir()
    found = record.read(directory)
    assert (found.state, found.stopped, found.steps_done) == ("abandoned", "Cancelled after step 3 of 40.", 3)
    assert sorted(path.name for path in directory.iterdir()) == ["metrics.csv", "run.json"]


@pytest.mark.parametrize(
    ("asked", "files"), [(3, []), (7, []), (8, ["with.png"]), (9, ["with.png", "with_negative.safetensors"])]
)
def test_nobody_is_asked_for_after_each_step_and_before_each_file(asked: int, files: list[str], tmp_path: Path):
    """Six steps, picture and n of the first arm, the other's picture; nobody hears from the `asked`-th question on."""
    heard = iter([True] * (asked - 1) + [False])
    with pytest.raises(Abandoned):
        list(generate(CONFIG, tmp_path, heard=lambda: next(heard)))
    (directory,) = tmp_path.iterdir()
    found = record.read(directory)
    assert found.state == "abandoned" and found.steps_done == min(asked, 6)
    assert sorted(path.name for path in directory.iterdir()) == sorted(["metrics.csv", "run.json", *files])


def test_an_artefact_that_fails_is_a_remark_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    export = image.export_png

    def full(path: Path, *args) -> None:
        if path.name == "with.png":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        export(path, *args)

    monkeypatch.setattr(image, "export_png", full)
    last = run(CONFIG, tmp_path)
    assert last.remarks == ("with.png could not be made: no space left on device.",)
    assert last.arms["with"].picture is None and last.arms["without"].picture.exists()
    assert record.read(last.directory).remarks == last.remarks


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=r"^The results cannot be written: not a directory; free space or choose"):
        run(CONFIG, tmp_path / "file" / "below")


def test_scores_that_are_no_numbers_are_null_in_standard_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    judge = load_reward("toybox/judge")
    monkeypatch.setattr(type(judge), "score", lambda self, pixels, *rest: torch.full((len(pixels),), float("nan")))
    last = run(replace(CONFIG, steps=2), tmp_path)
    text = (last.directory / "run.json").read_text()
    assert "NaN" not in text and json.loads(text)["arms"]["with"]["scores"]["toybox/judge"] is None
    assert np.isnan(record.read(last.directory).arms["with"].scores["toybox/judge"])


class Hands:
    """A clock that only moves when a step is taken."""

    def __init__(self, step_s: float):
        self.now, self.step_s = 0.0, step_s

    def monotonic(self) -> float:
        return self.now

    def stop(self) -> str:
        """As `generate` asks after each step."""
        self.now += self.step_s
        return ""


@pytest.mark.parametrize(
    ("own", "deadline", "named"), [(4.0, None, "4"), (0.0, 4.0, "4"), (9.0, 4.0, "4"), (4.0, 9.0, "4")]
)
def test_budget_and_deadline_leave_a_tenth_for_the_files(own, deadline, named, tmp_path: Path, monkeypatch):
    """A second a step: 3.6 s are over after the fourth."""
    hands = Hands(1.0)
    monkeypatch.setattr("psd.run.time", hands)
    config = replace(CONFIG, steps=400, time_budget_s=own)
    *_, last = generate(config, tmp_path, deadline_s=deadline, stop=hands.stop)
    assert last.steps_done == 5 and not last.failed
    assert last.stopped == f"The time budget of {named} s was nearly used: stopped after step 5 of 400."
    assert last.config == config and last.arms["with"].picture.exists()


def test_whoever_asks_to_stop_gets_everything(tmp_path: Path):
    asked = iter(["", "", "Stopped by you."])
    *_, last = generate(replace(CONFIG, steps=40), tmp_path, stop=lambda: next(asked))
    assert (last.steps_done, last.stopped, last.failed) == (3, "Stopped by you.", False)
    assert record.read(last.directory).arms == last.arms


def test_numbers_that_overflow_are_named_and_the_last_good_state_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prior = load_prior("toybox/sd", "cpu")
    predict, steps = prior.eps, []

    def eps(x_t, t, *rest):
        steps.append(t)
        return predict(x_t, t, *rest) * (float("inf") if len(set(steps)) > 6 else 1.0)

    monkeypatch.setattr(prior, "eps", eps)
    last = run(replace(CONFIG, negative_lr=0.0, steps=30), tmp_path)
    assert last.steps_done == 6 and last.failed
    assert last.stopped == "Stopped at step 7: numbers overflowed; lower gamma, pref_weight or lr."
    assert np.isfinite(list(last.arms["with"].scores.values())).all()


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
    assert pixels(last.arms["with"].picture).shape == (size, size, 3)
