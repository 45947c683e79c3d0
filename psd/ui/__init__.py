"""The page: components, and which event changes which of them. START at `build_demo`.

Form values -> `form.checked` -> `session.watch` -> one update of all outputs per View. Nothing is computed here.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import spaces

from psd.config import FIELDS, MAX_SEED, PRESETS, RunConfig, arm_names, presets_of
from psd.errors import RequestError
from psd.make_object import TURNTABLE_FRAMES
from psd.models.needs import check_downloads
from psd.models.priors.table import PRIORS
from psd.models.rewards.table import EXAMPLE, REWARDS
from psd.scene.turntable import read_frame
from psd.ui import api, examples, parts
from psd.ui.api import named
from psd.ui.form import (
    GROUPS,
    NAMES,
    checked,
    control,
    copy_link_js,
    download_box,
    fill,
    fill_preset,
    model_note,
    settings_of_file,
    settings_of_query,
)
from psd.ui.session import (
    ON_ZERO_GPU,
    Result,
    View,
    clear_errors,
    estimate_s,
    fetch,
    gpu_seconds,
    gpu_steps,
    load_result,
    note_speed,
    watch,
)

MAX_HISTORY = 12
PAIR = ("with", "without")
STOP_PATIENCE_S = 20.0  # a stopped object's mesh and turntable are still being written
IDLE = "Ready. Enter a prompt and press Run."
DEVICE = {"concurrency_id": "device", "concurrency_limit": 1}
SCROLL_JS = "() => { if (innerWidth < 860) document.querySelector('#results').scrollIntoView({behavior: 'smooth'}); }"
# What a run changes, in the order of every update below.
OUTPUTS = ("status", "preview", "charts", "slider", "angle", "single", "scores", "files", "with_png", "without_png",
           "metrics_csv", "run_json", "object", "with_video", "without_video", "object_files", "directory")  # fmt: skip
MODELS = ("with_model", "without_model")  # set by an event of their own: see `show_models`
# Gradio keeps `camera_position` up to date but has no event for it: while one viewer is being turned, or glides on, its
# hidden button is pressed, and the other viewer takes its camera over.
FOLLOW_JS = """() => {
    let viewer, until, timer;
    const follow = event => {
        const turned = event.target.closest?.('#with_model, #without_model');
        if (!turned || (event.type === 'pointermove' && !event.buttons)) return;
        [viewer, until] = [turned, Date.now() + 1000];
        timer ??= setInterval(() => {
            document.querySelector(`#follow_${viewer.id}`)?.click();
            if (Date.now() > until) timer = clearInterval(timer);
        }, 80);
    };
    for (const type of ['pointermove', 'wheel']) addEventListener(type, follow, {capture: true, passive: true});
}"""


def build_demo() -> gr.Blocks:
    """The whole app. Loads no model; serve it with `launch(**LAUNCH)` of app.py."""
    gr.set_static_paths([examples.EXAMPLES])
    shown = examples.load_examples()
    with gr.Blocks(title="Preference Score Distillation", delete_cache=(1800, 6 * 3600)) as demo:
        html(parts.HEADER)
        with gr.Tabs():
            # style.css lays the three columns out: results to the right, on a phone between the question and settings.
            with gr.Tab("Create", id="create"), gr.Row(equal_height=False, elem_id="columns"):
                with gr.Column(elem_id="ask", min_width=0):
                    asked, form = build_question()
                with gr.Column(elem_id="results", min_width=0):
                    outputs, galleries = build_results(shown)
                with gr.Column(elem_id="settings", min_width=0):
                    chosen, more = build_settings()
            with gr.Tab("Score an image", id="score"):
                build_scores()
            with gr.Tab("API", id="api"):
                build_api()
        api.bind()
        controls = {name: {**asked, **chosen}[name] for name in NAMES}
        connect(demo, controls, {**form, **more}, outputs, galleries, shown)
    return demo


def build_question() -> tuple[dict[str, Any], dict[str, Any]]:
    """What to draw, and Run: (control of each field, the other components)."""
    form: dict[str, Any] = {"prompts": examples.load_prompts()}
    with gr.Group():
        mode = gr.Radio(
            [("Picture", "image"), ("3D object", "3d")], value=FIELDS["mode"].default, label=FIELDS["mode"].label,
            show_label=False, elem_id="mode",
        )  # fmt: skip
        prompt = gr.Textbox(
            label="Prompt", lines=2, max_lines=5, placeholder="a red mushroom with a white stem", elem_id="prompt"
        )
        negative = gr.Textbox(
            label="Negative prompt", placeholder="optional: what to move away from", elem_id="negative_prompt",
            info="The learned negative embedding starts here.",
        )  # fmt: skip
    with gr.Row(elem_classes="pair"):
        form["run"] = gr.Button("Run", variant="primary", size="lg", elem_id="run", scale=3, min_width=0)
        form["stop"] = gr.Button("Stop", variant="stop", size="lg", elem_id="stop", interactive=False, min_width=0)
    form["estimate"] = html(estimate_of({}), elem_id="estimate")
    form["prompt_chips"] = gr.Dataset(
        label="Try one", components=[prompt], type="index", elem_id="prompts",
        samples=[[saved["prompt"]] for saved in form["prompts"]],
    )  # fmt: skip
    return {"mode": mode, "prompt": prompt, "negative_prompt": negative}, form


def build_settings() -> tuple[dict[str, Any], dict[str, Any]]:
    """How to draw it: (control of each field, the other components)."""
    form: dict[str, Any] = {}
    controls: dict[str, Any] = {}
    with gr.Group():
        controls["preset"] = dropdown("preset", PRESETS, "Settings to start from.")
        with gr.Row():
            about = "Diffusion model to distil; any Stable Diffusion of the hub can be typed, as org/name."
            controls["prior"] = dropdown("prior", PRIORS, about, custom=True)
            targets = [name for name, info in REWARDS.items() if not info.held_out]
            controls["reward"] = dropdown(
                "reward", targets, f"Model whose preference guides; type a mixture such as {EXAMPLE}.", custom=True
            )
        defaults = RunConfig()
        form["models"] = gr.Markdown(model_note(defaults.prior, defaults.reward), elem_classes="psd-note", padding=True)
        form["allow_download"] = gr.Checkbox(**download_box(defaults.prior, defaults.reward), elem_id="allow_download")
        with gr.Row():
            controls["seed"] = control("seed")
            form["randomise"] = gr.Checkbox(
                True, label="Randomise seed", info="The seed used is written back.", elem_id="randomise"
            )
        controls["arms"] = control("arms")
    for group, title in GROUPS.items():
        with gr.Accordion(title, open=False, visible=group != "object") as form[f"{group}_settings"]:
            for name in (name for name in NAMES if FIELDS[name].group == group):
                controls[name] = control(name)
    with gr.Accordion("Share and restore", open=False):
        form["copy_link"] = gr.Button("Copy link", size="sm", elem_id="copy_link")
        form["link"] = gr.Textbox(
            label="Link with all settings", interactive=False, buttons=["copy"], elem_id="link",
            placeholder="appears here, and in the clipboard",
        )  # fmt: skip
        form["restore"] = gr.File(
            label="Restore settings: drop a result PNG, GLB or run.json", file_types=[".png", ".glb", ".json"],
            height=120,
            elem_id="restore",
        )  # fmt: skip
    return controls, form


def html(value: str = "", **options: Any) -> gr.HTML:
    """Our own HTML, styled by style.css alone."""
    return gr.HTML(value, apply_default_css=False, **options)


def dropdown(name: str, choices: Iterable[str], info: str, custom: bool = False) -> gr.Dropdown:
    return gr.Dropdown(
        list(choices), value=FIELDS[name].default, label=FIELDS[name].label, info=info, elem_id=name, filterable=custom,
        allow_custom_value=custom,
    )  # fmt: skip


def build_results(shown: list[examples.Example]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Right column: (what a run changes, by the names of OUTPUTS; the galleries)."""
    outputs: dict[str, Any] = {}
    outputs["status"] = html(parts.status(IDLE, kind="idle"), elem_id="status")
    outputs["preview"] = gr.Image(
        label="Preview: with preference | without", interactive=False, buttons=["fullscreen"], elem_id="preview",
        elem_classes="picture",
    )  # fmt: skip
    outputs["slider"] = gr.ImageSlider(
        label="With preference (left) | without (right)", interactive=False, visible=False,
        buttons=["fullscreen"], elem_id="slider", elem_classes="picture", max_height=560,
    )  # fmt: skip
    outputs["angle"] = gr.Slider(
        0, 360, 0, step=360 / TURNTABLE_FRAMES, label="Both from the same angle (degrees)", visible=False,
        elem_id="angle",
    )  # fmt: skip
    outputs["single"] = gr.Image(
        label="With preference", interactive=False, visible=False, buttons=["fullscreen"], elem_id="single",
        elem_classes="picture",
    )  # fmt: skip
    with gr.Group(visible=False, elem_id="object") as outputs["object"]:
        with gr.Row(elem_classes="pair", elem_id="models"):
            for name, text in zip(MODELS, ("With preference: drag to turn both", "Without"), strict=True):
                outputs[name] = gr.Model3D(
                    label=text, interactive=False, height=320, clear_color=(0.86, 0.88, 0.90, 1.0), min_width=140,
                    elem_id=name,
                )  # fmt: skip
        galleries = {f"follow_{name}": gr.Button(visible="hidden", elem_id=f"follow_{name}") for name in MODELS}
        with gr.Row(elem_classes="pair"):
            for name in ("with_video", "without_video"):
                outputs[name] = gr.Video(
                    label="Turntable" if name == "with_video" else "Turntable, without", autoplay=True, loop=True,
                    interactive=False, buttons=[], min_width=140, height=240, elem_id=name,
                )  # fmt: skip
        outputs["object_files"] = gr.Files(label="Meshes, videos, pictures", interactive=False, elem_id="object_files")
    outputs["scores"] = html(elem_id="scores")
    with gr.Row(visible=False, elem_classes="downloads", elem_id="downloads") as outputs["files"]:
        for name, text in (
            ("with_png", "With (PNG)"), ("without_png", "Without (PNG)"),
            ("metrics_csv", "Metrics (CSV)"), ("run_json", "Run (JSON)"),
        ):  # fmt: skip
            outputs[name] = gr.DownloadButton(text, size="sm", min_width=120, elem_id=name)
    outputs["charts"] = html(elem_id="charts")
    outputs["directory"] = gr.State(None)
    galleries["history"] = gr.State([])
    galleries["runs"] = gr.Gallery(
        label="This session's runs", columns=6, height="auto", allow_preview=False,
        fit_columns=False, object_fit="cover", interactive=False, visible=False, buttons=[], elem_id="history",
        elem_classes="thumbs",
    )  # fmt: skip
    galleries["examples"] = gr.Gallery(
        [(str(example.thumbnail), example.title) for example in shown],
        label="Examples: click to see both arms", columns=4, height="auto", allow_preview=False,
        fit_columns=False, object_fit="cover", interactive=False, visible=bool(shown), buttons=[], elem_id="examples",
        elem_classes="thumbs",
    )  # fmt: skip
    galleries |= {name: outputs[name] for name in MODELS}
    return {name: outputs[name] for name in OUTPUTS}, galleries


