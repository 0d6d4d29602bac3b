"""Completes a checkpoint's configuration from the headers of its files, for programs that load its weights themselves.

Such a program, a server for instance, needs the geometry of the towers in one process and reads the weights in others.
A folder is checked as a whole. Of a hub id only small files and headers are fetched.
"""

import logging
import os
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import NotASafetensorsRepoError

from ...errors import CheckpointError
from ..tensor_files import ADAPTER_FILE, Table, TensorInfo, read_table, resolve_folder
from .checkpoint import check_names, open_checkpoint
from .configuration import MiniGeminiConfig
from .geometry import CLIP_PREFIX, CONVNEXT_PREFIX, check_geometry, complete_config
from .modeling import MiniGeminiForConditionalGeneration

logger = logging.getLogger(__name__)


def complete_from_headers(config: MiniGeminiConfig, name_or_path: str | os.PathLike, **hub) -> Path:
    """Fills in the geometry of both towers, in place, and checks that the checkpoint can be served.

    Args:
        config: the configuration of the checkpoint.
        name_or_path: its folder or hub id.
        **hub: `revision` and `token`.

    Returns:
        The local folder with its small files.

    Raises:
        CheckpointError: the checkpoint is a stage-1 adapter, is quantized, lacks tensors or holds others, or its shapes
            contradict its configuration.
    """
    folder = resolve_folder(name_or_path, weights=False, **hub)
    if getattr(config, "quantization_config", None) is not None:
        method = config.quantization_config
        method = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", method)
        raise CheckpointError(
            f"{name_or_path} is quantized ({getattr(method, 'value', method)}, by quantization_config in its "
            "config.json): expected a checkpoint with plain weights"
        )
    if os.path.isdir(name_or_path):
        if (folder / ADAPTER_FILE).is_file() and not read_table(folder, partial=True):
            raise CheckpointError(
                f"{folder} holds a stage-1 adapter ({ADAPTER_FILE}) without its language model: expected a whole "
                "checkpoint. Load both with mg_fast (base_model=) and write one with model.save_pretrained(folder)"
            )
        checkpoint = open_checkpoint(folder, config=config)
        check_geometry(config, folder)
        expected = MiniGeminiForConditionalGeneration.published_shapes(config)
        check_names(expected, checkpoint.tensors, tied=config.tie_word_embeddings, where=folder)
        return folder
    tensors = read_table(folder, partial=True)
    if not all(any(name.startswith(prefix) for name in tensors) for prefix in (CLIP_PREFIX, CONVNEXT_PREFIX)):
        tensors |= _fetched_headers(str(name_or_path), folder, **hub)
    complete_config(config, tensors, folder)
    return folder


def _fetched_headers(name: str, folder: Path, **hub) -> Table:
    """The tensors of a hub id's safetensors files, of which only the headers are fetched; empty if there are none."""
    try:
        files = huggingface_hub.get_safetensors_metadata(name, **hub).files_metadata
    except (NotASafetensorsRepoError, OSError) as error:
        logger.warning(
            "the headers of %s cannot be fetched (%s): its towers are taken for the published ones", name, error
        )
        return {}
    return {
        tensor: TensorInfo(folder / file, tensor, tuple(info.shape))
        for file, metadata in files.items()
        for tensor, info in metadata.tensors.items()
    }
