"""Passes of a language model over a KVCache: a prompt in chunks, then a token at a time; on a GPU as graphs."""

import logging
import time
from dataclasses import dataclass, field

import torch
from torch import nn

from ..models.protocol import NO_PASS_INPUTS, DecodableModel, PassInputs
from ..ops.torch.pointwise import by_onednn, take_onednn
from ..quantization import EXPERTS_FUNCTION
from ..runtime.graphs import CapturedGraph, Captures, GraphCache
from ..runtime.layer_dtypes import call
from ..runtime.numerics import numerics
from ..runtime.weights import why_not_plain
from .kv_cache import KVCache

logger = logging.getLogger(__name__)

# positions of a prompt in one pass: enough to keep every product busy, and what lies between the layers stays small in
# HD
PREFILL_CHUNK = 1024
# a graph's window is a multiple of it, so that graphs serve many lengths; so is a cache's capacity
WINDOW = 512
# a cache of one sequence is a multiple of it: a conversation outgrows its cache, and with it all graphs, seldom
ONE_SEQUENCE = 2048
# widths of prompts' graphs: a prompt is filled up to the next
WIDTHS = (64, 128, 192, 256, 384, 512, 640, 768, 896, 1024)
# graphs kept for a cache, the one used longest ago goes first
MAX_GRAPHS = 16


@dataclass
class Sequences:
    """`B` sequences that are decoded side by side, and what passes over them share.

    Attributes:
        cache: their keys and values; position j of all rows lies at j.
        by_graph: whether passes are captured.
        pads: int64 [B], how many positions at the beginning of each row are filling; None where there is none.
        mask: int64 [B, capacity], 0 at the filling; None as `pads`.
        pass_inputs: what every pass takes besides. Where passes are captured, it lies where they read it, with a row
            for every position of the cache.
        graphs: captured passes over this cache, by (tokens or embeddings, width, window). They share their memory, as
            one of them runs at a time. Their stream is not shared with other caches, whose graphs may run at the same
            time.
        arithmetic: what changes the arithmetic of passes, see `numerics`, as it was when the prompt came.
        written: by GPU, an event that was recorded after the last pass of the request that gave the cache back.
    """

    cache: KVCache
    by_graph: bool
    graphs: GraphCache
    pads: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    pass_inputs: PassInputs = NO_PASS_INPUTS
    arithmetic: tuple = ()
    written: dict[torch.device, torch.cuda.Event] = field(default_factory=dict)

    def hand_back(self) -> None:
        """Called on the stream of the request that is done with the cache: a pass that ran ahead of its end may still
        be writing.
        """
        if not self.by_graph:
            # a request's features must not stay in memory as long as its cache does
            self.pass_inputs = NO_PASS_INPUTS
        gpus = [device for device in self.cache.devices if device.type == "cuda"]
        self.written = {device: torch.cuda.current_stream(device).record_event() for device in gpus}

    def take_over(self) -> None:
        """Called on the stream of the next request: it waits for the last pass of the one before, which may be on
        another stream.
        """
        for device, event in self.written.items():
            stream = torch.cuda.current_stream(device)
            stream.wait_event(event)
            # torch must not give the memory to anybody else before this stream is done with it, either
            self.cache.record_stream(stream)
            for tensor in self._read_by_passes():
                if tensor.device == device:
                    tensor.record_stream(stream)
        self.written = {}

    def _read_by_passes(self) -> list[torch.Tensor]:
        """What passes read beside the cache, and whoever runs one writes anew."""
        kept = [tensor for tensor in (self.mask, self.pads, *self.pass_inputs.tensors) if tensor is not None]
        return kept + [tensor for graph in self.graphs.entries() for tensor in (graph.inputs, graph.start, graph.last)]

    def fill(self, attention_mask: torch.Tensor | None, pass_inputs: PassInputs = NO_PASS_INPUTS) -> None:
        """Empties the cache, and takes what the passes of the next request read.

        Args:
            attention_mask: [B, L], 0 at positions on the left that are filling.
            pass_inputs: what every pass takes besides.
        """
        self.cache.length = 0
        self._take_pass_inputs(pass_inputs)
        padded = attention_mask is not None and not bool(attention_mask.all())
        if not padded:
            if self.mask is not None:
                self.graphs.clear()
            self.pads = self.mask = None
            return
        mask = attention_mask.new_ones(self.cache.batch, self.cache.capacity, dtype=torch.long)
        mask[:, : attention_mask.shape[1]] = attention_mask
        if self.mask is None:
            self.graphs.clear()
            self.mask, self.pads = mask, (mask == 0).sum(dim=1)
        else:
            # where graphs read them
            self.mask.copy_(mask)
            self.pads.copy_((mask == 0).sum(dim=1))

    def _take_pass_inputs(self, given: PassInputs) -> None:
        if self.by_graph:
            # Captured passes go on reading the tensors that they were captured with, so later ones are copied into
            # these.
            given = given.extended(self.cache.capacity)
            if given.layout == self.pass_inputs.layout:
                for kept, tensor in zip(self.pass_inputs.tensors, given.tensors):
                    kept.copy_(tensor)
                return
            self.graphs.clear()
            given = given.copied()
        self.pass_inputs = given


