"""Answers lmms-eval's benchmarks by `Pipeline.chat_batch`: `lmms-eval --model mg_fast --model_args pretrained=DIR`.

lmms-eval finds this module by the entry point `lmms_eval.models` in pyproject.toml. It calls `manifest`, which names
`LmmsEvalModel`. That class is made when it is first asked for, because its base is lmms-eval's: this module is also
imported where lmms-eval is not installed, and while lmms-eval itself is only half imported.
"""

import functools
import inspect
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence

from ..errors import BackendError, quoted

logger = logging.getLogger(__name__)

NAME = "mg_fast"
# Most tokens of an answer where the task does not say: as many as the original's evaluation allows most of the time.
NEW_TOKENS = 1024
# Questions of so many batches are held in memory together, because prompts of similar length are answered together.
BATCHES_TOGETHER = 8
# lmms-eval gives this stop string to every task that names none, and it would cut an answer after its first paragraph.
_FILLED_IN = ["\n\n"]
# Options of `generate` that tasks set and that are passed on as they are.
_PASSED = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")
_NOT_INSTALLED = (
    "lmms-eval is not installed here: pip install 'mg_fast[eval]' in an environment of its own (docs/evaluation.md)"
)


def manifest():
    """What lmms-eval's registry keeps of this model: its name and the place of its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.LmmsEvalModel")


def __getattr__(name: str):
    if name == "LmmsEvalModel":
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _model_class() -> type:
    try:
        from lmms_eval.api.model import lmms
    except ModuleNotFoundError as error:
        raise BackendError(_NOT_INSTALLED if error.name == "lmms_eval" else f"lmms-eval: {error}") from error

    class LmmsEvalModel(ChatBatchModel, lmms):
        __doc__ = ChatBatchModel.__doc__

    return LmmsEvalModel


class ChatBatchModel:
    """A Mini-Gemini checkpoint as lmms-eval's evaluator calls it.

    Args:
        pretrained: folder or hub id of the checkpoint, a name of the package's checkpoints, or a loaded `Pipeline`.
        batch_size: the most questions answered at once; `auto` takes the default of `chat_batch`.
        max_batch_size: not used; lmms-eval passes it.
        device: `cuda`, `cpu`, ...; where several processes share the questions, default: the GPU of each.
        strict: raise the error of a question that cannot be answered, such as one that is longer than the model was
            trained on. Otherwise its answer is empty, and a warning says how many there were.
        **options: further options of `mg_fast.load`, such as `dtype`, `quantize`, `template` and `allow_long`.

    Raises:
        BackendError: an option is unknown, or the checkpoint belongs to another family.
        CheckpointError: the checkpoint cannot be loaded.
    """

    is_simple = True

    def __init__(
        self,
        pretrained="",
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        strict: bool = False,
        **options,
    ):
        super().__init__()
        self._batch_size = _whole_batch(batch_size)
        self._strict = strict
        self._loaded_here = not hasattr(pretrained, "chat_batch")
        self._pipeline = _load(pretrained, device, options) if self._loaded_here else pretrained

    @property
    def pipeline(self):
        """The pipeline; lmms-eval drops one that was loaded here before it scores the answers."""
        if self._pipeline is None:
            raise BackendError("the model was dropped after its questions: make another LmmsEvalModel")
        return self._pipeline

    @property
    def device(self):
        """The device of the language model's input."""
        return self.pipeline.device

    @property
    def batch_size(self) -> int:
        """The most questions answered at once."""
        return self._batch_size

    def generate_until(self, requests: Sequence) -> list[str]:
        """The answers to lmms-eval's requests, in their order.

        The arguments of a request are the text, the options of the answer, a function that returns the pictures of a
        document, and the number, task and split of that document.
        """
        from tqdm.auto import tqdm

        answers, failed = [""] * len(requests), []
        bar = tqdm(total=len(requests), desc="questions", disable=getattr(self, "rank", 0) != 0)
        with bar:
            for options, stops, numbers in _alike(requests):
                for first in range(0, len(numbers), BATCHES_TOGETHER * self._batch_size):
                    chunk = numbers[first : first + BATCHES_TOGETHER * self._batch_size]
                    questions = [self._question(requests[i].args) for i in chunk]
                    given = self.pipeline.chat_batch(questions, batch_size=self._batch_size, progress=False, **options)
                    for i, answer in zip(chunk, given):
                        if answer.error is not None:
                            failed.append(answer.error)
                            if self._strict:
                                raise answer.error
                        answers[i] = _before(answer.text, stops)
                    bar.update(len(chunk))
        if failed:
            logger.warning(
                "%d of %d questions could not be answered, and their answers are empty; the first because: %s",
                len(failed),
                len(requests),
                failed[0],
            )
        return answers

    def loglikelihood(self, requests: Sequence) -> list:
        """Not supported: Mini-Gemini's benchmarks compare texts that the model writes."""
        raise NotImplementedError(
            "mg_fast answers tasks of the type generate_until, and this one is scored by likelihood"
        )

    def generate_until_multi_round(self, requests: Sequence) -> list:
        """Not supported: Mini-Gemini's benchmarks ask one question at a time."""
        raise NotImplementedError("mg_fast answers tasks of the type generate_until, and this one has several rounds")

    def clean(self) -> None:
        """Frees the memory of the model; lmms-eval calls it when all questions are answered."""
        if self._loaded_here:
            self._pipeline = None
        super().clean()

    def _question(self, arguments: tuple) -> dict:
        text, _, pictures_of, number, task, split = arguments
        pictures = list(pictures_of(self.task_dict[task][split][number]) or ()) if pictures_of is not None else []
        return question(text, pictures, task)


