"""Prompt templates, rendered byte for byte as Mini-Gemini's checkpoints were trained.

One table (`TEMPLATES`) feeds both `render` and the Jinja chat templates of the processor, so that the two cannot drift
apart. The tokenizer adds beginning-of-sequence tokens; they are never part of a template, except the literal `<s>`
between Mixtral turns, which the original puts there.
"""

import dataclasses
from collections.abc import Sequence

from ..errors import PromptError, quoted
from ..runtime.arguments import check_text

IMAGE_TAG = "<image>"


@dataclasses.dataclass(frozen=True)
class Template:
    """How one model family writes a conversation. `{}` stands for the text.

    Attributes:
        system: the pattern around the system text; empty where the family has none.
        system_text: the system text that the checkpoints were trained with.
        user: the pattern around a user turn.
        assistant: the pattern around an answer, including its terminator.
        generation: what follows the last user turn when an answer is wanted.
        between: what stands before every user turn except the first.
        stops: the strings that end an answer.
    """

    system: str
    system_text: str
    user: str
    assistant: str
    generation: str
    between: str
    stops: tuple[str, ...]


TEMPLATES: dict[str, Template] = {
    "vicuna_v1": Template(
        system="{} ",
        system_text="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        user="USER: {} ",
        assistant="ASSISTANT: {}</s>",
        generation="ASSISTANT:",
        between="",
        stops=("</s>",),
    ),
    "gemma": Template(
        system="",
        system_text="",
        user="<start_of_turn>user\n{}<end_of_turn>\n",
        assistant="<start_of_turn>model\n{}<end_of_turn>\n<eos>",
        generation="<start_of_turn>model\n",
        between="",
        stops=("<eos>", "<end_of_turn>"),
    ),
    "mistral_instruct": Template(
        system="",
        system_text="",
        user="[INST] {} [/INST]",
        assistant=" {} </s>",
        generation="",
        between="<s>",
        stops=("</s>",),
    ),
    "chatml_direct": Template(
        system="<|im_start|>system\n{}<|im_end|>",
        system_text="Answer the questions.",
        user="<|im_start|>user\n{}<|im_end|>",
        assistant="<|im_start|>assistant\n{}<|im_end|>",
        generation="<|im_start|>assistant\n",
        between="",
        # The base model's own end token comes from the tokenizer, because Yi releases spell it differently.
        stops=("<|im_end|>",),
    ),
    "llama_3": Template(
        system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        system_text="You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language.",
        user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        # The role of the answer really is "system": the checkpoints were trained that way.
        assistant="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        generation="<|start_header_id|>system<|end_header_id|>\n\n",
        between="",
        stops=("<|eot_id|>", "<|end_of_text|>"),
    ),
}


