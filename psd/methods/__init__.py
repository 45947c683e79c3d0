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


class MethodInfo(NamedTuple):
    """`method` is "module:class", resolved when a run is set up."""

    method: str
    about: str
    ranks: bool = False  # whether it asks the reward which of several noises is best; a mixture learns its scales there
    learns: bool = False  # whether it has an n of its own, `negative` (psd.methods.negative), which a run keeps

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