def build_scores() -> None:
    """The tab of /scores."""
    gr.Markdown("Score any picture against a prompt with every reward that ships with the app. Higher is better.")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            image = api.picture(label="Picture", sources=["upload", "clipboard"], height=300, elem_id="score_image")
            prompt = gr.Textbox(label="What it should show", elem_id="score_prompt")
            score = gr.Button("Score", variant="primary", elem_id="score_run")
        with gr.Column(min_width=300):
            result = gr.JSON(label="Raw scores", elem_id="score_result")
    score.click(api.scores, [image, prompt], result, api_name="scores", **DEVICE)


def build_api() -> None:
    gr.Markdown(
        "`/generate` streams previews and ends with everything; `/scores` rates an uploaded picture. Both are "
        "stateless, and both are MCP tools. The recipes below are run by the tests."
    )
    for title, name, language in (
        ("Python", "api_python.py", "python"),
        ("JavaScript", "api_javascript.mjs", "javascript"),
        ("curl", "api_curl.sh", "shell"),
    ):
        with gr.Accordion(title, open=title == "Python"):
            gr.Code(examples.recipe(name), language=language, interactive=False, show_label=False, wrap_lines=True)
    gr.Markdown("### Parameters of /generate\nA parameter left out takes the value of `preset`.")
    html(parts.parameter_table())


