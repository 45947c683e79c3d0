"""Diffusion models to distil from: `load_prior` of a row of table.py, a hub id or a folder."""

from __future__ import annotations

from collections import OrderedDict
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from psd.models.hub import on_disk
from psd.models.priors.table import DecoderInfo, prior_info, shown_name
from psd.models.weights import load_once, readable_errors

if TYPE_CHECKING:
    from psd.contracts import Decode, Prior

KEEP_LOADED = 3  # models; what was used last stays
_loaded: OrderedDict = OrderedDict()
_loaded_decoders: OrderedDict = OrderedDict()


def load_prior(name: str, device: str = "cpu") -> Prior:
    """The prior of this name, hub id or folder on `device`, loaded once per process. Raises RequestError."""
    info = prior_info(name)

    def load() -> Prior:
        shown = shown_name(name)
        with readable_errors(shown, *info.sources):
            return resolve_name(info.model).load(shown, info.on_disk(), device)

    return load_once(_loaded, (info.source, info.parts, info.model, str(device)), load, KEEP_LOADED)


def load_fast_decoder(info: DecoderInfo, device: str = "cpu") -> Decode:
    """The small decoder of this row on `device`, loaded once per process. Raises RequestError."""

    def load() -> Decode:
        from psd.models.priors.stable_diffusion import load_tiny_decoder

        with readable_errors(info.source.name, info.source):
            return load_tiny_decoder(on_disk(info.source), device)

    return load_once(_loaded_decoders, (info.source, str(device)), load, KEEP_LOADED)
