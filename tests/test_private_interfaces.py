"""The private parts of other libraries that the package uses are listed, and the installed releases have them."""

import contextlib
import importlib.util
import unittest.mock

import pytest
import torch
from packaging.version import Version

from mg_fast import private_interfaces
from mg_fast.ops.torch import pointwise
from mg_fast.private_interfaces import INTERFACES, look_up
from mg_fast.runtime import numerics
from mg_fast.testing.tolerances import relative_error
from tests.imports import sources

# Python's own names that begin with an underscore, and are no private ones.
_PYTHON = {"_asdict", "_fields", "_make", "_replace"}

# Libraries that are not in every environment of the tests, and what installs them.
ELSEWHERE = {"vllm": "`make serve-test`", "gradio": "`make test`"}


@pytest.mark.parametrize("name", INTERFACES)
def test_the_installed_releases_have_it(name):
    interface = INTERFACES[name]
    library = name.split(".")[0]
    if library in ELSEWHERE and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: {ELSEWHERE[library]} installs it")
    if interface.since and Version(_version(library)) < Version(interface.since):
        pytest.skip(f"{library} has it from {interface.since} on")
    try:
        look_up(name)
    except ImportError as error:
        pytest.fail(
            f"{library} {_version(library)} has no {name} ({interface.stands_for}); in its place: {interface.instead}. "
            f"Adapt its uses, or bound {library} in pyproject.toml and say why: {error}"
        )


def _version(library: str) -> str:
    return getattr(__import__(library), "__version__", "0")


def test_every_private_name_that_is_used_is_listed():
    own = {name for source in sources().values() for name in source.defines} | _PYTHON
    listed = {part.removesuffix("()") for name in INTERFACES for part in name.replace(":", ".").split(".")}
    unlisted = [
        f"{name}:{line} {used}"
        for name, source in sources().items()
        if name.split(".")[0] == "mg_fast"
        for used, line in source.uses
        if used not in own | listed and not used.startswith("_mg_fast")
    ]
    assert not unlisted, "list these in mg_fast/private_interfaces.py"


def test_a_name_that_is_gone_is_none_and_one_that_is_not_listed_is_refused():
    with unittest.mock.patch.dict(INTERFACES, {"torch._C._gone": INTERFACES["torch._C._get_cudnn_enabled"]}):
        assert private_interfaces.find("torch._C._gone") is None
    with pytest.raises(KeyError):
        private_interfaces.find("torch._C._gone")
    with pytest.raises(ImportError):
        look_up("accelerate.hooks:_gone")


# --- what is used in their place ---


@pytest.mark.parametrize("name", [name for name in INTERFACES if INTERFACES[name].instead.startswith("torch.")])
def test_the_public_property_reads_the_same_setting(name, monkeypatch):
    if name.endswith("_get_fp32_precision_getter"):
        assert all(look_up(name)(*part) == public.fp32_precision for part, public in numerics._PRECISIONS.items())
        return
    with contextlib.suppress(ImportError):
        private = look_up(name)
        monkeypatch.setattr(private_interfaces, "find", lambda name: None)
        public = private_interfaces.setting(name.removeprefix("torch._C."))
        value = private()
        # Of a pair, the public property gives the first.
        assert public() == (value[0] if isinstance(value, tuple) else value)


def test_a_setting_without_any_name_is_left_out(monkeypatch):
    monkeypatch.setattr(private_interfaces, "find", lambda name: None)
    assert private_interfaces.setting("_get_sdp_priority_order") is None


def test_products_without_onednns_interface_are_plain_ones(monkeypatch):
    x, weight, bias = torch.randn(64, 512), torch.randn(512, 512), torch.randn(512)
    residual = torch.randn(64, 512)
    expected = pointwise.linear_gelu(x, weight, bias), pointwise.linear_residual(x, weight, bias, residual)
    monkeypatch.setattr(pointwise, "_onednn_product", None)
    found = pointwise.linear_gelu(x, weight, bias), pointwise.linear_residual(x, weight, bias, residual)
    for one, other in zip(found, expected):
        assert relative_error(one, other) < 1e-5
