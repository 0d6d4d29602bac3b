"""vLLM's engine gives the original's answers for each of its checkpoints: alone, together, from its caches, and cut."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mg_fast import MiniGeminiProcessor
from mg_fast.models.templates import render, stop_ids
from mg_fast.testing.tolerances import relative_error
from tests.families import ORIGINAL, family
from tests.serve.engine import CUT, NEW_TOKENS, TEXTS, answered, cases, golden_folder, needs_vllm

pytestmark = needs_vllm

# The largest difference of logits, relative to their maximum.
LOGITS = 1e-4
RANK, ALPHA = 8, 16
ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


class Served:
    """What the engine answered for a checkpoint, and what the original did."""

    def __init__(self, name: str, folder, said: dict):
        self.name, self.folder, self.said = name, folder, said
        self.expected, self.cases = load_file(folder / "expected.safetensors"), cases(folder)
        self.template = json.loads((folder / "expected.json").read_text())["conv"]
        self.processor = MiniGeminiProcessor.from_pretrained(folder, template=self.template)

    def ids(self, key: str) -> list[int]:
        return self.expected[f"{key}.generated_ids"].flatten().tolist()

    def last_logits(self, key: str) -> torch.Tensor:
        return self.expected[f"{key}.last_logits"].reshape(-1, self.expected[f"{key}.last_logits"].shape[-1])[-1]

    def inputs(self, key: str):
        numbers, prompt = self.cases[key]
        pictures = [self.folder / f"image{i}.png" for i in numbers]
        return self.processor(text=prompt, images=pictures, return_tensors="pt")


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ORIGINAL])
def served(request, tmp_path_factory):
    folder = golden_folder(request.param)
    return Served(request.param, folder, answered(folder, tmp_path_factory.mktemp("served") / "said.json"))


def check_together(served: Served) -> None:
    """Checks the answers to many requests at once: each prompt with pictures twice, and text-only ones between them."""
    plain = family(served.name)
    expected = {text: plain.plain([(text, None)], (), NEW_TOKENS) for text in TEXTS}
    expected |= {key: served.ids(key) for key in served.cases}
    assert [said["ids"] for _, said in served.said["together"]] == [
        expected[asked] for asked, _ in served.said["together"]
    ]
    assert len(served.said["together"]) >= 8 and [said["ids"] for said in served.said["texts"]] == [
        expected[text] for text in TEXTS
    ]


def test_the_original_s_ids_and_logits(served):
    for key, said in served.said["alone"].items():
        assert said["prompt_ids"] == served.inputs(key)["input_ids"][0].tolist(), key
        assert said["ids"] == served.ids(key), key
        assert relative_error(torch.tensor(said["logits"]), served.last_logits(key)) <= LOGITS, key
    assert len(served.said["alone"]) == len(served.cases) >= 2


def test_eight_at_once_and_text_among_them(served):
    check_together(served)


def test_prefixes_and_pictures_are_computed_once(served):
    for key, said in served.said["again"].items():
        assert said["ids"] == served.ids(key) and said["cached"] > 0, key
        assert served.said["alone"][key]["cached"] == 0
    # Every prompt was asked twice, and there are two pictures.
    assert served.said["encoded"] == 2


def test_answers_stop_where_the_turn_ends(served):
    stops = stop_ids(served.template, served.processor.tokenizer)
    assert {int(i): (said["ids"], said["reason"]) for i, said in served.said["stops"].items()} == {
        i: ([i], "stop") for i in stops
    }


def test_a_conversation_is_the_prompt_that_the_model_was_trained_on(served):
    prompt = render(served.template, [("<image>\n<image>\nWhat is this?", None)])
    pictures = [served.folder / f"image{i}.png" for i in range(2)]
    inputs = served.processor(text=prompt, images=pictures, return_tensors="pt")
    assert served.said["chat"]["prompt_ids"] == inputs["input_ids"][0].tolist()


def test_bad_requests_are_refused_with_a_sentence(served):
    told = {
        "filler": "the text of a prompt with pictures must not hold",
        "tag": "the prompt has 1 <image> tag(s), but 0 picture(s) came",
        "picture": "the prompt has 0 <image> tag(s), but 1 picture(s) came",
        "more pictures": "the prompt has 1 <image> tag(s), but 2 picture(s) came",
        "too many pictures": "At most 2 image(s) may be provided in one prompt",
        "no picture": "picture: expected a Pillow image or a uint8 array or tensor, got str",
        "options": "mm_processor_kwargs: Mini-Gemini's processor takes none, got ['pad']",
        "ids": "once for each of the 1 picture(s), got it 0 time(s)",
    }
    for what, sentence in told.items():
        assert sentence in served.said["refused"][what], (what, served.said["refused"][what])
    assert served.said["refused"].keys() == told.keys()
    # The same word is harmless where there is no picture, and the engine goes on after all of this.
    assert len(served.said["filler in text"]["ids"]) > 0


# ---- prompts that are cut, and adapters


def factors(model, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factors A [RANK, in] and B [out, RANK] of a random adapter, by the names of the layers that it changes."""
    generator = torch.Generator().manual_seed(seed)
    layers = dict(model.model.language_model.named_modules())
    found = {}
    for i in range(len(model.model.language_model.layers)):
        for name in ADAPTED:
            out, width = layers[f"layers.{i}.{name}"].weight.shape
            found[f"layers.{i}.{name}"] = tuple(
                0.1 * torch.randn(shape, generator=generator) for shape in ((RANK, width), (out, RANK))
            )
    return found