def connect(
    demo: gr.Blocks,
    controls: dict[str, Any],
    form: dict[str, Any],
    outputs: dict[str, Any],
    galleries: dict[str, Any],
    shown: list[examples.Example],
) -> None:
    """All events. Only `run` computes; it is private, the public twin of it is api.generate."""
    inputs, results = list(controls.values()), list(outputs.values())
    private = {"api_visibility": "private"}
    light = {**private, "concurrency_limit": 8, "show_progress": "hidden"}
    run_stop = [form["run"], form["stop"]]
    remember = (remember_run, [outputs["directory"], galleries["history"]], [galleries["history"], galleries["runs"]])

    prepared = gr.on(
        [form["run"].click, controls["prompt"].submit], prepare, [form["randomise"], form["allow_download"], *inputs],
        [controls["seed"], *run_stop, *results], **light,
    )  # fmt: skip
    # On a phone the results are below the form: bring them into view.
    prepared.success(None, js=SCROLL_JS, **private)
    asked = [*inputs, form["allow_download"]]
    fetched = prepared.success(fetch_form, asked, results, **light)
    run = fetched.success(run_form, asked, results, **private, **DEVICE, show_progress="hidden")
    models = (show_models, outputs["directory"], [galleries[name] for name in MODELS])
    chosen = [controls[name] for name in ("prior", "reward", "fast_decoder")]
    notes = [form["models"], form["allow_download"]]
    run.then(idle_buttons, None, run_stop, **light).then(*models, **light).then(*remember, **light).then(
        models_used, chosen, notes, **light
    )
    fetched.failure(idle_buttons, None, run_stop, **light)
    # Gradio cancels only after a click's own function has returned, so the partial result is a second event.
    stopped = form["stop"].click(None, cancels=[fetched, run], **private)
    stopped.then(show_partial, outputs["directory"], results, **light).then(idle_buttons, None, run_stop, **light).then(
        *models, **light
    ).then(*remember, **light)

    outputs["angle"].input(
        same_angle, [outputs["directory"], outputs["angle"]], outputs["slider"], trigger_mode="always_last", **light
    )

    for turned, other in (MODELS, MODELS[::-1]):
        galleries[f"follow_{turned}"].click(
            same_camera, galleries[turned], galleries[other], **private, queue=False, trigger_mode="always_last",
            show_progress="hidden",
        )  # fmt: skip

    controls["preset"].input(fill_preset, controls["preset"], inputs, **light)
    controls["mode"].input(lambda mode: fill_preset(presets_of(mode)[0]), controls["mode"], inputs, **light)
    controls["mode"].change(
        lambda mode: gr.update(visible=mode == "3d"), controls["mode"], form["object_settings"], **light
    )
    gr.on(
        [controls[name].change for name in ("preset", "steps", "prior", "arms", "time_budget_s")],
        lambda *values: estimate_of(named(values)), inputs, form["estimate"],
        trigger_mode="always_last", **light,
    )  # fmt: skip
    gr.on([box.change for box in chosen], models_chosen, chosen, notes, **light)

    restored = [*inputs, form["randomise"]]
    form["prompt_chips"].click(lambda index: fill(form["prompts"][index]), form["prompt_chips"], inputs, **light)
    form["restore"].upload(restore_file, form["restore"], restored, **light)
    form["copy_link"].click(None, inputs, form["link"], js=copy_link_js(), **private)
    demo.load(restore_link, None, restored, **light)
    demo.load(None, js=FOLLOW_JS, **private)

    def show_example(event: gr.SelectData) -> list[Any]:
        return show_again(load_result(shown[event.index].directory))

    def show_run(history: list[str], event: gr.SelectData) -> list[Any]:
        return show_again(load_result(Path(history[event.index])))

    again = [*restored, *results]
    galleries["examples"].select(show_example, None, again, **light).then(*models, **light)
    galleries["runs"].select(show_run, galleries["history"], again, **light).then(*models, **light)


