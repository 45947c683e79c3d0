"""The public endpoints, as plain functions: /generate and /scores.

Stateless: all they need comes in, all they make goes out. `/generate`'s parameters, types and documentation are made
from RunConfig, so that a new field is a new parameter and nothing has to be kept in step by hand. `allow_download`
follows them: a permission, not a setting.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import spaces
import torch

from psd.config import FIELDS
from psd.errors import RequestError
from psd.models.needs import check_downloads
from psd.models.rewards import load_reward
from psd.picture import check_image
from psd.record import read
from psd.safety import check_text, is_below
from psd.ui import files
from psd.ui.estimate import check_work, gpu_seconds
from psd.ui.examples import EXAMPLES
from psd.ui.form import ALLOW_DOWNLOAD_HELP, NAMES, checked, help_line, named, upload
from psd.ui.watch import View, clear_errors, embedded_rewards, watch

# The only parameters with a default of their own; all others default to the preset's value.
API_DEFAULTS = {name: FIELDS[name].default for name in ("prompt", "preset", "seed")}
OUTPUT_HELP = """
Returns:
    preview: latest preview, the arms side by side in their order.
    status: step, steps, seconds, ETA, seed, warnings, metrics of the step, whether it waits for another run, and the
        download if there is one before the first step. In the last item finished is true, stopped says why the run
        ended early ("" if it did not), failed whether it broke down, remarks what could not be made or is not in the
        settings, config all of these, run the name that `start` takes.
    arms: of each arm, in their order, its raw scores (the target reward, a mixture's members, the held-out judges), the
        names of its files by kind (picture; negative, the n that it learned; of an object also glb, views, turntable,
        ply, obj, field), and remarks on them (last item only).
    files: every file of the run, among them metrics.csv and run.json (last item only).
"""


def duration(*values: Any) -> int:
    """Seconds of GPU to reserve; what is wrong with the request is said elsewhere."""
    *settings, _allow_download = values
    try:
        return gpu_seconds(checked(named(settings)))
    except RequestError:
        return 15


def validate(*values: Any) -> list[dict[str, Any]]:
    """Gradio's gate before the queue: a refused request costs neither a place nor GPU seconds."""
    *settings, allow_download = values
    names = (*NAMES, "allow_download")
    blamed, sentence = "", ""
    try:
        config = checked(named(settings))
        check_downloads(config, allow_download)
        check_work(config)
    except RequestError as error:
        sentence, blamed = str(error), error.field if error.field in names else "prompt"
    return [gr.validate(name != blamed, sentence if name == blamed else "") for name in names]


@spaces.GPU(duration=duration)
def generate(*values: Any) -> Iterator[tuple]:
    *settings, allow_download = values
    with clear_errors():
        for view in watch(checked(named(settings)), allow_download):
            yield answer(view)


def answer(view: View) -> tuple:
    """One item of the stream: (preview, status, arms, files)."""
    step = view.step
    status = {
        "step": step.step if step else 0,
        "steps": view.config.steps,
        "elapsed_s": round(step.elapsed_s, 3) if step else 0.0,
        "eta_s": round(step.eta_s, 3) if step else None,
        "seed": view.config.seed,
        "warnings": list(view.warnings),
        "metrics": finite(step.metrics) if step else {},
        "waiting": view.waiting,
        "finished": view.finished,
    }
    if view.download and view.directory is None:
        status["download"] = dataclasses.asdict(view.download)
    preview = str(view.preview) if view.preview else None
    if not view.finished:
        return preview, status, None, None
    result = read(view.directory)
    status |= {
        "stopped": result.stopped, "failed": result.failed, "remarks": list(result.remarks),
        "config": view.config.to_dict(), "run": view.directory.name,
    }  # fmt: skip
    arms = {
        name: {
            "scores": finite(arm.scores), "files": {kind: path.name for kind, path in arm.files.items()},
            "remarks": arm.remarks,
        }
        for name, arm in result.arms.items()
    }  # fmt: skip
    return preview, status, arms, [str(path) for path in result.files]


def finite(numbers: Mapping[str, float]) -> dict[str, float]:
    """JSON has no NaN."""
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def document(function: Any) -> None:
    """Give `function` the signature and docstring that RunConfig implies; clients and MCP read both."""
    parameters, lines = [], []
    for name, field in FIELDS.items():
        kind = field.kind if name in API_DEFAULTS else field.kind | None
        default = API_DEFAULTS.get(name)
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)
        )
        lines.append(f"    {name}: {help_line(name)}")
    parameters.append(
        inspect.Parameter("allow_download", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=False, annotation=bool)
    )
    lines.append(f"    allow_download: {ALLOW_DOWNLOAD_HELP}")
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    function.__doc__ = (
        "Draw a prompt by preference score distillation; every arm on the same seed and the same noises.\n\n"
        "Streams previews and numbers, then everything at once. A parameter left out takes the preset's value.\n\n"
        "Parameters:\n" + "\n".join(lines) + "\n" + OUTPUT_HELP
    )


