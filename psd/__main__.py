"""`python -m psd "a red mushroom with a white stem"`: the headless twin of the app.

The flags are RunConfig's fields; every rule about them is `safety.check_request`'s. Draws a progress bar on stderr,
prints scores and file paths on stdout. Exit status: 0 done, 2 refused, 130 interrupted, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from contextlib import closing
from pathlib import Path

from psd.config import ARMS, FIELDS, MAX_SEED, PRESETS, RunConfig, Setting
from psd.errors import RequestError
from psd.events import Downloading, Finished, Started, Step
from psd.models.needs import missing_models, told
from psd.safety import allowed, check_name, check_request

EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 130

GROUPS = {
    "main": "what to make",
    "method": "score distillation",
    "preference": "preference guidance",
    "negative": "negative embedding",
    "object": "object (3D)",
    "run": "size and time",
}


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    show_list, quiet = given.pop("list"), given.pop("quiet")
    output, randomize_seed = given.pop("output"), given.pop("randomize_seed")
    allow_download = given.pop("allow_download")
    if show_list:
        print_list()
        return 0
    if randomize_seed:
        if "seed" in given:
            parser.error("--seed and --randomize-seed exclude each other: give one of them.")
        given["seed"] = secrets.randbelow(MAX_SEED + 1)
    try:
        check_name("preset", given.get("preset", RunConfig.preset), PRESETS)
        config = RunConfig.from_preset(**given)
        check_request(config, allow_local=True)
        make_folder(output)
        return follow(config, output, quiet, allow_download)
    except RequestError as error:
        return complain(error, EXIT_REFUSED)
    except OSError as error:  # a full disk, a lost mount: the machine's trouble, not a bug to trace
        return complain(error, EXIT_FAILED)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m psd",
        usage='python -m psd "PROMPT" [--preset NAME] [--seed N] [--arms "with, without"] [--output DIR] [...]',
        description="Draw a prompt by score distillation, with and without preference guidance, from the same seed.",
        epilog='A given flag overrides the preset. Example: python -m psd "a tall blue lamp" --steps 50 --seed 7',
        allow_abbrev=False,
    )
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    for setting in FIELDS.values():
        add_flag(groups[setting.group], setting)
    groups["main"].add_argument("--randomize-seed", action="store_true", help="Draw the seed; it is printed.")
    groups["run"].add_argument(
        "--allow-download", action=argparse.BooleanOptionalAction, default=True,
        help="Fetch models that are not on this machine yet; what they are is said first (default: on).",
    )  # fmt: skip
    other = parser.add_argument_group("output")
    other.add_argument(
        "--output", type=Path, default=Path("outputs"), metavar="DIR",
        help="Where the run's own folder is made (default: outputs).",
    )  # fmt: skip
    other.add_argument("--quiet", action="store_true", help="No progress bar.")
    other.add_argument("--list", action="store_true", help="Name presets, priors and rewards, with licence and size.")
    return parser


def add_flag(group: argparse._ArgumentGroup, setting: Setting) -> None:
    """One RunConfig field as a flag; absent from the result when it was not given, so that the preset decides."""
    accepted = allowed(setting).strip(" ()")
    help_line = setting.help.replace("%", "%%")
    if setting.name == "prompt":
        # Optional for --list; a run without it is refused by check_request.
        group.add_argument("prompt", nargs="?", default=argparse.SUPPRESS, metavar="PROMPT", help=help_line)
        return
    default = f"{accepted}; default: {describe_default(setting)}".lstrip("; ")
    options = {"default": argparse.SUPPRESS, "help": f"{help_line} ({default})"}
    if setting.kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"], options["metavar"] = setting.kind, {str: "NAME", int: "N", float: "X"}[setting.kind]
    group.add_argument("--" + setting.name.replace("_", "-"), **options)


def describe_default(setting: Setting) -> str:
    if setting.kind is bool:
        return "on" if setting.default else "off"
    return "none" if setting.default == "" else str(setting.default)


class OneLineParser(argparse.ArgumentParser):
    """argparse prints the whole usage before an error; with thirty flags nobody would find the error in it."""

    def error(self, message: str) -> None:
        self.exit(EXIT_REFUSED, f"error: {message.rstrip('.')} (--help names every flag)\n")


def make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise RequestError(f"output {str(output)!r} cannot be made: {reason}; give another --output.") from error
    if not os.access(output, os.W_OK):
        raise RequestError(f"output {str(output)!r} cannot be written to; give another --output.")


def follow(config: RunConfig, output: Path, quiet: bool, allow_download: bool) -> int:
    """Drain the run's events into the progress bar, then print what it made."""
    directory = finished = None
    missing = missing_models(config)
    try:
        from tqdm import tqdm

        from psd.run import generate

        with (
            closing(generate(config, output_root=output, allow_download=allow_download)) as events,
            tqdm(total=config.steps, unit="step", disable=quiet, desc="loading models", leave=False) as bar,
        ):
            for event in events:
                if isinstance(event, Downloading):
                    if missing:
                        bar.write(f"downloading {told(missing)}", file=sys.stderr)
                        missing = {}
                    bar.set_description(f"downloading {event.name}, {event.done_mb:.0f} of {event.total_mb:.0f} MB")
                elif isinstance(event, Started):
                    directory = event.directory
                    bar.reset()  # the time models took to load says nothing about the steps
                    bar.set_description(f"seed {config.seed}")
                    for warning in event.warnings:
                        bar.write(f"warning: {warning}", file=sys.stderr)
                elif isinstance(event, Step):
                    bar.set_postfix_str(describe_rewards(event.metrics), refresh=False)
                    bar.update(event.step - bar.n)
                elif isinstance(event, Finished):
                    finished = event
    except KeyboardInterrupt:
        kept = f"what was made so far is in {directory}" if directory else "nothing had been made yet"
        return complain(f"interrupted; {kept}", EXIT_INTERRUPTED)
    if finished is None:
        return complain("the run ended without a result", EXIT_FAILED)
    print_results(finished)
    return 0