def models_chosen(prior: str, reward: str, fast_decoder: bool) -> list[Any]:
    """Their note and the checkbox of their download: a tick holds for the models it was set for."""
    models = prior, reward, fast_decoder
    return [model_note(*models), gr.update(**download_box(*models))]


def models_used(prior: str, reward: str, fast_decoder: bool) -> list[Any]:
    """The same after a run, which may have downloaded them; after one that failed to, the tick stays."""
    models = prior, reward, fast_decoder
    return [model_note(*models), gr.update(visible=download_box(*models)["visible"])]


def prepare(randomise: bool, allow_download: bool, *values: Any) -> list[Any]:
    """Check the form before the queue, settle the seed, and clear the page for the run. Raises gr.Error."""
    settings = named(values)
    if randomise:
        settings["seed"] = secrets.randbelow(MAX_SEED + 1)
    with clear_errors():
        config = checked(settings)
        check_downloads(config, allow_download)
    cleared = updates(
        status=parts.status("Waiting for the device…"),
        preview=gr.update(value=None, visible=True, label=preview_label(config.arms)),
        slider=gr.update(visible=False),
        angle=gr.update(visible=False),
        single=gr.update(visible=False),
        scores="",
        charts="",
        files=gr.update(visible=False),
        object=gr.update(visible=False),
        directory=None,
    )
    return [config.seed, gr.update(interactive=False), gr.update(interactive=True), *cleared]


