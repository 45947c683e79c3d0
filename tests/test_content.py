"""What strangers may not have drawn: words of a prompt, and pictures by a small checker of the published format."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from psd import RunConfig, content, generate, record
from psd.errors import RequestError, Withheld
from psd.events import Finished, Preview, Started, Step
from psd.export import to_uint8
from psd.models import checker as checkers
from psd.models.checker import CHECKER, SafetyChecker, load_checker
from psd.models.hub import STRANGER
from psd.models.priors import load_prior
from psd.models.priors.table import PRIORS
from psd.models.rewards.preprocess import CLIP_MEAN, CLIP_STD
from psd.safety import check_request
from tests import local_hub
from tests.local_hub import LocalHub
from tests.published import MVDREAM, SD15, TYPED, publish, safety_checker

ROOT = Path(__file__).resolve().parents[1]
SENTENCE = (
    "A picture of this run was flagged by the safety checker, so the run ended without results: change the prompt or "
    "the seed."
)
TOYBOX = RunConfig.from_preset(prompt="a red mushroom with a white stem", steps=4, pref_interval=1, negative_interval=1)


def asked(prompt: str, prior: str = SD15, **settings: str) -> RunConfig:
    return RunConfig.from_preset("sd15-paper", prompt=prompt, prior=prior, **settings)


# Words


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a nude on a beach", "nudity or sex"),
        ("A NUDE, on a beach", "nudity or sex"),
        ("a n\u00fcd\u00e9 statue", "nudity or sex"),
        ("\uff4e\uff55\uff44\uff45", "nudity or sex"),  # full width
        ("a nu\u00adde", "nudity or sex"),  # a soft hyphen
        ("a n4k3d man", "nudity or sex"),
        ("p\u00f8rn, p0rn", "nudity or sex"),
        ("rule 34", "nudity or sex"),
        ("a self-harm scene", "suicide or self harm"),
        ("snuff\n film", "cruelty or gore"),
        ("nude preteen", "a sexualised child"),  # the gravest first
        ("Ku Klux  Klan", "hatred of people"),
    ],
)
def test_a_prompt_is_refused_with_its_reason_and_without_its_words(prompt: str, reason: str):
    with pytest.raises(RequestError) as refusal:
        check_request(asked(prompt))
    expected = f"prompt asks for {reason}, which this server does not draw for visitors: describe something else."
    assert (str(refusal.value), refusal.value.field) == (expected, "prompt")


@pytest.mark.parametrize(
    "prompt",
    [
        "a bunch of grapes in Essex", "a cockerel and a peacock", "Scunthorpe, a sextant, a sexton",
        "an analyst with a Porsche", "34 rules", "a gorgeous torturous road", "a nudge, an assassin, a snuffbox",
        "a therapist drapes a curtain", "4 boats, 1 sail",
    ],
)  # fmt: skip
def test_only_whole_words_are_judged(prompt: str):
    check_request(asked(prompt))


def test_every_prompt_that_this_repository_shows_passes():
    content.check_prompt((ROOT / "examples" / "prompts.json").read_text())


def test_each_entry_has_one_reason_and_is_found_by_itself():
    entries = [" ".join(entry.split()) for entries in content.WORDS.values() for entry in entries.split(",")]
    assert len(entries) == len(set(entries)) == len(content.ENTRIES)
    for entry in entries:
        with pytest.raises(RequestError) as refusal:
            content.check_prompt(f"a {entry.title()}!")
        assert entry not in str(refusal.value).replace(content.ENTRIES[entry], "")


def test_who_is_judged(monkeypatch: pytest.MonkeyPatch):
    published = [name for name, info in PRIORS.items() if info.download_mb]
    assert all(content.is_judged(name, owner=False) for name in [*published, TYPED]) and len(published) == 3
    assert not any(content.is_judged(name, owner=True) for name in PRIORS)
    assert not any(content.is_judged(name, owner=False) for name in PRIORS if name.startswith("toybox/"))
    bad = "a nude on a beach"
    check_request(asked(bad), allow_local=True)
    check_request(RunConfig.from_preset("toybox-image", prompt=bad))
    check_request(asked("a beach", negative_prompt=bad))
    for value in ("off", " OFF"):
        monkeypatch.setenv(content.SWITCH, value)
        check_request(asked(bad))
    for value in ("on", "of", ""):  # a slip of the owner's does not open it
        monkeypatch.setenv(content.SWITCH, value)
        with pytest.raises(RequestError, match="asks for nudity"):
            check_request(asked(bad))


# Pictures


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a checker that flags nothing, in a hub's cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    checkers._loaded.clear()
    folder = tmp_path / "hub" / f"models--{CHECKER.name.replace('/', '--')}" / "snapshots" / CHECKER.revision
    safety_checker(folder, threshold=2.0)
    yield folder
    checkers._loaded.clear()


def cosines(images: torch.Tensor, found: SafetyChecker) -> torch.Tensor:
    """[B, 17], through PIL as the published preprocessing goes."""
    wide = [Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC) for image in to_uint8(images)]
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in wide]).permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    embedded = found.model.visual_projection(found.model.vision_model(pixels).pooler_output)
    return torch.cosine_similarity(embedded[:, None], found.model.concept_embeds[None], -1)


def test_a_picture_is_flagged_where_one_concept_is_above_its_threshold(cache: Path):
    found = load_checker()
    assert found is load_checker()  # once per process
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(40, 3, 1, 1, generator=draw) * torch.rand(40, 3, 96, 96, generator=draw).pow(2)
    before = images.clone()
    assert found.flags(images) == [False] * 40
    known = cosines(images, found)
    concept = int(known.std(0).argmax())
    threshold = known[:, concept].quantile(0.7)
    expected = known[:, concept] - threshold
    found.model.concept_embeds_weights[concept] = threshold
    flagged = torch.tensor(found.flags(images))
    clear = expected.abs() > 0.002  # the checker rounds to 0.001, and PIL to grey levels
    assert clear.sum() > 30 and 5 < flagged.sum() < 20
    assert torch.equal(flagged[clear], expected[clear] > 0)
    with pytest.raises(Withheld) as refusal:
        found.check(images)
    assert str(refusal.value) == SENTENCE
    found.check(images[~flagged])
    assert torch.equal(images, before)  # nothing is blackened
    assert found.flags(torch.full((1, 3, 8, 8), torch.nan)) == found.flags(torch.zeros(1, 3, 8, 8))


def test_without_its_weights_there_is_no_checker_and_damaged_ones_are_named(cache: Path):
    whole = (cache / "pytorch_model.bin").read_bytes()
    (cache / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match=f"^A file of '{CHECKER.name}' is damaged: restore"):
        load_checker()
    (cache / "pytorch_model.bin").unlink()
    assert load_checker() is None


@pytest.fixture
def looked_at(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Toybox runs are judged: how many pictures each look at them was given."""
    monkeypatch.setattr(content, "PRIORS", {})
    flags, looks = SafetyChecker.flags, []

    def spied(self: SafetyChecker, images: torch.Tensor) -> list[bool]:
        looks.append(len(images))
        return flags(self, images)

    monkeypatch.setattr(SafetyChecker, "flags", spied)
    return looks


