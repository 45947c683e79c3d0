"""What all loaders share: weights that really arrived, or one sentence why not.

It knows no model; torch, diffusers and transformers are imported by their callers, so that the tables PRIORS and
REWARDS stay cheap to read. Where the files come from is psd.models.hub's.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from psd.errors import RequestError, is_out_of_memory
from psd.models.hub import Source, remove_damaged

log = logging.getLogger(__name__)

DAMAGED = ("SafetensorError", "JSONDecodeError", "UnicodeDecodeError", "UnpicklingError", "EOFError", "BadZipFile")
SUMS = ".sha256"
_LOAD_LOCK, _TABLE_LOCK = threading.RLock(), threading.Lock()
_TOKENIZER_LOCK = threading.Lock()


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
def readable_errors(name: str, *sources: Source) -> Iterator[None]:
    """Turn whatever a loader raises into one RequestError without paths; its cause is logged and stays chained.

    `sources` are what it reads, the model's own first. A damaged file of the hub's cache is taken out of it. Memory
    that ran out is no fault of the files and passes.
    """
    try:
        for source in sources:
            if source.is_folder:
                check_sums(name, Path(source.path))
        yield
    except (RequestError, ImportError):
        raise
    except Exception as error:  # as wide as this because tokenizers raises plain Exception for a damaged file
        if is_out_of_memory(error):
            raise
        log.warning("%s cannot be loaded", name, exc_info=True)
        for source in sources:
            if not source.is_folder and (file := remove_damaged(source)):
                raise RequestError(
                    f"The file '{file}' of '{source.name}' in the hub's cache was damaged and has been removed: run "
                    "again to download it anew."
                ) from error
        if not sources[0].is_folder:
            raise RequestError(
                f"'{name}' was downloaded whole but cannot be read: it is no model of the kind this app knows, choose "
                "another."
            ) from error
        if not Path(sources[0].path).is_dir():
            raise RequestError(f"The folder of '{name}' is missing: restore its weights or choose another.") from error
        raise RequestError(f"{fault(error, name)}: restore the folder's files or choose another model.") from error


def check_sums(name: str, folder: Path) -> None:
    """Raise RequestError where a file below `folder` is not what the FILE.sha256 beside it says; of others nothing is
    known. A flipped bit of a weight is a number like any other: no reader notices it."""
    for sums in folder.rglob(f"*{SUMS}"):
        digest, _, file = sums.read_text(encoding="utf-8").strip().partition("  ")
        if digest != sha256_of(sums.with_name(file)):
            raise RequestError(f"A file of '{name}' is damaged: restore the folder's files or choose another model.")


def export_sums(folder: Path) -> None:
    """FILE.sha256 beside every file of weights below `folder`, as sha256sum writes and checks it."""
    for weights in folder.rglob("*.safetensors"):
        weights.with_name(weights.name + SUMS).write_text(f"{sha256_of(weights)}  {weights.name}\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault(error: BaseException | None, name: str) -> str:
    """What is wrong with a model's folder as far as a loader's error tells, without its paths."""
    while error is not None:
        text = str(error)
        if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and "no file named" in text):
            known = isinstance(error, FileNotFoundError) and error.filename
            file = f"file '{Path(error.filename).name}'" if known else "file"
            return f"A {file} of '{name}' is missing"
        if type(error).__name__ in DAMAGED or "PytorchStreamReader" in text:
            return f"A file of '{name}' is damaged"
        error = error.__cause__ or error.__context__
    return f"The files of '{name}' are incomplete or damaged, or those of another kind of model"


def pretrained(cls: type, source: Source, **kwargs: Any) -> Any:
    """`cls.from_pretrained` of diffusers or transformers from safetensors; frozen, in eval mode.

    Both libraries only warn when a parameter is absent and leave it at its random start: here that is a ValueError.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()  # what their warnings would tell is checked below
        library.disable_progress_bar()
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


def use_tf32(device: str) -> None:
    """Let a GPU multiply float32 matrices on its tensor cores, in TF32: float32's range and 10 bits of mantissa.

    For rewards, which stay float32 lest the gradients of single pixels vanish. For the whole process; nothing on a CPU.
    """
    import torch

    if torch.device(device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True


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
