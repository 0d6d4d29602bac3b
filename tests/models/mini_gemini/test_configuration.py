"""config.json as it is read and written, the Auto classes, and the towers' geometry from shapes and folders."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlamaConfig

from mg_fast import CheckpointError, MiniGeminiConfig, MiniGeminiForConditionalGeneration, MiniGeminiProcessor
from mg_fast.models.mini_gemini.checkpoint import open_checkpoint, read_config
from mg_fast.models.mini_gemini.geometry import complete_config
from mg_fast.models.tensor_files import TensorInfo
from mg_fast.testing import random_checkpoints as random_checkpoint
from tests.checkpoints import (
    GONE,
    answers,
    copy_small,
    edit_config,
    probe,
    refused,
    remake,
    same_answers,
    tensors_of,
    write_safetensors,
)
from tests.forked_python import LIBRARIES, python
from tests.paths import ROOT

SPELLINGS = {
    "mgm": "llama",
    "mini_gemini": "llama",
    "mgm_gemma": "gemma",
    "mini_gemini_gemma": "gemma",
    "mgm_mixtral": "mixtral",
    "mini_gemini_mixtral": "mixtral",
}


@pytest.fixture(scope="module")
def families(standard, tmp_path_factory):
    """One tiny checkpoint for every text model."""
    folder = tmp_path_factory.mktemp("families")
    built = {kind: random_checkpoint.build(folder / kind, size=f"tiny-{kind}") for kind in ("gemma", "mixtral")}
    return {"llama": standard, **built}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*SPELLINGS, "llama", "gemma", "mixtral"])
def test_every_spelling_of_model_type(families, tmp_path, model_type):
    kind = SPELLINGS.get(model_type, model_type)
    folder = remake(families[kind], tmp_path / "other-name", model_type=model_type)
    model = MiniGeminiForConditionalGeneration.from_pretrained(folder)
    assert MiniGeminiConfig.from_pretrained(folder).text_config.model_type == kind
    assert model.config.text_config.model_type == model.model.language_model.config.model_type == kind
    assert same_answers(model, families[kind])
    template = {"llama": "vicuna_v1", "gemma": "gemma", "mixtral": "mistral_instruct"}[kind]
    assert MiniGeminiProcessor.from_pretrained(folder).template == template


@pytest.mark.parametrize("model_type", ["mgm_mistral", "mini_gemini_mistral", "mistral"])
def test_mistral_of_which_none_was_published(standard, tmp_path, model_type):
    """A Mistral, of which none was published, has tensors with Llama's names, and short prompts give equal numbers."""
    folder = remake(standard, tmp_path, model_type=model_type)
    model = MiniGeminiForConditionalGeneration.from_pretrained(folder)
    assert type(model.model.language_model).__name__ == "MistralModel"
    torch.testing.assert_close(probe(model), answers(standard))
    assert MiniGeminiProcessor.from_pretrained(folder).template == "mistral_instruct"


@pytest.mark.parametrize("model_type", SPELLINGS)
def test_auto_classes(families, tmp_path, model_type):
    source = families[SPELLINGS[model_type]]
    folder = remake(source, tmp_path, model_type=model_type)
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is MiniGeminiConfig
    assert type(AutoProcessor.from_pretrained(folder)) is MiniGeminiProcessor
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is MiniGeminiForConditionalGeneration
    assert same_answers(model, source)
    # Pipelines pass the configuration on. Its towers are still the published ones and must give way to the shapes.
    assert config.vision_config.hidden_size == 1024
    assert same_answers(AutoModelForImageTextToText.from_pretrained(folder, config=config), source)
    assert config.vision_config.hidden_size == 1024, "the caller's configuration was changed"


def test_bare_model_types_stay_transformers_own(standard, tmp_path):
    assert type(AutoConfig.from_pretrained(copy_small(standard, tmp_path, model_type="llama"))) is LlamaConfig


# The orders in which a program may import modules before it uses the Auto classes.
ORDERS = {
    "mg_fast first": "import mg_fast",
    "mg_fast last": "import transformers.models.auto.modeling_auto, transformers.models.auto.processing_auto\n"
    "import mg_fast",
    "mg_fast's own classes between": "from transformers import AutoConfig\n"
    "from mg_fast import MiniGeminiProcessor, load",
}
USE_AUTO = """
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
import sys, torch
folder = sys.argv[1]
print(type(AutoConfig.from_pretrained(folder)).__name__)
print(type(AutoModelForImageTextToText.from_pretrained(folder)).__name__)
print(type(AutoProcessor.from_pretrained(folder)).__name__)
"""