def get_template(name: str) -> Template:
    """The template with this name. `PromptError` lists the known names."""
    if name not in TEMPLATES:
        raise PromptError(f"unknown template {quoted(name)}: expected one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def render(template: str, turns: Sequence[tuple[str, str | None]], *, system: str | None = None) -> str:
    """The prompt text of a conversation.

    Args:
        template: one of `TEMPLATES`.
        turns: (user, assistant) pairs in order. An assistant of None, allowed in the last pair only, asks for an
            answer. `<image>` stands for a picture in a user text, by convention `<image>\\n` before the question.
        system: replaces the family's system text, where the family has one.

    Returns:
        The text without a beginning-of-sequence token. With two or more pictures, every tag reads `Image k:<image>`.

    Raises:
        PromptError: the template is unknown, there are no turns, a user text is empty, a turn other than the last has
            no answer, or a system text came for a family without one.
    """
    style = get_template(template)
    if not turns:
        raise PromptError("a conversation needs at least one (user, assistant) turn, got none")
    if system is not None and not style.system:
        raise PromptError(f"template {template} has no system text, got {quoted(system)}")
    if system is not None:
        check_text(system, "the system text")
    text = style.system.replace("{}", style.system_text if system is None else system)
    for i, (user, assistant) in enumerate(turns):
        if not isinstance(user, str) or not user.strip():
            raise PromptError(f"turn {i + 1} of {len(turns)}: expected a user text, got {quoted(user)}")
        for part in (user, "" if assistant is None else assistant):
            check_text(part, f"turn {i + 1} of {len(turns)}")
        text += (style.between if i else "") + style.user.replace("{}", user)
        if assistant is not None:
            text += style.assistant.replace("{}", assistant)
        elif i == len(turns) - 1:
            text += style.generation
        else:
            raise PromptError(f"turn {i + 1} of {len(turns)} has no answer; only the last turn may be open")
    return _number_pictures(text)


def with_picture_tags(text: str, pictures: int) -> str:
    """The user text with one `<image>\\n` per picture before it, unless it places its own tags."""
    return text if IMAGE_TAG in text else f"{IMAGE_TAG}\n" * pictures + text


def without_picture_tags(text: str) -> str:
    """The text with every `<image>` broken up, so that it is no place of a picture."""
    return text.replace(IMAGE_TAG, "< image>")


def _number_pictures(prompt: str) -> str:
    pieces = prompt.split(IMAGE_TAG)
    if len(pieces) <= 2:
        return prompt
    return pieces[0] + "".join(f"Image {k}:{IMAGE_TAG}{piece}" for k, piece in enumerate(pieces[1:], 1))


def chat_template(template: str) -> str:
    """The template as a Jinja chat template for `apply_chat_template`.

    Message content is a string, or a list of {"type": "image"} and {"type": "text", "text": ...} items; pictures go
    before the text of their message, as in training.
    """
    style = get_template(template)

    def around(pattern: str, inner: str) -> str:
        before, after = pattern.split("{}")
        return f"{_jinja(before)} ~ {inner} ~ {_jinja(after)}"

    system = (
        f"{{%- set ns.text = {around(style.system, 'system')} %}}"
        if style.system
        else "{%- if custom_system %}"
        f"{{{{ raise_exception('template {template} has no system text') }}}}"
        "{%- endif %}"
    )
    return "".join(
        [
            "{%- set custom_system = messages[0]['role'] == 'system' %}",
            "{%- set turns = messages[1:] if custom_system else messages %}",
            "{%- set ns = namespace(text='', content='', body='') %}",
            "{%- macro flat(content) %}{%- if content is string %}{{ content }}{%- else %}",
            "{%- for part in content %}{%- if part['type'] == 'image' %}{{ '<image>\\n' }}{%- endif %}{%- endfor %}",
            "{%- for part in content %}{%- if part['type'] == 'text' %}{{ part['text'] }}{%- endif %}{%- endfor %}",
            "{%- endif %}{%- endmacro %}",
            "{%- set system = flat(messages[0]['content']) if custom_system else " + _jinja(style.system_text) + " %}",
            system,
            "{%- for message in turns %}",
            "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}",
            "{{ raise_exception('roles must alternate user, assistant, user, ... after an optional system message') }}",
            "{%- endif %}",
            "{%- set ns.content = flat(message['content']) %}",
            "{%- if message['role'] == 'user' %}",
            "{%- if not ns.content | trim %}{{ raise_exception('a user message is empty') }}{%- endif %}",
            f"{{%- set ns.body = {around(style.user, 'ns.content')} %}}",
            f"{{%- set ns.text = ns.text ~ ({_jinja(style.between)} if loop.index0 else '') ~ ns.body %}}",
            "{%- else %}",
            f"{{%- set ns.body = {around(style.assistant, 'ns.content')} %}}",
            "{%- set ns.text = ns.text ~ ns.body %}",
            "{%- endif %}{%- endfor %}",
            "{%- if add_generation_prompt %}",
            f"{{%- set ns.text = ns.text ~ {_jinja(style.generation)} %}}",
            "{%- endif %}",
            "{%- set pieces = ns.text.split('<image>') %}",
            "{%- if pieces | length > 2 %}{{ pieces[0] }}{%- for piece in pieces[1:] %}",
            "{{ 'Image ' ~ loop.index ~ ':<image>' ~ piece }}{%- endfor %}",
            "{%- else %}{{ ns.text }}{%- endif %}",
        ]
    )


def _jinja(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def detect_template(text_model_type: str, tokenizer) -> tuple[str, bool]:
    """Finds the template that a checkpoint was trained with, from the text model's class and then from the tokenizer.

    Args:
        text_model_type: `gemma`, `mixtral`, `mistral` or `llama`.
        tokenizer: a tokenizer of transformers.

    Returns:
        (template name, certain). `certain` is False where a Llama-type checkpoint shows no mark of its family.
    """
    if text_model_type == "gemma":
        return "gemma", True
    if text_model_type in ("mixtral", "mistral"):
        return "mistral_instruct", True
    if single_token_ids(tokenizer, ("<|start_header_id|>", "<|eot_id|>"))[1] == []:
        return "llama_3", True
    if single_token_ids(tokenizer, ("<|im_start|>", "<|im_end|>"))[1] == []:
        return "chatml_direct", True
    # Vicuna adds no token of its own. Its vocabulary of 32,000 tokens is its only mark.
    return "vicuna_v1", len(tokenizer) == 32000


def single_token_ids(tokenizer, strings: Sequence[str]) -> tuple[list[int], list[str]]:
    """The ids of the strings that the tokenizer knows as one token each, and the strings that it does not know."""
    vocabulary = tokenizer.get_vocab()
    known = [vocabulary[s] for s in strings if s in vocabulary]
    return known, [s for s in strings if s not in vocabulary]


def stop_ids(template: str, tokenizer) -> list[int]:
    """The token ids that end an answer under this template.

    These are its stop strings, where the tokenizer has them as single tokens, and the tokenizer's own end-of-sequence
    token.
    """
    ids, _ = single_token_ids(tokenizer, get_template(template).stops)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return sorted(set(ids))
