"""Nano in the published layout: its configuration, initial weights, tokenizer, and the writing of its checkpoint."""

import copy
import io
import json
import math
from pathlib import Path

import sentencepiece
import torch
from torch import nn

from mg_fast import MiniGeminiConfig, MiniGeminiForConditionalGeneration
from mg_fast.models.templates import TEMPLATES

from .scenes import CELL, SIDE
from .talk import every_sentence

TEMPLATE = "chatml_direct"
VOCABULARY = 704
EMBEDDING_SPREAD = 0.3
POSITION_SPREAD = 0.5
LR_SIDE = 14 * (SIDE // CELL)
# Pieces that answers may contain and that are one token each. Digits are one token each as well.
MARKS = ["<|im_start|>", "<|im_end|>", "<GEN>", "<h>", "</h>", "\n"]


def make_config() -> MiniGeminiConfig:
    """A configuration with 36 queries, each over 8x8 positions of the pyramid as published, and 3.4 M parameters."""
    dims = [32, 64, 128, 192]
    return MiniGeminiConfig(
        model_type="mgm",
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=384,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        vision_config=dict(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=2,
            patch_size=14,
            image_size=LR_SIDE,
        ),
        vision_config_aux={"dims": dims, "depths": [2, 2, 3, 2], "norm_eps": 1e-6},
        mm_hidden_size=128,
        mm_hidden_size_aux=sum(dims),
        image_size_aux=SIDE,
        tokenizer_model_max_length=1024,
    )


def make_model(seed: int) -> MiniGeminiForConditionalGeneration:
    """A float32 model with initial weights from a seed."""
    torch.manual_seed(seed)
    model = MiniGeminiForConditionalGeneration(make_config())
    with torch.no_grad():
        # transformers' own initial weights are 25 times smaller. Beside the patches they would hardly be seen in so
        # short a schedule.
        nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=POSITION_SPREAD)
        for name, parameter in model.model.vision_tower_aux.named_parameters():
            # timm's own initial values (spread 0.02, layer scale 1e-6) are meant for widths and schedules a hundred
            # times as large.
            if name.endswith(".gamma"):
                parameter.fill_(0.5)
            elif parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=math.sqrt(1 / parameter[0].numel()))
        for parameter in model.model.patch_mining.parameters():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=math.sqrt(1 / parameter[0].numel()))
        language_model = model.model.language_model
        for name, parameter in language_model.named_parameters():
            if parameter is language_model.embed_tokens.weight:
                # Smaller embeddings are lost in what the first layers add to them.
                nn.init.normal_(parameter, std=EMBEDDING_SPREAD)
            elif parameter.dim() > 1:
                layers = 2 * len(language_model.layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                nn.init.normal_(parameter, std=math.sqrt(1 / parameter.shape[1] / layers))
    return model


@torch.no_grad()
def forget_mined(model: MiniGeminiForConditionalGeneration) -> None:
    """Sets the mined features to zero, for good, so that the model sees only the low-resolution picture."""
    for parameter in model.model.patch_mining.vlm_uni_val_projector[1].parameters():
        parameter.zero_()


def make_tokenizer(folder: Path) -> None:
    """Writes a sentencepiece tokenizer of the scenes' language, as the Llama family ships it.

    Every digit is a token. Unknown text becomes its bytes.
    """
    lines = [line for line in every_sentence() for _ in range(2)] + [
        TEMPLATES[TEMPLATE].system_text,
        "system",
        "user",
        "assistant",
    ] * 20
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        user_defined_symbols=MARKS,
        num_threads=1,
        minloglevel=2,
        unk_id=0,
        bos_id=1,
        eos_id=2,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False)
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "added_tokens_decoder": {
            str(processor.piece_to_id(token)): {"content": token, "special": token in special, **flags}
            for token in special + MARKS[2:]
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def save(model: MiniGeminiForConditionalGeneration, folder: Path) -> None:
    """Writes a checkpoint in the published layout, in half precision and with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    for ours in ("vision_config", "vision_config_aux"):
        # Published checkpoints do not have these keys: the towers' shapes are read from the tensors.
        del written[ours]
    # Weights are stored in half the bytes and run in float32, which is faster on CPUs.
    written["torch_dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(written, indent=1, sort_keys=True))
    make_tokenizer(folder)
