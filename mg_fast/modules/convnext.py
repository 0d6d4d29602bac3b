"""The high-resolution tower, a ConvNeXt that returns its stage maps, and its packed copy for inference."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..ops import backend as backends
from ..ops.operation import Operation, register
from ..runtime.recording import recorded_as
from ..runtime.weights import Fingerprint, why_more_than_weights
from . import convnext_channels_last as convnext


class ConvNeXtPyramid(nn.Module):
    """The high-resolution tower: a ConvNeXt trunk that returns its four stage maps.

    Its state_dict keys are those of published checkpoints: `vision_stem.*`, `vision_stages.*`.
    """

    def __init__(self, stem: nn.Module, stages: nn.Module):
        super().__init__()
        self.vision_stem = stem
        self.vision_stages = stages

    @classmethod
    def from_timm(cls, trunk: nn.Module) -> "ConvNeXtPyramid":
        """Takes the stem and stages of a timm ConvNeXt; a head, if there is one, is left out.

        Raises:
            ValueError: the trunk is not a timm ConvNeXt of the first version; the message says what it has instead.
        """
        from timm.models.convnext import ConvNeXt

        if not isinstance(trunk, ConvNeXt):
            raise ValueError(f"ConvNeXtPyramid: expected a timm ConvNeXt, got {type(trunk).__name__}")
        if reason := unsuited_stem(trunk.stem):
            raise ValueError(f"ConvNeXtPyramid: {reason}")
        for i, stage in enumerate(trunk.stages):
            if reason := unsuited_stage(stage) or _stochastic(stage):
                raise ValueError(f"ConvNeXtPyramid: stages.{i}: {reason}")
        return cls(trunk.stem, trunk.stages)

    @classmethod
    def from_dims(cls, dims: Sequence[int], depths: Sequence[int], norm_eps: float = 1e-6) -> "ConvNeXtPyramid":
        """A tower of these stage widths and depths, with timm's own initialisation of weights.

        On the meta device the initialisation is left out, as there are no values to set.
        """
        from timm.models.convnext import ConvNeXt

        sizes = dict(dims=tuple(dims), depths=tuple(depths), norm_eps=norm_eps)
        with _NoFillingOnMeta():
            return cls.from_timm(ConvNeXt(**sizes, num_classes=0, global_pool="", drop_path_rate=0.0))

    def _forward_by_modules(self, pixels: torch.Tensor, backend: str | None = None) -> list[torch.Tensor]:
        x = self.vision_stem(pixels.to(self.vision_stem[0].weight.dtype))
        pyramid = []
        for stage in self.vision_stages:
            x = stage(x)
            # This is a view, not a copy.
            pyramid.append(x.permute(0, 2, 3, 1))
        return pyramid

    @recorded_as(_forward_by_modules)
    def forward(self, pixels: torch.Tensor, *, backend: str | None = None) -> list[torch.Tensor]:
        """Pictures [B, 3, HR, HR] to stage maps [B, HR / 4 / 2**s, HR / 4 / 2**s, C_s], channels last, s = 0..3.

        The `reference` backend runs timm's modules in NCHW, as the original does. The others do the same arithmetic on
        channels-last maps, if the tower computes only what its weights say (`why_more_than_weights`).
        """
        pixels = pixels.to(self.vision_stem[0].weight.dtype)
        form = backends.choose_form(HIGH_RESOLUTION_TOWER, backend, pixels.device)
        if form is not _by_modules and self.why_more_than_weights():
            form = _by_modules
        return form(self, pixels, backend)

    def why_more_than_weights(self) -> str | None:
        """Why the tower computes something other than its weights say, as a sentence; None where it does not.

        Examples are low-rank adapters, hooks, replaced or quantized layers, and gradient checkpointing. Every backend
        then runs the modules themselves.
        """
        if reason := why_more_than_weights(self, _known_layers(), placed=True) or unsuited_stem(self.vision_stem):
            return reason
        for i, stage in enumerate(self.vision_stages):
            if stage.grad_checkpointing:
                return f"vision_stages.{i} has its gradient checkpointing on"
            if reason := unsuited_stage(stage) or _stochastic(stage):
                return f"vision_stages.{i}: {reason}"
        return None

    def pack(self) -> "PackedPyramid":
        """A frozen copy for inference: layer scale is folded in once, convolution weights are as the kernels read them.

        Raises:
            ValueError: the tower computes something other than its weights say; the message says what.
        """
        return PackedPyramid(self)

    def read(self) -> tuple[convnext.DownsampleTensors, list[convnext.StageTensors]]:
        """The tower's tensors as they are now, with layer scale folded in."""
        return convnext.read_tower(self.vision_stem, self.vision_stages)


class PackedPyramid:
    """A snapshot of a ConvNeXtPyramid for inference; `ConvNeXtPyramid.pack` makes one.

    It is called as the tower is. The contractions' and convolutions' weights are copies, half of the tower's memory. On
    a GPU, in 16 bits and where the library multiplies, the expansions' weights are copies, too, with eight more rows:
    then the library adds to the map without a pass of its own (`ops.torch.pointwise`). All other tensors are shared
    with the tower, so a call raises an error once any of its weights was changed in place. Writes through `.data` do
    not count as changes, and hooks or adapters that are added later are not seen: pack again.
    """

    def __init__(self, tower: ConvNeXtPyramid):
        if reason := tower.why_more_than_weights():
            raise ValueError(f"PackedPyramid: {reason}")
        with torch.no_grad():
            self._stem, self._stages = tower.read()
            weight = self._stem.weight
            by_library = backends.choose("linear_residual", None, weight.device) == "torch"
            if by_library and weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):
                self._stages = convnext.widened(self._stages)
        self._packed = Fingerprint([tower])

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, *, backend: str | None = None) -> list[torch.Tensor]:
        """Pictures [B, 3, HR, HR] to stage maps, as in `ConvNeXtPyramid`, without gradients.

        Raises:
            RuntimeError: the tower's weights were changed since they were packed.
        """
        if not torch.compiler.is_compiling():
            self.check_unchanged()
        return convnext.run_tower(self._stem, self._stages, pixels.to(self._stem.weight.dtype), backend)

    def check_unchanged(self) -> None:
        """Raises RuntimeError if the tower's weights were changed since they were packed."""
        if self._packed.weights_written():
            raise RuntimeError("PackedPyramid: the tower's weights were changed since it was packed: pack it again")


