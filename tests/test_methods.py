"""The update rules on a prior with closed-form eps, against hand loops, DDIM and recorded reference gradients."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor

from psd.config import RunConfig
from psd.guidance import cfg, norm, x0_hat
from psd.methods.sds import pick
from psd.schedule import NoiseSchedule, descending_timesteps
from tests.gaussian import GaussianPrior, Predictions, step_of, winner_of

LOSSES = Path(__file__).parent / "golden" / "losses"
CONFIG = RunConfig(gamma=7.5, pref_weight=1.0)
ALPHA_T, SIGMA_T = torch.tensor(0.6), torch.tensor(0.8)


def predictions(noises: int = 2, batch: int = 3, seed: int = 0) -> Predictions:
    """Unrelated random predictions: nothing may depend on them being a real prior's."""
    generator = torch.Generator().manual_seed(seed)
    x_c = torch.randn(batch, 4, 2, 2, generator=generator)
    noise, eps_y, eps_n = torch.randn(3, noises, batch, 4, 2, 2, generator=generator).unbind()
    return Predictions(ALPHA_T * x_c + SIGMA_T * noise, noise, eps_y, eps_n, ALPHA_T, SIGMA_T)


def fixed_score(rows: list[list[float]]):
    return lambda x0: torch.tensor(rows)


def never_score(x0: Tensor) -> Tensor:
    raise AssertionError("the reward was looked at")


@pytest.mark.parametrize(("weighting", "w_t"), [("one", 1.0), ("sds", 0.64), ("recon", 4 / 3)])
def test_sds_is_guided_prediction_minus_noise(weighting: str, w_t: float):
    p = predictions()
    guided = step_of("sds", p, replace(CONFIG, weighting=weighting), never_score)
    torch.testing.assert_close(guided.g, w_t * (cfg(p.eps_y[0], p.eps_n[0], 7.5) - p.noise[0]))
    assert torch.equal(guided.eps_cfg, cfg(p.eps_y[0], p.eps_n[0], 7.5))


def test_psd_with_one_noise_is_sds_bit_for_bit():
    p = predictions(noises=1)
    with_preference, plain = step_of("psd", p, CONFIG, never_score), step_of("sds", p, CONFIG, never_score)
    assert torch.equal(with_preference.g, plain.g)
    assert torch.equal(with_preference.eps_cfg, plain.eps_cfg)
    assert with_preference.terms.keys() == plain.terms.keys() == {"delta_gen", "delta_cls"}


def ddim_by_psd(prior: GaussianPrior, schedule: NoiseSchedule, timesteps: list[int], x_T: Tensor, gamma: float):
    """Image mode without preference: eps^1 = k and x_c <- x_c - (sigma/alpha) g. Yields x_c after every step."""
    config = RunConfig(gamma=gamma, method="sds")
    alpha_t, sigma_t = schedule.alpha_t(timesteps[0]), schedule.sigma_t(timesteps[0])
    k = cfg(prior.eps_y(x_T, alpha_t, sigma_t), prior.eps_n(x_T, alpha_t, sigma_t), gamma)
    x_c = x0_hat(x_T, k, alpha_t, sigma_t)
    for t in timesteps:  # the first step repeats the start and changes nothing
        alpha_t, sigma_t = schedule.alpha_t(t), schedule.sigma_t(t)
        guided = step_of("sds", prior.predict(x_c, k[None], alpha_t, sigma_t), config, never_score)
        x_c, k = x_c - sigma_t / alpha_t * guided.g, guided.eps_cfg
        yield x_c


