"""The model that a training starts from, and which of its weights learn.

A stage 1 from a bare language model starts from an adapter that nobody has trained: it is written in the original's
format first, so that every training loads its model in the same way.
"""

import contextlib
import logging
from pathlib import Path

import torch
from torch import nn

from mg_fast import MiniGeminiConfig, MiniGeminiForConditionalGeneration, MiniGeminiProcessor
from mg_fast.models.families import MINI_GEMINI, checkpoint_family
from mg_fast.models.mini_gemini.checkpoint import geometry_config, tower_tensors
from mg_fast.models.mini_gemini.geometry import complete_config
from mg_fast.models.mini_gemini.image_processing import MiniGeminiImageProcessor
from mg_fast.models.mini_gemini.vision import build_projector
from mg_fast.models.tensor_files import ADAPTER_FILE, read_tensors, resolve_folder
from mg_fast.modules import PatchInfoMining
from mg_fast.quantization.stored import UNQUANTIZED

from .config import FULL, QLORA, ConfigError, FineTuneConfig
from .labels import PLAIN

# The products of the language model's layers that adapters are for.
ADAPTED = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj"
# The parts that both stages train.
PICTURE_SIDE = ("patch_mining", "mm_projector")

logger = logging.getLogger(__name__)


def is_checkpoint(model: str) -> bool:
    """Whether a folder or hub id holds a Mini-Gemini, and not a bare language model."""
    return checkpoint_family(resolve_folder(model, weights=False)) == MINI_GEMINI


def source_of(config: FineTuneConfig) -> dict:
    """The arguments by which `from_pretrained` loads the model, apart from how.

    Raises:
        ConfigError: the model is a bare language model, and nothing says where its picture side comes from.
    """
    if config.adapter is not None:
        return {"pretrained_model_name_or_path": config.adapter, "base_model": config.model}
    if is_checkpoint(config.model):
        return {"pretrained_model_name_or_path": config.model}
    if config.stage != 1:
        raise ConfigError(
            f"model: {config.model} is a bare language model; stage 2 needs its stage-1 adapter (adapter:), or a whole "
            "Mini-Gemini checkpoint (model:)"
        )
    return {"pretrained_model_name_or_path": str(untrained_folder(config)), "base_model": config.model}


def untrained_folder(config: FineTuneConfig) -> Path:
    """Where `write_untrained` puts the adapter that stage 1 starts from."""
    return config.output / "untrained"


