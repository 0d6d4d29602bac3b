"""Registers Mini-Gemini with transformers' Auto classes.

The modules `configuration`, `modeling` and `processing` each call their function at their end, so it does not matter
who imports them. The functions import transformers' auto modules only when they are called, because those modules may
be the ones that are loading just then: see `mg_fast.integrations.transformers_auto`.
"""


def register_configuration(config_class: type, model_types) -> None:
    """Lets AutoConfig read a config.json with one of these model types."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for model_type in model_types:
        CONFIG_MAPPING.register(model_type, config_class, exist_ok=True)


def register_model(config_class: type, model_class: type) -> None:
    """Lets the Auto classes build the model, and the other parts of transformers know what it can do."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        AutoModelForImageTextToText,
    )

    AutoModelForImageTextToText.register(config_class, model_class, exist_ok=True)
    # Other parts of transformers look models up by these tables of class names, which `register` does not fill. By the
    # first one Trainer shifts the labels of its label smoothing, which would be held against the wrong positions
    # otherwise. By the second one `transformers serve` knows that the model takes pictures.
    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        names[config_class.model_type] = model_class.__name__


def register_processor(config_class: type, processor_class: type) -> None:
    """Lets AutoProcessor find the processor of a checkpoint."""
    from transformers.models.auto.processing_auto import AutoProcessor

    AutoProcessor.register(config_class, processor_class, exist_ok=True)
