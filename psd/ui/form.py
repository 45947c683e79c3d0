"""The form: one control per RunConfig field, and the ways settings get in and out of it.

Controls, presets, share links and dropped files all speak `RunConfig.to_dict()`; what is allowed is
`safety.check_request`'s business alone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from psd.config import FIELDS, MAX_PROMPT_CHARS, PRESETS, RunConfig, Setting, todays
from psd.errors import RequestError, shown
from psd.models.hub import is_cached, is_hub_id
from psd.models.needs import models_of
from psd.models.priors.table import PRIORS, DecoderInfo, PriorInfo, gpu_memory
from psd.models.rewards.table import REWARDS, RewardInfo, reward_terms
from psd.safety import check_name, check_request
from psd.scene.files import read_glb_extras

NAMES = tuple(FIELDS)
GROUPS = {
    "method": "Sampling and guidance",
    "preference": "Preference",
    "negative": "Negative embedding",
    "object": "Object (3D)",
    "run": "Size and time",
}
# Number fields whose whole range is worth dragging through, with the step of the handle.
SLIDER_STEPS = {
    "steps": 1, "gamma": 0.1, "t_max": 0.01, "t_min": 0.01, "t_max_end": 0.01, "t_anneal": 0.05, "rescale": 0.05,
    "time_shift_low": 0.01, "time_shift_high": 0.01, "pref_weight": 0.05,
}  # fmt: skip
# A preset says how to draw; these say what, and stay as they are when another preset is chosen.
KEPT_BY_PRESETS = ("prompt", "seed", "arms")
MAX_SETTINGS_BYTES = 1_000_000
TRUTH = {"true": True, "false": False}  # what a link may say
# No setting: it changes no result, and a link or a preset must not carry somebody's consent.
ALLOW_DOWNLOAD_HELP = "Fetch models that are not on the server yet; whoever sets it accepts their licences."


def help_line(name: str) -> str:
    """The field's own help; over the network a prior is one of the listed names only."""
    return "Diffusion model." if name == "prior" else FIELDS[name].help


def control(name: str) -> gr.components.Component:
    """The field's control: choices become radios, wide numbers a slider, the rest a number or a box."""
    field = FIELDS[name]
    common = {"label": field.label, "value": field.default, "info": field.help, "elem_id": name}
    low, high = field.low, field.high
    if field.choices:
        return gr.Radio(list(field.choices), **common)
    if isinstance(field.default, bool):
        return gr.Checkbox(**common)
    if name in SLIDER_STEPS:
        return gr.Slider(low, high, step=SLIDER_STEPS[name], **common)
    if isinstance(field.default, int):
        return gr.Number(precision=0, **common)
    if isinstance(field.default, float):
        return gr.Number(**common)
    return gr.Textbox(max_length=MAX_PROMPT_CHARS, **common)


def checked(settings: Mapping[str, Any]) -> RunConfig:
    """The RunConfig a front end asked for: None means the preset's value. Raises RequestError."""
    settings = {name: number(FIELDS[name], value) for name, value in todays(settings).items() if name in FIELDS}
    preset = settings.pop("preset", None)
    if preset is not None:
        check_name("preset", str(preset), PRESETS)
    config = RunConfig.from_preset(preset, **settings)
    check_request(config)
    return config


def number(field: Setting, value: Any) -> Any:
    """JSON and sliders do not keep 50 and 50.0 apart; give each field the kind it declares, leave all else alone."""
    if isinstance(value, bool):
        return value
    if isinstance(field.default, int) and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(field.default, float) and isinstance(value, int) and abs(value) < 2**53:
        return float(value)
    return value


def fill(settings: Mapping[str, Any]) -> list[Any]:
    """Values for all controls in the order of NAMES; controls that `settings` does not name stay as they are."""
    return [settings.get(name, gr.skip()) for name in NAMES]


def fill_preset(preset: str) -> list[Any]:
    """Values for all controls when a preset is chosen. Raises gr.Error on an unknown one."""
    try:
        check_name("preset", preset, PRESETS)
    except RequestError as error:
        raise gr.Error(str(error), print_exception=False) from error
    settings = RunConfig.from_preset(preset).to_dict()
    return fill({name: value for name, value in settings.items() if name not in KEPT_BY_PRESETS})