def write_adapter(folder, changed, prefix: str):
    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({name.rpartition(".")[2] for name in ADAPTED}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for name, (a, b) in changed.items():
        tensors |= {f"{prefix}{name}.lora_A.weight": a, f"{prefix}{name}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """mgm-llama in an engine that cuts prompts, and one adapter twice: by the names of mg_fast and of the original."""
    folder, target = golden_folder("mgm-llama"), tmp_path_factory.mktemp("cut")
    changed = factors(family("mgm-llama").model, 0)
    adapters = [
        write_adapter(target / "ours", changed, "base_model.model.model.language_model."),
        write_adapter(target / "original", changed, "base_model.model.model."),
    ]
    return Served("mgm-llama", folder, answered(folder, target / "said.json", *adapters)), changed


@pytest.mark.xdist_group("cut")
def test_a_prompt_that_is_cut_through_its_picture(cut):
    served, _ = cut
    for key, said in served.said["alone"].items():
        marks = served.inputs(key)["mm_token_type_ids"][0]
        through = [i for i in range(CUT, len(marks), CUT) if marks[i - 1] == 1 and marks[i] == 1]
        assert through, f"no cut of {key} lies within a picture"
        assert said["ids"] == served.ids(key) == served.said["again"][key]["ids"], key
        assert relative_error(torch.tensor(said["logits"]), served.last_logits(key)) <= LOGITS, key
    check_together(served)


@pytest.mark.xdist_group("cut")
def test_an_adapter_of_the_language_model(cut):
    served, changed = cut
    model = copy.deepcopy(family("mgm-llama").model)
    layers = dict(model.model.language_model.named_modules())
    with torch.no_grad():
        for name, (a, b) in changed.items():
            layers[name].weight += ALPHA / RANK * (b @ a)
    key = next(iter(served.cases))
    inputs = served.inputs(key)
    with torch.inference_mode():
        logits = model(**inputs, logits_to_keep=1).logits[0, -1]
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    ids = ids[0, inputs["input_ids"].shape[1] :].tolist()
    assert ids != served.ids(key)
    for said in served.said["adapted"]:
        assert relative_error(torch.tensor(said["logits"]), logits) <= LOGITS
        assert said["ids"] == ids
    # Requests with and without it are answered side by side.
    assert [said["ids"] for said in served.said["mixed"]] == [ids, served.ids(key)]