class ModelRunner:
    """Runs a model's language model over sequences.

    On a GPU a pass of a width and window that was met before is captured in a CUDA graph and replayed: a launch instead
    of a thousand. It then attends to a whole window under a mask. Elsewhere, and where `graphs_refused` has a reason,
    passes see exactly the positions that are there, by the model's own attention implementation.

    Args:
        model: whose language model and head run.
        graphs: capture passes in CUDA graphs; without, less memory is taken.
        compiled: a token's pass goes through torch.compile before it is captured: seconds to a minute at first use,
            then fewer, larger kernels. Its window is the cache's whole capacity.

    Attributes:
        captures: whether passes may still be captured, and how long captures took, over all sequences.
    """

    def __init__(self, model: DecodableModel, *, graphs: bool = True, compiled: bool = False):
        self.model = model
        take_onednn(self.language_model)
        take_onednn(self.head)
        self._graphs = graphs
        self._compiled = torch.compile(self._pass, fullgraph=True, dynamic=False) if compiled else None
        self._told = False
        self.captures = Captures()

    @property
    def first_use(self) -> dict[str, float]:
        """Seconds that were spent once: on compiling, and on every capture."""
        return self.captures.first_use

    @property
    def config(self):
        """The language model's configuration."""
        return self.model.text_config

    @property
    def language_model(self) -> nn.Module:
        # looked up: resizing, adapters and loading put other modules in their places
        return self.model.language_model

    @property
    def head(self) -> nn.Module:
        return self.model.head

    def sequences(self, batch: int, positions: int) -> Sequences:
        """Room for so many sequences of at least so many positions."""
        unit = ONE_SEQUENCE if batch == 1 else WINDOW
        capacity = -(-positions // unit) * unit
        refused = self.graphs_refused(capacity)
        if refused is not None and self._compiled is not None and not self._told:
            self._told = True
            logger.warning("nothing is compiled (compiled=True, --compile): %s", refused)
        if refused is not None:
            logger.debug("passes are not captured: %s", refused)
        by_graph = refused is None
        if not by_graph:
            # heads a power of two of bytes apart would share the sets of a CPU's caches
            capacity += 32
        cache = KVCache(self.config.num_hidden_layers, batch, capacity, masked=by_graph)
        return Sequences(cache, by_graph, GraphCache(MAX_GRAPHS, self.captures, shared_memory=True))

    def graphs_refused(self, capacity: int) -> str | None:
        """Why passes are not captured, as the end of a sentence; None where they are."""
        if not self._graphs:
            return "nobody wants them"
        language, head = self.language_model, self.head
        devices = {p.device for part in (language, head) for p in part.parameters()}
        if len(devices) > 1 or next(iter(devices)).type != "cuda":
            return "the language model is not on one GPU"
        if self.config._attn_implementation != "sdpa":
            return f"attention is {self.config._attn_implementation}: only sdpa takes a mask over a fixed window"
        window = getattr(self.config, "sliding_window", None)
        if window is not None and window < capacity:
            return f"attention slides over {window} positions"
        if self.config._experts_implementation == "eager" and hasattr(self.config, "num_local_experts"):
            return "its experts are chosen on the host (experts_implementation eager)"
        if not fixed_positions(self.config):
            return "its rotary positions depend on the length of the sequence"
        if torch.is_autocast_enabled("cuda"):
            return "autocast drops its casts of the weights, which a graph would go on reading"
        # Their own forwards are captured with whatever tensors they have, quantized ones too.
        if any(why_not_plain("it", part, reads=()) for whole in (language, head) for part in whole.modules()):
            return "hooks on the language model would run at the capture alone"
        return None

    def _asks_host(self, tokens: int) -> bool:
        """Whether quantised experts ask the host where so many tokens go, which no graph can."""
        config = self.config
        return (
            config._experts_implementation == EXPERTS_FUNCTION
            and tokens * config.num_experts_per_tok > config.num_local_experts
        )

    def prefill(self, sequences: Sequences, embeddings: torch.Tensor) -> torch.Tensor:
        """New positions of all sequences; logits [B, vocabulary] of the last.

        Args:
            embeddings: [B, L, hidden].
        """
        # Once a request: captured passes keep the arithmetic that they were captured with.
        sequences.arithmetic = numerics(embeddings.device)
        for chunk in embeddings.split(PREFILL_CHUNK, dim=1):
            width = chunk.shape[1]
            # filling lies in the cache until what comes next overwrites it
            filled = next(w for w in WIDTHS if w >= width)
            fits = sequences.cache.length + filled <= sequences.cache.capacity
            if sequences.by_graph and fits and not self._asks_host(len(chunk) * filled):
                logits = self._by_graph(sequences, chunk, width, filled)
            else:
                logits = self._run(sequences, chunk)
            sequences.cache.length += width
        return logits

    def step(self, sequences: Sequences, tokens: torch.Tensor) -> torch.Tensor:
        """One more token int64 [B] of every sequence; logits [B, vocabulary] of what follows. Nothing waits for the
        device.
        """
        if sequences.by_graph and not self._asks_host(len(tokens)):
            logits = self._by_graph(sequences, tokens[:, None], 1, 1)
        else:
            logits = self._run(sequences, self.model.embed_ids(tokens[:, None]))
        sequences.cache.length += 1
        return logits

    def _run(self, sequences: Sequences, embeddings: torch.Tensor) -> torch.Tensor:
        """Over exactly the positions that there are."""
        cache = sequences.cache
        stop = cache.length + embeddings.shape[1]
        positions = torch.arange(cache.length, stop, device=embeddings.device)
        besides, positions, mask = sequences.pass_inputs.at(positions), positions[None], None
        if sequences.mask is not None:
            mask = sequences.mask[:, :stop]
            positions = (positions - sequences.pads[:, None]).clamp(min=0)
        with by_onednn():
            hidden = self.language_model(
                inputs_embeds=embeddings,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **besides,
            ).last_hidden_state
            return call(self.head, hidden[:, -1:])[:, -1]

    def _by_graph(self, sequences: Sequences, inputs: torch.Tensor, width: int, filled: int) -> torch.Tensor:
        """Tokens [B, 1] or embeddings [B, width, hidden] through a graph of a width of `filled`, captured when it is
        met again.
        """
        cache = sequences.cache
        compiled = filled == 1 and self._compiled is not None
        window = cache.capacity if compiled else min(cache.capacity, -(-(cache.length + filled) // WINDOW) * WINDOW)
        key = (inputs.dtype, filled, window, sequences.arithmetic)
        shape = (inputs.shape[0], filled, *inputs.shape[2:])
        graph = sequences.graphs.entry(key, lambda: _Graph(self, sequences, inputs.new_zeros(shape), window, compiled))
        return graph(inputs, cache.length, width)

    def _pass(
        self, sequences: Sequences, inputs: torch.Tensor, start: torch.Tensor, last: torch.Tensor
    ) -> torch.Tensor:
        """What a graph holds: of fixed shapes, without a word from the host.

        Args:
            inputs: tokens int64 [B, Q] or embeddings [B, Q, hidden].
            start: int64 [1], the first position.
            last: int64 [1], which of the Q gets logits.
        """
        cache = sequences.cache
        embeddings = inputs if inputs.is_floating_point() else self.model.embed_ids(inputs)
        positions = start + torch.arange(inputs.shape[1], device=inputs.device)
        cache.positions = positions
        places = torch.arange(cache.window, device=inputs.device)
        mask = (places <= positions[:, None])[None, None]
        ids = positions[None]
        if sequences.mask is not None:
            # filling sees itself: where a row sees nothing kernels may write NaN, which no mask keeps out of what
            # follows
            mask = (mask & (sequences.mask[:, None, None, : cache.window] != 0)) | (places == positions[:, None])
            ids = (ids - sequences.pads[:, None]).clamp(min=0)
        besides = sequences.pass_inputs.at(positions)
        hidden = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=ids,
            past_key_values=cache,
            use_cache=True,
            **besides,
        ).last_hidden_state
        return call(self.head, hidden.index_select(1, last))[:, 0]


class _Graph:
    """A pass of one width over one window: run as it is when first met, then captured, then replayed."""

    def __init__(self, runner: ModelRunner, sequences: Sequences, inputs: torch.Tensor, window: int, compiled: bool):
        self.runner, self.sequences, self.window = runner, sequences, window
        self.inputs = inputs
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
        # once is luck: most widths never come again
        if self.graph is None and self.met == 2:
            self.graph = self._capture()
        if self.graph is None:
            return self._compile() if self.compiled and self.met == 1 else self._pass()
        return self.graph.replay()

    def _pass(self) -> torch.Tensor:
        cache = self.sequences.cache
        cache.window = self.window
        try:
            return self.run(self.sequences, self.inputs, self.start, self.last)
        finally:
            cache.positions = None

    def _compile(self) -> torch.Tensor:
        from torch._dynamo import exc

        began, what = time.perf_counter(), f"decode step of {len(self.inputs)} sequence(s) over {self.window} positions"
        try:
            logits = self._pass()
        except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
            # the latter comes where a process has met too many shapes
            logger.warning("%s: without torch.compile: %s", what, error)
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
