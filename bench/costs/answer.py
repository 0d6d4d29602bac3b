"""The floors of a whole answer by a published model, stage by stage: from shapes alone, for a GPU that need not exist.

The floor of a stage is the larger of two times: its FLOP at the rate of matrix products, and its bytes (inputs, weights
and outputs once) at the rate of a copy. Stages follow one another, so their floors add up.
"""

import functools
from dataclasses import dataclass
from functools import cached_property

import torch

from mg_fast import MiniGeminiConfig, MiniGeminiForConditionalGeneration
from mg_fast.testing.random_checkpoints import PUBLISHED_TOWERS, SIZES, make_config

from ..errors import UnknownName
from ..registry import Ceilings, Cost
from . import floors
from .mining import Sizes, mining_floor
from .tower import Tower, tower_floor

MODELS = tuple(
    size + suffix for size, (_, _, towers) in SIZES.items() if towers is PUBLISHED_TOWERS for suffix in ("", "-hd")
)
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class StageCost:
    """A part of an answer: its name in the meter's tables, and its floor."""

    name: str
    cost: Cost

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.cost.flop / self.cost.bytes

    def floor_ms(self, ceilings: Ceilings, dtype: str) -> float:
        return ceilings.floor_ms(self.cost, dtype) or 0.0

    def bound(self, ceilings: Ceilings, dtype: str) -> str:
        """Which of the two times is the floor: "compute" or "bandwidth"."""
        products = ceilings.floor_ms(Cost(self.cost.flop), dtype) or 0.0
        return "compute" if products > ceilings.floor_ms(Cost(0, self.cost.bytes), dtype) else "bandwidth"


@dataclass(frozen=True)
class ModelledAnswer:
    """An answer about one picture by a published model, or a batch of such answers at once.

    Args:
        model: one of MODELS.
        dtype: of weights, activations and KV cache; one of DTYPES.
        text_tokens: of the prompt, beside the picture's.
        new_tokens: of the answer.

    Raises:
        UnknownName: there is no such model or dtype, or a number is below 1.
    """

    model: str
    dtype: str = "bfloat16"
    batch: int = 1
    text_tokens: int = 64
    new_tokens: int = 128

    def __post_init__(self):
        if self.model not in MODELS:
            raise UnknownName(f"no model is called {self.model!r}: expected one of {', '.join(MODELS)}")
        if self.dtype not in DTYPES:
            raise UnknownName(f"no dtype is called {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        for name in ("batch", "text_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise UnknownName(f"{name}: expected a whole number above 0, got {getattr(self, name)}")

    @property
    def hd(self) -> bool:
        return self.model.endswith("-hd")

    @cached_property
    def config(self) -> MiniGeminiConfig:
        return make_config(self.model.removesuffix("-hd"), hd=self.hd)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def views(self) -> int:
        return self.config.image_grid**2 + self.config.image_global

    @property
    def patches(self) -> int:
        """Patches along a side of a view."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    @property
    def image_tokens(self) -> int:
        return self.views * self.patches**2

    @property
    def prompt_tokens(self) -> int:
        return self.image_tokens + self.text_tokens

    @property
    def mining(self) -> Sizes:
        config = self.config
        levels = tuple((config.image_size_aux // 4 >> s, c) for s, c in enumerate(config.vision_config_aux["dims"]))
        cells = (config.image_grid, self.views, self.patches, config.mm_hidden_size)
        return Sizes(self.torch_dtype, self.batch, *cells, levels)

    @property
    def tower(self) -> Tower:
        aux = self.config.vision_config_aux
        return Tower(self.torch_dtype, self.batch, self.config.image_size_aux, tuple(aux["dims"]), tuple(aux["depths"]))

    @property
    def clip_cost(self) -> Cost:
        """CLIP up to the layer that is read."""
        clip = self.config.vision_config
        layers = clip.num_hidden_layers + 1 + self.config.mm_vision_select_layer
        return floors.clip(clip, layers, self.batch * self.views, self.torch_dtype.itemsize)

    @property
    def projector_cost(self) -> Cost:
        hidden, rows = self.config.text_config.hidden_size, self.batch * self.image_tokens
        return floors.projector(rows, self.config.mm_hidden_size, hidden, self.torch_dtype.itemsize)

    @property
    def prefill_cost(self) -> Cost:
        return floors.prefill(self.config.text_config, self.batch, self.prompt_tokens, self.torch_dtype.itemsize)

    def decode_cost(self, context: int) -> Cost:
        """One step of the answer after `context` tokens."""
        return floors.decode(self.config.text_config, self.batch, context, self.torch_dtype.itemsize)

    @cached_property
    def stages(self) -> list[StageCost]:
        """The stages up to the first token, under the names of the meter."""
        low, high = self.config.vision_config.image_size, self.config.image_size_aux
        return [
            StageCost("preprocess", floors.preprocess(high, low, self.views) * self.batch),
            StageCost("LR tower", self.clip_cost),
            StageCost("HR tower", tower_floor(self.tower)),
            StageCost("patch info mining", mining_floor(self.mining)),
            StageCost("projector", self.projector_cost),
            StageCost("prefill to first token", self.prefill_cost),
        ]

    @cached_property
    def decode(self) -> StageCost:
        """One step in the middle of the answer."""
        return StageCost("decode, a token", self.decode_cost(self.prompt_tokens + self.new_tokens // 2))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the whole model as a checkpoint holds it, the last layer of CLIP included."""
        return self.torch_dtype.itemsize * parameters(self.model.removesuffix("-hd"))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache at the end of the answer."""
        tokens = self.batch * (self.prompt_tokens + self.new_tokens)
        return tokens * floors.cache_bytes_per_token(self.config.text_config, self.torch_dtype.itemsize)

    def first_token_ms(self, ceilings: Ceilings) -> float:
        return sum(stage.floor_ms(ceilings, self.dtype) for stage in self.stages)

    def tokens_per_second(self, ceilings: Ceilings) -> float:
        """Tokens of the whole batch."""
        return self.batch * 1e3 / self.decode.floor_ms(ceilings, self.dtype)


@functools.cache
def parameters(size: str) -> int:
    """The number of parameters of a published model; HD has no more."""
    with torch.device("meta"):
        model = MiniGeminiForConditionalGeneration(make_config(size))
    return sum(parameter.numel() for parameter in model.parameters())
