"""A decode loop for `generate(custom_generate=...)`.

It has one cache of fixed size, computes nothing twice, and does not wait for the device between tokens.
"""

import copy
import logging
import threading
from collections.abc import Sequence

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
from .prefix_store import PrefixStore
from .sequences import Sequences

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
    """

    def __init__(
        self, model: DecodableModel, *, kv_cache_bytes: int | None = None, graphs: bool = True, compiled: bool = False
    ):
        check_decodable(model)
        self.model = model
        if kv_cache_bytes is None:
            text, dtype = model.text_config, compute_dtype(model.language_model)
            kv_cache_bytes = max(LEAST_BYTES, text.max_position_embeddings * position_bytes(text, dtype))
        self.prefixes = PrefixStore(kv_cache_bytes)
        self.runner = ModelRunner(model, graphs=graphs, compiled=compiled)
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
                "with these options transformers' own loop decodes, and keys and values are not remembered: %s", reason
            )
        return reason

    def request(
        self,
        digests: Sequence[bytes] | None = None,
        streamer: BaseStreamer | None = None,
        generator: torch.Generator | None = None,
    ) -> "DecodingRequest":
        """The value of `custom_generate` for one call of `generate`.

        Args:
            digests: for each picture, in order, at least 16 bytes that only the same picture has; see
                `DecodableModel.position_keys`. Without them a prompt with pictures is neither looked up nor remembered.
            streamer: gets the ids. It is an argument here because `generate` passes no streamer to custom loops.
            generator: draws the samples, on the device of the ids. Default: torch's own on a CPU. On a GPU torch's own
                fails while another thread captures a graph, so a new one is seeded from torch's CPU generator.
        """
        return DecodingRequest(self, digests, streamer, generator)

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

    def _give_back(self, sequences: Sequences, state: tuple, keys: list[int] | None) -> None:
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
                    self.prefixes.put(keys, sequences.cache.read)
                except torch.OutOfMemoryError as error:
                    # The answer is complete. It must not be lost because its keys and values cannot be remembered.
                    logger.warning("keys and values of an answer are not kept: %s", error)
            sequences.hand_back()
            self._idle = sequences


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
    ):
        self.decoder, self.digests, self.streamer, self.generator = decoder, digests, streamer, generator
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
        sequences.fill(model_inputs.get("attention_mask"), model.pass_inputs(model_inputs))
        embeddings = model.embed(input_ids, **{name: model_inputs.get(name) for name in model.prompt_inputs})
        keys = self._keys(input_ids, model_inputs) if sequences.mask is None else None
        # The segments are held until the end, because another thread may drop them while they are being copied.
        known = []
        if keys is not None:
            # The last position is always run, for its logits.
            self.reused, known = decoder.prefixes.longest(keys[:-1])
            sequences.cache.write(known)
        logits = runner.prefill(sequences, embeddings[:, self.reused :])
        del embeddings

        ids = input_ids.new_zeros(len(input_ids), limit)
        ids[:, :length] = input_ids
        choice = _Choice(ids, generation_config, logits_processor, stopping_criteria, self.generator)
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
        if keys is not None:
            # No pass was run over the last token, so it has no keys and values.
            keys = self._keys(ids[:, : length - 1], model_inputs)
        known.clear()
        self.lengths = choice.lengths.tolist()
        decoder._give_back(sequences, state, keys)
        return ids[:, :length]

    def _keys(self, ids: torch.Tensor, model_inputs: dict) -> list[int] | None:
        """A number for every position, by which its keys and values are looked up; None where they cannot be."""
        if len(ids) > 1 or not self.decoder.prefixes.limit or not fixed_positions(self.decoder.runner.config):
            return None
        return self.decoder.model.position_keys(ids, model_inputs, self.digests)


class _Choice:
    """Chooses tokens as GenerationMixin does, on the device."""

    def __init__(
        self,
        ids: torch.Tensor,
        config: GenerationConfig,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        generator: torch.Generator | None,
    ):
        self.ids, self.processors, self.criteria = ids, processors, criteria
        self.sampled = config.do_sample
        if self.sampled and generator is None and ids.is_cuda:
            generator = torch.Generator(ids.device).manual_seed(int(torch.empty((), dtype=torch.long).random_()))
        self.generator = generator
        self.finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.lengths = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        # Rows that have ended are filled up while the others go on.
        ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.filling = config._pad_token_tensor.to(ids.device) if ends else None

    def __call__(self, logits: torch.Tensor, length: int) -> "_Record":
        """Chooses the token at position `length` of every row, and writes it into the ids."""
        logits = logits.to(self.ids.device, torch.float32)
        finite = logits.amax(dim=-1).isfinite()
        scores = self.processors(self.ids[:, :length], logits)
        if self.sampled:
            # A row without finite probabilities draws from equal ones instead. Its token is refused later; a
            # multinomial over NaN would make the CUDA context of the whole process unusable.
            probabilities = scores.softmax(dim=-1)
            usable = probabilities.amax(dim=-1).isfinite()
            chosen = torch.multinomial(
                torch.where(usable[:, None], probabilities, 1.0), num_samples=1, generator=self.generator
            )[:, 0]
        else:
            chosen, usable = scores.argmax(dim=-1), finite
        if self.filling is not None:
            chosen = torch.where(self.finished, self.filling, chosen)
        self.ids[:, length] = chosen
        self.lengths += ~self.finished
        self.finished = self.finished | self.criteria(self.ids[:, : length + 1], None)
        return _Record(chosen, self.finished.all(), finite.all(), usable.all())


class _Record:
    """What the host must know of a new token, copied to the host while the device goes on."""

    def __init__(self, chosen: torch.Tensor, *flags: torch.Tensor):
        # From a GPU, such a copy goes into pinned memory and the host does not wait for it.
        self._flags = len(flags)
        self._host = torch.cat([chosen, torch.stack(flags)]).to("cpu", non_blocking=True)
        self._copied = torch.cuda.current_stream(chosen.device).record_event() if chosen.is_cuda else None

    def read(self) -> tuple[torch.Tensor, list[bool]]:
        """The tokens [B]; whether all rows have ended, their logits were finite, and their tokens could be drawn."""
        if self._copied is not None:
            self._copied.synchronize()
        tokens, flags = self._host.split([len(self._host) - self._flags, self._flags])
        return tokens, [bool(flag) for flag in flags.tolist()]


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
