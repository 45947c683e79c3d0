"""A process that downloads from the hub of its environment: a line of JSON in is a source, a line out what came of it.

No torch: what fails or succeeds here does so in psd.models.hub alone.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from psd.errors import RequestError
from psd.models.hub import Source, download, fetched, is_cached

for line in sys.stdin:
    request = json.loads(line)
    source = Source(request["name"], request["revision"], tuple(request["files"]))
    answer: dict = {"before": is_cached(source), "told": [], "sentence": "", "folder": ""}
    try:
        for event in (events := download(source)):
            answer["told"].append(dataclasses.asdict(event))
            if request["stop"]:
                events.close()
                break
        else:
            answer["folder"] = fetched(source).path
    except RequestError as error:
        answer["sentence"] = str(error)
    answer["after"] = is_cached(source)
    print(json.dumps(answer), flush=True)
