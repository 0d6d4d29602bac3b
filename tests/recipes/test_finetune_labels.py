"""The label of every token, by template, against lists that were written by hand."""

import functools
from types import SimpleNamespace

import pytest

from mg_fast.models.mini_gemini.processing import MiniGeminiProcessor
from mg_fast.models.templates import render
from recipes.finetune.labels import encode_turns, segments, training_template
from recipes.finetune.samples import BadSample
from tests.families import family
from tests.paths import original_golden

# Two rounds. The second answer begins with a character that the tokenizers spell in bytes.
TURNS = (("<image>\nWhat is it?", "A cat."), ("And?", "日 no."))
CAPTION = (("<image>", "A cat."),)

# The tokens of each template in order, as the tokenizers of the original's tiny checkpoints cut them. `+` stands before
# a token that is learned; IMG is a picture of two places.
VICUNA = """
    <s> ▁A ▁c hat ▁be tw een ▁a ▁c ur io us ▁user ▁and ▁an ▁a rt if ic ial ▁i nt ell ig ence ▁assistant . ▁T he
    ▁assistant ▁g ive s ▁ he lp ful , ▁detai led , ▁and ▁pol ite ▁an s wer s ▁t o ▁the ▁user ' s ▁questions .
    ▁US ER : ▁ IMG ▁ <0x0A> <0x57> hat ▁i s ▁i t ? ▁A SSI ST ANT :
    +▁A +▁c +at +. +</s>
    US ER : ▁A n d ? ▁A SSI ST ANT :
    +▁ +<0xE6> +<0x97> +<0xA5> +▁n +o +. +</s>"""
GEMMA = """
    <bos> <start_of_turn> us er <0x0A> IMG <0x0A> <0x57> hat ▁i s ▁i t ? <end_of_turn> <0x0A>
    <start_of_turn> m o del <0x0A> +A +▁c +at +. +<end_of_turn> +<0x0A> +<eos>
    <start_of_turn> us er <0x0A> A n d ? <end_of_turn> <0x0A>
    <start_of_turn> m o del <0x0A> +<0xE6> +<0x97> +<0xA5> +▁n +o +. +<end_of_turn> +<0x0A> +<eos>"""
MIXTRAL = """
    <s> ▁[ INST ] ▁ IMG ▁ <0x0A> <0x57> hat ▁i s ▁i t ? ▁[/ INST ] +▁A +▁c +at +. +▁ +</s>
    <s> [ INST ] ▁A n d ? ▁[/ INST ] +▁ +<0xE6> +<0x97> +<0xA5> +▁n +o +. +▁ +</s>"""
# This tokenizer does not know ChatML's marks, so they come in pieces.
START = "< <0x7C> i m <0x5F> st ar t <0x7C> >"
END = "< <0x7C> i m <0x5F> en d <0x7C> >"
LEARNED_END = " ".join(f"+{token}" for token in END.split())
YI = f"""
    <s> ▁{START} s yst em <0x0A> A ns wer ▁the ▁questions . {END}
    {START} us er <0x0A> IMG ▁ <0x0A> <0x57> hat ▁i s ▁i t ? {END}
    {START} a ssist ant <0x0A> +A +▁c +at +. {LEARNED_END}
    {START} us er <0x0A> A n d ? {END}
    {START} a ssist ant <0x0A> +<0xE6> +<0x97> +<0xA5> +▁n +o +. {LEARNED_END}"""
LLAMA_3 = """
    <|begin_of_text|> <|start_header_id|> s yst em <|end_header_id|> Ċ Ċ
    Y o u Ġa re Ġa Ġhe lp fu l Ġ l a n g u ag e Ġand Ġ v is io n Ġassistant . Ġ Y o u Ġa re Ġa b le Ġto
    Ġ u n d er st a n d Ġthe Ġ v is u al Ġc o nt en t Ġt hat Ġthe Ġuser Ġp r o v i de s , Ġand Ġass ist Ġthe Ġuser
    Ġ w it h Ġa Ġ v ar i e t y Ġof Ġt as k s Ġus i n g Ġn at ur al Ġ l a n g u ag e . <|eot_id|>
    <|start_header_id|> us er <|end_header_id|> Ċ Ċ IMG Ċ W hat Ġis Ġi t ? <|eot_id|>
    <|start_header_id|> s yst em <|end_header_id|> Ċ Ċ +A +Ġc +at +. +<|eot_id|>
    <|start_header_id|> us er <|end_header_id|> Ċ Ċ A n d ? <|eot_id|>
    <|start_header_id|> s yst em <|end_header_id|> Ċ Ċ +æ +Ĺ +¥ +Ġn +o +. +<|eot_id|>"""
