from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from psd.schedule import NoiseSchedule, descending_timesteps, shift_timestep

ALPHAS = Path(__file__).parent / "golden" / "schedule" / "alphas"


def test_alpha_t_and_sigma_t_against_recorded_schedules():
    recorded = json.loads(ALPHAS.with_suffix(".json").read_text())["samples"]
    schedule = NoiseSchedule(load_file(ALPHAS.with_suffix(".safetensors"))["diffusers_ddim_alphas_cumprod"])
    for row in recorded:
        assert schedule.alpha_t(row["t"]).item() == pytest.approx(row["float64"] ** 0.5, abs=1e-6)
        assert schedule.sigma_t(torch.tensor(row["t"])).item() == pytest.approx((1 - row["float64"]) ** 0.5, abs=2e-5)


def test_the_forward_process_keeps_unit_variance():
    schedule = NoiseSchedule(load_file(ALPHAS.with_suffix(".safetensors"))["mvdream_alphas_cumprod"])
    for t in (0, 1, 500, 999):
        assert (schedule.alpha_t(t) ** 2 + schedule.sigma_t(t) ** 2).item() == pytest.approx(1.0, abs=1e-6)


def test_descending_timesteps():
    assert descending_timesteps(5, 0.98, 0.02, 1000).tolist() == [980, 740, 500, 260, 20]
    assert descending_timesteps(8, 0.98, 0.02, 1000).tolist() == [980, 843, 706, 569, 431, 294, 157, 20]  # rounded
    assert descending_timesteps(2, 1.0, 0.0, 1000).tolist() == [999, 0]
    assert (descending_timesteps(50, 0.98, 0.02, 1000).diff() < 0).all()


def test_more_steps_than_timesteps_repeat_but_never_rise():
    t = descending_timesteps(1000, 0.6, 0.4, 1000)
    assert (t.diff() <= 0).all() and t[0] == 600 and t[-1] == 400 and len(t) == 1000


def test_shifted_timesteps_stay_in_the_schedule():
    assert shift_timestep(500, 0.1) == 600
    assert shift_timestep(500, -0.1) == 400
    assert shift_timestep(980, 0.2) == 999
    assert shift_timestep(20, -0.2) == 0