def fetch_form(*values: Any) -> Iterator[list[Any]]:
    """Before the run: the downloads that it needs. The last value is `allow_download`."""
    *settings, allow_download = values
    with clear_errors():
        for view in fetch(checked(named(settings)), allow_download):
            yield show(view)


def form_duration(*values: Any) -> int:
    return api.duration(*values)


@spaces.GPU(duration=form_duration)
def run_form(*values: Any) -> Iterator[list[Any]]:
    """The Run button: one update of the page per View. The last value is `allow_download`."""
    *settings, allow_download = values
    with clear_errors():
        for view in watch(checked(named(settings)), allow_download):
            yield show_end(load_result(view.directory), view.warnings) if view.finished else show(view)


def show(view: View) -> list[Any]:
    return updates(
        status=parts.run_status(view),
        preview=str(view.preview) if view.preview else gr.skip(),
        charts=parts.charts(view.rows, view.config.steps, view.config.reward),
        directory=str(view.directory) if view.directory else gr.skip(),
    )


def show_end(result: Result, warnings: tuple[str, ...] = ()) -> list[Any]:
    """Everything a run's folder holds, whether it came to its end, was stopped, or was computed long ago."""
    both = len(result.images) == 2
    one = next(iter(result.images.values()), None)
    done = len(result.rows)
    steps = result.settings.get("steps") or done
    target = str(result.settings.get("reward", ""))
    remarks = (*warnings, result.stopped) if result.stopped else warnings
    headline = "Stopped: the partial result is kept" if result.stopped else "Done"
    share = done / max(steps, 1) if result.stopped else 1.0
    return updates(
        status=parts.end_status(headline, result.settings, result.seconds, remarks, share),
        # Without any image yet, the last preview stays on the page.
        preview=gr.update(visible=False) if one else gr.skip(),
        slider=gr.update(value=(str(result.images["with"]), str(result.images["without"])), visible=True)
        if both
        else gr.update(visible=False),
        angle=gr.update(value=0, visible=both and len(result.videos) == 2),
        single=gr.update(value=str(one), visible=True) if one and not both else gr.update(visible=False),
        scores=parts.score_table(result.scores, target),
        charts=parts.charts(result.rows, steps, target) or gr.skip(),
        files=gr.update(visible=bool(result.files)),
        with_png=download(result, "with.png"),
        without_png=download(result, "without.png"),
        metrics_csv=download(result, "metrics.csv"),
        run_json=download(result, "run.json"),
        object=gr.update(visible=bool(result.models or result.videos)),
        with_video=video(result, "with"),
        without_video=video(result, "without"),
        object_files=[str(path) for path in result.files] if result.videos else gr.skip(),
        directory=str(result.directory),
    )


def download(result: Result, name: str) -> dict[str, Any]:
    path = result.directory / name
    return gr.update(value=str(path), visible=True) if path.exists() else gr.update(visible=False)


def video(result: Result, arm: str) -> dict[str, Any]:
    return gr.update(value=str(result.videos[arm]) if arm in result.videos else None, visible=arm in result.videos)


