"""Compiles, without a GPU, the kernels that a Mini-Gemini launches: for resizing, high-resolution tower and mining."""

import itertools
from collections.abc import Iterator, Sequence

import torch

from ... import ops
from ...errors import CheckpointError
from ...modules import convnext_channels_last as convnext
from ...ops.ahead_of_time import Compiled, check_can_compile, compile_launches
from ...ops.backend import use_backend
from ...ops.reference import Projection
from .. import builtin
from ..tensor_files import resolve_folder
from .checkpoint import geometry_config
from .configuration import MiniGeminiConfig

# Numbers of pictures per batch. A product of few rows has other tiles than one of many rows; with the second number, no
# published model has few rows.
BATCHES = (1, 64)


def published_configs() -> list[MiniGeminiConfig]:
    """Configurations of the published models, as far as their kernels differ: 768 pixels, and HD."""
    return [
        MiniGeminiConfig(image_size_aux=768),
        MiniGeminiConfig(image_size_aux=1536, image_grid=2, image_global=True),
    ]


def model_config(name_or_path: str) -> MiniGeminiConfig:
    """The configuration of a checkpoint folder, hub id or checkpoint of the package. It needs no weights.

    Raises:
        CheckpointError: there is no checkpoint, or it does not tell the widths of the high-resolution tower.
    """
    config = geometry_config(resolve_folder(builtin.resolve(name_or_path), weights=False))
    dims = config.vision_config_aux["dims"]
    if sum(dims) != config.mm_hidden_size_aux:
        raise CheckpointError(
            f"{name_or_path}: config.json says mm_hidden_size_aux={config.mm_hidden_size_aux} "
            "but does not give the widths that add up to it; "
            f"without vision_config_aux or the tower's tensors they would be {dims}"
        )
    return config


def compile_kernels(
    architectures: Sequence[int],
    dtypes: Sequence[torch.dtype],
    configs: Sequence[MiniGeminiConfig] | None = None,
    *,
    training: bool = False,
    backend: str = "auto",
) -> Iterator[Compiled]:
    """Fills Triton's cache (TRITON_CACHE_DIR) with the kernels that models of these configurations launch.

    Kernels are compiled both for one picture and for many.

    Args:
        architectures: compute capabilities, for instance 90 for sm_90.
        dtypes: of the models' weights.
        configs: MiniGeminiConfigs; by default those of the published models.
        training: compile the kernels of the backward pass too.
        backend: the models' backend: `auto`, or `triton` to include the kernels that `auto` replaces by a library's.

    Yields:
        One `Compiled` per kernel, as soon as it is done.

    Raises:
        BackendError: this process cannot compile kernels.
    """
    check_can_compile()

    def launch() -> None:
        with use_backend(backend):
            launch_resize(config)
            for batch in BATCHES:
                launch_vision(config, dtype, batch=batch, training=training)

    for architecture, dtype, config in itertools.product(
        architectures, dtypes, published_configs() if configs is None else configs
    ):
        for name, seconds in compile_launches(launch, architecture, training=training):
            yield Compiled(name, architecture, dtype, config.image_size_aux, seconds)


def launch_resize(config: MiniGeminiConfig) -> None:
    """Launches the resizing of a decoded picture to both resolutions; for use within `compile_only`.

    The kernels are the same for every picture and model.
    """
    picture = torch.empty(480, 640, 3, dtype=torch.uint8, device="cuda")
    ops.dual_resize(
        picture,
        config.image_size_aux,
        config.vision_config.image_size,
        grid=config.image_grid,
        global_view=config.image_global,
    )


def launch_vision(config: MiniGeminiConfig, dtype: torch.dtype, *, batch: int = 1, training: bool = False) -> None:
    """Launches the high-resolution tower and patch info mining with a model's shapes; for use within `compile_only`.

    The tensors are CUDA tensors and also have the model's layouts.
    """
    dims, like = config.vision_config_aux["dims"], {"dtype": dtype, "device": "cuda", "requires_grad": training}
    width, size = config.vision_config.hidden_size, config.image_size_aux

    def projection(channels: int) -> Projection:
        vector = torch.empty(channels, **like)
        return Projection(vector, vector, torch.empty(width, channels, **like), torch.empty(width, **like))

    queries = torch.empty(batch, config.views, config.tokens_per_view, width, **like)
    pixels = torch.empty(batch, 3, size, size, dtype=dtype, device="cuda")
    with torch.set_grad_enabled(training):
        # One block per stage is enough, because all blocks of a stage are alike.
        pyramid = convnext.run_tower(*convnext.empty_tower(dims, [1] * len(dims), **like), pixels)
        ops.patch_mining(
            queries, pyramid, projection(width), projection(sum(dims)), projection(sum(dims)), grid=config.image_grid
        )
