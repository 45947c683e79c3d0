"""What is said to whoever sent a request: one actionable sentence. Knows nothing of what was asked for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RequestError(ValueError):
    """A request that cannot be served as it stands; the message is one sentence for the person who sent it.

    `field` is the setting to blame, where there is one: what shows the sentence need not parse it.
    """

    def __init__(self, sentence: str, field: str = ""):
        super().__init__(sentence)
        self.field = field


class Withheld(RequestError):
    """A picture of a run that must not be shown: it ends, with its numbers alone."""


class Abandoned(Exception):
    """Thrown into a run that nobody listens to any more: it ends at once, with little to show."""


MOST_NAMES = 16  # that a sentence lists
NO_MEMORY = "The device ran out of memory: choose fewer arms, a smaller image or render size."
OUT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the CPU or of a GPU: in `error` or in what it was raised from.

    torch's allocator for the CPU and CUDA's libraries raise plain RuntimeErrors, a mapped file an OSError.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return True
        if isinstance(cause, RuntimeError | OSError) and any(part in str(cause).lower() for part in OUT_OF_MEMORY):
            return True
        cause = cause.__cause__
    return False


def unknown_name(field: str, name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The sentence about a name that is not in `known`: nearest names first, then all, then what else would do."""
    known = list(known)
    nearest = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}? Known" if nearest else "known"
    return f"{field} {shown(name)} is not known; {hint}: {some_of(known)}{otherwise}."


def some_of(names: Iterable[str]) -> str:
    """All names where they are few; a sentence must stay one."""
    names = list(names)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def shown(value: object, limit: int = 60) -> str:
    """`value` as Python writes it, cut to `limit` characters: it came from outside and may be anything."""
    if isinstance(value, int) and value.bit_length() > 128:  # Python itself refuses to print very long ones
        return "a whole number of more than 38 digits"
    try:
        text = repr(value[:limit] if isinstance(value, str | bytes) else value)
    except (RecursionError, ValueError):  # lists in lists, or a very long number in one
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."
