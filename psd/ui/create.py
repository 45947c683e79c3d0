"""The Create tab's components: question and settings to the left, results to the right. No events."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from psd.config import FIELDS, MODES, PRESETS
from psd.models.priors.table import PRIORS
from psd.models.rewards.table import EXAMPLE, REWARDS
from psd.modes.pictures import TURNTABLE_FRAMES
from psd.ui.examples import GALLERIES, Example
from psd.ui.form import GROUPS, NAMES, START, control, download_box, model_note
from psd.ui.show import COMPARE, LOOKS, MODELS, MORE, ONWARD, OUTPUTS, SIDES, opening

FRAME_PX = 380  # of the picture, at most, so that scores and plots are in view with it (style.css: --psd-frame)
COPIES = {"link": "Link", "python": "Python", "curl": "curl", "shell": "Command line"}  # page.js writes each
BEGIN = "Start from a picture or an earlier run"
HELP = {
    "preset": "Settings to start from.",
    "prior": "Diffusion model to distil; any Stable Diffusion of the hub can be typed, as org/name.",
    "reward": f"Model whose preference guides; type a mixture such as {EXAMPLE}.",
}


@dataclass(frozen=True)
class Page:
    """What events connect."""

    controls: dict[str, Any]  # of every field of RunConfig, in the order of form.NAMES
    form: dict[str, Any]  # the other components that are pressed or told beside the form
    outputs: dict[str, Any]  # what a run changes, in the order of show.OUTPUTS
    models: dict[str, Any]  # show.MODELS, set by an event of their own, and their look
    galleries: dict[str, Any]  # the visitor's runs and the examples
    shown: list[Example]
    prompts: list[dict[str, Any]]


def build_create(shown: list[Example], prompts: list[dict[str, Any]]) -> Page:
    """style.css lays the three columns out: results to the right, on a phone between the question and settings."""
    with gr.Row(equal_height=False, elem_id="columns"):
        with gr.Column(elem_id="ask", min_width=0):
            asked, form = build_question(prompts)
        with gr.Column(elem_id="results", min_width=0):
            outputs, models = build_results(opening(shown))
            galleries = build_galleries(shown)
        with gr.Column(elem_id="settings", min_width=0):
            chosen, more = build_settings(asked)
            more |= build_sharing()
    controls = {name: {**asked, **chosen}[name] for name in NAMES}
    return Page(controls, {**form, **more}, outputs, models, galleries, shown, prompts)


def html(value: str = "", **options: Any) -> gr.HTML:
    """Our own HTML, styled by style.css alone."""
    return gr.HTML(value, apply_default_css=False, **options)


def build_question(prompts: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What to draw, and Run: (control of each field, the other components)."""
    form: dict[str, Any] = {"token": gr.State("")}  # of the run that is going on; "" between runs
    with gr.Group():
        mode = gr.Radio(
            [(info.label, name) for name, info in MODES.items()], value=START.mode,
            label=FIELDS["mode"].label, show_label=False, elem_id="mode",
        )  # fmt: skip
        prompt = gr.Textbox(
            next((saved["prompt"] for saved in prompts), ""), label="Prompt", lines=2, max_lines=5,
            placeholder="what to draw, such as a blue chair with yellow legs", elem_id="prompt",
        )  # fmt: skip
    with gr.Row(elem_classes="pair"):
        form["run"] = gr.Button("Run", variant="primary", size="lg", elem_id="run", scale=3, min_width=0)
        form["stop"] = gr.Button("Stop", variant="stop", size="lg", elem_id="stop", interactive=False, min_width=0)
    form["estimate"] = html(elem_id="estimate")
    form["prompt_chips"] = gr.Dataset(
        label="Try one", components=[prompt], type="index", elem_id="prompts",
        samples=[[saved["prompt"]] for saved in prompts], samples_per_page=len(prompts) or 1,
    )  # fmt: skip
    # Beside the question: what a run starts from is what it is about.
    with gr.Accordion(BEGIN, open=False, elem_id="begin") as form["begin"]:
        start = control("start")
    return {"mode": mode, "prompt": prompt, "start": start}, form


