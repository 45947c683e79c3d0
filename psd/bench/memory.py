"""What a graphics card must hold, counted without one: `python -m psd.bench memory`, the published architectures.

Shapes alone, on torch's meta device, as gpu.py builds them: the bytes of the weights, and at its peak what each phase
of a step makes beyond them. Attention is counted as the fused kernel of a GPU, which keeps no matrix of it. CUDA's own
share and the allocator's slack are estimates.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from psd.bench.gpu import PRESETS, PROMPT, Models, random_decoder, random_prior, random_reward, row
from psd.config import RunConfig, arms_of
from psd.contracts import Drawn
from psd.methods import METHODS, learns_negative
from psd.modes.sculpture import Sculpture, start_background, start_field
from psd.scene.cameras import sample_cameras

CUDA_GB, ALLOCATOR = 0.8, 1.1  # its context and libraries; what is held beyond what is used
RESTING = ("text encoder", "reward's text tower")  # on the CPU with `offload`; there are no judges here
# Title -> mode, what is set beyond its preset, and the GB that it should fit into with `offload`.
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "`sd15-paper` (n fixed)": ("image", {}, 8.0),
    "`sd15-paper`, n learned": ("image", dict(negative_lr=1e-3), 8.0),
    "`sd15-paper`, n learned, `fast_decoder`": ("image", dict(negative_lr=1e-3, fast_decoder=True), 8.0),
    "`mvdream-fast`": ("3d", {}, 12.0),
}


class Live(TorchDispatchMode):
    """Bytes of all tensors that are made inside and still there, and their peak; those of `known` do not count."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.known = [tensor.untyped_storage() for tensor in known]  # held, so that their ids stay theirs
        self.seen = {id(storage) for storage in self.known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(id(storage))
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return made

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


class FusedAttention(TorchFunctionMode):
    """softmax(q k^T) v without its matrix, as on a GPU."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        keep = torch.is_grad_enabled()
        return torch.ops.aten._scaled_dot_product_efficient_attention(*args[:3], None, keep)[0]


def peak_gb(call: Callable[[], object], known: Iterable[Tensor] = ()) -> float:
    """Of what `call` makes, at its peak, without the tensors of `known`."""
    with FusedAttention(), Live(known) as live:
        call()
    return live.peak / 1e9


def weights_gb(models: Models) -> dict[str, float]:
    """Part -> its weights."""
    prior, clip = models.prior, models.reward.model
    parts = {
        "UNet": [prior.unet],
        "VAE": [prior.vae],
        "text encoder": list(prior.text_parts),
        "reward's image tower": [clip.vision_model, clip.visual_projection],
        "reward's text tower": list(models.reward.text_parts),
    }
    return {name: sum(bytes_of(module) for module in modules) / 1e9 for name, modules in parts.items()}


def bytes_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def phases_gb(config: RunConfig, models: Models) -> dict[str, float]:
    """Phase -> what it makes at its peak beyond the weights, of a step of all arms."""
    prior, views, arms = models.prior, models.prior.views, arms_of(config).values()
    decode = models.fast_decoder if config.fast_decoder else prior.decode
    x = torch.empty(views, *prior.latent_shape, device="meta")
    images = torch.empty(views, 3, prior.image_size, prior.image_size, device="meta")
    y, text = prior.embed([PROMPT]).expand(views, -1, -1), models.reward.text_features(PROMPT)
    cameras = torch.empty(views, 16, device="meta") if views > 1 else None
    known = [
        parameter
        for module in (prior.unet, prior.vae, models.reward.model, models.fast_decoder.args[0])
        for parameter in module.parameters()
    ]

    def eps(x_t: Tensor, cond: Tensor) -> Tensor:
        groups = len(x_t) // views
        return prior.eps(x_t, 500, times(cond, groups), None if cameras is None else times(cameras, groups))

    def score(pictures: Tensor) -> Tensor:
        return models.reward.image_features(models.reward.pixels(pictures)) @ text

    noises = sum(2 if METHODS[arm.method].ranks else 1 for arm in arms)  # each under y and n
    with torch.no_grad():
        found = {
            "UNet": peak_gb(lambda: eps(times(x, 2 * noises), y), known),
            "ranking": peak_gb(lambda: score(decode(times(x, 2)).float()), known),
            "result": peak_gb(lambda: prior.decode(x), known),
        }
    if any(map(learns_negative, arms)):  # one arm after the other
        found["n"] = peak_gb(lambda: gradient(lambda n: score(decode(eps(x, n)).float()), y), known)
    if config.mode == "3d":  # the graphs of all arms' renders and of their encoding are held through the step
        held = peak_gb(lambda: gradient(prior.encode, times(images, len(arms))), known) + len(arms) * render_gb(config)
        found |= {f"renders, {name}": held + found.pop(name) for name in ("UNet", "ranking")}
    return found


def render_gb(config: RunConfig) -> float:
    """Of one arm's renders and their gradient, on the field that a run starts from."""
    frame = random_prior("3d", "meta", tiny=True).frame
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    start = Sculpture.start(config, start_field(config, frame.radius), start_background(config, frame), cpu)
    drawn = Drawn(0, 0.0, 500, torch.empty(0), sample_cameras(frame.rig, 4, generator))
    return peak_gb(lambda: start.render(drawn, config.render_size).rgb.sum().backward())


def gradient(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(network(x).sum(), x)[0]


def times(rows: Tensor, count: int) -> Tensor:
    return rows.repeat(count, *(1,) * (rows.ndim - 1))


def report(tiny: bool = False) -> Iterator[str]:
    """The table in Markdown, line by line."""
    titles = ["run of both arms, ranked by hpsv2.1's size", "weights (GB)", "largest phase (GB)", "in all (GB)",
              "with `offload` (GB)", "fits with `offload`"]  # fmt: skip
    yield from (row(titles), "|---" * len(titles) + "|")
    reward, decoder = random_reward("meta", tiny), random_decoder("meta", tiny)
    for title, (mode, settings, most_gb) in CASES.items():
        models = Models(random_prior(mode, "meta", tiny), reward, decoder)
        config = RunConfig.from_preset(PRESETS[mode], prompt=PROMPT, arms="with, without", **settings)
        config = replace(config, render_size=16, grid_size=16, samples=8) if tiny else config
        weights, phases = weights_gb(models), phases_gb(config, models)
        name, phase = max(phases.items(), key=lambda each: each[1])
        in_all = sum(weights.values()) + CUDA_GB + ALLOCATOR * phase
        less = in_all - sum(weights[part] for part in RESTING)
        yield row([
            title, f"{sum(weights.values()):.2f}", f"{phase:.2f} ({name})", f"{in_all:.1f}", f"{less:.1f}",
            f"{most_gb:g} GB: {'yes' if less <= most_gb else 'no'}",
        ])  # fmt: skip
