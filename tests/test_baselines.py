"""The methods beside preference score distillation, against what their reference implementations recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import get_protocol_members

from psd.config import RunConfig
from psd.contracts import Answer, Ask, Guided, Now, Prior, Setup
from psd.methods import METHODS
from psd.methods.csd import classifier_score, three_way
from psd.methods.dreamreward import balance
from psd.methods.rewardsds import candidate_weights, explored_timesteps
from psd.methods.sdi import ancestral_std, inversion_step, inversion_timesteps
from psd.models.priors.lora import LoRAPrior
from psd.schedule import NoiseSchedule
from tests.test_methods import assert_same_gradient, golden

GOLDEN = Path(__file__).parent / "golden"
Y, N = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
DREAMDPO = (
    "beta0_all_dpo", "beta0_tie", "beta_exact_equal", "beta_large_all_sds", "beta_mixed", "imagereward_scale_scores",
    "two_objects",
)  # fmt: skip


def step_through(
    method: str, config: RunConfig, now: Now, answer: Callable[[Ask], Answer], score=None, schedule=None, views: int = 1
) -> Guided:
    """What a method's step comes to where the prior answers so."""
    prior = SimpleNamespace(embed=lambda prompts: 2 * torch.ones(len(prompts), 1, 1))
    made = METHODS[method].load()(Setup(config, prior, Y, N, score, schedule, views))
    assert made.noises(now.step) == len(now.noise)
    steps, answered = made.step(now), None
    with torch.no_grad():
        while True:
            try:
                answered = answer(steps.send(answered))
            except StopIteration as end:
                return end.value


def now_at(abar: Tensor, t: int, x_c: Tensor, noise: Tensor, step: int = 0, share: float = 0.0) -> Now:
    return Now(step, share, t, abar.sqrt(), (1 - abar).sqrt(), None, x_c, noise)


@pytest.mark.parametrize("case", ["csd_default", "csd_annealed_negative", "csd_before_first_update_step"])
def test_csd_gradient(case: str):
    """(1 - abar) times the sum of the predictions by its effective factors, for every sample at its own t."""
    fixture, settings = golden("csd", case)
    factors = settings["effective"]
    for b, t in enumerate(settings["t"]):
        abar = fixture["alphas_cumprod"][t]
        eps = [fixture[f"eps_{name}"][b : b + 1] for name in ("text", "negprompt", "null")]
        delta = classifier_score(*eps, tuple(factors[name] for name in ("cond", "uncond", "null")))
        assert_same_gradient((1 - abar) * delta / settings["B"], fixture["dL_dlatents"][b : b + 1], 1e-5)


def test_csd_goes_from_the_empty_prompt_to_the_negative_one():
    assert three_way(0.0) == (1.0, 0.0, -1.0)
    assert three_way(0.25) == (1.0, -0.5, -0.5)
    assert three_way(0.5) == three_way(1.0) == (1.0, -1.0, 0.0)
    eps = {0.0: 3.0, 1.0: 5.0, 2.0: 11.0}  # under y, n and the empty prompt
    x_c = torch.zeros(2, 4, 2, 2)

    def answer(ask: Ask) -> Answer:
        return tuple(torch.full_like(ask.x_t, eps[cond.mean().item()]) for cond in ask.conds)

    for weights, share, want in [("two-way", 0.25, -2.0), ("three-way", 0.0, -8.0), ("three-way", 0.25, 3 - 2.5 - 5.5)]:
        now = now_at(torch.tensor(0.36), 500, x_c, torch.zeros(1, 2, 4, 2, 2), share=share)
        guided = step_through("csd", RunConfig(csd_weights=weights), now, answer)
        torch.testing.assert_close(guided.g, torch.full_like(x_c, want))


@pytest.mark.parametrize("case", DREAMDPO)
def test_dreamdpo_gradient_of_its_code(case: str):
    fixture, settings = golden("dreamdpo", case)
    abar, x_c = fixture["alphas_cumprod"][settings["t"]], fixture["latents"]
    noise, eps_y, eps_n = (
        torch.stack([fixture[f"{name}_1"], fixture[f"{name}_2"]]) for name in ("noise", "eps_text", "eps_null")
    )
    config = RunConfig(
        gamma=settings["guidance_scale"], weighting="sds", dpo_form="code", dpo_threshold=settings["beta_dpo"]
    )
    scores = torch.stack([fixture["score_1"], fixture["score_2"]])
    guided = step_through(
        "dreamdpo", config, now_at(abar, settings["t"], x_c, noise), lambda ask: (eps_y, eps_n), lambda x_0: scores
    )
    assert_same_gradient(guided.g / len(x_c), fixture["dL_dlatents"], 1e-5)


