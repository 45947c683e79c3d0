"""Every term against numbers worked by hand, and against what public reference code computed (tests/golden/losses)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from psd import guidance
from tests.gaussian import GaussianPrior

LOSSES = Path(__file__).parent / "golden" / "losses"


def sample(*values: float) -> torch.Tensor:
    """One sample [1 1 1 len(values)]."""
    return torch.tensor(values).view(1, 1, 1, -1)


def test_cfg_limits_and_a_hand_worked_value():
    eps_y, eps_n = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    torch.testing.assert_close(guidance.cfg(eps_y, eps_n, 0.0), eps_n, rtol=0, atol=0)
    torch.testing.assert_close(guidance.cfg(eps_y, eps_n, 1.0), eps_y, rtol=1e-6, atol=1e-6)
    assert guidance.cfg(sample(3.0), sample(1.0), 7.5).item() == 16.0  # 1 + 7.5 * 2; 7.5 + 1 would give 18


def test_x0_hat_inverts_the_forward_process():
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 2, 4, 4, 4, generator=generator, dtype=torch.float64).unbind()
    for abar in (0.9991, 0.5, 0.0047):
        alpha_t, sigma_t = (
            torch.tensor(abar, dtype=torch.float64).sqrt(),
            torch.tensor(1 - abar, dtype=torch.float64).sqrt(),
        )
        x_t = alpha_t * x_0 + sigma_t * noise
        torch.testing.assert_close(guidance.x0_hat(x_t, noise, alpha_t, sigma_t), x_0, rtol=0, atol=1e-12)


def test_x0_hat_of_a_gaussian_prior_is_the_posterior_mean():
    """E[x_0 | x_t] = mu + alpha s^2 (x_t - alpha mu) / (alpha^2 s^2 + sigma^2): Tweedie's formula, exactly."""
    prior = GaussianPrior(mu_y=0.5, s_y=0.3)
    alpha_t, sigma_t = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    x_t = torch.linspace(-2, 2, 8, dtype=torch.float64).view(1, 2, 2, 2)
    mean = 0.5 + 0.6 * 0.09 * (x_t - 0.6 * 0.5) / (0.36 * 0.09 + 0.64)
    torch.testing.assert_close(guidance.x0_hat(x_t, prior.eps_y(x_t, alpha_t, sigma_t), alpha_t, sigma_t), mean)


def test_delta_gen_and_delta_cls_by_hand():
    assert guidance.delta_gen(sample(1.0, -2.0), sample(0.5, 3.0)).flatten().tolist() == [0.5, -5.0]
    assert guidance.delta_cls(sample(1.0, -2.0), sample(0.5, 3.0)).flatten().tolist() == [0.5, -5.0]


def test_delta_pref_by_hand():
    terms = dict(eps_w=sample(4.0), eps_l=sample(1.0), noise_w=sample(0.5), noise_l=sample(2.0))
    assert guidance.delta_pref(**terms, form="paper").item() == 3.0
    assert guidance.delta_pref(**terms, form="centred").item() == 4.5  # (4 - 0.5) - (1 - 2)