def show_models(directory: str | None) -> list[Any]:
    """The meshes of the run. An event of its own: a generator whose last item holds a new mesh leaves viewers blank."""
    models = load_result(Path(directory)).models if directory else {}
    return [
        gr.update(
            value=str(models[arm]) if arm in models else None, visible=arm in models, camera_position=(None, None, None)
        )
        for arm in PAIR
    ]


def same_camera(turned: gr.Model3D) -> Any:
    """The other viewer's camera, by the one that was turned."""
    return gr.update(camera_position=turned.camera_position)


def same_angle(directory: str | None, angle_deg: float) -> Any:
    """Both objects at an angle of their turntables, side by side under the slider."""
    videos = load_result(Path(directory)).videos if directory else {}
    if len(videos) < 2:
        return gr.skip()
    return gr.update(value=tuple(read_frame(videos[arm], angle_deg / 360) for arm in PAIR))


def updates(**changed: Any) -> list[Any]:
    """One value per output, `gr.skip()` where nothing changes; a typo in a name is an error."""
    unknown = changed.keys() - set(OUTPUTS)
    if unknown:
        raise KeyError(f"not an output: {sorted(unknown)}")
    return [changed.get(name, gr.skip()) for name in OUTPUTS]


def show_partial(directory: str | None) -> list[Any]:
    """After Stop: what the run's `finally` left in its folder; it may still be writing it."""
    if not directory:
        return updates(status=parts.status("Stopped before the first step.", kind="stopped"))
    give_up = time.monotonic() + STOP_PATIENCE_S
    while not (Path(directory) / "run.json").exists() and time.monotonic() < give_up:
        time.sleep(0.05)
    result = load_result(Path(directory))
    if not result.images:
        return updates(status=parts.status("Stopped before the first step.", kind="stopped"))
    return show_end(result)


def idle_buttons() -> list[Any]:
    return [gr.update(interactive=True), gr.update(interactive=False)]


def remember_run(directory: str | None, history: list[str]) -> tuple[Any, Any]:
    """Newest first; folders that housekeeping removed in the meantime drop out."""
    known = [entry for entry in history if entry != directory]
    folders = [entry for entry in [directory, *known] if entry and load_result(Path(entry)).images][:MAX_HISTORY]
    results = [load_result(Path(folder)) for folder in folders]
    if folders[:1] == [directory]:  # a GPU worker of ZeroGPU cannot tell this process how fast it was
        note_speed(RunConfig.from_dict(results[0].settings), results[0].seconds, len(results[0].rows))
    pictures = [(str(first_image(result)), caption(result)) for result in results]
    return folders, gr.update(value=pictures, visible=bool(pictures))


def first_image(result: Result) -> Path:
    return next(iter(result.images.values()))


def caption(result: Result) -> str:
    return f"seed {result.settings.get('seed', '?')}"


def show_again(result: Result) -> list[Any]:
    """A finished run back on the page, and its settings back in the form."""
    if not result.images:
        raise gr.Error("This run's files have been tidied away; press Run to draw it again.", print_exception=False)
    return [*fill(result.settings), False, *show_end(result)]


def restore_file(path: str | None) -> list[Any]:
    if not path:
        return [gr.skip()] * (len(NAMES) + 1)
    with clear_errors():
        settings = settings_of_file(path)
    gr.Info("Settings restored.")
    return [*fill(settings), False]


def restore_link(request: gr.Request) -> list[Any]:
    """Settings in the page's address fill the form; a link that does not work is named, and the defaults stay."""
    try:
        settings = settings_of_query(dict(request.query_params))
    except RequestError as error:
        gr.Warning(f"The settings in this link cannot be used: {error}")
        settings = {}
    return [*fill(settings), False if settings else gr.skip()]


def preview_label(arms: str) -> str:
    return "Preview: " + " | ".join(arm_names(arms))


def estimate_of(settings: dict[str, Any]) -> str:
    """The line under Run; empty while the form is not yet valid."""
    try:
        config = checked({**settings, "prompt": settings.get("prompt") or "any"})
    except RequestError:
        return ""
    if not ON_ZERO_GPU:
        return parts.estimate(config, estimate_s(config))
    return parts.estimate(config, estimate_s(config), gpu_seconds(config), gpu_steps(config))
