"""Where weights come from: a folder of this machine, or a hub repository whose files are brought into the hub's cache.

Everything is downloaded here, completely and checked, before anything opens it: the loaders read folders alone and
never reach for the network. Not known here: which models there are (the tables beside it) and how they are loaded.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from psd.errors import RequestError
from psd.events import Downloading

ASSETS = Path(__file__).resolve().parents[2] / "assets"
TELL_EVERY_S = 0.5
LISTING_TIMEOUT_S = 10.0  # huggingface_hub itself would wait for this one answer for ever
MARGIN_MB = 2_000  # of the disk stay free
STRANGERS_MB = 12_000  # of one repository: Stable Diffusion in float32 is 5,000
OTHERWISE = "choose a model that comes with the app"
HUB_ID = re.compile(r"[A-Za-z0-9](?:[\w.-]*\w)?/[A-Za-z0-9](?:[\w.-]*\w)?", re.ASCII)

# What is read of a diffusers repository: not the safety checker, nor copies in half precision or as pickles
# (diffusion_pytorch_model.fp16.safetensors, .bin). The pattern's two classes admit ".safetensors", its index and
# shards, "-00001-of-00002.safetensors". The last file stands for a complete copy: see `cached_folder`.
DIFFUSERS_FILES = (
    "tokenizer/*", "scheduler/scheduler_config.json",
    "text_encoder/config.json", "text_encoder/model[.-][0s]*",
    "vae/config.json", "vae/diffusion_pytorch_model[.-][0s]*",
    "unet/config.json", "unet/diffusion_pytorch_model[.-][0s]*",
    "model_index.json",
)  # fmt: skip


@dataclass(frozen=True)
class Access:
    """On whose behalf the hub is asked: with which token, and for how much of one repository at most."""

    token: bool | None  # as huggingface_hub takes it: None is the environment's (HF_TOKEN), False none at all
    max_mb: int | None = None


OWNER = Access(token=None)  # of this machine: command line, Python
STRANGER = Access(token=False, max_mb=STRANGERS_MB)  # whoever comes over the network


@dataclass(frozen=True)
class Source:
    """A folder (relative ones stand below assets/) or, with a revision, `files` of a hub repository at that commit.

    `files` are names or patterns, each of at least one file; the last is a name and is downloaded last.
    """

    name: str
    revision: str = ""
    files: tuple[str, ...] = ()

    def __post_init__(self):
        if self.revision and not self.files:
            raise ValueError(f"{self.name}: name the files that are read of this repository")

    @property
    def is_folder(self) -> bool:
        return not self.revision

    @property
    def path(self) -> str:
        """First argument of from_pretrained. Absolute: a missing relative folder would be taken for a hub id."""
        return str(ASSETS / self.name)

    @property
    def where(self) -> dict[str, Any]:
        """Further arguments of from_pretrained."""
        return {"local_files_only": True}

    def file(self, name: str) -> Path:
        return Path(self.path) / name


def is_hub_id(name: str) -> bool:
    """Whether `name` is spelled like org/name of the Hugging Face hub and is no folder, which diffusers prefers.

    "toybox/..." is ours and never a hub id.
    """
    barred = ".." in name or "--" in name or name.endswith(".git")  # as huggingface_hub's validate_repo_id says
    spelled = len(name) <= 96 and not barred and HUB_ID.fullmatch(name) is not None
    return spelled and not name.startswith("toybox/") and not os.path.exists(name)


def on_disk(source: Source) -> Source:
    """The folder that holds `source`; what is not here is not downloaded. Raises RequestError."""
    if source.is_folder:
        return source
    folder = cached_folder(source)
    if folder is None:  # a branch may move, and a cache be tidied, at any time
        raise RequestError(f"'{source.name}' is not in the hub's cache: run again with downloads allowed.")
    return Source(str(folder))


def is_cached(*sources: Source) -> bool:
    """Whether all `sources` can be read without a download. Uses no network."""
    return all(source.is_folder or cached_folder(source) is not None for source in sources)


def cached_folder(source: Source) -> Path | None:
    """A repository's copy in the hub's cache; None unless all its files are there."""
    from huggingface_hub import try_to_load_from_cache

    last = source.files[-1]
    found = try_to_load_from_cache(source.name, last, revision=source.revision)
    if not isinstance(found, str):
        return None
    folder = Path(found).parents[last.count("/")]
    return folder if all(any(copies(folder, pattern)) for pattern in source.files) else None


def copies(folder: Path, pattern: str) -> Iterator[Path]:
    """Files below `folder` that match; a link whose blob is gone is none."""
    return (path for path in folder.glob(pattern) if path.is_file())


def check_online(name: str) -> None:
    """Raise RequestError where HF_HUB_OFFLINE forbids to download `name`."""
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise RequestError(
            f"'{name}' is not in the hub's cache and HF_HUB_OFFLINE forbids to download it: unset it, or {OTHERWISE}."
        )


def check_public(source: Source) -> None:
    """Raise RequestError unless the hub hands the repository's files to anybody, now: asked without a token.

    The cache does not know with whose token it was filled. Without a network there is no answer, and that is a no.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode

    if is_offline_mode():
        raise RequestError(
            f"Whether '{source.name}' is public cannot be asked while HF_HUB_OFFLINE is set: {OTHERWISE}."
        )
    url = hf_hub_url(source.name, source.files[-1], revision=source.revision)
    try:
        get_hf_file_metadata(url, token=False, timeout=LISTING_TIMEOUT_S)
    except Exception as error:  # as wide as that of `download`
        raise RequestError(download_trouble(error, source.name, STRANGER)) from error