def build_settings(asked: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """How to draw it but for what is `asked`, the few that matter most in view: (control of each field, the other
    components)."""
    form: dict[str, Any] = {}
    controls: dict[str, Any] = {}
    models = START.prior, START.reward, START.fast_decoder
    with gr.Group():
        controls["preset"] = dropdown("preset", PRESETS)
        targets = [name for name, info in REWARDS.items() if not info.held_out]
        controls["reward"] = dropdown("reward", targets, custom=True)
        form["allow_download"] = gr.Checkbox(**download_box(*models), elem_id="allow_download")
        controls["pref_weight"] = control("pref_weight")
        controls["arms"] = control("arms")
        controls["vary"] = control("vary")
        with gr.Row(elem_classes="pair"):
            controls["seed"] = control("seed")
            controls["images"] = control("images")
        form["randomise"] = gr.Checkbox(
            True, label="Randomise seed", info="The seed used is written back.", elem_id="randomise"
        )
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        # page.js fills the first with what differs from the preset, and searches by the second.
        form["changed"] = html(elem_id="changed")
        html('<input type="search" id="find" placeholder="find a setting" aria-label="Find a setting">')
        form["reset"] = gr.Button("Reset to the preset", size="sm", elem_id="reset")
        for group, title in GROUPS.items():
            with gr.Accordion(title, open=False, visible=group != "object") as form[f"{group}_settings"]:
                if group == "model":
                    controls["prior"] = dropdown("prior", PRIORS, custom=True)
                    form["models"] = html(model_note(*models), elem_id="models_note")
                    controls["negative_prompt"] = control("negative_prompt")
                for name in (name for name in NAMES if FIELDS[name].group == group and name not in (*controls, *asked)):
                    controls[name] = control(name)
    return controls, form


def build_sharing() -> dict[str, Any]:
    """These settings as a link or as code, and a place to drop a result's file."""
    form: dict[str, Any] = {}
    with gr.Accordion("Share and restore", open=False):
        with gr.Row(elem_classes="pair", elem_id="copy"):
            for name, label in COPIES.items():
                form[f"copy_{name}"] = gr.Button(label, size="sm", elem_id=f"copy_{name}", min_width=0)
        form["link"] = gr.Textbox(
            label="These settings", interactive=False, buttons=["copy"], elem_id="link", lines=2, max_lines=12,
            placeholder="appear here, and in the clipboard",
        )  # fmt: skip
        form["restore"] = gr.File(
            label="Restore settings: drop a result PNG, GLB or run.json", file_types=[".png", ".glb", ".json"],
            height=120, elem_id="restore",
        )  # fmt: skip
    return form


def dropdown(name: str, choices: Iterable[str], custom: bool = False) -> gr.Dropdown:
    return gr.Dropdown(
        list(choices), value=getattr(START, name), label=FIELDS[name].label, info=HELP[name], elem_id=name,
        filterable=custom, allow_custom_value=custom,
    )  # fmt: skip


def build_results(first: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Right column: (what a run changes, by the names of OUTPUTS; the viewers of meshes).

    What is looked at stands beside what explains it; `first` is on the page before any run (show.opening).
    """
    outputs: dict[str, Any] = {}

    def opened(name: str) -> dict[str, Any]:
        return {"visible": False, **first.get(name, {})}

    outputs["status"] = html(**first.get("status", {}), elem_id="status")
    with gr.Row(equal_height=False, elem_id="outcome"):
        with gr.Column(elem_id="shown", min_width=0):
            build_frame(outputs, opened)
            outputs["object"], models = build_viewers()
        with gr.Column(elem_id="why", min_width=0):
            outputs["scores"] = html(**first.get("scores", {}), elem_id="scores")
            outputs["charts"] = html(**first.get("charts", {}), elem_id="charts")
        with gr.Column(elem_id="besides", min_width=0):
            build_besides(outputs, opened)
    outputs["gallery"] = html(elem_id="gallery")
    outputs["strips"] = html(**first.get("strips", {}), elem_id="strips")
    with gr.Row(elem_classes="pair"):
        outputs["onward"] = gr.Button(ONWARD, size="sm", elem_id="onward", visible=False, min_width=0)
        outputs["more"] = gr.Button(MORE, size="sm", elem_id="more", visible=False, min_width=0)
    outputs["files"] = html(elem_id="files")
    outputs["directory"] = gr.State(None)
    outputs["looked_at"] = gr.State(())  # the run's folder and the arms under the slider
    return {name: outputs[name] for name in OUTPUTS}, models


def build_frame(outputs: dict[str, Any], opened: Callable[[str], dict[str, Any]]) -> None:
    """One place for the picture: the preview, then two arms under a slider, or one alone."""
    common = dict(interactive=False, buttons=["fullscreen"], elem_classes="picture")
    outputs["preview"] = gr.Image(
        label="Preview", elem_id="preview", visible=not opened("slider")["visible"], **common
    )  # fmt: skip
    outputs["slider"] = gr.ImageSlider(elem_id="slider", max_height=FRAME_PX, **common, **opened("slider"))
    outputs["single"] = gr.Image(elem_id="single", visible=False, **common)


def build_viewers() -> tuple[gr.Group, dict[str, Any]]:
    """Two meshes side by side, and how they look; page.js fills the screen with them: (what holds both, its parts)."""
    models: dict[str, Any] = {}
    with gr.Group(visible=False, elem_id="object") as both:
        with gr.Row(elem_classes="pair", elem_id="looks"):
            models["look"] = gr.Radio(
                [(label, look) for look, label in LOOKS.items()], value=next(iter(LOOKS)), label="Shown as",
                show_label=False, container=False, elem_id="look", min_width=0,
            )  # fmt: skip
            html(f"<button type='button' id='compare'>{COMPARE}</button>", min_width=0)
        with gr.Row(elem_classes="pair", elem_id="models"):
            for name in MODELS:
                models[name] = gr.Model3D(
                    interactive=False, height=236, clear_color=(0.86, 0.88, 0.90, 1.0), min_width=140, elem_id=name
                )
    return both, models


def build_besides(outputs: dict[str, Any], opened: Callable[[str], dict[str, Any]]) -> None:
    """Which arms and from where, the turntables, normals and depth."""
    with gr.Row(visible=False, elem_classes="pair", elem_id="chooser") as outputs["chooser"]:
        for side in SIDES:
            outputs[side] = gr.Dropdown([], label=f"On the {side}", elem_id=side, filterable=False, min_width=0)
    outputs["angle"] = gr.Slider(
        0, 360, 0, step=360 / TURNTABLE_FRAMES, label="Both from the same angle (degrees)", visible=False,
        elem_id="angle",
    )  # fmt: skip
    with gr.Row(elem_classes="pair"):
        for side in SIDES:
            outputs[f"{side}_video"] = gr.Video(
                autoplay=True, loop=True, interactive=False, buttons=[], min_width=140, height=240,
                elem_id=f"{side}_video", **opened(f"{side}_video"),
            )  # fmt: skip
    outputs["views"] = html(elem_id="views")


def build_galleries(shown: list[Example]) -> dict[str, Any]:
    """The visitor's own runs, and the precomputed examples."""
    common = dict(
        height="auto", allow_preview=False, fit_columns=False, object_fit="cover", interactive=False, buttons=[],
        elem_classes="thumbs",
    )  # fmt: skip
    return {
        # Names of runs; in the browser, so that they outlive both the page and the server.
        "history": gr.BrowserState([], storage_key="psd-runs", secret="psd"),
        "runs": gr.Gallery(label="Your runs", columns=6, visible=False, elem_id="history", **common),
        **{
            f"examples_{name}": gr.Gallery(
                [(str(example.thumbnail), example.title) for example in shown if example.gallery == name],
                label=label, columns=4, visible=any(example.gallery == name for example in shown),
                elem_id=f"examples_{name}", **common,
            )
            for name, label in GALLERIES.items()
        },
    }  # fmt: skip