def write_untrained(config: FineTuneConfig) -> Path:
    """Writes an adapter with random mining and projector, and the towers of the configuration.

    The random weights depend on the seed alone. They are torch's own for these layers, as in the original.

    Raises:
        CheckpointError: a tower is not found, or the language model's configuration cannot be read.
    """
    folder, base = untrained_folder(config), resolve_folder(config.model, weights=False)
    described = MiniGeminiConfig.from_pretrained(base)
    described.mm_vision_tower = config.vision_tower or described.mm_vision_tower
    described.mm_vision_tower_aux = config.vision_tower_aux or described.mm_vision_tower_aux
    table = tower_tensors(described, (), base)
    complete_config(described, table, base, of_base=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        mining = PatchInfoMining(described.mm_hidden_size, described.vision_config_aux["dims"])
        hidden = described.text_config.hidden_size
        projector = build_projector(described.mm_projector_type, described.mm_hidden_size, hidden)
    tensors = {f"model.{name}": tensor for name, tensor in mining.state_dict().items()}
    tensors |= {f"model.mm_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    # Old files of CLIP hold positions as whole numbers, which are no weights.
    tensors |= {name: tensor for name, tensor in read_tensors(table) if tensor.is_floating_point()}
    folder.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, config.dtype)
    torch.save({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / ADAPTER_FILE)
    described.save_pretrained(folder)
    return folder


def load_processor(config: FineTuneConfig, source: dict) -> MiniGeminiProcessor:
    """The processor of the model that is to be written, which sees pictures as the training does."""
    template = None if config.template in (None, PLAIN) else config.template
    processor = MiniGeminiProcessor.from_pretrained(**source, template=template)
    base = source.get("base_model")
    described = geometry_config(
        resolve_folder(source["pretrained_model_name_or_path"], weights=False),
        None if base is None else resolve_folder(base, weights=False),
    )
    set_picture_form(described, config)
    images = MiniGeminiImageProcessor.from_config(described)
    return MiniGeminiProcessor(images, processor.tokenizer, template=processor.template)


def load_model(
    config: FineTuneConfig, source: dict, *, template: str, device: torch.device | None = None, whole: bool = False
) -> MiniGeminiForConditionalGeneration:
    """The model with the settings of the training, in the dtype of its frozen weights.

    Args:
        source: of `source_of`.
        template: the template of its answers, which is saved with it.
        device: where QLoRA's quantized weights go.
        whole: leave QLoRA's weights as they are, to merge its adapters into them.

    Raises:
        BackendError: QLoRA's package is not installed.
        CheckpointError: the model cannot be loaded.
        ConfigError: the package of the attention is not installed.
    """
    options = {}
    if config.method == QLORA and not whole:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=list(UNQUANTIZED),
        )
        options["device_map"] = {"": device}
    try:
        model = MiniGeminiForConditionalGeneration.from_pretrained(
            **source,
            **options,
            dtype=getattr(torch, config.dtype),
            template=template,
            attn_implementation=config.attention,
        )
    except ImportError as error:
        raise ConfigError(f"attention: {config.attention}: {' '.join(str(error).split())}") from None
    set_picture_form(model.config, config)
    return model


def set_picture_form(model_config: MiniGeminiConfig, config: FineTuneConfig) -> None:
    """Sets how pictures are seen, and the trained length, in the model's configuration, which is saved.

    Raises:
        ConfigError: the model is an HD one and the configuration is not.
    """
    if model_config.image_global and not config.hd:
        raise ConfigError("hd: the model is an HD one, so the key must be true")
    model_config.image_aspect_ratio = config.image_mode
    model_config.tokenizer_model_max_length = config.max_length
    if config.hd and not model_config.image_global:
        model_config.image_size_aux *= 2
        model_config.image_grid, model_config.image_global = 2, True


def choose_learning(model: nn.Module, config: FineTuneConfig) -> nn.Module:
    """Lets the weights of the stage learn, in float32, and adds adapters; returns the model to train.

    Raises:
        ConfigError: adapters were asked for and peft is not installed.
    """
    model.requires_grad_(False)
    learning = [getattr(model.model, name) for name in PICTURE_SIDE]
    if config.method == FULL:
        learning += [model.model.language_model, model.lm_head] if config.stage == 2 else []
    elif not config.lora.picture_side:
        learning = []
    tuned = model
    if config.method != FULL:
        tuned = _with_adapters(model, config)
    for part in learning:
        part.requires_grad_(True)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            # In bfloat16 a step would be rounded away where a weight is more than 256 times as large.
            parameter.data = parameter.data.float()
    return tuned


def _with_adapters(model: nn.Module, config: FineTuneConfig) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError(f"method: {config.method} needs the package peft: pip install peft") from None
    lora = config.lora
    # All processes draw the same weights, and so does a run that is repeated. Trainer sets its own seed afterwards.
    torch.manual_seed(config.seed)
    return get_peft_model(
        model, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=ADAPTED)
    )


@contextlib.contextmanager
def loaded_whole(plugin):
    """Within the block, models are loaded whole on every process, and not divided by deepspeed while they are made.

    Weights that a checkpoint keeps in several files could not be filled in otherwise. deepspeed divides them when the
    training begins.

    Args:
        plugin: the deepspeed plugin of the training's arguments, or None.
    """
    if plugin is None or getattr(plugin, "dschf", None) is None:
        yield
        return
    from transformers.integrations import deepspeed

    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(plugin.dschf)
