"""What the page shows of a run, without a browser: arms by name, how it ended, files by kind, text from outside."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from psd.config import ARMS, FIELDS, RunConfig
from psd.events import ArmResult
from psd.record import Result
from psd.safety import MAX_ARMS
from psd.ui import form, parts, show, theme
from psd.ui.examples import load_examples
from psd.ui.watch import View

TAG = "<img src=//host.invalid/x>"


def result_of(*arms: str, kinds: tuple[str, ...] = ("picture",), **about: Any) -> Result:
    """A run's folder that was never written: arm number i scores i."""
    folder = Path("/runs/one")
    made = {}
    for i, arm in enumerate(arms):
        files = {kind: folder / f"{arm}-{kind}" for kind in kinds}
        made[arm] = ArmResult(files.get("picture"), {"toybox/preference": float(i)}, files, {})
    settings = RunConfig.from_preset(prompt="a lamp", arms=", ".join(arms)).to_dict()
    listed = (folder / "metrics.csv", folder / "run.json")
    return Result(folder, "done", settings, made, files=listed, **{"steps_done": 50, "seconds": 1.0} | about)


def shown(result: Result) -> dict[str, Any]:
    return dict(zip(show.OUTPUTS, show.show_end(result), strict=True))


def visible(update: Any) -> bool:
    return bool(update.get("visible"))


@pytest.mark.parametrize(
    ("arms", "pair"),
    [
        (("with",), ("with",)),
        (("with", "without"), ("with", "without")),
        (("without", "with"), ("without", "with")),
        (("with", "selection", "without", "paper-form"), ("with", "without")),
        (("with", "selection", "paper-form"), ("with", "paper-form")),
    ],
)
def test_the_first_arm_stands_beside_the_baseline_and_any_two_can_be_chosen_from_three_on(arms, pair):
    page = shown(result_of(*arms))
    assert page["looked_at"] == ("/runs/one", *pair)
    assert visible(page["slider"]) == (len(arms) > 1) and visible(page["single"]) == (len(arms) == 1)
    assert visible(page["chooser"]) == (len(arms) > 2) == ("figure" in page["gallery"])
    if len(arms) > 2:
        assert [name for _, name in page["left"]["choices"]] == list(arms)
        assert (page["left"]["value"], page["right"]["value"]) == pair
    if len(arms) > 1:
        assert [Path(path).name for path in page["slider"]["value"]] == [f"{arm}-picture" for arm in pair]


def test_the_page_opens_with_a_finished_pair_of_pictures_and_one_of_objects():
    page = show.opening(load_examples())
    assert len(page["slider"]["value"]) == 2 and all(Path(path).is_file() for path in page["slider"]["value"])
    assert all(Path(page[name]["value"]).suffix == ".mp4" and page[name]["visible"] for name in show.OPENING[1:])
    assert "Press Run" in page["status"]["value"] and "<table" in page["scores"]["value"]
    assert list(show.opening([])) == ["status"]


def test_a_run_without_any_picture_keeps_its_preview_and_says_why():
    page = shown(result_of("with", kinds=(), remarks=("with.png could not be made: no space left.",)))
    assert page["preview"] == gr.skip() and page["looked_at"] == ("/runs/one",)
    assert "no space left" in page["status"]


@pytest.mark.parametrize(
    ("about", "headline"),
    [
        (dict(), "Done"),
        (dict(stopped="Stopped after step 3 of 50.", steps_done=3), "Stopped: the partial result is kept"),
        (dict(stopped="Cancelled after step 0 of 50.", steps_done=0), "Stopped before the first step"),
        (
            dict(stopped="Failed after step 3 of 50.", steps_done=3, failed=True),
            "Broke down: the partial result is kept",
        ),
    ],
)
def test_the_status_says_how_a_run_ended_by_its_manifest(about, headline):
    line = parts.end_status(result_of("with", **about))
    assert f"<b>{headline}</b>" in line and about.get("stopped", "") in line


def test_a_run_that_is_looked_at_already_moves_nothing_at_its_end(monkeypatch: pytest.MonkeyPatch):
    first = result_of("with", "without", kinds=("picture", "glb"))
    rest = result_of("with", "without", kinds=("picture", "glb", "turntable"))
    read = iter([replace(first, state="writing"), rest])
    monkeypatch.setattr(show, "read", lambda directory: next(read))
    running = View(RunConfig(), directory=Path("/runs/one"))
    looked_at = replace(running, shown=True)
    pages = [
        {name: value for name, value in zip(show.OUTPUTS, page, strict=True) if value != gr.skip()}
        for page in show.shows([running, looked_at, looked_at, replace(looked_at, finished=True)])
    ]
    assert pages[1]["looked_at"] == ("/runs/one", "with", "without") and "archives follow" in pages[1]["status"]
    assert pages[2] == {} and set(pages[3]) == {"status", "files"}
    assert "<b>Done</b>" in pages[3]["status"] and "with-turntable" in pages[3]["files"]


