"""The form: one control per RunConfig field, and the ways settings get in and out of it.

Controls, presets, share links and dropped files all speak `RunConfig.to_dict()`; what is allowed is
`safety.check_request`'s business alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr

from psd.config import ARMS, FIELDS, LOCAL, MAX_PROMPT_CHARS, PRESETS, RunConfig, Setting, is_varied, listed, todays
from psd.errors import RequestError, shown
from psd.models.hub import is_cached, is_hub_id
from psd.models.needs import models_of
from psd.models.priors.table import PRIORS, DecoderInfo, PriorInfo, gpu_memory
from psd.models.rewards.table import REWARDS, RewardInfo, reward_terms
from psd.record import start_of
from psd.safety import TABLES, check_field, check_name, check_request, names_of
from psd.ui.files import cache_root, run_and_arm

NAMES = tuple(FIELDS)
START = RunConfig.from_preset()  # what the page opens with
GROUPS = {
    "model": "Model and negative prompt",
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
# A preset says how to draw; these say what, and stay as they are when another preset is chosen that does not name them.
KEPT_BY_PRESETS = ("prompt", "seed", "arms", "vary", *LOCAL)
TRUTH = {"true": True, "false": False}  # what a link may say
# No setting: it changes no result, and a link or a preset must not carry somebody's consent.
ALLOW_DOWNLOAD_HELP = "Fetch models that are not on the server yet; whoever sets it accepts their licences."


def help_line(name: str) -> str:
    """The field's own help; over the network a prior is one of the listed names only, and a file an upload."""
    if name == "prior":
        return "Diffusion model."
    where = {"start": "Upload, or RUN/ARM of a run on this server. "}.get(name, "Upload. " if name in LOCAL else "")
    return where + FIELDS[name].help


def named(values: Sequence[Any]) -> dict[str, Any]:
    """Values of all controls by the names of their fields; the boxes ticked for `arms` become its text."""
    settings = dict(zip(NAMES, values, strict=True))
    ticked = settings["arms"]
    if isinstance(ticked, list):
        settings["arms"] = ", ".join(arm for arm in ARMS if arm in ticked)
    return settings


UPLOADS = {
    "negative_from": ("an ARM_negative.safetensors", [".safetensors"]),
    "start": (
        "a picture, or an ARM_field.safetensors of an object",
        [".png", ".jpg", ".jpeg", ".webp", ".safetensors"],
    ),
}
ARM_LABELS = {
    "with": "with preference", "sampling": "plain sampling", "csd": "CSD", "sdi": "SDI", "cfd": "CFD", "vsd": "VSD",
    "dreamdpo": "DreamDPO", "dreamreward": "DreamReward", "rewardsds": "RewardSDS", "rewardvsd": "RewardVSD",
}  # fmt: skip


def arm_label(arm: str) -> str:
    """An arm's name as the page writes it, everywhere the same; not escaped."""
    return arm if is_varied(arm) else ARM_LABELS.get(arm, arm.replace("-", " "))


def control(name: str) -> gr.components.Component:
    """The field's control: arms become boxes, choices radios, wide numbers a slider, files a place to drop them, the
    rest a number or a text. It starts at what the first preset has."""
    field, start = FIELDS[name], getattr(START, name)
    common = {"label": field.label, "value": start, "info": field.help, "elem_id": name}
    low, high = field.low, field.high
    if field.local:
        what, types = UPLOADS[name]
        return upload(label=f"{field.label}: drop {what}", file_types=types, height=100, elem_id=name)
    if name == "arms":
        common["value"] = listed(start)
        return gr.CheckboxGroup([(arm_label(arm), arm) for arm in ARMS], **common)
    if choices := names_of(field):
        return gr.Radio(list(choices), **common)
    if isinstance(field.default, bool):
        return gr.Checkbox(**common)
    if name in SLIDER_STEPS:
        return gr.Slider(low, high, step=SLIDER_STEPS[name], **common)
    if isinstance(field.default, int):
        return gr.Number(precision=0, **common)
    if isinstance(field.default, float):
        return gr.Number(**common)
    return gr.Textbox(max_length=MAX_PROMPT_CHARS, **common)


