"""Learning the negative embedding: its gradient against finite differences, its optimisers, schedule and drift."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from psd.methods.negative import NegativeEmbedding, reward_through_negative
from tests.gaussian import gaussian_eps

ALPHA_T, SIGMA_T = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
GAMMA = 7.5


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


N, X_T, EPS_Y = randn(1, 3, 2), randn(2, 4, 2, 2, seed=1), randn(2, 4, 2, 2, seed=2)
MIX = randn(6, 16, seed=3)


def eps(x_t: Tensor, n: Tensor) -> Tensor:
    """A tiny prior, nonlinear in n."""
    return torch.tanh(x_t + (n.flatten() @ MIX).view(1, 4, 2, 2))


def reward(x0: Tensor) -> Tensor:
    return torch.sin(x0).flatten(1).sum(1) + 0.1 * (x0**2).flatten(1).sum(1)


def objective(n: Tensor) -> Tensor:
    return reward_through_negative(n, X_T, EPS_Y, ALPHA_T, SIGMA_T, GAMMA, eps, reward)


def test_gradient_against_finite_differences():
    n = N.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(n), n)
    h = 1e-5
    for i in range(N.numel()):
        offset = torch.zeros_like(N).flatten()
        offset[i] = h
        offset = offset.view_as(N)
        difference = (objective(N + offset) - objective(N - offset)) / (2 * h)
        assert gradient.flatten()[i].item() == pytest.approx(difference.item(), rel=1e-6)


def test_value_is_the_mean_reward_of_the_guided_x0_hat():
    x0 = (X_T - SIGMA_T * (eps(X_T, N) + GAMMA * (EPS_Y - eps(X_T, N)))) / ALPHA_T
    assert objective(N).item() == pytest.approx(reward(x0).mean().item(), rel=1e-12)


def test_gradient_is_eq_32_for_a_linear_prior_and_reward():
    """grad_n J = (gamma - 1) sigma/alpha * (grad r)^T grad_n eps_n; eq. 32's gamma is one less (its CFG is eq. 27)."""
    v, n = randn(16, seed=4), N.clone().requires_grad_()
    value = reward_through_negative(
        n, X_T, EPS_Y, ALPHA_T, SIGMA_T, GAMMA,
        eps=lambda x_t, n: x_t + (n.flatten() @ MIX).view(1, 4, 2, 2),
        reward=lambda x0: x0.flatten(1) @ v,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(value, n)
    torch.testing.assert_close(gradient.flatten(), (GAMMA - 1) * SIGMA_T / ALPHA_T * (MIX @ v))


def test_no_gradient_through_the_prompt_prediction_or_the_sample():
    n, x_t, eps_y = N.clone().requires_grad_(), X_T.clone().requires_grad_(), EPS_Y.clone().requires_grad_()
    value = reward_through_negative(n, x_t, eps_y, ALPHA_T, SIGMA_T, GAMMA, eps, reward)
    gradients = torch.autograd.grad(value, [n, x_t, eps_y], allow_unused=True)
    assert gradients[0].abs().sum() > 0
    assert gradients[1] is None and gradients[2] is None


def test_sgd_is_one_step_uphill():
    negative = NegativeEmbedding(N, lr=1e-3, optimizer="sgd")
    n = N.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(n), n)
    value = negative.update(objective, 0)
    torch.testing.assert_close(negative.value, N + 1e-3 * gradient)
    assert value.item() == pytest.approx(objective(N).item())


def test_adam_moves_every_number_by_the_rate_first_and_uphill():
    negative = NegativeEmbedding(N, lr=1e-4)
    n = N.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(n), n)
    negative.update(objective, 0)
    torch.testing.assert_close(negative.value, N + 1e-4 * gradient.sign(), rtol=0, atol=1e-9)
    assert negative.drift == pytest.approx(1e-4 * N.numel() ** 0.5, rel=1e-5)


