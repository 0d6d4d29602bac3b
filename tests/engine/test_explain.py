"""`explain` shows the mining's own softmax at the right pixels, weighted by what the answer depends on.

It leaves the model as it was.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import mg_fast
from mg_fast import BackendError, Explanation, PictureError, Pipeline, PromptError, cli
from mg_fast.engine.explain import draw
from mg_fast.ops import reference
from mg_fast.ops.torch.dual_resize import normalise
from tests.checkpoints import load
from tests.families import family

QUESTION = "What is written in the picture?"
BOTH = pytest.mark.parametrize("name", ["standard", "hd"])


@pytest.fixture(autouse=True)
def quick(one_thread):
    """One thread is enough, because all models here are tiny."""


@pytest.fixture
def found(name):
    return family(name)


@torch.no_grad()
def plain_softmax(model, processor, picture) -> torch.Tensor:
    """The softmax [V, N, M] by the steps of `reference.mine`, for whole maps at once."""
    pixels = processor.image_processor(picture)
    queries = model.model.low_resolution_queries(pixels["pixel_values"])[0]
    pyramid = model.model.vision_tower_aux(pixels["pixel_values_hr"])
    hr_map = reference.merge_pyramid([level.permute(0, 3, 1, 2) for level in pyramid])
    grid, side = model.config.image_grid, int(queries.shape[1] ** 0.5)
    views = [part for rows in hr_map.chunk(grid, 2) for part in rows.chunk(grid, 3)]
    if len(queries) > grid * grid:
        views.append(F.interpolate(hr_map, scale_factor=1 / grid, mode="bilinear", align_corners=False))
    query, key, _ = model.model.patch_mining.projections()
    found = []
    for view, own in zip(views, queries):
        # [C, P, w, P, w] -> [P, P, w, w, C]
        windows = view[0].unflatten(2, (side, -1)).unflatten(1, (side, -1)).permute(1, 3, 2, 4, 0)
        keys = key(windows.flatten(2, 3).flatten(0, 1))
        found.append(((query(own)[:, None] @ keys.mT).squeeze(1) / keys.shape[-1] ** 0.5).softmax(-1))
    return torch.stack(found)


def test_weights_are_the_references_softmax(each):
    explanation = each.pipeline().explain(each.pictures[0])
    expected = plain_softmax(each.model, each.processor, each.pictures[0])
    config, weights = each.model.config, explanation.weights
    side = int(config.tokens_per_view**0.5)
    assert weights.dtype == torch.float32 and weights.shape[:3] == (config.views, side, side)
    torch.testing.assert_close(weights.flatten(3).flatten(1, 2), expected, rtol=0, atol=2e-6)
    # The weights are far from even, so an even softmax would not have passed.
    assert weights.amax((3, 4)).max() > 1.2 / weights[0, 0, 0].numel()
    torch.testing.assert_close(weights.sum((3, 4)), torch.ones(weights.shape[:3]))
    assert explanation.answer is None and explanation.relevance.unique().numel() == 1
    torch.testing.assert_close(explanation.map.sum(), torch.tensor(1.0))


@BOTH
@pytest.mark.parametrize("place", [(3, 29), (37, 10)])
def test_the_winning_position_lies_at_its_pixels(found, place):
    """The map is zero but for one position, which its query looks for; that position is hottest and is drawn there."""
    model, pipeline = found.model.model, found.pipeline()
    query, key, _ = model.patch_mining.projections()
    grid, side = model.config.image_grid, int(model.config.tokens_per_view**0.5)
    row, column = place

    def hide(tower, args, pyramid):
        pyramid = [torch.zeros_like(level) for level in pyramid]
        window = len(pyramid[0][0]) // (grid * side)
        (cell_y, y), (cell_x, x) = divmod(row // window, side), divmod(column // window, side)
        own = model.low_resolution_queries(pixels["pixel_values"])[0, cell_y * grid + cell_x, y * side + x]
        pyramid[0][0, row, column] = (query(own) @ key.weight * key.norm_weight)[: pyramid[0].shape[-1]]
        return pyramid

    pixels = found.processor.image_processor(found.pictures[0])
    hook = model.vision_tower_aux.register_forward_hook(hide)
    try:
        explanation = pipeline.explain(found.pictures[0])
    finally:
        hook.remove()
    assert divmod(int(explanation.map.argmax()), len(explanation.map)) == place
    # The picture is grey, so any colour belongs to the heat map.
    drawn = np.asarray(explanation.image).astype(int)
    colour = drawn.max(-1) - drawn.min(-1)
    factor = 4 * explanation.image.width // explanation.picture.width
    y, x = np.unravel_index(colour.argmax(), colour.shape)
    # A hot place is drawn a little wider than one position.
    assert colour.max() > 20 and max(abs(y // factor - place[0]), abs(x // factor - place[1])) <= 1


@pytest.mark.parametrize(
    "name, token, view", [("standard", 7, 0), ("hd", 7, 4), ("hd", 25 + 7, 0), ("hd", 3 * 25 + 7, 2)]
)
def test_a_token_that_the_language_model_does_not_see_is_irrelevant(found, token, view):
    pipeline = found.pipeline()

    def blind(language_model, args, kwargs):
        embeds = kwargs["inputs_embeds"]
        if embeds.shape[1] > pipeline.processor.image_processor.tokens_per_picture:
            first = marks.index(1)
            embeds = torch.cat(
                [embeds[:, : first + token], 0 * embeds[:, :1].detach(), embeds[:, first + token + 1 :]], 1
            )
        return args, {**kwargs, "inputs_embeds": embeds}

    prompt = mg_fast.models.templates.render(pipeline.template, [(f"<image>\n{QUESTION}", None)])
    marks = pipeline.processor.encode(prompt)[1]
    seen = pipeline.explain(found.pictures[0], QUESTION, max_new_tokens=2).relevance
    hook = found.model.model.language_model.register_forward_pre_hook(blind, with_kwargs=True)
    try:
        relevance = pipeline.explain(found.pictures[0], QUESTION, max_new_tokens=2).relevance
    finally:
        hook.remove()
    zero = (relevance == 0).nonzero().tolist()
    assert zero == [[view, 1, 2]] and (seen > 0).all()
    torch.testing.assert_close(relevance.sum(), torch.tensor(1.0))


@BOTH
def test_relevance_is_how_far_the_answers_lead_reaches(found):
    """Relevance equals the gradient of the answer's margin times the distance from the mean token, by a plain pass.

    The margin is the logit of every word minus the best other logit.
    """
    pipeline, model, picture = found.pipeline(), found.model, found.pictures[0]
    explanation = pipeline.explain(picture, QUESTION, max_new_tokens=3)
    ids = explanation.answer.token_ids
    assert ids == pipeline.chat(QUESTION, [picture], max_new_tokens=3).token_ids and len(ids) == 3
    turns = [(f"<image>\n{QUESTION}", None)]
    inputs = found.processor(
        text=mg_fast.models.templates.render(pipeline.template, turns), images=picture, return_tensors="pt"
    )
    tokens = pipeline.see(picture)
    prompt = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
    marks = F.pad(inputs["mm_token_type_ids"], (0, len(ids)))
    moved = tokens.clone().requires_grad_()
    logits = model(input_ids=prompt, image_tokens=moved[None], mm_token_type_ids=marks).logits[0, -len(ids) - 1 : -1]
    sum(row[i] - torch.cat([row[:i], row[i + 1 :]]).max() for row, i in zip(logits, ids)).backward()
    model.zero_grad()
    reach = torch.stack([moved.grad[i].norm() * (token - tokens.mean(0)).norm() for i, token in enumerate(tokens)])
    expected = reach / reach.sum()
    # The tokens of the global view come first, its queries last.
    ordered = reference.order_tokens(
        explanation.relevance.flatten(1)[None, ..., None], grid=model.config.image_grid
    ).flatten()
    torch.testing.assert_close(ordered, expected, rtol=1e-3, atol=1e-3 * float(expected.max()))
    weighted = explanation.weights * explanation.relevance[..., None, None]
    torch.testing.assert_close(explanation.map.sum(), weighted.sum())


def test_the_global_views_part_is_shared_out(hd_model, hd_processor, photo):
    explanation = Pipeline(hd_model, hd_processor).explain(photo)
    n, weights = len(explanation.map), explanation.weights / 125
    # The expected values follow the docstring, pixel by pixel.
    for y, x in ((0, 0), (13, 50), (n - 1, 3), (47, n - 1)):
        cell, (cy, cx) = (y // 40) * 2 + x // 40, (y % 40, x % 40)
        gy, gx = y // 2, x // 2
        expected = weights[cell, cy // 8, cx // 8, cy % 8, cx % 8] + weights[4, gy // 8, gx // 8, gy % 8, gx % 8] / 4
        torch.testing.assert_close(explanation.map[y, x], expected)


@BOTH
def test_the_model_stays_as_it_is(found):
    model, pipeline = found.model, found.pipeline()
    pipeline.chat(QUESTION, [found.pictures[0]], max_new_tokens=2)

    def state():
        modules = {
            n: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), type(m)) for n, m in model.named_modules()
        }
        parameters = {
            n: (p.requires_grad, p.grad is None, p._version, p.data_ptr()) for n, p in model.named_parameters()
        }
        return modules, parameters, list(pipeline._own.turns), len(pipeline.vision.cache), torch.is_grad_enabled()

    before = state()
    explained = pipeline.explain(found.pictures[0], QUESTION, max_new_tokens=2)
    with torch.inference_mode():
        again = pipeline.explain(found.pictures[0], QUESTION, max_new_tokens=2)
    assert state() == before
    assert not explained.map.requires_grad and torch.equal(explained.map, again.map)


def test_sixteen_bits(built, photo):
    explained = mg_fast.load(built["bfloat16"], device="cpu").explain(photo, QUESTION, max_new_tokens=2)
    exact = mg_fast.load(built["bfloat16"], device="cpu", dtype="float32").explain(photo)
    assert explained.weights.dtype == explained.map.dtype == explained.relevance.dtype == torch.float32
    # The tolerance covers the rounding of the towers.
    torch.testing.assert_close(explained.weights, exact.weights, rtol=0.1, atol=0)
    torch.testing.assert_close(explained.map.sum(), torch.tensor(1.0))


def test_quantized(standard, processor, photo):
    pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    explained = Pipeline(load(standard, quantization_config="int8"), processor).explain(
        photo, QUESTION, max_new_tokens=2
    )
    assert (explained.relevance > 0).all()
    pipeline = Pipeline(load(standard, quantization_config="int4"), processor)
    assert pipeline.explain(photo).map.sum() > 0.99
    with pytest.raises(BackendError, match=r"needs gradients, .*\(int4\) do not have: load them unquantized, as int8"):
        pipeline.explain(photo, QUESTION, max_new_tokens=2)


@pytest.mark.parametrize("pad", [True, False])
def test_the_picture_is_what_the_model_saw(pipeline, processor, pad, monkeypatch):
    monkeypatch.setattr(processor.image_processor, "pad", pad)
    wide = Image.effect_noise((90, 40), 80).convert("RGB")
    explanation = pipeline.explain(wide)
    assert torch.equal(normalise(explanation.picture), processor.image_processor(wide)["pixel_values_hr"][0])
    assert explanation.image.size == (640, 640) and isinstance(explanation, Explanation)


def test_drawing():
    noise = Image.effect_noise((192, 192), 80).convert("RGB")
    plain = np.asarray(draw(noise, torch.full((48, 48), 1 / 48**2)))
    assert plain.shape == (768, 768, 3) and (plain.max(-1) == plain.min(-1)).all()
    assert np.array_equal(plain, np.asarray(draw(noise, torch.zeros(48, 48))))
    lines = (np.asarray(draw(noise, torch.zeros(48, 48), windows=6)) != plain).any(-1)
    assert np.flatnonzero(lines.mean(0) > 0.9).tolist() == [128, 256, 384, 512, 640]


def test_what_is_refused(pipeline, photo):
    with pytest.raises(PictureError, match="expected a picture, got None: without a picture"):
        pipeline.explain(None, QUESTION)
    with pytest.raises(PictureError, match="expected a Pillow image.*got list"):
        pipeline.explain([photo], QUESTION)
    with pytest.raises(PictureError, match="no such file"):
        pipeline.explain("/no/such/file.png")
    for question, message in (
        ("  ", "expected a user text"),
        ("<image> and <image>?", "2 <image>"),
        ("word " * 700, "trained on at most"),
    ):
        with pytest.raises(PromptError, match=message):
            pipeline.explain(photo, question)


# ---- mg-fast explain


def test_command(standard, pipeline, photo, tmp_path, capsys):
    out = tmp_path / "explained.png"
    arguments = ["explain", "--model", str(standard), "--device", "cpu", "--image", str(photo), "--out", str(out)]
    assert cli.main([*arguments, "--prompt", QUESTION, "--max-new-tokens", "3", "--windows"]) == 0
    expected = pipeline.explain(photo, QUESTION, max_new_tokens=3, windows=True)
    printed = capsys.readouterr()
    assert printed.out == expected.answer.text + "\n" and f"drawn to {out}" in printed.err
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected.image))
    assert cli.main(arguments) == 0 and capsys.readouterr().out == ""


REFUSED = {
    "no picture": (2, ["--out", "a.png"], "required: --image"),
    "no such picture": (4, ["--image", "/nonexistent.png", "--out", "a.png"], "/nonexistent.png: no such file"),
    "no picture's name": (
        2,
        ["--image", "{photo}", "--out", "a.txt"],
        "expected a .png, .jpg or .webp file, got 'a.txt'",
    ),
    "no such folder": (2, ["--image", "{photo}", "--out", "/nonexistent/a.png"], "a folder that does not exist"),
    "empty question": (5, ["--image", "{photo}", "--out", "a.png", "--prompt", " "], "--prompt is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_command_refuses_before_it_loads(standard, photo, capsys, monkeypatch, case):
    monkeypatch.setattr("mg_fast.cli.loading.load", lambda *_, **__: pytest.fail("the model was loaded"))
    code, arguments, message = REFUSED[case]
    try:
        got = cli.main(["explain", "--model", str(standard), *(a.format(photo=photo) for a in arguments)])
    except SystemExit as error:
        got = error.code
    assert (got, message in capsys.readouterr().err) == (code, True)
