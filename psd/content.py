"""What published priors do not draw for strangers: prompts by the words below, pictures by psd.models.checker.

The embedded world has no words for any of it, and whoever owns the machine is not judged: command line, Python. The
list knows what is written out in English, no description of it; the checker knows nudity and sex, no violence. Loads
no torch.
"""

from __future__ import annotations

import os
import re
import unicodedata

from psd.errors import RequestError
from psd.models.priors.table import PRIORS

SWITCH = "PSD_CONTENT_FILTER"  # the owner's; "off" is off, all else is on
UNCHECKED = (
    "Pictures of this run are not checked for their content: the safety checker's weights are not in the hub's cache."
)

# Reason, as the sentence says it -> words and phrases, whole ones. No word that is harmless in most prompts.
WORDS = {
    "a sexualised child": """
        child porn, child pornography, childporn, csam, jailbait, loli, lolicon, lolis, paedophile, paedophilia,
        pedo, pedophile, pedophilia, preteen, shota, shotacon, underage""",
    "nudity or sex": """
        bdsm, blowjob, boobs, bukkake, cumshot, ejaculation, erotic, erotica, fellatio, futanari, genitalia, genitals,
        handjob, hentai, masturbate, masturbates, masturbating, masturbation, naked, nipple, nipples, nsfw, nude,
        nudes, nudity, orgasm, orgy, penis, penises, porn, porno, pornographic, pornography, rule 34, sex, sexual,
        sexually, striptease, topless, upskirt, vagina, vulva, xxx""",
    "rape": "gang rape, gangbang, molest, molested, molesting, rape, raped, raping, rapist, sexual assault",
    "cruelty or gore": """
        beheaded, beheading, decapitated, decapitation, disembowelled, disemboweled, dismembered, dismemberment,
        eviscerated, gore, gory, guro, mutilated, mutilation, snuff film, torture, tortured, torturing""",
    "suicide or self harm": """
        cutting herself, cutting himself, hanging herself, hanging himself, self harm, self mutilation, selfharm,
        suicide""",
    "hatred of people": """
        ethnic cleansing, faggot, faggots, gook, gooks, kike, kikes, kkk, ku klux klan, lynched, lynching, nazi, nazis,
        nigga, niggas, nigger, niggers, white power, white supremacist, white supremacy""",
}
ENTRIES = {" ".join(entry.split()): reason for reason, entries in WORDS.items() for entry in entries.split(",")}
WORD = re.compile(r"[^\W_]+")
DIGITS = str.maketrans("013457@$", "oieastas")  # letters as digits and signs spell them


def is_judged(prior: str, owner: bool) -> bool:
    """Whether words and pictures of a run are judged: a published prior's, for strangers, unless the owner says off."""
    embedded = prior in PRIORS and PRIORS[prior].source.is_folder
    return not (owner or embedded or os.environ.get(SWITCH, "").strip().lower() == "off")


def check_prompt(prompt: str) -> None:
    """Raise RequestError where a prompt names what is not drawn; the sentence says why and repeats no word of it."""
    plain = plain_text(prompt)
    said = [f" {' '.join(WORD.findall(text))} " for text in (plain, plain.translate(DIGITS))]
    for entry, reason in ENTRIES.items():
        if any(f" {entry} " in text for text in said):
            raise RequestError(
                f"prompt asks for {reason}, which this server does not draw for visitors: describe something else.",
                "prompt",
            )


def plain_text(text: str) -> str:
    """Small letters without accents, widths and invisible characters."""
    spread = unicodedata.normalize("NFKD", text)
    return "".join(char for char in spread if unicodedata.category(char) not in ("Mn", "Me", "Cf")).casefold()
