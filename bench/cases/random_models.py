"""Models of the published sizes with random weights, drawn on the device, and the sizes that are measured."""

from dataclasses import dataclass

import torch
from transformers.initialization import no_init_weights

from mg_fast import MiniGeminiForConditionalGeneration, quantization
from mg_fast.testing import random_checkpoints


@dataclass(frozen=True)
class Size:
    """A size of `random_checkpoints.SIZES`, and the devices on which it is run without being named."""

    size: str
    hd: bool
    dtype: str
    devices: tuple[str, ...]
    quantize: str | None = None

    @property
    def name(self) -> str:
        return "-".join([self.size, *["hd"] * self.hd, *[self.quantize] * (self.quantize is not None)])


SIZES = (
    Size("demo", False, "float32", ("cpu",)),
    Size("2b", False, "bfloat16", ("cuda",)),
    Size("7b", False, "bfloat16", ("cuda",)),
    Size("7b", True, "bfloat16", ("cuda",)),
    Size("8b", False, "bfloat16", ("cuda",)),
    Size("13b", False, "bfloat16", ("cuda",)),
    Size("34b", False, "bfloat16", ("cuda",)),
    Size("7b", False, "bfloat16", ("cuda",), "int8"),
    # A language model that is large enough to time on a CPU, behind narrow towers.
    Size("0.5b", False, "float32", ()),
    Size("0.5b", False, "bfloat16", ()),
    Size("0.5b", False, "bfloat16", (), "int8"),
    Size("tiny", False, "float32", ()),
)


def make_model(size: Size, device: str) -> MiniGeminiForConditionalGeneration:
    """A size's model in its dtype, whose weights are drawn once, on the device."""
    config = random_checkpoints.make_config(size.size, hd=size.hd)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, size.dtype))
    try:
        with torch.device(device), no_init_weights():
            model = MiniGeminiForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    torch.manual_seed(0)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".gamma"):
                parameter.uniform_(0.2, 0.8)
            elif parameter.dim() == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
            else:
                # This width keeps the size of what goes in.
                parameter.normal_(0.0, 0.02 if parameter is embedding else parameter[0].numel() ** -0.5)
    if size.quantize is not None:
        from torchao.quantization import quantize_

        named = quantization.named_config(size.quantize, config.text_config, {"": device}, model.dtype)
        quantize_(model.model.language_model.layers, named.quant_type)
        quantization.finish(model)
    return model
