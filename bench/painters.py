"""`python -m bench painters`: what SDXL takes beside the published language models, predicted from shapes."""

import json
from collections.abc import Mapping

import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mg_fast.testing.random_checkpoints import make_config
from mg_fast.testing.random_pipelines import SDXL, sdxl_parts

from . import records
from .costs.gpus import CARDS_GB
from .counting import Count
from .errors import BadRecord
from .fake_models import on_gpu
from .figures import Records, markdown, wrapped
from .memory import versions

RECORDED = records.RESULTS / "painters.json"
SAVE = "`python -m bench painters --save`"
# The models of the table, by the names of `random_checkpoints`.
MODELS = ("7b", "13b", "34b")
SIDE = 1024
# Tokens of a conversation whose keys and values are held beside the weights.
POSITIONS = 2048


def predict() -> dict:
    """Bytes of SDXL's weights and activations at 1024 pixels in float16, and of the language models in bfloat16."""
    return {"painter": _painter(), "models": {name: _model(name) for name in MODELS}}


def _painter() -> dict[str, dict[str, int]]:
    """Of each part of SDXL: bytes of its weights in float16, and the most that one call of it allocates beside them.

    A call is what one picture with guidance takes: both prompts in the text encoders, two latents in the UNet, one in
    the VAE, which diffusers runs in float32, because SDXL's overflows in float16.
    """
    latents = SIDE // 8
    found = {}
    with FakeTensorMode():
        with unset_fake_temporarily(), torch.device("meta"):
            dtypes = {"vae": torch.float32}
            parts = {name: part.to(dtypes.get(name, torch.float16)) for name, part in sdxl_parts(SDXL).items()}
        for name, part in parts.items():
            part, dtype = on_gpu(part), part.dtype

            def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                return torch.empty(shape, dtype=dtype, device="cuda")

            with torch.inference_mode(), Count("cuda") as count:
                if name == "unet":
                    condition = {"text_embeds": empty(2, 1280), "time_ids": empty(2, 6)}
                    out = part(empty(2, 4, latents, latents), 1, empty(2, 77, 2048), added_cond_kwargs=condition)
                elif name == "vae":
                    out = part.decode(empty(1, 4, latents, latents))
                else:
                    out = part(empty(2, 77, dtype=torch.long), output_hidden_states=True)
                del out
            weights = sum(parameter.numel() for parameter in part.parameters())
            found[name] = {"weights": weights * 2, "activations": count.peak, "flop": count.total.flop}
    return found


def _model(size: str) -> dict[str, int]:
    """Bytes of a published Mini-Gemini's weights in bfloat16, and of the keys and values of a conversation."""
    from mg_fast import MiniGeminiForConditionalGeneration

    config = make_config(size, hd=False)
    with torch.device("meta"):
        model = MiniGeminiForConditionalGeneration(config)
    text = config.text_config
    heads = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    return {
        "weights": 2 * sum(parameter.numel() for parameter in model.parameters()),
        "keys_and_values": 2 * 2 * heads * text.num_hidden_layers * POSITIONS,
    }


def floor_flop(steps: int) -> int:
    """FLOP of one picture of SDXL with guidance, by the recorded counts.

    Args:
        steps: steps of the UNet.
    """
    parts = recorded()["painter"]
    return sum(part["flop"] * (steps if name == "unet" else 1) for name, part in parts.items())


def main(*, keep: bool) -> str:
    """Predicts, and records the predictions if `keep` is set; returns the table."""
    found = predict()
    if keep:
        RECORDED.write_text(json.dumps({"versions": versions(), **found}, indent=1) + "\n", encoding="utf-8")
    return table(found)


def recorded() -> dict:
    """The recorded predictions.

    Raises:
        BadRecord: nothing is recorded.
    """
    if not RECORDED.exists():
        raise BadRecord(f"{RECORDED} is missing: {SAVE} writes it")
    return json.loads(RECORDED.read_text(encoding="utf-8"))


def painter_table(found: Records) -> str:
    """The table of docs/drawing.md, from what is recorded."""
    return table(recorded())


def table(found: Mapping) -> str:
    """Predictions as a table in Markdown."""
    painter = found["painter"]
    weights = sum(part["weights"] for part in painter.values())
    activations = max(part["activations"] for part in painter.values())
    # Beside its weights in float16, the VAE has a copy of them in float32 while it decodes.
    copies = {name: part["weights"] * 2 * (name == "vae") for name, part in painter.items()}
    busiest = max(part["activations"] + copies[name] for name, part in painter.items())
    one_part = max(part["weights"] + part["activations"] + copies[name] for name, part in painter.items())
    rows = []
    for name, model in found["models"].items():
        alone = model["weights"] + model["keys_and_values"]
        sums = (alone, alone + weights + busiest, alone + one_part)
        rows.append([name, *(f"{_gb(size)} GB" for size in sums), *(_card(size) for size in sums[1:])])
    head = [
        "model",
        "reading alone",
        "with SDXL on the GPU",
        'with SDXL, offload="model"',
        "card for it",
        "card with offload",
    ]
    unet = painter["unet"]
    notes = (
        f"Predicted from shapes for one picture of {SIDE} x {SIDE} pixels, in units of 10^9 bytes: the language model "
        f"and its towers in bfloat16 with keys and values of {POSITIONS:,} positions; SDXL in float16 "
        f"({_gb(weights)} GB of weights, the UNet {_gb(unet['weights'])}); and the activations of the busiest part of "
        f"SDXL ({_gb(activations)} GB, while the VAE decodes in float32; {_gb(unet['activations'])} GB for a step of "
        "the UNet with guidance). What CUDA and its libraries take for themselves comes on top. Nothing was measured."
    )
    return "\n".join([markdown(head, rows), "", wrapped(notes)])


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"


def _card(size: int) -> str:
    """The smallest common card that holds this much, with a tenth to spare."""
    return next((f"{card} GB" for card in CARDS_GB if card * 1e9 >= size * 1.1), "more than one")
