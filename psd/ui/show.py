"""What is on the page: a View or a Result -> one update of every output. Computes nothing, and writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from psd.config import MODES, PICTURES, RunConfig, arms_of, is_varied
from psd.errors import RequestError
from psd.events import ArmResult
from psd.record import Result, read
from psd.scene.turntable import read_frame
from psd.ui import parts
from psd.ui.estimate import estimate_s, gpu_seconds, gpu_steps
from psd.ui.examples import Example
from psd.ui.form import arm_label, checked
from psd.ui.strip import strips
from psd.ui.watch import ON_ZERO_GPU, View

SIDES = ("left", "right")  # of the slider, the viewers and the turntables: two arms of any number
MODELS = ("left_model", "right_model")
# What a run changes, in the order of every update below.
OUTPUTS = ("status", "preview", "gallery", "chooser", "left", "right", "slider", "angle", "single", "object",
           "left_video", "right_video", "views", "scores", "files", "charts", "strips", "onward", "more", "directory",
           "looked_at")  # fmt: skip
HIDDEN = {"visible": False}
MORE = "Four more like this"
ONWARD = "Continue from this"
LOOKS = {"solid": "Surface", "wireframe": "Wireframe"}  # of both meshes, by gradio's names
COMPARE = "Full screen"
OPENING = ("slider", "left_video", "right_video")
IDLE = "Ready. Enter a prompt and press Run."


def updates(**changed: Any) -> list[Any]:
    """One value per output, `gr.skip()` where nothing changes; a typo in a name is an error."""
    unknown = changed.keys() - set(OUTPUTS)
    if unknown:
        raise KeyError(f"not an output: {sorted(unknown)}")
    return [changed.get(name, gr.skip()) for name in OUTPUTS]


def told(text: str) -> list[Any]:
    """One sentence in the status line, where there is nothing else to show."""
    return updates(status=parts.status(text, kind="stopped"))


def opening(shown: Sequence[Example]) -> dict[str, dict[str, Any]]:
    """What the page opens with, by the outputs' names: a finished pair of pictures, and one of objects that turn."""
    page: dict[str, dict[str, Any]] = {"status": {"value": parts.status(IDLE, kind="idle")}}
    results = {mode: [read(each.directory) for each in shown if each.gallery == mode] for mode in MODES}
    if not (results["image"] and results["3d"]):
        return page
    picture, turning = results["image"][0], results["3d"][0]
    seen = dict(zip(OUTPUTS, show_end(picture), strict=True))
    turned = of_pair(turning, compared(list(turning.arms)))
    page |= {name: {"value": seen[name]} for name in ("scores", "charts", "strips")}
    page |= {name: dict(given) for name, given in {**turned, "slider": seen["slider"]}.items() if name in OPENING}
    for given in page.values():
        given.pop("__type__", None)
    prompts = " and ".join(f"“{escape(each.settings['prompt'])}”" for each in (picture, turning))
    page["status"] = {"value": parts.status(f"<b>Press Run to draw your own</b><span>{prompts}, drawn before</span>")}
    return page


def show_cleared(config: RunConfig) -> list[Any]:
    """The page before a run."""
    hidden = {name: gr.update(**HIDDEN) for name in ("chooser", "slider", "angle", "single", "onward", "more")}
    hidden |= {f"{side}_video": gr.update(value=None, **HIDDEN) for side in SIDES}
    label = "Preview: " + " | ".join(map(arm_label, arms_of(config)))
    return updates(
        status=parts.status("Waiting for the device…"), preview=gr.update(value=None, visible=True, label=label),
        gallery="", files="", strips="", views="", directory=None, looked_at=(), **hidden,
        # What comes has its place from the start, so that nothing moves when it comes.
        object=gr.update(visible=config.mode == "3d"), scores=parts.scores_so_far((), config),
        charts=parts.charts((), config.steps, config.reward, list(arms_of(config))),
    )  # fmt: skip


