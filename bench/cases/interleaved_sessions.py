"""What the cases of MM-Interleaved at one size share: a model with random weights, and what is asked of it."""

import gc
import importlib.util
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers.initialization import no_init_weights

from ..registry import NotHere
from .forced_answer import ANSWER, ForcedAnswer
from .settings import picture

# Pictures of the round, and the most that another case has in its context.
ROUND_PICTURES, MOST_PICTURES = 2, 8
SEED = 0
QUESTION = "What do these pictures have in common, and where do they differ?"


@dataclass(frozen=True)
class InterleavedSize:
    """A size of `random_interleaved.SIZES`, with the steps of its drawings.

    Attributes:
        devices: on which it is run without being named.
    """

    size: str
    dtype: str
    steps: int
    devices: tuple[str, ...]


@dataclass
class InterleavedSession:
    """A model with what goes in, shared by the cases of its size.

    Attributes:
        processor: the model's, with a small tokenizer that fits its vocabulary.
        photos: different pictures.
        answer: the tokens that every provider is made to answer.
    """

    size: InterleavedSize
    device: str
    model: object
    processor: object
    photos: list[Image.Image]
    answer: list[int]
    _kept: dict[tuple, object] = field(default_factory=dict)

    def forced(self, tokens: int) -> ForcedAnswer:
        """Forces this many tokens of the answer."""
        return ForcedAnswer(self.answer[:tokens], self.model.dtype)

    def prompt(self, pictures: int) -> dict[str, torch.Tensor]:
        """The inputs of `generate` for a prompt with so many pictures, which are seen already."""

        def make() -> dict[str, torch.Tensor]:
            text = " ".join([*["<image>"] * pictures, QUESTION])
            inputs = self.processor(text=text, images=self.photos[:pictures], return_tensors="pt").to(self.device)
            with torch.no_grad():
                seen = self.model.get_image_features(inputs.pop("pixel_values"))
            return {**inputs, "image_tokens": seen.pooler_output, "image_maps": seen.last_hidden_state}

        return self._keep(("prompt", pictures), make)

    def decoder(self, *, graphs: bool = True, compiled: bool = False):
        """A decoder of the packed language model, which remembers nothing."""
        from mg_fast.decoding import Decoder
        from mg_fast.models.mm_interleaved.packed import PackedInterleavedDecoding

        packed = self._keep(("packed",), lambda: PackedInterleavedDecoding(self.model))
        made = {"kv_cache_bytes": 0, "graphs": graphs, "compiled": compiled}
        return self._keep(("decoder", graphs, compiled), lambda: Decoder(packed, **made))

    def drawer(self, *, packed: bool = True, graphs: bool = True):
        """What draws pictures: with packed synchronizers, or by the original's steps."""
        from mg_fast.models.mm_interleaved.picture_drawer import PictureDrawer

        made = {"packed": packed, "graphs": graphs}
        return self._keep(("drawer", packed, graphs), lambda: PictureDrawer(self.model.image_decoder, **made))

    def pipeline(self, backend: str, *, graphs: bool = True):
        """A pipeline; that of the reference keeps nothing, and the others their features and their keys and values."""
        import mg_fast

        kept = {"image_cache_bytes": 0, "kv_cache_bytes": 0} if backend == "reference" else {}

        def make():
            return mg_fast.InterleavedPipeline(self.model, self.processor, backend=backend, cuda_graphs=graphs, **kept)

        return self._keep(("pipeline", backend, graphs), make)

    def _keep(self, key: tuple, make):
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


# There is one session at a time, since two of the largest model would not fit.
_shared: dict[tuple, InterleavedSession] = {}


def release() -> None:
    """Frees what was shared by the cases of one size."""
    _shared.clear()
    # A pipeline and its own conversation hold each other.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def session(size: InterleavedSize, device: str) -> InterleavedSession | None:
    """The session of a size on a device, made when it is first asked for; None where the model cannot be made here."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    key = (size, device)
    if key not in _shared:
        release()
        _shared[key] = make_session(size, device)
    return _shared[key]


def here(shared: InterleavedSession | None) -> InterleavedSession:
    """The session; raises NotHere where there is none."""
    if shared is None:
        raise NotHere("MM-Interleaved's U-Net takes the package diffusers")
    return shared


def make_session(size: InterleavedSize, device: str) -> InterleavedSession:
    from mg_fast.models.mm_interleaved.image_processing import MMInterleavedImageProcessor
    from mg_fast.models.mm_interleaved.processing import MMInterleavedProcessor
    from mg_fast.models.mm_interleaved.tokenization import MMInterleavedTokenizer
    from mg_fast.testing.random_interleaved import make_llama_tokenizer

    model = make_model(size, device)
    config = model.config
    with tempfile.TemporaryDirectory() as folder:
        make_llama_tokenizer(Path(folder), config.text_config.vocab_size - 2)
        tokenizer = MMInterleavedTokenizer.from_folder(folder)
    settings = {"num_img_token": config.num_img_token, "pad_token_id": config.pad_token_id}
    processor = MMInterleavedProcessor(MMInterleavedImageProcessor(), tokenizer, **settings)
    # These are whole pieces of text: the tokens before them are bytes and special tokens.
    answer = random.Random(SEED).choices(range(300, config.pad_token_id), k=ANSWER)
    photo = picture().resize((640, 480))
    photos = [photo.rotate(45 * number) for number in range(MOST_PICTURES)]
    return InterleavedSession(size, device, model, processor, photos, answer)


def make_model(size: InterleavedSize, device: str):
    """A size's model in its dtype, in which every part has an effect; weights are drawn once, on the device."""
    from mg_fast.models.mm_interleaved.modeling import MMInterleavedForConditionalGeneration
    from mg_fast.testing.random_interleaved import make_interleaved_config

    config = make_interleaved_config(size.size)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, size.dtype))
    try:
        with torch.device(device), no_init_weights():
            model = MMInterleavedForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(SEED)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("pos_embed"):
                # These tables are computed and not trained.
                continue
            if name.endswith("ignore_token"):
                parameter.zero_()
            elif name.endswith((".gate", ".gamma")):
                parameter.uniform_(0.2, 0.8)
            elif parameter.dim() == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
            else:
                # This width keeps the size of what goes in.
                parameter.normal_(0.0, 0.02 if parameter is embedding else parameter[0].numel() ** -0.5)
    return model
