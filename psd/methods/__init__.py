"""Update rules by name: a step that asks the prior and answers with the gradient of x_c. Loads no torch.

To add one: a class that answers psd.contracts.Method, and a row here that names it; a row of psd.presets.ARMS puts it
beside the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from psd.config import RunConfig
    from psd.contracts import Method


class Passes(NamedTuple):
    """Rows through each network for one sample, a picture or a view; *_grad: forward and backward."""

    unet: float = 0.0
    unet_grad: float = 0.0
    encode: float = 0.0
    encode_grad: float = 0.0
    decode: float = 0.0
    decode_grad: float = 0.0
    reward: float = 0.0
    reward_grad: float = 0.0

    def plus(self, more: Passes, share: float = 1.0) -> Passes:
        """With `more` in a `share` of the steps."""
        return Passes(*(own + share * other for own, other in zip(self, more)))


SAMPLED_LEVELS = 50  # of DDIM, at most

PLAIN = Passes(unet=2)  # eps-hat under y and n
RANKED = Passes(unet=2, decode=2, reward=2)  # a second noise, and both of a pair decoded and scored
LEARNED = Passes(unet_grad=1, decode_grad=1, reward_grad=1)  # the winner's reward down to n


class MethodInfo(NamedTuple):
    """`method` is "module:class", resolved when a run is set up."""

    method: str
    about: str
    ranks: bool = False  # whether it asks the reward which of several noises is best; a mixture learns its scales there
    learns: bool = False  # whether it has an n of its own, `negative` (psd.methods.negative), which a run keeps
    passes: Passes | Callable[[RunConfig], Passes] = PLAIN  # of a step without preference; on average, where t counts
    ranked: Passes = RANKED  # on top, on every preference step of one that ranks
    learned: Passes = LEARNED  # on top, where an n that learns moves
    climbs: bool = False  # whether it needs the reward's gradient whatever n does
    samples: bool = False  # whether it draws views of its own and no object: of modes whose prior draws several at once

    def load(self) -> type[Method]:
        return resolve_name(self.method)

    def passes_of(self, config: RunConfig) -> Passes:
        return self.passes(config) if callable(self.passes) else self.passes


def mean_t(config: RunConfig) -> float:
    """Share of the schedule that lies below the mean of a run's timesteps."""
    low, high = config.t_min, config.t_max
    if config.mode == "3d":  # half of the annealing at its start, then the final interval
        settled = (low + config.t_max_end) / 2
        return config.t_anneal * (high + settled) / 2 + (1 - config.t_anneal) * settled
    return (low + high) / 2


def inverted(config: RunConfig) -> Passes:
    """SDI: both predictions at every level of the inversion, then at t."""
    return Passes(unet=2 * (config.inversion_steps * mean_t(config) + 2))


def explored(config: RunConfig) -> Passes:
    """RewardSDS: both predictions of every candidate at every level below t; all of them decoded and scored."""
    count, share = config.candidates, config.reward_share
    unet = share * count * 2 * (config.explore_steps * mean_t(config) + 0.5) + (1 - share) * 2
    return Passes(unet=unet, decode=share * count, reward=share * count)


def with_lora(passes: Passes, rows: float = 1.0) -> Passes:
    """The LoRA's own prediction of so many rows, and a step of its training."""
    return passes.plus(Passes(unet=rows, unet_grad=1))


METHODS: dict[str, MethodInfo] = {
    "psd": MethodInfo(
        "psd.methods.preference:PSD", "Preference score distillation: delta_pref and the learned n.", ranks=True,
        learns=True,
    ),
    "sds": MethodInfo("psd.methods.sds:SDS", "Plain score distillation; in image mode it is DDIM."),
    "sampling": MethodInfo(
        "psd.methods.sampling:Sampling", "Views by DDIM of a multi-view prior, no object.", samples=True,
        passes=lambda config: Passes(unet=2 * min(SAMPLED_LEVELS, config.steps) / config.steps),
    ),
    "negative": MethodInfo("psd.methods.negative:NegativeOnly", "The learned n alone (Sec. 3.3).", learns=True),
    "csd": MethodInfo(
        "psd.methods.csd:CSD", "Classifier score distillation: guidance alone.",
        passes=lambda config: Passes(unet=2 + (config.csd_weights == "three-way")),
    ),
    "sdi": MethodInfo("psd.methods.sdi:SDI", "Score distillation via DDIM inversion.", passes=inverted),
    "cfd": MethodInfo("psd.methods.cfd:CFD", "Consistent flow distillation: annealed t, noise that stays in place."),
    "vsd": MethodInfo(
        "psd.methods.vsd:VSD", "Variational score distillation (ProlificDreamer): a LoRA as the critic.",
        passes=with_lora(PLAIN),
    ),
    "dreamdpo": MethodInfo(
        "psd.methods.dreamdpo:DreamDPO", "DreamDPO: the difference of a ranked pair (eq. 22).", ranks=True,
        passes=PLAIN.plus(RANKED), ranked=Passes(),
    ),
    "dreamreward": MethodInfo(
        "psd.methods.dreamreward:DreamReward", "DreamReward: score distillation plus the reward's gradient (eq. 18).",
        passes=PLAIN.plus(Passes(decode_grad=1, reward_grad=1)), climbs=True,
    ),
    "rewardsds": MethodInfo(
        "psd.methods.rewardsds:RewardSDS", "RewardSDS: several noises, weighted by the reward.", ranks=True,
        passes=explored, ranked=Passes(),
    ),
    "rewardvsd": MethodInfo(
        "psd.methods.vsd:RewardVSD", "RewardVSD: the same with a LoRA as the critic.", ranks=True, ranked=Passes(),
        passes=lambda config: with_lora(
            explored(config), config.reward_share * config.candidates + 1 - config.reward_share
        ),
    ),
}  # fmt: skip


def learns_negative(config: RunConfig) -> bool:
    """Whether n moves in a run, or an arm, of these settings."""
    return METHODS[config.method].learns and config.negative_lr > 0
