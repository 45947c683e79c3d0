"""Reward models: `load_reward` of a row of table.py, or of a mixture of them."""

from __future__ import annotations

from collections import OrderedDict
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from psd.models.rewards.table import REWARDS, is_mixture, reward_terms
from psd.models.weights import load_once, readable_errors, use_tf32

if TYPE_CHECKING:
    from psd.contracts import Reward

KEEP_LOADED = 6  # models, a mixture or a target with its judges; what was used last stays
_loaded: OrderedDict = OrderedDict()


def load_reward(text: str, device: str = "cpu") -> Reward:
    """The reward of this name, or a mixture (`reward_terms`), on `device`. Raises RequestError.

    A model is loaded once per process. A mixture of them is new every time: its scales belong to one run.
    """
    if not is_mixture(text):
        return _load_model(text.strip(), device)
    from psd.models.rewards.mixture import Mixture

    terms = reward_terms(text)
    return Mixture({name: _load_model(name, device) for name in terms}, terms, device)


def load_on_cpu(name: str) -> Reward:
    """The reward of this name on the CPU, for images of any device. Raises RequestError."""
    from psd.models.rewards.elsewhere import OnCPU

    return OnCPU(_load_model(name, "cpu"))


def _load_model(name: str, device: str) -> Reward:
    info = REWARDS[name]

    def load() -> Reward:
        use_tf32(device)
        with readable_errors(name, *info.sources):
            reward = resolve_name(info.model).load(name, info.on_disk(), device)
        if (reward.views, reward.differentiable) != (info.views, info.differentiable):
            raise TypeError(f"{name} is not what its row says: views {reward.views}, {reward.differentiable=}")
        return reward

    return load_once(_loaded, (info.source, str(device)), load, KEEP_LOADED)
