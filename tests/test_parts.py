"""Modules that wait on the CPU until a prompt is new, and what a run with `offload` lets wait there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from psd import run
from psd.config import RunConfig
from psd.contracts import Reward
from psd.models.parts import visiting
from psd.models.rewards.elsewhere import OnCPU


class Traveller(torch.nn.Linear):
    """Says where it is sent, and stays."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.sent: list[str] = []

    def to(self, device: torch.device | str) -> Traveller:
        self.sent.append(str(device))
        return self


class Brightness(Reward):
    name = "brightness"

    def __init__(self) -> None:
        self.tower = Traveller()
        self.text_parts = (self.tower,)

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        assert images.device.type == "cpu"
        return images.mean((1, 2, 3))


def test_a_module_is_there_while_it_is_needed_and_goes_back():
    module = Traveller()
    with visiting(torch.device("cuda", 0), module):
        assert module.sent == ["cuda:0"]
    assert module.sent == ["cuda:0", "cpu"]
    with pytest.raises(MemoryError), visiting(torch.device("cuda", 0), module):
        raise MemoryError
    assert module.sent == ["cuda:0", "cpu"] * 2


@pytest.mark.parametrize(("offload", "home"), [(True, "cpu"), (False, "cuda")])
def test_what_only_prompts_need_and_the_judges_wait_on_the_cpu(monkeypatch, offload: bool, home: str):
    """And are brought back for the next run without it."""
    encoder, loaded = Traveller(), {}

    def load_reward(name: str, device: str) -> Reward:
        return loaded.setdefault((name, device), Brightness())

    prior = SimpleNamespace(text_parts=(encoder,), decode=None)
    monkeypatch.setattr(run, "load_prior", lambda name, device: prior)
    monkeypatch.setattr(run, "load_reward", load_reward)
    monkeypatch.setattr(run, "load_on_cpu", lambda name: OnCPU(load_reward(name, "cpu")))
    config = RunConfig.from_preset(prompt="a lamp", fast_decoder=False, offload=offload)
    _, rewards = run.load(config, "cuda")
    assert encoder.sent == rewards["toybox/preference"].tower.sent == [home]
    assert list(loaded) == [("toybox/preference", "cuda"), ("toybox/judge", home)]
    assert isinstance(rewards["toybox/judge"], OnCPU) is offload
    assert rewards["toybox/judge"](torch.ones(2, 3, 4, 4), ["a"] * 2).tolist() == [1, 1]
