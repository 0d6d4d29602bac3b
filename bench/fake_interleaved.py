"""MM-Interleaved's published size on a GPU that need not be here: its steps as calls on fake tensors.

The original computes in float32, so its steps are counted in that dtype, and ours in bfloat16. Everything here is to be
made and called within FakeTensorMode.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import DynamicCache

from mg_fast import use_backend
from mg_fast.decoding.model_runner import ModelRunner
from mg_fast.models.mm_interleaved.configuration import MAP_SIDES, PICTURE_SIDE
from mg_fast.models.mm_interleaved.context import PlacedPicture
from mg_fast.models.mm_interleaved.drawing_options import DrawingOptions
from mg_fast.models.mm_interleaved.encoder import FeatureEncoder
from mg_fast.models.mm_interleaved.image_decoder import ImageDecoder
from mg_fast.models.mm_interleaved.modeling import MMInterleavedForConditionalGeneration
from mg_fast.models.mm_interleaved.packed import PackedInterleavedDecoding
from mg_fast.models.mm_interleaved.picture_drawer import PictureDrawer
from mg_fast.models.mm_interleaved.positions import sequence_positions
from mg_fast.models.mm_interleaved.unet_synchronizer import pixel_centres
from mg_fast.models.protocol import CACHE, PassInputs
from mg_fast.testing.random_interleaved import make_interleaved_config

from .counting import Count
from .fake_models import DTYPE, FakeCall, empty, on_gpu, weight_bytes

# Numbers of pictures in the context, and of its text tokens.
PICTURES, TEXT_TOKENS = (1, 4, 8), 64
# Pictures that the whole model sees.
WHOLE_PICTURES = 4
ORIGINAL_DTYPE = torch.float32
# Functions that make tables once.
TABLES = (pixel_centres, sequence_positions)
MODEL = "interleaved-13b"
# How the names of the cases begin.
GROUP = "interleaved/13b-"

Packed = TypeVar("Packed")


class FakeInterleaved:
    """The published size without values: in bfloat16 with its packed parts, and as the original runs it."""

    @functools.cached_property
    def model(self) -> MMInterleavedForConditionalGeneration:
        return _empty_model(DTYPE)

    @functools.cached_property
    def original(self) -> MMInterleavedForConditionalGeneration:
        model = _empty_model(ORIGINAL_DTYPE)
        model.set_attn_implementation({"text_config": "eager"})
        return model

    @functools.cached_property
    def language(self) -> tuple[int, PackedInterleavedDecoding]:
        """Bytes that the packed language model holds beside the weights, and the language model."""
        return _packed(PackedInterleavedDecoding, self.model)

    @functools.cached_property
    def encoder(self) -> tuple[int, FeatureEncoder]:
        """Bytes that the packed vision tower holds beside the weights, and what sees with it."""
        return _packed(functools.partial(FeatureEncoder, graphs=False), self.model.visual_tokenizer)

    @functools.cached_property
    def drawer(self) -> tuple[int, PictureDrawer]:
        """Bytes that the packed synchronizers of the U-Net hold beside the weights, and what draws with them."""
        return _packed(functools.partial(PictureDrawer, graphs=False), self.model.image_decoder)


def subjects() -> dict[str, Callable[[], FakeInterleaved]]:
    """What cases are about, by name."""
    return {MODEL: FakeInterleaved}


def cases() -> dict[str, tuple[str, Callable[[FakeInterleaved], dict[str, FakeCall]]]]:
    """By name the subject of a case, and what makes its providers."""
    found = {f"{GROUP}decode-n{n}-b1-bfloat16": functools.partial(_decode, n) for n in PICTURES}
    found |= {f"{GROUP}prefill-n{n}-b1-bfloat16": functools.partial(_prefill, n) for n in PICTURES}
    found[f"{GROUP}step-b1-bfloat16"] = _step
    found[f"{GROUP}whole-n{WHOLE_PICTURES}-b1-bfloat16"] = _whole
    return {name: (MODEL, make) for name, make in found.items()}


def _empty_model(dtype: torch.dtype) -> MMInterleavedForConditionalGeneration:
    with unset_fake_temporarily(), torch.device("meta"):
        model = MMInterleavedForConditionalGeneration(make_interleaved_config("13b")).eval().to(dtype)
    return on_gpu(model)


def _packed(pack: Callable[[torch.nn.Module], Packed], module: torch.nn.Module) -> tuple[int, Packed]:
    with torch.no_grad(), Count("cuda") as count:
        made = pack(module)
    return count.live, made


def _positions(model: MMInterleavedForConditionalGeneration, pictures: int) -> int:
    """Positions of a prompt with so many pictures, each with the token that begins it."""
    return TEXT_TOKENS + pictures * (1 + model.config.num_img_token)


def _language_bytes(model: MMInterleavedForConditionalGeneration, *, pictures: bool = True) -> int:
    """Bytes of the language model with its head, with or without its synchronizers."""
    whole = weight_bytes(model.mm_decoder, model.text_decoder)
    return whole if pictures else whole - weight_bytes(*model.mm_decoder.synchronizers())


def _index(positions: int, pictures: int) -> torch.Tensor:
    return empty(1, positions, pictures, dtype=torch.int64)


def _maps(model: MMInterleavedForConditionalGeneration, pictures: int, dtype: torch.dtype) -> torch.Tensor:
    """The pixels that the language model reads of pictures: [1, n, S, C]."""
    return empty(1, pictures, model.config.pixels_of_llm, model.config.image_embed_dim, dtype=dtype)


def _decode(pictures: int, of: FakeInterleaved) -> dict[str, FakeCall]:
    """One token after a prompt with pictures."""
    held, packed = of.language
    length, values = _positions(of.model, pictures), packed.language_model.project_pictures
    with torch.inference_mode(), use_backend("auto"):
        read = {"picture_values": values(_maps(of.model, pictures, DTYPE))}
    inputs = PassInputs(read, {"picture_index": _index(length, pictures)})

    plain, ours = _language_bytes(of.model, pictures=False), _language_bytes(of.model) + held
    return {
        "plain": FakeCall(plain, _next_token(of.model, length, PassInputs())),
        "original": FakeCall(_language_bytes(of.original), _next_token_of_original(of, length, pictures)),
        "auto": FakeCall(ours, _next_token(packed, length, inputs)),
    }


def _next_token(model, length: int, inputs: PassInputs) -> Callable[[], torch.Tensor]:
    """A call that decodes one token behind `length` positions, as the decode loop does without a CUDA graph."""
    runner = ModelRunner(model, graphs=False)
    sequences, token = runner.sequences(1, length + 1), empty(1, dtype=torch.int64)
    config = model.text_config
    one = empty(1, config.num_key_value_heads, 1, config.hidden_size // config.num_attention_heads)
    with torch.inference_mode():
        sequences.fill(None, inputs)
        for layer in sequences.cache.layers:
            layer.lazy_initialization(one, one)

    def call() -> torch.Tensor:
        # Every call computes the same position.
        sequences.cache.length = length
        return runner.step(sequences, token)

    return call


def _next_token_of_original(of: FakeInterleaved, length: int, pictures: int) -> Callable[[], torch.Tensor]:
    """The same by the original's steps, which project the pictures again, and make longer keys and values."""
    config = of.original.config.text_config
    cache, maps = DynamicCache(config=config), _maps(of.original, pictures, ORIGINAL_DTYPE)
    heads, embedded = config.num_attention_heads, empty(1, 1, config.hidden_size, dtype=ORIGINAL_DTYPE)
    before = empty(1, heads, length, config.hidden_size // heads, dtype=ORIGINAL_DTYPE)
    # A cache makes an empty tensor on the GPU, which only a counted call can do here.
    with Count("cuda"):
        for layer in range(config.num_hidden_layers):
            cache.update(before, before, layer)

    def call() -> torch.Tensor:
        # Every call computes the same position.
        if cache.get_seq_length() > length:
            cache.crop(-1)
        return of.original.text_decoder(_original_pass(of, embedded, cache, maps))

    return call


def _original_pass(
    of: FakeInterleaved, embedded: torch.Tensor, cache: DynamicCache | None, maps: torch.Tensor
) -> torch.Tensor:
    """The last hidden states of a pass in which every synchronizer projects the pictures again."""
    read = {"picture_features": maps, "picture_index": _index(embedded.shape[1], maps.shape[1])}
    with use_backend("reference"):
        return of.original.mm_decoder(
            inputs_embeds=embedded, use_cache=True, **{CACHE: cache}, **read
        ).last_hidden_state


def _prefill(pictures: int, of: FakeInterleaved) -> dict[str, FakeCall]:
    """A prompt with pictures that are seen already, to the first token's logits; ours also projects the pictures."""
    held, packed = of.language
    config, length = of.model.config, _positions(of.model, pictures)
    maps = _maps(of.model, pictures, DTYPE)
    embedded = {
        dtype: empty(1, length, config.text_config.hidden_size, dtype=dtype) for dtype in (DTYPE, ORIGINAL_DTYPE)
    }

    def plain() -> torch.Tensor:
        return _first_token(of.model, embedded[DTYPE], PassInputs())

    def original() -> tuple[torch.Tensor, DynamicCache]:
        cache = DynamicCache(config=of.original.config.text_config)
        hidden = _original_pass(of, embedded[ORIGINAL_DTYPE], cache, _maps(of.original, pictures, ORIGINAL_DTYPE))
        # The logits of every position are made.
        return of.original.text_decoder(hidden), cache

    def ours() -> torch.Tensor:
        return _first_token(packed, embedded[DTYPE], _read(packed, maps, length))

    return {
        "plain": FakeCall(_language_bytes(of.model, pictures=False), plain),
        "original": FakeCall(_language_bytes(of.original), original),
        "auto": FakeCall(_language_bytes(of.model) + held, ours),
    }


def _read(packed: PackedInterleavedDecoding, maps: torch.Tensor, length: int) -> PassInputs:
    """What the passes of a prompt read of pictures."""
    values = packed.language_model.project_pictures(maps)
    return PassInputs({"picture_values": values}, {"picture_index": _index(length, maps.shape[1])})


def _first_token(model, embedded: torch.Tensor, inputs: PassInputs) -> tuple:
    """Keys and values of a prompt, and the logits behind it, as the decode loop computes them without CUDA graphs."""
    runner = ModelRunner(model, graphs=False, keep_states=True)
    sequences = runner.sequences(1, embedded.shape[1] + 1)
    sequences.fill(None, inputs)
    return runner.prefill(sequences, embedded), sequences, runner


def _step(of: FakeInterleaved) -> dict[str, FakeCall]:
    """A step of the diffusion with guidance, for a picture with one before it."""
    (held, drawer), decoder = of.drawer, of.model.image_decoder
    condition, maps = _drawn_from(of.model, DTYPE)
    constants = drawer.constants(condition, maps, None, DrawingOptions())
    latents, timestep = _latents(decoder), empty(dtype=torch.int64)

    def plain() -> torch.Tensor:
        both = latents.to(DTYPE).repeat_interleave(constants.halves, 0)
        return decoder.decoder.unet(both, timestep, encoder_hidden_states=constants.condition, return_dict=False)[0]

    def original() -> torch.Tensor:
        return by_original.predict(latents, timestep, of_original, "reference")

    def ours() -> torch.Tensor:
        return drawer.predict(latents, timestep, constants, "auto")

    by_original = PictureDrawer(of.original.image_decoder, packed=False, graphs=False)
    of_original = by_original.constants(*_drawn_from(of.original, ORIGINAL_DTYPE), None, DrawingOptions())
    unet, parts = decoder.decoder.unet, of.original.image_decoder.decoder
    return {
        "plain": FakeCall(weight_bytes(unet), plain),
        "original": FakeCall(weight_bytes(parts.unet, parts.mmfs_module), original),
        "auto": FakeCall(weight_bytes(unet, decoder.decoder.mmfs_module) + held, ours),
    }


def _drawn_from(model: MMInterleavedForConditionalGeneration, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The condition of one picture, and the maps of the picture before it."""
    config = model.config
    maps = empty(1, 1, sum(side * side for side in MAP_SIDES), config.image_embed_dim, dtype=dtype)
    return empty(1, config.condition_length, config.condition_width, dtype=dtype), maps


def _latents(decoder: ImageDecoder) -> torch.Tensor:
    return empty(*decoder.latents_shape(1), dtype=torch.float32)


def _whole(of: FakeInterleaved) -> dict[str, FakeCall]:
    """Everything that a conversation holds: four pictures are seen, a token is written, and a picture is drawn.

    A picture is drawn in one step here, which needs the same memory as thirty.
    """
    (language, packed), (tower, encoder), (synchronizers, drawer) = of.language, of.encoder, of.drawer

    def original() -> tuple:
        model, length = of.original, _positions(of.original, WHOLE_PICTURES)
        seen = model.get_image_features(_pixels(WHOLE_PICTURES, ORIGINAL_DTYPE), backend="reference")
        maps = seen.last_hidden_state[None, :, -model.config.pixels_of_llm :]
        embedded = empty(1, length, model.config.text_config.hidden_size, dtype=ORIGINAL_DTYPE)
        cache = DynamicCache(config=model.config.text_config)
        logits = model.text_decoder(_original_pass(of, embedded, cache, maps))
        logits = model.text_decoder(_original_pass(of, embedded[:, :1], cache, maps))
        # Keys and values are dropped, and the sequence is run again for the picture.
        del cache
        states = _original_pass(of, embedded, None, maps)
        by_original = PictureDrawer(model.image_decoder, packed=False, graphs=False)
        return seen, logits, _draw(model, by_original, states, seen.last_hidden_state[-1], "reference")

    def ours() -> tuple:
        model, length = of.model, _positions(of.model, WHOLE_PICTURES)
        seen = [encoder.encode(_pixels(1, DTYPE), backend="auto") for _ in range(WHOLE_PICTURES)]
        # What synchronizers read is kept by picture, and once more in the order of the sequence.
        values = [packed.language_model.project_pictures(one.maps) for one in seen]
        inputs = PassInputs(
            {"picture_values": torch.stack(values, 1)}, {"picture_index": _index(length, WHOLE_PICTURES)}
        )
        embedded = empty(1, length, model.config.text_config.hidden_size)
        logits, sequences, runner = _first_token(packed, embedded, inputs)
        logits = runner.step(sequences, empty(1, dtype=torch.int64))
        states = sequences.cache.states[:, :length]
        return seen, values, sequences, logits, _draw(model, drawer, states, seen[-1].maps[0], "auto")

    return {
        "original": FakeCall(weight_bytes(of.original), original),
        "auto": FakeCall(weight_bytes(of.model) + language + tower + synchronizers, ours),
    }


def _pixels(pictures: int, dtype: torch.dtype) -> torch.Tensor:
    return empty(pictures, 3, PICTURE_SIDE, PICTURE_SIDE, dtype=dtype)


def _draw(
    model: MMInterleavedForConditionalGeneration,
    drawer: PictureDrawer,
    states: torch.Tensor,
    maps: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    """A picture that follows a sequence with these last states [1, L, D], drawn in one step."""
    target = PlacedPicture(row=0, begins=0, soi=states.shape[1] - 1, previous=WHOLE_PICTURES - 1)
    condition = model.picture_conditions(states, [target])
    constants = drawer.constants(condition, maps[None, None], None, DrawingOptions())
    latents = _latents(model.image_decoder)
    return drawer.decode(latents - drawer.predict(latents, empty(dtype=torch.int64), constants, backend))
