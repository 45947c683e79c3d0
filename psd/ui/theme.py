"""Colours, type and spacing, and the page's script. Everything a theme variable cannot say is in assets/style.css."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr

from psd.config import FIELDS, PRESETS, RunConfig

# An icon drawn inline: two overlapping discs, the arm without and the arm with preference.
ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'%3E"
    "%3Ccircle cx='12' cy='16' r='9' fill='%23a8a294'/%3E"
    "%3Ccircle cx='20' cy='16' r='9' fill='%23126b63' fill-opacity='.9'/%3E%3C/svg%3E"
)
HEAD = f'<link rel="icon" type="image/svg+xml" href="{ICON}">'
ASSETS = Path(__file__).resolve().parents[2] / "assets"
STYLE = ASSETS / "style.css"


def script() -> str:
    """assets/page.js with its data, as an element of the page's head."""
    data = {"names": list(FIELDS), "defaults": RunConfig().to_dict(), "presets": PRESETS}
    inside = json.dumps(data).replace("<", "\\u003c")  # no text of a preset ends the element
    return f"<script>{(ASSETS / 'page.js').read_text(encoding='utf-8').replace('DATA', inside, 1)}</script>"


pine = gr.themes.Color(
    "#edf7f5", "#d3ebe7", "#a9d8d1", "#78bfb6", "#46a196", "#22857b",
    "#126b63", "#0f564f", "#0e4540", "#0d3936", "#06211f",
)  # fmt: skip
sand = gr.themes.Color(
    "#fbfaf7", "#f4f2ec", "#e7e3d9", "#d3cec1", "#a8a294", "#78736a",
    "#57534b", "#403d37", "#292723", "#1b1a17", "#121110",
)  # fmt: skip
# Bundled with gradio: the page makes no request to a font service. (Its semi-bold files lack most letters.)
BODY = [gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "ui-sans-serif", "system-ui", "sans-serif"]
MONO = [gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "monospace"]

theme = gr.themes.Base(primary_hue=pine, secondary_hue=pine, neutral_hue=sand, font=BODY, font_mono=MONO).set(
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    body_text_color="*neutral_800",
    body_text_color_dark="*neutral_100",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    block_background_fill="white",
    block_background_fill_dark="*neutral_900",
    block_border_width="1px",
    block_border_color="*neutral_200",
    block_border_color_dark="*neutral_800",
    block_radius="12px",
    block_label_background_fill="white",
    block_label_background_fill_dark="*neutral_900",
    block_label_border_width="0px",
    block_label_text_color="*neutral_600",
    block_label_text_color_dark="*neutral_300",
    block_title_text_weight="600",
    block_title_text_color="*neutral_800",
    block_title_text_color_dark="*neutral_100",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_400",
    input_background_fill="*neutral_50",
    input_background_fill_dark="*neutral_950",
    input_border_width="1px",
    input_border_color="*neutral_300",
    input_border_color_dark="*neutral_700",
    input_border_color_focus="*primary_500",
    input_border_color_focus_dark="*primary_400",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    input_radius="8px",
    border_color_primary="*neutral_200",
    border_color_primary_dark="*neutral_800",
    panel_background_fill="transparent",
    panel_background_fill_dark="transparent",
    color_accent_soft="*primary_50",
    color_accent_soft_dark="*neutral_800",
    checkbox_background_color_selected="*primary_600",
    checkbox_background_color_selected_dark="*primary_500",
    checkbox_border_color_selected="*primary_600",
    checkbox_label_background_fill_selected="*primary_100",
    checkbox_label_background_fill_selected_dark="*primary_900",
    checkbox_label_text_color_selected="*primary_800",
    checkbox_label_text_color_selected_dark="*primary_100",
    slider_color="*primary_600",
    slider_color_dark="*primary_400",
    button_large_radius="10px",
    button_small_radius="8px",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover_dark="*primary_500",
    button_primary_text_color="white",
    button_secondary_background_fill="white",
    button_secondary_background_fill_hover="*neutral_100",
    button_secondary_background_fill_dark="*neutral_800",
    button_secondary_background_fill_hover_dark="*neutral_700",
    button_secondary_border_color="*neutral_300",
    button_secondary_border_color_dark="*neutral_700",
    button_border_width="1px",
    link_text_color="*primary_700",
    link_text_color_dark="*primary_300",
    link_text_color_visited="*primary_700",
    link_text_color_visited_dark="*primary_300",
)