@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 1e-2), ("sgd", 1e-3)])
def test_the_reward_rises(optimizer: str, lr: float):
    negative = NegativeEmbedding(N, lr=lr, optimizer=optimizer)
    rewards = [negative.update(objective, 0) for _ in range(30)]
    assert rewards[-1] > rewards[0] + 0.1


def test_on_a_gaussian_prior_n_moves_away_from_what_is_rewarded():
    """eps_n falls with mu_n, so x0_hat falls with mu_n too (gamma > 1): rewarding x0_hat must push mu_n down."""
    negative = NegativeEmbedding(torch.zeros(1, 1, 1, dtype=torch.float64), lr=0.1)
    negative.update(
        lambda n: reward_through_negative(
            n, X_T, EPS_Y, ALPHA_T, SIGMA_T, GAMMA,
            eps=lambda x_t, n: gaussian_eps(x_t, n, 1.0, ALPHA_T, SIGMA_T),
            reward=lambda x0: x0.flatten(1).mean(1),
        ),
        0,
    )  # fmt: skip
    assert negative.value.item() == pytest.approx(-0.1, rel=1e-6)


def test_decay_falls_linearly_to_zero_and_then_n_stays():
    negative = NegativeEmbedding(N, lr=1e-4, optimizer="sgd", decay_steps=4)
    assert [negative.lr(step) for step in range(6)] == pytest.approx([1e-4, 0.75e-4, 0.5e-4, 0.25e-4, 0.0, 0.0])
    moved = []
    for step in range(6):
        before = negative.value.clone()
        negative.update(lambda n: n.sum(), step)
        moved.append((negative.value - before).mean().item())
    assert moved == pytest.approx([1e-4, 0.75e-4, 0.5e-4, 0.25e-4, 0.0, 0.0], abs=1e-12)


def test_decay_counts_the_steps_of_the_run():
    negative = NegativeEmbedding(N, lr=1e-4, optimizer="sgd", decay_steps=1000)
    negative.update(lambda n: n.sum(), step=500)  # say, after 500 plain steps
    torch.testing.assert_close(negative.value - N, torch.full_like(N, 0.5e-4))


def test_no_decay_is_a_constant_rate():
    assert NegativeEmbedding(N, lr=1e-4).lr(10_000) == 1e-4


def test_drift_is_the_distance_from_the_start():
    negative = NegativeEmbedding(torch.zeros(1, 1, 4), lr=0.5, optimizer="sgd")
    assert negative.drift == 0.0
    negative.update(lambda n: n.sum(), 0)
    negative.update(lambda n: n.sum(), 0)
    assert negative.drift == 2.0  # |(1, 1, 1, 1)|


def test_half_precision_embeddings_are_learned_in_fp32():
    negative = NegativeEmbedding(torch.ones(1, 2, 2, dtype=torch.float16), lr=1e-4)
    negative.update(lambda n: n.sum(), 0)
    assert negative.value.dtype == torch.float32
    assert negative.drift == pytest.approx(2e-4, rel=1e-3)


def test_a_gradient_that_is_not_finite_leaves_that_run_s_n_where_it_is():
    """Two runs in a batch, the second overflows once; afterwards both move again."""
    n_0 = randn(2, 3, 2)
    negative, factor = NegativeEmbedding(n_0, 0.1, "sgd"), torch.tensor([1.0, float("inf")]).double()
    negative.update(lambda n: (n.sum((1, 2)) * factor).sum(), 0)
    torch.testing.assert_close(negative.value, n_0 + 0.1 * torch.tensor([1.0, 0.0]).double().view(2, 1, 1))
    negative.update(lambda n: n.sum(), 0)
    torch.testing.assert_close(negative.value, n_0 + 0.1 * torch.tensor([2.0, 1.0]).double().view(2, 1, 1))


def test_the_given_embedding_is_left_alone_and_no_grad_callers_may_update():
    n_0 = N.clone()
    with torch.no_grad():
        NegativeEmbedding(n_0, lr=1.0).update(objective, 0)
    assert torch.equal(n_0, N)


def test_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="'lion'"):
        NegativeEmbedding(N, lr=1e-4, optimizer="lion")
