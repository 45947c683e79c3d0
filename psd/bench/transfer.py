"""The paper's Table 6: n learned by distilling an object, used by plain DDIM of both priors, without optimisation."""

from __future__ import annotations

from dataclasses import replace

from psd.bench.paired import JUDGED, Job, Pictures, Rows, load_models, rows_of, run_to_end
from psd.config import RunConfig
from psd.modes.object import ObjectStage
from psd.toybox import world
from psd.toybox.evaluate import sample
from psd.toybox.evaluate_mvdream import four_sides, sample_views

PRESET, PROMPTS, SEEDS, BATCH = "toybox-fast", 40, 1, 1
SHEET_COLUMNS = 8
COLUMNS = JUDGED
ROWS: Rows = {"full PSD": ("with", {})}  # what n is learned by
STEPS = 30  # of DDIM
SHOWN_VIEWS = PICTURES = 4  # of each row: the views of an object, or as many seeds
AGAINST = {
    "toybox/mvdream, n learned": "toybox/mvdream, n of the negative prompt",
    "toybox/sd, n learned": "toybox/sd, n of the negative prompt",
}


def make(rows: Rows, config: RunConfig, device: str, jobs: list[Job]) -> list[Pictures]:
    """An object of each job by full PSD, then samples of both priors under the n it began with and the n it learned."""
    models, made = load_models(config, device), []
    for scene, seed in jobs:
        run = replace(config, prompt=world.caption(scene), seed=seed)
        *_, arm = rows_of(run, rows).values()  # the last that is tried
        stage = ObjectStage(run, {"with": arm}, models)
        run_to_end(models.prior, stage)
        learning, prompts = stage.arms["with"].method.negative, PICTURES * [run.prompt]
        pictures = {}
        for name, n in (("n of the negative prompt", learning.n_0[0]), ("n learned", learning.value[0])):
            views = sample_views(models.prior, [run.prompt], four_sides(1), run.gamma, STEPS, negative=n)
            pictures[f"toybox/mvdream, {name}"] = views[0].clamp(0, 1)
            pictures[f"toybox/sd, {name}"] = sample(prompts, device, STEPS, run.gamma, negative=n)
        made.append(pictures)
    return made


def seen_in(images, scene: world.Scene) -> dict[str, float]:
    return {}


def costs(rows: Rows, config: RunConfig, device: str) -> dict[str, dict[str, str]]:
    return {}
