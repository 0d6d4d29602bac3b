"""The look of the page beyond the theme of its library."""

from .examples import EXAMPLES

_STYLE = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; padding: 0 !important; }
.gradio-container > .main { padding: 1rem !important; }
.gradio-container main { padding: 0 !important; }
.mg-head h1 { font-size: 1.5rem; margin: 0; }
.mg-head p { margin: 0.15rem 0 0; opacity: 0.8; }
.mg-chat .message, .mg-chat .message p { overflow-wrap: anywhere; }
.mg-chat img { max-height: 13rem; width: auto; }
.mg-chat small { opacity: 0.8; }
.mg-chat [aria-label="Share"], .mg-chat [title="Share"] { display: none; }
.mg-chat .placeholder-content { padding: 1rem; text-align: center; }
.mg-hint { opacity: 0.8; margin: 0; }
.mg-switches { align-items: center; }
.mg-switches .form { display: flex; flex-direction: row; flex-wrap: wrap; gap: 1rem; border: 0; box-shadow: none; }
.mg-switches .form > * { flex: 0 1 auto; min-width: 0 !important; width: auto; border: 0; padding: 0; }
.mg-switches .form, .mg-switches .form > * { background: none; }
.mg-buttons button { min-width: 0; flex: 1 1 4rem; }
.mg-examples button { min-width: 0; flex: 1 1 40%; min-height: 3.75rem; text-align: left; justify-content: start; }
.mg-bars { display: grid; gap: 0.35rem; }
.mg-row { display: flex; align-items: center; gap: 0.5rem; }
.mg-name { flex: 0 0 5.5rem; }
.mg-bar { height: 0.8rem; min-width: 2px; border-radius: 3px; background: var(--color-accent); }
.mg-value { opacity: 0.8; font-size: 0.85rem; white-space: nowrap; }
.mg-look { display: grid; margin: 0; }
.mg-look img { grid-area: 1 / 1; width: 100%; height: auto; border-radius: 6px; }
.mg-look figcaption { grid-area: 2 / 1; font-size: 0.85rem; padding-top: 0.4rem; opacity: 0.85; }
@media (max-width: 640px) {
  .gradio-container > .main { padding: 0.6rem !important; }
  .mg-name { flex-basis: 4.5rem; }
  .mg-chat:not(:has(.message)) { height: 24vh !important; min-height: 0 !important; }
}
"""


def style() -> str:
    """The style sheet of the page, with the pictures of the examples on their buttons."""
    pictures = (
        f"#mg-example-{i} {{ padding-left: 4.25rem; background-image: url({example.scene.thumbnail()}); "
        "background-repeat: no-repeat; background-size: auto 100%; }\n"
        for i, example in enumerate(EXAMPLES)
        if example.scene is not None
    )
    return _STYLE + "".join(pictures)
