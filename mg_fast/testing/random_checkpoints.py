"""Random Mini-Gemini checkpoints in the published layout, of any size, for tests and timings without real weights.

python -m mg_fast.testing.random_checkpoints FOLDER --size demo
python -m mg_fast.testing.random_checkpoints FOLDER --size 2b --dtype bfloat16     # 6 GB: MGM-2B at its real size
"""

import argparse
import io
import json
from pathlib import Path

import sentencepiece
import torch
from transformers.utils import logging as transformers_logging

from mg_fast.models.mini_gemini.configuration import MiniGeminiConfig
from mg_fast.models.mini_gemini.modeling import MiniGeminiForConditionalGeneration
from mg_fast.models.templates import TEMPLATES

# The towers of the published models, and narrow towers with the same geometry (336/768: 576 image tokens).
PUBLISHED_TOWERS = {"clip": None, "convnext": None}
NARROW_TOWERS = {
    "clip": dict(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=2,
        patch_size=14,
        image_size=336,
    ),
    "convnext": {"dims": [24, 48, 96, 192], "depths": [1, 1, 3, 1], "norm_eps": 1e-6},
}
TINY_TOWERS = {
    "clip": dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=1, patch_size=14, image_size=70
    ),
    "convnext": {"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "norm_eps": 1e-6},
}
LLM_7B = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008)
# The initial spread is wider than usual. Otherwise small random models repeat the same token.
LLM_DEMO = dict(
    initializer_range=0.1,
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=6,
    intermediate_size=512,
    vocab_size=512,
)
LLM_TINY = dict(
    initializer_range=0.1,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    vocab_size=400,
)
# For every size: (model_type, language model, towers).
SIZES = {
    "tiny": ("mgm", LLM_TINY, TINY_TOWERS),
    "tiny-gemma": ("mgm_gemma", LLM_TINY | {"head_dim": 16}, TINY_TOWERS),
    "tiny-mixtral": ("mgm_mixtral", LLM_TINY | {"num_local_experts": 4}, TINY_TOWERS),
    "demo": ("mgm", LLM_DEMO, NARROW_TOWERS),
    "0.5b": (
        "mgm",
        dict(hidden_size=1280, num_hidden_layers=24, num_attention_heads=20, intermediate_size=3456, vocab_size=32000)
        | {"initializer_range": 0.1},
        NARROW_TOWERS,
    ),
    "2b": (
        "mgm_gemma",
        dict(
            hidden_size=2048,
            num_hidden_layers=18,
            num_attention_heads=8,
            num_key_value_heads=1,
            head_dim=256,
            intermediate_size=16384,
            vocab_size=256000,
            max_position_embeddings=8192,
            hidden_act="gelu",
        ),
        PUBLISHED_TOWERS,
    ),
    "7b": (
        "mgm",
        LLM_7B | {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        PUBLISHED_TOWERS,
    ),
    "8b": (
        "mgm",
        LLM_7B
        | dict(
            num_key_value_heads=8,
            intermediate_size=14336,
            vocab_size=128256,
            max_position_embeddings=8192,
            rope_theta=500000.0,
        ),
        PUBLISHED_TOWERS,
    ),
    "13b": (
        "mgm",
        dict(hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=13824, vocab_size=32000)
        | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        PUBLISHED_TOWERS,
    ),
    "8x7b": (
        "mgm_mixtral",
        LLM_7B
        | dict(
            num_key_value_heads=8, intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2, vocab_size=32000
        )
        | {"rope_theta": 1e6, "max_position_embeddings": 32768},
        PUBLISHED_TOWERS,
    ),
    "34b": (
        "mgm",
        dict(
            hidden_size=7168,
            num_hidden_layers=60,
            num_attention_heads=56,
            num_key_value_heads=8,
            intermediate_size=20480,
        )
        | {"vocab_size": 64000, "rope_theta": 5e6, "max_position_embeddings": 4096},
        PUBLISHED_TOWERS,
    ),
}


def make_config(size: str = "demo", *, hd: bool = False) -> MiniGeminiConfig:
    """Returns the flat configuration of one of `SIZES`, standard or HD."""
    model_type, text, towers = SIZES[size]
    published = towers is PUBLISHED_TOWERS
    lr = 336 if published else towers["clip"]["image_size"]
    # As in the published models, 8x8 high-resolution pixels lie under every query.
    hr = lr // 14 * 32 * (2 if hd else 1)
    return MiniGeminiConfig(
        model_type=model_type,
        **{"max_position_embeddings": 4096, **text},
        vision_config=towers["clip"],
        vision_config_aux=towers["convnext"],
        mm_hidden_size=1024 if published else towers["clip"]["hidden_size"],
        mm_hidden_size_aux=2880 if published else sum(towers["convnext"]["dims"]),
        image_size_aux=hr,
        image_grid=2 if hd else 1,
        image_global=hd,
        tokenizer_model_max_length=4096 if hd else 2048,
    )


def make_model(
    config: MiniGeminiConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> MiniGeminiForConditionalGeneration:
    """Returns a model with seeded random weights."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = MiniGeminiForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".gamma"):
                # timm initialises layer scale at 1e-6, which would leave the blocks without effect.
                parameter.uniform_(0.2, 0.8)
            elif parameter.dim() == 1:
                # Zero biases and unit gains would hide one that the code forgets to apply.
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_tokenizer(folder: Path, vocab_size: int, template: str) -> None:
    """Writes a small sentencepiece tokenizer as the Llama and Gemma families ship it.

    It is trained on the prompt templates and the licence.
    """
    text = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.strip()] + [
        t.system_text for t in TEMPLATES.values() if t.system_text
    ]
    gemma = template == "gemma"
    marks = ["<start_of_turn>", "<end_of_turn>"] if gemma else []
    special = dict(
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=min(vocab_size, 512),
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        user_defined_symbols=marks,
        num_threads=1,
        minloglevel=2,
        **(special if gemma else dict(unk_id=0, bos_id=1, eos_id=2)),
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    names = dict(bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>") if gemma else {}
    names = names or dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>")
    ids = (
        {special[f"{n}_piece"]: special[f"{n}_id"] for n in ("pad", "eos", "bos", "unk")}
        if gemma
        else {"<unk>": 0, "<s>": 1, "</s>": 2}
    )
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    config = {
        "tokenizer_class": "GemmaTokenizer" if gemma else "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "added_tokens_decoder": {str(i): {"content": token, **flags} for token, i in ids.items()},
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def build(
    folder: str | Path, *, size: str = "demo", hd: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Writes a random checkpoint as the original would have published it and returns its folder."""
    return save(make_model(make_config(size, hd=hd), seed=seed, dtype=dtype), folder)


def save(model: MiniGeminiForConditionalGeneration, folder: str | Path) -> Path:
    """Writes a model as the original would have published it, with a small tokenizer, and returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    for ours in ("vision_config", "vision_config_aux"):
        # Published checkpoints do not have these keys: the towers' shapes are read from the tensors.
        del written[ours]
    (folder / "config.json").write_text(json.dumps(written, indent=1, sort_keys=True))
    text = model.config.text_config
    make_tokenizer(folder, text.vocab_size, "gemma" if text.model_type == "gemma" else "vicuna_v1")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--hd", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    print(build(args.folder, size=args.size, hd=args.hd, seed=args.seed, dtype=getattr(torch, args.dtype)))
