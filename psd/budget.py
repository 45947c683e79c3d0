"""What a step must cost: the rows that its mathematics sends through each network. Loads no torch.

The estimate before a run is made of it, `make bench MODE=speed` says how much longer a step takes, and a test counts
the rows of real runs against it.
"""

from __future__ import annotations

from psd.config import RunConfig
from psd.methods import METHODS, Passes, learns_negative
from psd.models.rewards.table import is_differentiable

OF_MODE: dict[str, Passes] = {
    "image": Passes(),
    "3d": Passes(encode_grad=1),  # the renders, down to the field
}
REBUILT = Passes(decode=1)  # lambda_rgb: the guided x0-hat in pixels


def passes_of(arm: RunConfig) -> Passes:
    """Of one sample and step of an arm, on average over its intervals; neither curve nor preview."""
    info = METHODS[arm.method]
    if info.samples:
        return info.passes_of(arm)
    total = info.passes_of(arm).plus(OF_MODE[arm.mode])
    if info.ranks:
        total = total.plus(info.ranked, 1 / arm.pref_interval)
    if learns_negative(arm) and is_differentiable(arm.reward):
        total = total.plus(info.learned, 1 / (arm.pref_interval * arm.negative_interval))
    return total.plus(REBUILT) if arm.lambda_rgb and arm.mode == "3d" else total
