"""Which models a run needs, which of them this machine lacks, and bringing those here. Loads nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psd.config import RunConfig
from psd.errors import RequestError
from psd.events import Downloading
from psd.models.hub import OWNER, Access, check_online, check_public, download, is_cached
from psd.models.priors.fit import download_configs
from psd.models.priors.table import PRIORS, DecoderInfo, PriorInfo, decoder_of, prior_info
from psd.models.rewards.table import REWARDS, RewardInfo, reward_terms

ModelInfo = PriorInfo | DecoderInfo | RewardInfo


def models_of(prior: str, fast_decoder: bool) -> dict[str, PriorInfo | DecoderInfo]:
    """The prior and, where asked and there is one for its latents, its small decoder, by name. Raises RequestError."""
    info = prior_info(prior)
    decoder = decoder_of(prior, fast_decoder)
    return {prior: info} | ({decoder.source.name: decoder} if decoder else {})


def missing_models(config: RunConfig) -> dict[str, ModelInfo]:
    """Models that a run of a checked `config` would have to download first, by name. Uses no network."""
    models = models_of(config.prior, config.fast_decoder)
    models |= {name: REWARDS[name] for name in reward_terms(config.reward)}
    return {name: info for name, info in models.items() if not is_cached(*info.sources)}


def check_downloads(config: RunConfig, allow_download: Any) -> None:
    """Raise RequestError where a run of a checked `config` needs a model that is not on this machine yet.

    Nothing of this size comes unasked: `allow_download`, True and nothing like it, says that somebody read what it is.
    """
    missing = missing_models(config)
    for name in missing:
        check_online(name)
    if missing and allow_download is not True:
        raise RequestError(
            f"allow_download must be true for a first run with {told(missing)}: allow it if you accept the licence, or "
            "choose a model that is on this machine.",
            "allow_download",
        )


def told(missing: dict[str, ModelInfo]) -> str:
    """Models to download with size and licence, for the middle of a sentence."""
    size = {name: f"{info.download_mb} MB" if info.download_mb else "size unknown" for name, info in missing.items()}
    return " and ".join(f"{name} ({size[name]}, licence: {info.licence})" for name, info in missing.items())


def fetch_models(config: RunConfig, allow_download: bool = True, access: Access = OWNER) -> Iterator[Downloading]:
    """Download what a run of a checked `config` needs and this machine lacks. Raises RequestError.

    A typed hub id is judged by its config files before the rest is fetched. To a stranger it is served if it is
    public now, even from the cache, where the owner's token may have brought it; the tables' models are public.
    """
    check_downloads(config, allow_download)
    prior = prior_info(config.prior)
    typed = config.prior not in PRIORS and not prior.source.is_folder
    if typed and access.token is False:
        check_public(prior.source)
    missing = missing_models(config)
    if typed and config.prior in missing:
        yield from download_configs(config.prior, prior.source, access)
    for info in missing.values():
        for source in info.sources:
            yield from download(source, access)
