"""A decode loop for `generate(custom_generate=...)`.

It has one cache of fixed size, computes nothing twice, and does not wait for the device between tokens.
"""

import copy
import logging
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from ..errors import PromptError
from ..models.protocol import CACHE_NAMES, DecodableModel, check_decodable
from ..runtime.layer_dtypes import compute_dtype
from ..runtime.numerics import numerics
from ..runtime.placement import execution_device
from ..runtime.weights import Fingerprint
from .diagnose import where_not_finite
from .grouped_attention import in_force
from .kv_cache import position_bytes
from .model_runner import ModelRunner, fixed_positions
from .prefix_store import PrefixStore, Segment
from .sequences import Sequences
from .token_choice import TokenChoice

logger = logging.getLogger(__name__)

# The least default limit for remembered keys and values, in bytes: several conversations of a small model.
LEAST_BYTES = 2**30
# Settings of `generate`, with the only values that this loop supports.
_SUPPORTED_SETTINGS = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "return_dict_in_generate": False,
    "cache_implementation": None,
    "use_cache": True,
    "prefill_chunk_size": None,
    "token_healing": False,
    # They need the tokenizer, which `generate` does not pass to custom loops.
    "stop_strings": None,
}
# Arguments of `generate` beside its settings that this loop does not support.
_UNSUPPORTED_ARGUMENTS = (
    *CACHE_NAMES,
    "assistant_model",
    "synced_gpus",
    "custom_generate",
    "negative_prompt_ids",
    "inputs_embeds",
)


