"""Every object that callers hold can be copied and pickled, or one short message says what to do instead."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model

import mg_fast
from mg_fast import CheckpointError

COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda thing: pickle.loads(pickle.dumps(thing))}


@pytest.mark.parametrize("how", COPIES)
def test_a_pipeline_says_what_to_do(pipeline, how):
    with pytest.raises(
        TypeError, match=r"a Pipeline cannot be copied or pickled: pipeline.conversation\(\) .* mg_fast.load itself"
    ):
        COPIES[how](pipeline)
    with pytest.raises(TypeError, match="a Pipeline cannot be copied or pickled"):
        copy.deepcopy({"pipelines": [pipeline]})


@pytest.mark.parametrize("how", ("copy", "deepcopy"))
def test_a_conversation_goes_on_twice(pipeline, photo, drawing, how):
    first = pipeline.conversation()
    first.chat("What is it?", [photo], max_new_tokens=4)
    second = COPIES[how](first)
    assert second.turns == first.turns and second.vision is pipeline.vision and second.answers is pipeline.answers
    straight = pipeline.conversation()
    straight.chat("What is it?", [photo], max_new_tokens=4)
    expected = straight.chat("And this?", [drawing], max_new_tokens=4)
    assert second.chat("And this?", [drawing], max_new_tokens=4) == expected
    # The first conversation does not know of that turn.
    assert len(first.turns) == len(first.pictures) == 1 and len(second.turns) == len(second.pictures) == 2
    assert first.chat("And this?", [drawing], max_new_tokens=4) == expected


def test_a_conversation_is_not_pickled(pipeline):
    with pytest.raises(TypeError, match="a Conversation cannot be pickled, as its model cannot: keep its `turns`"):
        pickle.dumps(pipeline.conversation())


@pytest.mark.parametrize("how", COPIES)
def test_processors_models_and_answers(pipeline, model, photo, how):
    expected = pipeline.chat("What?", [photo], max_new_tokens=4)
    processor, other = COPIES[how](pipeline.processor), COPIES[how](model)
    assert mg_fast.Pipeline(other, processor).chat("What?", [photo], max_new_tokens=4) == expected
    assert COPIES[how](expected) == expected
    [failed] = pipeline.chat_batch(["<image>"], progress=False)
    assert str(COPIES[how](failed).error) == str(failed.error)
    assert COPIES[how](model.config).to_dict() == model.config.to_dict()


# ---- The folder of an adapter is not a copy of a model either.


@pytest.fixture
def adapted(model, tmp_path):
    """A model with a LoRA in its language model, and the folder that the LoRA is saved in."""
    torch.manual_seed(0)
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "lora")
    return adapted.get_base_model(), tmp_path / "lora"


def test_the_folder_of_a_lora_says_what_it_is(adapted, standard):
    _, folder = adapted
    message = (
        rf"lora holds a LoRA or another adapter .*: load its base model '{standard}' first, "
        r".*pipeline.model.load_adapter\(folder\)"
    )
    for call in (
        lambda: mg_fast.load(folder),
        lambda: mg_fast.load(standard, base_model=folder),
        lambda: mg_fast.MiniGeminiForConditionalGeneration.from_pretrained(folder),
        lambda: mg_fast.MiniGeminiProcessor.from_pretrained(folder),
    ):
        with pytest.raises(CheckpointError, match=message):
            call()
    # Trainers write the model's configuration and tokenizer beside the adapter.
    for file in standard.glob("*.json"):
        if "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=message):
        mg_fast.load(folder)
    (folder / "adapter_config.json").write_text("no JSON")
    with pytest.raises(CheckpointError, match="holds a LoRA or another adapter .*: load its base model first"):
        mg_fast.load(folder)


def test_what_it_advises_works(adapted, standard, photo, processor):
    changed, folder = adapted
    expected = mg_fast.Pipeline(changed, processor).chat("What?", [photo], max_new_tokens=6)
    pipeline = mg_fast.load(standard)
    before = pipeline.chat("What?", [photo], max_new_tokens=6)
    pipeline.reset()
    pipeline.model.load_adapter(folder)
    assert pipeline.chat("What?", [photo], max_new_tokens=6) == expected != before
