"""Pictures against the original's, from the recorded last states on; and what must hold of any drawing."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from mg_fast.errors import PromptError
from mg_fast.models.mm_interleaved.context import previous_maps
from mg_fast.models.mm_interleaved.drawing_options import DrawingOptions
from mg_fast.models.mm_interleaved.picture_drawer import PictureDrawer, decoding_autoencoder
from mg_fast.runtime.graphs import Captures, GraphCache
from mg_fast.testing.tolerances import relative_error
from tests.models.mm_interleaved.drawing_parts import PICTURE, PICTURE_30, STAGE, Recorded, recorded
from tests.models.mm_interleaved.loaded import inputs
from tests.models.mm_interleaved.recorded import NAMES, requests

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("request_", ["t2i", "t2i_batch", "segm", "story"])
def test_contexts_and_conditions(name, request_):
    given = recorded(name)
    was = {
        key: given.answers[f"{request_}.{key}"]
        for key in ("last_hidden", "context_features", "context_attention_mask", "prompt_embeds", "mmfs_mask")
    }
    targets = given.targets(request_)
    features, mask = given.model.context_features(was["last_hidden"], targets)
    # The original pads to the longest context of the whole batch, which need not be one of a target.
    expected, length = was["context_attention_mask"].bool(), mask.shape[1]
    assert torch.equal(mask, expected[:, :length]) and not expected[:, length:].any()
    assert relative_error(features[mask], was["context_features"][:, :length][mask]) < STAGE
    condition = given.model.image_decoder.condition(features, mask)
    assert relative_error(condition, was["prompt_embeds"]) < STAGE
    assert [[int(target.previous is not None)] for target in targets] == was["mmfs_mask"].tolist()


def draw(
    given: Recorded, request: str, maps: torch.Tensor | None = None, *, backend: str = "torch", **options
) -> tuple:
    """The pictures of a request, and the latents after every step."""
    latents = []
    options = DrawingOptions(**options, on_step=lambda step, now: latents.append(now))
    of_targets = previous_maps(given.maps if maps is None else maps, given.targets(request))
    condition = given.answers[f"{request}.prompt_embeds"]
    return given.model.image_decoder.draw(condition, *of_targets, options, backend=backend), torch.stack(latents)


@pytest.mark.parametrize(
    ("name", "request_", "variant", "backend"),
    [
        *((name, request, "steps4", "torch") for name in NAMES for request in ("t2i_batch", "segm")),
        ("mmi-tiny", "segm", "steps4", "reference"),
        *((name, "t2i", variant, "torch") for name in NAMES for variant in ("noguide", "steps7", "default")),
        ("mmi-tiny", "segm", "two", "torch"),
    ],
)
def test_pictures(name, request_, variant, backend):
    """With the seeds of the original, and its draws."""
    given = recorded(name)
    options = dict(requests(name)[request_]["generations"][variant]["kwargs"])
    options["num_images"] = options.pop("num_validation_images", 1)
    pictures, latents = draw(given, request_, backend=backend, **options)
    was = given.answers.get(f"{request_}.{variant}.latents")
    assert was is None or relative_error(latents, was) < STAGE
    difference = (pictures - given.answers[f"{request_}.{variant}.picture"]).abs().max()
    assert difference < (PICTURE_30 if variant == "default" else PICTURE)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_story_from_its_prompt_on(backend):
    """The whole model; the picture before each target is read, and contexts of different lengths share a batch."""
    given, latents = recorded("mmi-tiny"), []
    pictures = given.model.generate_images(
        **inputs("mmi-tiny", "story", given.answers),
        target_image_idxs=given.answers["story.target_image_idxs"],
        num_inference_steps=4,
        on_step=lambda step, now: latents.append(now),
        output_type="pt",
        backend=backend,
    )
    assert relative_error(torch.stack(latents), given.answers["story.steps4.latents"]) < STAGE
    assert (pictures - given.answers["story.steps4.picture"]).abs().max() < PICTURE


def test_padding_on_the_left_changes_nothing():
    given = recorded("mmi-tiny")
    prompt = inputs("mmi-tiny", "segm", given.answers)
    pad = {"input_ids": given.model.config.pad_token_id, "attention_mask": 0}
    prompt |= {name: torch.nn.functional.pad(prompt[name], (3, 0), value=value) for name, value in pad.items()}
    pictures = given.model.generate_images(**prompt, num_inference_steps=4, output_type="pt", backend="torch")
    assert (pictures - given.answers["segm.steps4.picture"]).abs().max() < PICTURE


def test_given_latents_and_generators_take_the_place_of_drawn_ones():
    """The recorded latents, and a generator that has drawn them, go on as the original does; and so does the VAE."""
    given = recorded("mmi-tiny")
    first = given.answers["t2i.steps4.initial_latents"]
    generator = torch.Generator().manual_seed(given.model.config.sd_base_seed)
    assert torch.equal(torch.randn(first.shape, generator=generator), first)
    after = copy.copy(generator.get_state())
    pictures, latents = draw(given, "t2i", latents=first, generator=generator, num_inference_steps=4)
    assert relative_error(latents, given.answers["t2i.steps4.latents"]) < STAGE
    drawer = given.model.picture_drawer()
    decoded = drawer.decode(given.answers["t2i.steps4.latents"][-1])
    expected = (given.answers["t2i.steps4.decoded"] / 2 + 0.5).clamp(0, 1)
    assert (decoded - expected).abs().max() < STAGE and torch.equal(pictures, drawer.decode(latents[-1]))
    # The noise that was recorded: one draw for each of four steps, the last one, too.
    generator.set_state(after)
    drawn = torch.stack([torch.randn(first.shape, generator=generator) for _ in range(4)])
    assert torch.equal(drawn, given.answers["t2i.steps4.noise"])


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_batched_equals_alone_and_twice_the_same(scheduler):
    """One row has a picture before it, and the other one none: they share a batch, or have one of their own."""
    given, condition = recorded("mmi-tiny"), recorded("mmi-tiny").answers["t2i_batch.prompt_embeds"]
    made = scheduler.from_config(given.model.config.scheduler_config)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    maps, mask = given.maps[:, None].repeat(2, 1, 1, 1), torch.tensor([[1], [0]])
    drawer = given.model.picture_drawer()

    def run(rows: slice, size: int = 8, which=maps, seen=mask) -> torch.Tensor:
        options = DrawingOptions(num_inference_steps=3, latents=latents[rows], scheduler=made, batch_size=size)
        given = (None, None) if which is None else (which[rows], seen[rows])
        return drawer(condition[rows], *given, options, backend="torch")

    both = run(slice(0, 2))
    assert torch.equal(both, run(slice(0, 2))), "the same request gives the same bits"
    apart = [run(slice(0, 1)), run(slice(1, 2), which=None), run(slice(0, 2), size=1)]
    assert (torch.cat(apart[:2]) - both).abs().max() < PICTURE and (apart[2] - both).abs().max() < PICTURE
    assert (both[0] - run(slice(0, 1), which=None)[0]).abs().max() > 1e-3, "the picture before it matters"


class Stop(Exception):
    """Is raised in the middle of a drawing."""


def test_stopping_in_the_middle_leaves_everything_usable():
    given = recorded("mmi-tiny")
    drawer, condition = given.model.picture_drawer(), given.answers["segm.prompt_embeds"]
    maps, seen = given.maps[:, None], []

    def stop(step: int, latents: torch.Tensor) -> None:
        seen.append(step)
        if step == 1:
            raise Stop

    with pytest.raises(Stop):
        drawer(condition, maps, None, DrawingOptions(num_inference_steps=4, on_step=stop))
    assert seen == [0, 1]
    pictures = drawer(condition, maps, None, DrawingOptions(num_inference_steps=4), backend="torch")
    assert (pictures - given.answers["segm.steps4.picture"]).abs().max() < PICTURE


class Replayed:
    """Stands for a captured graph: a replay runs the work again on what its inputs hold now."""

    def __init__(self, work):
        self.replay = work


def test_a_captured_step_gets_the_inputs_of_every_batch(monkeypatch):
    """Two requests of the same shapes share one graph, and those without a picture have another one."""
    given, captured = recorded("mmi-tiny"), []
    drawer, condition = given.model.picture_drawer(), given.answers["segm.prompt_embeds"]

    def capture(self, work, *_) -> Replayed:
        captured.append(work)
        return Replayed(work)

    def run(scale: float, maps) -> torch.Tensor:
        options = DrawingOptions(num_inference_steps=2, guidance_scale=scale)
        return drawer(condition * (1 + scale), maps, None, options, backend="torch")

    requests_ = [(7.5, given.maps[:, None]), (3.0, -given.maps[:, None]), (3.0, None), (7.5, given.maps[:, None])]
    plain = [run(*each) for each in requests_]
    monkeypatch.setattr(GraphCache, "capture", capture)
    drawer._graphs = GraphCache(2, Captures())
    assert all(torch.equal(run(*each), expected) for each, expected in zip(requests_, plain))
    assert len(captured) == 2


def test_half_precision_draws_and_decodes_in_the_safe_dtype():
    given = recorded("mmi-tiny")
    decoder, condition = given.model.image_decoder, given.answers["segm.prompt_embeds"]
    assert decoder.decoder.vae.config.force_upcast
    assert decoding_autoencoder(decoder.decoder.vae) is decoder.decoder.vae
    half = copy.deepcopy(decoder).half()
    wide = decoding_autoencoder(half.decoder.vae)
    assert wide.dtype == torch.float32 and half.decoder.vae.dtype == torch.float16
    drawer = PictureDrawer(half)
    options = DrawingOptions(num_inference_steps=4)
    pictures = drawer(condition, given.maps[:, None], None, options, backend="torch")
    # Latents, noise and the scheduler's arithmetic stay in float32.
    assert pictures.dtype == torch.float32
    assert (pictures - given.answers["segm.steps4.picture"]).abs().max() < 0.05
    half.bfloat16()
    assert decoding_autoencoder(half.decoder.vae) is half.decoder.vae
    with pytest.raises(RuntimeError, match="make another one"):
        drawer(condition)


def test_synchronizers_with_hooks_run_as_they_are():
    given, calls = recorded("mmi-tiny"), []
    decoder, options = copy.deepcopy(given.model.image_decoder), DrawingOptions(num_inference_steps=4)
    decoder.decoder.mmfs_module.mmfs_mid_block.conv.register_forward_hook(lambda *_: calls.append(1))
    condition, maps = given.answers["segm.prompt_embeds"], given.maps[:, None]
    with pytest.raises(ValueError, match="hooks"):
        PictureDrawer(decoder)
    pictures = decoder.draw(condition, maps, None, options, backend="torch")
    assert len(calls) == 4 and (pictures - given.answers["segm.steps4.picture"]).abs().max() < PICTURE


def test_generate_images_by_its_defaults_and_what_it_refuses():
    given = recorded("mmi-tiny")
    prompt = inputs("mmi-tiny", "segm", given.answers)
    [picture] = given.model.generate_images(**prompt, num_inference_steps=4)
    assert picture.size == (64, 64) and picture.mode == "RGB"
    shown = (given.answers["segm.steps4.picture"][0] * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).numpy()
    assert abs(shown.astype(int) - picture).max() <= 1
    both = given.model.generate_images(
        **prompt, target_image_idxs=torch.tensor([0, 1]), output_type="pt", num_inference_steps=1, guidance_scale=1
    )
    assert list(both.shape) == [2, 3, 64, 64] and both.dtype == torch.float32

    flow = FlowMatchEulerDiscreteScheduler()
    for options, message in (
        ({"latents": torch.zeros(1, 4, 8, 9)}, r"latents must be \[1, 4, 8, 8\], got \[1, 4, 8, 9\]"),
        ({"latents": torch.zeros(1, 4, 8, 8), "num_images": 2}, r"latents must be \[2, 4, 8, 8\]"),
        ({"scheduler": "ddim"}, "scheduler must be one of diffusers'"),
        ({"scheduler": flow}, "lacks scale_model_input"),
        ({"num_inference_steps": 1001}, "at most 1000"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a positive whole number"),
        ({"guidance_scale": "7"}, "guidance_scale must be a number"),
        ({"generator": [torch.Generator()], "num_images": 2}, "a generator for each of 2 rounds, got 1"),
        ({"output_type": "np"}, "output_type must be one of pil, pt"),
        ({"target_image_idxs": [2]}, r"counts the 2 picture\(s\) of the whole batch from 0 on, got 2"),
        ({"target_image_idxs": [0.5]}, "list of whole numbers"),
        ({"target_image_idxs": []}, "at least one picture"),
        ({"image_tokens": None}, r"begins 2 picture\(s\), placeholders included, but 0 picture\(s\) came"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long), "image_tokens": None}, "no token that begins a picture"),
    ):
        with pytest.raises((PromptError, ValueError), match=message):
            given.model.generate_images(**prompt | {"attention_mask": None, "num_image_per_seq": None} | options)
