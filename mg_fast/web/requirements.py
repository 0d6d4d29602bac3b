"""The packages that the page needs beside those of mg_fast itself; this module imports none of them."""

import importlib.util

MISSING = "the web page needs gradio and prometheus-client, which are not installed here: pip install 'mg_fast[ui]'"
_NEEDED = ("gradio", "prometheus_client", "uvicorn", "h11")


def why_not() -> str | None:
    """The reason why the page cannot be shown here; None where it can."""
    return MISSING if any(importlib.util.find_spec(name) is None for name in _NEEDED) else None