def test_scores_have_a_column_an_arm_and_the_change_against_the_baseline():
    result = result_of("with", "without", "no-negative")
    table = parts.score_table({name: arm.scores for name, arm in result.arms.items()}, "toybox/preference")
    assert table.count("<th scope='col'") == 4 and "no negative" in table
    assert "<td>0.000<small class='down'>-1.000</small></td>" in table  # with against without
    assert "<td>1.000</td>" in table and "<td>2.000<small class='up'>+1.000</small></td>" in table
    many = parts.score_table({**{f"gamma={value}": {"toybox/preference": 1.0} for value in range(1, 5)}, "without": {
        "toybox/preference": 3.0}}, "toybox/preference")  # fmt: skip
    assert many.count("<th scope='col'") == 2 and many.count("<th scope='row'") == 5
    assert many.count("<td>1.000<small class='down'>-2.000</small></td>") == 4 and "<td>3.000</td>" in many
    alone = parts.score_table({"with": {"toybox/preference": 1.0}}, "toybox/preference")
    assert "change" not in alone and "<small" not in alone


def test_charts_and_scores_have_their_frames_before_the_first_step_and_the_last_value_after_it():
    config = RunConfig.from_preset(prompt="a lamp")
    page = dict(zip(show.OUTPUTS, show.show_cleared(config), strict=True))
    assert page["charts"].count("<svg") == 2 and "NaN" not in page["charts"]
    assert page["scores"].count("<td>–") == 2
    rows = ({"step": 1, "reward_with": 1.0, "reward_without": 3.0}, {"step": 2, "reward_with": 2.0})
    assert "<td>2.000<small class='down'>-1.000" in parts.scores_so_far(rows, config)
    assert visible(dict(zip(show.OUTPUTS, show.show_cleared(RunConfig.from_preset(mode="3d"))))["object"])
    assert not visible(page["object"])


def test_sheets_of_depth_and_normals_are_those_of_the_pair():
    result = result_of("with", "selection", "without", kinds=("picture", "views"))
    assert shown(result)["views"].count("<img") == 2 and "selection" not in shown(result)["views"]
    assert shown(result_of("with"))["views"] == ""


def test_every_file_of_every_arm_is_one_link_with_a_name_of_its_own():
    kinds = tuple(parts.FILES)
    links = parts.downloads(result_of("with", "without", kinds=kinds))
    assert links.count("<a ") == 2 * len(kinds) + 2
    names = [part.partition("'")[0] for part in links.split("aria-label='")[2:]]
    assert len(set(names)) == len(names) and "GLB, without" in names and "run.json, whole run" in names


def test_every_arm_has_a_colour_in_light_and_in_dark():
    style = theme.STYLE.read_text(encoding="utf-8")
    for arm in [*ARMS, *(f"vary-{place}" for place in range(1, MAX_ARMS + 1))]:
        assert style.count(f"--psd-{arm}:") == 2 and f".s-{arm} " in style.replace(",", " "), arm


def test_ticked_boxes_become_the_text_of_arms_and_back():
    config = RunConfig.from_preset(prompt="a lamp", arms="with, selection")
    values = form.fill(config.to_dict())
    assert values[list(FIELDS).index("arms")] == ["with", "selection"]
    assert form.checked(form.named(values)) == config
    values[list(FIELDS).index("arms")] = ["selection", "with"]  # ticked in another order: the same run
    assert form.checked(form.named(values)) == config


def test_a_run_of_another_version_leaves_the_form_as_it_is():
    assert form.fill_again({"prompt": "a lamp", "preset": "of-the-past"}) == form.fill({})
    assert form.fill_again({"prompt": "a lamp", "seed": 3})[list(FIELDS).index("seed")] == 3


@pytest.mark.parametrize(
    "html",
    [
        lambda: parts.end_status(result_of("with", remarks=(TAG,)), (TAG,)),
        lambda: parts.end_status(result_of("with", stopped=TAG)),
        lambda: parts.charts([{"step": 1, f"reward_{TAG}": 1.0}], 2, TAG, [TAG]),
        lambda: parts.score_table({TAG: {TAG: 1.0}, "without": {TAG: 0.0}}, TAG),
        lambda: parts.downloads(result_of(TAG)),
        lambda: parts.picture_grid(result_of(TAG).arms),
        lambda: form.model_note(TAG, TAG),
    ],
)
def test_no_text_from_outside_becomes_html(html):
    assert "<img src=//" not in html()


def test_the_script_carries_the_forms_names_in_their_order():
    script = theme.script()
    assert script.count("</script>") == 1 and "DATA" not in script
    assert '"names": ' + str(list(FIELDS)).replace("'", '"') in script
