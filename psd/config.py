"""One run's settings: a frozen dataclass that is at once CLI flag, API parameter, form field and run.json.

Each field carries its own label, help line, choices and bounds (FIELDS), so the command line, the form, the API and
`safety.check_request` cannot disagree. ARMS are what runs side by side. Knows nothing of torch, gradio or models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, NamedTuple, no_type_check

from psd.presets import ARMS, IMAGE_ARMS, PRESETS

MAX_PROMPT_CHARS = 1000
MAX_SEED = 2**31 - 1
MAX_IMAGES = 8
# What each picture of a run is called among an arm's files.
PICTURES = ("picture", *(f"picture_{number}" for number in range(2, MAX_IMAGES + 1)))
VARY_EXAMPLE = "negative_lr: 1e-3, 1e-2, 4e-2"
FINER_FROM = 0.5  # of a run: where render_size_end and grid_size_end begin


class Setting(NamedTuple):
    """What every front end needs to show, check and parse a field of RunConfig."""

    name: str
    kind: type  # str, int, float or bool
    default: Any
    label: str
    help: str
    choices: tuple[str, ...]  # of names that code must know; those of presets, models, methods, modes are in tables
    low: float | None
    high: float | None
    group: str
    local: bool  # names a file of this machine: over the network an upload, and it does not travel with the settings
    # The mode whose arms may differ in it, as methods and stages read it arm by arm; "any", or "" where all share it.
    varies: str


def setting(
    default: Any,
    help: str,
    *,
    label: str = "",
    choices: tuple = (),
    low: float | None = None,
    high: float | None = None,
    group: str = "main",
    local: bool = False,
    varies: str = "",
) -> Any:
    """A dataclass field with what FIELDS tells of it; without a label its own name."""
    bounds = {"choices": choices, "low": low, "high": high}
    metadata = {"label": label, "help": help, **bounds, "group": group, "local": local, "varies": varies}
    return dataclasses.field(default=default, metadata=metadata)


@no_type_check  # a front end may hand over anything: check_request answers it with a sentence, not a TypeError
@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run. Same config, same bits (on CPU)."""

    # fmt: off
    prompt: str = setting("", "What to draw.")
    negative_prompt: str = setting("", "What to move away from; the learned negative embedding n starts here.")
    mode: str = setting("image", "What to make: a picture, or an object to turn.")
    preset: str = setting("toybox-image", "Named settings that everything below starts from.")
    prior: str = setting("toybox/sd", "Diffusion model: a known name, a hub id or a local folder.")
    reward: str = setting("toybox/preference",
        "Reward model that ranks the two noised copies (the target), or a weighted mixture: a + 0.5 b.")
    seed: int = setting(0, "Seed of every random number of the run.", low=0, high=MAX_SEED)
    images: int = setting(1, "Pictures in one run, of as many seeds from this one on; an object is one.",
        label="Pictures", low=1, high=MAX_IMAGES)
    arms: str = setting("with, without",
        "What runs side by side, on one seed and the same noises; the first is the run itself.", label="Compare")
    vary: str = setting("",
        f"A row of arms that differ in one number: its name and values, such as {VARY_EXAMPLE}.",
        label="Vary one setting")

    method: str = setting("psd", "Update rule: preference, plain, or one of the others known.", group="method")
    steps: int = setting(50, "Optimisation steps; of an image the timesteps N, from noisy to clean.", low=2,
        high=20_000, group="method")
    gamma: float = setting(2.0, "Guidance scale of classifier-free guidance (eq. 3).", label="Guidance scale γ",
        low=0.0, high=200.0, group="method", varies="any")
    t_max: float = setting(0.98, "Noisiest timestep, as a share of the schedule.", label="Noisiest t", low=0.01,
        high=1.0, group="method")
    t_min: float = setting(0.02, "Cleanest timestep, as a share of the schedule.", label="Cleanest t", low=0.0,
        high=0.99, group="method")
    t_max_end: float = setting(0.5, "3D: t ~ U(low, high); low falls from t_max to t_min, high from t_max to this one.",
        label="Noisiest t at the end (3D)", low=0.01, high=1.0, group="method")
    t_anneal: float = setting(0.8, "3D: share of the steps over which low and high fall.", label="Annealing of t (3D)",
        low=0.0, high=1.0, group="method")
    time_shift_low: float = setting(0.0, "T1 of the random time shift tau ~ U(T1, T2), as a share of the schedule.",
        label="Time shift from", low=-0.2, high=0.2, group="method")
    time_shift_high: float = setting(0.0, "T2 of the random time shift; T1 = T2 = 0 switches it off.",
        label="Time shift to", low=-0.2, high=0.2, group="method")
    pair: str = setting("ddim", "First noise of the pair: ddim = last CFG prediction, independent = fresh.",
        label="Noise pair", choices=("ddim", "independent"), group="method")
    update: str = setting("ddim", "ddim = x - (sigma/alpha) g, exact DDIM without preference; adam = Adam on x.",
        label="Update of x", choices=("ddim", "adam"), group="method")
    lr: float = setting(0.04, "Learning rate of update=adam; in 3D of the voxel grid.", label="Learning rate of x",
        low=1e-5, high=10.0, group="method", varies="image")
    lr_density: float = setting(0.0, "3D: learning rate of the voxel grid's density; 0 = lr, that of its colours too.",
        label="Learning rate of the density (3D)", low=0.0, high=100.0, group="method")
    lr_end: float = setting(1.0,
        "3D: what all learning rates are multiplied by at the end; they fall in the second half of the run.",
        label="Learning rates at the end (3D)", low=0.0, high=1.0, group="method", varies="3d")
    lr_shadow: float = setting(0.0,
        "3D: learning rate of a shadow on the ground, no part of the object; 0 = none. Priors of one background.",
        label="Learning rate of the shadow (3D)", low=0.0, high=10.0, group="method")
    weighting: str = setting("one", "w(t): one = 1, sds = 1 - abar, recon = sigma/alpha.", label="Weighting w(t)",
        choices=("one", "sds", "recon"), group="method")

    pref_weight: float = setting(0.3,
        "Multiplies beta_r, the weight of delta_pref (1 = paper, 0 = winner selection only).",
        label="Strength of preference, δ_pref", low=0.0, high=20.0, group="preference", varies="any")
    pref_form: str = setting("centred",
        "delta_pref (eq. 12): paper = eps~w - eps~l; centred also subtracts the two noises.", label="Form of δ_pref",
        choices=("paper", "centred"), group="preference")
    pref_interval: int = setting(1, "Use the reward every k-th step; steps between are plain (Table 4).",
        label="Preference every k steps", low=1, high=1000, group="preference", varies="any")
    reward_scale: float = setting(1.0, "Multiplies reward differences inside beta_r's sigmoid.", low=0.0, high=1000.0,
        group="preference", varies="any")
    x0_from: str = setting("cfg",
        "Prediction behind the x0-hat that is ranked: with guidance (cfg) or the prompt's alone (cond).",
        label="Ranked prediction", choices=("cfg", "cond"), group="preference")
    rank: str = setting("view",
        "3D: the pair is ranked for every view, or once for the group of views by their mean reward.",
        label="Ranking of views (3D)", choices=("view", "group"), group="preference")
    view_prompts: bool = setting(False,
        "3D: the reward reads the prompt with \", front view\" (side, back, overhead), by the view's camera.",
        label="Name the view to the reward (3D)", group="preference")

    start: str = setting("",
        "What to change, in place of a start from noise: a picture, or in 3D an object's ARM_field.safetensors; t_max "
        "says how much may change (0.5: what is there stays recognisable).",
        label="Start from", group="method", local=True)
    noise: str = setting("fresh",
        "First noise of a step: fresh, or consistent = in 3D it lies on the object's surface, in an image it stays.",
        label="First noise", choices=("fresh", "consistent"), group="method")
    noise_refresh: float = setting(1e-4, "3D: share of consistent noise that is renewed in every step.",
        label="Renewal of consistent noise (3D)", low=0.0, high=1.0, group="method")
    csd_weights: str = setting("two-way",
        "method=csd: two-way = eps_y - eps_n; three-way goes from the empty prompt to the negative one.",
        label="Weights of CSD", choices=("two-way", "three-way"), group="method")
    inversion_steps: int = setting(10, "method=sdi: levels of the whole schedule that DDIM inversion goes through.",
        label="Inversion steps", low=1, high=100, group="method")
    inversion_gamma: float = setting(-7.5, "method=sdi: guidance scale of the inversion.", label="Inversion γ",
        low=-200.0, high=200.0, group="method")
    inversion_eta: float = setting(0.3, "method=sdi: random noise added in the inversion; 0 = none.",
        label="Inversion η", low=0.0, high=1.0, group="method")
    inversion_shift: bool = setting(False,
        "method=sdi: invert up to a step too far and read it at t, as its authors' code does.",
        label="Inversion shifted", group="method")
    lora_rank: int = setting(4, "method=vsd, rewardvsd: rank of the LoRA.", label="Rank of the LoRA", low=1, high=64,
        group="method")
    lora_lr: float = setting(1e-2, "method=vsd, rewardvsd: learning rate of the LoRA.",
        label="Learning rate of the LoRA", low=0.0, high=1.0, group="method")

    candidates: int = setting(4, "method=rewardsds, rewardvsd: noises a step that the reward weighs.",
        label="Candidate noises", low=2, high=16, group="preference")
    candidate_weights: str = setting("min-max",
        "method=rewardsds, rewardvsd: 0.9 of the best two - 0.1 of the worst two, the best alone, or softmax.",
        label="Weights of the candidates", choices=("min-max", "best", "softmax"), group="preference")
    explore_steps: int = setting(15, "method=rewardsds, rewardvsd: DDIM steps of the whole schedule.",
        label="Exploration steps", low=2, high=100, group="preference")
    reward_share: float = setting(0.7, "method=rewardsds, rewardvsd: share of the run in which the reward is asked.",
        label="Share of the run with reward", low=0.0, high=1.0, group="preference")
    reward_lambda: float = setting(0.03, "method=dreamreward: weight of the reward's gradient.",
        label="λ of the reward's gradient", low=0.0, high=1e4, group="preference")
    reward_schedule: str = setting("constant",
        "method=dreamreward: reward_lambda throughout (paper), or the schedule and balance of its code.",
        label="Schedule of DreamReward", choices=("constant", "code"), group="preference")
    dpo_form: str = setting("paper", "method=dreamdpo: paper = eq. 22; code = loser without guidance, and a threshold.",
        label="Form of DreamDPO", choices=("paper", "code"), group="preference")
    dpo_threshold: float = setting(0.01, "method=dreamdpo, form code: smaller gaps of the reward prefer nothing.",
        label="Threshold of DreamDPO", low=0.0, high=1000.0, group="preference")

    rescale: float = setting(0.0,
        "Share of MVDream's rescaling of x0-hat to the contrast that eps_y alone has (tames a large gamma).",
        label="Rescaling of x0", low=0.0, high=1.0, group="method", varies="any")

    negative_from: str = setting("",
        "File of a learned n (ARM_negative.safetensors) that every arm starts from, in place of the negative prompt; "
        "an arm that does not learn n, such as without, keeps it.",
        label="Start n from a file", group="negative", local=True)
    negative_lr: float = setting(3e-3, "Learning rate of the negative embedding n (eq. 13); 0 keeps n fixed.",
        label="Learning rate of n", low=0.0, high=1.0, group="negative", varies="any")
    negative_optimizer: str = setting("adam", "Optimiser of n.", label="Optimiser of n", choices=("adam", "sgd"),
        group="negative")
    negative_interval: int = setting(1, "Update n every k-th preference step.", label="Update n every k steps", low=1,
        high=1000, group="negative", varies="any")
    negative_decay_steps: int = setting(0, "Steps over which the rate of n falls linearly to 0; 0 = constant.",
        label="Decay of n's rate (steps)", low=0, high=100_000, group="negative", varies="any")

    field: str = setting("voxels",
        "Radiance field: a dense voxel grid (quick), or the paper's multi-resolution hash grid (for a GPU).",
        label="Radiance field", choices=("voxels", "hashgrid"), group="object")
    grid_size: int = setting(48, "Voxels a side of the dense grid.", label="Grid (voxels)", low=16, high=160,
        group="object")
    grid_size_end: int = setting(0, "Their number in the second half of the run (2 n - 1 keeps n's); 0 = the same.",
        label="Grid, second half (voxels)", low=0, high=160, group="object")
    render_size: int = setting(40, "Side of the training renders in pixels.", label="Training renders (px)", low=16,
        high=512, group="object")
    render_size_end: int = setting(0, "Their side in the second half of the run; 0 = the same.",
        label="Training renders, second half (px)", low=0, high=512, group="object")
    samples: int = setting(48, "Samples along a ray.", label="Samples a ray", low=8, high=512, group="object")
    lambda_rgb: float = setting(0.0,
        "Weight of the image-space loss: renders against the decoded, guided x0-hat; for weighting=recon.",
        label="λ image space", low=0.0, high=1e5, group="object", varies="3d")
    lambda_orient: float = setting(0.0, "Weight of the orientation loss at the start (normals that face away).",
        label="λ orientation", low=0.0, high=1e5, group="object", varies="3d")
    lambda_orient_end: float = setting(0.0, "Its weight from the middle of the run on; it grows linearly.",
        label="λ orientation, at the end", low=0.0, high=1e5, group="object", varies="3d")
    lambda_opacity: float = setting(0.0, "Weight of the opacity loss (an empty space is preferred).", label="λ opacity",
        low=0.0, high=1e5, group="object", varies="3d")
    lambda_solid: float = setting(0.0, "Weight of the solidity loss (what is seen is opaque), after 30 % of the run.",
        label="λ solidity", low=0.0, high=1e5, group="object", varies="3d")
    lambda_z_variance: float = setting(0.0, "Weight of the depth variance along rays (thin surfaces are preferred).",
        label="λ depth variance", low=0.0, high=1e5, group="object", varies="3d")
    lambda_smooth: float = setting(0.0, "Weight of the voxel grid's total variation.", label="λ smoothness", low=0.0,
        high=1e5, group="object", varies="3d")
    mesh_faces: int = setting(20_000, "Triangles of the exported mesh, at most.", label="Triangles of the mesh",
        low=500, high=200_000, group="object")

    image_size: int = setting(0, "Side of the image in pixels, a multiple of 64; 0 = the prior's own.",
        label="Image size (px)", low=0, high=1024, group="run")
    fast_decoder: bool = setting(False,
        "Rank and preview by TAESD, a small decoder; the final image and its scores stay the prior's own VAE's.",
        label="Rank and preview by TAESD", group="run")
    offload: bool = setting(False,
        "Judges and text encoders stay in the CPU's memory while they are not needed, for a GPU of 8 or 12 GB.",
        label="Less GPU memory", group="run")
    time_budget_s: float = setting(0.0, "Stop and export at 90 % of this many seconds, loading included; 0 = no limit.",
        label="Time budget (s)", low=0.0, high=86_400.0, group="run")
    # fmt: on

    @classmethod
    def from_preset(cls, preset: str | None = None, **overrides: Any) -> RunConfig:
        """The preset's settings with every override that is not None; without a preset the first one of the mode.

        Raises KeyError on an unknown preset.
        """
        chosen = {name: value for name, value in overrides.items() if value is not None}
        preset = preset or next(iter(presets_of(chosen.get("mode", cls.mode))), cls.preset)
        return cls(**{**PRESETS[preset], "preset": preset, **chosen})

    def to_dict(self) -> dict[str, Any]:
        """Every setting by its name; those of LOCAL are empty: no path of this machine leaves it."""
        return {**dataclasses.asdict(self), **dict.fromkeys(LOCAL, "")}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> RunConfig:
        """Inverse of `to_dict`; what older versions wrote is read as today's, other unknown keys are ignored."""
        return cls(**{name: value for name, value in todays(settings).items() if name in FIELDS and name not in LOCAL})


