"""Does it work, and how fast? `python -m psd.bench image` and `scene`: held-out prompts x seeds over every arm.

`python -m psd.bench transfer`: what a learned n does to samples that nobody optimises.
`python -m psd.bench methods` and `methods-3d`: the field's other methods beside it.
`python -m psd.bench speed`: what a step takes beside its networks.
`python -m psd.bench growth`: how time and memory grow with a run's sizes.
`python -m psd.bench gpu`: speed and memory of the published architectures; `memory` counts the latter without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from psd.bench import gpu, growth, image, memory, methods, scene, speed, transfer
from psd.bench.paired import contact_sheet, measure, run_batch, table
from psd.config import FIELDS, RunConfig
from psd.toybox import world
from psd.toybox.dataset import TABLE_SEED, heldout_scenes

TABLES = {"image": image, "scene": scene, "transfer": transfer} | methods.TABLES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, bench in TABLES.items():
        add_table_flags(modes.add_parser(name, parents=[device], help=bench.__doc__), bench)
    add_gpu_flags(modes.add_parser("gpu", parents=[device], help=gpu.__doc__.splitlines()[0]))
    of_speed = modes.add_parser("speed", parents=[device], help=speed.__doc__.splitlines()[0])
    of_speed.add_argument("--modes", nargs="+", choices=list(speed.PRESETS), default=list(speed.PRESETS))
    of_growth = modes.add_parser("growth", parents=[device], help=growth.__doc__.splitlines()[0])
    of_growth.add_argument("--rounds", type=int, default=growth.ROUNDS, help="of which the fastest counts")
    modes.add_parser("memory", help=memory.__doc__.splitlines()[0])
    quantities = [each.quantity for each in growth.ROWS]
    of_growth.add_argument("--rows", nargs="+", choices=quantities, default=quantities)
    args = parser.parse_args()
    if args.mode == "growth":
        for line in growth.report(
            args.device, args.rounds, [each for each in growth.ROWS if each.quantity in args.rows]
        ):
            print(line, flush=True)
    elif args.mode == "memory":
        for line in memory.report():
            print(line, flush=True)
    elif args.mode == "speed":
        for line in speed.report(args.device, args.modes):
            print(line, flush=True)
    elif args.mode == "gpu":
        for line in gpu.report(args.device, args.tiny, args.steps, args.modes, args.profile):
            print(line, flush=True)
    else:
        write_table(TABLES[args.mode], args)


def add_table_flags(parser: argparse.ArgumentParser, bench) -> None:
    parser.add_argument("--preset", default=bench.PRESET)
    parser.add_argument("--prompts", type=int, default=bench.PROMPTS)
    parser.add_argument("--prompts-seed", type=int, default=TABLE_SEED, help="of the captions; another one to tune on")
    parser.add_argument("--seeds", type=int, default=bench.SEEDS)
    parser.add_argument("--steps", type=int, default=None, help="instead of the preset's")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, on a CPU")
    parser.add_argument("--output", type=Path, default=None, help="values; pictures of all runs beside it")
    parser.add_argument(
        "--try", dest="tried", nargs="+", default=[], metavar="SETTINGS",
        help="instead of the table's rows: the first, and full PSD with each of these, as in gamma=3,pref_weight=0.6; "
        "another arm as in without:gamma=3",
    )  # fmt: skip
    parser.add_argument(
        "--set", dest="settings", default="", metavar="SETTINGS", help="of every row, beyond the preset"
    )
    parser.add_argument("--costs", action="store_true", help="first what each arm costs alone: on a quiet machine")
    keep = parser.add_mutually_exclusive_group()
    keep.add_argument(
        "--resume", dest="keep", action="store_const", const="same", default="none",
        help="make only what --output's earlier run has not: it was broken off, or had fewer prompts or seeds",
    )  # fmt: skip
    keep.add_argument(
        "--again", dest="keep", action="store_const", const="all",
        help="judge the pictures of --output's earlier run again",
    )  # fmt: skip


def add_gpu_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script; without CUDA always")
    parser.add_argument("--steps", type=int, default=100, help="timed, of each arm")
    parser.add_argument("--modes", nargs="+", choices=list(gpu.PRESETS), default=list(gpu.PRESETS))
    parser.add_argument("--profile", action="store_true", help="also the costliest operations of full PSD")


def write_table(bench, args: argparse.Namespace) -> None:
    """Measure one of TABLES, print it, and write its values and pictures."""
    config = RunConfig.from_preset(args.preset, steps=args.steps, **settings_of(args.settings))
    output = args.output or Path(f"outputs/bench-{args.mode}.json")
    pictures = output.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    extra = {}
    if args.keep == "all":
        earlier = json.loads(output.read_text(encoding="utf-8"))
        config, extra = RunConfig.from_dict(earlier["config"]), earlier["costs"]
        args.prompts, args.seeds, args.prompts_seed = len(earlier["prompts"]), earlier["seeds"], earlier["prompts_seed"]
    elif args.costs:
        extra = bench.costs(bench.ROWS, config, args.device)  # before the workers: alone on the machine
    scenes = heldout_scenes(args.prompts, args.prompts_seed)
    workers = args.workers if args.device == "cpu" else 1
    rows = {tried: row_of(tried) for tried in args.tried}
    rows = dict(list(bench.ROWS.items())[:1]) | rows if rows else bench.ROWS
    run = partial(run_batch, bench.make, bench.seen_in, rows, config, args.device, pictures, args.keep)
    if hasattr(bench, "passes"):
        extra = bench.passes(rows, config) | extra
    found = measure(run, scenes, args.seeds, bench.BATCH, workers)
    values = {arm: {name: v.tolist() for name, v in columns.items()} for arm, columns in found.items()}
    record = {
        "config": config.to_dict(),
        "prompts": [world.caption(s) for s in scenes],
        "prompts_seed": args.prompts_seed,
        "seeds": args.seeds,
        "values": values,
        "costs": extra,
    }
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = contact_sheet(
        pictures, scenes[: getattr(bench, "SHEET_PROMPTS", None)], bench.SHEET_COLUMNS, bench.SHOWN_VIEWS
    )
    page.save(output.with_suffix(".png"), optimize=True)
    print(table(found, bench.COLUMNS, extra, getattr(bench, "AGAINST", None)))


def row_of(text: str) -> tuple[str, dict[str, Any]]:
    """("without", {"gamma": 3.0}) of "without:gamma=3"; where no arm is named, of full PSD."""
    arm, colon, settings = text.partition(":")
    return (arm, settings_of(settings)) if colon else ("with", settings_of(text))


def settings_of(text: str) -> dict[str, Any]:
    """{"gamma": 3.0, "pref_weight": 0.6} of "gamma=3,pref_weight=0.6". Raises ValueError on what is no setting."""
    settings = {}
    for name, value in (part.split("=", 1) for part in text.split(",") if part):
        if name not in FIELDS:
            raise ValueError(f"{name} is no setting")
        settings[name] = type(FIELDS[name].default)(value)
    return settings


if __name__ == "__main__":
    main()
