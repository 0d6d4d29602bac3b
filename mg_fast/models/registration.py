"""Registers families of models with transformers' Auto classes.

The modules `configuration`, `modeling`, `processing` and `tokenization` of a family each call their function at their
end, so it does not matter which import brings them in. The functions import transformers' auto modules only when they
are called, because those modules may be loading at that very moment: see `mg_fast.integrations.transformers_auto`.
"""


def register_configuration(config_class: type, model_types) -> None:
    """Lets AutoConfig read a config.json with one of these model types."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for model_type in model_types:
        CONFIG_MAPPING.register(model_type, config_class, exist_ok=True)


def register_model(config_class: type, model_class: type) -> None:
    """Lets the Auto classes build the model, and tells the other parts of transformers what the model can do."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        AutoModelForImageTextToText,
    )

    AutoModelForImageTextToText.register(config_class, model_class, exist_ok=True)
    # Other parts of transformers look models up in these tables of class names, which `register` does not fill. With
    # the first one, Trainer shifts the labels for its label smoothing, which would otherwise be compared with the wrong
    # positions. From the second one, `transformers serve` learns that the model takes pictures.
    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        names[config_class.model_type] = model_class.__name__


def register_processor(config_class: type, processor_class: type) -> None:
    """Lets AutoProcessor find the processor of a checkpoint."""
    from transformers.models.auto.processing_auto import AutoProcessor

    AutoProcessor.register(config_class, processor_class, exist_ok=True)


def register_tokenizer(config_class: type, tokenizer_class: type) -> None:
    """Lets AutoTokenizer build a tokenizer of this class, where it would otherwise build another of the same files."""
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    AutoTokenizer.register(config_class, slow_tokenizer_class=tokenizer_class, exist_ok=True)
