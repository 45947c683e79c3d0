"""A step lets a GPU run ahead: the host waits for numbers once a step, however many arms there are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from psd.bench.paired import load_models
from psd.config import MODES, RunConfig, arms_of
from psd.distil import distil

# What makes the host wait: a number read back, and results whose size depends on values.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")


class CountedWaits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def waits_of(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """Of each step. Lists are read from the CPU's memory without being dispatched: they count as one number."""
    counted, tolist = CountedWaits(), torch.Tensor.tolist

    def read(tensor: torch.Tensor) -> list:
        counted.counts["_local_scalar_dense"] += 1
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    models = load_models(config, "cpu")
    stage = MODES[config.mode].load()(config, arms_of(config), models)
    found = []
    with counted:
        for _ in distil(models.prior, stage):
            found.append(Counter(counted.counts))
            counted.counts.clear()
    return found


@pytest.mark.parametrize("arms", ["with", "with, without, selection"])
def test_an_image_waits_once_a_step(arms: str, monkeypatch: pytest.MonkeyPatch):
    """For whether x_c is finite; the time shift and the step that Adam counts are on the host already."""
    config = RunConfig.from_preset(prompt="a lamp", arms=arms, steps=4, pref_interval=1, negative_interval=1)
    _, *steps = waits_of(config, monkeypatch)
    assert steps == 3 * [{"_local_scalar_dense": 1 + 2}]


@pytest.mark.parametrize("arms", ["with", "with, without"])
def test_an_object_waits_for_numbers_once_a_step(arms: str, monkeypatch: pytest.MonkeyPatch):
    """For opacities and whether gradients are finite, all arms' at once. What is drawn is on the host already, as is
    the step that n's Adam counts, every second step. How many samples a march has, each arm waits for."""
    config = replace(RunConfig.from_preset(mode="3d", prompt="a lamp", arms=arms, steps=4), render_size=16, samples=8)
    steps = waits_of(config, monkeypatch)
    assert [step["_local_scalar_dense"] for step in steps] == [1 + 3 + 1, 1 + 3, 1 + 3 + 1, 1 + 3]
    assert all(step["nonzero"] <= 2 * len(arms.split(",")) for step in steps[1:])  # the first looks at the field
