"""Compiles, without a GPU, the kernels that an MM-Interleaved launches: in the adapter and in all synchronizers."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch

from ...ops.ahead_of_time import Compiled, check_can_compile, compile_launches
from ...ops.backend import use_backend
from ..tensor_files import resolve_folder
from .adapter import AdapterInteraction
from .clip_adapter import GRID
from .configuration import MAP_SIDES, PICTURE_SIDE, MMInterleavedConfig
from .gated_synchronizer import GatedFeatureSynchronizer
from .packed import PackedGatedFeatureSynchronizer
from .packed_unet_synchronizer import PackedUNetSynchronizer
from .unet_synchronizer import UNetSynchronizer

# Numbers of pictures in a context: a kernel serves all numbers up to the next power of two.
PICTURES = (1, 2, 4, 8, 12)
# Numbers of positions in a pass: one token, a short prompt and a long one, as the decode loop fills them up.
POSITIONS = (1, 64, 1024)


def model_config(name_or_path: str) -> MMInterleavedConfig:
    """The configuration of a checkpoint folder or hub id. It needs no weights."""
    return MMInterleavedConfig.from_pretrained(resolve_folder(name_or_path, weights=False))


def compile_kernels(
    architectures: Sequence[int],
    dtypes: Sequence[torch.dtype],
    config: MMInterleavedConfig,
    *,
    backend: str = "auto",
) -> Iterator[Compiled]:
    """Fills Triton's cache (TRITON_CACHE_DIR) with the kernels that a model of this configuration launches.

    They serve one conversation, and drawings of one picture with or without guidance. Batches, beams and more pictures
    than `PICTURES` may need other kernels, which the first launch compiles.

    Args:
        architectures: compute capabilities, for instance 90 for sm_90.
        dtypes: of the models' weights.
        config: of the model.
        backend: `auto` or `triton`.

    Yields:
        One `Compiled` per kernel.

    Raises:
        BackendError: this process cannot compile kernels.
    """
    check_can_compile()

    def launch() -> None:
        with use_backend(backend), torch.no_grad():
            launch_adapter(config, dtype)
            launch_language_model(config, dtype)
            launch_drawing(config, dtype)

    for architecture, dtype in itertools.product(architectures, dtypes):
        for name, seconds in compile_launches(launch, architecture):
            yield Compiled(name, architecture, dtype, PICTURE_SIDE, seconds)


def launch_adapter(config: MMInterleavedConfig, dtype: torch.dtype) -> None:
    """Launches what the vision tower's adapter launches for one picture; for use within `compile_only`."""
    width, sides, like = config.image_embed_dim, MAP_SIDES[1:], {"dtype": dtype, "device": "cuda"}
    heads = config.vision_config.num_attention_heads
    with _made_in(dtype):
        interaction = AdapterInteraction(width, len(sides), heads, config.adapter_points)
    patches = torch.empty(1, GRID * GRID, width, **like)
    prior = torch.empty(1, sum(side * side for side in sides), width, **like)
    interaction.injector(patches, prior, GRID, sides)
    interaction.extractor(prior, patches, GRID, sides)


def launch_language_model(config: MMInterleavedConfig, dtype: torch.dtype) -> None:
    """Launches what a synchronizer of the language model launches; for use within `compile_only`.

    The values have the layout that they have among those of all layers.
    """
    like = {"dtype": dtype, "device": "cuda"}
    with _made_in(dtype):
        synchronizer = GatedFeatureSynchronizer(config)
    packed = PackedGatedFeatureSynchronizer(synchronizer)
    points, layers = torch.empty(1, 1, 1, 2, device="cuda"), len(config.synchronized_layers)
    for pictures, positions in itertools.product(PICTURES, POSITIONS):
        values = torch.empty(1, pictures, config.pixels_of_llm, layers * packed.inner_dim, **like)
        hidden = torch.empty(1, positions, config.text_config.hidden_size, **like)
        index = torch.empty(1, positions, pictures, dtype=torch.int64, device="cuda")
        packed(hidden, points, index, values=values.narrow(-1, 0, packed.inner_dim))


def launch_drawing(config: MMInterleavedConfig, dtype: torch.dtype) -> None:
    """Launches what the U-Net's synchronizers launch for one picture; for use within `compile_only`."""
    like = {"dtype": dtype, "device": "cuda"}
    with _made_in(dtype):
        module = UNetSynchronizer(config)
    packed = PackedUNetSynchronizer(module, dtype)
    maps = torch.empty(1, 1, sum(side * side for side in MAP_SIDES), config.image_embed_dim, **like)
    values, index = packed.prepare(maps, None)
    for halves in (1, 2):
        for block, residual in zip(module.blocks, packed.residuals(values, index, halves=halves)):
            residual.function(torch.empty(halves, block.width, block.side, block.side, **like))


@contextlib.contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Within the block, modules are made on a GPU in this dtype. Modules of fake tensors cannot be converted later."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            yield
    finally:
        torch.set_default_dtype(before)