class Decoder:
    """Decodes with a model, and remembers keys and values for later prompts that begin alike.

    Threads may share a decoder: every request has its own cache, and one cache is kept for the next request.

    Args:
        model: the model that computes. Wrap a plain model of transformers in `mg_fast.models.causal_lm.CausalLM` first.
        kv_cache_bytes: most bytes of keys and values remembered, on the model's devices; 0 remembers nothing. The
            default holds the longest conversation that fits the model, but is at least `LEAST_BYTES`.
        graphs, compiled: see `ModelRunner`.
        keep_states: remember the last layer's hidden states beside keys and values, for `states`. They count as part of
            `kv_cache_bytes`.
    """

    def __init__(
        self,
        model: DecodableModel,
        *,
        kv_cache_bytes: int | None = None,
        graphs: bool = True,
        compiled: bool = False,
        keep_states: bool = False,
    ):
        check_decodable(model)
        self.model = model
        if kv_cache_bytes is None:
            text, dtype = model.text_config, compute_dtype(model.language_model)
            of_one = position_bytes(text, dtype, states=keep_states)
            kv_cache_bytes = max(LEAST_BYTES, text.max_position_embeddings * of_one)
        self.prefixes = PrefixStore(kv_cache_bytes)
        self.runner = ModelRunner(model, graphs=graphs, compiled=compiled, keep_states=keep_states)
        self._idle: Sequences | None = None
        self._state: tuple | None = None
        self._lock = threading.Lock()
        self._reasons_logged: set[str] = set()

    def refuses(self, options: dict) -> str | None:
        """Why `generate` must use its own loop for these options, as the end of a sentence; None where it need not.

        Each reason is logged once.
        """
        config = copy.deepcopy(options.get("generation_config") or self.model.generation_config)
        config.update(**{name: value for name, value in options.items() if name != "generation_config"})
        unsupported = next((name for name in _UNSUPPORTED_ARGUMENTS if options.get(name) is not None), None)
        reason = f"they set {unsupported}" if unsupported else _refusal(config, options.get("assistant_model"))
        if reason is not None and reason not in self._reasons_logged:
            self._reasons_logged.add(reason)
            logger.warning(
                "with these options mg_fast's own loop does not decode, and keys and values are not remembered: %s",
                reason,
            )
        return reason

    def request(
        self,
        digests: Sequence[bytes] | None = None,
        streamer: BaseStreamer | None = None,
        generator: torch.Generator | None = None,
        scope: Hashable = None,
    ) -> "DecodingRequest":
        """The value of `custom_generate` for one call of `generate`.

        Args:
            digests: for each picture, in order, at least 16 bytes that only the same picture has; see
                `DecodableModel.position_keys`. Without them a prompt with pictures is neither looked up nor remembered.
            streamer: gets the ids. It is an argument here because `generate` passes no streamer to custom loops.
            generator: draws the samples, on the device of the ids. Default: torch's own on a CPU. On a GPU torch's own
                fails while another thread captures a graph, so a new one is seeded from torch's CPU generator.
            scope: keys and values are found by requests of the same scope only, until `prefixes.drop(scope)`.
        """
        return DecodingRequest(self, digests, streamer, generator, scope)

    @torch.inference_mode()
    def states(
        self, input_ids: torch.Tensor, model_inputs: Mapping[str, object], digests: Sequence[bytes] | None = None
    ) -> torch.Tensor:
        """The last layer's hidden states of sequences, after the final norm.

        Only positions that are not remembered from earlier answers or calls are run. They are remembered as after an
        answer. No token is generated.

        Args:
            input_ids: [B, L].
            model_inputs: the other inputs that `generate` would be called with, such as attention_mask [B, L].
            digests: as for `request`.

        Returns:
            [B, L, hidden], a copy. At positions where the attention mask is 0 the numbers mean nothing.

        Raises:
            ValueError: this decoder does not keep states.
            FloatingPointError: states are not finite, and the message names the layers where that begins.
        """
        if not self.runner.keep_states:
            raise ValueError("this decoder keeps no states: make it by Decoder(model, keep_states=True)")
        length = input_ids.shape[1]
        sequences, state = self._take(len(input_ids), length)
        begun = self._begin(sequences, input_ids, model_inputs, digests, most=length)
        if begun.embeddings.shape[1]:
            self.runner.prefill(sequences, begun.embeddings)
        states = sequences.cache.states[:, :length].clone()
        finite = states.isfinite().all(dim=-1)
        if sequences.mask is not None:
            finite |= sequences.mask[:, :length] == 0
        if not finite.all():
            symptom = "the hidden states are not finite"
            raise FloatingPointError(where_not_finite(self.model, input_ids, length, model_inputs, symptom=symptom))
        begun.known.clear()
        self._give_back(sequences, state, begun.keys)
        return states

    def forget(self) -> None:
        """Drops all keys and values and all captured graphs."""
        self.prefixes.clear()
        with self._lock:
            self._idle = self._state = None

    def rest(self) -> None:
        """Frees an idle cache of several sequences, which is large; remembered keys and values stay."""
        with self._lock:
            if self._idle is not None and self._idle.cache.batch > 1:
                self._idle = None

    def _take(self, batch: int, positions: int) -> tuple[Sequences, tuple]:
        """A cache for a request, the idle one if it fits, and the state of the model, which `_give_back` takes."""
        state = _state(self.model)
        with self._lock:
            if state != self._state:
                # Keys, values and graphs were made with other weights or other arithmetic.
                self.prefixes.clear()
                self._idle, self._state = None, state
            state, idle, self._idle = self._state, self._idle, None
        if idle is not None and idle.cache.batch == batch and idle.cache.capacity >= positions:
            idle.take_over()
            return idle, state
        del idle
        return self.runner.sequences(batch, positions), state

    def _begin(
        self,
        sequences: Sequences,
        input_ids: torch.Tensor,
        model_inputs: Mapping[str, object],
        digests: Sequence[bytes] | None,
        *,
        most: int,
        scope: Hashable = None,
    ) -> "_Begun":
        """Fills an empty cache with what is remembered of the first `most` positions of a prompt [B, L]."""
        model = self.model
        sequences.fill(model_inputs.get("attention_mask"), model.pass_inputs(model_inputs))
        embeddings = model.embed(input_ids, **{name: model_inputs.get(name) for name in model.prompt_inputs})
        keys = self._keys(input_ids, model_inputs, digests) if sequences.mask is None else None
        reused, known = (0, []) if keys is None else self.prefixes.longest(keys[:most], scope)
        sequences.cache.write(known)
        return _Begun(embeddings[:, reused:], reused, keys, known)

    def _keys(
        self, ids: torch.Tensor, model_inputs: Mapping[str, object], digests: Sequence[bytes] | None
    ) -> list[int] | None:
        """A number for every position, by which its keys and values are looked up; None where they cannot be."""
        if len(ids) > 1 or not self.prefixes.limit or not fixed_positions(self.runner.config):
            return None
        return self.model.position_keys(ids, model_inputs, digests)

    def _give_back(self, sequences: Sequences, state: tuple, keys: list[int] | None, scope: Hashable = None) -> None:
        """Keeps the cache for the next request, and remembers its keys and values under the keys of their positions."""
        with self._lock:
            # Identity, not equality: if everything was forgotten meanwhile, this cache is dropped as well, even though
            # a later request may have set an equal state.
            if state is not self._state:
                return
            cache = sequences.cache
            # Keys and values that exceed the whole limit are not even copied.
            if keys is not None and cache.nbytes * len(keys) <= self.prefixes.limit * cache.capacity:
                try:
                    self.prefixes.put(keys, sequences.cache.read, scope)
                except torch.OutOfMemoryError as error:
                    # The answer is complete. It must not be lost because its keys and values cannot be remembered.
                    logger.warning("keys and values of an answer are not kept: %s", error)
            sequences.hand_back()
            self._idle = sequences