class _NoFillingOnMeta(TorchFunctionMode):
    """Within it, operations that fill a tensor in place do nothing to tensors of the meta device.

    They have no values, but torch would decompose each of timm's fillings into many operations on them: 60 ms for the
    smallest tower, at every loading of a checkpoint.
    """

    NAMES = frozenset({"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "zero_", "fill_"})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if args and getattr(func, "__name__", "") in self.NAMES and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def _known_layers() -> frozenset[type]:
    from timm.layers import LayerNorm, LayerNorm2d, Mlp
    from timm.layers.activations import GELU
    from timm.models.convnext import ConvNeXtBlock, ConvNeXtStage

    layers = {nn.Conv2d, nn.Linear, LayerNorm, LayerNorm2d, GELU, nn.GELU, nn.Dropout, nn.Identity}
    return frozenset(layers | {nn.Sequential, ConvNeXtStage, ConvNeXtBlock, Mlp, ConvNeXtPyramid})


def unsuited_stem(stem: nn.Module) -> str | None:
    """Why a timm stem is not the stem of a ConvNeXt of the first version, as a sentence; None where it is."""
    if [type(layer).__name__ for layer in stem] != ["Conv2d", "LayerNorm2d"]:
        kinds = ", ".join(type(layer).__name__ for layer in stem)
        return f"expected a stem of one convolution and a LayerNorm, got {kinds}"
    return _overlapping(stem[0])


def unsuited_stage(stage: nn.Module) -> str | None:
    """Why a timm stage is not one of a ConvNeXt of the first version, as a sentence.

    None where it is one, or is one in eval mode.
    """
    if any("grn" in block.mlp._modules for block in stage.blocks):
        return "expected a ConvNeXt of the first version, got one with GlobalResponseNorm (V2)"
    if not isinstance(stage.downsample, nn.Identity):
        if len(stage.downsample) != 2:
            return f"downsample: expected a LayerNorm and a convolution, got {len(stage.downsample)} layers"
        norm, conv = stage.downsample
        if reason := _no_layer_norm(norm) or _overlapping(conv):
            return f"downsample: {reason}"
    for i, block in enumerate(stage.blocks):
        if reason := _unsuited_block(block):
            return f"blocks.{i}: {reason}"
    return None


def _stochastic(stage: nn.Module) -> str | None:
    if any(type(m).__name__ == "DropPath" for m in stage.modules()):
        return "build the trunk with drop_path_rate=0: the tower is deterministic by definition"
    if any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in stage.modules()):
        return "it has an active Dropout: the tower is deterministic by definition"
    return None


def _unsuited_block(block: nn.Module) -> str | None:
    conv, activation = block.conv_dw, block.mlp.act
    if (conv.kernel_size, conv.stride, conv.padding, conv.dilation) != ((7, 7), (1, 1), (3, 3), (1, 1)) or (
        conv.groups != len(conv.weight) or conv.padding_mode != "zeros"
    ):
        return f"expected a 7x7 depthwise convolution with padding 3, got {conv}"
    # timm's own GELU ignores its argument and is always exact.
    exact = type(activation).__name__ == "GELU" and getattr(activation, "approximate", "none") == "none"
    if not exact:
        return f"expected the exact GELU, got {activation}"
    if not isinstance(block.shortcut, nn.Identity):
        return "expected a plain shortcut, got a downsampling one"
    if not isinstance(block.mlp.norm, nn.Identity):
        return f"expected no norm within the MLP, got {type(block.mlp.norm).__name__}"
    if any(bias is None for bias in (conv.bias, block.mlp.fc1.bias, block.mlp.fc2.bias)):
        return "expected biases, the block has none"
    return _no_layer_norm(block.norm)


def _no_layer_norm(norm: nn.Module) -> str | None:
    if type(norm).__name__ in ("LayerNorm", "LayerNorm2d") and norm.weight is not None and norm.bias is not None:
        return None
    return f"expected LayerNorm with weight and bias, got {norm}"


def _overlapping(conv: nn.Module) -> str | None:
    plain = (conv.kernel_size, conv.padding, conv.dilation, conv.groups) == (conv.stride, (0, 0), (1, 1), 1)
    return (
        None if plain and conv.bias is not None else f"expected a convolution of pixels that do not overlap, got {conv}"
    )


def _by_modules(tower: ConvNeXtPyramid, pixels: torch.Tensor, backend: str | None) -> list[torch.Tensor]:
    return tower._forward_by_modules(pixels)


def _on_channels_last_maps(tower: ConvNeXtPyramid, pixels: torch.Tensor, backend: str | None) -> list[torch.Tensor]:
    """Runs the tower on channels-last maps; its operations choose their own backends, from the one asked for here."""
    return convnext.run_tower(*tower.read(), pixels, backend)


HIGH_RESOLUTION_TOWER = register(
    Operation(
        name="high_resolution_tower",
        forms={"reference": _by_modules, "torch": _on_channels_last_maps, "triton": _on_channels_last_maps},
        auto=("triton", "torch", "reference"),
    )
)
