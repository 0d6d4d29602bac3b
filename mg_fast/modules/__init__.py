"""Drop-in modules with the original's parameter names."""

from .convnext import ConvNeXtPyramid
from .deformable_attention import DeformableAttention
from .patch_mining import PatchInfoMining

__all__ = ["ConvNeXtPyramid", "DeformableAttention", "PatchInfoMining"]
