"""A model with parts on disk or in a CPU's memory (`device_map`) answers as with everything in place."""

import shutil

import accelerate
import pytest
import torch

import mg_fast
from mg_fast import MiniGeminiForConditionalGeneration, Pipeline
from mg_fast.runtime.device_maps import complete_device_map
from mg_fast.runtime.placement import execution_device
from mg_fast.testing.tolerances import IMAGE_TOKENS, relative_error
from tests.checkpoints import without_towers
from tests.families import family

QUESTION = "What is written in the picture?"
PARTS = [
    "model.vision_tower",
    "model.vision_tower_aux",
    "model.patch_mining",
    "model.mm_projector",
    "model.language_model",
    "lm_head",
    "model.language_model.embed_tokens",
    "model.language_model.layers.1",
    "model.vision_tower.encoder.layers.1",
    "model.vision_tower_aux.vision_stages.2",
    "model.patch_mining.vlm_uni_aux_projector",
]


@pytest.fixture(autouse=True)
def quick(one_thread):
    """One thread for every test, because all models here are tiny."""


@pytest.fixture(params=["mgm-llama", "mgm-gemma", "mgm-llama-hd"])
def found(request):
    return family(request.param)


def on_disk(found, folder, *parts):
    return load(found, folder, {"": "cpu", **dict.fromkeys(parts, "disk")})


def load(found, folder, device_map, **options):
    return MiniGeminiForConditionalGeneration.from_pretrained(
        found.folder, template=found.processor.template, device_map=device_map, offload_folder=folder, **options
    )


def assert_answers_as(pipeline, found, *, explained=False):
    """Asserts that everything a pipeline does agrees with the model in place."""
    expected = found.pipeline()
    assert pipeline.device == torch.device("cpu") == pipeline.model.device
    assert relative_error(pipeline.see(found.pictures[0]), expected.see(found.pictures[0])) <= IMAGE_TOKENS
    first, again = (
        pipeline.chat(question, images, max_new_tokens=4)
        for question, images in ((QUESTION, [found.pictures[0]]), ("And?", None))
    )
    own, own_again = (
        expected.chat(question, images, max_new_tokens=4)
        for question, images in ((QUESTION, [found.pictures[0]]), ("And?", None))
    )
    assert (first.token_ids, again.token_ids) == (own.token_ids, own_again.token_ids)
    if pipeline.backend != "reference":
        # The first turn's keys and values are still in the cache.
        assert again.cached_tokens == own_again.cached_tokens > 0
    if explained:
        ours, theirs = (p.explain(found.pictures[0], QUESTION, max_new_tokens=2) for p in (pipeline, expected))
        torch.testing.assert_close(ours.weights, theirs.weights, rtol=0, atol=5e-6)
        torch.testing.assert_close(ours.relevance, theirs.relevance, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_each_part_on_disk(found, part, tmp_path):
    model = on_disk(found, tmp_path, part)
    meta = {name for name, p in model.named_parameters() if p.is_meta}
    others = {name for name in meta if not name.startswith(f"{part}.")}
    if found.model.config.tie_word_embeddings:
        # A tied head lies in the same place as the embeddings.
        assert bool(meta) == (part != "lm_head") and others <= {"lm_head.weight"}
    else:
        assert meta and not others, "exactly that part is meant to be offloaded"
    assert_answers_as(Pipeline(model, found.processor), found, explained=found.name == "mgm-llama")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("part", ["model.vision_tower", "model.vision_tower_aux", "model.patch_mining", "lm_head"])
def test_by_each_backend(part, backend, tmp_path):
    found = family("mgm-llama")
    assert_answers_as(Pipeline(on_disk(found, tmp_path, part), found.processor, backend=backend), found)


@pytest.mark.slow
def test_all_on_disk(found, tmp_path):
    assert_answers_as(Pipeline(load(found, tmp_path, {"": "disk"}), found.processor), found, explained=True)


def test_as_little_memory_as_a_machine_may_have(found, tmp_path):
    """accelerate's own choice of places under tight memory limits gives the same answers."""
    model = load(found, tmp_path, "auto", max_memory={"cpu": 1_500_000})
    assert {"cpu", "disk"} >= set(model.hf_device_map.values()) > {"cpu"}
    assert_answers_as(Pipeline(model, found.processor), found)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_each_part_in_memory_beside_the_device(part):
    """Weights are brought to the execution device for every call, as `device_map` with "cpu" beside a GPU does it."""
    found = family("mgm-llama")
    model = MiniGeminiForConditionalGeneration.from_pretrained(found.folder, template=found.processor.template)
    accelerate.cpu_offload(model.get_submodule(part), execution_device="cpu")
    assert any(p.is_meta for p in model.parameters())
    assert_answers_as(Pipeline(model, found.processor), found, explained=True)


def test_a_batch_a_stream_and_transformers_own_loop(tmp_path):
    found = family("mgm-llama")
    model = load(found, tmp_path, {"": "disk"})
    pipeline, expected = Pipeline(model, found.processor), found.pipeline()
    questions = [(QUESTION, [found.pictures[0]]), "Hello there", (QUESTION, [found.pictures[1]])]
    answers = [p.chat_batch(questions, max_new_tokens=4, progress=False) for p in (pipeline, expected)]
    assert [a.token_ids for a in answers[0]] == [a.token_ids for a in answers[1]]
    texts = [
        "".join(p.chat(QUESTION, [found.pictures[0]], max_new_tokens=4, stream=True)) for p in (pipeline, expected)
    ]
    assert texts[0] == texts[1]
    sampled = [
        p.chat("And?", max_new_tokens=4, temperature=1.0, seed=3, profile=True).token_ids for p in (pipeline, expected)
    ]
    assert sampled[0] == sampled[1]
    inputs = found.processor(text=f"<image>\n{QUESTION}", images=found.pictures[0], return_tensors="pt")
    for options in ({}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}):
        ids = [
            m.generate(**inputs, max_new_tokens=4, do_sample=False, **options).tolist() for m in (model, found.model)
        ]
        assert ids[0] == ids[1]


