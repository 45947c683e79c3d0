"""A process that runs the app on published ids, from the hub of its environment: prints one line of JSON per run.

python -m tests.hub_runs OUTPUT_FOLDER "{RunConfig fields}" ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from psd import RunConfig, generate, record
from psd.events import Downloading, Finished, Preview
from psd.models.needs import missing_models
from tests.published import shrink

shrink()
for settings in map(json.loads, sys.argv[2:]):
    config = RunConfig(**settings)
    missing = list(missing_models(config))
    events = list(generate(config, Path(sys.argv[1])))
    last = events[-1]
    assert isinstance(last, Finished), last
    told = [event.name for event in events if isinstance(event, Downloading)]
    kinds = [type(event).__name__ for event in events]
    answer = {"missing": missing, "told": list(dict.fromkeys(told)), "first_after": kinds[len(told)]}
    answer["scores"] = {name: arm.scores for name, arm in last.arms.items()}
    answer["files"] = {path.name: str(path) for path in record.read(last.directory).files}
    answer["preview_px"] = [event.image.shape[0] for event in events if isinstance(event, Preview)][-1]
    print(json.dumps(answer), flush=True)
