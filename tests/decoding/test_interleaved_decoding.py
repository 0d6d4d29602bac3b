"""The decode loop answers prompts with pictures in context as transformers' own loop does, and as the original did."""

import copy
import hashlib

import pytest
import torch

from mg_fast.decoding import Decoder
from mg_fast.errors import PromptError
from mg_fast.models.mm_interleaved.packed import PackedInterleavedDecoding
from mg_fast.models.protocol import check_decodable
from tests.models.mm_interleaved import recorded
from tests.models.mm_interleaved.loaded import inputs, load

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "mmi-tiny"
DIGESTS = [hashlib.sha256(bytes([i])).digest() for i in range(3)]


@pytest.fixture(params=["the model", "packed"])
def decodable(request):
    return load(NAME) if request.param == "the model" else PackedInterleavedDecoding(load(NAME))


def given(request: str) -> dict:
    return {**inputs(NAME, request, recorded.answers(NAME)), "min_length": 6, "max_new_tokens": 14}


def decoded(decoder: Decoder, request=None, **options) -> torch.Tensor:
    return load(NAME).generate(**options, custom_generate=request or decoder.request())


def check_recorded(ids: torch.Tensor, request: str) -> None:
    answers = recorded.answers(NAME)
    assert torch.equal(ids[:, answers[f"{request}.text_ids"].shape[1] :], answers[f"{request}.greedy.ids"][:, 1:])


@pytest.mark.parametrize("graph", [False, True], ids=["as it is", "by graph"])
def test_requests_one_after_another_in_one_decoder(decodable, graph, request):
    """Prompts with one picture, two, a ragged batch, a row without any, and a second document."""
    run = request.getfixturevalue("by_graph") if graph else None
    check_decodable(decodable)
    decoder = Decoder(decodable)
    for kind in ("vqa", "fewshot", "ragged", "textonly", "twodocs", "vqa"):
        check_recorded(decoded(decoder, **given(kind)), kind)
    assert run or not graph


def test_a_row_of_a_ragged_batch_is_answered_as_alone():
    model, batch, decoder = load(NAME), given("ragged"), Decoder(load(NAME))
    together = decoded(decoder, **batch)
    length = batch["input_ids"].shape[1]
    for row, pictures in ((0, slice(0, 1)), (1, slice(1, 3))):
        kept = batch["attention_mask"][row].bool()
        alone = {**batch, "input_ids": batch["input_ids"][row][kept][None], "num_image_per_seq": None}
        alone.update({name: batch[name][pictures] for name in ("image_tokens", "image_maps")}, attention_mask=None)
        ids = decoded(decoder, **alone)
        assert torch.equal(ids, model.generate(**alone))
        new = ids[0, alone["input_ids"].shape[1] :]
        assert torch.equal(together[row, length : length + len(new)], new)


def turns(decoder: Decoder, digests) -> tuple[int, list[int]]:
    """A second turn after the first answer, with another picture; then the same with another first picture.

    Returns:
        The length of the first turn, and the numbers of positions that the second turns reused.
    """
    one, both = given("vqa"), given("fewshot")
    first = decoded(decoder, decoder.request(digests and digests[:1]), **one)
    # The second turn goes on with a picture of its own, which does not hide the first one.
    second = torch.cat([first, both["input_ids"][:, 1:10], torch.tensor([[40, 50, 60]])], dim=1)
    reused = []
    for order in ((1, 0), (0, 1)):
        # Picture 0 of the few-shot request is another one than that of the first turn; its second is the same one.
        options = {**one, "input_ids": second, "attention_mask": torch.ones_like(second)}
        options.update({name: both[name][list(order)] for name in ("image_tokens", "image_maps")})
        options["num_image_per_seq"] = torch.tensor([2])
        request = decoder.request(digests and [digests[1 - place] for place in order])
        assert torch.equal(decoded(decoder, request, **options), load(NAME).generate(**options))
        reused.append(request.reused)
    return first.shape[1], reused


