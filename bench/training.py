"""`python -m bench memory --train`: what a step of fine-tuning takes on each GPU, predicted from shapes.

The part that learns runs forward and backward on tensors without values, at its real size, and is counted at torch's
dispatcher; so are the frozen towers. What FSDP keeps and gathers is added by formula. Not seen are the libraries' own
memory, and what the allocator loses between its blocks.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import AttentionInterface

from mg_fast import MiniGeminiForConditionalGeneration, use_backend
from mg_fast.models.mini_gemini.frozen_towers import FrozenTowers, TowerFeatures
from mg_fast.ops import reference
from mg_fast.ops.pooled_windows import pool_windows
from mg_fast.ops.torch import patch_mining as torch_form
from mg_fast.testing.random_checkpoints import make_config

from .costs.answer import MODELS
from .costs.operators import attention_flop
from .counting import Count
from .errors import UnknownName
from .fake_models import DTYPE, empty, empty_model, held_by, weight_bytes

# The name under which transformers finds the attention of this file.
COUNTED = "counted_flash"
# Bytes of a learned weight: itself, its gradient and AdamW's two averages, all in float32; and of a frozen one.
LEARNED_BYTES, FROZEN_BYTES = 16, 2


@dataclass(frozen=True)
class TrainingStep:
    """A step of one stage on one process of several.

    Args:
        model: one of the published models, such as "7b" or "7b-hd".
        stage: 1 trains mining and projector, 2 the language model, too.
        devices: GPUs over which FSDP divides weights, gradients and the optimizer's state.
        batch: samples of one GPU in one pass, each with one picture.
        length: tokens of a row, those of the picture included. None: the trained length.
        checkpointing: whether the layers of the language model are computed again in the backward pass.

    Raises:
        UnknownName: there is no such model or stage, or a number is too small.
    """

    model: str
    stage: int = 2
    devices: int = 8
    batch: int = 8
    length: int | None = None
    checkpointing: bool = True

    def __post_init__(self):
        if self.model not in MODELS:
            raise UnknownName(f"no model is called {self.model!r}: expected one of {', '.join(MODELS)}")
        if self.stage not in (1, 2):
            raise UnknownName(f"there is no stage {self.stage}: expected 1 or 2")
        least = make_config(self.size, hd=self.hd).tokens_per_picture + 1
        for name, value, lowest in (
            ("devices", self.devices, 1),
            ("batch", self.batch, 1),
            ("length", self.tokens, least),
        ):
            if value < lowest:
                raise UnknownName(f"{name}: expected a whole number of at least {lowest}, got {value}")

    @property
    def hd(self) -> bool:
        return self.model.endswith("-hd")

    @property
    def size(self) -> str:
        return self.model.removesuffix("-hd")

    @property
    def tokens(self) -> int:
        """The tokens of a row."""
        return self.length if self.length is not None else 4096 if self.hd else 2048


@dataclass(frozen=True)
class StepPrediction:
    """What a step takes on one GPU, in bytes unless said otherwise.

    Attributes:
        learned, frozen: numbers of weights, without the towers.
        states: learned weights with gradients and averages, and frozen weights, divided by the devices.
        towers: their weights and packed copies, whole on every GPU.
        gathered: weights that FSDP has put together, and gradients that it takes apart, at the same time; on one device
            the copies of weights in 16 bits.
        activations: the most that forward and backward pass allocate beside them, with the towers' features.
        seeing: the most that the towers allocate, before the forward pass.
        tower_flop, flop: of the towers, and of the whole pass of one GPU.
    """

    learned: int
    frozen: int
    states: int
    towers: int
    gathered: int
    activations: int
    seeing: int
    tower_flop: int
    flop: int

    @property
    def peak(self) -> int:
        """The most at once: towers run before the layers of the language model are gathered."""
        return self.states + self.towers + max(self.gathered + self.activations, self.seeing)


def predict(step: TrainingStep) -> StepPrediction:
    """Counts a step. The largest models take a minute."""
    towers, seeing, held, tower_flop = _towers(step)
    with counted_attention() as attention:
        model = learning_model(make_config(step.size, hd=step.hd), step.stage, step.checkpointing)
        with torch.device("meta"):
            features = empty_features(model.config, step.batch)
            ids = torch.empty(step.batch, step.tokens, dtype=torch.int64)
        with Count("meta") as count:
            loss_and_gradients(model, features, ids, pool=_kernel, forget=True)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - learned
    return StepPrediction(
        learned=learned,
        frozen=frozen,
        states=-(-(LEARNED_BYTES * learned + FROZEN_BYTES * frozen) // step.devices),
        towers=towers,
        # On one device nothing is divided, and autocast makes a copy of every weight in 16 bits in the forward pass.
        gathered=_gathered(model) if step.devices > 1 else DTYPE.itemsize * learned,
        activations=held + count.peak,
        seeing=seeing,
        tower_flop=tower_flop,
        flop=tower_flop + count.total.flop + attention.flop,
    )


def learning_model(config, stage: int, checkpointing: bool) -> MiniGeminiForConditionalGeneration:
    """A model without values and without towers, whose weights of the stage learn, within `counted_attention`."""
    with torch.device("meta"):
        model = MiniGeminiForConditionalGeneration(config).to(DTYPE).train()
    model.model.vision_tower = model.model.vision_tower_aux = None
    choose_learned(model, stage)
    model.set_attn_implementation({"text_config": COUNTED})
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def choose_learned(model: MiniGeminiForConditionalGeneration, stage: int) -> None:
    """Lets the weights of a stage learn, and no others."""
    model.requires_grad_(False)
    learned = [model.model.patch_mining, model.model.mm_projector]
    for part in learned + ([model.model.language_model, model.lm_head] if stage == 2 else []):
        part.requires_grad_(True)


def empty_features(config, pictures: int) -> TowerFeatures:
    """The towers' features of so many pictures, without values."""
    side, dims = config.image_size_aux // 4, config.vision_config_aux["dims"]
    queries = torch.empty(pictures, config.views, config.tokens_per_view, config.mm_hidden_size, dtype=DTYPE)
    return TowerFeatures(
        queries, [torch.empty(pictures, side >> s, side >> s, c, dtype=DTYPE) for s, c in enumerate(dims)]
    )