def print_list() -> None:
    """Presets with what they set, then every prior and reward with licence and size."""
    from psd.models.priors.table import PRIORS, gpu_memory
    from psd.models.rewards.table import EXAMPLE, REWARDS

    print("presets (--preset)")
    for name, settings in PRESETS.items():
        print(f"  {name}: {', '.join(f'{key} {value}' for key, value in settings.items() if key != 'negative_prompt')}")
    for title, table in {"priors (--prior)": PRIORS, "rewards (--reward)": REWARDS}.items():
        print(f"\n{title}")
        for name, info in table.items():
            size = f"{info.download_mb} MB to download" if info.download_mb else "included"
            print(f"  {name}: {info.licence}, {size}{gpu_memory(info)}. {info.about}")
    print("\nA prior may also be a hub id (org/name) or the path of a diffusers folder, ", end="")
    print(f"a reward a mixture such as {EXAMPLE!r}.")


def describe_rewards(metrics: dict[str, float]) -> str:
    """Rewards of a step, "reward 1.234 with, 1.100 without"; steps that look at no reward have none."""
    shown = [f"{value:.3f} {arm}" for arm in ARMS if (value := metrics.get(f"reward_{arm}")) is not None]
    return "reward " + ", ".join(shown) if shown else ""


def print_results(finished: Finished) -> None:
    """Scores as a table (one row a reward, one column an arm), then every file."""
    arms = list(finished.scores)
    rewards = list(dict.fromkeys(name for scores in finished.scores.values() for name in scores))
    wide = max((len(name) for name in rewards), default=0)
    print(f"{'score':<{wide}}" + "".join(f"{arm:>12}" for arm in arms))
    for name in rewards:
        cells = (finished.scores[arm].get(name) for arm in arms)
        print(f"{name:<{wide}}" + "".join("-".rjust(12) if cell is None else f"{cell:12.4f}" for cell in cells))
    print(f"\n{finished.steps_done} steps in {finished.seconds:.1f} s, seed {finished.config.seed}")
    if finished.stopped:
        print(finished.stopped)
    for path in dict.fromkeys([*finished.images.values(), *finished.files.values()]):
        print(path)


def complain(message: object, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
