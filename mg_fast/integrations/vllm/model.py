"""The model that vLLM runs: vLLM's own language model of the checkpoint's family, and our picture side before it."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from ...models.mini_gemini.checkpoint import tower_tensors
from ...models.mini_gemini.encoder import PictureEncoder
from ...models.mini_gemini.image_processing import MiniGeminiImageProcessor
from ...models.mini_gemini.picture_side import PictureSide, as_embeddings
from ...models.templates import IMAGE_TAG
from ...models.tensor_files import read_tensors, resolve_folder
from .configuration import hub_arguments
from .processing import SQUARED, DummyPictures, PictureInfo, PictureProcessor
from .shares import encode_shares

# vLLM's classes of the language models.
_LANGUAGE_MODELS = {
    "llama": "LlamaForCausalLM",
    "gemma": "GemmaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "mistral": "MistralForCausalLM",
}


@MULTIMODAL_REGISTRY.register_processor(PictureProcessor, info=PictureInfo, dummy_inputs=DummyPictures)
class ServedMiniGemini(nn.Module, SupportsMultiModal, SupportsLoRA, SupportsPP):
    """Mini-Gemini as vLLM's workers run it.

    The picture side has the published names and numbers of `MiniGeminiModel`. It is packed at the first picture, and
    again after weights were loaded anew. Under tensor parallelism every rank has all of it. Each encodes every picture,
    or with `mm_encoder_tp_mode="data"` its share of the pictures that came together.

    Args:
        vllm_config: vLLM's configuration, completed by `MiniGeminiServingConfig`.
        prefix: what stands before the names of the parts.
    """

    # Without it, vLLM changes the mode "data" to "weights". It divides nothing itself.
    supports_encoder_tp_data = True
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    # One prefix is applied after the other, so the special names stand before the general one. The names with
    # `language_model` are those of adapters that were trained with mg_fast's model.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.vision_tower.vision_tower.vision_model.": "picture_side.vision_tower.",
            "model.vision_tower_aux.": "picture_side.vision_tower_aux.",
            "model.vlm_uni_": "picture_side.patch_mining.vlm_uni_",
            "model.mm_projector.": "picture_side.mm_projector.",
            "model.language_model.": "model.",
            "model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality != "image":
            raise ValueError(f"Mini-Gemini takes pictures, got {modality}")
        return IMAGE_TAG

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        self.config, self.dtype = model_config.hf_config, model_config.dtype
        self._source = model_config.model, hub_arguments(model_config)
        self._shares = model_config.multimodal_config.mm_encoder_tp_mode == "data"
        self._encoder: PictureEncoder | None = None
        self._images = MiniGeminiImageProcessor.from_config(self.config)
        text = self.config.text_config
        with self._mark_tower_model(vllm_config, {"image"}):
            self.picture_side = PictureSide(self.config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text,
                architectures=[_LANGUAGE_MODELS[text.model_type]],
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Image tokens [n_images, T, hidden], scaled as the language model's embeddings are.

        Args:
            squared: pictures as `MiniGeminiImageProcessor.squared` returns them. Their pixels are made here, on the
                worker's device: they are five times as large. Under tensor parallelism all ranks get all pictures.
        """
        squared = kwargs.get(SQUARED)
        if squared is None:
            return []
        if self._encoder is None:
            # The encoder's weights must not be inference tensors, which do not count changes.
            with torch.inference_mode(False):
                self._encoder = PictureEncoder(self.picture_side, graphs=False)
        ranks = get_tensor_model_parallel_world_size()
        if not self._shares or ranks == 1:
            return self._encode(squared)
        return encode_shares(
            self._encode,
            squared,
            rank=get_tensor_model_parallel_rank(),
            ranks=ranks,
            gather=lambda tokens: tensor_model_parallel_all_gather(tokens, dim=0),
            shape=(self.config.tokens_per_picture, self.config.text_config.hidden_size),
            dtype=self.dtype,
            device=self._encoder.device,
        )

    def _encode(self, squared: torch.Tensor) -> torch.Tensor:
        tokens = self._encoder.encode(**self._images.pixels_of(squared))
        return as_embeddings(tokens.to(self.dtype), self.config.text_config)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads the tensors of a published checkpoint, and towers that it lacks from their own files.

        Args:
            weights: published names and tensors.

        Returns:
            The names of the parameters that were loaded.
        """
        self._encoder = None
        # Older versions of transformers wrote the positions into checkpoints. They are no weights.
        loader = AutoWeightsLoader(self, ignore_unexpected_suffixes=[".position_ids"])
        return loader.load_weights(self._with_towers(weights), mapper=self.hf_to_vllm_mapper)

    def _with_towers(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        names = set()
        for name, tensor in weights:
            names.add(name)
            yield name, tensor
        path, hub = self._source
        folder = resolve_folder(path, weights=False, **hub)
        yield from read_tensors(tower_tensors(self.config, names, folder, **hub))

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(language_model="language_model", tower_model="picture_side")
