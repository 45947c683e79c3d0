"""A process that runs the app on published ids, from the hub of its environment: prints one line of JSON per run.

python -m tests.hub_runs OUTPUT_FOLDER "{RunConfig fields}" ...

Beside the fields: "stranger" runs on behalf of one, "checker" downloads the safety checker before, "filter" is what
PSD_CONTENT_FILTER says from then on.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from psd import RunConfig, content, generate, record
from psd.errors import Withheld
from psd.events import Downloading, Finished, Preview, Started
from psd.models.checker import CHECKER
from psd.models.hub import OWNER, STRANGER, download
from psd.models.needs import missing_models
from tests.published import shrink

shrink()
for settings in map(json.loads, sys.argv[2:]):
    access = STRANGER if settings.pop("stranger", False) else OWNER
    for _ in download(CHECKER) if settings.pop("checker", False) else ():
        pass
    os.environ[content.SWITCH] = settings.pop("filter", "")
    config = RunConfig(**settings)
    missing = list(missing_models(config))
    events, answer = [], {"missing": missing}
    try:
        for event in generate(config, Path(sys.argv[1]), access=access):
            events.append(event)
    except Withheld as error:
        (directory,) = (event.directory for event in events if isinstance(event, Started))
        answer |= {"withheld": str(error), "previews": sum(isinstance(event, Preview) for event in events)}
        answer |= {
            "files": sorted(path.name for path in directory.iterdir()),
            "stopped": record.read(directory).stopped,
        }
        print(json.dumps(answer), flush=True)
        continue
    last = events[-1]
    assert isinstance(last, Finished), last
    told = [event.name for event in events if isinstance(event, Downloading)]
    kinds = [type(event).__name__ for event in events]
    answer |= {"told": list(dict.fromkeys(told)), "first_after": kinds[len(told)]}
    answer["warnings"] = next(event.warnings for event in events if isinstance(event, Started))
    answer["scores"] = {name: arm.scores for name, arm in last.arms.items()}
    answer["files"] = {path.name: str(path) for path in record.read(last.directory).files}
    answer["preview_px"] = [event.image.shape[0] for event in events if isinstance(event, Preview)][-1]
    print(json.dumps(answer), flush=True)
