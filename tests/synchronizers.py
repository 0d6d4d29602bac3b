"""Small feature synchronizers in which every weight matters, their inputs, and the original's recorded cases."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from mg_fast.modules import FeatureSynchronizer
from mg_fast.testing.tolerances import relative_error
from tests.draws import normal

GOLDEN_CASES = ("llm-causal", "one-image", "unet-grid", "unet-padded")
# Relative to the largest value, for outputs and gradients in float32.
GOLDEN = 2e-5
SMALL = dict(inner_dim=16, heads=4, points=3, spatial_shapes=[(4, 6), 3], base=4, max_images=6)


class Inputs(NamedTuple):
    """What a synchronizer is called with."""

    query: torch.Tensor
    features: torch.Tensor
    reference_points: torch.Tensor
    mask: torch.Tensor


def build(d_query: int = 20, d_value: int = 12, d_out: int = 24, *, seed: int = 0, **changes) -> FeatureSynchronizer:
    """A small synchronizer with normal weights; a new one would have zeros in many places."""
    module = FeatureSynchronizer(d_query, d_value, d_out, **SMALL | changes)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.5
        parameter.data = normal(generator, *parameter.shape).to(parameter) * scale
    return module


def draw(module: FeatureSynchronizer, *, batch: int = 2, queries: int = 5, pictures: int = 3, seed: int = 1) -> Inputs:
    """Inputs in the module's dtype; the mask [B, Q, n] has holes, and its first row sees nothing."""
    generator = torch.Generator().manual_seed(seed)
    dtype = module.ignore_token.dtype
    query = normal(generator, batch, queries, module.sizes.query)
    features = normal(generator, batch, pictures, module.sizes.pixels, module.sizes.value)
    points = normal(generator, batch, queries, 1, 2).sigmoid()
    mask = (normal(generator, batch, queries, pictures) > -0.5).long()
    mask[:, 0] = 0
    mask[:, -1, 0] = 1
    return Inputs(query.to(dtype), features.to(dtype), points, mask)


def assert_golden(folder: Path, case: str, backend: str) -> None:
    """Asserts that a module with a recorded case's weights has the recorded output and gradients."""
    sizes = json.loads((folder / "mmfs" / f"{case}.json").read_text(encoding="utf-8"))
    tensors = {name: t.to(torch.get_default_device()) for name, t in load_file(_tensors(folder, case)).items()}
    module = FeatureSynchronizer(
        sizes["d_query"],
        sizes["d_value"],
        sizes["d_out"],
        inner_dim=int(sizes["ratio"] * sizes["d_model"]),
        heads=sizes["n_heads"],
        points=sizes["n_points"],
        spatial_shapes=sizes["spatial_shapes"],
        base=sizes["base_spatial_shape"],
        max_images=sizes["max_num_image_per_seq"],
    )
    prefix = "module."
    module.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}, strict=True)
    query, features = tensors["query"].requires_grad_(), tensors["value"].requires_grad_()
    output = module(query, features, tensors["reference_points"], tensors["attention_mask"], backend=backend)
    (output * tensors["grad_output"]).sum().backward()
    ours = {"output": output.detach(), "grad_query": query.grad, "grad_value": features.grad}
    ours |= {k: module.get_parameter(k.removeprefix("grad.")).grad for k in tensors if k.startswith("grad.")}
    assert len(ours) == 6
    errors = {name: relative_error(found, tensors[name]) for name, found in ours.items()}
    assert max(errors.values()) <= GOLDEN, errors


def _tensors(folder: Path, case: str) -> Path:
    return folder / "mmfs" / f"{case}.safetensors"