document(generate)
document(validate)


@spaces.GPU(duration=30)
def scores(image: str | None, prompt: str = "") -> dict[str, float]:
    """Score an image against a prompt with every embedded reward of single pictures.

    Parameters:
        image: PNG, JPEG or WebP picture.
        prompt: What the picture should show.

    Returns:
        Raw score by reward name, higher is better; not comparable between rewards.
    """
    with clear_errors():
        if not image:
            raise RequestError("image is missing: upload a PNG, JPEG or WebP picture.")
        if not isinstance(prompt, str) or not prompt.strip():
            raise RequestError('prompt is empty: say what the picture should show, for example "a red mushroom".')
        check_text("prompt", prompt)
        pixels = torch.from_numpy(check_image(uploaded(image))).permute(2, 0, 1)[None]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.no_grad():
            return {
                name: round(float(load_reward(name, device)(pixels.to(device), [prompt])[0]), 4)
                for name in embedded_rewards()
            }


def uploaded(image: str) -> Path:
    """The path of an upload or of a shipped example. Raises RequestError on every other one, whether it exists or not:
    a request can name any file of this machine."""
    if is_below(image, files.cache_root(), EXAMPLES):
        return Path(image).resolve()
    raise RequestError("image must be an upload: send a PNG, JPEG or WebP picture.")


def picture(**options: Any) -> gr.Image:
    """An image upload that hands on the path unopened: `check_image` reads it with care and refuses in a sentence.

    The method is replaced, not overridden: gradio writes a .pyi file beside every subclass of a component.
    """
    image = gr.Image(**options)
    image.preprocess = lambda payload: payload.path if payload else None
    return image


def bind() -> None:
    """Register both endpoints inside the Blocks being built, on invisible components."""
    inputs = [*map(_input, NAMES), gr.Checkbox(False, label="allow_download", visible=False)]
    outputs = [
        gr.Image(label="preview", visible=False, type="filepath"),
        gr.JSON(label="status", visible=False),
        gr.JSON(label="arms", visible=False),
        gr.File(label="files", visible=False, file_count="multiple"),
    ]
    # preprocess=False: a value of the wrong type reaches check_request, which names it in a sentence.
    gr.Button(visible=False).click(
        generate, inputs, outputs, api_name="generate", validator=validate, preprocess=False,
        concurrency_id="device", concurrency_limit=1, show_progress="hidden",
    )  # fmt: skip


def _input(name: str) -> gr.components.Component:
    field = FIELDS[name]
    common = {"label": name, "value": API_DEFAULTS.get(name), "visible": False}
    if field.local:
        return upload(**common)
    if isinstance(field.default, bool):
        return gr.Checkbox(**common)
    if isinstance(field.default, int):
        return gr.Number(precision=0, **common)
    if isinstance(field.default, float):
        return gr.Number(**common)
    return gr.Textbox(**common)
