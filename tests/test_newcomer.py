"""One of each from outside the package: a method, an arm, a reward, a prior and a mode, each a class and a row.

The classes below are all that a newcomer writes; psd itself is not touched. README's "Where to read" says the same.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from psd import RunConfig, generate, record
from psd.config import ARMS, MODES, ModeInfo
from psd.contracts import Answer, Arm, Artefact, Ask, Drawn, Guided, Models, Now, Observed, Reward, Setup
from psd.errors import RequestError
from psd.events import Finished
from psd.guidance import cfg, norm
from psd.methods import METHODS, MethodInfo
from psd.methods.sds import noisy
from psd.models.hub import Source
from psd.models.priors.stable_diffusion import StableDiffusionPrior
from psd.models.priors.table import PRIORS
from psd.models.rewards.table import REWARDS, RewardInfo
from psd.safety import check_request
from psd.score import BoundScore

CONFIG = RunConfig.from_preset(prompt="a red mushroom with a white stem", steps=4, seed=3)


class MeanOfThree:
    """A method: score distillation averaged over three noises, which asks twice: first the prompt, then n."""

    def __init__(self, setup: Setup) -> None:
        self.config, self.y, self.n = setup.config, setup.y, setup.n_0

    def noises(self, step: int) -> int:
        return 3

    def step(self, now: Now) -> Generator[Ask, Answer, Guided]:
        x_t = noisy(now)
        (eps_y,) = yield Ask(x_t, (self.y,))
        (eps_n,) = yield Ask(x_t, (self.n,), now.t)
        eps_cfg = cfg(eps_y, eps_n, self.config.gamma)
        g = (eps_cfg - now.noise).mean(0)
        return Guided(g, eps_cfg[0], {"spread": norm((eps_cfg - now.noise).std(0))})

    def report(self) -> dict[str, float]:
        return {"asked": 2.0}


class Redness(Reward):
    """A reward."""

    name = "redness"

    @classmethod
    def load(cls, name: str, info: RewardInfo, device: str) -> Redness:
        return cls()

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


class Hushed(StableDiffusionPrior):
    """A prior: another one's weights, whose answers are a little weaker."""

    def eps(self, *args: Any, **options: Any) -> Tensor:
        return 0.99 * super().eps(*args, **options)


class NoiseStage:
    """A mode: pixels of an image's size are the latents' first channels; nothing but numbers is moved."""

    preview_every_s = 0.5

    def __init__(self, config: RunConfig, arms: dict[str, RunConfig], models: Models) -> None:
        self.config, self.models, self.steps = config, models, config.steps
        self.x_c = {name: torch.zeros(1, *models.prior.latent_shape) for name in arms}
        y, n_0 = models.prior.embed([config.prompt]), models.prior.embed([config.negative_prompt])
        self.arms = {}
        for name, arm in arms.items():
            score = BoundScore(models.decode, models.reward, [config.prompt])
            method = METHODS[arm.method].load()(Setup(arm, models.prior, y, n_0, score, None))
            self.arms[name] = Arm(name, arm, method, score)

    def start(self) -> Generator[Ask, Answer, None]:
        yield from ()

    def draw(self, step: int) -> Drawn:
        generator = torch.Generator().manual_seed(step)
        return Drawn(step, step / self.steps, 400, torch.randn(2, *self.x_c["with"].shape, generator=generator))

    def noises(self, drawn: Drawn, arm: str, count: int) -> Tensor:
        return drawn.noise[:count]

    def observe(self, drawn: Drawn) -> Observed:
        return Observed(self.x_c)

    def apply(self, drawn: Drawn, observed: Observed, guided: dict[str, Guided]) -> str:
        self.x_c = {name: x_c - 0.1 * guided[name].g for name, x_c in self.x_c.items()}
        return ""

    def report(self, arm: str) -> dict[str, float]:
        return {"size": self.x_c[arm].std().item()}

    def views(self) -> dict[str, Tensor]:
        return {name: self.models.decode(x_c).detach() for name, x_c in self.x_c.items()}

    def preview(self, views: dict[str, Tensor]) -> np.ndarray:
        return np.zeros((8, 8, 3), np.uint8)

    def scored(self, arm: str) -> tuple[Tensor, list[str]]:
        return self.views()[arm], [self.config.prompt]

    def artefacts(self, arm: str) -> Iterator[Artefact]:
        yield Artefact("picture", lambda path, about: path.write_bytes(b"a picture"))


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "mean-of-three", MethodInfo(f"{__name__}:MeanOfThree", "three noises"))
    monkeypatch.setitem(ARMS, "three", dict(method="mean-of-three"))
    row = RewardInfo(Source("toybox/preference"), "none", 0, f"{__name__}:Redness", "how red")
    monkeypatch.setitem(REWARDS, "redness", row)
    monkeypatch.setitem(PRIORS, "hushed", replace(PRIORS["toybox/sd"], model=f"{__name__}:Hushed"))
    monkeypatch.setitem(MODES, "noise", ModeInfo(f"{__name__}:NoiseStage", "Noise"))


def pixels(last: Finished) -> np.ndarray:
    return np.asarray(Image.open(last.arms["with"].picture))


def test_a_method_and_its_arm_run_beside_ours(tmp_path: Path):
    *_, last = generate(replace(CONFIG, arms="with, three"), tmp_path)
    assert not last.failed and set(last.arms) == {"with", "three"}
    row = record.read(last.directory).rows[-1]
    assert row["asked_three"] == 2 and row["spread_three"] > 0 and row["delta_pref"] > 0
    *_, alone = generate(replace(CONFIG, arms="with"), tmp_path)
    assert np.array_equal(pixels(alone), pixels(last))


def test_a_reward_ranks_and_scores(tmp_path: Path):
    *_, last = generate(replace(CONFIG, reward="redness"), tmp_path)
    assert set(last.arms["with"].scores) >= {"redness", "toybox/judge"}
    assert record.read(last.directory).rows[-1]["reward_gap"] > 0
    check_request(replace(CONFIG, reward="redness + 0.5 toybox/preference"))


def test_a_prior_is_loaded_by_its_row(tmp_path: Path):
    *_, last = generate(replace(CONFIG, prior="hushed"), tmp_path)
    *_, usual = generate(CONFIG, tmp_path)
    assert not np.array_equal(pixels(last), pixels(usual))


def test_a_mode_goes_through_the_same_loop(tmp_path: Path):
    *_, last = generate(replace(CONFIG, mode="noise"), tmp_path)
    assert last.steps_done == 4 and last.arms["with"].picture.read_bytes() == b"a picture"
    rows = record.read(last.directory).rows
    assert all(row["size_with"] > 0 and row["delta_gen"] > 0 for row in rows)


def test_names_that_no_row_has_are_refused_with_all_that_there_are():
    for name in ("method", "mode", "prior", "reward"):
        with pytest.raises(RequestError, match=f"{name} 'nobody' is not known") as refusal:
            check_request(replace(CONFIG, **{name: "nobody"}))
        assert refusal.value.field == name
    with pytest.raises(RequestError, match="mean-of-three"):
        check_request(replace(CONFIG, method="nobody"))


def test_every_row_of_the_tables_names_what_is_there():
    from pkgutil import resolve_name

    tables = [row.method for row in METHODS.values()], [row.stage for row in MODES.values()]
    models = [row.model for row in (*PRIORS.values(), *REWARDS.values())]
    assert all(isinstance(resolve_name(name), type) for table in (*tables, models) for name in table)
