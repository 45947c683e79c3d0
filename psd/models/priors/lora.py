"""A prior with low-rank weights of its own beside the frozen ones (Hu et al. 2021), through peft.

Everybody else who asks the prior sees it without them. Knows nothing of what they are trained on.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from psd.contracts import Prior

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of every attention, as VSD has it
_names = map("run_{}".format, itertools.count())


class LoRAPrior:
    """eps-hat of `prior` with W + up @ down in its attentions; `up` starts at zero, so that at first nothing differs.

    Belongs to whoever made it: with it the weights leave the UNet, which all runs of a process share.
    """

    def __init__(self, prior: Prior, rank: int, seed: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        self.prior, self.name = prior, next(_names)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights="gaussian")
        devices = [prior.device] if prior.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings(action="ignore"):  # of several adapters
            torch.manual_seed(seed)
            inject_adapter_in_model(config, prior.unet, adapter_name=self.name)
        self.layers = lora_layers(prior.unet)
        self.parameters = [
            weight.weight for layer in self.layers for part in (layer.lora_A, layer.lora_B)
            for name, weight in part.items() if name == self.name
        ]  # fmt: skip
        switch(self.layers, None)
        weakref.finalize(self, remove, prior.unet, self.name)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """While the prior answers with them; also while a gradient in `parameters` is taken."""
        switch(self.layers, self.name)
        try:
            yield
        finally:
            switch(self.layers, None)

    def eps(
        self, x_t: Float[Tensor, "B C h w"], t: int, cond: Float[Tensor, "B L D"], cameras: Float[Tensor, "B 16"] | None
    ) -> Float[Tensor, "B C h w"]:
        """As Prior.eps."""
        with self.heard():
            return self.prior.eps(x_t, t, cond, cameras)


def lora_layers(unet: nn.Module) -> list[nn.Module]:
    from peft.tuners.lora import LoraLayer

    return [module for module in unet.modules() if isinstance(module, LoraLayer)]


def switch(layers: list[nn.Module], name: str | None) -> None:
    """Let the adapter of this name be heard, or none."""
    for layer in layers:
        layer.enable_adapters(False)
        if name is not None:
            layer.set_adapter(name)
            layer.enable_adapters(True)


def remove(unet: nn.Module, name: str) -> None:
    """Take an adapter out; where it was the last, the layers are the model's own again."""
    from peft.tuners.lora import LoraLayer

    for path, layer in [(path, module) for path, module in unet.named_modules() if isinstance(module, LoraLayer)]:
        layer.delete_adapter(name)
        if not layer.lora_A:
            parent, _, child = path.rpartition(".")
            setattr(unet.get_submodule(parent), child, layer.get_base_layer())
        else:
            layer.enable_adapters(False)
    if unet.peft_config.pop(name, None) and not unet.peft_config:
        del unet.peft_config
