"""Line charts as inline SVG: a few kilobytes, redrawn without flicker, coloured by the page's own CSS variables.

Knows nothing of gradio. Colours live in assets/style.css (`.s-<name>`): light and dark are one drawing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 380, 126  # user units of the viewBox, close to the drawn pixels so that text keeps its size
LEFT, RIGHT, TOP, BOTTOM = 36, 8, 8, 18
MAX_POINTS = 240


@dataclass(frozen=True)
class Series:
    """One line: `name` selects the colour, `values[i]` belongs to `steps[i]`; NaN (not computed) is skipped."""

    name: str
    label: str
    values: Sequence[float]


def line_chart(title: str, steps: Sequence[int], series: Sequence[Series], last_step: int, reading: str = "") -> str:
    """<figure> with a legend (label and last value) and an SVG with axes; `last_step` fixes the x axis at the start.

    reading: one line that says how to read it.
    """
    shown = [line for line in series if any(map(math.isfinite, line.values))]
    values = [value for line in shown for value in line.values if math.isfinite(value)]
    ticks = nice_ticks(min(values), max(values)) if values else [0.0, 0.5, 1.0]
    low, high = ticks[0], ticks[-1]
    x_low, x_high = 1, max(last_step, 2)

    def x(step: int) -> float:
        return LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks:
        at = f"{y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at}" dy="0.32em" text-anchor="end">{tick:g}</text>')
    numbers = sorted({x_low, *(round(x_high * share) for share in (0.25, 0.5, 0.75)), x_high})
    # The axis is named between its last two numbers, so that the name takes no line of its own.
    names = [(x(tick), f"{tick}") for tick in numbers] + [((x(numbers[-2]) + x(numbers[-1])) / 2, "step")]
    for at, name in names:
        parts.append(f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{name}</text>')
    stride = max(1, math.ceil(len(steps) / MAX_POINTS))
    for line in shown:
        kind = escape(f"s-{line.name}", quote=True)
        parts.append(f'<path class="line {kind}" d="{_path(steps[::stride], line.values[::stride], x, y)}"/>')
        at, value = [(s, v) for s, v in zip(steps, line.values, strict=True) if math.isfinite(v)][-1]
        parts.append(f'<circle class="dot {kind}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="3.2"/>')

    legend = "".join(
        f'<li><i class="s-{escape(line.name, quote=True)}"></i>{escape(line.label)} <b>{_last(line.values)}</b></li>'
        for line in (shown if steps else series)
    )
    spoken = escape(f"{title}: " + ", ".join(f"{line.label} {_last(line.values)}" for line in shown), quote=True)
    return (
        f'<figure class="psd-chart"><figcaption>{escape(title)}<ul>{legend}</ul></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{spoken}">{"".join(parts)}</svg>'
        f"<p>{escape(reading)}</p></figure>"
    )


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round tick positions (1, 2, 2.5 or 5 times a power of ten apart) that enclose [low, high]."""
    span = max(high - low, 1e-3 * max(abs(low), abs(high)), 1e-6)
    power = 10.0 ** math.floor(math.log10(span / count))
    spacing = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= span / count * 0.999)
    first, last = math.floor(low / spacing + 1e-9), math.ceil(high / spacing - 1e-9)
    return [round(spacing * index, 10) for index in range(first, max(last, first + 1) + 1)]


def _path(steps: Sequence[int], values: Sequence[float], x, y) -> str:
    commands, pen = [], "M"
    for step, value in zip(steps, values, strict=True):
        if math.isfinite(value):
            commands.append(f"{pen}{x(step):.1f} {y(value):.1f}")
            pen = "L"
    return "".join(commands)


def _last(values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f"{finite[-1]:.3g}" if finite else "–"
