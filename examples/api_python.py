"""Stream a run of the app and fetch everything it made.

    pip install gradio_client
    python api_python.py [http://127.0.0.1:7860] [steps]

Any parameter of /generate may be given by name.
"""

import sys
from pathlib import Path

from gradio_client import Client, handle_file

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7860"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 50
client = Client(url, verbose=False, httpx_kwargs={"timeout": 60})

job = client.submit(prompt="a red mushroom with a white stem", seed=7, steps=steps, api_name="/generate")
for preview, status, *_ in job:  # job.cancel() stops the run
    print(f"step {status['step']} of {status['steps']}, preview {preview}")

_, status, arms, files = job.result()
paths = {Path(file).name: file for file in files}
for name, arm in arms.items():  # with, without
    print(f"{name}: {arm['scores']}, {paths[arm['files']['picture']]}")
print("files:", files)

picture = paths[arms["with"]["files"]["picture"]]
rated = client.predict(handle_file(picture), "a red mushroom with a white stem", api_name="/scores")
print("rated again:", rated)

# Another prompt goes on from the first arm's picture; of an object from its field (mode="3d").
_, status, arms, files = client.predict(
    prompt="a blue mushroom with a white stem",
    start=f"{status['run']}/with",
    t_max=0.5,
    seed=7,
    steps=steps,
    api_name="/generate",
)
print("went on:", {name: arm["scores"] for name, arm in arms.items()})
