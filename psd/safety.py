"""Everything that is refused, before anything heavy runs; one actionable sentence per refusal.

`check_request` is the single gate of form, API and command line: types, bounds and choices come from the field
metadata of config.py, the rules between fields stand here. Loads no torch, diffusers or gradio.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path

from psd.config import (
    ARMS,
    FIELDS,
    MAX_PROMPT_CHARS,
    MODES,
    PRESETS,
    VARY_EXAMPLE,
    RunConfig,
    Setting,
    arms_of,
    listed,
    varied,
    varied_name,
)
from psd.content import check_prompt, is_judged
from psd.embedding import read_embedding
from psd.errors import RequestError, shown, some_of, unknown_name
from psd.methods import METHODS
from psd.models.hub import is_hub_id
from psd.models.priors.table import PRIORS, prior_info
from psd.models.rewards.table import is_differentiable, is_mixture, joint_views
from psd.picture import check_image
from psd.sculpted import read_sculpted

MAX_ARMS = 6
MAX_IMAGE_STEPS = 1000  # of the noise schedule: more would repeat timesteps

TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


# What the settings may name that code adds to; for prior and reward more than a name will do.
TABLES: dict[str, Collection[str]] = {"preset": PRESETS, "mode": MODES, "method": METHODS}


def check_request(config: RunConfig, allow_local: bool = False, uploads: Path | None = None) -> None:
    """Raise RequestError on the first thing in `config` that would make the run fail or mean nothing.

    `allow_local` admits files and folders of this machine. It is for callers who own the machine (command line,
    Python); over the network it would let a stranger make the server read any path, who may name files below `uploads`
    alone. Weights are not opened here: the loaders report a missing or corrupted file, also as RequestError.
    """
    for name, setting in FIELDS.items():
        check_field(setting, getattr(config, name))
    if not config.prompt.strip():
        raise RequestError(
            'prompt is empty: say what to draw, for example "a red mushroom with a white stem".', "prompt"
        )
    for name, table in TABLES.items():
        check_name(name, getattr(config, name), table)
    check_arms(config)
    check_vary(config)
    check_models(config, allow_local)
    if is_judged(config.prior, owner=allow_local):
        check_prompt(config.prompt)
    check_negative(config, allow_local, uploads)
    check_start(config, allow_local, uploads)
    for arm in arms_of(config).values():
        check_mode(arm)
    check_reward(config)
    if config.t_min >= config.t_max:
        raise RequestError(
            f"t_min must be below t_max, got t_min = {config.t_min} and t_max = {config.t_max}.", "t_min"
        )
    if config.time_shift_low > config.time_shift_high:
        raise RequestError(
            "time_shift_low must not be above time_shift_high, "
            f"got {config.time_shift_low} and {config.time_shift_high}.",
            "time_shift_low",
        )
    if config.mode == "3d" and config.t_max_end < config.t_min:
        raise RequestError(
            f"t_max_end must not be below t_min, got t_max_end = {config.t_max_end} and t_min = {config.t_min}.",
            "t_max_end",
        )
    if config.image_size % 64:
        raise RequestError(
            f"image_size must be a multiple of 64 (or 0 for the prior's own), got {config.image_size}; "
            f"try {64 * round(config.image_size / 64) or 64}.",
            "image_size",
        )


def check_field(setting: Setting, value: object) -> None:
    """Type, choices and bounds of one setting, as FIELDS states them. Raises RequestError."""
    name, kind = setting.name, setting.kind
    # bool is a subclass of int, and every int is a fine float: say what is meant, not what isinstance says.
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise RequestError(f"{name} must be {TYPE_NAMES[kind]}{allowed(setting)}, got {shown(value)}.", name)
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"{name} must be a finite number{allowed(setting)}, got {value}.", name)
    if setting.low is not None and not setting.low <= value <= setting.high:
        raise RequestError(f"{name} must be {TYPE_NAMES[kind]}{allowed(setting)}, got {shown(value)}.", name)
    if setting.choices:
        check_name(name, value, setting.choices)
    elif isinstance(value, str):
        check_text(name, value)


def check_text(name: str, text: str) -> None:
    """Length and characters of free text; tabs and line breaks pass, tokenizers read them as spaces."""
    if len(text) > MAX_PROMPT_CHARS:
        raise RequestError(
            f"{name} has {len(text)} characters, at most {MAX_PROMPT_CHARS} are allowed: "
            "shorten it (the model reads only the first few dozen words).",
            name,
        )
    for position, char in enumerate(text, start=1):
        # Cc: control characters; Cs: half a surrogate pair, which neither a tokenizer nor a file can encode.
        if unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n\r":
            raise RequestError(
                f"{name} has the control character U+{ord(char):04X} at position {position}: remove it.", name
            )


def check_name(field: str, name: str, known: Iterable[str]) -> None:
    """Raise RequestError unless `name` is one of `known`, with the nearest known names first."""
    if name not in known:
        raise RequestError(unknown_name(field, name, known), field)


def check_arms(config: RunConfig) -> None:
    """The arms are rows of ARMS, each named once; none need be where a setting varies."""
    names = listed(config.arms)
    if not names and not config.vary.strip():
        raise RequestError('arms is empty: name what to run, for example "with, without".', "arms")
    for name in names:
        check_name("arms", name, ARMS)
        if names.count(name) > 1:
            raise RequestError(f"arms names {name} twice: give it once.", "arms")


def check_vary(config: RunConfig) -> None:
    """What varies is a number that each arm may have its own of; each of its values is allowed, and given once."""
    if not config.vary.strip():
        return
    name, values = varied(config.vary)
    own = [each.name for each in FIELDS.values() if each.varies in ("any", config.mode)]
    if name in FIELDS and name not in own:
        shared = f"of which no arm has its own in mode {config.mode}"
        why = shared if FIELDS[name].kind in (int, float) else "which is no number"
        raise RequestError(f"vary cannot take {name}, {why}: choose one of {', '.join(own)}.", "vary")
    check_name("vary", name, own)
    if not values:
        raise RequestError(f"vary gives {name} no values: write for example {VARY_EXAMPLE!r}.", "vary")
    taken: set[str] = set()
    for text in values:
        try:
            value = FIELDS[name].kind(text)
            check_field(FIELDS[name], value)
        except ValueError as error:  # a RequestError is one, too
            kind, bounds = TYPE_NAMES[FIELDS[name].kind], allowed(FIELDS[name])
            raise RequestError(f"vary needs each {name} to be {kind}{bounds}, got {shown(text)}.", "vary") from error
        if varied_name(name, value) in taken:
            raise RequestError(f"vary gives {varied_name(name, value)} twice: give it once.", "vary")
        taken.add(varied_name(name, value))
    if (count := len(listed(config.arms)) + len(values)) > MAX_ARMS:
        raise RequestError(
            f"vary makes it {count} arms, at most {MAX_ARMS} are allowed: give fewer values, or compare fewer arms.",
            "vary",
        )


def check_models(config: RunConfig, allow_local: bool) -> None:
    """A prior is a name of our table, a hub id or, if allowed, a folder."""
    prior, otherwise = config.prior, ", or a hub id like org/name"
    if prior in PRIORS or is_hub_id(prior):
        return
    if not (os.path.exists(prior) or prior.startswith(("/", ".", "~")) or prior.count("/") > 1):
        raise RequestError(unknown_name("prior", prior, PRIORS, otherwise), "prior")
    if not allow_local:
        raise RequestError(
            f"prior {shown(prior)} is a path, which only the command line may use; "
            f"choose one of {', '.join(PRIORS)}{otherwise}.",
            "prior",
        )
    if not os.path.isfile(os.path.join(os.path.expanduser(prior), "model_index.json")):
        raise RequestError(
            f"prior {shown(prior)} is not a diffusers folder (no model_index.json in it); "
            f"give such a folder, one of {', '.join(PRIORS)}{otherwise}.",
            "prior",
        )


def check_reward(config: RunConfig) -> None:
    """A reward is a name of our table or a mixture of them, sees what the prior draws, and has the gradient needed.

    The scales of a mixture's members are learned from the pairs that the method ranks.
    """
    methods = {arm.method: METHODS[arm.method] for arm in arms_of(config).values()}
    if is_mixture(config.reward) and not any(method.ranks for method in methods.values()):
        raise RequestError(
            "reward is a mixture, weighed by the pairs that a method ranks, and no arm here ranks any: "
            "choose method psd, or a single reward.",
            "reward",
        )
    views = joint_views(config.reward)
    drawn = prior_info(config.prior).views if MODES[config.mode].multi_view else 1
    if views not in (1, drawn):
        instead = f"this prior draws {drawn}" if drawn > 1 else f"mode {config.mode} has single pictures"
        raise RequestError(
            f"reward {shown(config.reward)} judges {views} views of one object together, and {instead}: "
            "choose a reward of single pictures.",
            "reward",
        )
    climbing = [name for name, method in methods.items() if method.climbs]
    if climbing and not is_differentiable(config.reward):
        raise RequestError(
            f"reward {shown(config.reward)} has no gradient, which method {climbing[0]} follows: "
            "choose another reward, or a method that ranks.",
            "reward",
        )


def check_negative(config: RunConfig, allow_local: bool, uploads: Path | None) -> None:
    """The file that n starts from is there and holds one; whether its prior reads it is known once that is loaded."""
    if not config.negative_from:
        return
    if not allow_local and not (uploads and is_below(config.negative_from, uploads)):
        raise RequestError(
            "negative_from must be an upload: send an ARM_negative.safetensors that a run has written.", "negative_from"
        )
    read_embedding(config.negative_from)


def check_start(config: RunConfig, allow_local: bool, uploads: Path | None) -> None:
    """What the run starts from is there and can be read, and is what its mode makes."""
    if not config.start:
        return
    kind = MODES[config.mode].start
    if not kind:
        raise RequestError(f"start is for pictures and objects, got mode {config.mode}: leave it out.", "start")
    if not allow_local and not (uploads and is_below(config.start, uploads)):
        what = "a PNG, JPEG or WebP picture" if kind == "picture" else "an ARM_field.safetensors"
        raise RequestError(f"start must be an upload or a run of this server: send {what}, or its name.", "start")
    if kind == "picture":
        check_image(config.start)
        return
    given = read_sculpted(config.start)
    if given.kind != config.field:
        raise RequestError(f"start holds a field of kind {given.kind}, got {config.field}: choose that one.", "field")
    if config.field == "voxels" and given.resolution > config.grid_size:
        raise RequestError(
            f"start holds a grid of {given.resolution} voxels a side, got grid_size {config.grid_size}: set it to "
            f"{given.resolution}.",
            "grid_size",
        )


def is_below(path: str | Path, *folders: Path) -> bool:
    """Whether a path, with its links followed, lies in one of these folders; it need not be there."""
    try:
        found = Path(path).resolve()
        return any(found.is_relative_to(folder.resolve()) for folder in folders)
    except (OSError, ValueError, TypeError, RuntimeError):
        return False


def check_mode(config: RunConfig) -> None:
    """An object needs a prior that sees several views at once; an image is drawn in its timesteps, not more."""
    if MODES[config.mode].multi_view and prior_info(config.prior).views == 1:
        suited = ", ".join(name for name, info in PRIORS.items() if info.views > 1)
        raise RequestError(
            f"prior {shown(config.prior)} draws single pictures: "
            f"for mode {config.mode} choose {suited} or a local multi-view folder.",
            "prior",
        )
    if METHODS[config.method].samples and not MODES[config.mode].multi_view:
        raise RequestError(
            f"method {config.method} draws several views at once, got mode {config.mode}: choose mode 3d, or method "
            "sds, which is DDIM in mode image.",
            "method",
        )
    if config.mode == "3d" and config.images > 1:
        raise RequestError(f"images must be 1 in mode 3d, got {config.images}: an object takes a run.", "images")
    if config.mode == "image" and config.steps > MAX_IMAGE_STEPS:
        raise RequestError(
            f"steps must be a whole number from 2 to {MAX_IMAGE_STEPS} in mode image, got {config.steps}.", "steps"
        )
    if config.mode == "3d" and config.lambda_rgb and config.weighting != "recon":
        raise RequestError(
            f"lambda_rgb compares renders with the x0-hat that weighting recon reconstructs, got {config.weighting}: "
            "choose weighting recon, or set lambda_rgb to 0.",
            "lambda_rgb",
        )
    for name in ("render_size", "grid_size"):
        least, end = getattr(config, name), getattr(config, f"{name}_end")
        if end and end < least:
            raise RequestError(f"{name}_end must be 0 or at least {name} = {least}, got {end}.", f"{name}_end")


def names_of(setting: Setting) -> tuple[str, ...]:
    """All that a setting may be, where it is one of some names."""
    return setting.choices or tuple(TABLES.get(setting.name, ()))


def allowed(setting: Setting) -> str:
    """What a setting may be, for the end of a sentence: " from 2 to 1000", " (one of ddim, adam)" or nothing."""
    if choices := names_of(setting):
        return f" (one of {some_of(choices)})"
    if setting.low is not None:
        return f" from {setting.low:g} to {setting.high:.10g}"
    return ""
