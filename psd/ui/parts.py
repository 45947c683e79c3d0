"""The page's own HTML: header, status, charts, pictures, scores, downloads, parameters. Pure strings, escaped here.

Styled by style.css; `s-ARM` is the class of an arm's colour, `s-vary-3` of the third in a row.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from psd.config import FIELDS, MODES, PICTURES, PRESETS, RunConfig, arms_of, is_varied, seeds_of
from psd.errors import RequestError
from psd.events import ArmResult
from psd.methods import METHODS
from psd.models.priors.table import PRIORS
from psd.models.rewards.table import REWARDS, reward_terms
from psd.record import ARCHIVE, Result
from psd.ui.files import MIN_AGE_S, age_s, run_folder
from psd.ui.form import ALLOW_DOWNLOAD_HELP, arm_label, help_line
from psd.ui.plots import Series, line_chart
from psd.ui.watch import View

PAPER = "https://arxiv.org/abs/2603.01594"

HEADER = f"""
<header class="psd-header">
<h1>Preference Score Distillation</h1>
<p>A reward model says at every step which of two noised copies it likes better, and the next step goes its way: see the
<b>same seed with and without</b>, and a <b>judge</b> that was never optimised.
<a href="{PAPER}" target="_blank" rel="noopener">Read the paper</a></p>
</header>
"""

# What a field that names a row may say.
TABLES = {"preset": PRESETS, "prior": PRIORS, "reward": REWARDS, "method": METHODS, "mode": MODES}
TARGET_TAG = '<span class="psd-tag target">target</span>'
MEMBER_TAG = '<span class="psd-tag target">part of the target</span>'
READ_REWARD = "Higher is better: how well the picture would do if it were finished now."
READ_TERMS = "How far each pulls at a step: to the likely, to the prompt, to the liked."
BASELINE = "without"  # changes are told against this arm where it ran, else against the last one
FILES = {
    "picture": "PNG", **{kind: f"PNG {kind.removeprefix('picture_')}" for kind in PICTURES[1:]},
    "negative": "Learned n", "pairs": "What the reward saw", "glb": "GLB", "ply": "PLY", "obj": "OBJ", "field": "Field",
    "turntable": "MP4", "views": "Views",
}  # fmt: skip
SO_FAR = "Scores so far"
MAX_COLUMNS = 4  # of a table of scores
VIEWS = "Colours, depth and normals from four sides"
HELD_OUT_TAG = '<span class="psd-tag">held-out judge</span>'


def status(text: str, share: float = 0.0, kind: str = "busy", run: str = "") -> str:
    """One line and a bar; `text` is HTML. `kind`: idle, busy, done or stopped. `run`: a name for the page's address."""
    percent = f"{100 * share:.0f}"
    return (
        f'<div class="psd-status {kind}" data-run="{escape(run, quote=True)}"><p role="status">{text}</p>'
        f'<div class="bar" role="progressbar" aria-label="Progress of the run" aria-valuemin="0" aria-valuemax="100"'
        f' aria-valuenow="{percent}"><i style="width:{percent}%"></i></div></div>'
    )


def run_status(view: View) -> str:
    if view.waiting:
        return status("<b>Waiting for the device</b><span>another run is using it</span>")
    if view.download and view.directory is None:
        got = view.download
        return status(
            f"<b>Downloading {escape(got.name)}</b><span>{got.done_mb:.0f} of {got.total_mb:.0f} MB</span>",
            got.done_mb / max(got.total_mb, 1e-6),
        )
    if view.step is None:
        return status("Loading the models…" if view.directory is None else "Models are ready, first step…")
    step = view.step
    speed = step.step / max(step.elapsed_s, 1e-6)
    left = f"{seconds(step.eta_s)} left" if step.step < step.steps else "scores and files follow"
    return status(
        f"<b>Step {step.step} of {step.steps}</b><span>{speed:.1f} steps/s</span>"
        f"<span>{left}</span><span>seed {view.config.seed}</span>{notes(view.warnings)}",
        step.step / step.steps,
    )


