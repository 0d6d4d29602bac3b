"""Drop-in modules with the original's parameter names."""

from .convnext import ConvNeXtPyramid
from .deformable_attention import DeformableAttention
from .feature_synchronizer import FeatureSynchronizer
from .packed_feature_synchronizer import PackedFeatureSynchronizer
from .patch_mining import PatchInfoMining

__all__ = [
    "ConvNeXtPyramid",
    "DeformableAttention",
    "FeatureSynchronizer",
    "PackedFeatureSynchronizer",
    "PatchInfoMining",
]
