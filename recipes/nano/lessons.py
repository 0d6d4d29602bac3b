"""What every stage of the training is given: pages, scenes, or conversations, by its name."""

import functools

from mg_fast import MiniGeminiProcessor

from . import data
from .stages import FACTS, PAIRED, SHOWN_AGAIN, SHOWN_ANY, SHOWN_PAIRED, TALK, WISHES, TrainingStage
from .varied import draw_lines, draw_numbers


def batch(processor: MiniGeminiProcessor, stage: TrainingStage, step: int, *, seed: int, hr: bool) -> data.Batch:
    """The batch of a step of a stage, drawn from the stage's own seed."""
    told = functools.partial(data.told, processor, seed, step, stage.batch)
    facts = functools.partial(data.told, processor, -1 - seed, step, size=stage.batch, **FACTS)
    match stage.lesson:
        case "digits":
            return {"page": data.pages(draw_lines, seed, step, stage.batch)}
        case "numbers":
            pages = data.pages(draw_numbers, seed, step, stage.batch)
            return {"page": pages, "lines": data.pages(draw_lines, seed, step, stage.batch)}
        case "lookup" | "pairs" | "search":
            return told(**stage.told)
        case "language":
            # The language model forgets what bare answers taught when they stop, so some go on.
            return told(**stage.told) | {"facts": facts(described=0.3, pictures=PAIRED)}
        case "views":
            return data.scenes(seed, step, stage.batch)
        case "scenes":
            # Pages continue, so that the tower keeps its reading while it learns shapes.
            pages = {"page": data.pages(draw_numbers, seed, step, stage.batch // 2)} if hr else {}
            return data.scenes(seed, step, stage.batch) | pages
        case "alignment":
            # All facts about a picture take the role of the captions in the original.
            return told(**FACTS, shown=True, pictures=SHOWN_PAIRED)
        case "everything":
            beside = facts(shown=True, described=0.4, pictures=SHOWN_PAIRED)
            shown = SHOWN_AGAIN if stage.again else SHOWN_ANY
            return told(**TALK, shown=True, pictures=shown) | {"facts": beside}
        case "wishes":
            # What is said about pictures goes on beside them, or it would be forgotten.
            beside = facts(size=stage.batch // 2, shown=True, described=0.4, pictures=SHOWN_PAIRED)
            return told(**TALK, shown=True, pictures=WISHES) | {"facts": beside}
    raise ValueError(f"no stage {stage.name!r}")
