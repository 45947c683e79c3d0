"""The page's own HTML: header, status line, charts, score table, parameter table. Pure strings; styled by style.css."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from html import escape

from psd.config import FIELDS, PRESETS, RunConfig, arm_names
from psd.errors import RequestError
from psd.models.priors.table import PRIORS
from psd.models.rewards.table import REWARDS, reward_terms
from psd.ui.form import ALLOW_DOWNLOAD_HELP, help_line
from psd.ui.plots import Series, line_chart
from psd.ui.session import View

PAPER = "https://arxiv.org/abs/2603.01594"

HEADER = f"""
<header class="psd-header">
<p class="psd-eyebrow">Text to image and text to 3D, guided by a reward</p>
<h1>Preference Score Distillation</h1>
<p>At every step the picture, or four views of the object, is noised twice and a reward model says which of the two
denoised guesses it likes better. The difference of the two guided noise predictions, <b>δ<sub>pref</sub></b>, steers
the next step towards the winner, and the negative prompt's embedding is learned on the same reward. You see the
<b>same seed, same noises</b> with and without this guidance, and a <b>held-out judge</b> that is never optimised tells
real improvement from reward hacking.
<a href="{PAPER}" target="_blank" rel="noopener">Read the paper</a></p>
</header>
"""

TARGET_TAG = '<span class="psd-tag target">target</span>'
MEMBER_TAG = '<span class="psd-tag target">part of the target</span>'
HELD_OUT_TAG = '<span class="psd-tag">held-out: reward-hacking check</span>'


def status(text: str, share: float = 0.0, kind: str = "busy") -> str:
    """One line and a bar; `text` is HTML. `kind`: idle, busy, done or stopped."""
    percent = f"{100 * share:.0f}"
    return (
        f'<div class="psd-status {kind}"><p role="status">{text}</p>'
        f'<div class="bar" role="progressbar" aria-label="Progress of the run" aria-valuemin="0" aria-valuemax="100"'
        f' aria-valuenow="{percent}"><i style="width:{percent}%"></i></div></div>'
    )


def run_status(view: View) -> str:
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
    return status(
        f"<b>Step {step.step} of {step.steps}</b><span>{speed:.1f} steps/s</span>"
        f"<span>{seconds(step.eta_s)} left</span><span>seed {view.config.seed}</span>{notes(view.warnings)}",
        step.step / step.steps,
    )


def end_status(
    headline: str, config: Mapping, elapsed_s: float, warnings: Sequence[str] = (), share: float = 1.0
) -> str:
    parts = [f"<b>{escape(headline)}</b>"]
    if math.isfinite(elapsed_s):
        parts.append(f"<span>{seconds(elapsed_s)}</span>")
    if "seed" in config:
        parts.append(f"<span>seed {int(config['seed'])}</span>")
    return status("".join(parts) + notes(warnings), share, "done" if share == 1.0 else "stopped")


def notes(warnings: Sequence[str]) -> str:
    return "".join(f"<em>{escape(warning)}</em>" for warning in warnings)


def seconds(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s" if value < 90 else f"{value / 60:.1f} min"


def charts(rows: Sequence[Mapping[str, float]], last_step: int, reward: str) -> str:
    """Reward with and without, and the norms of the three terms; empty before the first step."""
    if not rows:
        return ""
    steps = [int(row["step"]) for row in rows]

    def series(name: str, key: str, text: str) -> Series:
        return Series(name, text, [row.get(key, math.nan) for row in rows])

    rewards = [
        series("with", "reward_with", "with preference"),
        series("without", "reward_without", "without"),
    ]
    terms = [
        series("gen", "delta_gen", "δ_gen"),
        series("cls", "delta_cls", "γ δ_cls"),
        series("pref", "delta_pref", "β δ_pref"),
    ]
    return (
        '<div class="psd-charts">'
        + line_chart(f"Reward of the prediction ({reward})", steps, rewards, last_step)
        + line_chart("Size of the three terms", steps, terms, last_step)
        + "</div>"
    )


def score_table(scores: Mapping[str, Mapping[str, float]], target: str) -> str:
    """One row a reward: both arms, their difference, and what the number may be believed for."""
    if not scores:
        return ""
    names = list(dict.fromkeys(name for arm in scores.values() for name in arm))
    names.sort(key=lambda name: name != target)
    members: Mapping[str, float] = {}
    with contextlib.suppress(RequestError):  # another version's run may name what is unknown here
        members = reward_terms(target)
    both = {"with", "without"} <= scores.keys()
    head = "".join(f"<th scope='col'>{escape(arm)}</th>" for arm in [*scores, *(["change"] if both else [])])
    body = ""
    for name in names:
        values = {arm: scores[arm].get(name, math.nan) for arm in scores}
        cells = "".join(f"<td data-label='{escape(arm)}'>{score(value)}</td>" for arm, value in values.items())
        if both:
            change = values["with"] - values["without"]
            kind = "up" if change > 0 else "down" if change < 0 else ""
            cells += f"<td data-label='change' class='{kind}'>{f'{change:+.3f}' if math.isfinite(change) else '–'}</td>"
        tag = TARGET_TAG if name == target else MEMBER_TAG if name in members else HELD_OUT_TAG
        body += f"<tr><th scope='row'>{escape(name)} {tag}</th>{cells}</tr>"
    return (
        f"<table class='psd-scores'><caption>Scores of the results, higher is better</caption>"
        f"<thead><tr><th scope='col'>reward</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def score(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def estimate(config: RunConfig, run_s: float, gpu_s: int = 0, gpu_steps: int = 0) -> str:
    """The line under Run; `gpu_s` seconds of a rented GPU are enough for `gpu_steps` of the steps."""
    count = len(arm_names(config.arms))
    arms = "one arm" if count == 1 else "both arms" if count == 2 else f"{count} arms"
    quota = f" · reserves {gpu_s} s of GPU quota" if gpu_s else ""
    if gpu_s and gpu_steps < config.steps:
        quota += f", which ends the run after about {gpu_steps} steps: choose fewer, or fewer arms"
    return f'<p class="psd-estimate">About {seconds(run_s)} · {config.steps} steps · {arms}{quota}</p>'


def parameter_table() -> str:
    """Every parameter of /generate: the dataclass that the endpoint itself is made from, and its one permission."""
    rows = ""
    for name, field in FIELDS.items():
        low, high = field.low, field.high
        choices = field.choices or tuple({"preset": PRESETS, "prior": PRIORS, "reward": REWARDS}.get(name, ()))
        allowed = ", ".join(choices) if choices else f"{low:g} to {high:.10g}" if low is not None else ""
        kind = f"{field.kind.__name__}{f': {allowed}' if allowed else ''}"
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
