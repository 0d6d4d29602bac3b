"""Maps published tensor names to the parameter names of MMInterleavedForConditionalGeneration, where they differ."""

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming


def register_names(model_class: type) -> None:
    """Lets transformers rename tensors of published files on loading, and back on saving."""
    renamings = [WeightRenaming("^soi_token", r"^picture_mark\.soi_token")]
    register_checkpoint_conversion_mapping(model_class.__name__, renamings, overwrite=True)
