"""The page's waterfalls: the stages up to the first token, as they were measured and by their floors."""

from collections.abc import Sequence
from html import escape

from ..costs.answer import ModelledAnswer
from ..costs.gpus import GPUS
from ..figures import NOT_YET, Records, device_title, duration, is_baseline, time_and_peak
from ..registry import group_of
from . import svg
from .svg import quiet

# The models whose floors are drawn, and the GPU.
MODELS = ("7b", "7b-hd")
GPU = GPUS["h200"]
# The last stage before the answer begins, under the meter's name.
FIRST_TOKEN = "prefill to first token"
# A stage's name, milliseconds, and peak in MiB where it is known.
TimedStage = tuple[str, float, float | None]


def waterfalls(found: Records) -> str:
    """A waterfall for every provider whose stages were measured, and one for each model of MODELS."""
    parts = []
    for device, cases in found.items():
        for name, document in cases.items():
            if group_of(name) in ("picture", "end-to-end"):
                rows = [row for row in document["cases"] if row.get("stages") and row["ok"] is not False]
                stages = [_to_first_token(row["stages"]) for row in rows]
                longest = max((sum(ms for _, ms, _ in each) for each in stages), default=0)
                for row, each in zip(rows, stages):
                    title = f"{name} {row['provider']}, {device_title(device)}"
                    kind = "b-plain" if is_baseline(row) else "b-ours"
                    parts.append(_waterfall(title, "measured", kind, each, longest))
    if not parts:
        floors = "below are floors, which no program goes under."
        parts.append(f'<p class="empty">Stages are {NOT_YET}; {floors}</p>')
    for model in MODELS:
        answer = ModelledAnswer(model)
        stages = [(stage.name, stage.floor_ms(GPU.ceilings, answer.dtype), None) for stage in answer.stages]
        title = f"{model} in bfloat16, {answer.prompt_tokens} tokens of prompt, {GPU.name}"
        longest = answer.first_token_ms(GPU.ceilings)
        parts.append(_waterfall(title, "floor from shapes, not measured", "b-third", stages, longest))
    note = "Stages follow one another from left to right. Bars that were measured together share a scale. "
    note += "Cases of the group picture end with the image tokens, before the language model."
    return quiet(note) + "".join(parts)


def _to_first_token(stages: Sequence[dict]) -> list[TimedStage]:
    names = [stage["name"] for stage in stages]
    end = names.index(FIRST_TOKEN) + 1 if FIRST_TOKEN in names else len(names)
    return [(stage["name"], stage["ms"], stage.get("peak_mib")) for stage in stages[:end]]


def _waterfall(title: str, tag: str, kind: str, stages: Sequence[TimedStage], longest: float) -> str:
    longest = longest or 1.0
    lines, begun = [f'<h4>{escape(title)} <span class="tag">{escape(tag)}</span></h4>'], 0.0
    grid = "".join(svg.line("grid", at, 0, at, 100) for at in (0, 25, 50, 75, 100))
    for name, ms, peak in stages:
        bar = svg.bar(kind, 100 * begun / longest, 100 * ms / longest, 15)
        told = time_and_peak(ms, peak)
        begun += ms
        picture = f'<svg role="img"><title>{escape(name)}: {told}</title>{grid}{bar}</svg>'
        lines.append(svg.row(escape(name), picture, told))
    lines.append(svg.row("<b>together</b>", "<span></span>", f"<b>{duration(begun)}</b>"))
    return "\n".join(lines)
