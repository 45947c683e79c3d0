"""The terms of preference score distillation: pure functions of noise predictions (eqs. 1, 3, 11, 12).

Knows nothing of models, rewards, timesteps or batches of arms. Symbols are the paper's, in ASCII: x_c clean sample,
x_t noisy sample, eps_y and eps_n the prior's predictions under the prompt y and the negative embedding n, gamma the
guidance scale, (w, l) the winner and loser of a pair.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def cfg(eps_y: Float[Tensor, "*shape"], eps_n: Float[Tensor, "*shape"], gamma: float) -> Float[Tensor, "*shape"]:
    """Classifier-free guidance, eps~ (eq. 3): eps_n + gamma * (eps_y - eps_n).

    gamma = 0 is the negative prediction, 1 the prompt's. Code that starts from eps_y (threestudio, and eq. 27 here)
    calls gamma - 1 its scale.
    """
    return eps_n + gamma * (eps_y - eps_n)


def x0_hat(
    x_t: Float[Tensor, "*shape"], eps: Float[Tensor, "*shape"], alpha_t: Float[Tensor, ""], sigma_t: Float[Tensor, ""]
) -> Float[Tensor, "*shape"]:
    """One-step prediction of the clean sample by Tweedie's formula (Sec. 3.1): (x_t - sigma_t * eps) / alpha_t.

    Not clamped: clamping latents would break the DDIM identity of the image mode.
    """
    return (x_t - sigma_t * eps) / alpha_t


def rescale(
    x_t: Float[Tensor, "*N B C h w"],
    eps_cfg: Float[Tensor, "*N B C h w"],
    eps_y: Float[Tensor, "*N B C h w"],
    alpha_t: Float[Tensor, ""],
    sigma_t: Float[Tensor, ""],
    share: float,
    views: int,
) -> Float[Tensor, "*N B C h w"]:
    """eps~ with the contrast of its x0_hat taken back to that of eps_y's, `share` of the way (MVDream, 0.5).

        x0 <- share * x0 * std(x0_y) / std(x0) + (1 - share) * x0,   std over the `views` rows of one object together

    Large gamma makes x0_hat overshoot; share 0 gives eps_cfg back. Source: MVDream's guidance, after Lin et al. 2023.
    """
    if not share:
        return eps_cfg
    x0, x0_y = x0_hat(x_t, eps_cfg, alpha_t, sigma_t), x0_hat(x_t, eps_y, alpha_t, sigma_t)
    grouped, grouped_y = x0.unflatten(-4, (-1, views)), x0_y.unflatten(-4, (-1, views))
    ratio = grouped_y.flatten(-4).std(-1) / grouped.flatten(-4).std(-1).clamp(min=1e-8)
    scaled = alpha_t * grouped * (1 + share * (ratio[..., None, None, None, None] - 1))
    return (x_t - scaled.flatten(-5, -4)) / sigma_t


def delta_gen(eps_n: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Unconditional prior (eq. 12): eps(x_t, n, t) - noise."""
    return eps_n - noise


def delta_cls(eps_y: Float[Tensor, "*shape"], eps_n: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Implicit classifier of classifier-free guidance (eq. 3): eps(x_t, y, t) - eps(x_t, n, t).

    Unweighted: gamma and w(t) are the caller's. Both at the winner's x_t (Algorithm 2 prints x_t^l in one: a misprint).
    """
    return eps_y - eps_n


def delta_pref(
    eps_w: Float[Tensor, "*shape"],
    eps_l: Float[Tensor, "*shape"],
    noise_w: Float[Tensor, "*shape"],
    noise_l: Float[Tensor, "*shape"],
    form: str,
) -> Float[Tensor, "*shape"]:
    """Preference score guidance of a ranked pair; eps_w and eps_l are the guided predictions eps~ of eq. 3.

    form "paper"    eps_w - eps_l                          (term B of eq. 10; eq. 12, App. E)
    form "centred"  (eps_w - noise_w) - (eps_l - noise_l)  (the noises as control variate, as in eq. 22)

    Raises ValueError on another form.
    """
    if form == "paper":
        return eps_w - eps_l
    if form == "centred":
        return (eps_w - noise_w) - (eps_l - noise_l)
    raise ValueError(f"pref_form must be 'paper' or 'centred', not {form!r}")


def beta_r(
    delta_cls: Float[Tensor, "B ..."],
    delta_pref: Float[Tensor, "B ..."],
    gamma: float,
    reward_gap: Float[Tensor, " B"],
    reward_scale: float = 1.0,
) -> Float[Tensor, " B"]:
    """Weight of delta_pref (eq. 12): gamma * |delta_cls| / |delta_pref| * sigmoid(-reward_scale * (r_w - r_l)).

    Finite where delta_pref is zero, so that beta_r * delta_pref is zero there.
    """
    balance = gamma * norm(delta_cls) / norm(delta_pref).clamp(min=1e-12)
    return balance * torch.sigmoid(-reward_scale * reward_gap)


def w_t(alpha_t: Float[Tensor, ""], sigma_t: Float[Tensor, ""], weighting: str) -> Float[Tensor, ""]:
    """Weight w(t) of the whole gradient, the pipeline's choice.

    weighting "one"    1                (CFD, DDIM)
    weighting "sds"    1 - abar_t       (DreamFusion; = sigma_t^2)
    weighting "recon"  sigma_t/alpha_t  (the x0 reconstruction loss of MVDream: w * (eps~ - eps) = x_c - x0_hat)

    Raises ValueError on another weighting.
    """
    if weighting == "one":
        return torch.ones_like(sigma_t)
    if weighting == "sds":
        return sigma_t**2
    if weighting == "recon":
        return sigma_t / alpha_t
    raise ValueError(f"weighting must be 'one', 'sds' or 'recon', not {weighting!r}")


def norm(x: Float[Tensor, "B ..."]) -> Float[Tensor, " B"]:
    """Euclidean norm of each sample, over all axes but the first; at least fp32, since squares overflow in fp16."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