def end_status(result: Result, warnings: Sequence[str] = ()) -> str:
    """How a run ended, by its manifest, and every remark on it."""
    steps = result.settings.get("steps") or result.steps_done
    left = not result.settled and age_s(result.directory, time.time()) > MIN_AGE_S
    if left:
        headline = "The server ended before this run did: what there was is kept"
    elif result.failed:
        headline = "Broke down: the partial result is kept"
    elif result.stopped:
        headline = "Stopped: the partial result is kept" if result.steps_done else "Stopped before the first step"
    else:
        headline = "Done"
    parts = [f"<b>{headline}</b>"]
    if math.isfinite(result.seconds):
        parts.append(f"<span>{seconds(result.seconds)}</span>")
    if "seed" in result.settings:
        parts.append(f"<span>seed {escape(str(result.settings['seed']))}</span>")
    if result.state == "writing" and not left:
        parts.append("<span>turntable and archives follow</span>")
    share = result.steps_done / max(steps, 1) if result.stopped else 1.0
    name = result.directory.name if run_folder(result.directory.name) else ""
    remarks = [*warnings, *([result.stopped] if result.stopped else []), *result.remarks]
    return status("".join(parts) + notes(remarks), share, "stopped" if result.stopped or left else "done", name)


def notes(warnings: Sequence[str]) -> str:
    return "".join(f"<em>{escape(warning)}</em>" for warning in warnings)