def show(view: View) -> list[Any]:
    """A run at one moment; everything that its folder holds once there is something to look at, and at its end."""
    if view.finished or view.shown:
        return show_end(read(view.directory), view.warnings)
    config = view.config
    return updates(
        status=parts.run_status(view),
        preview=str(view.preview) if view.preview else gr.skip(),
        scores=parts.scores_so_far(view.rows, config),
        charts=parts.charts(view.rows, config.steps, config.reward, list(arms_of(config))),
        directory=str(view.directory) if view.directory else gr.skip(),
    )


def shows(views: Iterable[View]) -> Iterator[list[Any]]:
    """`show` of every View that differs from the one before; of a repeated one nothing is sent again."""
    last = None
    for view in views:
        yield updates() if view is last else show_rest(view) if last and last.shown else show(view)
        last = view


def show_rest(view: View) -> list[Any]:
    """The end of a run that is looked at already: what came since, and nothing that a visitor may have turned."""
    result = read(view.directory)
    return updates(status=parts.end_status(result, view.warnings), files=parts.downloads(result))


def show_turntables(looked_at: Sequence[str]) -> list[Any]:
    """Those of the pair: written after what is looked at first, when other arms may have been chosen."""
    shown = of_pair(*shown_pair(looked_at))
    return updates(**{name: value for name, value in shown.items() if name != "slider"})


def show_end(result: Result, warnings: tuple[str, ...] = ()) -> list[Any]:
    """Everything a run's folder holds, whether it came to its end, was stopped, or was computed long ago."""
    seen = {name: arm for name, arm in result.arms.items() if arm.picture}
    pair = compared(list(seen))
    target = str(result.settings.get("reward", ""))
    steps = result.settings.get("steps") or result.steps_done
    choices = [(capital(arm_label(name)), name) for name in seen]
    many, alone, several = len(seen) > 2, len(seen) == 1, any(PICTURES[1] in arm.files for arm in seen.values())
    row = any(map(is_varied, seen)) and not alone
    sides = {side: gr.update(choices=choices, value=name) for side, name in zip(SIDES, pair) if many}
    return updates(
        status=parts.end_status(result, warnings),
        # Without any picture yet, the last preview stays on the page.
        preview=gr.update(**HIDDEN) if seen else gr.skip(),
        gallery=parts.picture_grid(result.arms, result.settings.get("seed", 0)) if many or several or row else "",
        chooser=gr.update(visible=many),
        single=picture(*seen.popitem()) if alone else gr.update(**HIDDEN),
        object=gr.update(visible=any(arm.files.keys() & {"glb", "turntable"} for arm in result.arms.values())),
        scores=parts.score_table({name: arm.scores for name, arm in result.arms.items()}, target),
        files=parts.downloads(result),
        charts=parts.charts(result.rows, steps, target, list(result.arms)) if result.rows else gr.skip(),
        strips=strips(result),
        onward=gr.update(value=ONWARD, visible=bool(pair) and start_kind(result) in result.arms[pair[0]].files),
        more=gr.update(value=MORE, visible=bool(seen) and result.settings.get("mode") == "image"),
        directory=str(result.directory),
        looked_at=(str(result.directory), *pair),
        **sides,
        **of_pair(result, pair),
    )


def start_kind(result: Result) -> str:
    """The kind of file that another run of its mode can start from; "" where there is none."""
    mode = result.settings.get("mode")
    return MODES[mode].start if mode in MODES else ""


def compared(names: Sequence[str]) -> tuple[str, ...]:
    """The two arms that are looked at first: the first one beside the baseline; of one arm itself."""
    if len(names) < 2:
        return tuple(names)
    return names[0], parts.BASELINE if parts.BASELINE in names[1:] else names[-1]


