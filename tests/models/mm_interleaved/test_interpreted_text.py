"""The kernels give the original's hidden states and words for a picture's caption."""

import torch

import mg_fast
from mg_fast.models.mm_interleaved.packed import PackedInterleavedDecoding
from mg_fast.testing.tolerances import relative_error
from tests.models.mm_interleaved import recorded
from tests.models.mm_interleaved.loaded import inputs, load

NAME = "mmi-tiny"


def test_a_caption_begins_as_recorded():
    """Row 0 of the recorded batch, by packed layers for the prompt and by the model's own for the first words."""
    answers, model = recorded.answers(NAME), load(NAME)
    with mg_fast.use_backend("torch"):
        given = {name: tensor[:1] for name, tensor in inputs(NAME, "caption", answers).items()}
    with mg_fast.use_backend("triton"), torch.no_grad():
        packed = PackedInterleavedDecoding(model)
        read = packed.with_pictures(given["input_ids"], given)
        embeddings = packed.embed(given["input_ids"], image_tokens=read.pop("image_tokens"))
        del read["num_image_per_seq"]
        hidden = packed.language_model(inputs_embeds=embeddings, **read).last_hidden_state
        ids = model.generate(**given, max_new_tokens=2)
    assert relative_error(hidden[0].cpu(), answers["caption.hidden"][-1, 0]) <= 2e-5
    assert relative_error(packed.head(hidden[:, -1]).cpu(), answers["caption.last_logits"][:1]) <= 5e-5
    assert torch.equal(ids[0, given["input_ids"].shape[1] :].cpu(), answers["caption.greedy.ids"][0, 1:3])