def test_parts_that_stay_keep_their_fast_path(tmp_path):
    """accelerate's hooks around parts that are not offloaded only move tensors, so their weights may still be read."""
    found = family("mgm-llama")
    model = on_disk(found, tmp_path, "lm_head")
    assert vars(model.model.patch_mining.vlm_uni_query_projector[1]).keys() >= {"forward", "_hf_hook"}
    assert not any(
        isinstance(p, mg_fast.ops.reference.CalledProjection) for p in model.model.patch_mining.projections()
    )
    pipeline = Pipeline(model, found.processor)
    pipeline.see(found.pictures[0])
    assert "towers packed" in pipeline.first_use


def test_a_whole_number_of_layers_is_not_taken_for_a_longer_one(tmp_path):
    """`layers.1` does not match `layers.10`, although transformers treats names in a device map as prefixes."""
    found = family("mgm-llama")
    model = on_disk(found, tmp_path, "model.vision_tower")
    assert not any(p.is_meta for p in model.model.vision_tower_aux.parameters())
    assert all(p.is_meta for p in model.model.vision_tower.parameters())


def test_logits_that_are_not_finite_are_told_of_offloaded_layers(tmp_path):
    found = family("mgm-llama")
    model = on_disk(found, tmp_path, "model.language_model.layers.1")
    model.model.language_model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * torch.nan)
    with pytest.raises(FloatingPointError, match="layers 1 to 1 .*the weights of layer 1 are offloaded"):
        Pipeline(model, found.processor).chat("Hello", max_new_tokens=2)


