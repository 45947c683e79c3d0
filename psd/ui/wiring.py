"""Which event changes what. Only a run computes: `run_form`, private; the public twin of it is api.generate."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import spaces

from psd.config import MAX_SEED, RunConfig, presets_of, seeds_of
from psd.errors import RequestError
from psd.models.needs import check_downloads
from psd.record import Result, read, settings_of, start_of
from psd.sculpted import read_sculpted
from psd.ui import api
from psd.ui.create import COPIES, Page
from psd.ui.estimate import check_work, note_speed
from psd.ui.examples import GALLERIES, Example
from psd.ui.files import is_asked_to_stop, run_folder
from psd.ui.form import (
    NAMES,
    arm_label,
    checked,
    download_box,
    fill,
    fill_again,
    fill_preset,
    model_note,
    named,
    settings_of_query,
)
from psd.ui.show import (
    MODELS,
    SIDES,
    clear_models,
    estimate_of,
    show,
    show_angle,
    show_broken,
    show_camera,
    show_cleared,
    show_end,
    show_models,
    show_pair,
    show_turntables,
    shown_pair,
    shows,
    updates,
)
from psd.ui.watch import clear_errors, fetch, stop, watch

MAX_HISTORY = 30
MAX_WAITING = 16
CONTINUED_T_MAX = 0.5  # of a run that goes on from another: what is there stays recognisable
PRIVATE = {"api_visibility": "private"}
LIGHT = {**PRIVATE, "concurrency_limit": 8, "show_progress": "hidden"}


def connect(demo: gr.Blocks, header: gr.HTML, page: Page) -> None:
    """All events of the Create tab."""
    connect_run(page)
    connect_form(demo, page)
    connect_results(demo, header, page)


def connect_run(page: Page) -> None:
    """Run and Stop."""
    form, galleries, directory = page.form, page.galleries, page.outputs["directory"]
    inputs, results = list(page.controls.values()), list(page.outputs.values())
    buttons = [form["run"], form["stop"], form["token"]]
    asked = [*inputs, form["allow_download"]]
    # Unprocessed: gradio's own word on a number out of bounds does not say which one.
    accepted = gr.on(
        [form["run"].click, page.controls["prompt"].submit], check_form, asked, preprocess=False, **LIGHT
    )  # fmt: skip
    prepared = accepted.success(
        prepare, [form["token"], form["randomise"], *asked], [page.controls["seed"], *buttons, *results], **LIGHT
    )
    prepared.success(None, js="() => psd.scroll()", **PRIVATE)
    fetched = prepared.success(fetch_form, [form["token"], *asked], results, **LIGHT)
    # More at once than the device takes: `watch` waits for it, and says so, and can be stopped there.
    run = fetched.success(
        run_form, [form["token"], *asked], results, **PRIVATE, concurrency_limit=MAX_WAITING, show_progress="hidden"
    )
    form["stop"].click(stop_run, form["token"], form["stop"], queue=False, **PRIVATE, show_progress="hidden")

    remember = (remember_run, [directory, galleries["history"]], [galleries["history"], galleries["runs"]])
    chosen = [page.controls[name] for name in ("prior", "reward", "fast_decoder")]
    notes = (models_used, chosen, [form["models"], form["allow_download"]])
    ended = run.success(idle, None, buttons, **LIGHT).then(show_turntables, page.outputs["looked_at"], results, **LIGHT)
    broken = run.failure(show_broken, directory, results, **LIGHT).then(idle, None, buttons, **LIGHT)
    fetched.failure(show_broken, directory, results, **LIGHT).then(idle, None, buttons, **LIGHT)
    estimate = (lambda *values: estimate_of(named(values)), inputs, form["estimate"])
    for end in (ended, broken):
        end.then(*remember, **LIGHT).then(*notes, **LIGHT).then(*estimate, preprocess=False, **LIGHT)


def connect_form(demo: gr.Blocks, page: Page) -> None:
    """What settings do to each other, and the ways that they come in and go out."""
    form, controls = page.form, page.controls
    inputs = list(controls.values())
    controls["preset"].input(choose_preset, controls["preset"], inputs, **LIGHT)
    controls["mode"].input(choose_mode, controls["mode"], inputs, **LIGHT)
    controls["mode"].change(
        lambda mode: gr.update(visible=mode == "3d"), controls["mode"], form["object_settings"], **LIGHT
    )
    gr.on(
        [demo.load, *(controls[name].change for name in ("preset", "steps", "prior", "arms", "vary", "time_budget_s"))],
        lambda *values: estimate_of(named(values)), inputs, form["estimate"], preprocess=False,
        trigger_mode="always_last", **LIGHT,
    )  # fmt: skip
    chosen = [controls[name] for name in ("prior", "reward", "fast_decoder")]
    gr.on([box.change for box in chosen], models_chosen, chosen, [form["models"], form["allow_download"]], **LIGHT)

    restored = [*inputs, form["randomise"]]
    form["prompt_chips"].click(lambda index: fill(page.prompts[index]), form["prompt_chips"], inputs, **LIGHT)
    form["restore"].upload(restore_file, form["restore"], restored, **LIGHT)
    for name in COPIES:
        form[f"copy_{name}"].click(
            None, inputs, form["link"], js=f"(...values) => psd.copy('{name}', ...values)", **PRIVATE
        )  # fmt: skip
    # No request to the server: the page knows the presets.
    gr.on(
        [demo.load, *(each.change for each in inputs)], None, inputs, form["changed"],
        js="(...values) => psd.changed(...values)", trigger_mode="always_last", **PRIVATE,
    )  # fmt: skip
    form["reset"].click(choose_preset, controls["preset"], inputs, **LIGHT)
    demo.load(restore_link, None, [*restored, *page.outputs.values()], **LIGHT)


def connect_results(demo: gr.Blocks, header: gr.HTML, page: Page) -> None:
    """Looking at what is there: other arms, other angles, other runs."""
    outputs, galleries = page.outputs, page.galleries
    results = list(outputs.values())
    directory, looked_at = outputs["directory"], outputs["looked_at"]
    gr.on(
        [outputs[side].input for side in SIDES], show_pair, [directory, *(outputs[side] for side in SIDES)], results,
        **LIGHT,
    )  # fmt: skip
    # Of whatever was put on the page: while a run still writes its last files, its meshes can be turned.
    viewers, look = [page.models[name] for name in MODELS], page.models["look"]
    looked_at.change(show_models, [looked_at, look], viewers, **LIGHT)
    look.input(clear_models, None, viewers, **LIGHT).then(show_models, [looked_at, look], viewers, **LIGHT)
    outputs["angle"].input(
        show_angle, [looked_at, outputs["angle"]], outputs["slider"], trigger_mode="always_last", **LIGHT
    )
    turned = dict(zip(MODELS, (header.left_turned, header.right_turned)))
    for one, other in (MODELS, MODELS[::-1]):
        turned[one](
            show_camera, page.models[one], page.models[other], **PRIVATE, queue=False, trigger_mode="always_last",
            show_progress="hidden",
        )  # fmt: skip

    drawn = [page.controls["seed"], page.controls["images"]]
    more = outputs["more"].click(four_more, drawn, [*drawn, page.form["randomise"]], **LIGHT)
    more.then(None, js="() => document.querySelector('#run').click()", **PRIVATE)
    outputs["onward"].click(continue_from, looked_at, [*page.controls.values(), page.form["begin"]], **LIGHT)

    def show_from(examples: list[Example]) -> Callable[[gr.SelectData], list[Any]]:
        def show_example(event: gr.SelectData) -> list[Any]:
            return show_again(read(examples[event.index].directory), examples[event.index].note)

        return show_example

    def show_run(history: list[str], event: gr.SelectData) -> list[Any]:
        return show_again(read(run_folder(history[event.index]) or Path()))

    again = [*page.controls.values(), page.form["randomise"], *results]
    for name in GALLERIES:
        examples = [each for each in page.shown if each.gallery == name]
        galleries[f"examples_{name}"].select(show_from(examples), None, again, **LIGHT)
    galleries["runs"].select(show_run, galleries["history"], again, **LIGHT)
    demo.load(recall_runs, galleries["history"], [galleries["history"], galleries["runs"]], **LIGHT)


def check_form(*values: Any) -> None:
    """Refuse before the queue what cannot run; the last value is `allow_download`. Raises gr.Error."""
    *settings, allow_download = values
    with clear_errors():
        config = checked(named(settings))
        check_work(config)
        check_downloads(config, allow_download)


def prepare(token: str, randomise: bool, *values: Any) -> list[Any]:
    """Settle the seed, and clear the page for the run. Raises gr.Error while another one of this page goes on."""
    *settings, _allow_download = values
    with clear_errors():
        if token:
            raise RequestError("A run is going on: wait for its end, or stop it first.")
        config = checked(named(settings))
    if randomise:
        config = replace(config, seed=secrets.randbelow(MAX_SEED + 1))
    running = [gr.update(interactive=False), gr.update(interactive=True), secrets.token_hex(8)]
    return [config.seed, *running, *show_cleared(config)]


def fetch_form(token: str, *values: Any) -> Iterator[list[Any]]:
    """Before the run: the downloads that it needs, until `stop(token)`. The last value is `allow_download`."""
    *settings, allow_download = values
    with clear_errors():
        for view in fetch(checked(named(settings)), allow_download):
            if is_asked_to_stop(token):
                raise RequestError("Stopped before the first step.")
            yield show(view)


@spaces.GPU(duration=lambda token, *values: api.duration(*values))
def run_form(token: str, *values: Any) -> Iterator[list[Any]]:
    """The Run button: one update of the page per View, until `stop(token)`. The last value is `allow_download`."""
    *settings, allow_download = values
    with clear_errors():
        yield from shows(watch(checked(named(settings)), allow_download, token))


def stop_run(token: str) -> dict[str, Any]:
    """Ask the run to end after its step: its own stream then shows what there is."""
    stop(token)
    return gr.update(value="Stopping…", interactive=False)


def idle() -> list[Any]:
    """The buttons between runs, and no token."""
    return [gr.update(interactive=True), gr.update(value="Stop", interactive=False), ""]


def four_more(seed: int, images: int) -> tuple[int, int, bool]:
    """The next four seeds after those on the page, and no random one."""
    return seeds_of(int(seed), int(images) + 1)[-1], 4, False


def continue_from(looked_at: Sequence[str]) -> list[Any]:
    """The form goes on from the arm on the left: its file, its mode, and a noise that leaves it recognisable.

    Raises gr.Error where its files have been tidied away.
    """
    result, pair = shown_pair(looked_at)
    with clear_errors():
        if not pair:
            raise RequestError("This run's files have been tidied away; press Run to draw it again.")
        path = start_of(result.directory, result.settings["mode"], pair[0])
        settings = {"start": str(path), "mode": result.settings["mode"], "t_max": CONTINUED_T_MAX}
        if settings["mode"] == "3d":
            given = read_sculpted(path)
            settings |= {"field": given.kind}
            settings |= {"grid_size": given.resolution} if given.kind == "voxels" else {}
    gr.Info(f"Run goes on from “{arm_label(pair[0])}”: change the prompt, the reward or a setting, then press Run.")
    return [*fill(settings), gr.update(open=True)]


def choose_preset(preset: str) -> list[Any]:
    with clear_errors():
        return fill_preset(preset)


def choose_mode(mode: str) -> list[Any]:
    return choose_preset(presets_of(mode)[0])


def models_chosen(prior: str, reward: str, fast_decoder: bool) -> list[Any]:
    """Their note and the checkbox of their download: a tick holds for the models it was set for."""
    models = prior, reward, fast_decoder
    return [model_note(*models), gr.update(**download_box(*models))]


def models_used(prior: str, reward: str, fast_decoder: bool) -> list[Any]:
    """The same after a run, which may have downloaded them; after one that failed to, the tick stays."""
    models = prior, reward, fast_decoder
    return [model_note(*models), gr.update(visible=download_box(*models)["visible"])]


def remember_run(directory: str | None, history: Any) -> tuple[list[str], Any]:
    """Newest first."""
    if directory and (newest := read(Path(directory))).settled:
        # A GPU worker of ZeroGPU cannot tell this process how fast it was.
        note_speed(RunConfig.from_dict(newest.settings), newest.seconds, newest.steps_done)
    known = history if isinstance(history, list) else []
    return recall_runs([Path(directory).name, *known] if directory else known)


def recall_runs(history: Any) -> tuple[list[str], Any]:
    """Those whose files are still there, and their pictures; the browser may send anything."""
    names = list(dict.fromkeys(name for name in history if run_folder(name))) if isinstance(history, list) else []
    results = [result for name in names if thumbnail(result := read(run_folder(name) or Path()))][:MAX_HISTORY]
    pictures = [(str(thumbnail(result)), f"seed {result.settings.get('seed', '?')}") for result in results]
    return [result.directory.name for result in results], gr.update(value=pictures, visible=bool(pictures))


def thumbnail(result: Result) -> Path | None:
    """The first picture that there is."""
    return next((arm.picture for arm in result.arms.values() if arm.picture), None)


def show_again(result: Result, note: str = "") -> list[Any]:
    """A finished run back on the page, with what to look at, and its settings back in the form."""
    if not thumbnail(result):
        raise gr.Error("This run's files have been tidied away; press Run to draw it again.", print_exception=False)
    return [*fill_again(result.settings), False, *show_end(result, (note,) if note else ())]


def restore_file(path: str | None) -> list[Any]:
    """The settings of a dropped file fill the form. Raises gr.Error."""
    if not path:
        return [gr.skip()] * (len(NAMES) + 1)
    with clear_errors():
        found = settings_of(Path(path))
        settings = checked(found).to_dict()
    more = " The file that n started from is not in them: drop it again." if found.get("negative_from_sha256") else ""
    more += " What it started from is not in them: drop it again." if found.get("start_sha256") else ""
    gr.Info(f"Settings restored.{more}")
    return [*fill(settings), False]


def restore_link(request: gr.Request) -> list[Any]:
    """What the page's address names: a run, which is shown again, or settings, which fill the form.

    A link that does not work is named, and the page stays as it is.
    """
    query = dict(request.query_params)
    if folder := run_folder(query.get("run")):
        return show_again(read(folder))
    if "run" in query:
        gr.Warning("The files of the run in this link have been tidied away.")
    settings = {}
    try:
        settings = settings_of_query(query)
    except RequestError as error:
        gr.Warning(f"The settings in this link cannot be used: {escape(str(error))}")  # gradio shows it as HTML
    return [*fill(settings), False if settings else gr.skip(), *updates()]
