"""Final states of both modes on the exact priors, as they were recorded before all modes shared one loop.

To the last bit where they were recorded; elsewhere a processor's own rounding is allowed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import test_image, test_object3d

RECORDED = load_file(Path(__file__).parent / "golden" / "yardstick" / "states.safetensors")
OBJECT = test_object3d.CONFIG
OBJECTS = {
    "plain": OBJECT,
    "paper": replace(OBJECT, pref_form="paper", pref_weight=1.0, rank="group"),
    "intervals": replace(OBJECT, pref_interval=2, negative_interval=2, rescale=0.5),
    "losses": replace(
        OBJECT, lambda_rgb=0.3, lambda_opacity=10.0, lambda_solid=100.0, lambda_smooth=0.005, lambda_orient=1.0,
        lambda_z_variance=1.0,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("update", ["ddim", "adam"])
@pytest.mark.parametrize("pair", ["ddim", "independent"])
def test_latents(update: str, pair: str):
    config = replace(test_image.CONFIG, update=update, pair=pair, steps=12)
    last = test_image.run({"with": config, "without": replace(config, method="sds")}, seeds=(0, 1))[-1]
    for arm, x_c in last.x_c.items():
        torch.testing.assert_close(x_c, RECORDED[f"image.{update}.{pair}.{arm}"], rtol=1e-4, atol=1e-5)
    assert last.drift["with"] == pytest.approx(RECORDED[f"image.{update}.{pair}.drift"].item(), rel=1e-4)


@pytest.mark.parametrize("name", OBJECTS)
def test_fields(name: str):
    config = OBJECTS[name]
    _, sculptures = test_object3d.run({"with": config, "without": replace(config, method="sds")})
    for arm, sculpture in sculptures.items():
        # float16, as they are stored: AdamW's first steps have the size of the rate whatever the gradient.
        recorded = RECORDED[f"object.{name}.{arm}"].float()
        wrong = (test_object3d.weights(sculpture) - recorded).abs() > 2e-3
        assert wrong.float().mean() < 1e-3
