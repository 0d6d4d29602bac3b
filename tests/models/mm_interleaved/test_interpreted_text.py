"""The kernels give the original's logits and words for a question about a picture."""

import torch

import mg_fast
from mg_fast.models.mm_interleaved.packed import PackedInterleavedDecoding
from mg_fast.testing.tolerances import relative_error
from tests.models.mm_interleaved import recorded
from tests.models.mm_interleaved.stand_in import inputs, loaded

NAME = "mmi-tiny"


def test_a_question_is_answered_as_recorded():
    answers, model = recorded.answers(NAME), loaded(NAME)
    given = inputs(NAME, "vqa", answers)
    with mg_fast.use_backend("triton"), torch.no_grad():
        for language in (model, PackedInterleavedDecoding(model)):
            read = language.with_pictures(given["input_ids"], given)
            embeddings = language.embed(given["input_ids"], image_tokens=read.pop("image_tokens"))
            del read["num_image_per_seq"]
            hidden = language.language_model(inputs_embeds=embeddings, **read).last_hidden_state
            assert relative_error(hidden, answers["vqa.hidden"][-1]) <= 2e-5
            assert relative_error(language.head(hidden[:, -1]), answers["vqa.last_logits"]) <= 5e-5
        ids = model.generate(**given, max_new_tokens=10)
    assert torch.equal(ids[:, given["input_ids"].shape[1] :], answers["vqa.greedy_free.ids"][:, 1:])
