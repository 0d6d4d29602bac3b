"""Passes of a language model over a KVCache: a prompt in chunks, then one token at a time; on a GPU as CUDA graphs."""

import contextlib
import logging
import time

import torch
from torch import nn

from ..models.protocol import CACHE, DecodableModel
from ..ops.torch.pointwise import by_onednn, take_onednn
from ..quantization import EXPERTS_FUNCTION
from ..runtime.graphs import CapturedGraph, Captures, GraphCache
from ..runtime.layer_dtypes import call
from ..runtime.numerics import numerics
from ..runtime.weights import why_not_plain
from .grouped_attention import SDPA, grouped, in_force
from .kv_cache import KVCache
from .sequences import Sequences

logger = logging.getLogger(__name__)

# Positions of a prompt in one pass: enough to keep every matrix product busy, and in HD the activations stay small.
PREFILL_CHUNK = 1024
# Windows of graphs and capacities of caches are multiples of this, so that one graph serves many lengths.
WINDOW = 512
# Windows of compiled passes are multiples of this. One compiled pass serves all of them (see `_Graph`).
COMPILED_WINDOW = 256
# The capacity of a cache of one sequence is a multiple of this, so that a conversation seldom outgrows its cache and
# loses all graphs with it.
ONE_SEQUENCE = 2048
# Widths of the graphs for prompts: a chunk of a prompt is filled up to the next width.
WIDTHS = (64, 128, 192, 256, 384, 512, 640, 768, 896, 1024)
# The most graphs kept for one cache; the one used longest ago is dropped first.
MAX_GRAPHS = 16


