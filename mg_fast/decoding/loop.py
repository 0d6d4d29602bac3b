"""A decode loop for `generate(custom_generate=...)`: one fixed cache, nothing computed twice, no wait for the device
between tokens.
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
from ..models.protocol import DecodableModel, check_decodable
from ..runtime.layer_dtypes import compute_dtype
from ..runtime.numerics import numerics
from ..runtime.placement import execution_device
from ..runtime.weights import Fingerprint
from .diagnose import where_not_finite
from .kv_cache import position_bytes
from .model_runner import ModelRunner, Sequences, fixed_positions
from .prefix_store import PrefixStore

logger = logging.getLogger(__name__)

# of keys and values, where nobody says how many: several conversations of a small model
LEAST_BYTES = 2**30
# settings, as they must be, under which `generate` needs nothing that this loop does not have
_PLAIN = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "return_dict_in_generate": False,
    "cache_implementation": None,
    "use_cache": True,
    "prefill_chunk_size": None,
    "token_healing": False,
    # `generate` does not hand its tokenizer on to other loops
    "stop_strings": None,
}
# arguments of `generate` that are no settings, and that this loop does not take
_FOREIGN = (
    "past_key_values",
    "assistant_model",
    "synced_gpus",
    "custom_generate",
    "negative_prompt_ids",
    "inputs_embeds",
)


class Decoder:
    """Decodes with a model, and remembers the keys and values of what it has read, for prompts that begin alike.

    Threads may share it: every request has a cache of its own, of which one is kept for the next.

    Args:
        model: what computes; a plain model of transformers goes into `mg_fast.models.causal_lm.CausalLM` first.
        kv_cache_bytes: most bytes of keys and values remembered, on the model's devices; 0 remembers nothing. Default:
            those of the longest conversation that the model can hold, but at least `LEAST_BYTES`.
        graphs, compiled: as of `ModelRunner`.
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
        self._said: set[str] = set()

    def refuses(self, options: dict) -> str | None:
        """Why `generate` with these options must decode by itself, as the end of a sentence; None where this can. Each
        is said once.
        """
        config = copy.deepcopy(options.get("generation_config") or self.model.generation_config)
        config.update(**{name: value for name, value in options.items() if name != "generation_config"})
        foreign = next((name for name in _FOREIGN if options.get(name) is not None), None)
        reason = f"{foreign} came" if foreign else _refusal(config, options.get("assistant_model"))
        if reason is not None and reason not in self._said:
            self._said.add(reason)
            logger.warning(
                "transformers' own loop decodes under these options, and keeps no keys and values: %s", reason
            )
        return reason

    def request(
        self,
        digests: Sequence[bytes] | None = None,
        streamer: BaseStreamer | None = None,
        generator: torch.Generator | None = None,
    ) -> "DecodingRequest":
        """What `custom_generate` takes, for one call.

        Args:
            digests: for each picture, in order, 16 bytes or more that only the same picture has, as of
                `DecodableModel.position_keys`; without them a prompt with pictures is neither looked up nor remembered.
            streamer: gets the ids; here, as `generate` hands none on to other loops.
            generator: what samples are drawn by, on the device of the ids. Default: torch's own; on a GPU one seeded by
                torch's own of the CPU, as that of the GPU fails while another thread captures a graph.
        """
        return DecodingRequest(self, digests, streamer, generator)

    def forget(self) -> None:
        """Drops all keys and values and captured graphs."""
        self.prefixes.clear()
        with self._lock:
            self._idle = self._state = None

    def rest(self) -> None:
        """Hands back the memory of a cache of several sequences, which is large; what is remembered stays."""
        with self._lock:
            if self._idle is not None and self._idle.cache.batch > 1:
                self._idle = None

    def _take(self, batch: int, positions: int) -> tuple[Sequences, tuple]:
        """The idle cache, where it is of that batch and large enough, or another; and the model's state, to give it
        back with.
        """
        state = _state(self.model)
        with self._lock:
            if state != self._state:
                # the weights are not those that keys, values and graphs were made with
                self.prefixes.clear()
                self._idle, self._state = None, state
            state, idle, self._idle = self._state, self._idle, None
        if idle is not None and idle.cache.batch == batch and idle.cache.capacity >= positions:
            idle.take_over()
            return idle, state
        del idle
        return self.runner.sequences(batch, positions), state

    def _give_back(self, sequences: Sequences, state: tuple, keys: list[int] | None) -> None:
        """Keeps the cache for the next request and, by their keys, what is in it."""
        with self._lock:
            # not if all was forgotten meanwhile, though another request of the same state came since
            if state is not self._state:
                return
            cache = sequences.cache
            # what is larger than all room is not even copied
            if keys is not None and cache.nbytes * len(keys) <= self.prefixes.limit * cache.capacity:
                try:
                    self.prefixes.put(keys, sequences.cache.read)
                except torch.OutOfMemoryError as error:
                    # the answer is there: it is not lost over what the next one would save
                    logger.warning("keys and values of an answer are not kept: %s", error)
            sequences.hand_back()
            self._idle = sequences


