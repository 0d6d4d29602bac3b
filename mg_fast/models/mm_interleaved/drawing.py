"""generate_images: from a prompt to pictures."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from ...errors import PromptError, quoted
from ...ops.backend import requested, use_backend
from ...runtime.layer_dtypes import at_seam
from .context import PlacedPicture, contexts, place_pictures, previous_maps, select_targets
from .decoding import READING_INPUTS
from .drawing_options import DrawingOptions
from .image_processing import drawn_pictures
from .picture_drawer import PictureDrawer
from .positions import sequence_positions

OUTPUT_TYPES = ("pil", "pt")


class PictureGeneration:
    """A base class that makes MMInterleavedForConditionalGeneration draw pictures.

    It takes from the class that inherits it: `mm_decoder`, `context_feat_proj`, `image_decoder`, `config`,
    `get_image_features`, `check_length`, and what `InterleavedDecoding` adds.
    """

    def picture_drawer(self, *, graphs: bool = True) -> PictureDrawer:
        """A drawer with the weights as they are now, to be kept for many calls of `generate_images`.

        Args:
            graphs: capture CUDA graphs on a GPU.

        Raises:
            ValueError: the synchronizers compute something other than their weights say (adapters, hooks).
        """
        return PictureDrawer(self.image_decoder, graphs=graphs)

    @torch.no_grad()
    def generate_images(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        num_image_per_seq: torch.Tensor | None = None,
        image_tokens: torch.Tensor | None = None,
        image_maps: torch.Tensor | None = None,
        *,
        target_image_idxs: Sequence[int] | torch.Tensor | None = None,
        guidance_scale: float = DrawingOptions.guidance_scale,
        num_inference_steps: int = DrawingOptions.num_inference_steps,
        num_images: int = DrawingOptions.num_images,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        scheduler: object | None = None,
        output_type: str = "pil",
        batch_size: int = DrawingOptions.batch_size,
        on_step: Callable[[int, torch.Tensor], None] | None = None,
        drawer: PictureDrawer | None = None,
        backend: str | None = None,
    ) -> list[Image.Image] | torch.Tensor:
        """Draws pictures of a prompt.

        A picture that is drawn must already stand in the prompt, with the token that begins it, its image tokens, and
        any picture as a placeholder, which has no influence.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L], 0 at padding on any side.
            pixel_values: [n_images, 3, 224, 224] in 0..1, the placeholders included.
            num_image_per_seq: int64 [B], the number of pictures of each row; None counts them in the ids.
            image_tokens, image_maps: [n_images, T, D] and [n_images, 5440, C], from `get_image_features`, instead of
                pixels.
            target_image_idxs: numbers of the pictures to be drawn, counted over the whole batch in reading order; None:
                the last picture of every row.
            guidance_scale, num_inference_steps, num_images, generator, latents, scheduler, batch_size, on_step: see
                `DrawingOptions`.
            output_type: "pil", or "pt" for tensors.
            drawer: from `picture_drawer`; None prepares the synchronizers for this call alone.
            backend: overrides the choice in force. `reference` runs the original's steps; a drawer's synchronizers are
                those that it was made with.

        Returns:
            num_images pictures for each of T targets, one round after the other: a list of PIL pictures, or float32
            [num_images * T, 3, H, W] in 0..1.

        Raises:
            PromptError: there is no picture to draw, or the prompt does not fit its pictures.
            ValueError: an option does not fit; the message names what was expected and what came.
            PictureError: a drawn picture has values that are not finite, and was wanted as a PIL picture.
        """
        options = DrawingOptions(
            guidance_scale, num_inference_steps, num_images, generator, latents, scheduler, batch_size, on_step
        )
        check_output_type(output_type)
        placed = place_pictures(input_ids, attention_mask, self.config)
        given = pixel_values if image_tokens is None else image_tokens
        came = 0 if given is None else len(given)
        if came != len(placed):
            raise PromptError(
                f"the prompt begins {len(placed)} picture(s), placeholders included, but {came} picture(s) came"
            )
        targets = select_targets(placed, len(input_ids), target_image_idxs)
        self.check_length(input_ids.shape[1])
        self.image_decoder.check_options(len(targets), options)
        with use_backend(requested(backend)):
            if image_tokens is None:
                features = self.get_image_features(pixel_values)
                image_tokens, image_maps = features.pooler_output, features.last_hidden_state
            pictures = {"image_tokens": image_tokens, "image_maps": image_maps, "num_image_per_seq": num_image_per_seq}
            read = self.with_pictures(input_ids, pictures)
            # The language model alone: of its states, only the last ones are needed, and no logits.
            states = self.mm_decoder(
                inputs_embeds=self.embed(input_ids, image_tokens=image_tokens),
                attention_mask=attention_mask,
                use_cache=False,
                **{name: read[name] for name in READING_INPUTS if name in read},
            ).last_hidden_state
            return self.draw_targets(states, targets, image_maps, options, output_type=output_type, drawer=drawer)

    @torch.no_grad()
    def draw_targets(
        self,
        last_hidden_state: torch.Tensor,
        targets: Sequence[PlacedPicture],
        image_maps: torch.Tensor | None,
        options: DrawingOptions | None = None,
        *,
        output_type: str = "pil",
        drawer: PictureDrawer | None = None,
        backend: str | None = None,
    ) -> list[Image.Image] | torch.Tensor:
        """Draws pictures of what the language model has computed, for callers that have kept it.

        Args:
            last_hidden_state: [B, L, D], after the language model's last norm, up to the tokens that begin the targets
                or longer.
            targets: from `place_pictures`, of which some may be chosen by `select_targets`.
            image_maps: [n_images, 5440, C], feature maps of the batch's pictures, as far as they come before targets.
            options, output_type, drawer, backend: as in `generate_images`, whose result this returns.
        """
        check_output_type(output_type)
        condition = self.picture_conditions(last_hidden_state, targets)
        draw = self.image_decoder.draw if drawer is None else drawer
        pictures = draw(condition, *previous_maps(image_maps, targets), options, backend=backend)
        return pictures.float() if output_type == "pt" else drawn_pictures(pictures)

    def picture_conditions(self, last_hidden_state: torch.Tensor, targets: Sequence[PlacedPicture]) -> torch.Tensor:
        """The U-Net's conditions [T, L, W] for pictures that follow on last states [B, L, D]."""
        return self.image_decoder.condition(*self.context_features(last_hidden_state, targets))

    def context_features(
        self, last_hidden_state: torch.Tensor, targets: Sequence[PlacedPicture]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the image perceiver reads, [T, K, D], projected and with positions; and where it is so, bool [T, K]."""
        states, mask = contexts(last_hidden_state, targets, self.config)
        features = self.context_feat_proj(at_seam(states, self.context_feat_proj))
        width = features.shape[-1]
        positions = sequence_positions(self.config.seq_len, width, features.device)[: features.shape[1]]
        return features + positions.to(features.dtype), mask


def check_output_type(output_type: str) -> None:
    """Raises ValueError unless pictures can be returned in this type."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {quoted(output_type)}")