class ModelRunner:
    """Runs a model's language model over sequences.

    On a GPU, a pass whose width and window were met before is captured in a CUDA graph and replayed: one launch instead
    of a thousand. A captured pass attends to a whole window under a mask. Elsewhere, and where `graphs_refused` gives a
    reason, a pass attends to exactly the positions that exist, by the model's own attention implementation.

    Args:
        model: the model whose language model and head run.
        graphs: capture passes in CUDA graphs; without graphs less memory is needed.
        compiled: run a one-token pass through torch.compile before it is captured. This takes seconds to a minute at
            first use, and later passes launch fewer, larger kernels.
        keep_states: keep the last layer's hidden states in the cache, beside keys and values.

    Attributes:
        captures: whether passes may still be captured, and how long captures took, for all sequences together.
    """

    def __init__(
        self, model: DecodableModel, *, graphs: bool = True, compiled: bool = False, keep_states: bool = False
    ):
        self.model, self.keep_states = model, keep_states
        take_onednn(self.language_model)
        take_onednn(self.head)
        self._graphs = graphs
        self._compiled = torch.compile(self._pass, fullgraph=True, dynamic=False) if compiled else None
        self._told_not_compiled = False
        self.captures = Captures()

    @property
    def first_use(self) -> dict[str, float]:
        """Seconds spent on work that is done once: compiling, and every capture."""
        return self.captures.first_use

    @property
    def config(self):
        """The language model's configuration."""
        return self.model.text_config

    @property
    def language_model(self) -> nn.Module:
        # It is looked up at every use, because resizing, adapters and loading put another module in its place.
        return self.model.language_model

    @property
    def head(self) -> nn.Module:
        return self.model.head

    def sequences(self, batch: int, positions: int) -> Sequences:
        """Memory for `batch` sequences of at least `positions` positions each."""
        unit = ONE_SEQUENCE if batch == 1 else WINDOW
        capacity = -(-positions // unit) * unit
        refused = self.graphs_refused(capacity)
        if refused is not None and self._compiled is not None and not self._told_not_compiled:
            self._told_not_compiled = True
            logger.warning("compiled=True (--compile) has no effect: %s", refused)
        if refused is not None:
            logger.debug("passes are not captured: %s", refused)
        by_graph = refused is None
        if not by_graph:
            # Heads that lie a power of two bytes apart would share the same sets of a CPU's caches.
            capacity += 32
        cache = KVCache(self.config.num_hidden_layers, batch, capacity, masked=by_graph, with_states=self.keep_states)
        return Sequences(cache, by_graph, GraphCache(MAX_GRAPHS, self.captures, shared_memory=True))

    def graphs_refused(self, capacity: int) -> str | None:
        """Why passes are not captured, as the end of a sentence; None where they are."""
        if not self._graphs:
            return "CUDA graphs are switched off"
        language, head = self.language_model, self.head
        devices = {p.device for part in (language, head) for p in part.parameters()}
        if len(devices) > 1 or next(iter(devices)).type != "cuda":
            return "the language model is not on one GPU"
        if (attention := in_force(self.config)) != SDPA:
            return f"attention is {attention}: only sdpa takes a mask over a fixed window"
        window = getattr(self.config, "sliding_window", None)
        if window is not None and window < capacity:
            return f"attention slides over {window} positions"
        if self.config._experts_implementation == "eager" and hasattr(self.config, "num_local_experts"):
            return "the experts are chosen on the host (experts_implementation eager)"
        if not fixed_positions(self.config):
            return "the rotary positions depend on the length of the sequence"
        if torch.is_autocast_enabled("cuda"):
            return "autocast drops its casts of the weights, but a graph would go on reading them"
        # Only hooks are looked for: a module's own forward is captured with any tensors, quantized ones, too.
        if any(why_not_plain("it", part, reads=()) for whole in (language, head) for part in whole.modules()):
            return "hooks on the language model would run only while a graph is captured"
        return None

    def _asks_host(self, tokens: int) -> bool:
        """Whether quantized experts ask the host where this many tokens go, which a graph cannot do."""
        config = self.config
        return (
            config._experts_implementation == EXPERTS_FUNCTION
            and tokens * config.num_experts_per_tok > config.num_local_experts
        )

    def prefill(self, sequences: Sequences, embeddings: torch.Tensor) -> torch.Tensor:
        """Runs new positions of all sequences; returns the logits [B, vocabulary] of the last position.

        Args:
            embeddings: [B, L, hidden].
        """
        # The settings are read once for each request, because captured passes keep the arithmetic of their capture.
        sequences.arithmetic = numerics(embeddings.device)
        for chunk in embeddings.split(PREFILL_CHUNK, dim=1):
            width = chunk.shape[1]
            # Filling after the chunk stays in the cache until the next positions overwrite it.
            filled = next(w for w in WIDTHS if w >= width)
            fits = sequences.cache.length + filled <= sequences.cache.capacity
            if sequences.by_graph and fits and not self._asks_host(len(chunk) * filled):
                logits = self._by_graph(sequences, chunk, width, filled)
            else:
                logits = self._run(sequences, chunk)
            sequences.cache.length += width
        return logits

    def step(self, sequences: Sequences, tokens: torch.Tensor) -> torch.Tensor:
        """Runs one more token int64 [B] of every sequence; returns the logits [B, vocabulary] of the next token.

        Nothing waits for the device.
        """
        if sequences.by_graph and not self._asks_host(len(tokens)):
            logits = self._by_graph(sequences, tokens[:, None], 1, 1)
        else:
            # Without a mask transformers repeats no keys.
            with grouped(self.language_model) if sequences.mask is not None else contextlib.nullcontext():
                logits = self._run(sequences, self.model.embed_ids(tokens[:, None]))
        sequences.cache.length += 1
        return logits

    def _run(self, sequences: Sequences, embeddings: torch.Tensor) -> torch.Tensor:
        """Runs a pass over exactly the positions that exist."""
        cache = sequences.cache
        stop = cache.length + embeddings.shape[1]
        positions = torch.arange(cache.length, stop, device=embeddings.device)
        further, positions, mask = sequences.pass_inputs.at(positions), positions[None], None
        if sequences.mask is not None:
            mask = sequences.mask[:, :stop]
            positions = (positions - sequences.pads[:, None]).clamp(min=0)
        with by_onednn():
            hidden = self.language_model(
                inputs_embeds=embeddings,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **{CACHE: cache},
                **further,
            ).last_hidden_state
            cache.write_states(hidden)
            return call(self.head, hidden[:, -1:])[:, -1]

    def _by_graph(self, sequences: Sequences, inputs: torch.Tensor, width: int, filled: int) -> torch.Tensor:
        """Runs tokens [B, 1] or embeddings [B, width, hidden] through a graph of width `filled`.

        The graph is captured when the same shape is met for the second time.
        """
        cache = sequences.cache
        compiled = filled == 1 and self._compiled is not None
        unit = COMPILED_WINDOW if compiled else WINDOW
        window = min(cache.capacity, -(-(cache.length + filled) // unit) * unit)
        key = (inputs.dtype, filled, window, sequences.arithmetic)
        shape = (inputs.shape[0], filled, *inputs.shape[2:])
        graph = sequences.graphs.entry(key, lambda: _Graph(self, sequences, inputs.new_zeros(shape), window, compiled))
        return graph(inputs, cache.length, width)

    def _pass(
        self,
        sequences: Sequences,
        inputs: torch.Tensor,
        places: torch.Tensor,
        start: torch.Tensor,
        last: torch.Tensor,
    ) -> torch.Tensor:
        """The pass that a graph holds: all shapes are fixed, and the host is asked for nothing.

        Args:
            inputs: tokens int64 [B, Q] or embeddings [B, Q, hidden].
            places: int64 [S], the positions of the window, 0 to S - 1.
            start: int64 [1], the first position.
            last: int64 [1], the index among the Q positions whose logits are returned.
        """
        cache = sequences.cache
        embeddings = inputs if inputs.is_floating_point() else self.model.embed_ids(inputs)
        positions = start + torch.arange(inputs.shape[1], device=inputs.device)
        cache.positions, cache.window = positions, places.shape[0]
        mask = (places <= positions[:, None])[None, None]
        ids = positions[None]
        if sequences.mask is not None:
            # A filling position attends to itself. If it attended to nothing, kernels might write NaN there, which no
            # mask keeps out of the layers that follow.
            mask = (mask & (sequences.mask[:, None, None, : cache.window] != 0)) | (places == positions[:, None])
            ids = (ids - sequences.pads[:, None]).clamp(min=0)
        further = sequences.pass_inputs.at(positions)
        hidden = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=ids,
            use_cache=True,
            **{CACHE: cache},
            **further,
        ).last_hidden_state
        cache.write_states(hidden)
        return call(self.head, hidden.index_select(1, last))[:, 0]


class _Graph:
    """A pass of one width over one window: run directly when first met, captured the second time, then replayed.

    torch.compile makes at most two forms of a pass over some sequences: one for all windows, whose size it is told not
    to rely on, and one for the whole cache, because a view of all of it is another operation than a view of a part.
    """

    def __init__(self, runner: ModelRunner, sequences: Sequences, inputs: torch.Tensor, window: int, compiled: bool):
        self.runner, self.sequences, self.window = runner, sequences, window
        self.inputs = inputs
        self.places = torch.arange(window, device=inputs.device)
        if compiled and window < sequences.cache.capacity:
            torch._dynamo.mark_dynamic(self.places, 0)
        self.start, self.last = (torch.zeros(1, dtype=torch.long, device=inputs.device) for _ in range(2))
        self.compiled = compiled
        self.run = runner._compiled if compiled else runner._pass
        self.met = 0
        self.graph: CapturedGraph | None = None

    def __call__(self, inputs: torch.Tensor, start: int, width: int) -> torch.Tensor:
        self.inputs[:, :width].copy_(inputs)
        self.start.fill_(start)
        self.last.fill_(width - 1)
        self.met += 1
        # It is captured only when it comes again, because most widths never do.
        if self.graph is None and self.met == 2:
            self.graph = self._capture()
        if self.graph is None:
            return self._compile() if self.compiled and self.met == 1 else self._pass()
        return self.graph.replay()

    def _pass(self) -> torch.Tensor:
        one_token = self.inputs.shape[1] == 1
        try:
            with grouped(self.runner.language_model) if one_token else contextlib.nullcontext():
                return self.run(self.sequences, self.inputs, self.places, self.start, self.last)
        finally:
            self.sequences.cache.positions = None

    def _compile(self) -> torch.Tensor:
        from torch._dynamo import exc

        began, what = time.perf_counter(), f"decode step of {len(self.inputs)} sequence(s) over {self.window} positions"
        try:
            logits = self._pass()
        except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
            # FailOnRecompileLimitHit comes where a process has met too many shapes.
            logger.warning("%s: runs without torch.compile: %s", what, error)
            self.run = self.runner._pass
            return self._pass()
        self.runner.captures.noted(f"{what}, compiled", began)
        return logits

    def _capture(self) -> CapturedGraph | None:
        what = f"CUDA graph of {self.inputs.shape[0]} x {self.inputs.shape[1]} positions over {self.window}"
        return self.sequences.graphs.capture(self._pass, self.inputs.device, what)


def fixed_positions(config) -> bool:
    """Whether a token's keys depend on its own position alone, and not on how long the sequence becomes."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("rope_type", "default") not in ("dynamic", "longrope")