def question(text: str, pictures: Sequence, task: str) -> dict:
    """A question for `chat_batch`, of a text and its Pillow pictures.

    Tags `<image>` stay where they are if there is one for each picture. Otherwise they are read as text, and the
    pictures come first, as in the original.

    Raises:
        BackendError: this is no picture but, for instance, a video.
    """
    from PIL import Image

    from ..models.templates import IMAGE_TAG, without_picture_tags

    for picture in pictures:
        if not isinstance(picture, Image.Image):
            raise BackendError(f"task {task}: expected pictures, which mg_fast reads, got {quoted(picture)}")
    if not pictures or text.count(IMAGE_TAG) != len(pictures):
        text = without_picture_tags(text)
    return {"text": text, "images": list(pictures)}


def answer_options(given: Mapping) -> tuple[dict, list[str], list[str]]:
    """The options of `chat_batch` for a task's `generation_kwargs`, the strings that end an answer, and ignored names.

    An answer is sampled where the task asks for a temperature above 0 and does not turn sampling off. The stop string
    that lmms-eval fills in, an empty line, does not count.
    """
    given = dict(given or {})
    until = given.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    stops = [] if until == _FILLED_IN else [stop for stop in until if stop]
    samples, temperature = given.pop("do_sample", None), given.pop("temperature", None)
    if temperature is None:
        temperature = 1.0 if samples else 0.0
    if samples is False:
        temperature = 0.0
    options = {
        "max_new_tokens": int(given.pop("max_new_tokens", None) or NEW_TOKENS),
        "temperature": float(temperature),
    }
    for name in ("top_p", "top_k", "seed"):
        value = given.pop(name, None)
        # They are for sampling alone. lmms-eval's tasks set top_p for greedy answers, too.
        if value is not None and temperature > 0:
            options[name] = value
    if given.get("num_beams") == 1:
        del given["num_beams"]
    options.update({name: given.pop(name) for name in _PASSED if given.get(name) is not None})
    return options, stops, sorted(given)


def _alike(requests: Sequence) -> Iterator[tuple[dict, list[str], list[int]]]:
    """The numbers of the requests that share their options, with these options and the strings that end an answer."""
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
    ignored = set()
    for numbers in groups.values():
        options, stops, left = answer_options(requests[numbers[0]].args[1])
        if unknown := set(left) - ignored:
            logger.warning("options of the task that mg_fast has no use for: %s", ", ".join(sorted(unknown)))
            ignored |= unknown
        yield options, stops, numbers


def _before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of some strings in it."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text.strip()


def _whole_batch(batch_size: int | str | None) -> int:
    from ..engine.batch import DEFAULT_BATCH
    from ..runtime.arguments import whole_number

    if batch_size is None or str(batch_size).startswith("auto"):
        return DEFAULT_BATCH
    size = whole_number(int(batch_size) if isinstance(batch_size, str) and batch_size.isdecimal() else batch_size)
    if size is None or size < 1:
        raise BackendError(f"batch_size: expected a whole number of 1 or more, or auto, got {quoted(batch_size)}")
    return size


def _load(pretrained, device: str | None, options: Mapping):
    """The pipeline of a checkpoint, after its options and its family were checked."""
    from ..models import builtin
    from ..models.families import MM_INTERLEAVED, checkpoint_family
    from ..models.tensor_files import resolve_folder
    from ..pipeline import load

    if not pretrained:
        raise BackendError("model_args: expected pretrained=DIR, a checkpoint folder, hub id, or nano")
    known = [name for name in inspect.signature(load).parameters if name not in ("path", "device")]
    if unknown := sorted(set(options) - set(known)):
        raise BackendError(
            f"model_args: unknown {', '.join(unknown)}; expected pretrained, device, strict, {', '.join(known)}"
        )
    path = builtin.resolve(str(pretrained))
    if checkpoint_family(resolve_folder(path, weights=False)) == MM_INTERLEAVED:
        raise BackendError(f"{quoted(str(pretrained))} is MM-Interleaved: lmms-eval's questions go to Mini-Gemini here")
    if device is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch

        if torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return load(path, device=device, **options)