@pytest.mark.parametrize("form", ["paper", "centred"])
def test_delta_pref_changes_sign_when_winner_and_loser_swap(form: str):
    eps_w, eps_l, noise_w, noise_l = torch.randn(4, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()
    there = guidance.delta_pref(eps_w, eps_l, noise_w, noise_l, form)
    back = guidance.delta_pref(eps_l, eps_w, noise_l, noise_w, form)
    assert torch.equal(there, -back)


def test_centred_delta_pref_is_zero_when_the_prior_predicts_both_noises():
    noise_w, noise_l = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()
    assert not guidance.delta_pref(noise_w, noise_l, noise_w, noise_l, "centred").any()
    assert guidance.delta_pref(noise_w, noise_l, noise_w, noise_l, "paper").any()


@pytest.mark.parametrize(
    ("reward_gap", "reward_scale", "expected"),
    [
        (0.0, 1.0, 0.5),  # 2 * 5/10 * 1/2
        (math.log(3), 1.0, 0.25),  # sigmoid(-log 3) = 1/4
        (math.log(3) / 2, 2.0, 0.25),
        (math.log(3), 0.0, 0.5),  # rewards only rank
        (1e4, 1.0, 0.0),
    ],
)
def test_beta_r_by_hand(reward_gap: float, reward_scale: float, expected: float):
    """|delta_cls| = |(3, 4)| = 5, |delta_pref| = |(6, 8)| = 10, gamma = 2."""
    beta_r = guidance.beta_r(sample(3.0, 4.0), sample(6.0, 8.0), 2.0, torch.tensor([reward_gap]), reward_scale)
    assert beta_r.item() == pytest.approx(expected, abs=1e-7)


def test_beta_r_balances_each_sample_by_itself():
    delta_cls = torch.cat([sample(3.0, 4.0), sample(0.0, 1.0)])
    delta_pref = torch.cat([sample(0.0, 0.5), sample(8.0, 6.0)])
    torch.testing.assert_close(
        guidance.beta_r(delta_cls, delta_pref, 2.0, torch.zeros(2), 1.0), torch.tensor([10.0, 0.1])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_beta_r_is_finite_and_adds_nothing_where_delta_pref_is_zero(dtype: torch.dtype):
    delta_cls, delta_pref = sample(300.0, 400.0).to(dtype), sample(0.0, 0.0).to(dtype)
    beta_r = guidance.beta_r(delta_cls, delta_pref, 200.0, torch.zeros(1), 1.0)
    assert beta_r.isfinite().all()
    assert not (beta_r[:, None, None, None] * delta_pref).any()


def test_norm_does_not_overflow_in_half_precision():
    assert guidance.norm(sample(300.0, 400.0).half()).item() == 500.0  # 300^2 alone exceeds fp16's 65,504


def test_w_t_options():
    alpha_t, sigma_t = torch.tensor(0.6), torch.tensor(0.8)
    assert guidance.w_t(alpha_t, sigma_t, "one").item() == 1.0
    assert guidance.w_t(alpha_t, sigma_t, "sds").item() == pytest.approx(1 - 0.36)
    assert guidance.w_t(alpha_t, sigma_t, "recon").item() == pytest.approx(4 / 3)


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match="'sqrt'"):
        guidance.w_t(torch.tensor(0.6), torch.tensor(0.8), "sqrt")
    with pytest.raises(ValueError, match="'both'"):
        guidance.delta_pref(sample(1.0), sample(1.0), sample(1.0), sample(1.0), "both")


@pytest.mark.parametrize("case", ["beta0_all_dpo", "beta0_tie", "beta_exact_equal"])
def test_dreamdpo_gradient(case: str):
    """DreamDPO's code is our centred delta_pref with an unguided loser: dL/dx = (1 - abar)/B * delta_pref (eq. 22).

    Its per-view winner (ties to the first noise) is taken from the stored scores. Views whose gap is below beta_dpo,
    one of `beta_exact_equal`, took its SDS branch and are left out.
    """
    golden = load_file(LOSSES / "dreamdpo.safetensors")
    fixture = {name.removeprefix(f"{case}."): value for name, value in golden.items() if name.startswith(f"{case}.")}
    abar = golden["alphas_cumprod"][fixture["unet_input_t"][0]]
    first_wins = fixture["score_1"] >= fixture["score_2"]

    def winner_loser(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = fixture[f"{name}_1"], fixture[f"{name}_2"]
        mask = first_wins[:, None, None, None]
        return torch.where(mask, first, second), torch.where(mask, second, first)

    (text_w, text_l), (null_w, null_l), (noise_w, noise_l) = map(winner_loser, ("eps_text", "eps_null", "noise"))
    eps_w, eps_l = guidance.cfg(text_w, null_w, 7.5), guidance.cfg(text_l, null_l, 1.0)
    delta_pref = guidance.delta_pref(eps_w, eps_l, noise_w, noise_l, "centred")
    expected = guidance.w_t(abar.sqrt(), (1 - abar).sqrt(), "sds") * delta_pref / len(first_wins)

    beta_dpo = 0.5 if case == "beta_exact_equal" else 0.0
    preferred = (fixture["score_1"] - fixture["score_2"]).abs() >= beta_dpo
    assert preferred.sum() >= 3
    got, want = expected[preferred], fixture["dL_dlatents"][preferred]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())
