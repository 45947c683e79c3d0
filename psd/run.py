"""generate(config): the whole product in one loop. START HERE.

RunConfig -> check_request -> download and load the models -> steps of the mode -> scores and files, told as events.
Closing the generator cancels the run: its last state is exported and its memory freed.
"""

from __future__ import annotations

import logging
import platform
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

import psd
from psd.config import RunConfig, arms_of
from psd.contracts import Reward
from psd.errors import RequestError, is_out_of_memory
from psd.events import Finished, Preview, Started, Step
from psd.export import export_json, export_metrics
from psd.image import ImageStep
from psd.make_image import MakeImage
from psd.make_object import MakeObject
from psd.models.hub import OWNER, Access
from psd.models.needs import fetch_models
from psd.models.priors import load_fast_decoder, load_prior
from psd.models.priors.table import prior_info
from psd.models.rewards import load_reward
from psd.models.rewards.mixture import Mixture
from psd.models.rewards.table import REWARDS, held_out_rewards, reward_terms
from psd.object3d import ObjectStep
from psd.safety import check_request

log = logging.getLogger(__name__)

MODES = {"image": MakeImage, "3d": MakeObject}
State = ImageStep | ObjectStep

MEASURED_STEPS = 25  # rewards of both arms are measured this often in a run, and at every preview
BUDGET_SHARE = 0.9  # of the time budget goes to loading and the loop, the rest to scores and files


def generate(
    config: RunConfig,
    output_root: Path | None = None,
    device: str | None = None,
    allow_download: bool = True,
    access: Access = OWNER,
) -> Iterator:
    """Run `config`; yields Downloading, Started, Steps with Previews, Finished (psd.events).

    Files go to a new folder under `output_root` ("outputs"). Raises RequestError, with one sentence, before anything
    heavy for a bad request and while loading for missing weights.
    """
    check_request(config, allow_local=access == OWNER)
    yield from fetch_models(config, allow_download, access)
    called = time.monotonic()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    prior = load_prior(config.prior, device)
    decode = load_fast_decoder(prior_info(config.prior).fast_decoder, device) if config.fast_decoder else prior.decode
    rewards = load_rewards(config.reward, device)
    arms = arms_of(config)
    make = MODES[config.mode](config, arms, prior, rewards[config.reward], decode)
    record = Record(config, Path(output_root or "outputs") / uuid.uuid4().hex[:12], make)
    record.directory.mkdir(parents=True)

    steps = make.steps()
    started = previewed = time.monotonic()
    try:
        yield Started(record.directory.name, record.directory, config, tuple(arms), warnings_of(prior, config))
        for state in steps:
            record.stopped = make.trouble(state)
            if record.stopped:
                break
            record.state = state
            now = time.monotonic()
            elapsed = now - started
            preview_due = state.step in (1, config.steps) or now - previewed >= make.preview_every_s
            measured = preview_due or state.step % max(1, config.steps // MEASURED_STEPS) == 0
            views = make.views(state) if measured else None
            row = metrics_of(state, views, rewards[config.reward], config)
            record.rows.append({"step": state.step, **row})
            eta = elapsed / state.step * (config.steps - state.step)
            yield Step(state.step, config.steps, elapsed, eta, row)
            if preview_due:
                previewed = now
                yield Preview(state.step, make.preview(state, views))
            over = config.time_budget_s and time.monotonic() - called > BUDGET_SHARE * config.time_budget_s
            if over and state.step < config.steps:
                record.stopped = (
                    f"The time budget of {config.time_budget_s:g} s was nearly used: "
                    f"stopped after step {state.step} of {config.steps}."
                )
                break
        finished = record.export(rewards, time.monotonic() - started)
    except GeneratorExit:
        record.stopped = f"Cancelled after step {len(record.rows)} of {config.steps}."
        record.export({}, time.monotonic() - started)
        raise
    finally:
        steps.close()
        if device != "cpu":
            torch.cuda.empty_cache()
    yield finished


def load_rewards(target: str, device: str) -> dict[str, Reward]:
    """The target, its members one by one where it is a mixture, and the held-out judges. Raises RequestError.

    A published judge that is damaged or finds no room on the device is left out: nobody asked for it. One of the app's
    own is a fault.
    """
    reward = load_reward(target, device)
    rewards = {target: reward} | (reward.members if isinstance(reward, Mixture) else {})
    for name in held_out_rewards(target):
        try:
            rewards[name] = load_reward(name, device)
        except Exception as error:
            if REWARDS[name].embedded or not (isinstance(error, RequestError) or is_out_of_memory(error)):
                raise
            log.warning("held-out judge is left out: %s", error)
    return rewards


def warnings_of(prior, config: RunConfig) -> tuple[str, ...]:
    """One sentence for each thing in the prompts that this prior will not understand."""
    return (*prior.remarks(config.prompt), *prior.remarks(config.negative_prompt, "negative prompt"))


@torch.no_grad()
def metrics_of(
    state: State, views: Float[Tensor, "A V 3 H W"] | None, reward: Reward, config: RunConfig
) -> dict[str, float]:
    """One row of metrics.csv: rewards of both arms, mean over their views, and the terms of the arm with preference."""
    row: dict[str, float] = {"t": state.t}
    first = next(iter(state.terms))
    if views is not None:
        scores = reward(views.flatten(0, 1), [config.prompt] * views.shape[:2].numel()).view(views.shape[:2]).mean(1)
        row |= {f"reward_{name}": value for name, value in zip(state.terms, scores.tolist(), strict=True)}
    row |= {name: value.mean().item() for name, value in state.terms[first].items()}
    if isinstance(state, ObjectStep):
        row |= {f"opacity_{name}": value for name, value in state.opacity.items()}
    if first in state.drift:
        row["negative_drift"] = state.drift[first]
    return row


@dataclass
class Record:
    """What a run leaves behind: its last state, one row of metrics a step, and the files made from them."""

    config: RunConfig
    directory: Path
    make: MakeImage | MakeObject
    state: State | None = None
    rows: list[dict[str, float]] = field(default_factory=list)
    stopped: str = ""

    def export(self, rewards: dict[str, Reward], seconds: float) -> Finished:
        """Score the last state with `rewards` and write every file."""
        settings = self.config.to_dict()
        images, scores, files, remarks = {}, {}, {}, {}
        if self.state is not None:
            images, scores, files, remarks = self.make.export(self.state, self.directory, settings, rewards)
        files["metrics.csv"] = self.directory / "metrics.csv"
        export_metrics(files["metrics.csv"], self.rows)
        files["run.json"] = self.directory / "run.json"
        done = len(self.rows)
        prior = prior_info(self.config.prior)
        about = {
            "config": settings, "scores": scores, "steps_done": done, "seconds": round(seconds, 3),
            "stopped": self.stopped, **remarks, "versions": versions(),
            "prior_revision": prior.source.revision,
            "fast_decoder_revision": prior.fast_decoder.source.revision if self.config.fast_decoder else "",
            "reward_revisions": {name: REWARDS[name].source.revision for name in reward_terms(self.config.reward)},
        }  # fmt: skip
        export_json(files["run.json"], about)
        run_id = self.directory.name
        return Finished(run_id, self.directory, self.config, images, scores, files, done, seconds, self.stopped)


def versions() -> dict[str, str]:
    return {"psd": psd.__version__, "torch": torch.__version__, "python": platform.python_version()}