def loss_and_gradients(
    model: MiniGeminiForConditionalGeneration,
    features: TowerFeatures,
    ids: torch.Tensor,
    *,
    pool: Callable | None = None,
    marks: torch.Tensor | None = None,
    forget: bool = False,
) -> torch.Tensor:
    """One pass of a training step, forward and backward.

    It is the model's own forward pass without the checks of values.

    Args:
        model: with weights that learn.
        features: of one picture for each row.
        ids: [B, L], also the labels.
        pool: pools the windows of mining in the place of its form in PyTorch.
        marks: [B, L], 1 where the pictures stand; any tensor does where there are no values.
        forget: free each gradient once it is complete, as FSDP does after it has divided it.

    Returns:
        The loss.
    """
    inner, grid = model.model, model.config.image_grid
    hooks = []
    if forget:
        hooks = [p.register_post_accumulate_grad_hook(_forget) for p in model.parameters() if p.requires_grad]
    queries, pyramid = features
    mined = torch_form.patch_mining(
        queries, pyramid, *inner.patch_mining.projections(queries.device, queries.dtype), grid=grid, pool=pool
    )
    image_tokens = inner.mm_projector(reference.order_tokens(queries + mined, grid=grid))
    embedded = inner.splice(inner.embed_ids(ids), image_tokens, ids if marks is None else marks, checked=False)
    hidden = inner.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)
    loss = model.loss_function(logits=logits, labels=ids, vocab_size=model.config.text_config.vocab_size)
    # What Trainer holds while gradients are computed.
    del hidden, logits, embedded, image_tokens, mined
    loss.backward()
    for hook in hooks:
        hook.remove()
    return loss.detach()


