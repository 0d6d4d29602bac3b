"""Resizes pictures to both resolutions: checks the input, chooses the backend, and runs it as an operator of torch."""

import operator

import numpy as np
import torch
from PIL import Image

from ..runtime.device_tables import cached_on_device, upload
from . import backend as backends
from .custom_op_support import on_device
from .operation import Operation, Operator, register
from .torch import dual_resize as torch_form

__all__ = ["dual_resize", "resize_picture"]


def dual_resize(
    picture: torch.Tensor,
    hr_size: int,
    lr_size: int,
    *,
    grid: int = 1,
    global_view: bool = False,
    pad: bool = True,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture squared, resized bicubically with Pillow's own bits and normalised, and its low-resolution views.

    Args:
        picture: [H, W, 3] uint8, RGB, decoded and upright, any strides, on any device. Integers have no gradient, so
            the picture gets none.
        hr_size: side of the high-resolution picture in pixels.
        lr_size: side of one low-resolution view in pixels.
        grid: LR tiles per side.
        global_view: append the LR view of the whole picture.
        pad: square by padding; False resizes the shortest side and crops the centre.
        backend: overrides the choice in force; `reference` is Pillow, on the CPU.

    Returns:
        hr [3, HR, HR], with the same bits on every backend, and views [V, 3, LR, LR], equal within 1e-6 on all
        backends: V = grid * grid tiles row by row, then the global view. Both are float32, normalised, and on the
        picture's device.

    Raises:
        ValueError: the picture has another shape or dtype, or a size is below 1; PictureError where it is too thin or
            too large to be squared.
        BackendError: a backend was named that cannot run here.
    """
    hr_size, lr_size, grid = operator.index(hr_size), operator.index(lr_size), operator.index(grid)
    DUAL_RESIZE.check(picture, hr_size, lr_size, grid)
    form = backends.choose("dual_resize", backend, picture.device)
    return resize_picture(picture, hr_size, lr_size, grid, bool(global_view), bool(pad), form)


def _check(picture: torch.Tensor, hr_size: int, lr_size: int, grid: int) -> None:
    if picture.dtype != torch.uint8:
        gradient = ": integers have no gradient, so the picture gets none" if picture.requires_grad else ""
        raise ValueError(f"dual_resize: the picture must be uint8, got {picture.dtype}{gradient}")
    if picture.dim() != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        raise ValueError(f"dual_resize: the picture must be [H, W, 3] and have pixels, got {list(picture.shape)}")
    if min(hr_size, lr_size, grid) < 1:
        raise ValueError(
            f"dual_resize: sizes and grid must be at least 1, got hr_size={hr_size}, lr_size={lr_size}, grid={grid}"
        )


def _by_pillow(picture: torch.Tensor, hr_size: int, lr_size: int, *, grid: int, global_view: bool, pad: bool):
    image = Image.fromarray(np.ascontiguousarray(picture.cpu().numpy()))
    hr = torch_form.normalise(torch_form.square(image, hr_size, pad))
    views = torch_form.views_of(hr, lr_size, grid=grid, global_view=global_view)
    return hr.to(picture.device), views.to(picture.device)


@cached_on_device(torch_form.TABLE_BYTES)
def _taps(side: torch_form.Side, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    first, weights = torch_form.bicubic_taps(side)
    return upload(first, device), upload(np.ascontiguousarray(weights.T), device)


@cached_on_device(torch_form.TABLE_BYTES)
def _tables(
    hr_size: int, lr_size: int, grid: int, global_view: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tables that the kernel's second launch looks up (see `kernels.dual_resize.dual_resize_fwd`)."""
    itself = np.arange(hr_size)[None], np.ones((1, hr_size), np.float32)
    taps = [itself, *torch_form.view_taps(hr_size, lr_size, grid, global_view)]
    positions, shares = (
        np.concatenate([np.pad(part[kind], ((0, 4 - len(part[kind])), (0, 0))) for part in taps], axis=1)
        for kind in (0, 1)
    )
    arrays = torch_form.level_tables(), positions.astype(np.int32), shares
    return tuple(upload(array, device) for array in arrays)


def _by_kernel(picture: torch.Tensor, hr_size: int, lr_size: int, *, grid: int, global_view: bool, pad: bool):
    from ..kernels.dual_resize import Taps, dual_resize_fwd

    device = picture.device
    x, y = torch_form.place(picture.shape[1], picture.shape[0], hr_size, pad)
    with on_device(picture):
        return dual_resize_fwd(
            picture,
            Taps(*_taps(x, device)),
            Taps(*_taps(y, device)),
            *torch_form.span(y),
            *_tables(hr_size, lr_size, grid, global_view, device),
            colour=torch_form.PAD_COLOUR,
            lr_size=lr_size,
            grid=grid,
            global_view=global_view,
        )


@torch.library.custom_op("mg_fast::dual_resize", mutates_args=())
def resize_picture(
    picture: torch.Tensor, hr_size: int, lr_size: int, grid: int, global_view: bool, pad: bool, form: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dual_resize` on a given backend.

    It is one node of a graph on every backend, because its tables are made from the picture's size.
    """
    # A picture that cannot be squared is refused before anything is copied.
    torch_form.place(picture.shape[1], picture.shape[0], hr_size, pad)
    return DUAL_RESIZE.forms[form](picture, hr_size, lr_size, grid=grid, global_view=global_view, pad=pad)


@resize_picture.register_fake
def _(picture, hr_size, lr_size, grid, global_view, pad, form):
    hr = picture.new_empty(3, hr_size, hr_size, dtype=torch.float32)
    return hr, picture.new_empty(grid * grid + global_view, 3, lr_size, lr_size, dtype=torch.float32)


def _only_kernels(form: str) -> None:
    if form != "triton":
        raise ValueError(
            f"mg_fast::dual_resize declares what its kernels do, not what the {form} backend does within it"
        )


def _launches(
    picture: torch.Tensor, hr_size: int, lr_size: int, grid: int, global_view: bool, pad: bool, form: str
) -> int:
    """One launch for the columns, and one for the rows of both resolutions."""
    _only_kernels(form)
    return 2


def _workspaces(
    picture: torch.Tensor, hr_size: int, lr_size: int, grid: int, global_view: bool, pad: bool, form: str
) -> list[int]:
    """The picture with its columns resized, and one row of padding."""
    _only_kernels(form)
    low, high = torch_form.span(torch_form.place(picture.shape[1], picture.shape[0], hr_size, pad)[1])
    return [(high - low + 1) * 3 * hr_size]


DUAL_RESIZE = register(
    Operation(
        name="dual_resize",
        check=_check,
        forms={"reference": _by_pillow, "torch": torch_form.dual_resize, "triton": _by_kernel},
        auto=("triton", "torch", "reference"),
        # The operator resizes integers, so it has no floating-point product to count.
        operators=(Operator(name="mg_fast::dual_resize", launches=_launches, workspaces=_workspaces),),
    )
)