def download(source: Source, access: Access = OWNER) -> Iterator[Downloading]:
    """Bring what is missing of `source` into the hub's cache; tells twice a second how far it is. Raises RequestError.

    A file appears in the cache complete or not at all. A connection that breaks is taken up where it broke, and files
    that are complete stay: a retry goes on from there. Closing the iterator ends the download after its next chunk.
    """
    if is_cached(source):
        return
    check_online(source.name)
    meter, worker = Meter(), ThreadPoolExecutor(1)
    try:
        commit, sizes = missing_files(source, access)
        check_size(source.name, sum(sizes.values()), access)
        check_space(sum(sizes.values()))
        job = worker.submit(fetch, source, commit, list(sizes), meter, access)
        while not job.done():
            wait([job], TELL_EVERY_S)
            yield Downloading(source.name, meter.bytes / 1e6, sum(sizes.values()) / 1e6)
        job.result()
    except RequestError:
        raise
    except Exception as error:  # as wide as this: hf_xet raises RuntimeError for all its failures
        raise RequestError(download_trouble(error, source.name, access)) from error
    finally:
        meter.stopped = True
        worker.shutdown(wait=False)


def missing_files(source: Source, access: Access) -> tuple[str, dict[str, int]]:
    """(Commit of the source's revision, its files that are not cached yet -> bytes), in the order to download them."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    hub = HfApi(token=access.token)
    info = hub.model_info(source.name, revision=source.revision, files_metadata=True, timeout=LISTING_TIMEOUT_S)
    sizes: dict[str, int] = {}
    for pattern in source.files:
        found = {file.rfilename: file.size or 0 for file in info.siblings if fnmatch(file.rfilename, pattern)}
        if not found:
            raise RequestError(f"'{source.name}' has no file {pattern!r} on the hub: choose another model.")
        sizes |= found

    def is_missing(name: str) -> bool:
        return not isinstance(try_to_load_from_cache(source.name, name, revision=info.sha), str)

    # The last one in any case: asking for it by the branch's name makes the cache remember the branch's commit.
    return info.sha, {name: size for name, size in sizes.items() if name == source.files[-1] or is_missing(name)}


def check_size(name: str, size: int, access: Access) -> None:
    """Raise RequestError where `size` bytes of a repository are more than `access` has."""
    if access.max_mb is not None and size > access.max_mb * 1e6:
        size_mb = math.ceil(size / 1e6)
        raise RequestError(
            f"'{name}' would download {size_mb} MB, at most {access.max_mb} MB are allowed: choose a smaller model."
        )


def check_space(size: int) -> None:
    """Raise OSError where the cache's disk has not this many bytes to spare: before hours of download, not after."""
    from huggingface_hub.constants import HF_HUB_CACHE

    parent = next(folder for folder in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if folder.is_dir())
    if shutil.disk_usage(parent).free < size + MARGIN_MB * 1e6:
        raise OSError(errno.ENOSPC, f"{size / 1e6:.0f} MB are needed")


