"""Does it work? `python -m psd.bench image` and `scene`: held-out prompts x seeds over every arm."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path

import torch

from psd.bench import image, scene
from psd.bench.paired import contact_sheet, heldout_scenes, measure, table
from psd.config import RunConfig
from psd.toybox import world

MODES = {"image": image, "scene": scene}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=list(MODES))
    parser.add_argument("--preset", default=None, help="another one than the mode's own")
    parser.add_argument("--prompts", type=int, default=None, help="image: 40, scene: 20")
    parser.add_argument("--seeds", type=int, default=None, help="image: 3, scene: 2")
    parser.add_argument("--steps", type=int, default=None, help="instead of the preset's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, on a CPU")
    parser.add_argument("--output", type=Path, default=None, help="values; pictures of all runs beside it")
    args = parser.parse_args()
    bench = MODES[args.mode]
    config = RunConfig.from_preset(args.preset or bench.PRESET, steps=args.steps)
    scenes = heldout_scenes(args.prompts or bench.PROMPTS)
    output = args.output or Path(f"outputs/bench-{args.mode}.json")
    pictures = output.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    extra = bench.costs(config, args.device)  # before the workers: alone on the machine
    workers = args.workers if args.device == "cpu" else 1
    run_batch = partial(bench.run_batch, config, args.device, pictures)
    found = measure(run_batch, scenes, args.seeds or bench.SEEDS, bench.BATCH, workers)
    values = {arm: {name: v.tolist() for name, v in columns.items()} for arm, columns in found.items()}
    record = {
        "config": config.to_dict(),
        "prompts": [world.caption(s) for s in scenes],
        "values": values,
        "costs": extra,
    }
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    contact_sheet(pictures, scenes, bench.SHEET_COLUMNS).save(output.with_suffix(".png"), optimize=True)
    print(table(found, bench.COLUMNS, bench.PLAIN, extra))


if __name__ == "__main__":
    main()