def follow(root: Path, **options) -> tuple[list, record.Result, str]:
    """(Events of a stranger's run, its folder, the sentence that ended it)."""
    events, sentence = [], ""
    try:
        for event in generate(TOYBOX, root, access=STRANGER, **options):
            events.append(event)
    except RequestError as error:
        sentence = str(error)
    return events, record.read(events[0].directory), sentence


def test_all_that_is_shown_and_written_is_looked_at(looked_at: list[int], tmp_path: Path):
    events, result, sentence = follow(tmp_path / "runs")
    assert sentence == "" and isinstance(events[-1], Finished) and events[0].warnings == ()
    previews = sum(isinstance(event, Preview) for event in events)
    pairs = len(result.arms["with"].remarks["pairs"]["steps"])
    assert previews >= 2 and pairs >= 2
    # Both arms' preview; then an arm's picture and what its pairs were, better and worse.
    assert looked_at == [2] * previews + [1] + [2] * pairs + [1]


def numbers_alone(result: record.Result, stopped: str) -> bool:
    files = sorted(path.name for path in result.directory.iterdir())
    return (result.state, result.stopped, files) == ("abandoned", stopped, ["metrics.csv", "run.json"])


def test_a_flagged_preview_is_not_shown_and_ends_the_run_in_one_sentence(looked_at: list[int], tmp_path: Path):
    load_checker().model.concept_embeds_weights.fill_(-1.0)
    events, result, sentence = follow(tmp_path / "runs")
    assert [type(event) for event in events] == [Started, Step] and sentence == SENTENCE
    assert numbers_alone(result, SENTENCE) and not result.failed and len(result.rows) == 1


