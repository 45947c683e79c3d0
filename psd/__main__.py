"""`python -m psd "a red mushroom with a white stem"`: the headless twin of the app.

The flags are RunConfig's fields; every rule about them is `safety.check_request`'s. Draws a progress bar on stderr,
prints scores and file paths on stdout. Exit status: 0 done, 1 broken down or without pictures and finite scores, 2
refused, 130 interrupted (Ctrl-C), 143 terminated.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import secrets
import signal
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from psd.config import ARMS, FIELDS, MAX_SEED, MODES, PRESETS, RunConfig, Setting, arms_of
from psd.errors import NO_MEMORY, RequestError, is_out_of_memory
from psd.events import Downloading, Finished, Started, Step
from psd.models.needs import missing_models, told
from psd.safety import allowed, check_name, check_request

EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143

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
    logging.getLogger("psd").addHandler(logging.NullHandler())  # what it would tell at length stands in a sentence too
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
        if os.path.isdir(config.start):
            config = replace(config, start=start_in(config))
        check_request(config, allow_local=True)
        make_folder(output)
        return follow(config, Path(output), quiet, allow_download)
    except RequestError as error:
        return complain(error, EXIT_REFUSED)
    except OSError as error:  # a full disk, a lost mount: the machine's trouble, not a bug to trace
        return complain(NO_MEMORY if is_out_of_memory(error) else error, EXIT_FAILED)
    except (MemoryError, RuntimeError) as error:  # torch's allocators raise either
        if not is_out_of_memory(error):
            raise
        return complain(NO_MEMORY, EXIT_FAILED)


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
        "--output", default="outputs", metavar="DIR",
        help="Where the run's own folder is made (default: outputs).",
    )  # fmt: skip
    other.add_argument("--quiet", action="store_true", help="No progress bar.")
    other.add_argument("--list", action="store_true", help="Name presets, methods, arms, priors, rewards.")
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
        options["type"] = setting.kind
        options["metavar"] = "FILE" if setting.local else {str: "NAME", int: "N", float: "X"}[setting.kind]
    group.add_argument("--" + setting.name.replace("_", "-"), **options)


def describe_default(setting: Setting) -> str:
    if setting.kind is bool:
        return "on" if setting.default else "off"
    return "none" if setting.default == "" else str(setting.default)


class OneLineParser(argparse.ArgumentParser):
    """argparse prints the whole usage before an error; with thirty flags nobody would find the error in it."""

    def error(self, message: str) -> None:
        self.exit(EXIT_REFUSED, f"error: {message.rstrip('.')} (--help names every flag)\n")


def start_in(config: RunConfig) -> str:
    """The file to start from in the run's folder that is named. Raises RequestError."""
    from psd.record import start_of  # which loads torch

    check_name("mode", config.mode, MODES)
    return str(start_of(Path(config.start), config.mode))


def make_folder(output: str) -> None:
    if not output.strip():
        raise RequestError("output is empty: name a folder, for example --output outputs.")
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise RequestError(f"output {output!r} cannot be made: {reason}; give another --output.") from error
    if not os.access(output, os.W_OK):
        raise RequestError(f"output {output!r} cannot be written to; give another --output.")


def follow(config: RunConfig, output: Path, quiet: bool, allow_download: bool) -> int:
    """Drain the run's events into the progress bar, then print what it made."""
    directory = finished = None
    missing, arms = missing_models(config), list(arms_of(config))
    before = signal.signal(signal.SIGTERM, terminate)
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
                    bar.set_postfix_str(describe_rewards(event.metrics, arms), refresh=False)
                    bar.update(event.step - bar.n)
                elif isinstance(event, Finished):
                    finished = event
    except (KeyboardInterrupt, SystemExit) as error:
        status = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_TERMINATED
        return complain(f"interrupted; {kept(directory)}", status)
    finally:
        signal.signal(signal.SIGTERM, before)
    if finished is None:
        return complain("the run ended without a result", EXIT_FAILED)
    print_results(finished)
    pictured = any(arm.picture for arm in finished.arms.values())
    numbers = all(math.isfinite(score) for arm in finished.arms.values() for score in arm.scores.values())
    return 0 if pictured and numbers and not finished.failed else EXIT_FAILED


def terminate(*_: object) -> None:
    raise SystemExit(EXIT_TERMINATED)


def kept(directory: Path | None) -> str:
    """What an interrupted run has left, and where."""
    from psd.record import read

    made = read(directory).files if directory else ()
    if not made:
        return "nothing had been made yet"
    return f"what was made so far is in {directory}: {', '.join(path.name for path in made)}"


def print_list() -> None:
    """Presets and arms with what they set, methods, then every prior and reward with licence and size."""
    from psd.methods import METHODS
    from psd.models.priors.table import PRIORS, gpu_memory
    from psd.models.rewards.table import EXAMPLE, REWARDS

    for title, table in {"presets (--preset)": PRESETS, "arms (--arms)": ARMS}.items():
        print(title)
        for name, settings in table.items():
            changed = (f"{key} {value}" for key, value in settings.items() if key != "negative_prompt")
            print(f"  {name}: {', '.join(changed) or 'the run itself'}")
        print()
    print("methods (--method)")
    for name, info in METHODS.items():
        print(f"  {name}: {info.about}")
    for title, table in {"priors (--prior)": PRIORS, "rewards (--reward)": REWARDS}.items():
        print(f"\n{title}")
        for name, info in table.items():
            size = f"{info.download_mb} MB to download" if info.download_mb else "included"
            print(f"  {name}: {info.licence}, {size}{gpu_memory(info)}. {info.about}")
    print("\nA prior may also be a hub id (org/name) or the path of a diffusers folder, ", end="")
    print(f"a reward a mixture such as {EXAMPLE!r}.")


def describe_rewards(metrics: dict[str, float], arms: list[str]) -> str:
    """Rewards of a step, "reward 1.234 with, 1.100 without"; steps that look at no reward have none."""
    shown = [f"{value:.3f} {arm}" for arm in arms if (value := metrics.get(f"reward_{arm}")) is not None]
    return "reward " + ", ".join(shown) if shown else ""


def print_results(finished: Finished) -> None:
    """Scores as a table (one row a reward, one column an arm), then every file; what went wrong goes to stderr."""
    scores = {name: arm.scores for name, arm in finished.arms.items()}
    rewards = list(dict.fromkeys(name for each in scores.values() for name in each))
    wide = max((len(name) for name in rewards), default=0)
    columns = {name: max(12, len(name) + 2) for name in scores}
    print(f"{'score':<{wide}}" + "".join(f"{name:>{column}}" for name, column in columns.items()))
    for reward in rewards:
        cells = [f"{each[reward]:.4f}" if reward in each else "-" for each in scores.values()]
        print(f"{reward:<{wide}}" + "".join(f"{cell:>{column}}" for cell, column in zip(cells, columns.values())))
    print(f"\n{finished.steps_done} steps in {finished.seconds:.1f} s, seed {finished.config.seed}")
    if finished.stopped:
        print(finished.stopped, file=sys.stderr if finished.failed else sys.stdout)
    for remark in finished.remarks:
        print(f"warning: {remark}", file=sys.stderr)
    from psd.record import read

    for path in read(finished.directory).files:
        print(path)


def complain(message: object, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
