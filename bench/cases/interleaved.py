"""MM-Interleaved as a whole: tokens after prompts with several pictures, a picture, and a round of both.

The published size has random weights and runs on a GPU; a tiny size shows on a CPU that every case works. `reference`
are the original's steps: the pictures are projected again for every token and in every step of a drawing, and each
round runs the whole sequence again. Times are by the host's clock.
"""

import copy
import functools
from collections.abc import Callable

import torch
from transformers import LogitsProcessorList

from mg_fast import use_backend

from ..registry import Call, Case, NotHere, Provider
from .exact_logits import WidenedPart
from .forced_answer import COMPARED, now
from .interleaved_sessions import QUESTION, ROUND_PICTURES, InterleavedSession, InterleavedSize, here, release, session

SIZES = (
    InterleavedSize("13b", "bfloat16", 30, ("cuda",)),
    InterleavedSize("tiny", "float32", 2, ()),
)
PICTURES = (1, 4, 8)
GREEDY = {"do_sample": False, "num_beams": 1}

# Makes the timed call of a session, with or without CUDA graphs.
Build = Callable[[InterleavedSession], Call]


def cases() -> list[Case]:
    return [case for size in SIZES for case in cases_of(size)]


def cases_of(size: InterleavedSize) -> list[Case]:
    def case(name: str, providers: dict[str, Provider], exact: Callable[[InterleavedSession], torch.Tensor], **options):
        return Case(
            f"interleaved/{size.size}-{name}-{size.dtype}",
            lambda device: session(size, device),
            providers,
            lambda shared: None if shared is None else exact(shared),
            devices=size.devices,
            clocked=True,
            release=release,
            **options,
        )

    found = []
    for pictures in PICTURES:
        decode = _providers(functools.partial(_text, pictures, True), compiled=True)
        exact = functools.partial(_exact_logits, pictures, COMPARED)
        found.append(case(f"decode-n{pictures}-b1", decode, exact, tokens=1))
    for pictures in PICTURES:
        prefill = _providers(functools.partial(_text, pictures, False))
        found.append(case(f"prefill-n{pictures}-b1", prefill, functools.partial(_exact_logits, pictures, 1)))
    found.append(case("picture-b1", _providers(_picture), _exact_picture))
    found.append(case("round-b1", _providers(_round), functools.partial(_exact_logits, ROUND_PICTURES, COMPARED)))
    return found


def _providers(take: Callable[..., Call], *, compiled: bool = False) -> dict[str, Provider]:
    """The providers of a measure, which makes the call of a session and a form."""

    def by(form: str, **options) -> Build:
        return lambda shared: take(here(shared), form, **options)

    providers = {
        "reference": Provider(by("reference")),
        "auto": Provider(by("auto"), own_graphs=True, without_graphs=by("auto", graphs=False)),
    }
    if compiled:

        def by_compiled(shared: InterleavedSession | None) -> Call:
            if here(shared).device == "cpu":
                raise NotHere("a decode step is compiled on GPUs only")
            return take(shared, "auto", compiled=True)

        providers["auto, compiled"] = Provider(by_compiled, own_graphs=True)
    return providers


def _text(
    pictures: int, decodes: bool, shared: InterleavedSession, form: str, *, graphs: bool = True, compiled: bool = False
) -> Call:
    """The first token after a prompt whose pictures are seen already, or one more token of its answer."""
    inputs, tokens = shared.prompt(pictures), len(shared.answer) if decodes else 1
    loop = {"max_new_tokens": tokens, **GREEDY}

    def call() -> tuple[torch.Tensor, list[float]]:
        forced, began = shared.forced(tokens), now(shared.device)
        how = {**loop, "logits_processor": LogitsProcessorList([forced])}
        if form != "reference":
            how["custom_generate"] = shared.decoder(graphs=graphs, compiled=compiled).request()
        with use_backend(form), torch.inference_mode():
            shared.model.generate(**inputs, **how)
        first, last = forced.times[0], forced.times[-1]
        took = (last - first) / (tokens - 1) if decodes else first - began
        return torch.stack(forced.logits), [1e3 * took]

    return call


