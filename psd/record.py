"""A run's folder, written and read here alone: run.json is its manifest, and no other file knows a name in it.

    run.json                          config, state, arms with their files, scores and remarks, times, versions
    metrics.csv                       one row a step
    ARM.png, ARM.glb, ...             one file a kind and arm (KINDS)
    ARM_negative.safetensors          n, of an arm that learns it (psd.embedding)
    ARM_pairs.webp                    what the reward saw, of an arm that ranks (psd.pairs)
    everything.zip                    all of the above
    previews/000012.webp              the latest ones, while it runs

run.json says "running" at the start, "writing" while artefacts are written, then "done", or "abandoned" where nobody
waited for them: whoever reads a folder knows what may still come.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

import psd
from psd.config import LOCAL, MODES, PICTURES, RunConfig, todays
from psd.contracts import Artefact
from psd.embedding import export_embedding, read_embedding
from psd.errors import Abandoned, RequestError, shown
from psd.events import ArmResult, Preview
from psd.export import PNG_KEY, export_archive, export_json, export_metrics
from psd.methods import learns_negative
from psd.models.priors.table import decoder_of, prior_info, shown_name
from psd.models.rewards.table import REWARDS, reward_terms
from psd.pairs import Pairs
from psd.scene.files import read_glb_extras

if TYPE_CHECKING:
    from psd.contracts import Arm, Reward, Stage

log = logging.getLogger(__name__)

MANIFEST, METRICS, PREVIEWS, ARCHIVE = "run.json", "metrics.csv", "previews", "everything.zip"
KINDS = {
    **{kind: f"{kind.removeprefix('picture')}.png" for kind in PICTURES},
    "negative": "_negative.safetensors", "pairs": "_pairs.webp", "glb": ".glb",
    "field": "_field.safetensors", "views": "_views.png", "turntable": ".mp4", "ply": ".ply", "obj": ".zip",
}  # fmt: skip
SLOW = ("views", "turntable", "ply", "obj")  # the kinds that are written once every arm can be looked at
KEPT_PREVIEWS = 20
MAX_SETTINGS_BYTES = 1_000_000


@dataclass(frozen=True)
class Result:
    """What a folder holds. `settings` are as they were written: another version's may lack or have others."""

    directory: Path
    state: str = ""  # running, writing, done, abandoned; "" where there is no manifest
    settings: dict[str, Any] = field(default_factory=dict)
    arms: dict[str, ArmResult] = field(default_factory=dict)
    rows: tuple[dict[str, float], ...] = ()  # of metrics.csv; what a step did not compute is missing
    files: tuple[Path, ...] = ()  # all of them, pictures first
    steps_done: int = 0
    seconds: float = math.nan
    stopped: str = ""  # why the loop ended early, one sentence
    failed: bool = False  # whether it broke down, and was not only stopped
    remarks: tuple[str, ...] = ()  # one sentence each: what could not be written or scored, or is not in the settings
    preview: Path | None = None

    @property
    def settled(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("done", "abandoned")


class Record:
    """Writes one run's folder, on every way out of the run."""

    def __init__(self, directory: Path, config: RunConfig, heard: Callable[[], bool] = lambda: True):
        self.directory, self.config, self.heard = directory, config, heard
        self.rows: list[dict[str, float]] = []
        self.arms: dict[str, ArmResult] = {}
        self.remarks: list[str] = []
        self.pairs = Pairs(config.steps)
        self.begun = False
        self.settings = config.to_dict()
        if config.negative_from:  # the settings tell which file it was, not where
            digest = self.settings["negative_from_sha256"] = read_embedding(config.negative_from).sha256
            self.remarks.append(
                f"n started from a file (SHA-256 {digest[:16]}), not from the negative prompt: restored settings do "
                "not bring it."
            )
        if config.start:
            digest = self.settings["start_sha256"] = hashlib.sha256(Path(config.start).read_bytes()).hexdigest()
            what = MODES[config.mode].start
            self.remarks.append(f"Started from a {what} (SHA-256 {digest[:16]}): restored settings do not bring it.")
        try:
            directory.mkdir(parents=True)
            export_json(directory / MANIFEST, self._manifest("running", 0.0, "", failed=False))
        except OSError as error:
            raise RequestError(
                f"The results cannot be written: {reason_of(error)}; free space or choose another output folder."
            ) from error

    def write(
        self, stage: Stage | None, rewards: dict[str, Reward], seconds: float, stopped: str, failed: bool = False
    ) -> Iterator[None]:
        """metrics.csv and run.json first, then scores and files of every arm, each under its own guard.

        Yields where the folder holds what is looked at first, of all arms, and more follows. What fails becomes a
        remark, and the others stay. `stage` None: there is nothing to show, or nobody waits.
        """
        if self.begun:  # interrupted while it wrote: what is there stays
            stage = None
        self.begun = True

        def manifest(state: str) -> None:
            about = self._manifest(state, seconds, stopped, failed)
            self._guarded(MANIFEST, lambda: export_json(self.directory / MANIFEST, about))

        self._guarded(METRICS, lambda: export_metrics(self.directory / METRICS, self.rows))
        manifest("abandoned" if stage is None else "writing")
        if stage is None:
            return
        later: dict[str, list[Artefact]] = {}
        for name in stage.arms:
            artefacts = self._artefacts(stage, name)
            later[name] = [each for each in artefacts if each.kind in SLOW]
            self._score(stage, name, rewards)
            self._write_files(name, [each for each in artefacts if each.kind not in SLOW])
        if any(later.values()):
            manifest("writing")
            yield
        for name, artefacts in later.items():
            self._write_files(name, artefacts)
        manifest("done")
        self._guarded(ARCHIVE, lambda: export_archive(self.directory / ARCHIVE, read(self.directory).files))

    def check_heard(self) -> None:
        """Raise Abandoned where nobody waits any more: no further file is worth its seconds."""
        if not self.heard():
            raise Abandoned

    def _score(self, stage: Stage, name: str, rewards: dict[str, Reward]) -> None:
        scores: dict[str, float] = {}
        if rewards:
            self._guarded(f"scores of {name}", lambda: scores.update(scores_of(*stage.scored(name), rewards)))
        self.arms[name] = ArmResult(None, scores, {}, {})

    def _artefacts(self, stage: Stage, name: str) -> list[Artefact]:
        artefacts = list(stage.artefacts(name))
        if learns_negative(stage.arms[name].config):
            artefacts.append(Artefact("negative", partial(self._write_negative, stage.arms[name])))
        if name in self.pairs.arms:
            artefacts.append(Artefact("pairs", partial(self.pairs.write, name)))
        return sorted(artefacts, key=lambda each: list(KINDS).index(each.kind))

    def _write_files(self, name: str, artefacts: list[Artefact]) -> None:
        result = self.arms[name]
        about = {**self.settings, "arm": name, "scores": result.scores}
        for artefact in artefacts:
            self.check_heard()
            path = self.directory / f"{name}{KINDS[artefact.kind]}"

            def write(artefact=artefact, path=path) -> None:
                told = artefact.write(path, about)
                result.files[artefact.kind] = path
                if told:
                    result.remarks[artefact.kind] = told

            reason = self._guarded(path.name, write)
            if reason:
                result.remarks[artefact.kind] = {"reason": reason}
        self.arms[name] = result._replace(picture=result.files.get("picture"))

    def _write_negative(self, arm: Arm, path: Path, about: dict[str, Any]) -> None:
        """n of an arm, of its first run where it holds several; with what it is of."""
        kept = ("arm", "reward", "negative_from_sha256")
        about = {name: about[name] for name in kept if name in about} | {
            "negative_lr": arm.config.negative_lr, "prior": shown_name(arm.config.prior), "steps": len(self.rows),
            "negative_prompt": "" if arm.config.negative_from else arm.config.negative_prompt,
        }  # fmt: skip
        export_embedding(path, arm.method.negative.value[0].float().cpu().numpy(), about)

    def _guarded(self, what: str, write: Callable[[], None]) -> str:
        """Do it; where that fails, remember and return why, in one sentence."""
        try:
            write()
        except RequestError as error:  # an empty scene has no mesh
            reason = str(error)
        except Exception as error:  # a codec, a full disk, no memory: the other files must not suffer
            log.warning("%s of run %s could not be made", what, self.directory.name, exc_info=True)
            reason = f"{what} could not be made: {reason_of(error)}."
        else:
            return ""
        if reason not in self.remarks:
            self.remarks.append(reason)
        return reason

    def _manifest(self, state: str, seconds: float, stopped: str, failed: bool) -> dict[str, Any]:
        arms = {
            name: {
                "scores": arm.scores,
                "files": {kind: path.name for kind, path in arm.files.items()},
                "remarks": arm.remarks,
            }
            for name, arm in self.arms.items()
        }
        return {
            "config": self.settings, "state": state, "arms": arms, "steps_done": len(self.rows),
            "seconds": round(seconds, 3), "stopped": stopped, "failed": failed, "remarks": self.remarks,
            "versions": versions(), **revisions(self.config),
        }  # fmt: skip


@torch.no_grad()
def scores_of(images: Float[Tensor, "B 3 H W"], prompts: list[str], rewards: dict[str, Reward]) -> dict[str, float]:
    """Reward -> its mean over the images, or over the groups of as many as it judges together."""
    return {name: reward(images, prompts).mean().item() for name, reward in rewards.items()}


def reason_of(error: BaseException) -> str:
    """What an exception says, in a few words and without a path of this machine."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return type(error).__name__


def versions() -> dict[str, str]:
    return {"psd": psd.__version__, "torch": torch.__version__, "python": platform.python_version()}


def revisions(config: RunConfig) -> dict[str, Any]:
    """Which commits of the hub the weights are of; empty where they come with the app."""
    prior, decoder = prior_info(config.prior), decoder_of(config.prior, config.fast_decoder)
    return {
        "prior_revision": prior.source.revision,
        "fast_decoder_revision": decoder.source.revision if decoder else "",
        "reward_revisions": {name: REWARDS[name].source.revision for name in reward_terms(config.reward)},
    }


def write_preview(directory: Path, preview: Preview) -> Path:
    """Save it under a new name, since a page shows an unchanged URL's old picture; only the latest stay."""
    folder = directory / PREVIEWS
    folder.mkdir(exist_ok=True)
    path = folder / f"{preview.step:06d}.webp"
    Image.fromarray(preview.image).save(path, quality=90, method=0)
    for old in sorted(folder.iterdir())[:-KEPT_PREVIEWS]:
        old.unlink(missing_ok=True)
    return path


def read(directory: Path) -> Result:
    """A run's folder as far as it is there; files that have been tidied away are left out."""
    about = read_json(directory / MANIFEST)
    arms = {name: read_arm(directory, told) for name, told in about.get("arms", {}).items()}
    listed = [path for arm in arms.values() for path in arm.files.values()]
    listed += [path for name in (METRICS, MANIFEST, ARCHIVE) if (path := directory / name).exists()]
    previews = sorted((directory / PREVIEWS).glob("*.webp"))
    return Result(
        directory=directory, state=about.get("state", ""), settings=about.get("config", {}), arms=arms,
        rows=read_rows(directory / METRICS), files=tuple(listed), steps_done=about.get("steps_done", 0),
        seconds=as_float(about.get("seconds")), stopped=about.get("stopped", ""), failed=about.get("failed", False),
        remarks=tuple(about.get("remarks", ())), preview=previews[-1] if previews else None,
    )  # fmt: skip


def start_of(directory: Path, mode: str, arm: str = "") -> Path:
    """The file in a run's folder that a run of `mode` can start from: of `arm`, or of the first that has one.

    Raises RequestError.
    """
    arms, kind = read(directory).arms, MODES[mode].start
    files = [found for name, each in arms.items() if arm in ("", name) and (found := each.files.get(kind))]
    if not files:
        whose = f"of arm {shown(arm)} " if arm else ""
        raise RequestError(f"start names a run that has no {kind or 'file'} {whose}for mode {mode}.", "start")
    return files[0]


def read_arm(directory: Path, told: dict[str, Any]) -> ArmResult:
    files = {kind: path for kind, name in told["files"].items() if (path := directory / name).exists()}
    scores = {name: as_float(score) for name, score in told["scores"].items()}
    return ArmResult(files.get("picture"), scores, files, told["remarks"])


def read_rows(path: Path) -> tuple[dict[str, float], ...]:
    """The rows of a metrics.csv without their empty cells; none where there is no such file."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return tuple({key: as_float(value) for key, value in row.items() if value} for row in csv.DictReader(file))
    except OSError:
        return ()


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def settings_of(path: Path) -> dict[str, Any]:
    """The settings inside a result: the picture's text chunk, the mesh's extras or run.json's "config".

    As they were written, unchecked, but without the names of files: they mean nothing here. A run writes all settings
    that its version has: one that it lacks came later, and was off. Raises RequestError.
    """
    try:
        if path.suffix.lower() == ".glb":
            found: Any = read_glb_extras(path)
        elif path.suffix.lower() == ".png":
            with Image.open(path, formats=["PNG"]) as image:
                # Chunks before the pixels are read with the header: the image itself is never decoded.
                found = json.loads(image.info.get(PNG_KEY, ""))
        else:
            found = read_json(path) if path.stat().st_size <= MAX_SETTINGS_BYTES else {}
    except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError):
        found = {}
    found = found.get("config", found) if isinstance(found, dict) else {}
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise RequestError("This file carries no settings: drop a result PNG, GLB or run.json that this app wrote.")
    if {"mode", "preset", "steps", "seed"} <= found.keys():
        found = RunConfig().to_dict() | todays(found)
    return {name: value for name, value in found.items() if name not in LOCAL}


def as_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
