"""Loads what a command needs: first its pictures, whose faults are found quickly, then the model."""

import os
import sys

from ..errors import PictureError


def load(args, **options):
    """Loads the pipeline that the model options ask for; `options` are further ones of `mg_fast.load`."""
    # The imports take seconds, and usage errors should not wait for them.
    from ..models.templates import get_template

    if args.template is not None:
        get_template(args.template)
    from transformers.utils import logging as transformers_logging

    from .. import pipeline as pipelines

    if not args.debug:
        transformers_logging.set_verbosity_error()
    return pipelines.load(
        args.model,
        dtype=args.dtype,
        device=args.device,
        backend=args.backend,
        quantize=args.quantize,
        template=args.template,
        base_model=args.model_base,
        compiled=args.compile,
        llm=args.llm,
        clip=args.clip,
        diffusion=args.diffusion,
        **options,
    )


def load_to_answer(args, **options):
    """Loads the pipeline for a command that answers, and says on stderr what was loaded."""
    pipeline = load(args, allow_long=args.allow_long, **options)
    template = f" (template {pipeline.template})" if pipeline.template is not None else ""
    print(f"loaded {args.model} on {pipeline.device} in {pipeline.load_seconds:.1f} s{template}", file=sys.stderr)
    print(f"weights: {pipeline.weights}", file=sys.stderr)
    return pipeline


def is_interleaved(model: str) -> bool:
    """Whether the files of a model's folder say that it is MM-Interleaved; of a hub id, small files are fetched."""
    from ..models import builtin
    from ..models.families import MM_INTERLEAVED, checkpoint_family
    from ..models.tensor_files import resolve_folder

    return checkpoint_family(resolve_folder(builtin.resolve(model), weights=False)) == MM_INTERLEAVED


def sampling(args) -> dict:
    """The arguments of `Pipeline.chat` that the answer and sampling options give."""
    return {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}


def open_pictures(args, files: list[str]) -> list:
    """Opens the pictures of a command, and finds their faults before the gigabytes of the model are read."""
    from ..models.base64_text import looks_like_base64, refusal
    from ..models.urls import expanded, is_url

    for file in files:
        # A wrong path is the most common mistake, so it is reported before anything is imported.
        if not (is_url(file) or os.path.exists(expanded(file))):
            raise PictureError(refusal(len(file)) if looks_like_base64(file) else f"{file}: no such file")
    from ..models import builtin
    from ..models.pictures import open_picture

    model = builtin.resolve(args.model)
    pictures = [open_picture(file, allow_urls=args.allow_urls) for file in files]
    if pictures and is_interleaved(args.model):
        from ..models.mm_interleaved.image_processing import MMInterleavedImageProcessor

        MMInterleavedImageProcessor()(pictures)
    elif pictures:
        from ..models.mini_gemini.processing import MiniGeminiProcessor

        # The model's configuration is enough to find out whether the model can use these pictures.
        MiniGeminiProcessor.from_pretrained(model, template=args.template, base_model=args.model_base).image_processor(
            pictures
        )
    return pictures
