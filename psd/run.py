"""generate(config): the whole product in one loop. START HERE.

RunConfig -> check_request -> load prior and rewards -> embed once -> steps -> scores and files, told as events.
Closing the generator cancels the run: its last state is exported and its memory freed.
"""

from __future__ import annotations

import platform
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import psd
from psd.config import RunConfig
from psd.contracts import Prior, Reward
from psd.events import Finished, Preview, Started, Step
from psd.export import export_json, export_metrics, export_png
from psd.image import ImageStep, distil_image, scorer
from psd.priors import load_prior, prior_info
from psd.rewards import REWARDS, load_reward
from psd.safety import check_request

PREVIEW_EVERY_S = 0.5
MEASURED_STEPS = 25  # rewards of both arms are measured this often in a run, and at every preview
BUDGET_SHARE = 0.9  # of the time budget goes to the loop, the rest to scores and files


def generate(config: RunConfig, output_root: Path | None = None, device: str | None = None) -> Iterator:
    """Run `config`; yields Started, Steps with Previews, Finished (psd.events).

    Files go to a new folder under `output_root` ("outputs"). Raises RequestError, with one sentence, before anything
    heavy for a bad request and while loading for missing weights.
    """
    check_request(config, allow_local=True)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    prior = load_prior(config.prior, device)
    rewards = {name: load_reward(name, device) for name in (config.reward, *held_out_rewards(config.reward))}

    record = Record(config, Path(output_root or "outputs") / uuid.uuid4().hex[:12], arms_of(config))
    record.directory.mkdir(parents=True)

    score = scorer(prior, rewards[config.reward], [config.prompt])
    y, n_0 = prior.embed([config.prompt]), prior.embed([config.negative_prompt])
    generator = torch.Generator().manual_seed(config.seed)
    steps = distil_image(prior, score, y, n_0, record.arms, [generator], latent_shape(prior, config))
    started = previewed = time.monotonic()
    try:
        run_id = record.directory.name
        yield Started(run_id, record.directory, config, tuple(record.arms), warnings_of(prior, config))
        for state in steps:
            if not all(torch.isfinite(x_c).all() for x_c in state.x_c.values()):
                record.stopped = f"Stopped at step {state.step}: numbers overflowed; lower gamma, pref_weight or lr."
                break
            record.x_c = state.x_c
            now = time.monotonic()
            elapsed = now - started
            preview_due = state.step == 1 or state.step == config.steps or now - previewed >= PREVIEW_EVERY_S
            measured = preview_due or state.step % max(1, config.steps // MEASURED_STEPS) == 0
            images = decode_arms(prior, state.x_c) if measured else None
            row = metrics_of(state, images, rewards[config.reward], config)
            record.rows.append({"step": state.step, **row})
            eta = elapsed / state.step * (config.steps - state.step)
            yield Step(state.step, config.steps, elapsed, eta, row)
            if preview_due:
                previewed = now
                yield Preview(state.step, to_uint8(torch.cat(list(images), dim=-1)))
            if config.time_budget_s and elapsed > BUDGET_SHARE * config.time_budget_s and state.step < config.steps:
                record.stopped = (
                    f"The time budget of {config.time_budget_s:g} s was nearly used: "
                    f"stopped after step {state.step} of {config.steps}."
                )
                break
        finished = record.export(prior, rewards, time.monotonic() - started)
    except GeneratorExit:
        record.stopped = f"Cancelled after step {len(record.rows)} of {config.steps}."
        record.export(prior, {}, time.monotonic() - started)
        raise
    finally:
        steps.close()
        if device != "cpu":
            torch.cuda.empty_cache()
    yield finished


def arms_of(config: RunConfig) -> dict[str, RunConfig]:
    """Arm -> its settings. "without" is plain score distillation with the pair's first noise."""
    return {"with": config} | ({"without": replace(config, method="sds")} if config.compare else {})


def held_out_rewards(target: str) -> list[str]:
    """Rewards that report beside the target: those at home in the same world that nothing was optimised against."""
    toybox = target.startswith("toybox/")
    return [name for name, info in REWARDS.items() if info.held_out and name != target and toybox]


def latent_shape(prior: Prior, config: RunConfig) -> tuple[int, int, int]:
    if not config.image_size:
        return prior.latent_shape
    channels, side, _ = prior.latent_shape
    side = config.image_size * side // prior.image_size
    return (channels, side, side)


def warnings_of(prior, config: RunConfig) -> tuple[str, ...]:
    """One sentence for each thing in the prompts that this prior will not understand."""
    found = []
    for label, text in (("prompt", config.prompt), ("negative prompt", config.negative_prompt)):
        for word, nearest in prior.unknown_words(text):
            hint = f"; near to it: {' or '.join(nearest)}" if nearest else ""
            found.append(f"{prior.name} was never trained on the word '{word}' of the {label}{hint}.")
        if prior.truncated(text):
            found.append(f"The {label} is cut after the {prior.max_tokens} tokens that {prior.name} reads.")
    return tuple(found)


@torch.no_grad()
def decode_arms(prior: Prior, x_c: dict[str, Float[Tensor, "1 C h w"]]) -> Float[Tensor, "A 3 H W"]:
    return prior.decode(torch.cat(list(x_c.values()))).float()


@torch.no_grad()
def metrics_of(state: ImageStep, images: Tensor | None, reward: Reward, config: RunConfig) -> dict[str, float]:
    """One row of metrics.csv: rewards of both arms' x_c, and the terms of the arm with preference."""
    row: dict[str, float] = {"t": state.t}
    if images is not None:
        scores = reward(images, [config.prompt] * len(images)).tolist()
        row |= {f"reward_{name}": value for name, value in zip(state.x_c, scores, strict=True)}
    row |= {name: value.item() for name, value in state.terms["with"].items()}
    if "with" in state.drift:
        row["negative_drift"] = state.drift["with"]
    return row


def to_uint8(image: Float[Tensor, "3 H W"]) -> np.ndarray:
    """[H, W, 3] bytes of an image in [0, 1]."""
    return (image.permute(1, 2, 0) * 255).round().byte().cpu().numpy()


@dataclass
class Record:
    """What a run leaves behind: its last state, one row of metrics a step, and the files made from them."""

    config: RunConfig
    directory: Path
    arms: dict[str, RunConfig]
    x_c: dict[str, Tensor] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    stopped: str = ""

    @torch.no_grad()
    def export(self, prior: Prior, rewards: dict[str, Reward], seconds: float) -> Finished:
        """Score the final images with `rewards` and write every file."""
        settings = self.config.to_dict()
        images, scores, files = {}, {}, {}
        decoded = decode_arms(prior, self.x_c) if self.x_c else []
        for name, image in zip(self.x_c, decoded):
            image = (image * 255).round() / 255  # score what the file will hold
            values = {r: reward(image[None], [self.config.prompt]).item() for r, reward in rewards.items()}
            scores[name] = values
            images[name] = files[f"{name}.png"] = self.directory / f"{name}.png"
            export_png(images[name], to_uint8(image), {**settings, "arm": name, "scores": values})
        files["metrics.csv"] = self.directory / "metrics.csv"
        export_metrics(files["metrics.csv"], self.rows)
        files["run.json"] = self.directory / "run.json"
        about = {
            "config": settings, "scores": scores, "steps_done": len(self.rows), "seconds": round(seconds, 3),
            "stopped": self.stopped, "versions": versions(),
            "prior_revision": prior_info(self.config.prior).source.revision,
            "reward_revision": REWARDS[self.config.reward].source.revision,
        }  # fmt: skip
        export_json(files["run.json"], about)
        done = len(self.rows)
        return Finished(
            self.directory.name, self.directory, self.config, images, scores, files, done, seconds, self.stopped
        )


def versions() -> dict[str, str]:
    return {"psd": psd.__version__, "torch": torch.__version__, "python": platform.python_version()}