def _forget(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _kernel(absorbed: torch.Tensor, levels, grid: int) -> torch.Tensor:
    return pool_windows(absorbed, list(levels), grid, "fine")[0]


def _towers(step: TrainingStep) -> tuple[int, int, int, int]:
    """Of the packed towers: bytes of weights and copies, the peak of a call, the features that it leaves, and FLOP."""
    with FakeTensorMode(), torch.no_grad(), use_backend("triton"):
        model = empty_model(step.size, hd=step.hd)
        copies, towers = held_by(lambda: FrozenTowers(model.model))
        weights = weight_bytes(towers.vision_tower, towers.vision_tower_aux) + copies
        clip, side = towers.config.vision_config.image_size, towers.config.image_size_aux
        with torch.inference_mode(), Count("cuda") as count:
            # Pixels are made on the GPU, in float32.
            low = empty(step.batch, towers.config.views, 3, clip, clip, dtype=torch.float32)
            high = empty(step.batch, 3, side, side, dtype=torch.float32)
            pixels = count.live
            seen = towers(low, high)
            held = count.live - pixels
            del seen
    return weights, count.peak, held, count.total.flop


def _gathered(model: MiniGeminiForConditionalGeneration) -> int:
    """Bytes of weights in 16 bits that FSDP has gathered while it gathers the next, and of gradients on their way.

    Each layer, the embedding, the head and mining is gathered by itself; what is left, with them. The head and the rest
    stay gathered. The gradient of a layer exists twice while it is divided.
    """

    def size(*modules: nn.Module) -> int:
        return sum(p.numel() * p.itemsize for module in modules for p in module.parameters())

    inner = model.model
    layer = size(inner.language_model.layers[0])
    learned = any(p.requires_grad for p in inner.language_model.parameters())
    kept = size(inner.mm_projector, inner.patch_mining, inner.language_model.norm, model.lm_head)
    return kept + 2 * layer + 2 * layer * learned


class _Flash(torch.autograd.Function):
    """What flash attention allocates, without its results: for tensors that have no values."""

    @staticmethod
    def forward(ctx, query, key, value):
        b, heads, length, width = query.shape
        out = query.new_empty(b, length, heads, width)
        ctx.save_for_backward(query, key, value, out, query.new_empty(b, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        # Gradients of queries are summed in float32, and those of shared keys and values by the head.
        workspaces = (
            query.new_empty(query.shape, dtype=torch.float32),
            *(query.new_empty(query.shape) for _ in range(2)),
        )
        gradients = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        del workspaces
        return gradients


class AttentionCount:
    """FLOP of the attention that was counted, with half of the square of positions, as flash attention computes it."""

    def __init__(self):
        self.flop = 0

    def attend(self, module, query, key, value, attention_mask, **_):
        b, heads, length, width = query.shape
        # Scores and sums of values. The backward pass makes the scores once more, and four further products.
        forward = attention_flop(b * heads * length * length // 2, width)
        self.flop += forward
        out = _Flash.apply(query, key, value)
        if out.requires_grad:
            out.register_hook(functools.partial(self._backward, forward))
        return out, None

    def _backward(self, forward: int, grad: torch.Tensor) -> None:
        self.flop += forward * 5 // 2


@contextlib.contextmanager
def counted_attention() -> Iterator[AttentionCount]:
    """Within the block, models whose attention is called COUNTED use the one of this file."""
    count = AttentionCount()
    AttentionInterface.register(COUNTED, count.attend)
    yield count


def table(step: TrainingStep) -> str:
    """A prediction as text."""
    p = predict(step)
    gb, tflop = 1e9, 1e12
    checkpointing = "with" if step.checkpointing else "without"
    rows = {
        "weights that learn": f"{p.learned / 1e9:>10.3f} G, frozen {p.frozen / 1e9:.3f} G",
        "weights, gradients and averages, divided": f"{p.states / gb:>10.2f} GB",
        "towers, whole on every GPU": f"{p.towers / gb:>10.2f} GB",
        "gathered or cast weights, gradients on their way": f"{p.gathered / gb:>10.2f} GB",
        "activations at their peak, features of pictures included": f"{p.activations / gb:>10.2f} GB",
        "the towers at work, before": f"{p.seeing / gb:>10.2f} GB",
        "peak of a GPU": f"{p.peak / gb:>10.2f} GB",
        "FLOP of a pass on a GPU": f"{p.flop / tflop:>10.1f} TFLOP, those of the towers {p.tower_flop / tflop:.1f}",
        "FLOP of all devices": f"{step.devices * p.flop / tflop:>10.1f} TFLOP",
    }
    lines = [
        f"{step.model}, stage {step.stage}, FSDP on {step.devices} device(s), {step.batch} samples a GPU, each of "
        f"{step.tokens} tokens with one picture,",
        f"{checkpointing} gradient checkpointing; weights learn in float32, products are in bfloat16",
        "",
        *(f"{name:<58}{value}" for name, value in rows.items()),
    ]
    return "\n".join(lines)