def words_of(done):
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_in_a_fresh_process(standard, order):
    printed = words_of(python("-c", ORDERS[order] + USE_AUTO, standard, imported=LIBRARIES))
    assert printed == ["MiniGeminiConfig", "MiniGeminiForConditionalGeneration", "MiniGeminiProcessor"]


def test_importing_mg_fast_imports_nothing_heavy():
    code = "import mg_fast, sys; dir(mg_fast); print(*sorted({'torch', 'transformers', 'triton'} & sys.modules.keys()))"
    assert words_of(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)) == []


def test_towers_from_the_shapes_alone(standard, hd):
    for folder in (standard, hd):
        config = open_checkpoint(folder).config
        tensors = tensors_of(folder)
        clip = config.vision_config
        prefix = "model.vision_tower.vision_tower.vision_model."
        assert clip.hidden_size == tensors[prefix + "pre_layrnorm.weight"].numel() == 64
        assert clip.intermediate_size == tensors[prefix + "encoder.layers.0.mlp.fc1.bias"].numel() == 96
        assert (clip.num_hidden_layers, clip.patch_size, clip.image_size) == (3, 14, 70)
        assert (clip.num_attention_heads, clip.hidden_act, clip.layer_norm_eps) == (1, "quick_gelu", 1e-5)
        assert config.vision_config_aux == {"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "norm_eps": 1e-6}


def table(config, folder):
    shapes = MiniGeminiForConditionalGeneration.published_shapes(config)
    return {name: TensorInfo(folder / "model.safetensors", name, shape) for name, shape in shapes.items()}


def test_published_towers_from_their_shapes(tmp_path):
    """A configuration that starts with wrong towers ends with CLIP ViT-L/14-336 and ConvNeXt-L, by shapes alone.

    The shapes are those of the real size.
    """
    tensors = table(random_checkpoint.make_config("2b", hd=True), tmp_path)
    config = MiniGeminiConfig(image_size_aux=1536, image_grid=2, image_global=True)
    tiny = random_checkpoint.make_config("tiny")
    config.vision_config, config.vision_config_aux = tiny.vision_config, tiny.vision_config_aux
    complete_config(config, tensors, tmp_path)
    clip = config.vision_config
    assert (clip.hidden_size, clip.intermediate_size, clip.num_hidden_layers, clip.num_attention_heads) == (
        1024,
        4096,
        24,
        16,
    )
    assert (clip.patch_size, clip.image_size, clip.hidden_act, clip.layer_norm_eps) == (14, 336, "quick_gelu", 1e-5)
    assert config.vision_config_aux == {"dims": [192, 384, 768, 1536], "depths": [3, 3, 27, 3], "norm_eps": 1e-6}
    assert (config.tokens_per_view, config.views, config.tokens_per_picture) == (576, 5, 2880)
    assert MiniGeminiConfig().tokens_per_picture == 576


def test_norm_eps_of_the_convnext(standard, tmp_path):
    towers = dict(
        vision_config_aux={"dims": [384, 768, 1536, 3072], "depths": [3, 4, 30, 3], "norm_eps": 1e-5},
        mm_hidden_size_aux=5760,
    )
    config = MiniGeminiConfig(mm_hidden_size_aux=5760)
    complete_config(config, table(MiniGeminiConfig(**towers, num_hidden_layers=1, vocab_size=8), tmp_path), tmp_path)
    assert config.vision_config_aux == towers["vision_config_aux"]

    folder = remake(standard, tmp_path / "here", mm_vision_tower_aux="openclip-convnext")
    (folder / "openclip-convnext").mkdir()
    (folder / "openclip-convnext" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"vision_cfg": {"timm_model_kwargs": {"norm_eps": 1e-3}}}})
    )
    model = MiniGeminiForConditionalGeneration.from_pretrained(folder)
    assert model.model.vision_tower_aux.vision_stages[0].blocks[0].norm.eps == 1e-3
    assert not same_answers(model, standard)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint whose CLIP tower is 128 wide and has 4 heads.

    That is more than width/64, so only a tower folder can tell.
    """
    clip = dict(random_checkpoint.TINY_TOWERS["clip"], hidden_size=128, num_attention_heads=4)
    size = ("mgm", random_checkpoint.LLM_TINY, {**random_checkpoint.TINY_TOWERS, "clip": clip})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_checkpoint.SIZES, "wide", size)
        folder = random_checkpoint.build(tmp_path_factory.mktemp("wide"), size="wide")
        edit_config(folder, mm_vision_tower="model_zoo/OpenAI/clip-wide")
        return folder, random_checkpoint.make_model(random_checkpoint.make_config("wide"))


def heads(folder):
    return open_checkpoint(folder).config.vision_config.num_attention_heads


def tower_folder(path, nested=False):
    path.mkdir(parents=True)
    clip = {
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-4,
    }
    # The published folder holds the configuration of the whole CLIP.
    text = {"model_type": "clip", "text_config": {"num_attention_heads": 2}, "vision_config": clip} if nested else clip
    (path / "config.json").write_text(json.dumps(text))
    return path


def test_heads_are_width_over_64_where_nothing_tells(wide):
    folder, true = wide
    assert true.config.vision_config.num_attention_heads == 4
    assert heads(folder) == 2
    assert not same_answers(MiniGeminiForConditionalGeneration.from_pretrained(folder), true)


@pytest.mark.parametrize("nested", [False, True], ids=["vision config", "whole CLIP config"])
@pytest.mark.parametrize("place", ["checkpoint/model_zoo/OpenAI/clip-wide", "checkpoint/clip-wide", "clip-wide"])
def test_heads_from_a_tower_folder_beside_the_checkpoint(wide, tmp_path, place, nested):
    folder = remake(wide[0], tmp_path / "checkpoint")
    assert heads(folder) == 2
    tower_folder(tmp_path / place, nested)
    clip = open_checkpoint(folder).config.vision_config
    assert (clip.num_attention_heads, clip.hidden_act, clip.layer_norm_eps) == (4, "gelu", 1e-4)


def test_heads_from_the_working_directory(wide, tmp_path, monkeypatch):
    folder, true = wide
    tower = tower_folder(tmp_path / "model_zoo" / "OpenAI" / "clip-wide")
    edit = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    (tower / "config.json").write_text(json.dumps({**json.loads((tower / "config.json").read_text()), **edit}))
    assert heads(folder) == 2
    monkeypatch.chdir(tmp_path)
    assert heads(folder) == 4
    model = MiniGeminiForConditionalGeneration.from_pretrained(folder)
    assert same_answers(model, true)

    # A saved copy no longer needs the tower folder, and its own settings override another folder's.
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(ROOT)
    assert same_answers(MiniGeminiForConditionalGeneration.from_pretrained(tmp_path / "saved"), true)
    tower_folder(tmp_path / "saved" / "clip-wide")
    assert open_checkpoint(tmp_path / "saved").config.vision_config.hidden_act == "quick_gelu"


def test_broken_tower_folders(wide, tmp_path):
    folder = remake(wide[0], tmp_path / "checkpoint", mm_vision_tower_aux="openclip")
    clip = tower_folder(folder / "clip-wide") / "config.json"
    whole = clip.read_text()
    for text in ("{", "[]", '{"num_attention_heads": "four"}'):
        clip.write_text(text)
        refused(folder, r"clip-wide/config\.json")
    clip.write_text(whole)
    (folder / "openclip").mkdir()
    for text in ("{", "[]", '{"model_cfg": null}'):
        (folder / "openclip" / "open_clip_config.json").write_text(text)
        refused(folder, r"openclip/open_clip_config\.json")


def test_every_key_survives():
    """Training leftovers, nulls, unknown keys and the two keys that transformers now spells otherwise survive."""
    given = {
        "model_type": "mgm",
        "architectures": ["MGMLlamaForCausalLM"],
        "hidden_size": 64,
        "num_attention_heads": 4,
        "rope_theta": 5e5,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "drop_path": True,
        "mm_projector_lr": None,
        "tune_mm_mlp_adapter": False,
        "image_grid_pinpoints": None,
        "pad_token_id": 0,
        "eos_token_id": [7, 9],
        "tokenizer_padding_side": "right",
        "somebody's": {"own": [1, 2]},
    }
    config = MiniGeminiConfig(**given)
    written = json.loads(config.to_json_string())
    assert {key: written.get(key, "missing") for key in given} == given
    assert config.dtype == torch.bfloat16 and config.text_config.rope_parameters["rope_theta"] == 5e5
    again = MiniGeminiConfig(**written)
    assert json.loads(again.to_json_string()) == written
    assert "rope_parameters" not in written and "text_config" not in written and "dtype" not in written


def test_rope_scaling_survives(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = MiniGeminiConfig(rope_scaling=scaling, rope_theta=5e5)
    assert config.text_config.rope_parameters["rope_type"] == "llama3"
    written = config.to_dict()
    assert (written["rope_scaling"], written["rope_theta"]) == (scaling, 5e5)
    config.save_pretrained(tmp_path)
    assert MiniGeminiConfig.from_pretrained(tmp_path).text_config.rope_parameters == {**scaling, "rope_theta": 5e5}


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_gemma_has_the_activation_of_the_file(activation):
    """transformers from 5.18 on takes `gelu` for the tanh approximation, which the original does not."""
    config = MiniGeminiConfig(model_type="mgm_gemma", hidden_act=activation)
    assert config.text_config.hidden_act == config.to_dict()["hidden_act"] == activation
    nested = MiniGeminiConfig(model_type="mgm_gemma", text_config={"model_type": "gemma", "hidden_act": activation})
    assert nested.text_config.hidden_act == activation


def test_only_gemma_ties_unless_told():
    assert MiniGeminiConfig(model_type="mgm_gemma").tie_word_embeddings is True
    assert MiniGeminiConfig(model_type="mgm_gemma", tie_word_embeddings=False).text_config.tie_word_embeddings is False
    assert MiniGeminiConfig(model_type="mgm").tie_word_embeddings is False
    assert MiniGeminiConfig(model_type="mgm", tie_word_embeddings=True).text_config.tie_word_embeddings is True


# Contents of a config.json, and the error that answers each.
REFUSED = {
    "EVA tower": (dict(mm_vision_tower="model_zoo/lavis/eva_vit_g.pth"), "eva_vit_g.pth.*EVA.*only CLIP"),
    "global view without tiles": (
        dict(image_global=True, image_grid=1),
        "image_global needs image_grid >= 2, got image_grid=1",
    ),
    "start and end tokens": (dict(mm_use_im_start_end=True), "mm_use_im_start_end"),
    "CLS kept": (
        dict(mm_vision_select_feature="cls_patch"),
        "mm_vision_select_feature: expected 'patch', got 'cls_patch'",
    ),
    "no whole window": (dict(image_size_aux=192), "image_size_aux=192 .* 5x5 queries .* multiple of 20 is needed"),
    "no multiple of 4": (dict(image_size_aux=170), "image_size_aux=170 .* multiple of 20 is needed"),
    "no size": (dict(image_size_aux=None), "image_size_aux: expected a whole number above 0, got None"),
    "negative size": (dict(image_size_aux=-160), "image_size_aux: .* got -160"),
    "size in words": (dict(image_size_aux="768"), "image_size_aux: .* got '768'"),
    "unknown template": (
        dict(conversation_template="nope"),
        "conversation_template 'nope': expected one of vicuna_v1, gemma",
    ),
    "no grid": (dict(image_grid=0), "image_grid: expected a whole number above 0, got 0"),
    "LLaVA": (
        dict(image_size_aux=GONE, model_type="llava_llama"),
        "'llava_llama'.* has no image_size_aux: expected a Mini-Gemini",
    ),
    "another model": (dict(model_type="bert"), "'bert' is not a Mini-Gemini one: expected one of mgm"),
    "another projector": (
        dict(mm_projector_type="resampler"),
        "mm_projector_type: expected linear, identity or mlpNx_gelu, got 'resampler'",
    ),
    "CLIP layer too high": (dict(mm_vision_select_layer=4), "mm_vision_select_layer=4, the CLIP tower has 3 layers"),
    "CLIP layer too low": (dict(mm_vision_select_layer=-5), "mm_vision_select_layer=-5, the CLIP tower has 3 layers"),
    "CLIP width": (dict(mm_hidden_size=1024), "mm_hidden_size=1024, the CLIP tower's width is 64"),
    "ConvNeXt widths": (
        dict(mm_hidden_size_aux=2880),
        "mm_hidden_size_aux=2880, the sum of the ConvNeXt stage widths is 80",
    ),
    "width in words": (dict(hidden_size="wide"), r"config\.json .*hidden_size.*expected int, got str"),
    "odd head count": (dict(num_attention_heads=3), r"config\.json .*64.*not a multiple.*3"),
    "no heads": (dict(num_attention_heads=0), r"config\.json"),
    "unknown activation": (dict(hidden_act="nope"), "config.json.*nope"),
    "unknown rope": (dict(rope_scaling={"rope_type": "nope", "factor": 2.0}), "config.json.*nope"),
    "unknown dtype": (dict(torch_dtype="float7"), "config.json.*float7"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(standard, tmp_path, what):
    changes, message = REFUSED[what]
    refused(remake(standard, tmp_path, **changes), message)


@pytest.mark.parametrize(
    "text,message", [("{", "not valid JSON"), ("[]", "expected a JSON object, got list"), ("\xff", "not valid JSON")]
)
def test_broken_config_file(standard, tmp_path, text, message):
    folder = remake(standard, tmp_path)
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(folder, rf"config\.json.*{message}")
    with pytest.raises(CheckpointError, match=message):
        MiniGeminiProcessor.from_pretrained(folder)


def test_processor_refuses_what_the_model_refuses(standard, tmp_path):
    for what in ("EVA tower", "global view without tiles", "no whole window", "LLaVA", "CLIP width", "width in words"):
        changes, message = REFUSED[what]
        with pytest.raises(CheckpointError, match=message):
            MiniGeminiProcessor.from_pretrained(remake(standard, tmp_path / what, **changes))


@pytest.mark.parametrize(
    "path", ["/home/eva/model_zoo/OpenAI/clip-vit-large-patch14-336", "model_zoo/ShareGPT4V/lavis-clip"]
)
def test_eva_may_stand_elsewhere_in_clips_path(standard, tmp_path, path):
    """EVA may occur in CLIP's path, because the original looks for `openai` and `ShareGPT4V` before EVA."""
    folder = remake(standard, tmp_path, mm_vision_tower=path)
    assert heads(folder) == 1


