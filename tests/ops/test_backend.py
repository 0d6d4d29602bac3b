"""Which backend runs, in which order requests count, and what the errors say about a backend that cannot run."""

import threading

import pytest
import torch

from mg_fast import BackendError, use_backend
from mg_fast.ops import backend, interpreter


def test_order_of_authority(monkeypatch):
    monkeypatch.delenv("MG_FAST_BACKEND", raising=False)
    assert backend.requested() == "auto"
    monkeypatch.setenv("MG_FAST_BACKEND", "reference")
    assert backend.requested() == "reference"
    with use_backend("torch"):
        assert backend.requested() == "torch"
        assert backend.requested("auto") == "auto"
        with use_backend("reference"):
            assert backend.requested() == "reference"
        assert backend.requested() == "torch"
    assert backend.requested() == "reference"


def test_choice_is_per_thread():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backend.requested()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.parametrize("name", ["cuda", "Triton"])
def test_unknown_names_are_refused(monkeypatch, name):
    with (
        pytest.raises(BackendError, match=f"unknown backend '{name}': expected one of auto, reference, torch, triton"),
        use_backend(name),
    ):
        pass
    monkeypatch.setenv("MG_FAST_BACKEND", name)
    with pytest.raises(BackendError, match="unknown backend"):
        backend.requested()


def test_asking_for_one_that_cannot_run_raises_the_reason(model, processor, photo):
    inputs = processor.image_processor(photo)
    reason = "cannot run high_resolution_tower: triton runs on CUDA tensors, these are on cpu"
    with use_backend("triton"), pytest.raises(BackendError, match=reason):
        model.get_image_features(**inputs)


def test_an_operation_without_the_backend_named_runs_the_next_simpler_one():
    assert backend.choose("low_resolution_tower", "triton") == "torch"


def test_tensors_that_a_backend_does_not_take():
    unsuited = {"torch": "it is Monday"}
    assert backend.choose("patch_mining", "auto", unsuited=unsuited) == "reference"
    with pytest.raises(BackendError, match="backend 'torch' cannot run patch_mining: it is Monday"):
        backend.choose("patch_mining", "torch", unsuited=unsuited)


def test_gpus_too_old_for_the_kernels(monkeypatch):
    assert backend.choose("patch_mining", "auto", "cuda") == "triton"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert backend.choose("patch_mining", "auto", "cuda:0") == "torch"
    with pytest.raises(BackendError, match="need a GPU of compute capability 8.0 or newer, this one has 7.5"):
        backend.choose("patch_mining", "triton", "cuda:0")
    # A GPU of this machine says nothing about the GPU elsewhere that kernels are compiled for.
    with backend.only_compiling():
        assert backend.choose("patch_mining", "auto", "cuda:0") == "triton"
    assert backend.choose("patch_mining", "auto", "cuda:0") == "torch"


def test_auto_never_interprets(monkeypatch):
    # This pretends that Triton was imported with TRITON_INTERPRET=1.
    monkeypatch.setattr(interpreter, "why_not", lambda: None)
    assert backend.why_not("patch_mining", "triton") is None
    assert backend.choose("patch_mining", "auto") == "torch"


def test_reference_runs_everything():
    for operation in backend.OPERATIONS:
        assert backend.why_not(operation, "reference") is None
        assert backend.choose(operation, "reference") == "reference"
        assert backend.choose(operation, "auto") in backend.OPERATIONS[operation].forms


def test_low_resolution_tower_gives_the_same_bits_on_both(model, processor, photo):
    """The reference also runs the last CLIP layer, as the original does, and discards its output."""
    inputs = processor.image_processor(photo)
    runs = []
    # The model is shared between tests, and with a hook its tower would no longer be packed.
    hook = model.model.vision_tower.encoder.layers[-1].register_forward_hook(lambda *_: runs.append(1))
    results = {}
    try:
        for name in ("reference", "auto"):
            before = len(runs)
            with use_backend(name), torch.inference_mode():
                results[name] = model.model.low_resolution_queries(inputs["pixel_values"])
            assert len(runs) - before == (1 if name == "reference" else 0)
    finally:
        hook.remove()
    assert torch.equal(results["reference"], results["auto"])
