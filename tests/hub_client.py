"""A process that downloads from the hub of its environment: a line of JSON in is a source, a line out what came of it.

A source without files is a typed prior, fetched as a run does it.

No torch: what fails or succeeds here does so in psd.models.hub alone.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from psd.config import RunConfig
from psd.errors import RequestError
from psd.models.hub import OWNER, STRANGER, Source, download, is_cached, on_disk
from psd.models.needs import fetch_models
from psd.models.priors.table import prior_info

for line in sys.stdin:
    request = json.loads(line)
    access = STRANGER if request["stranger"] else OWNER
    if request["files"]:
        source = Source(request["name"], request["revision"], tuple(request["files"]))
        events = download(source, access)
    else:
        source = prior_info(request["name"]).source
        events = fetch_models(RunConfig(prompt="a lamp", prior=request["name"]), True, access)
    answer: dict = {"before": is_cached(source), "told": [], "sentence": "", "folder": ""}
    try:
        for event in events:
            answer["told"].append(dataclasses.asdict(event))
            if request["stop"]:
                events.close()
                break
        else:
            answer["folder"] = on_disk(source).path
    except RequestError as error:
        answer["sentence"] = str(error)
    answer["after"] = is_cached(source)
    print(json.dumps(answer), flush=True)