def seconds(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s" if value < 90 else f"{value / 60:.1f} min"


def charts(rows: Sequence[Mapping[str, float]], last_step: int, reward: str, arms: Sequence[str]) -> str:
    """The reward of every arm, and the norms of the first one's three terms; axes alone before the first step."""
    steps = [int(row["step"]) for row in rows]

    def series(name: str, key: str, text: str) -> Series:
        return Series(name, text, [row.get(key, math.nan) for row in rows])

    rewards = [series(mark(arm, arms), f"reward_{arm}", arm_label(arm)) for arm in arms]
    terms = [
        series("gen", "delta_gen", "likely δ_gen"),
        series("cls", "delta_cls", "prompt γ δ_cls"),
        series("pref", "delta_pref", "liked β δ_pref"),
    ]
    whose = f", {arm_label(arms[0])}" if len(arms) > 1 else ""
    return (
        '<div class="psd-charts">'
        + line_chart(f"Reward of the prediction ({reward})", steps, rewards, last_step, READ_REWARD)
        + line_chart(f"Size of the three terms{whose}", steps, terms, last_step, READ_TERMS)
        + "</div>"
    )


def file_url(path: Path) -> str:
    """Where gradio serves a file of its cache or of the examples, relative to the page; escaped."""
    return escape(f"gradio_api/file={quote(str(path))}", quote=True)


def mark(arm: str, arms: Iterable[str]) -> str:
    """What names an arm's colour: the arm itself, or its place among those of a row."""
    row = [each for each in arms if is_varied(each)]
    return f"vary-{row.index(arm) + 1}" if arm in row else arm


def key(arm: str, arms: Iterable[str]) -> str:
    """The mark of an arm's colour among all `arms` of a run, and its name."""
    return f"<i class='s-{escape(mark(arm, arms), quote=True)}'></i>{escape(arm_label(arm))}"


def picture_grid(arms: Mapping[str, ArmResult], seed: int = 0) -> str:
    """Every arm's picture with its name and scores, in one row where a setting varies; of several pictures an arm those
    of one seed beside each other."""
    names = {
        name: f"<span class='psd-key'>{key(name, arms)}</span>"
        + "".join(f"<small><b>{score(value)}</b> {escape(reward)}</small>" for reward, value in arm.scores.items())
        for name, arm in arms.items()
    }
    count = max((sum(kind in PICTURES for kind in arm.files) for arm in arms.values()), default=0)
    if count < 2:
        figures = "".join(
            f"<figure>{thumbnail(arm.picture, arm_label(name))}<figcaption>{names[name]}</figcaption></figure>"
            for name, arm in arms.items()
            if arm.picture
        )
        if not any(map(is_varied, arms)):
            return f"<div class='psd-grid'>{figures}</div>"
        return f"<div class='psd-grid row' tabindex='0' role='region' aria-label='Results in a row'>{figures}</div>"
    figures = ""
    for kind, which in zip(PICTURES, seeds_of(seed, count)):
        row = "".join(
            thumbnail(arm.files[kind], f"{arm_label(name)}, seed {which}") for name, arm in arms.items()
            if kind in arm.files
        )  # fmt: skip
        figures += f"<figure><div>{row}</div><figcaption>seed {which}</figcaption></figure>"
    caption = "".join(f"<li>{name}</li>" for name in names.values())
    return f"<ul class='psd-caption'>{caption}</ul><div class='psd-grid rows'>{figures}</div>"


def thumbnail(picture: Path, about: str) -> str:
    return f"<img src='{file_url(picture)}' alt='{escape(about, quote=True)}' loading='lazy'>"


def downloads(result: Result) -> str:
    """A menu of every arm's files, one of the run's own, and all of them at once."""

    def link(path: Path, text: str, whose: str) -> str:
        name = escape(f"{text}, {whose}", quote=True)
        return (
            f"<a href='{file_url(path)}' download='{escape(path.name, quote=True)}' aria-label='{name}'>"
            f"{escape(text)}</a>"
        )

    def menu(summary: str, links: Sequence[str]) -> str:
        return f"<details name='files'><summary>{summary}</summary><div>{''.join(links)}</div></details>"

    menus, listed = [], set()
    for name, arm in result.arms.items():
        links = [link(arm.files[kind], text, arm_label(name)) for kind, text in FILES.items() if kind in arm.files]
        menus += [menu(f"<span class='psd-key'>{key(name, result.arms)}</span>", links)] if links else []
        listed |= set(arm.files.values())
    others = [path for path in result.files if path not in listed]
    whole = "".join(link(path, "everything (ZIP)", "whole run") for path in others if path.name == ARCHIVE)
    links = [link(path, path.name, "whole run") for path in others if path.name != ARCHIVE]
    menus += [menu("numbers and settings", links)] if links else []
    return f"<div class='psd-files' role='group' aria-label='Downloads'>{''.join(menus)}{whole}</div>" if menus else ""


def scores_so_far(rows: Sequence[Mapping[str, float]], config: RunConfig) -> str:
    """The target reward of every arm at the last step that read it; the judges' come with the results."""
    arms = list(arms_of(config))
    last = {
        arm: next((v for row in reversed(rows) if math.isfinite(v := row.get(f"reward_{arm}", math.nan))), math.nan)
        for arm in arms
    }
    return score_table({arm: {config.reward: value} for arm, value in last.items()}, config.reward, SO_FAR)


def view_sheets(arms: Mapping[str, ArmResult]) -> str:
    """The sheets of four views with depth and normals, folded away; empty where there are none."""
    sheets = "".join(
        f"<figure><img src='{file_url(arm.files['views'])}' alt='{escape(f'{VIEWS}, {arm_label(name)}', quote=True)}' "
        f"width='768' height='576' loading='lazy'><figcaption class='psd-key'>{key(name, arms)}</figcaption></figure>"
        for name, arm in arms.items()
        if "views" in arm.files
    )
    return f"<details class='psd-views'><summary>{VIEWS}</summary><div>{sheets}</div></details>" if sheets else ""


def score_table(scores: Mapping[str, Mapping[str, float]], target: str, what: str = "Scores of the results") -> str:
    """One row a reward: every arm, its change against the baseline, and what the number may be believed for. Of more
    than MAX_COLUMNS arms one row an arm."""
    if not any(scores.values()):
        return ""
    names = list(dict.fromkeys(name for arm in scores.values() for name in arm))
    names.sort(key=lambda name: name != target)
    members: Mapping[str, float] = {}
    with contextlib.suppress(RequestError):  # another version's run may name what is unknown here
        members = reward_terms(target)
    baseline = BASELINE if BASELINE in scores else list(scores)[-1]
    tags = {name: TARGET_TAG if name == target else MEMBER_TAG if name in members else HELD_OUT_TAG for name in names}
    rewards = {name: f"{escape(name)} {tag}" for name, tag in tags.items()}
    arms = {arm: f"<span class='psd-key'>{key(arm, scores)}</span>" for arm in scores}

    def cell(arm: str, name: str) -> str:
        value, plain = (scores[which].get(name, math.nan) for which in (arm, baseline))
        return f"<td>{score(value)}{'' if arm == baseline else change(value - plain)}</td>"

    tall = len(scores) > MAX_COLUMNS
    heads, rows = (rewards, arms) if tall else (arms, rewards)
    head = "".join(f"<th scope='col'>{text}</th>" for text in heads.values())
    body = ""
    for row, text in rows.items():
        cells = "".join(cell(*((row, column) if tall else (column, row))) for column in heads)
        body += f"<tr><th scope='row'>{text}</th>{cells}</tr>"
    against = f"; small: change against “{escape(arm_label(baseline))}”" if len(scores) > 1 else ""
    look, first = ("psd-scores tall", "arm") if tall else ("psd-scores", "reward")
    return (
        f"<p class='psd-caption' id='scores_caption'>{what}, higher is better{against}</p>"
        "<div class='psd-wide' tabindex='0' role='region' aria-labelledby='scores_caption'>"
        f"<table class='{look}' aria-labelledby='scores_caption'>"
        f"<thead><tr><th scope='col'>{first}</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def change(value: float) -> str:
    kind = "up" if value > 0 else "down" if value < 0 else ""
    return f"<small class='{kind}'>{value:+.3f}</small>" if math.isfinite(value) else "<small>–</small>"


def score(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def estimate(config: RunConfig, run_s: float, gpu_s: int = 0, gpu_steps: int = 0) -> str:
    """The line under Run; `gpu_s` seconds of a rented GPU are enough for `gpu_steps` of the steps."""
    count = len(arms_of(config))
    arms = "one arm" if count == 1 else f"{count} arms"
    quota = f" · reserves {gpu_s} s of GPU quota" if gpu_s else ""
    if gpu_s and gpu_steps < config.steps:
        quota += f", which ends the run after about {gpu_steps} steps: choose fewer, or fewer arms"
    return f'<p class="psd-estimate">About {seconds(run_s)} · {config.steps} steps · {arms}{quota}</p>'


def parameter_table() -> str:
    """Every parameter of /generate: the dataclass that the endpoint itself is made from, and its one permission."""
    rows = ""
    for name, field in FIELDS.items():
        low, high = field.low, field.high
        choices = field.choices or tuple(
            {"preset": PRESETS, "prior": PRIORS, "reward": REWARDS, "method": METHODS}.get(name, ())
        )
        allowed = ", ".join(choices) if choices else f"{low:g} to {high:.10g}" if low is not None else ""
        kind = f"{'file' if field.local else field.kind.__name__}{f': {allowed}' if allowed else ''}"
        default = repr(field.default) if name != "prompt" else "required"
        rows += (
            f"<tr><th scope='row'><code>{name}</code></th><td data-label='type'>{escape(kind)}</td>"
            f"<td data-label='default'><code>{escape(default)}</code></td>"
            f"<td>{escape(help_line(name))}</td></tr>"
        )
    rows += (
        "<tr><th scope='row'><code>allow_download</code></th><td data-label='type'>bool</td>"
        f"<td data-label='default'><code>False</code></td><td>{escape(ALLOW_DOWNLOAD_HELP)}</td></tr>"
    )
    return (
        "<table class='psd-parameters'><thead><tr><th scope='col'>name</th><th scope='col'>type</th>"
        "<th scope='col'>default</th><th scope='col'>meaning</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )
