"""generate(config): the whole product in one loop. START HERE.

RunConfig -> check_request -> download and load the models -> steps of the mode -> a folder, told as events. Every way
out of the loop writes what there is: the end, a budget, a failure, Ctrl-C, closing the generator.
"""

from __future__ import annotations

import logging
import math
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from psd.config import MODES, RunConfig, arms_of
from psd.content import UNCHECKED, is_judged
from psd.contracts import Models, Prior, Reward, Stage
from psd.distil import State, distil
from psd.errors import Abandoned, RequestError, Withheld, is_out_of_memory
from psd.events import Downloading, Finished, Preview, Shown, Started, Step
from psd.methods import METHODS, learns_negative
from psd.models.checker import SafetyChecker, load_checker
from psd.models.hub import OWNER, Access
from psd.models.needs import fetch_models
from psd.models.priors import load_fast_decoder, load_prior
from psd.models.priors.table import decoder_of
from psd.models.rewards import load_on_cpu, load_reward
from psd.models.rewards.table import REWARDS, held_out_rewards, is_mixture, reward_terms
from psd.record import Record
from psd.safety import check_request

log = logging.getLogger(__name__)

MEASURED_STEPS = 25  # rewards of all arms are measured this often in a run, and at every preview
BUDGET_SHARE = 0.9  # of the time budget goes to loading and the loop, the rest to scores and files

Event = Downloading | Started | Step | Preview | Shown | Finished


def generate(
    config: RunConfig,
    output_root: Path | None = None,
    device: str | None = None,
    allow_download: bool = True,
    *,
    access: Access = OWNER,
    uploads: Path | None = None,
    deadline_s: float | None = None,
    stop: Callable[[], str] = lambda: "",
    heard: Callable[[], bool] = lambda: True,
) -> Iterator[Event]:
    """Run `config`; yields Downloading, Started, Steps with Previews, Shown, Finished (psd.events).

    Files go to a new folder under `output_root` ("outputs"). Whoever is no owner may name files below `uploads` alone.
    `deadline_s` ends the loop as the config's own budget does; `stop` is asked after each step, and ends it with the
    sentence that it answers; `heard` is asked after each step and before each file, and where nobody listens any more
    Abandoned is raised. Raises RequestError, with one sentence, before anything heavy for a bad request and while
    loading for missing weights.
    """
    check_request(config, access == OWNER, uploads)
    for downloading in fetch_models(config, allow_download, access):
        if not heard():
            raise Abandoned
        yield downloading
    clock = Clock(config, deadline_s)  # loading counts
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    models, rewards = load(config, device)
    judged = is_judged(config.prior, access == OWNER)
    checker = load_checker(device) if judged else None
    stage: Stage = MODES[config.mode].load()(config, arms_with(config, models.reward), models)
    rewards[config.reward] = measure = measuring(stage)
    record = Record(Path(output_root or "outputs") / uuid.uuid4().hex[:12], config, heard)
    states, stopped, failed = distil(models.prior, stage), "", False
    clock.start()
    try:
        if any(map(learns_negative, arms_of(config).values())) and not models.reward.differentiable:
            record.remarks.append(f"n stayed fixed: reward {models.reward.name} has no gradient that it could follow.")
        warnings = (*warnings_of(config, models.prior), *([UNCHECKED] if judged and not checker else []))
        yield Started(record.directory.name, record.directory, config, tuple(stage.arms), warnings)
        for state in states:
            if state.failure:
                stopped, failed = state.failure, True
                break
            record.pairs.look(state.step, stage.arms)
            yield from told(state, stage, measure, record.rows, clock, checker)
            record.check_heard()
            if state.step < config.steps and (stopped := clock.over(state.step) or stop()):
                break
        seconds = clock.seconds
        record.remarks += unscored(record.rows)
        if checker:
            check_results(checker, stage, record)
        for _ in record.write(stage, rewards, seconds, stopped, failed):
            yield Shown(record.directory)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # what a failed step held: it may be what there was no room for
        stopped, failed = ending(error, len(record.rows), config.steps)
        shown = None if checker or isinstance(error, Abandoned) else stage  # unchecked pictures are not written
        for _ in record.write(shown, {}, clock.seconds, stopped, failed):
            pass  # nobody is told any more
        raise
    finally:
        states.close()
        if device != "cpu":
            torch.cuda.empty_cache()
    yield Finished(
        record.directory.name, record.directory, config, record.arms, len(record.rows), seconds, stopped, failed,
        tuple(record.remarks),
    )  # fmt: skip


