"""Where model weights come from, and that they really arrived: a folder of this machine or a hub repository.

The loaders of psd.priors and psd.rewards share this file. It knows no model; torch, diffusers and transformers are
imported by their callers, so that the tables PRIORS and REWARDS stay cheap to read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from psd.safety import RequestError

ASSETS = Path(__file__).resolve().parent.parent / "assets"

_LOAD_LOCK, _TABLE_LOCK = threading.RLock(), threading.Lock()
_TOKENIZER_LOCK = threading.Lock()


@dataclass(frozen=True)
class Source:
    """A folder (relative ones stand below assets/) or, with a revision, a hub repository at that commit."""

    name: str
    revision: str = ""
    offline: bool = field(default=False, compare=False)  # take it from the hub's cache or not at all

    @property
    def is_folder(self) -> bool:
        return not self.revision

    @property
    def path(self) -> str:
        """First argument of from_pretrained. Absolute: a missing relative folder would be taken for a hub id."""
        return str(ASSETS / self.name) if self.is_folder else self.name

    @property
    def where(self) -> dict[str, Any]:
        """Further arguments of from_pretrained."""
        if self.is_folder:
            return {"local_files_only": True}
        return {"revision": self.revision, "local_files_only": self.offline}

    @property
    def is_here(self) -> bool:
        """Whether something of it is on this machine already; asks nobody, and does not look whether it is all."""
        if self.is_folder:
            return True
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            snapshot_download(self.name, revision=self.revision, local_files_only=True)
        except LocalEntryNotFoundError:
            return False
        return True

    def file(self, name: str) -> Path:
        """Local path of one file, downloaded if need be. Raises OSError where it does not exist."""
        if self.is_folder:
            return Path(self.path) / name
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.name, name, **self.where))


def load_once(loaded: OrderedDict, key: tuple, load: Callable[[], Any], keep: int) -> Any:
    """`load()` of this key, once per process; `loaded` holds the `keep` models used last.

    Of two first requests the second waits and shares the first one's model. Only one model loads at a time
    (transformers patches torch while it does); what is loaded already is handed out meanwhile.
    """

    def recent() -> Any:
        with _TABLE_LOCK:
            if key in loaded:
                loaded.move_to_end(key)
            return loaded.get(key)

    if (model := recent()) is not None:
        return model
    with _LOAD_LOCK:
        if (model := recent()) is None:
            model = load()
            with _TABLE_LOCK:
                loaded[key] = model
                while len(loaded) > keep:
                    loaded.popitem(last=False)
        return model


@contextmanager
def readable_errors(name: str, source: Source) -> Iterator[None]:
    """Turn whatever a loader raises into one RequestError without paths; the cause stays chained for the log."""
    try:
        yield
    except (RequestError, ImportError, MemoryError):
        raise
    except Exception as error:  # as wide as this because tokenizers raises plain Exception for a damaged file
        if type(error).__name__ == "OutOfMemoryError":
            raise
        if not source.is_folder:
            raise RequestError(
                f"'{name}' could not be loaded from the hub: check its name, your access and the network, "
                "or choose a model that comes with the app."
            ) from error
        if not Path(source.path).is_dir():
            raise RequestError(f"The folder of '{name}' is missing: restore its weights or choose another.") from error
        raise RequestError(
            f"The weights of '{name}' are incomplete or damaged: restore the folder's files or choose another model."
        ) from error


def pretrained(cls: type, source: Source, **kwargs: Any) -> Any:
    """`cls.from_pretrained` of diffusers or transformers from safetensors; frozen, in eval mode.

    Both libraries only warn when a parameter is absent and leave it at its random start: here that is a ValueError.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()  # what their warnings would tell is checked below
        # A bar for a download, none for reading a folder.
        (logging.disable_progress_bar if source.is_folder else logging.enable_progress_bar)()
    model, report = cls.from_pretrained(
        source.path, use_safetensors=True, output_loading_info=True, **source.where, **kwargs
    )
    return frozen(model, report)


def from_state_dict(cls: type, config: Any, state_dict: dict[str, Any], **kwargs: Any) -> Any:
    """A transformers model from its config and every one of its parameters (without a random start before)."""
    model, report = cls.from_pretrained(None, config=config, state_dict=state_dict, output_loading_info=True, **kwargs)
    if report["unexpected_keys"]:
        raise ValueError(f"{cls.__name__}: parameters of another model: {sorted(report['unexpected_keys'])[:3]}")
    return frozen(model, report)


def frozen(model: Any, report: dict[str, Any]) -> Any:
    lost = [*report["missing_keys"], *report["mismatched_keys"], *report["error_msgs"]]
    if lost:
        raise ValueError(f"{type(model).__name__}: {len(lost)} parameters not in the file, the first: {lost[0]}")
    return model.requires_grad_(False).eval()


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """A tokenizer without its files has two tokens and says nothing (transformers 5): raise ValueError."""
    if len(tokenizer) != vocab_size:
        raise ValueError(f"tokenizer has {len(tokenizer)} tokens, its text encoder {vocab_size}")


def tokenize(tokenizer: Any, prompts: list[str], max_tokens: int) -> Any:
    """input_ids and attention_mask [P, max_tokens], padded and cut.

    Locked: transformers sets padding and length on the tokenizer that concurrent runs share, and Rust forbids that.
    """
    with _TOKENIZER_LOCK:
        return tokenizer(prompts, padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt")


def token_count(tokenizer: Any, prompt: str) -> int:
    """Tokens of the whole prompt, the special ones included."""
    with _TOKENIZER_LOCK:
        return len(tokenizer.tokenize(prompt)) + tokenizer.num_special_tokens_to_add()
