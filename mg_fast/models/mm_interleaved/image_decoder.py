"""The diffusion decoder: the U-Net's condition from a context, and Stable Diffusion with the synchronizers."""

import torch
from torch import nn

from ...errors import CheckpointError
from ...ops import backend as backends
from ...runtime.layer_dtypes import at_seam
from .configuration import MMInterleavedConfig
from .drawing_options import DrawingOptions, Steps
from .perceiver import PerceiverResampler
from .picture_drawer import PictureDrawer
from .stable_diffusion import import_diffusers
from .unet_synchronizer import UNetSynchronizer


class DiffusionDecoder(nn.Module):
    """Stable Diffusion's autoencoder and U-Net, which are diffusers' own classes, and the U-Net's synchronizers.

    Args:
        config: the configuration of the model.

    Raises:
        BackendError: diffusers is not installed.
        CheckpointError: the configuration lacks one of the parts, or their sizes contradict each other.
    """

    def __init__(self, config: MMInterleavedConfig):
        super().__init__()
        for name in ("unet_config", "vae_config"):
            if not getattr(config, name):
                raise CheckpointError(f"expected a configuration of Stable Diffusion's part in {name}, got none")
        diffusers = import_diffusers()
        self.vae = diffusers.AutoencoderKL.from_config(config.vae_config)
        self.unet = diffusers.UNet2DConditionModel.from_config(config.unet_config)
        if (width := self.unet.config.cross_attention_dim) != config.condition_width:
            raise CheckpointError(
                f"the U-Net reads conditions of width {width}, but condition_width is {config.condition_width}"
            )
        self.mmfs_module = UNetSynchronizer(config)
        side = config.image_size // 2 ** (len(self.vae.config.block_out_channels) - 1)
        if side != self.mmfs_module.grid:
            raise CheckpointError(
                f"latents of a picture of {config.image_size} pixels must have sides of {self.mmfs_module.grid}, but "
                f"the autoencoder's have {side}"
            )


class ImageDecoder(nn.Module):
    """From the context of a picture to the picture. It needs no language model.

    The parameters have the published names.

    Args:
        config: the configuration of the model.

    Raises:
        CheckpointError: the sizes contradict each other.
    """

    def __init__(self, config: MMInterleavedConfig):
        super().__init__()
        self.config = config
        rows, width = config.condition_length, config.condition_width
        settings = config.image_perceiver or {}
        gives = settings.get("num_queries"), settings.get("hidden_size")
        if gives != (rows, width):
            raise CheckpointError(
                f"the image perceiver must give {rows} rows of width {width}, as condition_length and condition_width "
                f"say, but its num_queries and hidden_size are {gives[0]} and {gives[1]}"
            )
        self.neg_prompt_embeds = nn.Parameter(torch.zeros(1, rows, width))
        self.perceiver_resampler = PerceiverResampler(settings)
        self.decoder = DiffusionDecoder(config)

    def condition(self, context: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The U-Net's condition [n, condition_length, condition_width] for contexts.

        Args:
            context: [n, K, D], with positions, as `context.project` returns it.
            mask: [n, K], not 0 where there is a context; None: everywhere.
        """
        device = self.neg_prompt_embeds.device
        context, mask = context.to(device), None if mask is None else mask.to(device)
        return self.perceiver_resampler(at_seam(context, self.perceiver_resampler), mask)

    def latents_shape(self, count: int) -> tuple[int, ...]:
        """The shape of the latents of so many pictures, [count, channels, h, w]."""
        side = self.decoder.mmfs_module.grid
        return count, self.decoder.unet.config.in_channels, side, side

    def check_options(self, targets: int, options: DrawingOptions) -> None:
        """Checks what can be checked before any work is done.

        Raises:
            ValueError: latents or the scheduler do not fit so many targets, or the decoder's weights are offloaded or
                on several devices.
        """
        devices = {parameter.device for parameter in self.parameters()}
        if torch.device("meta") in devices or len(devices) > 1:
            found = "some of them are offloaded" if torch.device("meta") in devices else "they lie on several"
            raise ValueError(
                f"drawing needs the weights of the image decoder on one device, but {found}: give image_decoder a "
                "device in device_map"
            )
        options.check_latents(self.latents_shape(targets * options.num_images))
        Steps(options, self.config.scheduler_config)

    @torch.no_grad()
    def draw(
        self,
        condition: torch.Tensor,
        maps: torch.Tensor | None = None,
        maps_mask: torch.Tensor | None = None,
        options: DrawingOptions | None = None,
        *,
        backend: str | None = None,
    ) -> torch.Tensor:
        """Draws pictures with the weights as they are now; a `PictureDrawer` that is kept does not prepare them again.

        The arguments and the result are those of `PictureDrawer`. With the backend `reference`, and where the
        synchronizers are more than plain layers (adapters, hooks), the original's steps run.
        """
        device = self.neg_prompt_embeds.device
        original = backends.choose("feature_sync", backend, device) == "reference"
        drawer = PictureDrawer(self, packed=not original, fall_back=True, graphs=False)
        return drawer(condition, maps, maps_mask, options, backend=backend)
