"""What is asked of the model that writes the data, and how its answers become dialogues in LLaVA's format."""

import json
from collections.abc import Mapping

from mg_fast.drawing.prompts import CLOSING, OPENING

from .sources import IN_CONTEXT, RECAPTION, Source

# A journal belongs to one wording of the questions. Whoever changes a text below raises this number.
VERSION = 1
# The marker at the end of a user's turn that asks Mini-Gemini for a prompt.
GEN = " <GEN>"
# The fields of the JSON object that is asked for.
FIELDS: Mapping[str, tuple[str, ...]] = {RECAPTION: ("wish", "prompt"), IN_CONTEXT: ("prompt",)}

_PROMPT_RULES = (
    'The "prompt" is for a text-to-image model: one line of English phrases with commas between them, first what is '
    "shown, then its details, the surroundings, the light and the style. It has at most 50 words. It names only what "
    'can be seen. It never says "image", "picture" or "photo of".'
)
_INSTRUCTIONS = {
    RECAPTION: (
        "I give you a detailed description of a picture. Write what somebody would type who wishes for such a picture, "
        "and a prompt that a text-to-image model would draw it from.\n"
        'The "wish" is one short sentence of at most 15 words. It names what matters most and leaves out the details.\n'
        f"{_PROMPT_RULES}\n"
        'Answer with one JSON object and nothing else: {"wish": "...", "prompt": "..."}'
    ),
    IN_CONTEXT: (
        "I give you a conversation. Think of one picture that would fit the last answer well, and write a prompt that "
        "a text-to-image model would draw it from.\n"
        f"{_PROMPT_RULES}\n"
        'Answer with one JSON object and nothing else: {"prompt": "..."}'
    ),
}
_EXAMPLES = {
    RECAPTION: (
        Source(
            RECAPTION,
            "example",
            caption="The image shows a small wooden boat tied to a jetty on a calm lake in the early morning. Mist "
            "lies over the water, pine trees stand on the far shore, and the sky is pale orange. Two oars lie in it.",
        ),
        {
            "wish": "I would like to see a little boat on a quiet lake at dawn.",
            "prompt": "small wooden rowing boat tied to a jetty, two oars inside, calm lake, morning mist over the "
            "water, dark pine trees on the far shore, pale orange sky, soft light, serene, photorealistic",
        },
    ),
    IN_CONTEXT: (
        Source(
            IN_CONTEXT,
            "example",
            turns=(
                (
                    "What should I plant on a balcony that gets little sun?",
                    "Ferns, hostas and ivy grow well in the shade. Put the ferns in hanging baskets, so that they get "
                    "what light there is.",
                ),
            ),
        ),
        {
            "prompt": "shady city balcony full of green plants, ferns in hanging baskets, broad hostas in clay pots, "
            "ivy along the railing, soft diffuse daylight, cosy, detailed photography"
        },
    ),
}


def messages(source: Source) -> list[dict[str, str]]:
    """The chat that asks for one dialogue: instructions with an example and its answer, then the source.

    There is no system message, because the chat templates of some models have no place for it.
    """
    example, answer = _EXAMPLES[source.kind]
    return [
        {"role": "user", "content": f"{_INSTRUCTIONS[source.kind]}\n\n{_shown(example)}"},
        {"role": "assistant", "content": json.dumps(answer, ensure_ascii=False)},
        {"role": "user", "content": _shown(source)},
    ]


def dialogue(source: Source, fields: Mapping[str, str], *, clip_tokens: int, most_tokens: int) -> dict:
    """One dialogue in LLaVA's format, without a picture.

    A re-caption is the wish, answered by the prompt alone. An in-context prompt follows the last answer of the
    conversation, whose question gets the marker. `clip_tokens` says how long the prompt is for CLIP, with its two end
    tokens, and `long` whether that is more than a text encoder reads at once.
    """
    prompt = f"{OPENING}{fields['prompt']}{CLOSING}"
    if source.kind == RECAPTION:
        turns = [(fields["wish"], prompt)]
    else:
        *earlier, (question, answer) = source.turns
        turns = [*earlier, (question, f"{answer}\n{prompt}")]
    last = len(turns) - 1
    conversations = []
    for i, (question, answer) in enumerate(turns):
        conversations.append({"from": "human", "value": question + GEN * (i == last)})
        conversations.append({"from": "gpt", "value": answer})
    return {
        "id": f"{source.kind}-{source.key}",
        "conversations": conversations,
        "kind": source.kind,
        "source": source.name,
        "clip_tokens": clip_tokens,
        "long": clip_tokens > most_tokens,
    }


def _shown(source: Source) -> str:
    if source.kind == RECAPTION:
        return f"Description:\n{source.caption}"
    said = "\n\n".join(f"User: {question}\n\nAssistant: {answer}" for question, answer in source.turns)
    return f"Conversation:\n{said}"
