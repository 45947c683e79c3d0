"""The tabs beside Create: scores of a picture, and how to call the API."""

from __future__ import annotations

import gradio as gr

from psd.ui import api, examples, parts
from psd.ui.create import html

RECIPES = (
    ("Python", "api_python.py", "python"),
    ("JavaScript", "api_javascript.mjs", "javascript"),
    ("curl", "api_curl.sh", "shell"),
)


def build_scores() -> None:
    """The tab of /scores."""
    gr.Markdown("Score any picture against a prompt with every reward that ships with the app. Higher is better.")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            image = api.picture(label="Picture", sources=["upload", "clipboard"], height=300, elem_id="score_image")
            prompt = gr.Textbox(label="What it should show", elem_id="score_prompt")
            score = gr.Button("Score", variant="primary", elem_id="score_run")
        with gr.Column(min_width=300):
            result = gr.JSON(label="Raw scores", elem_id="score_result")
    score.click(
        api.scores, [image, prompt], result, api_name="scores", concurrency_id="device", concurrency_limit=1,
    )  # fmt: skip


def build_api() -> None:
    """Recipes and the parameters of /generate."""
    gr.Markdown(
        "`/generate` streams previews and ends with everything; `/scores` rates an uploaded picture. Both are "
        "stateless, and both are MCP tools. The recipes below are run by the tests."
    )
    for title, name, language in RECIPES:
        with gr.Accordion(title, open=title == "Python"):
            gr.Code(examples.recipe(name), language=language, interactive=False, show_label=False, wrap_lines=True)
    gr.Markdown("### Parameters of /generate\nA parameter left out takes the value of `preset`.")
    html(parts.parameter_table())