def test_dreamdpo_of_the_paper_guides_both():
    noise, eps_y, eps_n = torch.randn(3, 2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    scores = torch.tensor([[1.0, 0.0, torch.nan], [0.0, 1.0, 0.0]])
    now = now_at(torch.tensor(0.36), 500, torch.zeros(3, 4, 2, 2), noise)
    guided = step_through("dreamdpo", RunConfig(gamma=7.5), now, lambda ask: (eps_y, eps_n), lambda x_0: scores)
    residual = eps_n + 7.5 * (eps_y - eps_n) - noise
    torch.testing.assert_close(guided.g[0], residual[0, 0] - residual[1, 0])
    torch.testing.assert_close(guided.g[1], residual[1, 1] - residual[0, 1])
    assert not guided.g[2].any()  # a noise without a score: nothing is preferred


@pytest.mark.parametrize("case", ["invert", "invert_eta0_low_t", "invert_high_t", "invert_shifted"])
def test_sdi_gradient(case: str):
    """Its scales start from the text prediction (gamma = s + 1), its loss is a mean, and it reads x_last at t.

    Of the clean level it asks at the grid's next value below 0, for which we ask at 0.
    """
    fixture, settings = golden("threestudio_sdi", case)
    schedule, steps = NoiseSchedule(fixture["alphas_cumprod"]), settings["inversion_n_steps"]
    t, last = settings["t"], fixture["inversion_timesteps"][-1].item()
    levels = inversion_timesteps(t, last, steps, 1000)
    assert levels[1:] == fixture["inversion_timesteps"].tolist()[1:]
    bias = {0.0: fixture["bias_text"], 1.0: fixture["bias_uncond"]}

    def eps(x: Tensor, at: int, gamma: float) -> Tensor:
        y, n = (settings["fake_unet_A"] * x * (1 + at / 1000) + bias[cond] for cond in (0.0, 1.0))
        return n + gamma * (y - n)

    x = fixture["latents"]
    below = fixture["inversion_timesteps"][0].item()
    for i, (level, onto) in enumerate(pairwise(levels)):
        at = below if level < 0 else level
        x = inversion_step(x, eps(x, at, settings["inversion_guidance_scale"] + 1), level, onto, schedule)
        std = settings["inversion_eta"] * ancestral_std(level, onto, schedule)
        x = x + std * fixture["randn_like_draws"][i]
    assert_same_gradient(x, fixture["latents_noisy"], 1e-4)
    target = (x - schedule.sigma_t(t) * eps(x, t, settings["guidance_scale"] + 1)) / schedule.alpha_t(t)
    assert_same_gradient((fixture["latents"] - target) / x.numel(), fixture["dL_dlatents"], 1e-4)

    config = RunConfig(
        gamma=settings["guidance_scale"] + 1, weighting="recon", inversion_steps=steps, inversion_shift=False,
        inversion_gamma=settings["inversion_guidance_scale"] + 1, inversion_eta=settings["inversion_eta"],
    )  # fmt: skip
    if last != t:
        return  # its shift is drawn otherwise here
    draws = fixture["randn_like_draws"] if settings["inversion_eta"] else fixture["randn_like_draws"][:0]
    more = torch.zeros(steps + 1 if settings["inversion_eta"] else 0, *x.shape)
    more[: len(draws)] = draws
    now = now_at(fixture["alphas_cumprod"][t], t, fixture["latents"], torch.cat([torch.zeros(1, *x.shape), more]))

    def answer(ask: Ask) -> Answer:
        at = t if ask.t is None else ask.t or below
        return tuple(
            settings["fake_unet_A"] * ask.x_t * (1 + at / 1000) + bias[cond.mean().item()] for cond in ask.conds
        )

    guided = step_through("sdi", config, now, answer, schedule=schedule)
    assert_same_gradient(guided.g / x.numel(), fixture["dL_dlatents"], 1e-4)


@pytest.mark.parametrize(
    ("strategy", "name"), [("min-max", "min_max_default"), ("best", "best_1"), ("softmax", "weighted")]
)
@pytest.mark.parametrize("case", ["spread", "close", "large"])
def test_rewardsds_weighs_as_its_code(strategy: str, name: str, case: str):
    fixture = load_file(GOLDEN / "losses" / "rewardsds_strategies.safetensors")
    rewards, losses, want = (fixture[f"{name}.{case}.{what}"] for what in ("rewards", "losses", "loss_out"))
    weights = candidate_weights(rewards[:, None], strategy)[:, 0]
    if want.isfinite():
        torch.testing.assert_close((weights * losses).sum(), want, rtol=1e-5, atol=1e-5)
    assert weights.isfinite().all()  # its softmax overflows at rewards above 88


def test_a_candidate_without_a_score_is_the_worst():
    rewards = torch.tensor([[1.0], [torch.nan], [2.0], [3.0], [4.0]])
    assert candidate_weights(rewards, "min-max")[:, 0].tolist() == pytest.approx([-0.05, -0.05, 0.0, 0.45, 0.45])
    with pytest.raises(ValueError, match="softmax"):
        candidate_weights(rewards, "median")


@pytest.mark.parametrize("case", ["t0", "t5", "t500", "t713_5steps", "t999_on_schedule"])
def test_rewardsds_explores_as_its_code(case: str):
    fixture, settings = golden("rewardsds_explore", case)
    steps, t = settings["num_steps"], settings["t"]
    levels = explored_timesteps(t, steps, 1000)
    assert levels[:-1] == settings["visited"]
    text, uncond = (half.mean((1, 2)).view(-1, 1, 1, 1) for half in fixture["text_embeddings"].chunk(2))

    def answer(ask: Ask) -> Answer:
        return 0.3 * ask.x_t + 0.2 * text, 0.3 * ask.x_t + 0.2 * uncond

    x_t, config = fixture["x_t"][None], RunConfig(gamma=7.5, explore_steps=steps)
    method = METHODS["rewardsds"].load()(Setup(config, None, Y, N, None, NoiseSchedule(fixture["alphas_cumprod"])))
    y, n = answer(Ask(x_t, (Y, N)))
    exploring, answered = method.explored(t, x_t, n + 7.5 * (y - n)), None
    while True:
        try:
            answered = answer(exploring.send(answered))
        except StopIteration as end:
            torch.testing.assert_close(end.value[0], fixture["result"], rtol=1e-4, atol=1e-4)
            return


@pytest.mark.parametrize(
    ("case", "strategy", "weighting"),
    [
        ("minmax_recon", "min-max", "recon"), ("minmax_sds", "min-max", "sds"), ("best_recon", "best", "recon"),
        ("weighted_recon", "softmax", "recon"), ("weighted_sds", "softmax", "sds"),
        ("minmax_last_rewarded_step", "min-max", "recon"), ("minmax_after_reward_duration", "min-max", "recon"),
    ],
)  # fmt: skip
def test_rewardsds_gradient(case: str, strategy: str, weighting: str):
    """Its reconstruction loss is rescaled by half unless it says otherwise; a candidate's reward is its views' mean."""
    fixture, settings = golden("rewardsds_threestudio", case)
    t, used, x_c = settings["t"], settings["n_noises_used"], fixture["latents"]
    abar = fixture["alphas_cumprod"][t]
    eps_y, eps_n = fixture["eps_text"][:used], fixture["eps_uncond"][:used]
    config = RunConfig(
        gamma=settings["guidance_scale"], weighting=weighting, candidates=settings["n_noises"], steps=1000,
        candidate_weights=strategy, reward_share=settings.get("reward_duration", 1.0),
        rescale=0.5 if weighting == "recon" else 0.0,
    )  # fmt: skip
    per_view = fixture.get("per_view_rewards", torch.full((used, len(x_c)), torch.nan))  # none is asked late in the run
    rewards = per_view.mean(1, keepdim=True).expand(-1, len(x_c))
    now = now_at(abar, t, x_c, fixture["noises"][:used], step=settings["global_step"])
    guided = step_through(
        "rewardsds", config, now, lambda ask: (eps_y, eps_n), lambda x_0: rewards,
        NoiseSchedule(fixture["alphas_cumprod"]), views=4,
    )  # fmt: skip
    assert_same_gradient(guided.g / len(x_c), fixture["dL_dlatents"], 1e-4)


def test_dreamreward_brings_both_losses_to_one_order_of_magnitude():
    table = json.loads((GOLDEN / "dreamreward" / "guidance_loss.json").read_text())["weight_table"]["rows"]
    for loss, loss_reward, want in table:
        assert balance(loss, loss_reward) == pytest.approx(want), (loss, loss_reward)


def test_dreamreward_climbs_the_reward_where_x0_hat_is():
    """A reward linear in x: its gradient is known, whatever the prediction; the plain part is score distillation's."""
    noise, eps_y, eps_n = torch.randn(3, 1, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    slope, x_c = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(1)), torch.zeros(2, 4, 2, 2)
    now = now_at(torch.tensor(0.36), 500, x_c, noise)
    schedule = NoiseSchedule(torch.linspace(0.999, 0.01, 1000))
    seen = []

    def score(x_0: Tensor) -> Tensor:
        seen.append(x_0)
        return (x_0 * slope).sum((2, 3, 4))

    arms = [
        step_through(name, RunConfig(gamma=2.0, reward_lambda=0.5), now, lambda ask: (eps_y, eps_n), score, schedule)
        for name in ("sds", "dreamreward")
    ]
    torch.testing.assert_close(arms[1].g, arms[0].g - 0.5 * slope)
    torch.testing.assert_close(seen[0][0], (0.8 * noise[0] - 0.8 * arms[0].eps_cfg) / 0.6)


@pytest.mark.parametrize("case", ["default_scale50", "mid", "two_objects"])
def test_cfd_gradient(case: str):
    """Score distillation on a given noise at a given t, without a weight."""
    fixture = load_file(GOLDEN / "cfd" / "guidance_mvdream.safetensors")
    settings = json.loads((GOLDEN / "cfd" / "guidance_mvdream.json").read_text())["cases"][case]
    x_c, noise, eps_y, eps_n, want = (
        fixture[f"{case}.{name}"] for name in ("latents", "noise", "eps_text", "eps_uncond", "dL_dlatents")
    )
    abar = fixture["alphas_cumprod"][settings["t"]]
    config = RunConfig(gamma=settings["guidance_scale"], weighting="one")
    now, schedule = now_at(abar, settings["t"], x_c, noise[None]), NoiseSchedule(fixture["alphas_cumprod"])
    guided = step_through("cfd", config, now, lambda ask: (eps_y[None], eps_n[None]), schedule=schedule, views=4)
    assert_same_gradient(guided.g / len(x_c), want, 1e-4 if config.gamma >= 50 else 1e-5)


def test_cfd_takes_its_own_t_in_3d():
    """Linear from t_max to t_min over the run, whatever the step has drawn."""
    rows = json.loads((GOLDEN / "cfd" / "t_schedule.json").read_text())["schedules"]["2d"]["rows"]
    schedule, asked = NoiseSchedule(torch.linspace(0.999, 0.01, 1000)), []
    x_c = torch.zeros(4, 4, 2, 2)

    def answer(ask: Ask) -> Answer:
        asked.append(ask.t)
        return ask.x_t, ask.x_t

    for step, _, t in (row for row in rows if row[0] <= 1000):
        now = now_at(torch.tensor(0.36), 500, x_c, torch.zeros(1, 4, 4, 2, 2), step, step / 1000)
        step_through("cfd", RunConfig(steps=1000), now._replace(poses=torch.ones(4, 16)), answer, schedule=schedule)
        assert asked[-1] == pytest.approx(t, abs=1)  # it rounds float32


@pytest.mark.parametrize("case", ["lora_epsilon", "lora_v_prediction", "lora_cfg2_camera_dropped"])
def test_vsd_gradient(case: str, monkeypatch: pytest.MonkeyPatch):
    """(1 - abar)(eps~ - eps_lora); the LoRA's own guidance and v-prediction are taken off beforehand."""
    fixture, settings = golden("threestudio_vsd", case)
    for b, t in enumerate(fixture["t"].tolist()):
        abar = fixture["alphas_cumprod"][t]
        x_c, noise, eps_y, eps_n, with_camera, without = (
            fixture[name][b : b + 1]
            for name in ("latents", "noise", "eps_text", "eps_uncond", "lora_out_camera", "lora_out_uncond")
        )
        if settings["lora_prediction_type"] == "v_prediction":
            x_t = abar.sqrt() * x_c + (1 - abar).sqrt() * noise
            with_camera, without = ((1 - abar).sqrt() * x_t + abar.sqrt() * v for v in (with_camera, without))
        eps_lora = without + settings["guidance_scale_lora"] * (with_camera - without)
        fake = SimpleNamespace(eps=lambda now, x_t, eps_lora=eps_lora: eps_lora[None], train=lambda now, noise: None)
        monkeypatch.setattr("psd.methods.vsd.Variational", lambda setup, fake=fake: fake)
        config = RunConfig(gamma=settings["guidance_scale"], weighting="sds")
        now = now_at(abar, t, x_c, torch.stack([noise, noise]))
        guided = step_through("vsd", config, now, lambda ask, eps=(eps_y[None], eps_n[None]): eps)
        assert_same_gradient(guided.g / settings["B"], fixture["dL_dlatents"][b : b + 1], 1e-5)


def lora_fixture(case: str) -> tuple[LoRAPrior, dict[str, Tensor], UNet2DConditionModel]:
    """Its tiny UNet with our LoRA, whose weights are the fixture's."""
    folder = GOLDEN / "vsd_lora"
    about = json.loads((folder / "step.json").read_text())
    tensors = {
        key.removeprefix(f"{case}."): value
        for key, value in load_file(folder / "step.safetensors").items()
        if key.startswith(f"{case}.")
    }
    weights = load_file(folder / "unet_weights.safetensors")
    base = "main." if about["cases"][case]["single_model"] else "lora_base."
    unet = UNet2DConditionModel(
        **about["unet_config"], class_embed_type="projection", projection_class_embeddings_input_dim=16
    )
    own = {key.removeprefix(base): value.float() for key, value in weights.items() if key.startswith(base)}
    camera = {
        key.replace("param.camera_embedding", "class_embedding"): value
        for key, value in tensors.items() if key.startswith("param.camera_embedding")
    }  # fmt: skip
    unet.load_state_dict(own | camera)
    unet.requires_grad_(False)
    unused = dict.fromkeys(get_protocol_members(Prior), len)
    prior = SimpleNamespace(**unused | {"unet": unet, "device": torch.device("cpu")})
    return LoRAPrior(prior, 4, 0), tensors, unet


@pytest.mark.parametrize("case", ["single_model_epsilon", "first_step_zero_up"])
def test_the_lora_learns_as_prolificdreamers(case: str):
    """Its loss and every gradient on the real layers, with its weights in place of ours."""
    lora, fixture, unet = lora_fixture(case)
    names = {
        part: {path for path, module in unet.named_modules() if path.endswith(part)} for part in ("lora_A", "lora_B")
    }
    assert len(names["lora_A"]) == len(lora.layers)
    own = dict(unet.named_parameters())
    theirs = {}
    for key in fixture:
        if key.startswith("param.lora."):
            path, kind = key.removeprefix("param.lora.").removesuffix(".weight").rsplit("_lora.", 1)
            path = path.replace("to_out", "to_out.0")
            theirs[f"{path}.{'lora_A' if kind == 'down' else 'lora_B'}.{lora.name}.weight"] = key
    assert len(theirs) == len(lora.parameters)
    with torch.no_grad():
        for name, key in theirs.items():
            own[name].copy_(fixture[key])
    alphas, t = torch.tensor(scheduler_alphas()), fixture["lora_t"]
    abar = alphas[t].view(-1, 1, 1, 1)
    x_t = abar.sqrt() * fixture["latents"] + (1 - abar).sqrt() * fixture["lora_noise"]
    prompt = fixture["text_embeddings"][: len(x_t)]
    with torch.enable_grad(), lora.heard():
        eps = unet(x_t, t, encoder_hidden_states=prompt, class_labels=fixture["c2w"].flatten(1)).sample
        loss = (eps - fixture["lora_noise"]).square().mean()
        gradients = dict(zip(theirs, torch.autograd.grad(loss, [own[name] for name in theirs])))
    torch.testing.assert_close(loss, fixture["loss_lora"], rtol=1e-4, atol=0)
    largest = max(fixture[f"grad.{key.removeprefix('param.')}"].norm() for key in theirs.values())
    for name, key in theirs.items():
        want = fixture[f"grad.{key.removeprefix('param.')}"]
        torch.testing.assert_close(gradients[name], want, rtol=1e-3, atol=1e-4 * largest.item())


def scheduler_alphas() -> list[float]:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    return (1 - betas).cumprod(0).tolist()


def test_nobody_else_hears_a_lora_and_it_goes_with_its_owner():
    lora, fixture, unet = lora_fixture("single_model_epsilon")
    with torch.no_grad():
        for parameter in lora.parameters:
            parameter.add_(0.1)
    x_t, cond = fixture["latents"], fixture["text_embeddings"][:2]

    def answer() -> Tensor:
        with torch.no_grad():
            return unet(x_t, 500, encoder_hidden_states=cond, class_labels=torch.zeros(2, 16)).sample

    plain = answer()
    with lora.heard():
        assert not torch.equal(answer(), plain)
    other = LoRAPrior(lora.prior, 4, 1)
    assert torch.equal(answer(), plain)
    with other.heard():
        assert torch.equal(answer(), plain)  # its own `up` is still zero
    del lora
    assert torch.equal(answer(), plain)
    with other.heard():
        assert torch.equal(answer(), plain)
    del other
    assert torch.equal(answer(), plain)
    assert not [name for name, _ in unet.named_parameters() if "lora" in name]