def of_pair(result: Result, pair: Sequence[str]) -> dict[str, Any]:
    """Slider, turntables, their angle, and sheets of views, of two arms or of one."""
    both = len(pair) == 2
    turntables = [result.arms[name].files.get("turntable") for name in pair]
    label = " | ".join(f"{capital(arm_label(name))} ({side})" for name, side in zip(pair, SIDES))
    pictures = tuple(str(result.arms[name].picture) for name in pair)
    videos = {f"{side}_video": gr.update(value=None, **HIDDEN) for side in SIDES}
    for side, name, path in zip(SIDES, pair, turntables):
        if path:
            videos[f"{side}_video"] = gr.update(value=str(path), visible=True, label=f"Turntable, {arm_label(name)}")
    return {
        "slider": gr.update(value=pictures, visible=True, label=label) if both else gr.update(**HIDDEN),
        "angle": gr.update(value=0, visible=both and all(turntables)),
        "views": parts.view_sheets({name: result.arms[name] for name in pair}),
        **videos,
    }


def picture(name: str, arm: ArmResult) -> dict[str, Any]:
    return gr.update(value=str(arm.picture), visible=True, label=capital(arm_label(name)))


def capital(text: str) -> str:
    return text if is_varied(text) else text[:1].upper() + text[1:]


def shown_pair(looked_at: Sequence[str]) -> tuple[Result, Sequence[str]]:
    """The run on the page and the arms that are looked at; none where its files have been tidied away."""
    directory, *pair = looked_at or ("",)
    result = read(Path(directory)) if directory else Result(Path())
    return result, pair if all(name in result.arms and result.arms[name].picture for name in pair) else ()


def show_pair(directory: str | None, left: str, right: str) -> list[Any]:
    """Two other arms under the slider."""
    looked_at = (directory or "", left, right)
    result, pair = shown_pair(looked_at)
    return updates(looked_at=looked_at, **of_pair(result, pair)) if pair else updates()


def show_models(looked_at: Sequence[str], look: str) -> list[Any]:
    """The meshes of the pair. An event of its own: a generator whose last item holds a new mesh blanks the viewers.

    A viewer takes a look (LOOKS) when it loads: for another one `clear_models` comes first.
    """
    result, pair = shown_pair(looked_at)
    changed = [gr.update(value=None, **HIDDEN) for _ in MODELS]
    end = ": drag to turn both" if len(pair) == 2 else ""
    for i, name in enumerate(pair):
        if mesh := result.arms[name].files.get("glb"):
            label = capital(arm_label(name)) + end
            changed[i] = gr.update(
                value=str(mesh), visible=True, camera_position=(None, None, None), label=label, display_mode=look
            )
            end = ""
    return changed


def clear_models() -> list[Any]:
    return [gr.update(value=None) for _ in MODELS]


def show_camera(turned: gr.Model3D) -> dict[str, Any]:
    """The other viewer's camera, by the one that was turned: gradio hands over the component that is asked for."""
    return gr.update(camera_position=turned.camera_position)


def show_angle(looked_at: Sequence[str], angle_deg: float) -> Any:
    """Both objects at an angle of their turntables, side by side under the slider."""
    result, pair = shown_pair(looked_at)
    videos = [result.arms[name].files.get("turntable") for name in pair]
    if len(videos) < 2 or not all(videos):
        return gr.skip()
    return gr.update(value=tuple(read_frame(video, angle_deg / 360) for video in videos))


def show_broken(directory: str | None) -> list[Any]:
    """What a run left that ended with an error: the error itself has been said."""
    if not directory:
        return told("Nothing was made.")
    result = read(Path(directory))
    return show_end(result) if result.settled else told("The run broke down.")


def estimate_of(settings: dict[str, Any]) -> str:
    """The line under Run; empty while the form is not yet valid."""
    try:
        config = checked({**settings, "prompt": settings.get("prompt") or "any"})
    except RequestError:
        return ""
    if not ON_ZERO_GPU:
        return parts.estimate(config, estimate_s(config))
    return parts.estimate(config, estimate_s(config), gpu_seconds(config), gpu_steps(config))