@pytest.mark.parametrize("with_folder", [True, False], ids=["offload folder", "no folder"])
def test_towers_from_folders_of_their_own(tmp_path, with_folder):
    found = family("mgm-llama")
    folder = without_towers(found.folder, tmp_path / "checkpoint")
    for tower in ("openai", "openclip-convnext-large-d-320-tiny"):
        shutil.copytree(found.folder / tower, folder / tower)
    device_map = {"": "cpu", "model.vision_tower": "disk", "model.vision_tower_aux": "disk"}
    offload = {"offload_folder": tmp_path / "offload"} if with_folder else {}
    model = MiniGeminiForConditionalGeneration.from_pretrained(
        folder, device_map=device_map, template=found.processor.template, **offload
    )
    assert all(p.is_meta for p in model.model.vision_tower.parameters())
    assert_answers_as(Pipeline(model, found.processor), found)


def test_a_saved_copy_is_whole(tmp_path):
    found = family("mgm-llama")
    model = on_disk(found, tmp_path / "offload", "model.patch_mining", "lm_head")
    model.save_pretrained(tmp_path / "saved")
    again = MiniGeminiForConditionalGeneration.from_pretrained(tmp_path / "saved")
    state = found.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_execution_device():
    layer = torch.nn.Linear(2, 2)
    assert execution_device(layer) == torch.device("cpu")
    accelerate.cpu_offload(layer, execution_device="cpu")
    assert layer.weight.is_meta and execution_device(layer) == torch.device("cpu")
    assert execution_device(torch.nn.Identity()) == torch.device("cpu")


@pytest.mark.parametrize(
    "given, complete",
    [
        ({"": "cpu"}, {"": "cpu"}),
        ({"": "cpu", "head": "disk"}, {"body": "cpu", "head": "disk"}),
        ({"": 0, "body.tower": "disk"}, {"body.tower": "disk", "body.tower_aux": 0, "body.layers": 0, "head": 0}),
        (
            {"body": 0, "head": 1, "body.layers.1": "cpu"},
            {"body.tower": 0, "body.tower_aux": 0, "body.layers.1": "cpu", "body.layers.10": 0, "head": 1},
        ),
        ({"body.layers.1": 0}, {"body.layers.1": 0}),
    ],
)
def test_device_maps_without_entries_inside_each_other(given, complete):
    names = [
        "body.tower.weight",
        "body.tower_aux.stem.weight",
        "body.layers.1.weight",
        "body.layers.10.weight",
        "head.weight",
    ]
    assert complete_device_map(given, names) == complete


def test_a_tied_weight_goes_to_disk_with_its_other_name():
    names, tied = (
        ["body.embedding.weight", "body.layers.weight", "head.weight"],
        {"head.weight": "body.embedding.weight"},
    )
    expected = {"body.embedding": "disk", "body.layers": 0, "head": "disk"}
    assert complete_device_map({"": 0, "body.embedding": "disk"}, names, tied) == expected
    assert complete_device_map({"": 0, "head": "disk"}, names, tied) == {"body": 0, "head": 0}
    assert complete_device_map({"body": 1, "head": 0}, names, tied) == {"body": 1, "head": 0}


def test_a_device_map_of_torch_devices():
    names = ["body.tower.weight", "body.norm.weight", "head.weight"]
    cpu, disk, gpu = torch.device("cpu"), "disk", torch.device("cuda:1")
    assert complete_device_map({"": cpu, "body.norm": disk}, names) == {
        "body.tower": "cpu",
        "body.norm": "disk",
        "head": "cpu",
    }
    found = complete_device_map({"": gpu, "head": torch.device("cuda")}, names)
    assert found == {"body": 1, "head": "cuda"} and not any(
        isinstance(device, torch.device) for device in found.values()
    )
    assert complete_device_map({"": cpu}, names) == {"": "cpu"}


def test_a_norm_on_disk_beside_a_torch_device(tmp_path):
    found = family("mgm-llama")
    model = load(found, tmp_path, {"": torch.device("cpu"), "model.language_model.norm": "disk"})
    pipeline = Pipeline(model, found.processor)
    expected = found.pipeline().chat(QUESTION, [found.pictures[0]], max_new_tokens=3)
    assert pipeline.chat(QUESTION, [found.pictures[0]], max_new_tokens=3).token_ids == expected.token_ids