class Clock:
    """Seconds of a run, and when they are over."""

    def __init__(self, config: RunConfig, deadline_s: float | None):
        self.called = self.started = self.previewed = time.monotonic()
        budgets = [seconds for seconds in (config.time_budget_s, deadline_s) if seconds]
        self.steps, self.budget_s = config.steps, min(budgets, default=math.inf)

    def start(self) -> None:
        self.started = self.previewed = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the models were loaded."""
        return time.monotonic() - self.started

    def preview_due(self, step: int, every_s: float) -> bool:
        """Whether a preview is to be made now; the first and the last step have one."""
        due = step in (1, self.steps) or time.monotonic() - self.previewed >= every_s
        self.previewed = time.monotonic() if due else self.previewed
        return due

    def over(self, step: int) -> str:
        """Why no further step may begin, one sentence; loading counts, and a tenth is left for the files."""
        if time.monotonic() - self.called <= BUDGET_SHARE * self.budget_s:
            return ""
        return f"The time budget of {self.budget_s:g} s was nearly used: stopped after step {step} of {self.steps}."


def load(config: RunConfig, device: str) -> tuple[Models, dict[str, Reward]]:
    """What the run needs, and the rewards that its results are scored by. Raises RequestError."""
    prior = load_prior(config.prior, device)
    views = prior.views if MODES[config.mode].multi_view else 1
    rewards = load_rewards(config.reward, device, views, config.offload)
    for model in (prior, rewards[config.reward]):
        for part in getattr(model, "text_parts", ()):  # a prior need not have any
            part.to("cpu" if config.offload else device)
    decoder = decoder_of(config.prior, config.fast_decoder)
    decode = load_fast_decoder(decoder, device) if decoder else prior.decode
    return Models(prior, rewards[config.reward], decode), rewards


def warnings_of(config: RunConfig, prior: Prior) -> list[str]:
    """What of the request the prior will not do, one sentence each."""
    read = {"prompt": config.prompt} | ({} if config.negative_from else {"negative prompt": config.negative_prompt})
    warnings = [remark for label, text in read.items() for remark in prior.remarks(text, label)]
    if config.fast_decoder and not decoder_of(config.prior, True):  # another's would decode to noise
        warnings.append(f"fast_decoder: none is known for the latents of {prior.name}, its VAE is used.")
    return warnings


def arms_with(config: RunConfig, reward: Reward) -> dict[str, RunConfig]:
    """The arms' settings; n of none of them learns where the reward has no gradient."""
    arms = arms_of(config)
    return arms if reward.differentiable else {name: replace(arm, negative_lr=0.0) for name, arm in arms.items()}


def load_rewards(target: str, device: str, views: int = 1, offload: bool = False) -> dict[str, Reward]:
    """The target, its members one by one where it is a mixture, and the held-out judges. Raises RequestError.

    `views` is how many of one object the run draws at once. With `offload` the judges are on the CPU, and score
    there.

    A published judge that is damaged or finds no room on the device is left out: nobody asked for it. One of the app's
    own is a fault.
    """
    members = reward_terms(target) if is_mixture(target) else {}
    rewards = {target: load_reward(target, device)} | {name: load_reward(name, device) for name in members}
    for name in held_out_rewards(target, views):
        try:
            rewards[name] = load_on_cpu(name) if offload else load_reward(name, device)
        except Exception as error:
            if REWARDS[name].embedded or not (isinstance(error, RequestError) or is_out_of_memory(error)):
                raise
            log.warning("held-out judge is left out: %s", error)
    return rewards