def fetch(source: Source, commit: str, names: list[str], meter: Meter, access: Access) -> None:
    """Download files into the hub's cache one by one and check each, which huggingface_hub does by its length alone."""
    from huggingface_hub import hf_hub_download

    for name in names:
        revision = source.revision if name == source.files[-1] else commit
        path = Path(hf_hub_download(source.name, name, revision=revision, tqdm_class=meter, token=access.token))
        if not is_intact(path):
            remove(path)
            raise RequestError(
                f"The file '{name}' of '{source.name}' arrived damaged (wrong checksum) and was thrown away: run again "
                "to download it anew."
            )


class Meter:
    """Counts the bytes of a download where huggingface_hub wants a class of progress bars: one bar for all files.

    Its methods are those of snapshot_download's own `_AggregatedTqdm`. Once `stopped`, the next chunk raises.
    """

    def __init__(self):
        self.bytes, self.stopped = 0, False

    def __call__(self, **options: Any) -> Meter:
        return self

    def __enter__(self) -> Meter:
        return self

    def update(self, count: float | None = 1) -> None:
        if self.stopped:
            raise InterruptedError("the download was cancelled")
        self.bytes += int(count or 0)

    def ignore(self, *args: Any, **options: Any) -> None:
        """Of Xet's two counts, bytes received and bytes written, the second is the file's."""

    __exit__ = close = update_transfer = set_postfix_str = set_transfer_postfix_str = ignore


def is_intact(path: Path) -> bool:
    """Whether a file of the hub's cache is what its checksum says: its blob's name is the sha256 of an LFS file,
    git's sha1 of another one. Where links are not supported (Windows) there is no such name, and the answer is yes."""
    blob = path.resolve()
    digest = {64: hashlib.sha256(), 40: hashlib.sha1(b"blob %d\0" % blob.stat().st_size)}.get(len(blob.name))
    if digest is None:
        return True
    with open(blob, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest() == blob.name


def remove(path: Path) -> None:
    """Take a file out of the hub's cache: the link and what it points to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def remove_damaged(source: Source) -> str:
    """Name of a file of the cached copy that is not what its checksum says, after taking it out; "" if all are."""
    folder = cached_folder(source)
    for path in (path for pattern in source.files for path in copies(folder, pattern)) if folder else ():
        if not is_intact(path):
            remove(path)
            return path.relative_to(folder).as_posix()
    return ""


def download_trouble(error: BaseException, name: str, access: Access = OWNER) -> str:
    """One sentence about a failed download of repository `name`: what happened and what helps whoever asked."""
    from huggingface_hub import errors

    full = f"The disk is full: free space in the hub's cache (HF_HOME) for '{name}' and run again, or {OTHERWISE}."
    cause: BaseException | None = error
    while cause is not None:
        match cause:
            case errors.HfHubHTTPError(response=answer) if answer.status_code in (401, 403) and access.token is False:
                return f"'{name}' is not a public repository of the hub (none, private or gated): {OTHERWISE}."
            case errors.GatedRepoError():
                return (
                    f"'{name}' is gated: accept its licence on huggingface.co/{name}, set HF_TOKEN to a token of that "
                    f"account and run again, or {OTHERWISE}."
                )
            case errors.RepositoryNotFoundError():
                return (
                    f"There is no repository '{name}' on the hub, or it is private: it was renamed or removed; "
                    f"set HF_TOKEN if you have access, or {OTHERWISE}."
                )
            case errors.RevisionNotFoundError() | errors.RemoteEntryNotFoundError():
                return f"'{name}' no longer holds the files that this app knows: {OTHERWISE}."
            case errors.HfHubHTTPError(response=answer) if answer.status_code in (401, 403):
                return (
                    f"The hub refuses '{name}': set HF_TOKEN to a valid token that may read huggingface.co/{name} and "
                    f"run again, or {OTHERWISE}."
                )
            case OSError(errno=errno.ENOSPC | errno.EDQUOT):
                return full
            case OSError(errno=errno.EACCES | errno.EPERM | errno.EROFS):
                return f"'{name}' cannot be stored: let HF_HOME name a folder that this app may write to."
            case RuntimeError() if os.strerror(errno.ENOSPC) in str(cause):  # hf_xet's way to say it
                return full
        cause = cause.__cause__ or cause.__context__
    return (
        f"'{name}' could not be downloaded: the hub cannot be reached or broke off; check the network and run again, "
        f"what is complete already is kept, or {OTHERWISE}."
    )
