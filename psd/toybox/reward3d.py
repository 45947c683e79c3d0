"""toybox/reward3d: what four views say together. Its data and its stage; `python -m psd.toybox.reward3d` measures it.

The towers are toybox/preference's and stay as they are, so that every picture goes through them once: what is trained
is the small head that reads what they see. It learns to prefer a group of views of one object, under its caption, to

caption   itself under a caption with one fact changed
mixed     itself with one or two views of another object, every second time of the same kind
repeated  one view four times, or two of them twice: an object with a face on every side
turned    itself with the hues of one or two views turned
worse     itself in less taste: less colour or less sharpness in all views
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from psd.models.rewards import load_reward
from psd.models.rewards.clip_scores import CLIPReward
from psd.models.rewards.reward3d import HEAD_FILE, Agreement, ToyboxReward3D, make_agreement
from psd.models.weights import tokenize
from psd.toybox import models, world
from psd.toybox.pairs import to_pixels, wrong_scene
from psd.toybox.raster import BACKGROUND
from psd.toybox.recolour import GREY_AXIS
from psd.toybox.taste import worn
from psd.toybox.views import VIEWS, Group, Groups, shows_azimuth
from psd.toybox.workshop import STAGES, Workshop, augment, rank_0_first, run_stage

GROUPS_SEEN = 896  # of the data that the classifier of views has drawn
TURNED = 2  # views of a group that are also seen with their hues turned
CAPTIONS = 2  # of a group, true ones and wrong ones
BATCH = 8  # groups seen at once
HELDOUT_SEED, HELDOUT = 90, 192  # groups of psd.toybox.evaluate's seed
KINDS_OF_WRONG = ("caption", "mixed", "repeated", "turned", "worse")


class Seen(NamedTuple):
    """Groups as the frozen towers see and read them, half precision on the CPU."""

    own: Float[Tensor, "G V P"]
    turned: Float[Tensor, "G T P"]  # of the first views
    worse: Float[Tensor, "G V P"]
    told: Float[Tensor, "G K D"]  # of true captions
    wrong: Float[Tensor, "G K D"]


class Compared(NamedTuple):
    """A batch of groups and, in the order of KINDS_OF_WRONG, what each is to be preferred to."""

    seen: Float[Tensor, "6 B V P"]  # the group, then each wrong one
    told: Float[Tensor, "6 B D"]
    asked: Bool[Tensor, "5 B"]  # a view of a round thing four times is the thing


@torch.no_grad()
def see(groups: Groups, base: CLIPReward, worn_too: bool = True) -> Seen:
    """What the towers make of groups of images; `worn_too`: shifted, blurred and noisy, as a distilled view can be."""
    from tqdm.auto import tqdm

    parts: list[tuple[Tensor, ...]] = []
    for start in tqdm(range(0, groups.count, BATCH), desc="seeing groups", mininterval=5):
        index = np.arange(start, min(start + BATCH, groups.count))
        rng = np.random.default_rng([114, start])
        images, drawn = groups.take(index), [groups.groups[i] for i in index]
        versions = np.concatenate(
            [images, turned(images[:, :TURNED], rng), np.stack([worse(*each, rng) for each in zip(images, drawn)])], 1
        )
        pixels = [to_pixels(version, base.device).contiguous() for version in versions]
        pixels = torch.cat([augment(each, rng) for each in pixels] if worn_too else pixels)
        captions = [world.caption(each.scene, rng) for each in drawn for _ in range(CAPTIONS)]
        captions += [world.caption(wrong_scene(each.scene, rng), rng) for each in drawn for _ in range(CAPTIONS)]
        ids = tokenize(base.tokenizer, captions, base.max_tokens).input_ids.to(base.device)
        with torch.autocast(base.device.type, torch.bfloat16):
            seen, read = base.model.vision_model(base.pixels(pixels)).pooler_output, base.encode_tokens(ids)
        seen, read = seen.half().cpu().unflatten(0, (len(index), -1)), read.half().cpu()
        parts.append((*seen.split([VIEWS, TURNED, VIEWS], 1), *read.unflatten(0, (2, len(index), CAPTIONS))))
    return Seen(*(torch.cat(each) for each in zip(*parts)))


def turned(images: UInt8[np.ndarray, "G T S S 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "G T S S 3"]:
    """Each picture's hues turned about its background by a third to two thirds of the circle."""
    angle = rng.uniform(2 * np.pi / 3, 4 * np.pi / 3, (*images.shape[:2], 1, 1))
    turns = np.cos(angle) * np.eye(3) + (1 - np.cos(angle)) / 3 + np.sin(angle) * GREY_AXIS
    about = np.einsum("gtij,gthwj->gthwi", turns, images / 255 - BACKGROUND) + BACKGROUND
    return (about.clip(0, 1) * 255).round().astype(np.uint8)


def worse(images: UInt8[np.ndarray, "V S S 3"], drawn: Group, rng: np.random.Generator) -> UInt8[np.ndarray, "V S S 3"]:
    """All views with less of what there is more of: colour or sharpness."""
    if drawn.scene.taste.sharpness > drawn.scene.taste.colour:
        return worn(images.reshape(-1, *images.shape[2:]), rng.uniform(0, 0.3), rng).reshape(images.shape)
    grey = images.mean(-1, keepdims=True)
    return (grey + rng.uniform(0.2, 0.5) * (images - grey)).round().astype(np.uint8)


