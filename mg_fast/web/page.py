"""The page itself, made with gradio: what it shows, and what happens when it is used."""

from html import escape

import gradio as gr

from .endpoints import Endpoints
from .events import PageEvents
from .examples import EXAMPLES
from .shown import look_panel, stage_bars
from .site import Site
from .uploads import EXTENSIONS

# The strength of the heat map at first.
STRENGTH = 0.8
_PRIVATE = {"api_visibility": "private"}


def build_page(site: Site) -> gr.Blocks:
    """The page of a site, with its endpoints; it is served by `mg_fast.web.server`."""
    limits, events = site.options.limits, PageEvents(site)
    with gr.Blocks(title=site.options.title, analytics_enabled=False, fill_width=True, delete_cache=(60, 600)) as page:
        # These come first: the events of the page have names, too, and a name that is taken gets a number.
        endpoints = Endpoints(site)
        for endpoint in (endpoints.ask, endpoints.clear, endpoints.explain, endpoints.limits):
            gr.api(endpoint, api_name=endpoint.__name__, concurrency_limit=None)
        gr.HTML(_head(site), elem_classes="mg-head")
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                chat = gr.Chatbot(
                    label="Conversation",
                    show_label=False,
                    height="52vh",
                    placeholder="Ask about a picture, or begin with one of the examples below.",
                    render_markdown=False,
                    sanitize_html=True,
                    latex_delimiters=[],
                    allow_tags=False,
                    buttons=[],
                    elem_classes="mg-chat",
                    elem_id="mg-chat",
                )
                box = gr.MultimodalTextbox(
                    label="Question",
                    show_label=False,
                    placeholder="Ask something. Add pictures by the clip, by pasting, or by dragging them here.",
                    file_types=EXTENSIONS,
                    file_count="multiple",
                    sources=["upload"],
                    # A longer text that is pasted would become a file.
                    max_plain_text_length=limits.characters,
                    lines=1,
                    max_lines=8,
                    autofocus=True,
                    elem_id="mg-box",
                )
                note = gr.HTML(
                    '<p class="mg-hint">You edit your last question: what you send now takes its place.</p>',
                    visible=False,
                    elem_id="mg-note",
                )
                with gr.Row(elem_classes="mg-switches"):
                    draw = gr.Checkbox(
                        label="Draw a picture", visible=site.can_draw, elem_id="mg-draw", container=False
                    )
                    ocr = gr.Checkbox(label="Read printed text first (OCR)", visible=site.can_read, container=False)
                with gr.Row(elem_classes="mg-buttons"):
                    stop = gr.Button("Stop", size="sm", interactive=False, elem_id="mg-stop")
                    regenerate = gr.Button("Regenerate", size="sm", elem_id="mg-regenerate")
                    edit = gr.Button("Edit last", size="sm", elem_id="mg-edit")
                    clear = gr.Button("Clear", size="sm", elem_id="mg-clear")
                gr.HTML('<p class="mg-hint">Examples</p>')
                with gr.Row(elem_classes="mg-examples"):
                    examples = [
                        gr.Button(example.text, size="sm", elem_id=f"mg-example-{i}")
                        for i, example in enumerate(EXAMPLES)
                        if site.can_draw or not example.draw
                    ]
            with gr.Column(scale=3, min_width=300):
                with gr.Accordion("What it looked at", open=True):
                    choice = gr.Radio(choices=[], label="Picture", elem_id="mg-choice", visible=False)
                    with gr.Row(elem_classes="mg-switches"):
                        look = gr.Button("Show", size="sm", elem_id="mg-look")
                        windows = gr.Checkbox(label="Windows", elem_id="mg-windows", container=False)
                    strength = gr.Slider(0, 1, value=STRENGTH, step=0.05, label="Strength", elem_id="mg-strength")
                    panel = gr.HTML(look_panel(None, STRENGTH, False), elem_id="mg-panel")
                with gr.Accordion("Stages of the last answer", open=True):
                    bars = gr.HTML(stage_bars(()), elem_id="mg-bars")
                    measure = gr.Checkbox(label="Measure the stages", value=True, container=False)
                with gr.Accordion("Settings", open=False):
                    temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: the likeliest words)")
                    top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p (with a temperature)")
                    tokens = gr.Slider(1, limits.tokens, value=min(256, limits.tokens), step=1, label="Most tokens")
                    seed = gr.Textbox(label="Seed (empty: random)", value="", max_lines=1)
                with gr.Accordion("Camera", open=False):
                    camera = gr.Image(sources=["webcam"], label="Camera", show_label=False, elem_id="mg-camera")
                with gr.Accordion("Picture by its address", open=False, visible=site.options.allow_urls):
                    url = gr.Textbox(label="Address", show_label=False, placeholder="https://")
                    fetch = gr.Button("Add", size="sm")
        gr.HTML(f'<p class="mg-hint">{_rules(site)}</p>')
        settings = [draw, ocr, measure, temperature, top_p, tokens, seed]
        shown = [chat, box, bars, choice, panel, stop, edit, note]
        # Everything goes through the queue, because the routes around it are closed; the line of the site, not the
        # queue of the library, decides who waits. Its own signs of progress would cover the conversation.
        quiet = {"show_progress": "hidden", "concurrency_limit": None, **_PRIVATE}
        box.submit(events.ask, [box, *settings], shown, **quiet)
        regenerate.click(events.regenerate, settings, shown, **quiet)
        edit.click(events.edit, None, shown, **quiet)
        clear.click(events.clear, None, shown, **quiet)
        # The conversation's own bin would clear what is seen, and not what the model remembers.
        chat.clear(events.clear, None, shown, **quiet)
        stop.click(events.stop, None, None, **quiet)
        for i, button in enumerate(examples):
            button.click(events.example(i), None, [box, draw], **quiet)
        # gradio would open the picture's file, which is not there: pictures are in memory.
        camera.input(events.add_photo, [box, camera], [box, camera], preprocess=False, **quiet)
        fetch.click(events.add_by_address, [box, url], [box, url], **quiet)
        look.click(events.look, [choice, strength, windows], shown, **quiet)
        strength.release(events.relook, [strength, windows], [panel], **quiet)
        windows.input(events.relook, [strength, windows], [panel], **quiet)
        # This makes pages and clients keep a connection open, by which the gate sees that they are there.
        page.unload(_nothing)
    page.max_threads = limits.sessions + limits.queue + 32
    page.state_session_capacity = limits.sessions + 8
    page.queue(api_open=False, max_size=4 * limits.sessions, default_concurrency_limit=None)
    # An app that is mounted counts as not launched, and then files are not held against the private folder.
    page.has_launched = True
    return page


def _head(site: Site) -> str:
    told = "Ask about your pictures, and see what the model looked at. Nothing is kept when you leave."
    return f"<h1>{escape(site.options.title)}</h1><p>{told}</p>"


def _rules(site: Site) -> str:
    limits = site.options.limits
    return (
        f"At most {limits.pictures} pictures of {limits.megabytes} MiB and {limits.megapixels} million pixels in a "
        f"question, {limits.turns} questions, {limits.characters:,} characters in each, {limits.tokens} tokens in an "
        f"answer. {limits.queue} questions may wait."
    )


def _nothing() -> None:
    """What is done when a page is left; the gate does the rest."""
