"""The wishes and pictures of nano's painter, the check by colours and outlines, its parts, and its training."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from mg_fast.drawing import load_painter
from recipes.nano import evaluate_painter, train_painter
from recipes.nano.muon import Muon
from recipes.nano.painting import autoencoder, diffusion
from recipes.nano.painting.check import check
from recipes.nano.painting.optimizers import MUON, make_optimizers
from recipes.nano.painting.parts import TOKENS, assemble, embed, make_parts
from recipes.nano.painting.vocabulary import make_tokenizer
from recipes.nano.painting.wishes import SIDE, Wish, draw_wish, grant, phrased, picture, random_wish
from recipes.nano.scenes import BACKGROUNDS, COLOURS, KINDS

ONE_OF_EACH = Wish((("circle", "red"), ("star", "blue")), "gray", False)


@pytest.fixture(autouse=True)
def alone(one_thread):
    """These models are too small for two threads."""


def drawn(wished: Wish, seed: int = 0) -> Image.Image:
    return picture(grant(random.Random(seed), wished))


def test_a_wish_says_what_nano_writes_between_its_tags():
    wished = Wish((("star", "blue"), ("circle", "red"), ("star", "blue")), "beige", True)
    assert wished.prompt == (
        "two blue stars, a red circle on a beige background, with a number, simple shapes, flat colours"
    )


def test_pictures_are_the_same_again_and_their_splits_differ():
    (first, scene), (again, same) = draw_wish(3, 5), draw_wish(3, 5)
    assert first == again and np.array_equal(scene.image, same.image)
    assert draw_wish(3, 5, split="unseen")[0] != first
    # The latents of both kinds of scenes go with the same prompts.
    other, scattered = draw_wish(3, 5, scattered=True)
    assert other == first and scattered.shapes != scene.shapes
    assert picture(scene).size == (SIDE, SIDE)


def test_phrases_keep_all_that_is_wished_for():
    rng = random.Random(0)
    for i in range(200):
        wished = random_wish(rng, ordered=i % 2 == 0)
        said = phrased(wished, rng)
        assert all(colour in said and kind in said for kind, colour in wished.shapes)
        assert f"{wished.background} background" in said
        assert ("number" in said) == wished.number
        if said != wished.prompt:
            # People name one shape after the other, in the order in which they stand in the picture.
            named = [said.find(f"{colour} {kind}") for kind, colour in dict.fromkeys(wished.shapes)]
            assert -1 not in named and named == sorted(named)


def test_true_pictures_pass_the_check():
    for i in range(40):
        wished, scene = draw_wish(11, i, split="unseen", scattered=i % 2 == 0)
        verdict = check(picture(scene), wished)
        assert verdict.order_right and verdict.background_right and verdict.number_right, (wished, verdict)


def test_shapes_stand_in_the_order_of_the_wish_and_the_number_below():
    wished = Wish(tuple((kind, "red") for kind in KINDS), "gray", True)
    for seed in range(20):
        scene = grant(random.Random(seed), wished, scattered=seed % 2 == 0)
        assert [shape.kind for shape in sorted(scene.shapes, key=lambda shape: shape.x)] == list(KINDS)
        assert all(shape.y + shape.size / 2 < scene.print.y - scene.print.height / 2 for shape in scene.shapes)
    rows = [[shape.y for shape in grant(random.Random(i), wished).shapes] for i in range(20)]
    assert 70 < min(map(min, rows)) < max(map(max, rows)) < 91
    with pytest.raises(ValueError, match="expected at most 4 shapes, got 5"):
        grant(random.Random(0), Wish(5 * ONE_OF_EACH.shapes[:1], "gray", False))


@pytest.mark.parametrize(
    "other, wrong",
    [
        (Wish((("circle", "red"), ("star", "green")), "gray", False), "shapes"),
        (Wish((("circle", "red"), ("triangle", "blue")), "gray", False), "shapes"),
        (Wish((("circle", "red"),), "gray", False), "shapes"),
        (Wish((("circle", "red"), ("star", "blue"), ("star", "blue")), "gray", False), "shapes"),
        (Wish((("circle", "blue"), ("star", "red")), "gray", False), "shapes"),
        (Wish(ONE_OF_EACH.shapes, "teal", False), "background"),
        (Wish(ONE_OF_EACH.shapes, "gray", True), "number"),
    ],
)
def test_the_check_finds_what_is_wrong(other, wrong):
    verdict = check(drawn(other), ONE_OF_EACH)
    found = {
        "shapes": verdict.shapes_right,
        "background": verdict.background_right,
        "number": verdict.number_right,
    }
    assert found == {name: name != wrong for name in found}


def test_the_check_names_no_shape_that_is_none():
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS["gray"])
    ImageDraw.Draw(image).rectangle((20, 50, 100, 70), COLOURS["red"])
    verdict = check(image, Wish((("square", "red"),), "gray", False))
    assert not verdict.shapes_right and verdict.shapes == ((None, "red"),)


def test_the_check_takes_small_marks_above_the_number_for_shapes():
    wished = Wish(ONE_OF_EACH.shapes, "gray", True)
    image = drawn(wished)
    assert check(image, wished).shapes_right
    ImageDraw.Draw(image).rectangle((60, 8, 69, 17), COLOURS["green"])
    assert not check(image, wished).shapes_right


def test_the_check_names_no_background_that_is_none():
    image = Image.new("RGB", (SIDE, SIDE), (40, 130, 40))
    verdict = check(image, Wish((), "black", False))
    assert verdict.background is None and not verdict.background_right


def test_the_check_tells_the_order_from_left_to_right():
    other = Wish(ONE_OF_EACH.shapes[::-1], ONE_OF_EACH.background, ONE_OF_EACH.number)
    for wished, in_order in ((ONE_OF_EACH, True), (other, False)):
        verdict = check(drawn(ONE_OF_EACH), wished)
        assert verdict.shapes_right and verdict.order_right == in_order
        assert verdict.shapes == ONE_OF_EACH.shapes


@pytest.fixture(scope="module")
def parts():
    rng = random.Random(0)
    return make_parts([phrased(random_wish(rng), rng) for _ in range(300)], seed=0)


def test_every_word_of_a_wish_is_one_token(parts):
    tokenizer = parts["tokenizer"]
    rng = random.Random(1)
    for _ in range(100):
        prompt = random_wish(rng).prompt
        words = prompt.replace(",", " ,").split()
        assert tokenizer.tokenize(prompt) == [f"{word}</w>" for word in words]
        assert len(words) + 2 <= TOKENS


def test_the_same_texts_give_the_same_tokens(parts):
    rng = random.Random(0)
    texts = [phrased(random_wish(rng), rng) for _ in range(300)]
    again = make_parts(texts[::-1], seed=1)["tokenizer"]
    assert again.get_vocab() == parts["tokenizer"].get_vocab()


def test_other_words_are_read_in_pieces():
    tokenizer = make_tokenizer(["a red circle"], most=TOKENS)
    ids = tokenizer("a Blue élan 猫").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a blue élan 猫"


def test_texts_are_embedded_as_the_pipeline_does_it(parts):
    pipeline, prompts = assemble(parts), [ONE_OF_EACH.prompt, ""]
    with torch.no_grad():
        states, pooled = embed(parts, prompts)
        theirs, _, their_pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    torch.testing.assert_close(states, theirs)
    torch.testing.assert_close(pooled, their_pooled)


def test_a_perfect_network_has_no_loss(parts, monkeypatch):
    """The target of the diffusion is the scheduler's own velocity: a network that says it has no loss at any time."""
    latents = torch.randn(8, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    scheduler = parts["scheduler"]
    seen = {}

    class Perfect(torch.nn.Module):
        def forward(self, noisy, times, states, added_cond_kwargs):
            alphas = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
            # The noise is what is left of the noisy latents. At pure noise nothing of the picture is left in them.
            noise = (noisy - alphas.sqrt() * latents) / (1 - alphas).sqrt().clamp_min(1e-12)
            seen["times"] = times
            return type("Output", (), {"sample": alphas.sqrt() * noise - (1 - alphas).sqrt() * latents})

    monkeypatch.setitem(parts, "unet", Perfect())
    monkeypatch.setattr(diffusion, "embed", lambda parts, texts: (None, latents.new_zeros(8, 1)))
    loss = diffusion.loss(parts, latents, [""] * 8, torch.Generator().manual_seed(1))
    assert loss < 1e-3
    still = lambda noisy, *args, **options: type("Output", (), {"sample": torch.zeros_like(noisy)})  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setitem(parts, "unet", still)
        assert diffusion.loss(parts, latents, [""] * 8, torch.Generator().manual_seed(1)) > 0.3
    # The times of a batch are spread: one in each eighth of the even spread that they come from.
    even = (seen["times"].double() / 1000) ** (1 / diffusion.TIME_POWER)
    assert sorted((even * 8 + 0.01).long().tolist()) == list(range(8))


def test_a_tenth_of_the_prompts_say_nothing():
    said = diffusion.prompts([ONE_OF_EACH] * 2000, random.Random(0))
    empty = sum("red circle" not in one for one in said) / len(said)
    assert 0.08 < empty < 0.12


def test_muon_sees_a_convolution_as_a_matrix():
    convolution = torch.nn.Conv2d(16, 12, 3, bias=False)
    before = convolution.weight.detach().clone()
    matrix = torch.nn.Parameter(before.flatten(1).clone())
    gradient = torch.randn(12, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    convolution.weight.grad, matrix.grad = gradient, gradient.flatten(1).clone()
    _, ours = make_optimizers([convolution], 1e-2)
    ours.step()
    Muon([matrix], lr=MUON * 1e-2, weight_decay=0.01).step()
    assert not torch.equal(convolution.weight, before)
    torch.testing.assert_close(convolution.weight.flatten(1), matrix)


def test_every_parameter_learns_by_one_optimizer(parts):
    modules = [parts[name] for name in train_painter.LEARNS]
    optimizers = make_optimizers(modules, 1e-3)
    counts = [sum(p.numel() for group in one.param_groups for p in group["params"]) for one in optimizers]
    assert sum(counts) == sum(p.numel() for module in modules for p in module.parameters())
    # Nearly all weights are matrices.
    assert counts[1] > 0.9 * sum(counts)


def test_pixels_of_print_weigh_more():
    pixels, weights = autoencoder.batch(0, 0, 12)
    assert pixels.shape == (12, 3, SIDE, SIDE) and -1 <= pixels.min() < pixels.max() <= 1
    numbers = [bool(draw_wish(0, i, split="autoencoder")[0].number) for i in range(12)]
    assert [bool(weight.max() > 1) for weight in weights] == numbers


@pytest.fixture
def short(monkeypatch):
    """A training of a few steps."""
    monkeypatch.setattr(train_painter, "AUTOENCODER", {"steps": 4, "batch": 2, "rate": 1e-3})
    monkeypatch.setattr(train_painter, "LATENTS", {"count": 6, "batch": 2})
    monkeypatch.setattr(
        train_painter, "DIFFUSION", {"steps": 4, "scattered": 2, "batch": 2, "rate": 1e-3, "average": 0.9}
    )
    monkeypatch.setattr(train_painter, "KEEP_EVERY", 2)
    monkeypatch.setattr(train_painter, "SAMPLE_EVERY", 4)
    monkeypatch.setattr(train_painter, "WISHES", 1)
    monkeypatch.setattr(train_painter, "ROUND_TRIPS", 1)


def weights(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.slow
def test_training_continues_where_it_was_stopped(short, tmp_path, monkeypatch):
    whole = train_painter.Run(tmp_path / "whole", seed=0)
    assert whole.train()
    # The run stops after every step, as if its minutes were over.
    for _ in range(20):
        if train_painter.Run(tmp_path / "pieces", seed=0).train(minutes=1e-9):
            break
    assert weights(tmp_path / "pieces" / "painter") == weights(tmp_path / "whole" / "painter")
    # One stop at the end of the first lesson, whose optimizers must not reach the next one.
    for _ in range(4):
        assert not train_painter.Run(tmp_path / "two", seed=0).train(minutes=1e-9)
    assert train_painter.Run(tmp_path / "two", seed=0).train()
    assert weights(tmp_path / "two" / "painter") == weights(tmp_path / "whole" / "painter")
    assert len(weights(tmp_path / "whole" / "painter")) == 4
    record = json.loads((tmp_path / "pieces" / "painter" / "training.json").read_text())
    assert record["starts"] > 4 and record["round trip"]["pictures"] == 1
    with pytest.raises(SystemExit, match="holds a run with another seed: give another folder"):
        train_painter.Run(tmp_path / "whole", seed=1)
    # What was written is an ordinary pipeline.
    (image,) = load_painter(tmp_path / "whole" / "painter", steps=1).draw(ONE_OF_EACH.prompt, seed=0)
    assert image.size == (SIDE, SIDE)


def test_shares_are_counted_by_the_number_of_shapes():
    asked = [Wish((("star", "red"),), "gray", True), Wish((("star", "red"),), "gray", False), ONE_OF_EACH]
    rows = [{"shapes": True, "number readable": True}, {"shapes": False}, {"shapes": True}]
    assert evaluate_painter.shares(asked, rows) == {
        "1 shape": {"asked": 2, "shapes": 0.5, "number readable": 1.0},
        "2 shapes": {"asked": 1, "shapes": 1.0},
        "all": {"asked": 3, "shapes": 0.6667, "number readable": 1.0},
    }


def test_the_wishes_of_the_evaluation_take_turns():
    asked = evaluate_painter.wishes(8100, 9)
    assert [len(one.shapes) for one in asked] == [1, 2, 3] * 3
    assert asked == evaluate_painter.wishes(8100, 9)
