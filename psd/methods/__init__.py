"""Update rules by name: a step that asks the prior and answers with the gradient of x_c. Loads no torch.

To add one: a class that answers psd.contracts.Method, and a row here that names it; a row of psd.config.ARMS puts it
beside the others.
"""

from __future__ import annotations

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


PLAIN = Passes(unet=2)  # eps-hat under y and n
RANKED = Passes(unet=2, decode=2, reward=2)  # a second noise, and both of a pair decoded and scored
LEARNED = Passes(unet_grad=1, decode_grad=1, reward_grad=1)  # the winner's reward down to n


class MethodInfo(NamedTuple):
    """`method` is "module:class", resolved when a run is set up."""

    method: str
    about: str
    ranks: bool = False  # whether it asks the reward which of several noises is best; a mixture learns its scales there
    learns: bool = False  # whether it has an n of its own, `negative` (psd.methods.negative), which a run keeps
    passes: Passes = PLAIN  # of a step without preference
    ranked: Passes = RANKED  # on top, on every preference step of one that ranks
    learned: Passes = LEARNED  # on top, where an n that learns moves

    def load(self) -> type[Method]:
        return resolve_name(self.method)


METHODS: dict[str, MethodInfo] = {
    "psd": MethodInfo(
        "psd.methods.preference:PSD", "Preference score distillation: delta_pref and the learned n.", ranks=True,
        learns=True,
    ),
    "sds": MethodInfo("psd.methods.sds:SDS", "Plain score distillation; in image mode it is DDIM."),
    "negative": MethodInfo("psd.methods.negative:NegativeOnly", "The learned n alone (Sec. 3.3).", learns=True),
}  # fmt: skip


def learns_negative(config: RunConfig) -> bool:
    """Whether n moves in a run, or an arm, of these settings."""
    return METHODS[config.method].learns and config.negative_lr > 0