def settings_of_query(query: Mapping[str, str]) -> dict[str, Any]:
    """A share link's settings, complete and checked; {} when it names none. Raises RequestError."""
    kinds = {name: setting.kind for name, setting in FIELDS.items()} | {"compare": bool}  # of older links
    given: dict[str, Any] = {}
    for name, kind in kinds.items():
        if name not in query:
            continue
        try:
            given[name] = TRUTH[query[name].lower()] if kind is bool else kind(query[name])
        except (KeyError, ValueError) as error:
            expected = {bool: "true or false", int: "a whole number"}.get(kind, "a number")
            raise RequestError(f"The link's {name} must be {expected}, got {shown(query[name])}.", name) from error
    return checked(given).to_dict() if given else {}


def settings_of_file(path: str | Path) -> dict[str, Any]:
    """The settings inside a result: the PNG's text chunk "psd", the GLB's extras or run.json's "config".

    Raises RequestError.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".glb":
            text = json.dumps(read_glb_extras(path))
        elif path.suffix.lower() == ".png":
            with Image.open(path, formats=["PNG"]) as image:
                # Chunks before the pixels are read with the header: the image itself is never decoded.
                text = image.info.get("psd", "")
        elif path.stat().st_size <= MAX_SETTINGS_BYTES:
            text = path.read_text(encoding="utf-8")
        else:
            text = ""
        found = json.loads(text)
    except (OSError, ValueError, SyntaxError, RecursionError):
        found = None
    if isinstance(found, dict):
        found = found.get("config", found)
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise RequestError("This file carries no settings: drop a result PNG, GLB or run.json that this app wrote.")
    return checked(found).to_dict()


def copy_link_js() -> str:
    """Client-side function of all controls: writes the share link to the clipboard and returns it.

    Only what differs from the preset goes into the link, so it stays short and survives a restart of the server.
    """
    presets = {name: RunConfig.from_preset(name).to_dict() for name in PRESETS}
    return (
        "(...values) => {"
        f"const names = {json.dumps(NAMES)}, presets = {json.dumps(presets)};"
        "const base = presets[values[names.indexOf('preset')]] ?? {}, query = new URLSearchParams();"
        "names.forEach((name, i) => {"
        "  const always = ['prompt', 'preset', 'seed'].includes(name), value = values[i];"
        "  if (value !== null && (always || value !== base[name])) query.set(name, value);"
        "});"
        "const link = window.location.origin + window.location.pathname + '?' + query;"
        "navigator.clipboard?.writeText(link).catch(() => {});"
        "return link; }"
    )


def known_models(prior: str, reward: str, fast_decoder: bool) -> dict[str, PriorInfo | DecoderInfo | RewardInfo]:
    """The chosen models by name: of a mixture its members, none while it is still being typed."""
    models: dict[str, PriorInfo | DecoderInfo | RewardInfo] = {}
    if prior in PRIORS or is_hub_id(prior or ""):
        models |= models_of(prior, fast_decoder)
    with contextlib.suppress(RequestError):
        models |= {name: REWARDS[name] for name in reward_terms(reward or "")}
    return models


def model_note(prior: str, reward: str, fast_decoder: bool = False) -> str:
    """What the chosen models are, their licence, download and memory, to be read before anything is downloaded."""
    notes = []
    for name, info in known_models(prior, reward, fast_decoder).items():
        if all(source.is_folder for source in info.sources):
            size = "included"
        elif is_cached(*info.sources):
            size = "downloaded"
        else:
            size = f"{info.download_mb} MB to download" if info.download_mb else "to be downloaded"
        notes.append(f"**{name}** · {info.about} Licence: {info.licence}; {size}{gpu_memory(info)}.")
    return "\n\n".join(notes)


def download_box(prior: str, reward: str, fast_decoder: bool = False) -> dict[str, Any]:
    """The checkbox that allows a download: what comes, under which licences; hidden where nothing has to come."""
    models = known_models(prior, reward, fast_decoder)
    missing = {name: info for name, info in models.items() if not is_cached(*info.sources)}
    licences = "; ".join(f"{name}: {info.licence}" for name, info in missing.items())
    sizes = [info.download_mb for info in missing.values()]
    more = "" if all(sizes) else "and a model of unknown size " if any(sizes) else "a model of unknown size "
    return dict(
        value=False,
        visible=bool(missing),
        label=f"Download {f'{sum(sizes)} MB ' if any(sizes) else ''}{more}first, once",
        info=f"I accept the licences. {licences}.",
    )
