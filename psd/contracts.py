"""What the parts of a run ask of each other, and the tuples that go between them. Computes nothing.

Symbols are psd.guidance's. Rows of a batch: N noises, B samples (in 3D the views of one object), S runs that learn an
n of their own (in 3D one for all views).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import Module

if TYPE_CHECKING:
    import numpy as np

    from psd.config import RunConfig
    from psd.scene.cameras import Cameras
    from psd.scene.render import Rendering
    from psd.scene.rig import Frame
    from psd.schedule import NoiseSchedule


@runtime_checkable
class Prior(Protocol):
    """A latent diffusion model: x are latents, images are RGB in [0, 1]. Weights are frozen.

    A multi-view prior takes `cameras`, one row a view (psd.scene.cameras.camera_embedding), rows ordered (group, view).
    """

    name: str
    licence: str
    latent_shape: tuple[int, int, int]
    image_size: int  # px
    views: int  # rows of one object, which see each other
    frame: Frame
    alphas_cumprod: Float[Tensor, " T"]
    device: torch.device

    def embed(self, prompts: list[str]) -> Float[Tensor, "P L D"]: ...

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]: ...

    def decode(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]: ...

    def eps(
        self,
        x_t: Float[Tensor, "B C h w"],
        t: int | Int[Tensor, ""] | Int[Tensor, " B"],
        cond: Float[Tensor, "B L D"],
        cameras: Float[Tensor, "B 16"] | None = None,
    ) -> Float[Tensor, "B C h w"]: ...

    def remarks(self, prompt: str, label: str = "prompt") -> list[str]: ...  # what of it will not be understood


Decode = Callable[[Float[Tensor, "B C h w"]], Float[Tensor, "B 3 H W"]]  # a prior's own, or a quicker one


@runtime_checkable
class Reward(Protocol):
    """Higher is better, raw scale, float32. What has a body here is inherited: most rewards say `__call__` alone.

    S = B / views pictures of one object, or S = B single ones, are judged together; rows are ordered (sample, view).
    """

    name: str
    views: int = 1
    differentiable: bool = True  # in the images
    text_parts: tuple[Module, ...] = ()  # that are needed only where a prompt is new: they may wait on the CPU

    def __call__(self, images: Float[Tensor, "B 3 H W"], prompts: list[str]) -> Float[Tensor, " S"]: ...

    def rank(self, images: Float[Tensor, "B 3 H W"], prompts: list[str], copies: int) -> Float[Tensor, " S"]:
        """As `__call__`, of `copies` of the same samples, rows ordered (copy, sample); a mixture learns from them."""
        return self(images, prompts)

    def bound(self) -> Reward:
        """A reward for one arm of a run: what it learns there is seen by nobody else."""
        return self


class Pair(NamedTuple):
    """What a reward was shown to choose from, without gradient."""

    images: Float[Tensor, "N B 3 H W"]
    scores: Float[Tensor, "N B"]


class Score(Protocol):
    """r(y, decode(x_0)) of every noise and sample, bound to one arm."""

    reward: Reward
    cameras: Cameras | None  # of this step's samples, if there are any: the stage's to set
    pair: Pair | None  # the latest that was ranked; whoever looks at it takes it away

    def __call__(self, x_0: Float[Tensor, "N B C h w"]) -> Float[Tensor, "N B"]: ...

    def read(self, samples: int) -> list[str]: ...  # the prompt of each sample


class Models(NamedTuple):
    """What a run has loaded. `decode` makes the pictures that are ranked and previewed."""

    prior: Prior
    reward: Reward
    decode: Decode


class Setup(NamedTuple):
    """What a method is made with, one for each arm: `METHODS[name].load()(setup)`."""

    config: RunConfig
    prior: Prior
    y: Float[Tensor, "S L D"]
    n_0: Float[Tensor, "S L D"]
    score: Score
    schedule: NoiseSchedule
    views: int = 1  # samples of one object, which are rescaled together


class Now(NamedTuple):
    """One step as one arm sees it; step, t and cameras are the same for every arm."""

    step: int  # 0-based
    share: float  # of the run that is over
    t: int
    alpha_t: Float[Tensor, ""]
    sigma_t: Float[Tensor, ""]
    cameras: Cameras | None
    x_c: Float[Tensor, "B C h w"]  # without gradient
    noise: Float[Tensor, "N B C h w"]  # N = method.noises(step); the first is the mode's own
    poses: Float[Tensor, "B 16"] | None = None  # the cameras as the prior takes them


class Ask(NamedTuple):
    """A question to the prior: every x_t under every condition; an S of 1 serves all samples."""

    x_t: Float[Tensor, "N B C h w"]
    conds: tuple[Float[Tensor, "S L D"], ...]
    t: int | None = None  # None: the step's
    poses: Float[Tensor, "B 16"] | None = None  # None: the step's


Answer = tuple[Float[Tensor, "N B C h w"], ...]  # eps-hat, one a condition


class Guided(NamedTuple):
    """What one step of a method decided."""

    g: Float[Tensor, "B C h w"]  # gradient of x_c, w(t) included
    eps_cfg: Float[Tensor, "B C h w"]  # eps~ of the noise used: the DDIM-consistent noise k of the next step
    terms: dict[str, Float[Tensor, " B"]]  # norms of the three terms without w(t), beta_r and rewards, per sample
    learn: Callable[[], None] | None = None  # what the method trains itself, once x_c has moved


@runtime_checkable
class Method(Protocol):
    """An update rule, made from a Setup; owns whatever it learns. It reads as its paper does, and asks as it needs."""

    def __init__(self, setup: Setup) -> None: ...

    def noises(self, step: int) -> int: ...

    def step(self, now: Now) -> Generator[Ask, Answer, Guided]: ...

    def report(self) -> dict[str, float]: ...  # numbers for metrics.csv


class Arm(NamedTuple):
    """One arm of a run: what differs between those that stand side by side."""

    name: str
    config: RunConfig
    method: Method
    score: Score


class Observed(NamedTuple):
    """Every arm's x_c at a step, and what it was made from: held by the loop alone, so that the step's end frees it."""

    x_c: dict[str, Float[Tensor, "B C h w"]]
    renders: dict[str, Rendering] | None = None  # in 3D
    images: dict[str, Float[Tensor, "B 3 H W"]] | None = None  # the renders at the prior's size


class Drawn(NamedTuple):
    """What a step has drawn, once for all arms."""

    step: int
    share: float
    t: int
    noise: Float[Tensor, "2 B C h w"]
    cameras: Cameras | None = None
    poses: Float[Tensor, "B 16"] | None = None
    jitter_seed: int = 0
    colour: Float[Tensor, " 3"] | None = None  # of the background behind this step's renders; None: its own


class Artefact(NamedTuple):
    """A file that a run can leave behind; psd.record names it after its arm and kind."""

    kind: str  # a row of psd.record.KINDS
    write: Callable[[Path, dict[str, Any]], dict[str, Any] | None]  # to this path, with this inside; remarks on it


@runtime_checkable
class Stage(Protocol):
    """What is distilled (psd.modes): owns x_c and its optimiser for every arm."""

    arms: dict[str, Arm]
    steps: int  # of the loop; a `start` that asks the prior counts as one before them
    preview_every_s: float

    def start(self) -> Generator[Ask, Answer, int | None]: ...  # the timestep of what it asked, if it did

    def draw(self, step: int) -> Drawn: ...

    def noises(self, drawn: Drawn, arm: str, count: int) -> Float[Tensor, "N B C h w"]: ...

    def observe(self, drawn: Drawn) -> Observed: ...

    def apply(self, drawn: Drawn, observed: Observed, guided: dict[str, Guided]) -> str: ...  # move; what broke down

    def report(self, arm: str) -> dict[str, float]: ...  # numbers for metrics.csv

    def views(self) -> dict[str, Float[Tensor, "V 3 H W"]]: ...  # of each arm now, to be measured

    def preview(
        self, views: dict[str, Float[Tensor, "V 3 H W"]]
    ) -> UInt8[np.ndarray, "height width 3"]: ...  # side by side

    def scored(self, arm: str) -> tuple[Float[Tensor, "B 3 H W"], list[str]]: ...  # images in [0, 1] and their prompts

    def artefacts(self, arm: str) -> Iterator[Artefact]: ...