def upload(**options: Any) -> gr.File:
    """A place for a file that hands on what comes as it is: `checked` takes its path, or refuses it in a sentence.

    Its methods are replaced, not overridden: gradio writes a .pyi file beside every subclass of a component.
    """
    file = gr.File(**options)
    described = file.api_info()
    file.api_info, file.data_model, file.preprocess = lambda: described, None, lambda payload: payload
    return file


def checked(settings: Mapping[str, Any]) -> RunConfig:
    """The RunConfig a front end asked for: None means the preset's value. Raises RequestError."""
    settings = {name: plain(FIELDS[name], value) for name, value in todays(settings).items() if name in FIELDS}
    for name in ("preset", "mode"):  # which the others start from
        if settings.get(name) is not None:
            check_field(FIELDS[name], settings[name])
            check_name(name, settings[name], TABLES[name])
    config = RunConfig.from_preset(settings.pop("preset", None), **settings)
    if named_run := run_and_arm(config.start):
        folder, arm = named_run
        config = replace(config, start=str(start_of(folder, config.mode, arm)))
    check_request(config, uploads=cache_root())
    return config


def plain(field: Setting, value: Any) -> Any:
    """JSON and sliders do not keep 50 and 50.0 apart, and an upload is told of at length: give each field the kind that
    it declares, leave all else alone."""
    if field.local and isinstance(value, Mapping):
        return value.get("path")
    if isinstance(value, bool):
        return value
    if isinstance(field.default, int) and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(field.default, float) and isinstance(value, int) and abs(value) < 2**53:
        return float(value)
    return value


def fill(settings: Mapping[str, Any]) -> list[Any]:
    """Values for all controls in the order of NAMES; controls that `settings` does not name stay as they are."""
    values = dict(settings)
    if "arms" in values:
        values["arms"] = listed(values["arms"])
    values |= {name: values[name] or None for name in LOCAL if name in values}
    return [values.get(name, gr.skip()) for name in NAMES]


def fill_preset(preset: str) -> list[Any]:
    """Values for all controls when a preset is chosen. Raises RequestError on an unknown one."""
    check_name("preset", preset, PRESETS)
    settings = RunConfig.from_preset(preset).to_dict()
    return fill(
        {name: value for name, value in settings.items() if name not in KEPT_BY_PRESETS or name in PRESETS[preset]}
    )


def fill_again(settings: Mapping[str, Any]) -> list[Any]:
    """Values for all controls from a run of whatever version; what this one refuses leaves the form as it is."""
    try:
        return fill(checked(settings).to_dict())
    except RequestError:
        return fill({})


def settings_of_query(query: Mapping[str, str]) -> dict[str, Any]:
    """A share link's settings, complete and checked; {} when it names none. Raises RequestError."""
    kinds = {name: setting.kind for name, setting in FIELDS.items() if not setting.local}
    kinds |= {"compare": bool}  # of older links
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


def known_models(prior: str, reward: str, fast_decoder: bool) -> dict[str, PriorInfo | DecoderInfo | RewardInfo]:
    """The chosen models by name: of a mixture its members, none while it is still being typed."""
    models: dict[str, PriorInfo | DecoderInfo | RewardInfo] = {}
    if prior in PRIORS or is_hub_id(prior or ""):
        models |= models_of(prior, fast_decoder)
    with contextlib.suppress(RequestError):
        models |= {name: REWARDS[name] for name in reward_terms(reward or "")}
    return models


def model_note(prior: str, reward: str, fast_decoder: bool = False) -> str:
    """HTML: what the chosen models are, licence, download and memory, to be read before anything is downloaded."""
    notes = ""
    for name, info in known_models(prior, reward, fast_decoder).items():
        if all(source.is_folder for source in info.sources):
            size = "included"
        elif is_cached(*info.sources):
            size = "downloaded"
        else:
            size = f"{info.download_mb} MB to download" if info.download_mb else "to be downloaded"
        about = f"{info.about} Licence: {info.licence}; {size}{gpu_memory(info)}."
        notes += f"<p><b>{escape(name)}</b> · {escape(about)}</p>"
    return notes and f'<div class="psd-note">{notes}</div>'


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
        info=f"I accept the licences. {escape(licences)}.",  # gradio shows it as HTML
    )