@pytest.mark.parametrize("question", [5, 6])
def test_a_flagged_result_of_any_arm_leaves_the_numbers_alone(question: int, looked_at: list[int], tmp_path: Path):
    """Whoever listens is asked after each of four steps and before each arm's results."""
    questions = iter(range(1, 100))

    def heard() -> bool:
        if next(questions) == question:
            load_checker().model.concept_embeds_weights.fill_(-1.0)
        return True

    events, result, sentence = follow(tmp_path / "runs", heard=heard)
    assert sum(isinstance(event, Step) for event in events) == 4 and sentence == SENTENCE
    assert numbers_alone(result, SENTENCE)


def test_a_run_that_breaks_down_writes_no_picture_that_nothing_has_looked_at(
    looked_at: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prior = load_prior("toybox/sd", "cpu")
    predict, steps = prior.eps, []

    def eps(x_t, t, *rest):
        steps.append(t)
        if len(set(steps)) == 4:
            raise RequestError("No.")
        return predict(x_t, t, *rest)

    monkeypatch.setattr(prior, "eps", eps)
    _, result, sentence = follow(tmp_path / "runs")
    assert sentence == "No." and numbers_alone(result, "Failed after step 3 of 4: No..")


# From a hub, as published


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with local_hub.serve() as hub:
        publish(hub, tmp_path_factory.mktemp("published"))
        yield hub


@pytest.fixture(scope="module")
def runs(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    home = tmp_path_factory.mktemp("hf-home")
    picture = dict(prompt="a red mushroom", steps=2, prior=SD15, reward="hpsv2.1")
    solid = dict(mode="3d", weighting="recon", grid_size=24, render_size=16, samples=12, mesh_faces=2000)
    cases = {
        "without weights": picture | dict(stranger=True),
        "picture": picture | dict(stranger=True, checker=True),
        "object": picture | solid | dict(stranger=True, prior=MVDREAM),
        "switched off": picture | dict(stranger=True, filter="off"),
        "owner": picture,
    }
    command = [sys.executable, "-m", "tests.hub_runs", str(home / "outputs"), *map(json.dumps, cases.values())]
    done = subprocess.run(command, cwd=ROOT, env=hub.environment(home), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "black image" not in done.stderr
    return dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True))


def test_weights_that_are_not_there_are_told_once_and_never_fetched(runs: dict[str, dict], hub: LocalHub):
    unchecked = runs["without weights"]
    assert unchecked["warnings"].count(content.UNCHECKED) == 1 and "with.png" in unchecked["files"]
    assert CHECKER.name not in unchecked["told"]
    assert hub.downloads().count(CHECKER.files[0]) == 1  # once it was asked for


@pytest.mark.parametrize("case", ["picture", "object"])
def test_what_the_published_checker_flags_is_withheld(runs: dict[str, dict], case: str):
    made = runs[case]
    assert (made["withheld"], made["stopped"], made["previews"]) == (SENTENCE, SENTENCE, 0)
    assert made["files"] == ["metrics.csv", "run.json"]


@pytest.mark.parametrize("case", ["switched off", "owner"])
def test_the_owner_and_the_switch_leave_pictures_alone(runs: dict[str, dict], case: str):
    assert "with.png" in runs[case]["files"] and content.UNCHECKED not in runs[case]["warnings"]


def test_the_readme_says_how_the_weights_come_and_how_it_is_switched():
    readme, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "psd/ui/README.md"))
    assert all(word in page for word in (CHECKER.name, CHECKER.revision, *CHECKER.files, content.SWITCH))
    assert content.SWITCH in readme