@pytest.mark.parametrize("kind,layers", [("linear", 0), ("mlp1x_gelu", 1), ("mlp3x_gelu", 3)])
def test_other_projectors(standard, tmp_path, kind, layers):
    names = [f"{2 * i}." for i in range(layers)] or [""]
    tensors = {name: tensor for name, tensor in tensors_of(standard).items() if "mm_projector" not in name}
    for name in names:
        tensors[f"model.mm_projector.{name}weight"] = torch.randn(64, 64)
        tensors[f"model.mm_projector.{name}bias"] = torch.randn(64)
    folder = write_safetensors(copy_small(standard, tmp_path, mm_projector_type=kind), tensors)
    projector = MiniGeminiForConditionalGeneration.from_pretrained(folder).model.mm_projector
    hidden = features = torch.randn(2, 64)
    for i, name in enumerate(names):
        hidden = torch.nn.functional.gelu(hidden) if i else hidden
        hidden = hidden @ tensors[f"model.mm_projector.{name}weight"].T + tensors[f"model.mm_projector.{name}bias"]
    torch.testing.assert_close(projector(features), hidden)


def test_absent_keys_mean_what_the_original_takes_them_for(standard, tmp_path):
    folder = remake(standard, tmp_path, image_aspect_ratio=GONE, tokenizer_model_max_length=GONE)
    config = read_config(folder)
    assert config.image_aspect_ratio is None and config.tokenizer_model_max_length is None
    assert MiniGeminiProcessor.from_pretrained(folder).image_processor.pad is False
    refused(remake(standard, tmp_path / "projector", mm_projector_type=GONE), r"missing: model\.mm_projector\.bias")
    refused(remake(standard, tmp_path / "layer", mm_vision_select_layer=GONE), "has no mm_vision_select_layer")


@pytest.mark.parametrize(
    "keys,text",
    [
        (dict(model_type=None, architectures=["MGMGemmaForCausalLM"]), "gemma"),
        (dict(model_type="mgm", architectures=["MGMMixtralForCausalLM"]), "mixtral"),
        (dict(model_type="mini_gemini", architectures=["MiniGeminiGemmaForCausalLM"]), "gemma"),
        (dict(model_type="mgm", architectures=["MGMLlamaForCausalLM"]), "llama"),
        (dict(model_type="mgm_gemma", architectures=None), "gemma"),
    ],
)
def test_architectures_speak_where_model_type_is_silent_or_general(keys, text):
    config = MiniGeminiConfig(**keys)
    assert config.text_config.model_type == text


def test_neither_model_type_nor_known_architectures():
    with pytest.raises(CheckpointError, match="no model_type"):
        MiniGeminiConfig(architectures=["BertModel"])


def test_spellings_come_back_as_they_were():
    given = dict(model_type="mini_gemini_gemma", architectures=["MiniGeminiGemmaForCausalLM"])
    assert MiniGeminiConfig(**given).to_dict().items() >= given.items()