FIELDS: dict[str, Setting] = {
    field.name: Setting(
        field.name, type(field.default), field.default,
        **field.metadata | {"label": field.metadata["label"] or field.name.replace("_", " ").capitalize()},
    )
    for field in dataclasses.fields(RunConfig)
}  # fmt: skip
LOCAL = tuple(name for name, setting in FIELDS.items() if setting.local)


def todays(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the names of this version: `compare`, true or false, has become `arms`."""
    settings = dict(settings)
    compare = settings.pop("compare", None)
    if isinstance(compare, bool):
        settings.setdefault("arms", "with, without" if compare else "with")
    return settings


class ModeInfo(NamedTuple):
    """`stage` is "module:class", resolved when a run is set up."""

    stage: str
    label: str
    start: str = ""  # the kind of an arm's file (psd.record.KINDS) that a run can start from, if any
    multi_view: bool = False  # whether its prior must see several views at once

    def load(self) -> type:
        return resolve_name(self.stage)


# What can be made. A new mode is a class that answers psd.contracts.Stage and a row here.
MODES: dict[str, ModeInfo] = {
    "image": ModeInfo("psd.modes.image:ImageStage", "Picture", start="picture"),
    "3d":    ModeInfo("psd.modes.object:ObjectStage", "3D object", start="field", multi_view=True),
}  # fmt: skip


def seeds_of(seed: int, images: int) -> list[int]:
    """The seeds of a run's pictures: its own and those that follow; after the last one the first."""
    return [(seed + index) % (MAX_SEED + 1) for index in range(images)]


def listed(text: str) -> list[str]:
    """The parts of "with, without"; whether ARMS has such names is `safety.check_request`'s question."""
    return [name for part in text.split(",") if (name := part.strip())]


def varied(vary: str) -> tuple[str, list[str]]:
    """Name and values, as they are written, of "gamma: 2, 7.5"; whether they will do is `safety.check_request`'s."""
    name, _, values = vary.partition(":")
    return name.strip(), listed(values)


def varied_name(name: str, value: int | float) -> str:
    """Of the arm that has this value: "gamma=7.5", in files too."""
    return f"{name}={value:.10g}"


def is_varied(arm: str) -> bool:
    """Whether an arm's name is one of `varied_name`."""
    return "=" in arm


def arms_of(config: RunConfig) -> dict[str, RunConfig]:
    """Arm -> its settings: those that `arms` names, then one for each value of `vary`, in the order of both.

    Raises KeyError or ValueError on what `safety.check_request` refuses.
    """
    beyond = IMAGE_ARMS if config.mode == "image" else {}
    arms = {name: dataclasses.replace(config, **ARMS[name] | beyond.get(name, {})) for name in listed(config.arms)}
    name, values = varied(config.vary)
    for value in (FIELDS[name].kind(text) for text in values):
        arms[varied_name(name, value)] = dataclasses.replace(config, **{name: value})
    return arms


def presets_of(mode: str) -> list[str]:
    """The presets of a mode, its default first; of an unknown mode none."""
    return [name for name, settings in PRESETS.items() if settings.get("mode", RunConfig.mode) == mode]
