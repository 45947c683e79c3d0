"""The page. START at `build_demo`: create.py and tabs.py build what is seen, wiring.py says which event changes what.

Form values -> `form.checked` -> `watch.watch` -> show.py: one update of all outputs per View. Nothing is computed here.
"""

from __future__ import annotations

import gradio as gr

from psd.ui import api, examples, parts, theme
from psd.ui.create import build_create, html
from psd.ui.tabs import build_api, build_scores
from psd.ui.wiring import connect


def build_demo() -> gr.Blocks:
    """The whole app. Loads no model; app.py serves it."""
    gr.set_static_paths([examples.EXAMPLES])
    with gr.Blocks(title="Preference Score Distillation", delete_cache=(1800, 6 * 3600)) as demo:
        # The header brings page.js, which triggers its two events: a viewer was turned, see wiring.py.
        follow = "psd.follow(trigger, 'left_turned', 'right_turned')"
        header = html(parts.HEADER, head=theme.script(), js_on_load=follow)
        with gr.Tabs():
            with gr.Tab("Create", id="create"):
                page = build_create(examples.load_examples(), examples.load_prompts())
            with gr.Tab("Score an image", id="score"):
                build_scores()
            with gr.Tab("API", id="api"):
                build_api()
        api.bind()
        connect(demo, header, page)
    return demo
