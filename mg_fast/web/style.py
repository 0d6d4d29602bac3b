"""The look of the page beyond the theme of its library."""

STYLE = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; padding: 0.75rem !important; }
.mg-head h1 { font-size: 1.5rem; margin: 0; }
.mg-head p { margin: 0.15rem 0 0; opacity: 0.75; }
.mg-chat .message, .mg-chat .message p { overflow-wrap: anywhere; }
.mg-chat img { max-height: 22rem; width: auto; }
.mg-chat small { opacity: 0.75; }
.mg-chat [aria-label="Share"], .mg-chat [title="Share"] { display: none; }
.mg-hint { opacity: 0.75; margin: 0.25rem 0; }
.mg-buttons button, .mg-examples button { min-width: 0; flex: 1 1 8rem; }
.mg-bars { display: grid; gap: 0.35rem; }
.mg-row { display: flex; align-items: center; gap: 0.5rem; }
.mg-name { flex: 0 0 5.5rem; }
.mg-bar { height: 0.8rem; min-width: 2px; border-radius: 3px; background: var(--color-accent); }
.mg-value { opacity: 0.75; font-size: 0.85rem; white-space: nowrap; }
.mg-look { display: grid; margin: 0; }
.mg-look img { grid-area: 1 / 1; width: 100%; height: auto; border-radius: 6px; }
.mg-look figcaption { grid-area: 2 / 1; font-size: 0.85rem; padding-top: 0.4rem; }
.mg-look figcaption { opacity: 0.85; }
@media (max-width: 640px) {
  .gradio-container { padding: 0.35rem !important; }
  .mg-name { flex-basis: 4.5rem; }
}
"""