def test_later_turns_reuse_what_the_same_pictures_gave(decodable):
    length, reused = turns(Decoder(decodable), DIGESTS)
    first = recorded.answers(NAME)["vqa.text_ids"][0].tolist().index(load(NAME).config.image_token_id)
    # With another first picture, only the positions before it are reused.
    assert reused == [length - 1, first]


def test_without_digests_nothing_is_reused():
    assert turns(Decoder(load(NAME)), None)[1] == [0, 0]


def test_keys_stand_for_tokens_pictures_and_their_order():
    model, options = load(NAME), given("fewshot")
    ids, read = options["input_ids"], model.with_pictures(options["input_ids"], options)

    def keys(*digests):
        return model.position_keys(ids, read, list(digests))

    one, other = keys(*DIGESTS[:2]), keys(*DIGESTS[1::-1])
    begins = ids[0].tolist().index(model.config.image_token_id)
    assert one[:begins] == other[:begins] == ids[0, :begins].tolist()
    assert not set(one[begins:]) & set(other[begins:]) and min(one) < 0
    # Positions after the prompt see what its last one sees.
    longer = torch.cat([ids, ids[:, -1:]], dim=1)
    assert model.position_keys(longer, read, DIGESTS[:2])[-2:] == [one[-1]] * 2
    assert model.position_keys(ids, read, None) is None
    with pytest.raises(PromptError, match=r"one digest for each of 2 picture\(s\), got 3"):
        keys(*DIGESTS)
    with pytest.raises(PromptError, match="expected input_ids or picture_index"):
        model.pass_inputs({})


def test_text_alone_needs_no_digests(decodable):
    ids, decoder = torch.tensor([[1, 30, 40, 50, 60]]), Decoder(decodable)
    for reused in (0, 4):
        request = decoder.request()
        out = decoded(decoder, request, input_ids=ids, max_new_tokens=5)
        assert torch.equal(out, load(NAME).generate(ids, max_new_tokens=5)) and request.reused == reused


def test_streamed_tokens_are_the_recorded_ones():
    class Streamer:
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.got.append(None)

    streamer, options = Streamer(), given("vqa")
    ids = decoded(decoder := Decoder(load(NAME)), decoder.request(streamer=streamer), **options)
    check_recorded(ids, "vqa")
    assert streamer.got == [*ids[0].tolist(), None]


def test_samples_of_a_prompt_share_its_pictures():
    options = {**given("ragged"), "do_sample": True, "num_return_sequences": 2, "max_new_tokens": 7}
    torch.manual_seed(5)
    expected = load(NAME).generate(**options)
    torch.manual_seed(5)
    assert torch.equal(decoded(Decoder(load(NAME)), **options), expected)


def test_synchronizers_that_are_not_finite_are_named():
    model = copy.deepcopy(load(NAME))
    with torch.no_grad():
        model.mm_decoder.layers[2].llama_cross_attn.attn.output_proj.bias[0] = torch.nan
    message = "begins in layers 2 to 3 of 0 to 3; the weights of layer 2 are not finite either"
    for decodable in (model, PackedInterleavedDecoding(model)):
        with pytest.raises(FloatingPointError, match=message):
            model.generate(**given("vqa"), custom_generate=Decoder(decodable).request())


def test_a_pass_with_pictures_is_traced_whole(by_graph):
    """A pass is traced as one full graph, which a question to the host would break."""
    model, options = PackedInterleavedDecoding(load(NAME)), given("vqa")
    runner = Decoder(model).runner
    sequences = runner.sequences(1, 100)
    read = model.with_pictures(options["input_ids"], options)
    with torch.no_grad():
        sequences.fill(None, model.pass_inputs(read))
        runner.prefill(sequences, model.embed(options["input_ids"], image_tokens=options["image_tokens"]))
        arguments = sequences, torch.tensor([[5]]), torch.arange(128), torch.tensor([78]), torch.tensor([0])
        expected = runner._pass(*arguments)
        torch._dynamo.reset()
        traced = torch.compile(runner._pass, fullgraph=True, backend="eager", dynamic=False)
        assert torch.allclose(traced(*arguments), expected, atol=1e-5)
    sequences.cache.positions = None