class Comparisons:
    """Draws batches of comparisons from groups that have been seen."""

    def __init__(self, seen: Seen, groups: list[Group]) -> None:
        self.seen, kinds = seen, np.array([drawn.scene.first.kind for drawn in groups[: len(seen.own)]])
        self.alike = [np.flatnonzero(kinds == kind) for kind in kinds]
        self.has_sides = np.array([shows_azimuth(drawn.scene) for drawn in groups[: len(seen.own)]])

    def of(self, index: np.ndarray, rng: np.random.Generator) -> Compared:
        rows, count = torch.from_numpy(index), len(index)
        own = self.seen.own[rows].float()
        alike = rng.random(count) < 0.5
        others = rng.integers(1, len(self.alike), count) + index
        others = [int(rng.choice(self.alike[i])) if same else int(o) for i, same, o in zip(index, alike, others)]
        others = torch.tensor(others) % len(self.alike)
        foreign = torch.from_numpy(rng.permuted(np.tile(np.arange(VIEWS), (count, 1)), axis=1))
        foreign = (foreign < torch.from_numpy(rng.integers(1, 3, (count, 1))))[..., None]
        mixed = torch.where(foreign, self.seen.own[others].float(), own)
        first, second = torch.from_numpy(rng.integers(VIEWS, size=(2, count)))
        at = torch.stack([first, second, first, second], 1)
        repeated = own.gather(1, at[..., None].expand_as(own))
        hues = own.clone()
        hues[:, :TURNED] = self.seen.turned[rows].float()
        one = torch.from_numpy(rng.random(count) < 0.5)
        hues[one, 0] = own[one, 0]
        told, wrong = (
            each[rows, torch.from_numpy(rng.integers(CAPTIONS, size=count))].float()
            for each in (self.seen.told, self.seen.wrong)
        )
        asked = torch.ones(len(KINDS_OF_WRONG), count, dtype=torch.bool)
        asked[1] = others != rows
        asked[2] = torch.from_numpy(self.has_sides[index])
        return Compared(
            torch.stack([own, own, mixed, repeated, hues, self.seen.worse[rows].float()]),
            torch.stack([told, wrong, told, told, told, told]),
            asked,
        )


def scores_of(
    base: CLIPReward, head: Agreement, seen: Float[Tensor, "N B V P"], told: Float[Tensor, "N B D"]
) -> Float[Tensor, "N B"]:
    """toybox/reward3d's scores of groups whose views have been seen, with this head."""
    reward = ToyboxReward3D("toybox/reward3d", "", base.model, base.tokenizer, base.mean, base.std, head)
    return reward.judge(seen.flatten(0, 2), told.flatten(0, 1).repeat_interleave(VIEWS, 0)).view(seen.shape[:2])


def train_reward3d(shop: Workshop) -> Agreement:
    """Bradley-Terry on each kind of wrong; a picture of less taste stays better than a false one."""
    seed, base = STAGES["reward3d"].seed, load_reward("toybox/preference", str(shop.device))
    groups = rank_0_first(lambda: Groups(shop.work, seed, GROUPS_SEEN))
    file = shop.work / f"reward3d-seen-{seed}.pt"
    if not file.exists():
        rank_0_first(lambda: file.exists() or torch.save(tuple(see(groups, base)), file))
    drawn = Comparisons(Seen(*torch.load(file, weights_only=True)), groups.groups)
    head = make_agreement(base).to(shop.device)

    def draw(key: int, batch: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng([115, key])
        return tuple(drawn.of(rng.integers(len(drawn.alike), size=batch), rng))

    def loss_of(seen: Tensor, told: Tensor, asked: Tensor) -> Tensor:
        own, *others = scores_of(base, head, seen, told)
        others = torch.stack(others)
        wrong = (F.softplus(others - own) * asked).sum(1) / asked.sum(1).clamp(min=1)
        facts_first = F.softplus(others[0] - others[-1]).mean()
        return wrong.sum() + wrong[2] + facts_first  # what single views cannot see counts twice

    def save(best: Agreement) -> None:
        from safetensors.torch import save_file

        (shop.assets / "reward3d").mkdir(parents=True, exist_ok=True)
        save_file(
            {name: weight.contiguous() for name, weight in models.halved(best).items()},
            shop.assets / "reward3d" / HEAD_FILE,
        )

    parts = {f"reward3d/{HEAD_FILE}": head}
    return run_stage(shop, "reward3d", head, draw, loss_of, save, parts, average=0.995)


@torch.no_grad()
def right_answers(seen: Seen, groups: list[Group], base: CLIPReward, head: Agreement | None) -> dict[str, float]:
    """Share of comparisons of every kind that are decided right, in %; without a head the mean over the views."""
    drawn, rng = Comparisons(seen, groups), np.random.default_rng(116)
    compared = drawn.of(np.arange(len(seen.own)), rng)
    if head is None:
        head = make_agreement(base).eval()
        for parameter in head.mlp[-1].parameters():
            parameter.zero_()
    own, *others = scores_of(base, head, compared.seen, compared.told)
    answers = {kind: (own > other)[ask] for kind, other, ask in zip(KINDS_OF_WRONG, others, compared.asked)}
    return {kind: 100 * right.float().mean().item() for kind, right in answers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".toybox"), help="where held-out groups are kept")
    args = parser.parse_args()
    base, reward = load_reward("toybox/preference"), load_reward("toybox/reward3d")
    groups = Groups(args.work, HELDOUT_SEED, HELDOUT, heldout=True)
    seen = see(groups, base, worn_too=False)
    columns = [right_answers(seen, groups.groups, base, head) for head in (None, reward.head)]
    print(f"{'right answers (%)':20s} {'mean of views':>14s} {'together':>14s}")
    for kind in KINDS_OF_WRONG:
        print(f"{kind:20s} {columns[0][kind]:14.1f} {columns[1][kind]:14.1f}")


if __name__ == "__main__":
    main()