def _picture(shared: InterleavedSession, form: str, *, graphs: bool = True) -> Call:
    """A picture that follows another one, from the U-Net's condition on."""
    drawer = shared.drawer(packed=form != "reference", graphs=graphs and form != "reference")
    condition, maps, options = _drawn_from(shared)

    def call() -> tuple[torch.Tensor, list[float]]:
        began = now(shared.device)
        with torch.inference_mode():
            drawn = drawer(condition, maps, None, options, backend=form)
        return drawn, [1e3 * (now(shared.device) - began)]

    return call


def _drawn_from(shared: InterleavedSession) -> tuple:
    """The condition, the maps of the picture before, and options without noise, so that all dtypes draw alike."""
    from diffusers import DDIMScheduler

    from mg_fast.models.mm_interleaved.drawing_options import DrawingOptions

    decoder, generator = shared.model.image_decoder, torch.Generator().manual_seed(0)
    condition = torch.randn(1, *decoder.neg_prompt_embeds.shape[1:], generator=generator)
    latents = torch.randn(decoder.latents_shape(1), generator=generator)
    options = DrawingOptions(num_inference_steps=shared.size.steps, latents=latents, scheduler=DDIMScheduler)
    maps = shared.prompt(1)["image_maps"][None]
    return condition.to(shared.device, shared.model.dtype), maps, options


def _round(shared: InterleavedSession, form: str, *, graphs: bool = True) -> Call:
    """A text and a picture after a sequence with pictures that was read before; the text's logits are compared."""
    pipeline, tokens = shared.pipeline(form, graphs=graphs), len(shared.answer)
    photos = shared.photos[:ROUND_PICTURES]

    def call() -> tuple[torch.Tensor, list[float]]:
        # Otherwise the round of the call before would be found in the cache.
        pipeline.answers.forget_prompts()
        items = [*photos, QUESTION]
        if form != "reference":
            # What the sequence held before this round is kept.
            pipeline.chat(items, max_new_tokens=1, min_new_tokens=1)
        conversation, forced, began = pipeline.conversation(), shared.forced(tokens), now(shared.device)
        conversation.chat(items, max_new_tokens=tokens, logits_processor=LogitsProcessorList([forced]))
        if form == "reference":
            for photo in photos:
                pipeline.vision.see(photo)
        conversation.draw(num_inference_steps=shared.size.steps)
        return torch.stack(forced.logits), [1e3 * (now(shared.device) - began)]

    return call


def _wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the exact results: float64, or float32 for 16 bits."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def _exact_logits(pictures: int, count: int, shared: InterleavedSession) -> torch.Tensor:
    """Logits [count, vocabulary] of the first tokens after a prompt, by the original's steps in a wider dtype.

    The language model is widened layer by layer, so that the largest one leaves enough memory for it.
    """
    model, dtype, prompt = shared.model, _wider(shared.model.dtype), shared.prompt(pictures)
    language = model.mm_decoder
    parts = [*language.layers, language.norm]
    shared_parts = {id(language.embed_tokens): language.embed_tokens}
    wide = copy.deepcopy(language, {id(part): WidenedPart(part, dtype) for part in parts} | shared_parts)
    given = torch.tensor([shared.answer[: count - 1]], dtype=torch.long, device=shared.device)
    ids = torch.cat([prompt["input_ids"], given], dim=1)
    with torch.no_grad(), use_backend("reference"):
        maps = prompt["image_maps"].to(dtype)
        read = wide.picture_arguments(ids, prompt["num_image_per_seq"], maps)
        embedded = model.embed(ids, image_tokens=prompt["image_tokens"]).to(dtype)
        states = wide(inputs_embeds=embedded, use_cache=False, **read).last_hidden_state
        return WidenedPart(model.text_decoder, dtype)(states[0, -count:])


def _exact_picture(shared: InterleavedSession) -> torch.Tensor:
    """The picture by the original's steps in a wider dtype."""
    from mg_fast.models.mm_interleaved.picture_drawer import PictureDrawer

    condition, maps, options = _drawn_from(shared)
    wide = copy.deepcopy(shared.model.image_decoder).to(_wider(shared.model.dtype))
    return PictureDrawer(wide, packed=False, graphs=False)(condition, maps, None, options, backend="reference")