@pytest.mark.parametrize("gamma", [1.0, 7.5])
@pytest.mark.parametrize("steps", [20, 50])
def test_without_preference_it_is_the_ddim_of_diffusers(gamma: float, steps: int):
    """set_alpha_to_one=True makes diffusers' last sample its last x0_hat, which is our x_c."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(steps)
    schedule, prior = NoiseSchedule(scheduler.alphas_cumprod), GaussianPrior()
    x_t = x_T = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    ours = ddim_by_psd(prior, schedule, scheduler.timesteps.tolist(), x_T, gamma)
    for t, x_c in zip(scheduler.timesteps, ours, strict=True):
        alpha_t, sigma_t = schedule.alpha_t(t), schedule.sigma_t(t)
        eps = cfg(prior.eps_y(x_t, alpha_t, sigma_t), prior.eps_n(x_t, alpha_t, sigma_t), gamma)
        step = scheduler.step(eps, t, x_t, eta=0.0)
        x_t = step.prev_sample
        torch.testing.assert_close(x_c, step.pred_original_sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_c, x_t, rtol=1e-5, atol=1e-5)


def test_without_preference_it_is_ddim_on_our_own_timesteps():
    """x_s = alpha_s x0_hat(x_t) + sigma_s eps~(x_t), in double precision."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    schedule, prior = NoiseSchedule((1 - betas).cumprod(0)), GaussianPrior()
    timesteps = descending_timesteps(30, 0.98, 0.02, 1000).tolist()
    x_T = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    *_, x_c = ddim_by_psd(prior, schedule, timesteps, x_T, gamma=3.0)

    x_t, alpha_t, sigma_t = x_T, schedule.alpha_t(timesteps[0]), schedule.sigma_t(timesteps[0])
    for s in [*timesteps[1:], None]:
        eps = cfg(prior.eps_y(x_t, alpha_t, sigma_t), prior.eps_n(x_t, alpha_t, sigma_t), 3.0)
        x_0 = (x_t - sigma_t * eps) / alpha_t
        if s is not None:
            alpha_t, sigma_t = schedule.alpha_t(s), schedule.sigma_t(s)
            x_t = alpha_t * x_0 + sigma_t * eps
    torch.testing.assert_close(x_c, x_0, rtol=0, atol=1e-11)


def test_the_winner_is_chosen_per_sample_and_ties_go_to_the_first():
    p = predictions()
    guided = step_of("psd", p, CONFIG, fixed_score([[1.0, 0.0, 5.0], [0.0, 2.0, 5.0]]))
    assert winner_of(p, guided, 7.5).tolist() == [0, 1, 0]
    assert guided.terms["reward_gap"].tolist() == [1.0, 2.0, 0.0]
    assert guided.terms["reward_winner"].tolist() == [1.0, 2.0, 5.0]


@pytest.mark.parametrize(("x0_from", "gamma"), [("cfg", 7.5), ("cond", 1.0)])
def test_both_x0_hat_are_scored_in_one_call(x0_from: str, gamma: float):
    p, seen = predictions(), []

    def score(x0: Tensor) -> Tensor:
        seen.append(x0)
        return x0.flatten(2).mean(2)

    guided = step_of("psd", p, replace(CONFIG, x0_from=x0_from), score)
    assert len(seen) == 1
    expected = x0_hat(p.x_t, cfg(p.eps_y, p.eps_n, gamma), ALPHA_T, SIGMA_T)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)
    assert winner_of(p, guided, 7.5).tolist() == expected.flatten(2).mean(2).argmax(0).tolist()


def test_ranking_is_in_fp32_and_no_gradient_is_kept():
    p = predictions()
    p = p._replace(eps_n=p.eps_n.requires_grad_())
    guided = step_of("psd", p, CONFIG, lambda x0: (x0.flatten(2).mean(2)).to(torch.bfloat16))
    assert guided.terms["reward_gap"].dtype == torch.float32
    assert not guided.g.requires_grad


NAN = float("nan")


def test_a_noise_that_cannot_be_scored_loses_and_adds_no_preference():
    """Sample 0: the first has no score; 1: the second; 2: both, and the step is plain."""
    p = predictions()
    guided = step_of("psd", p, CONFIG, fixed_score([[NAN, 1.0, NAN], [-5.0, NAN, NAN]]))
    assert winner_of(p, guided, 7.5).tolist() == [1, 0, 0]
    assert guided.terms["unscored"].tolist() == [1, 1, 2]
    selected = step_of("psd", p, replace(CONFIG, pref_weight=0.0), fixed_score([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]))
    assert torch.equal(guided.g, selected.g) and torch.isfinite(guided.g).all()
    assert guided.terms["beta_r"].tolist() == guided.terms["delta_pref"].tolist() == [0, 0, 0]
    assert guided.terms["reward_winner"].isnan().tolist() == [False, False, True]


def test_a_loser_of_no_numbers_spoils_nothing():
    """Its x0_hat is NaN, so it cannot be scored; nor may its prediction reach g."""
    p = predictions()
    p.eps_y[1, 0] = NAN
    guided = step_of("psd", p, CONFIG, lambda x0: x0.flatten(2).mean(2))
    assert torch.isfinite(guided.g).all() and guided.terms["unscored"].tolist() == [1, 0, 0]