class DecodingRequest:
    """One call of `generate(custom_generate=...)`; made by `Decoder.request`.

    Attributes:
        reused: positions of the prompt whose keys and values were at hand.
        lengths: new tokens of each row up to its end; what follows is filling.
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
        """As GenerationMixin's own loops: ids [B, L] to [B, L + new].

        Args:
            generating: the model of transformers whose `generate` calls this; how it is asked, the decoder's model
                knows.
            **model_inputs: what else `generate` was called with.

        Raises:
            FloatingPointError: logits are not finite; the message names the layers where that begins.
        """
        if reason := _refusal(generation_config):
            raise PromptError(f"this loop decodes greedily or samples, and returns ids: {reason}")
        decoder, runner, model = self.decoder, self.decoder.runner, self.decoder.model
        length, limit = input_ids.shape[1], stopping_criteria.max_length
        sequences, state = decoder._take(len(input_ids), limit)
        sequences.fill(model_inputs.get("attention_mask"), model.pass_inputs(model_inputs))
        embeddings = model.embed(input_ids, **{name: model_inputs.get(name) for name in model.prompt_inputs})
        keys = self._keys(input_ids, model_inputs) if sequences.mask is None else None
        # held to the end: another thread may drop them while they are copied
        known = []
        if keys is not None:
            # the last position is run in any case, for its logits
            self.reused, known = decoder.prefixes.longest(keys[:-1])
            sequences.cache.write(known)
        logits = runner.prefill(sequences, embeddings[:, self.reused :])
        del embeddings

        ids = input_ids.new_zeros(len(input_ids), limit)
        ids[:, :length] = input_ids
        choice = _Choice(ids, generation_config, logits_processor, stopping_criteria, self.generator)
        if self.streamer is not None:
            # as `generate` does; streamers pass over it
            self.streamer.put(input_ids.cpu())
        # a GPU runs the next pass while the host reads this token; a CPU would only work on what may not be needed
        ahead = ids.is_cuda
        while True:
            record = choice(logits, length)
            length += 1
            if ahead and length < limit:
                logits = runner.step(sequences, ids[:, length - 1])
            tokens, (done, finite, usable) = record.read()
            if not finite:
                raise FloatingPointError(where_not_finite(model, ids[:, : length - 1], model_inputs))
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
            # No pass was made over the last token, so there are no keys and values of it.
            keys = self._keys(ids[:, : length - 1], model_inputs)
        known.clear()
        self.lengths = choice.lengths.tolist()
        decoder._give_back(sequences, state, keys)
        return ids[:, :length]

    def _keys(self, ids: torch.Tensor, model_inputs: dict) -> list[int] | None:
        """A number for every position, by which keys and values are looked up; None where they cannot be."""
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
        # rows that ended are filled up while others go on
        ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.filling = config._pad_token_tensor.to(ids.device) if ends else None

    def __call__(self, logits: torch.Tensor, length: int) -> "_Record":
        """The token at `length` of every row, written into the ids."""
        logits = logits.to(self.ids.device, torch.float32)
        finite = logits.amax(dim=-1).isfinite()
        scores = self.processors(self.ids[:, :length], logits)
        if self.sampled:
            # of a row that cannot be drawn anything is, as it is refused below; on a GPU multinomial would end the
            # process' context
            shares = scores.softmax(dim=-1)
            usable = shares.amax(dim=-1).isfinite()
            chosen = torch.multinomial(
                torch.where(usable[:, None], shares, 1.0), num_samples=1, generator=self.generator
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
    """What the host must know of a token, on its way there while the device goes on."""

    def __init__(self, chosen: torch.Tensor, *flags: torch.Tensor):
        # on a GPU such a copy lands in pinned memory and does not wait
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
    """What the settings ask for that is not here; None where all is."""
    mode = config.get_generation_mode(assistant_model)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"they ask for {mode.value.replace('_', ' ')}"
    for name, plain in _PLAIN.items():
        if (value := getattr(config, name, plain)) not in (plain, None):
            return f"they set {name}={value!r}"
    return None


def _state(model: DecodableModel) -> tuple:
    """What keys, values and graphs depend on beside the tokens: another one means that they are of no use any more."""
    arithmetic = numerics(execution_device(model.head))
    attention = model.text_config._attn_implementation
    return Fingerprint((model.language_model, model.head)), arithmetic, attention
