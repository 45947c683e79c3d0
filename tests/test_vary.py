"""One number varies: an arm for each of its values, under one name everywhere, with the bits of a run alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from psd import RunConfig, generate, record
from psd.config import FIELDS, VARY_EXAMPLE, arms_of
from psd.errors import RequestError
from psd.safety import check_request
from psd.ui import estimate, form, parts, show
from tests.gaussian import OTHER

CONFIG = RunConfig.from_preset(
    "toybox-quick", prompt="a red mushroom with a white stem", seed=3, steps=4, pref_interval=1, negative_interval=1
)
LOW, HIGH = "negative_lr=1e-05", "negative_lr=0.04"


def test_every_value_is_an_arm_after_the_named_ones_in_the_order_given():
    config = replace(CONFIG, arms="without, with", vary="negative_lr: 4e-2 ,1e-5,")
    assert list(arms_of(config)) == ["without", "with", HIGH, LOW]
    assert arms_of(config)[LOW] == replace(config, negative_lr=1e-5)
    assert arms_of(config)["with"] == config
    whole = arms_of(replace(config, arms="", vary="pref_interval: 2, 3"))
    assert {name: arm.pref_interval for name, arm in whole.items()} == {"pref_interval=2": 2, "pref_interval=3": 3}


@pytest.mark.parametrize(
    ("vary", "sentence"),
    [
        ("1e-3, 1e-2", "vary '1e-3, 1e-2' is not known; known: gamma, "),
        ("gama: 2, 3", "vary 'gama' is not known; did you mean gamma?"),
        ("pair: ddim", "vary cannot take pair, which is no number: choose one of gamma, "),
        ("fast_decoder: 1", "vary cannot take fast_decoder, which is no number"),
        ("steps: 10, 20", "vary cannot take steps, of which no arm has its own in mode image"),
        ("seed: 1, 2", "vary cannot take seed, of which no arm has its own in mode image"),
        ("lambda_rgb: 0, 1", "vary cannot take lambda_rgb, of which no arm has its own in mode image"),
        ("gamma:", f"vary gives gamma no values: write for example {VARY_EXAMPLE!r}."),
        ("gamma: 2, x", "vary needs each gamma to be a number from 0 to 200, got 'x'."),
        ("gamma: nan", "vary needs each gamma to be a number from 0 to 200, got 'nan'."),
        ("gamma: 2, 201", "vary needs each gamma to be a number from 0 to 200, got '201'."),
        ("pref_interval: 1.5", "vary needs each pref_interval to be a whole number from 1 to 1000, got '1.5'."),
        ("gamma: 2, 2.0", "vary gives gamma=2 twice: give it once."),
        ("gamma: 1, 2, 3, 4, 5", "vary makes it 7 arms, at most 6 are allowed: give fewer values, or compare fewer"),
    ],
)
def test_what_cannot_vary_is_refused_in_a_sentence(vary: str, sentence: str):
    with pytest.raises(RequestError) as refusal:
        check_request(replace(CONFIG, vary=vary))
    text = str(refusal.value)
    assert text.startswith(sentence) and text.endswith(".") and len(text) < 400
    assert refusal.value.field == "vary"


@pytest.mark.parametrize("name", OTHER)
def test_every_number_that_may_vary_is_allowed_in_its_mode_and_tried_by_a_test(name: str):
    assert {each.name for each in FIELDS.values() if each.varies} == OTHER.keys()
    preset = "toybox-fast" if FIELDS[name].varies == "3d" else "toybox-quick"
    check_request(RunConfig.from_preset(preset, prompt="a lamp", vary=f"{name}: {OTHER[name]}"))


def test_the_rules_between_settings_hold_for_every_arm():
    config = RunConfig.from_preset("toybox-fast", prompt="a lamp", weighting="one", lambda_rgb=0.0)
    check_request(config)
    with pytest.raises(RequestError, match=r"^lambda_rgb compares renders"):
        check_request(replace(config, vary="lambda_rgb: 0, 0.3"))


def test_arms_may_be_empty_where_a_number_varies():
    check_request(replace(CONFIG, arms="", vary="gamma: 2"))
    with pytest.raises(RequestError, match=r"^arms is empty"):
        check_request(replace(CONFIG, arms="", vary=" "))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> record.Result:
    """Of two values alone."""
    *_, last = generate(replace(CONFIG, arms="", vary="negative_lr: 1e-5, 4e-2"), tmp_path_factory.mktemp("row"))
    return record.read(last.directory)


def test_a_run_names_its_arms_alike_in_files_scores_and_columns(result: record.Result):
    assert list(result.arms) == [LOW, HIGH] and result.remarks == ()
    kinds = {"picture": ".png", "negative": "_negative.safetensors", "pairs": "_pairs.webp"}
    for name, arm in result.arms.items():
        assert {kind: path.name for kind, path in arm.files.items()} == {k: name + end for k, end in kinds.items()}
        assert set(arm.scores) == {"toybox/preference", "toybox/judge"}
    assert {f"reward_{LOW}", f"reward_{HIGH}", "delta_pref", f"delta_pref_{HIGH}"} <= result.rows[-1].keys()
    for (name, arm), rate in zip(result.arms.items(), (1e-5, 4e-2), strict=True):
        with safe_open(arm.files["negative"], "np") as file:
            about = json.loads(file.metadata()["psd"])
        assert (about["arm"], about["negative_lr"]) == (name, rate)


def test_every_arm_has_the_bits_of_a_run_alone_and_restores_the_row(result: record.Result, tmp_path: Path):
    *_, alone = generate(replace(CONFIG, arms="with", negative_lr=4e-2), tmp_path)
    picture = result.arms[HIGH].files["picture"]
    assert record.settings_of(picture)["vary"] == "negative_lr: 1e-5, 4e-2"
    with Image.open(picture) as own, Image.open(alone.arms["with"].picture) as other:
        assert own.tobytes() == other.tobytes()
    assert alone.arms["with"].scores == result.arms[HIGH].scores != result.arms[LOW].scores


def test_the_page_shows_a_row_with_scores_in_the_order_of_the_values(result: record.Result):
    page = dict(zip(show.OUTPUTS, show.show_end(result), strict=True))
    row = page["gallery"]
    assert row.count("<figure>") == 2 and row.index(f"></i>{LOW}<") < row.index(f"></i>{HIGH}<")
    for arm in result.arms.values():
        assert all(f"<b>{parts.score(value)}</b> {reward}<" in row for reward, value in arm.scores.items())
    assert page["slider"]["label"] == f"{LOW} (left) | {HIGH} (right)"
    for html in (page["scores"], page["charts"], page["files"], page["strips"], row):
        assert html.index("s-vary-1") < html.index("s-vary-2")
    assert f"What the reward saw, {HIGH}" in page["files"]


def test_the_form_keeps_what_varies_and_a_link_carries_it():
    config = replace(CONFIG, arms="", vary="gamma: 2, 7.5")
    assert form.checked(form.named(form.fill(config.to_dict()))) == config
    assert form.fill_preset("toybox-image")[form.NAMES.index("vary")]["__type__"] == "update"  # as it is
    link = {name: str(value) for name, value in config.to_dict().items()}
    assert form.settings_of_query(link) == config.to_dict()


def test_a_row_costs_what_its_arms_cost(monkeypatch: pytest.MonkeyPatch):
    """Each by its own settings; the form says of how many arms the estimate is."""
    row = replace(CONFIG, arms="", vary="pref_interval: 1, 2")
    alone = [estimate.work_of(replace(CONFIG, arms="with", pref_interval=interval)) for interval in (1, 2)]
    assert estimate.work_of(row) == pytest.approx(sum(alone)) and alone[0] > alone[1]
    assert estimate.export_work(row) == 2 * estimate.export_work(replace(CONFIG, arms="with"))
    assert "2 arms" in parts.estimate(row, 1.0)
    config = RunConfig.from_preset("toybox-fast", prompt="a lamp", vary="gamma: 2, 3, 4", render_size=160)
    monkeypatch.setattr(estimate, "free_gb", lambda: estimate.memory_gb(config, 3))
    with pytest.raises(RequestError, match="compare 3 of the 5 arms"):
        estimate.check_memory(config)