def test_rescaling_leaves_independent_samples_apart():
    p = predictions()
    config = replace(CONFIG, rescale=0.7)
    rewards = [[1.0, 0.0, 5.0], [0.0, 2.0, 5.0]]
    score = fixed_score(rewards)
    together = step_of("psd", p, config, score)
    for b in range(3):
        alone = p._replace(**{f: getattr(p, f)[:, b : b + 1] for f in ("x_t", "noise", "eps_y", "eps_n")})
        guided = step_of("psd", alone, config, fixed_score([row[b : b + 1] for row in rewards]))
        torch.testing.assert_close(guided.g[0], together.g[b])
    as_views = step_of("psd", p, config, score, views=3)
    assert not torch.allclose(as_views.g, together.g)


def test_psd_equals_eq_12_written_as_a_loop():
    p, config = predictions(), replace(CONFIG, pref_form="centred", reward_scale=0.5, pref_weight=2.0, weighting="sds")
    rewards = [[1.0, 0.0, 5.0], [0.0, 2.0, 5.0]]
    guided = step_of("psd", p, config, fixed_score(rewards))
    for b in range(3):
        w = 0 if rewards[0][b] >= rewards[1][b] else 1
        eps_cfg = [p.eps_n[i, b] + 7.5 * (p.eps_y[i, b] - p.eps_n[i, b]) for i in range(2)]
        delta_gen = p.eps_n[w, b] - p.noise[w, b]
        delta_cls = p.eps_y[w, b] - p.eps_n[w, b]
        delta_pref = eps_cfg[w] - p.noise[w, b] - eps_cfg[1 - w] + p.noise[1 - w, b]
        gap = rewards[w][b] - rewards[1 - w][b]
        beta_r = 7.5 * delta_cls.norm() / delta_pref.norm() / (1 + torch.tensor(0.5 * gap).exp())
        g = 0.64 * (delta_gen + 7.5 * delta_cls + 2.0 * beta_r * delta_pref)
        torch.testing.assert_close(guided.g[b], g, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(guided.eps_cfg[b], eps_cfg[w])
        terms = {name: value[b].item() for name, value in guided.terms.items()}
        assert terms == pytest.approx(
            {
                "delta_gen": delta_gen.norm().item(),
                "delta_cls": 7.5 * delta_cls.norm().item(),
                "delta_pref": (2.0 * beta_r * delta_pref).norm().item(),
                "beta_r": beta_r.item(),
                "reward_gap": gap,
                "reward_winner": rewards[w][b],
                "unscored": 0,
            },
            rel=1e-5,
        )


def test_without_weight_only_the_selection_is_left():
    """pref_weight = 0 is plain score distillation at the winner's noise."""
    p = predictions()
    guided = step_of("psd", p, replace(CONFIG, pref_weight=0.0), fixed_score([[1.0, 0.0, 5.0], [0.0, 2.0, 5.0]]))
    winner = winner_of(p, guided, 7.5)
    selected = p._replace(**{f: pick(getattr(p, f), winner)[None] for f in ("x_t", "noise", "eps_y", "eps_n")})
    plain = step_of("sds", selected, CONFIG, never_score)
    assert torch.equal(guided.g, plain.g)
    assert torch.equal(guided.eps_cfg, plain.eps_cfg)


def test_swapping_the_noises_changes_nothing_but_the_index():
    p, rewards = predictions(), [[1.0, 0.0, 3.0], [0.0, 2.0, 5.0]]
    swapped = p._replace(**{f: getattr(p, f).flip(0) for f in ("x_t", "noise", "eps_y", "eps_n")})
    there, back = (
        step_of("psd", p, CONFIG, fixed_score(rewards)),
        step_of("psd", swapped, CONFIG, fixed_score(rewards[::-1])),
    )
    assert torch.equal(there.g, back.g)
    assert torch.equal(winner_of(p, there, 7.5), 1 - winner_of(swapped, back, 7.5))


def test_a_batch_is_its_samples():
    p, rewards = predictions(), [[1.0, 0.0, 5.0], [0.0, 2.0, 5.0]]
    together = step_of("psd", p, CONFIG, fixed_score(rewards))
    for b in range(3):
        alone = p._replace(**{f: getattr(p, f)[:, b : b + 1] for f in ("x_t", "noise", "eps_y", "eps_n")})
        guided = step_of("psd", alone, CONFIG, fixed_score([row[b : b + 1] for row in rewards]))
        torch.testing.assert_close(guided.g[0], together.g[b])


def test_two_equal_noises_add_no_preference():
    p = predictions(noises=1)
    twice = p._replace(**{f: getattr(p, f).repeat(2, 1, 1, 1, 1) for f in ("x_t", "noise", "eps_y", "eps_n")})
    for form in ("paper", "centred"):
        guided = step_of("psd", twice, replace(CONFIG, pref_form=form), fixed_score([[0.0] * 3] * 2))
        assert torch.equal(guided.g, step_of("sds", p, CONFIG, never_score).g)


def preference_along_reward(prior: GaussianPrior, form: str, gamma: float, abar: float, pairs: int = 2000) -> float:
    """Mean of -beta_r * delta_pref, the update that preference adds, along the reward's gradient; many noise pairs."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(16, generator=generator, dtype=torch.float64), dim=0)
    noise = torch.randn(2, pairs, 4, 2, 2, generator=generator, dtype=torch.float64)
    x_c = torch.randn(1, 4, 2, 2, generator=generator, dtype=torch.float64).expand(pairs, -1, -1, -1)
    alpha_t, sigma_t = (torch.tensor(a, dtype=torch.float64).sqrt() for a in (abar, 1 - abar))
    p = prior.predict(x_c, noise, alpha_t, sigma_t)
    config = RunConfig(gamma=gamma, pref_form=form)

    def score(x0: Tensor) -> Tensor:
        return x0.flatten(2) @ direction

    preference = step_of("psd", p, config, score).g - step_of("psd", p, replace(config, pref_weight=0.0), score).g
    return -(preference.flatten(1) @ direction).mean().item()


NARROW, EQUAL = GaussianPrior(s_y=0.3, s_n=1.0), GaussianPrior(s_y=1.0, s_n=1.0)


@pytest.mark.parametrize("abar", [0.02, 0.3, 0.7])
@pytest.mark.parametrize("gamma", [1.0, 7.5, 50.0])
@pytest.mark.parametrize("prior", [NARROW, EQUAL], ids=["narrow", "equal"])
def test_the_centred_form_always_rises_along_the_reward(prior: GaussianPrior, gamma: float, abar: float):
    assert preference_along_reward(prior, "centred", gamma, abar) > 0


@pytest.mark.parametrize("abar", [0.02, 0.3, 0.7])
@pytest.mark.parametrize(
    ("prior", "gamma", "sign"),
    [(NARROW, 1.0, -1), (EQUAL, 7.5, -1), (EQUAL, 50.0, -1), (NARROW, 7.5, 1), (NARROW, 50.0, 1)],
)
def test_the_paper_form_rises_only_when_guidance_overshoots(prior: GaussianPrior, gamma: float, sign: int, abar: float):
    """With x0_hat linear in the noise, d x0_hat/d noise = (sigma/alpha)(1 - a) where a = sigma * d eps~/d x_t.

    The winner has the larger (1 - a) v.noise, and the paper's form adds -a times its lead in v.noise: positive exactly
    if a < 0 or a > 1. Here 0 <= a, and a > 1 is guidance so strong that x0_hat moves against the noise; it ends at
    the very last timesteps, where a -> 0 again. The centred form adds (1 - a) times the lead: positive for every a.
    """
    assert sign * preference_along_reward(prior, "paper", gamma, abar) > 0


def test_the_paper_form_falls_again_at_the_last_timesteps():
    assert preference_along_reward(NARROW, "paper", 7.5, abar=0.98) > 0  # about t_min = 0.02 of Stable Diffusion
    assert preference_along_reward(NARROW, "paper", 7.5, abar=0.99) < 0
    assert preference_along_reward(NARROW, "centred", 7.5, abar=0.99) > 0


def test_both_forms_have_the_magnitude_that_beta_r_gives_them():
    p, rewards = predictions(), [[1.0, 0.0, 5.0], [0.0, 2.0, 5.0]]
    paper, centred = (
        step_of("psd", p, replace(CONFIG, pref_form=form), fixed_score(rewards)) for form in ("paper", "centred")
    )
    expected = paper.terms["delta_cls"] * torch.sigmoid(-paper.terms["reward_gap"])
    torch.testing.assert_close(paper.terms["delta_pref"], expected)
    torch.testing.assert_close(centred.terms["delta_pref"], expected)


def golden(name: str, case: str) -> tuple[dict[str, Tensor], dict]:
    tensors = load_file(LOSSES / f"{name}.safetensors")
    fixture = {key.removeprefix(f"{case}."): value for key, value in tensors.items() if key.startswith(f"{case}.")}
    return fixture | {"alphas_cumprod": tensors.get("alphas_cumprod")}, json.loads(
        (LOSSES / f"{name}.json").read_text()
    )["cases"][case]


def assert_same_gradient(got: Tensor, want: Tensor, relative: float) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=relative * want.abs().max().item())


@pytest.mark.parametrize("case", ["sds_w", "sds_w_b1", "uniform"])
def test_sds_gradient_of_threestudio(case: str):
    """threestudio starts its guidance from the text prediction: its scale s is gamma = s + 1 here."""
    fixture, settings = golden("threestudio_sds", case)
    weighting = "one" if settings.get("weighting_strategy") == "uniform" else "sds"
    config = RunConfig(gamma=settings["guidance_scale"] + 1, weighting=weighting)
    for b in range(settings["B"]):  # every sample has a timestep of its own there
        abar = fixture["alphas_cumprod_at_t"][b]
        x_t, noise, eps_y, eps_n = (
            fixture[name][None, b : b + 1] for name in ("unet_input_x", "noise", "eps_text", "eps_uncond")
        )
        p = Predictions(x_t, noise, eps_y, eps_n, abar.sqrt(), (1 - abar).sqrt())
        assert_same_gradient(
            step_of("sds", p, config, never_score).g / settings["B"],
            fixture["dL_dlatents"][b : b + 1],
            1e-4 if config.gamma >= 50 else 1e-5,
        )


@pytest.mark.parametrize(
    ("case", "weighting"),
    [("sds_no_recon", "sds"), *((f"recon_rescale{share}", "recon") for share in ("0", "05", "1"))],
)
def test_sds_gradient_of_mvdream(case: str, weighting: str):
    """Its reconstruction loss, x_c - x0_hat, is score distillation with w = sigma/alpha, rescaled or not."""
    fixture, settings = golden("mvdream_recon", case)
    abar = fixture["alphas_cumprod"][settings["t"]]
    alpha_t, sigma_t = abar.sqrt(), (1 - abar).sqrt()
    views = len(fixture["latents"])
    x_t = alpha_t * fixture["latents"] + sigma_t * fixture["noise"]
    torch.testing.assert_close(x_t, fixture["unet_input_x"][:views], rtol=1e-5, atol=1e-5)
    p = Predictions(
        *(x[None] for x in (x_t, fixture["noise"], fixture["eps_text"], fixture["eps_uncond"])), alpha_t, sigma_t
    )
    rescale = settings.get("recon_std_rescale", 0.0)
    config = RunConfig(gamma=settings["guidance_scale"], weighting=weighting, rescale=rescale)
    guided = step_of("sds", p, config, never_score, views)
    assert_same_gradient(guided.g / views, fixture["dL_dlatents"], 1e-4 if rescale else 1e-5)


@pytest.mark.parametrize("case", ["beta0_all_dpo", "beta0_tie", "imagereward_scale_scores", "two_objects"])
def test_winner_and_scored_x0_hat_of_dreamdpo(case: str):
    """Same x0_hat shown to the reward, same winner per view; its winner is read off its gradient."""
    fixture, settings = golden("dreamdpo", case)
    abar = fixture["alphas_cumprod"][settings["t"]]
    alpha_t, sigma_t = abar.sqrt(), (1 - abar).sqrt()
    noise, eps_y, eps_n = (
        torch.stack([fixture[f"{name}_1"], fixture[f"{name}_2"]]) for name in ("noise", "eps_text", "eps_null")
    )
    p = Predictions(alpha_t * fixture["latents"] + sigma_t * noise, noise, eps_y, eps_n, alpha_t, sigma_t)
    seen = []

    def score(x0: Tensor) -> Tensor:
        seen.append(x0)
        return torch.stack([fixture["score_1"], fixture["score_2"]])

    guided = step_of("psd", p, RunConfig(gamma=settings["guidance_scale"]), score)
    for x0, name in zip(seen[0], ("x0_scored_1", "x0_scored_2"), strict=True):
        assert_same_gradient(x0, fixture[name], 1e-5)

    residual_if_first = (cfg(eps_y[0], eps_n[0], settings["guidance_scale"]) - noise[0]) - (eps_y[1] - noise[1])
    winner = winner_of(p, guided, settings["guidance_scale"])
    want = residual_if_first * sigma_t**2 / len(winner)
    first_won = norm(want - fixture["dL_dlatents"]) < 1e-3 * norm(fixture["dL_dlatents"])
    preferred = guided.terms["reward_gap"] >= settings["beta_dpo"]  # the other views took its plain branch
    assert preferred.any()
    assert torch.equal(winner[preferred] == 0, first_won[preferred])
