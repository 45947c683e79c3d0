"""Gradio entry of the Space and of `make run`: builds and serves the page, then loads and measures default models."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading

# Read when gradio loads.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
user = os.getuid() if hasattr(os, "getuid") else "app"
os.environ.setdefault("GRADIO_TEMP_DIR", os.path.join(tempfile.gettempdir(), f"preference-score-distillation-{user}"))

import spaces  # noqa: E402, F401  before torch: on ZeroGPU it patches it
from starlette.middleware import Middleware  # noqa: E402

import psd  # noqa: E402, F401  before torch: sets how its threads wait
from psd.record import reason_of  # noqa: E402
from psd.ui import build_demo  # noqa: E402
from psd.ui.gate import Gate  # noqa: E402
from psd.ui.theme import HEAD, STYLE, theme  # noqa: E402
from psd.ui.uploads import UploadLimit  # noqa: E402
from psd.ui.watch import ON_ZERO_GPU, abandon_all, feel_load, warm  # noqa: E402

try:
    demo = build_demo()
except OSError as error:  # gradio makes folders of its own in its cache
    cache = os.environ["GRADIO_TEMP_DIR"]
    sys.exit(f"error: The cache {cache} cannot be written: {reason_of(error)}; set GRADIO_TEMP_DIR to another folder.")
demo.queue(default_concurrency_limit=1, max_size=16, api_open=False)


def launch(**options) -> tuple:
    """Serve the page with the app's own safe settings; `options` are gradio's."""
    settings = dict(
        theme=theme, css_paths=STYLE, head=HEAD, ssr_mode=False, mcp_server=True, max_file_size="10mb",
        show_error=False, run_history=False, enable_monitoring=False, footer_links=["api", "gradio", "settings"],
        app_kwargs={"middleware": [Middleware(Gate), Middleware(UploadLimit)]},
    )  # fmt: skip
    return demo.launch(**{**settings, **options})


def get_ready() -> None:
    warm()
    feel_load()


def serve() -> int:
    """Until Ctrl-C or SIGTERM; runs that are going on then write their numbers. The status to exit with."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        # Loading beside the server keeps the page quick to appear, and the first Run quick to start.
        launch(prevent_thread_lock=True)
        threading.Thread(target=get_ready, daemon=True).start()
        demo.block_thread()
    except SystemExit as end:
        abandon_all()
        return end.code
    abandon_all()
    return 0


if __name__ == "__main__":
    if ON_ZERO_GPU:  # the GPU workers are forks of this process: what is loaded before, they all have
        warm()
        launch()
    else:
        status = serve()
        os._exit(status)  # a thread that still computes would abort in an interpreter that takes itself apart
