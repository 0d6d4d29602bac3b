"""Maps published tensor names to the parameter names of MiniGeminiForConditionalGeneration."""

from collections.abc import Iterable

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

# Published name and our name; the mapping is reversed on save. Transformers itself fuses Mixtral's experts, within the
# language model.
RENAMINGS = (
    (r"^model.layers.", "^model.language_model.layers."),
    (r"^model.embed_tokens.", "^model.language_model.embed_tokens."),
    (r"^model.norm.", "^model.language_model.norm."),
    (r"^model.vision_tower.vision_tower.vision_model.", "^model.vision_tower."),
    (r"^model.vlm_uni_", "^model.patch_mining.vlm_uni_"),
)
register_checkpoint_conversion_mapping(
    "MiniGeminiForConditionalGeneration",
    [WeightRenaming(source.replace(".", r"\."), target.replace(".", r"\.")) for source, target in RENAMINGS],
    overwrite=True,
)


def published_to_ours(name: str) -> str:
    """The name in `MiniGeminiForConditionalGeneration` of a published tensor, except for Mixtral's experts."""
    return _renamed(name, RENAMINGS)


def ours_to_published(name: str) -> str:
    """The published name of a tensor of `MiniGeminiForConditionalGeneration`, except for Mixtral's experts."""
    return _renamed(name, [(target, source) for source, target in RENAMINGS])


def _renamed(name: str, renamings: Iterable[tuple[str, str]]) -> str:
    """The name with the first beginning that is found exchanged."""
    for before, after in renamings:
        prefix = before.removeprefix("^")
        if name.startswith(prefix):
            return after.removeprefix("^") + name.removeprefix(prefix)
    return name
