"""`python -m bench serving`: a plan for serving the published models on 1, 8 and 64 GPUs, computed without a GPU.

Weights are counted in models without values. What a step of the engine takes beside them, and the least times of a
request, come from sizes. Nothing of it was measured.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from mg_fast import MiniGeminiForConditionalGeneration
from mg_fast.integrations.vllm_command import default_options
from mg_fast.testing.random_checkpoints import make_config

from . import records
from .costs import floors, peak_memory
from .costs.answer import ModelledAnswer
from .costs.gpus import find_gpu
from .costs.mining import Sizes
from .errors import BadRecord
from .figures import Records, markdown, wrapped
from .issue.published import RECORD, read
from .issue.whole_models import Row, read_whole
from .memory import versions

RECORDED = records.RESULTS / "serving.json"
SAVE = "`python -m bench serving --save`"
# The models of the tables: size and picture.
MODELS = tuple(size + hd for size in ("7b", "13b", "8x7b", "34b") for hd in ("", "-hd"))
# Numbers of GPUs that a language model is divided over, and the memory of the cards, in 10^9 bytes.
DIVISIONS = (1, 2, 4, 8)
CARDS_GB = (80, 141)
# An engine that has room for fewer requests than this is divided over more GPUs.
LEAST_REQUESTS = 32
# vLLM's share of a card's memory, and the most requests that it runs at once on such cards (defaults of vLLM 0.32).
SHARE, MOST_REQUESTS = 0.92, 1024
# The most requests at once that the times assume: beyond that, a token of each would take long.
BATCH = 256
GPU = "h200"
# GB/s that an H200 sends to others over NVLink: half of the 900 of its data sheet, which counts both directions.
LINK_GBPS = 450


@dataclass(frozen=True)
class ServedModel:
    """What serving a published model takes; bytes, and milliseconds of one GPU.

    A request is one picture that was not seen before, 64 tokens of text, and an answer of 128 tokens.

    Args:
        language: weights of the language model.
        picture_side: weights of towers, mining and projector, and the packed copies of the towers.
        pictures: the most that one step encodes.
        encoding: the most that encoding these pictures allocates.
        budget: tokens that one step takes up.
        step: the most that one step of the language model allocates, by the number of GPUs that it is divided over.
        cache: keys and values of a request at its end, by the number of GPUs.
        encode_ms: from a decoded picture to its image tokens, at least.
        prefill_ms: the prompt through the language model, at least.
        decode_ms: the answer, at least: its share of steps that serve `batch` requests.
        exchanged: bytes that the ranks of a divided language model sum up for a request.
    """

    language: int
    picture_side: int
    pictures: int
    encoding: int
    budget: int
    step: Mapping[str, int]
    cache: Mapping[str, int]
    encode_ms: float
    prefill_ms: float
    decode_ms: float
    batch: int
    exchanged: int

    def taken(self, gpus: int) -> int:
        """Bytes on each of the GPUs that the language model is divided over, without keys and values."""
        return self.language // gpus + self.picture_side + max(self.encoding, self.step[str(gpus)])

    def requests(self, gpus: int, card_gb: float) -> int:
        """How many requests' keys and values fit beside it; 0 or fewer where it does not fit."""
        room = SHARE * card_gb * 1e9 - self.taken(gpus)
        return min(MOST_REQUESTS, int(room // self.cache[str(gpus)]))

    def division(self, card_gb: float) -> int | None:
        """The fewest GPUs that one engine needs; None where 8 are not enough."""
        return next((gpus for gpus in DIVISIONS if self.requests(gpus, card_gb) >= LEAST_REQUESTS), None)

    def summing_ms(self, gpus: int) -> float:
        """What the GPUs of an engine send each other for a request."""
        return 2 * (gpus - 1) / gpus * self.exchanged / (LINK_GBPS * 1e6)

    def language_ms(self, gpus: int) -> float:
        """The language model's part of a request on each of the GPUs, with the sums between them."""
        return (self.prefill_ms + self.decode_ms) / gpus + self.summing_ms(gpus)


def predict() -> dict[str, ServedModel]:
    """What serving takes, by model."""
    found = {}
    for size in dict.fromkeys(name.removesuffix("-hd") for name in MODELS):
        weights = _weights(size)
        found |= {name: _served(name, *weights) for name in MODELS if name.removesuffix("-hd") == size}
    return found


def _weights(size: str) -> tuple[int, int]:
    """Bytes in bfloat16 of the language model, and of the rest."""
    with torch.device("meta"):
        model = MiniGeminiForConditionalGeneration(make_config(size))
    inner = model.model
    parts = inner.vision_tower, inner.vision_tower_aux, inner.patch_mining, inner.mm_projector
    rest = sum(parameter.numel() for part in parts for parameter in part.parameters())
    return 2 * (sum(parameter.numel() for parameter in model.parameters()) - rest), 2 * rest


def _served(name: str, language: int, rest: int) -> ServedModel:
    answer, gpu = ModelledAnswer(name), find_gpu(GPU)
    config, text = answer.config, answer.config.text_config
    budget = default_options(config)["max-num-batched-tokens"]
    pictures = budget // answer.image_tokens
    side = Sizes.of_picture(config.image_size_aux, torch.bfloat16, pictures)
    encoding = peak_memory.kernel_picture_peak(side)
    tokens = answer.prompt_tokens + answer.new_tokens
    step, cache = {}, {}
    for gpus in DIVISIONS:
        # A token's activations are two hidden states, and what gate, up and down read or write of each expert that it
        # goes to. The logits of all requests are made in 16 bits and sampled from in 32.
        experts = text.num_experts_per_tok if hasattr(text, "num_experts_per_tok") else 1
        layer = 2 * text.hidden_size + 3 * experts * text.intermediate_size // gpus
        step[str(gpus)] = 2 * budget * layer + (2 + 4) * MOST_REQUESTS * text.vocab_size
        # Each GPU has the keys and values of its own heads, and of one at least.
        heads = max(1, text.num_key_value_heads // gpus)
        cache[str(gpus)] = tokens * floors.cache_bytes_per_token(text, 2) * heads // text.num_key_value_heads
    made = ServedModel(
        language=language,
        picture_side=rest + peak_memory.packed_bytes(torch.bfloat16),
        pictures=pictures,
        encoding=encoding,
        budget=budget,
        step=step,
        cache=cache,
        encode_ms=sum(stage.floor_ms(gpu.ceilings, "bfloat16") for stage in answer.stages[:-1]),
        prefill_ms=answer.stages[-1].floor_ms(gpu.ceilings, "bfloat16"),
        decode_ms=0,
        batch=1,
        # Each layer sums the hidden states of all tokens up twice.
        exchanged=2 * text.num_hidden_layers * tokens * text.hidden_size * 2,
    )
    batch = max(1, min(BATCH, made.requests(1, gpu.memory_gb)))
    together = ModelledAnswer(name, batch=batch).decode
    decode = answer.new_tokens * together.floor_ms(gpu.ceilings, "bfloat16") / batch
    return ServedModel(**{**asdict(made), "decode_ms": decode, "batch": batch})


def encoding_ms(name: str) -> float:
    """The predicted time of a picture on an H200, from the recorded predictions of whole models and kernels."""
    setting = "1536-hd" if name.endswith("-hd") else "768"
    pixels = read_whole(RECORD)[Row(f"pixels/{setting}-b1-bfloat16", "auto")].today.us
    return (pixels + read()[f"dual_resize/{setting}-float32"].us) / 1e3


def main(*, keep: bool) -> str:
    """Predicts, and records the predictions if `keep` is set; returns the tables."""
    found = predict()
    if keep:
        models = {name: asdict(model) for name, model in found.items()}
        records.write(RECORDED, {"versions": versions(), "models": models})
    return f"{memory_table(found)}\n\n{limits_table(found)}"


def recorded() -> dict[str, ServedModel]:
    """The recorded predictions.

    Raises:
        BadRecord: nothing is recorded.
    """
    if not RECORDED.exists():
        raise BadRecord(f"{RECORDED} is missing: {SAVE} writes it")
    models = json.loads(RECORDED.read_text(encoding="utf-8"))["models"]
    return {name: ServedModel(**model) for name, model in models.items()}


def memory_of_serving(found: Records) -> str:
    """The table of memory in docs/deployment.md, from what is recorded."""
    return memory_table(recorded())


def limits_of_serving(found: Records) -> str:
    """The table of what limits serving in docs/deployment.md, from what is recorded."""
    return limits_table(recorded())


def memory_table(models: Mapping[str, ServedModel]) -> str:
    """Memory of each GPU, the requests that fit beside it, and how 8 GPUs are shared out, as a table in Markdown."""
    divisions = " / ".join(map(str, DIVISIONS))
    head = ["model", "language model", "picture side", f"each of {divisions} GPUs"]
    head += [f"requests at once on {divisions} cards of {card} GB" for card in CARDS_GB]
    head += [f"8 cards of {card} GB as" for card in CARDS_GB]
    rows = []
    for name, model in models.items():
        taken = " / ".join(f"{model.taken(gpus) / 1e9:.1f}" for gpus in DIVISIONS)
        row = [name, _gb(model.language), _gb(model.picture_side), f"{taken} GB"]
        row += [" / ".join(_requests(model.requests(gpus, card)) for gpus in DIVISIONS) for card in CARDS_GB]
        rows.append([*row, *(_layout(model.division(card)) for card in CARDS_GB)])
    notes = (
        "Predicted from sizes, in bfloat16 and units of 10^9 bytes; nothing was measured. `-hd` means pictures of 1536 "
        "pixels, with 2880 image tokens. The language model is divided over the GPUs of an engine, and the picture "
        "side (towers, mining, projector, and packed copies of the towers) is on each of them. A GPU also holds the "
        "larger one of two peaks: encoding as many pictures as the token budget of `mg-fast serve` takes up, or the "
        f"activations of a step of the language model with the logits of {MOST_REQUESTS:,} requests, which is vLLM's "
        "limit on such cards. What CUDA, its graphs and its libraries take comes on top. Keys and values have the rest "
        f"of {SHARE:.0%} of a card, vLLM's default. A request is a picture, 64 tokens of text and 128 of the answer. "
        f"The last columns have the smallest engines with room for {LEAST_REQUESTS} requests or more."
    )
    return "\n".join([markdown(head, rows), "", wrapped(notes)])


def _requests(number: int) -> str:
    return "none" if number < 1 else f"{number:,}"


def _layout(gpus: int | None) -> str:
    if gpus is None:
        return "not enough"
    return f"{8 // gpus} engine{'s' * (gpus < 8)} of {gpus} GPU{'s' * (gpus > 1)}"


def limits_table(models: Mapping[str, ServedModel]) -> str:
    """Milliseconds of a request by stage, the encoder's share of them, and requests per second."""
    head = ["model", "encoding, predicted", "prompt, least", "answer, least"]
    head += ["longest, undivided / divided by 8"]
    head += ["share of encoding", "with 1 new token", "divided by 8, all encode all", "divided by 8, shared encoding"]
    head += ["GPUs that encode for 8 others", "requests/s on 1 / 8 / 64 GPUs, at most"]
    rows = []
    for name, model in models.items():
        encode, language, divided = encoding_ms(name), model.language_ms(1), model.language_ms(8)
        stages = {"encoding": encode, "prompt": model.prefill_ms, "answer": model.decode_ms}
        on_each = {name: ms if name == "encoding" else ms / 8 for name, ms in stages.items()}
        on_each["sums"] = model.summing_ms(8)
        # Each pair is the time of encoding, and of the language model, on every GPU.
        pairs = (encode, language), (encode, model.prefill_ms), (encode, divided), (encode / 8, divided)
        rows.append(
            [
                name,
                *(f"{ms:.1f} ms" for ms in stages.values()),
                " / ".join(max(times, key=times.get) for times in (stages, on_each)),
                *(f"{mine / (mine + other):.0%}" for mine, other in pairs),
                f"{8 * encode / language:.1f}",
                " / ".join(f"{gpus * 1e3 / (encode + language):,.0f}" for gpus in (1, 8, 64)),
            ]
        )
    gpu = find_gpu(GPU)
    rates = gpu.ceilings
    notes = (
        f"Milliseconds of one {gpu.name} for a request: a picture that was not seen before, 64 tokens of text, and an "
        "answer of 128 tokens. Nothing was measured. Encoding is predicted from the kernels and launches of mg_fast "
        "([docs/kernels.md](kernels.md)); prompt and answer are the least times of `python -m bench roofline`, at "
        f"{rates.matmul_tflops['bfloat16']:.0f} TFLOP/s and {rates.copy_gbps / 1e3:.1f} TB/s, where the answer is a "
        f"share of steps that serve as many requests as fit, and at most {BATCH}. So the share of encoding is rather "
        "too high than too low. Divided by 8, the GPUs of an engine sum their results up over NVLink, at "
        f"{LINK_GBPS} GB/s and without its latency (`sums`); `all encode all` is vLLM's default, and `shared encoding` "
        "is `--mm-encoder-tp-mode data` with at least eight pictures at a time. The rates are those of engines of one "
        "GPU each, with stages that follow one another."
    )
    return "\n".join([markdown(head, rows), "", wrapped(notes)])


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
