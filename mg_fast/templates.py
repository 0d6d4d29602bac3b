"""Prompt templates under their public name; `mg_fast.models.templates` holds them."""

from .models.templates import (
    IMAGE_TAG,
    TEMPLATES,
    Template,
    detect_template,
    get_template,
    render,
    stop_ids,
    with_picture_tags,
)

__all__ = [
    "IMAGE_TAG",
    "TEMPLATES",
    "Template",
    "detect_template",
    "get_template",
    "render",
    "stop_ids",
    "with_picture_tags",
]
