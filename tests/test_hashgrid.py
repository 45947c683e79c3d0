"""The hash encoding against tiny-cuda-nn's numbers (tests/golden/nerf)."""

from __future__ import annotations

import json
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from psd.scene.hashgrid import HashGrid, level_scales

GOLDEN = Path(__file__).parent / "golden" / "nerf"

hashgrid = load_file(GOLDEN / "hashgrid.safetensors")
GRIDS = json.loads((GOLDEN / "hashgrid.json").read_text())["configs"]


def golden_grid(name: str) -> HashGrid:
    about = GRIDS[name]
    grid = HashGrid(about["n_levels"], about["log2_hashmap_size"], about["base_resolution"], about["per_level_scale"])
    if name == "small":
        table = hashgrid["small.table"]
    else:  # the fixture's formula
        table = ((torch.arange(about["n_params"]) * 2654435761 + 12345) % 2**32).double() / 2**32 * 2 - 1
    grid.table.data = table.float().view(-1, 2)
    return grid


@pytest.mark.parametrize("name", GRIDS)
def test_hash_grid_has_the_levels_of_tiny_cuda_nn(name):
    about = GRIDS[name]
    grid = HashGrid(about["n_levels"], about["log2_hashmap_size"], about["base_resolution"], about["per_level_scale"])
    assert grid.resolutions == about["resolutions"]
    assert grid.scales == [float.fromhex(scale) for scale in about["scales_float32_hex"]]
    assert [0, *torch.tensor(grid.sizes).cumsum(0).tolist()] == about["offsets"]
    assert grid.table.numel() == about["n_params"] and grid.width == about["n_output_dims"]
    assert grid.table.abs().max() <= 1e-4 and grid.table.std() > 5e-5


@pytest.mark.parametrize("growth", [1.132, 1.404, 1.447269237440378, 1.615, 1.786, 1.918])
def test_level_scales_are_rounded_correctly(growth: float):
    """Each operation to 40 digits, then to float32: numbers that no processor may have otherwise."""
    with localcontext(prec=40):
        ln_2 = Decimal(2).ln()
        growth_log2 = np.float32(str(Decimal(float(np.float32(growth))).ln() / ln_2))
        powers = [(Decimal(float(np.float32(level) * growth_log2)) * ln_2).exp() for level in range(16)]
        want = [float(np.float32(str(power)) * np.float32(16) - np.float32(1)) for power in powers]
    assert level_scales(16, 16, growth) == want
    assert HashGrid(16, 4, 16, growth).scales == want


@pytest.mark.parametrize("name", ["small", "threestudio_default"])
def test_hash_grid_is_tiny_cuda_nns(name):
    grid = golden_grid(name)
    want = {key.removeprefix(f"{name}."): value for key, value in hashgrid.items() if key.startswith(f"{name}.")}
    for level, rows in enumerate(want["grid_index_per_level"]):
        assert torch.equal(grid.rows(level, want["grid_coords"].T), rows)

    u = want["positions"].requires_grad_()
    encoded = grid(u)
    torch.testing.assert_close(encoded, want["encoded"], rtol=0, atol=1e-6)
    with torch.no_grad():
        outside = grid(want["out_of_range_positions"])
        torch.testing.assert_close(outside, want["out_of_range_encoded"], rtol=0, atol=1e-6)
    encoded.backward(want["dL_dencoded"])
    largest = want["dL_dpositions"].abs().max().item()
    torch.testing.assert_close(u.grad, want["dL_dpositions"], rtol=0, atol=1e-6 * largest)
    with torch.no_grad():
        torch.testing.assert_close(
            grid.slope(u, want["dL_dencoded"]), want["dL_dpositions"], rtol=0, atol=1e-6 * largest
        )

    got = grid.table.grad.flatten()
    if name == "small":
        torch.testing.assert_close(got, want["dL_dtable"], rtol=1e-5, atol=1e-6)
        jacobian = torch.stack([grid.slope(u.detach(), row.expand(len(u), -1)) for row in torch.eye(grid.width)], 1)
        torch.testing.assert_close(jacobian, want["d_encoded_d_positions"], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(got.nonzero()[:, 0], want["dL_dtable_nonzero_index"])
        values = got[want["dL_dtable_nonzero_index"]]
        torch.testing.assert_close(values, want["dL_dtable_nonzero_value"], rtol=1e-5, atol=1e-6)
