"""What the reward saw, as HTML: pairs of a run moment by moment, under a scrubber that page.js moves. Escaped here.

Every picture is a tile of the arm's sheet (psd.pairs), shifted by CSS: --i is the moment, --row the picture's row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from itertools import chain
from typing import Any

from psd.events import ArmResult
from psd.record import Result
from psd.ui.form import arm_label
from psd.ui.parts import file_url, key, score

OPENS_AT = 0.2  # of a run: there the two differ in a way that can be seen
SIDES = {"better": "liked better", "worse": "liked less"}
TERMS = {"gen": ("delta_gen", "likely δ_gen"), "cls": ("delta_cls", "prompt γ δ_cls"),
         "pref": ("delta_pref", "liked β δ_pref")}  # fmt: skip


def strips(result: Result) -> str:
    """Of every arm that ranked; empty where none did, or where its sheet is gone."""
    arms = {name: arm for name, arm in result.arms.items() if "pairs" in arm.files and arm.remarks.get("pairs")}
    if not arms:
        return ""
    figures = "".join(strip(result, name, arm, first=name == next(iter(arms))) for name, arm in arms.items())
    return (
        "<section class='psd-strip' aria-labelledby='strip_title'><h3 id='strip_title'>What the reward saw</h3>"
        "<p class='psd-caption'>At every step two noised copies of the picture, each finished by the prior in one go; "
        "the reward chooses. Drag, press ▶ or use the arrow keys.</p>"
        f"{figures}</section>"
    )


def strip(result: Result, name: str, arm: ArmResult, first: bool) -> str:
    about = arm.remarks["pairs"]
    steps, views = about["steps"], int(about["views"])
    end = "" if name == next(iter(result.arms)) else f"_{name}"  # the first arm's columns have their plain names
    moments = moments_of(result, about, end)
    at = min(round(OPENS_AT * len(steps)), len(steps) - 1)
    style = f"--sheet:url({file_url(arm.files['pairs'])});--count:{len(steps)};--rows:{2 * views};--i:{at}"
    label = escape(f"Moment of the run, {arm_label(name)}", quote=True)
    data = escape(json.dumps(moments), quote=True)
    last = result.settings.get("steps") or steps[-1]
    return (
        f"<details class='psd-pair'{' open' if first else ''} style=\"{style}\" data-moments='{data}'>"
        f"<summary class='psd-key'>{key(name, result.arms)}</summary>"
        "<div class='scrubber'><button type='button' aria-label='Play'>▶</button>"
        f"<input type='range' min='0' max='{len(steps) - 1}' value='{at}' aria-label='{label}'>"
        f"<output>step <b data-is='step'>{steps[at]}</b> of {escape(str(last))}</output></div>"
        f"<div class='sides'>{''.join(side(i, views, moments[at]) for i in range(2))}</div>"
        f"{terms(moments[at])}{how_it_works() if first else ''}</details>"
    )


def moments_of(result: Result, about: Mapping[str, Any], end: str) -> list[dict[str, Any]]:
    """What is said at each moment: its step, every picture's score, and how long each term is beside the longest."""
    rows = {int(row["step"]): row for row in result.rows}
    columns = [column + end for column, _ in TERMS.values()]
    sizes = [[rows.get(step, {}).get(column, 0.0) for column in columns] for step in about["steps"]]
    longest = max(chain(*sizes), default=0.0) or 1.0
    return [
        {
            "step": step,
            "scores": [score(value) for each in scores for value in each],
            "terms": [f"{100 * size / longest:.0f}%" for size in of_step],
            "sizes": [f"{size:.3g}" for size in of_step],
        }
        for step, scores, of_step in zip(about["steps"], about["scores"], sizes, strict=True)
    ]


def side(which: int, views: int, moment: Mapping[str, Any]) -> str:
    """The better or the worse of every view."""
    kind, label = list(SIDES.items())[which]
    tiles = "".join(
        f"<span><i style='--row:{row}' role='img' aria-label='{label}'></i>"
        f"<b data-is='scores' data-at='{row}'>{moment['scores'][row]}</b></span>"
        for row in range(which * views, (which + 1) * views)
    )
    return f"<figure class='{kind}'><figcaption>{label}</figcaption><div class='tiles'>{tiles}</div></figure>"


def terms(moment: Mapping[str, Any]) -> str:
    """How far each of the three terms moves the picture at this step."""
    rows = "".join(
        f"<li><span>{label}</span><i class='s-{kind}' data-is='terms' data-at='{at}' "
        f"style='width:{moment['terms'][at]}'></i><b data-is='sizes' data-at='{at}'>{moment['sizes'][at]}</b></li>"
        for at, (kind, (_, label)) in enumerate(TERMS.items())
    )
    return f"<ul class='terms' aria-label='Sizes of the three terms at this step'>{rows}</ul>"


def how_it_works() -> str:
    """The paper's Figure 2 in words and in this run's own pictures, at the scrubber's moment."""

    def tile(which: str) -> str:
        row = "0" if which == "better" else "calc(var(--rows) / 2)"
        return f"<i class='{which}' style='--row:{row}' role='img' aria-label='{SIDES[which]}'></i>"

    return (
        "<details class='how'><summary>How it works</summary><ol>"
        f"<li><span>Two noises are added to the same picture. The prior finishes both copies.</span>"
        f"<div>{tile('worse')}{tile('better')}</div></li>"
        f"<li><span>The reward model reads both beside the prompt and likes one better.</span>"
        f"<div><s>{tile('worse')}</s>{tile('better')}</div></li>"
        "<li><span>What the prior predicts of the one, less what it predicts of the other, is the direction of "
        f"preference, <b>δ_pref</b>.</span><div>{tile('better')}<em>−</em>{tile('worse')}</div></li>"
        "<li><span>The picture moves along three terms: what is likely (δ_gen), what the prompt says (γ δ_cls), what "
        "is liked (β δ_pref). The negative embedding n learns to raise the score of the better one.</span></li>"
        "</ol></details>"
    )