# Stage 1 of the families without a chat template of their own.
PLAIN = "<s> IMG +▁A +▁c +at +. +<0x0A>"
HAND_WRITTEN = {
    ("mgm-llama", "vicuna_v1"): VICUNA,
    ("mgm-gemma", "gemma"): GEMMA,
    ("mgm-mixtral", "mistral_instruct"): MIXTRAL,
    ("mgm-yi-hd", "chatml_direct"): YI,
    ("mgm-llama3", "llama_3"): LLAMA_3,
    ("mgm-llama", "plain"): PLAIN,
    ("mgm-mixtral", "plain"): PLAIN,
    ("mgm-yi-hd", "plain"): PLAIN,
}
OF_FAMILY = {name: template for name, template in HAND_WRITTEN if template != "plain"}


@functools.cache
def processor_of(name: str, template: str, places: int = 2) -> SimpleNamespace:
    """A family's tokenizer as a processor has it, for pictures of so many places."""
    if original_golden() is None:
        pytest.skip("the original's outputs are not here: set MG_FAST_GOLDEN to their folder")
    whole = MiniGeminiProcessor.from_pretrained(original_golden() / name, template=template)
    images = SimpleNamespace(tokens_per_picture=places)
    return SimpleNamespace(tokenizer=whole.tokenizer, filler_id=whole.filler_id, image_processor=images, whole=whole)


def shown(processor, sample) -> list[str]:
    """A row as the lists above write it."""
    found = []
    for token, label, mark in zip(sample.ids, sample.labels, sample.marks):
        if mark:
            assert (token, label) == (processor.filler_id, -100)
            found.append("IMG")
        else:
            assert label in (token, -100)
            found.append("+" * (label != -100) + processor.tokenizer.convert_ids_to_tokens(token))
    return " ".join(found).replace("IMG IMG", "IMG").split()


@pytest.mark.parametrize("name, template", HAND_WRITTEN)
def test_every_token(name, template):
    processor = processor_of(name, OF_FAMILY[name])
    sample = encode_turns(processor, template, CAPTION if template == "plain" else TURNS, longest=200)
    assert shown(processor, sample) == HAND_WRITTEN[name, template].split()


@pytest.mark.parametrize("name", OF_FAMILY)
def test_the_ids_are_those_of_the_rendered_conversation(name):
    """What is trained on is what an answer is later computed from, also with numbered pictures and odd blanks."""
    template = OF_FAMILY[name]
    processor = processor_of(name, template)
    turns = [("<image>\n<image>\n  Are they?\n", " Yes,\nboth. "), ("Why?", "日本")]
    sample = encode_turns(processor, template, turns, longest=400)
    assert (sample.ids, sample.marks) == processor.whole.encode(render(template, turns), places=2)
    # What is learned begins where generation begins.
    prompt, _ = processor.whole.encode(render(template, [turns[0], (turns[1][0], None)]), places=2)
    assert sample.ids[: len(prompt)] == prompt
    assert sample.labels[len(prompt) - 1] == -100 and sample.labels[len(prompt)] == sample.ids[len(prompt)]


@pytest.mark.parametrize("name, template", HAND_WRITTEN)
def test_a_tokenizer_without_offsets_gives_the_same(name, template):
    processor = processor_of(name, OF_FAMILY[name])

    class Slow:
        is_fast, bos_token_id = False, processor.tokenizer.bos_token_id

        def __call__(self, text):
            return processor.tokenizer(text)

    slow = SimpleNamespace(tokenizer=Slow(), filler_id=processor.filler_id, image_processor=processor.image_processor)
    turns = CAPTION if template == "plain" else TURNS
    assert encode_turns(slow, template, turns, longest=200) == encode_turns(processor, template, turns, longest=200)


def test_own_checkpoint():
    """The project's own tiny checkpoint, which is on every machine; the texts of its tokens say what is learned."""
    processor = family("standard").processor
    sample = encode_turns(processor, "vicuna_v1", TURNS, longest=400)
    assert (sample.ids, sample.marks) == processor.encode(render("vicuna_v1", TURNS))
    learned = [label for label in sample.labels if label != -100]
    assert [text.strip() for text in processor.tokenizer.decode(learned).split("</s>")] == ["A cat.", "日 no.", ""]
    assert "".join(part for part, wanted in segments("vicuna_v1", TURNS) if wanted) == " A cat.</s> 日 no.</s>"


def test_stage_1_has_the_originals_template():
    assert {name: training_template(1, name) for name in OF_FAMILY.values()} == {
        "vicuna_v1": "plain",
        "mistral_instruct": "plain",
        "chatml_direct": "plain",
        "gemma": "gemma",
        "llama_3": "llama_3",
    }
    assert all(training_template(2, name) == name for name in OF_FAMILY.values())


def test_too_long_a_sample_is_refused():
    processor = family("standard").processor
    length = len(encode_turns(processor, "vicuna_v1", TURNS, longest=400).ids)
    assert len(encode_turns(processor, "vicuna_v1", TURNS, longest=length).ids) == length
    with pytest.raises(BadSample, match=f"{length} tokens, those of pictures included, but max_length is {length - 1}"):
        encode_turns(processor, "vicuna_v1", TURNS, longest=length - 1)
