"""The report's page: one self-contained file of pictures, from what was measured, and from shapes where nothing was."""

import string
from html import escape
from pathlib import Path

from ..figures import NOT_YET, Records, condition, device_title, gpus
from .memory import memory
from .rooflines import rooflines
from .speedups import speedups
from .svg import quiet
from .waterfalls import waterfalls

TEMPLATE = Path(__file__).with_name("page.html")
# The fields of a document that differ from case to case, so that they are shown with each case.
OF_A_CASE = ("command", "load", "cases")


def page(found: Records) -> str:
    """The page's HTML."""
    pictures = {"speedups": speedups, "rooflines": rooflines, "memory": memory, "waterfalls": waterfalls}
    drawn = {name: draw(found) for name, draw in pictures.items()}
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(conditions=_conditions(found), **drawn)


def _conditions(found: Records) -> str:
    """A line for everything that was measured under the same conditions."""
    lines = []
    if "cpu" not in found:
        lines.append(f"<b>CPU</b>: {NOT_YET}; <code>python -m bench run --device cpu --save</code> measures it.")
    for device, cases in found.items():
        common = [{k: v for k, v in document.items() if k not in OF_A_CASE} for document in cases.values()]
        same = dict.fromkeys(condition(document | {"cases": []}) for document in common)
        lines += [f"<b>{escape(device_title(device))}</b>: {escape(line)}" for line in same]
    if not gpus(found):
        lines.append(f"<b>GPU</b>: {NOT_YET}; <code>python -m bench gpu --out DIR</code> measures one.")
    return "".join(map(quiet, lines))