def measuring(stage: Stage) -> Reward:
    """The reward of curves and scores, one for all arms: the first arm's that ranks, whose mixture has scales."""
    arms = sorted(stage.arms.values(), key=lambda arm: not METHODS[arm.config.method].ranks)
    return arms[0].score.reward


def told(
    state: State,
    stage: Stage,
    reward: Reward,
    rows: list[dict[str, float]],
    clock: Clock,
    checker: SafetyChecker | None,
) -> Iterator[Step | Preview]:
    """The events of a step; its row of metrics.csv is appended to `rows`. Raises Withheld instead of a preview."""
    steps = clock.steps
    preview_due = clock.preview_due(state.step, stage.preview_every_s)
    measured = preview_due or state.step % max(1, steps // MEASURED_STEPS) == 0
    views = stage.views() if measured else {}
    row = metrics_of(state, stage, views, reward)
    rows.append({"step": state.step, **row})
    yield Step(state.step, steps, clock.seconds, clock.seconds / state.step * (steps - state.step), row)
    if preview_due:
        if checker:  # in 3D the step's own renders: the same object as the preview's, and larger
            checker.check(torch.cat(list(views.values())))
        yield Preview(state.step, stage.preview(views))


@torch.no_grad()
def metrics_of(
    state: State, stage: Stage, views: dict[str, Float[Tensor, "V 3 H W"]], reward: Reward
) -> dict[str, float]:
    """One row of metrics.csv: every arm's reward, mean over its views, its terms and what method and stage report.

    The first arm's terms have their plain names, the others' end in the arm's.
    """
    means: dict[str, Float[Tensor, ""]] = {}
    if views:
        prompts = [prompt for name, images in views.items() for prompt in stage.arms[name].score.read(len(images))]
        samples = [len(images) // reward.views for images in views.values()]
        scores = reward(torch.cat(list(views.values())), prompts).split(samples)
        means |= {f"reward_{name}": each.mean() for name, each in zip(views, scores, strict=True)}
    ends = dict(zip(stage.arms, ["", *(f"_{name}" for name in list(stage.arms)[1:])]))
    for name, end in ends.items():
        means |= {f"{term}{end}": value.mean() for term, value in state.terms[name].items()}
    row = {"t": state.t, **dict(zip(means, torch.stack(list(means.values())).tolist() if means else ()))}
    for name, arm in stage.arms.items():
        row |= {f"{what}_{name}": value for what, value in stage.report(name).items()}
        row |= {f"{what}{ends[name]}": value for what, value in arm.method.report().items()}
    return {what: value for what, value in row.items() if value or not what.startswith("unscored")}


def check_results(checker: SafetyChecker, stage: Stage, record: Record) -> None:
    """Raise Withheld unless all passes that the files would show: pictures, or an object from all around, and pairs."""
    for name in stage.arms:
        record.check_heard()
        checker.check(stage.scored(name)[0])
        for moment in record.pairs.arms.get(name, {}).values():
            checker.check(moment.images.flatten(0, 1))


def unscored(rows: list[dict[str, float]]) -> list[str]:
    """A sentence where a noise could not be scored in some step, of whatever arm."""
    count = sum(any(what.startswith("unscored") for what in row) for row in rows)
    if not count:
        return []
    return [f"In {count} of {len(rows)} steps the reward gave a noise no number: it lost its pair."]


def ending(error: BaseException, done: int, steps: int) -> tuple[str, bool]:
    """What to say of a run that did not come to its end, one sentence, and whether it broke down."""
    after = f"after step {done} of {steps}"
    if isinstance(error, (GeneratorExit, Abandoned)):
        return f"Cancelled {after}.", False
    if isinstance(error, Withheld):
        return str(error), False
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return f"Interrupted {after}.", False
    if is_out_of_memory(error):
        return f"Out of memory {after}: choose fewer arms, a smaller image or render size, or a smaller grid.", True
    return f"Failed {after}: {error if isinstance(error, RequestError) else type(error).__name__}.", True