@dataclass
class _Begun:
    """How far a prompt is known, and what of it is still to be run.

    Attributes:
        embeddings: [B, L - reused, hidden], of the positions to run.
        reused: number of first positions that were remembered.
        keys: the numbers of all positions; None where nothing can be looked up or remembered.
        known: what was remembered. It is held until the end of the request, because another thread may drop it while it
            is being copied.
    """

    embeddings: torch.Tensor
    reused: int
    keys: list[int] | None
    known: list[Segment]


class DecodingRequest:
    """The loop of one call of `generate(custom_generate=...)`; `Decoder.request` makes one.

    Attributes:
        reused: number of the prompt's positions whose keys and values were remembered.
        lengths: number of new tokens of each row up to its end; the tokens after it are filling.
    """

    def __init__(
        self,
        decoder: Decoder,
        digests: Sequence[bytes] | None,
        streamer: BaseStreamer | None,
        generator: torch.Generator | None,
        scope: Hashable = None,
    ):
        self.decoder, self.digests, self.streamer, self.generator = decoder, digests, streamer, generator
        self.scope = scope
        self.reused = 0
        self.lengths: list[int] = []

    @torch.inference_mode()
    def __call__(
        self,
        generating: nn.Module,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_inputs,
    ) -> torch.Tensor:
        """Continues ids [B, L] to [B, L + new], as GenerationMixin's own loops do.

        Args:
            generating: the model of transformers whose `generate` calls this. It is not used: the decoder's model is
                the one that runs.
            **model_inputs: the other inputs that `generate` was called with.

        Raises:
            PromptError: the settings ask for something that this loop does not support.
            FloatingPointError: logits are not finite, and the message names the layers where that begins; or no token
                can be drawn from them.
        """
        if reason := _refusal(generation_config):
            raise PromptError(
                f"this loop only decodes greedily or samples, and returns ids, but the settings differ: {reason}"
            )
        decoder, runner, model = self.decoder, self.decoder.runner, self.decoder.model
        length, limit = input_ids.shape[1], stopping_criteria.max_length
        sequences, state = decoder._take(len(input_ids), limit)
        # The last position is always run, for its logits.
        begun = decoder._begin(sequences, input_ids, model_inputs, self.digests, most=length - 1, scope=self.scope)
        self.reused = begun.reused
        logits = runner.prefill(sequences, begun.embeddings)
        del begun.embeddings

        ids = input_ids.new_zeros(len(input_ids), limit)
        ids[:, :length] = input_ids
        choice = TokenChoice(ids, generation_config, logits_processor, stopping_criteria, self.generator)
        if self.streamer is not None:
            # `generate` hands over the prompt first, too; streamers skip it.
            self.streamer.put(input_ids.cpu())
        # A GPU runs the next pass while the host reads this token. On a CPU there is nothing to overlap, and a pass
        # that turns out not to be needed would cost time.
        ahead = ids.is_cuda
        while True:
            record = choice(logits, length)
            length += 1
            if ahead and length < limit:
                logits = runner.step(sequences, ids[:, length - 1])
            tokens, (done, finite, usable) = record.read()
            if not finite:
                raise FloatingPointError(
                    where_not_finite(model, ids[:, : length - 1], input_ids.shape[1], model_inputs)
                )
            if not usable:
                new = length - input_ids.shape[1]
                raise FloatingPointError(
                    f"new token {new} cannot be drawn: temperature or logits processors left no finite probabilities"
                )
            if self.streamer is not None:
                self.streamer.put(tokens)
            if done or length == limit:
                break
            if not ahead:
                logits = runner.step(sequences, ids[:, length - 1])
        if self.streamer is not None:
            self.streamer.end()
        keys = begun.keys
        if keys is not None:
            # No pass was run over the last token, so it has no keys and values.
            keys = decoder._keys(ids[:, : length - 1], model_inputs, self.digests)
        begun.known.clear()
        self.lengths = choice.lengths.tolist()
        decoder._give_back(sequences, state, keys, self.scope)
        return ids[:, :length]


def _refusal(config: GenerationConfig, assistant_model: object = None) -> str | None:
    """What the settings ask for that this loop does not support, as the end of a sentence; None if nothing."""
    mode = config.get_generation_mode(assistant_model)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"they ask for {mode.value.replace('_', ' ')}"
    for name, plain in _SUPPORTED_SETTINGS.items():
        if (value := getattr(config, name, plain)) not in (plain, None):
            return f"they set {name}={value!r}"
    return None


def _state(model: DecodableModel) -> tuple:
    """What keys, values and graphs depend on beside the tokens: they cannot be used with another state."""
    arithmetic = numerics(execution_device(model.head))
    return Fingerprint((model.language_model, model.head)), arithmetic, in_force(model.text_config)
