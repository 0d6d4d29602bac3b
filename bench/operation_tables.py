"""The report's tables about single operations: what was measured of them, and what their instructions predict."""

from .figures import (
    NOT_YET,
    Records,
    conditions,
    device_title,
    duration,
    figure,
    gpu_note,
    gpus,
    markdown,
    row_of,
    rows_of,
    shown,
    wrapped,
)
from .issue.choices import read_choices
from .issue.command import measured_us
from .issue.library import ATTENTION_TFLOPS, DEPTHWISE_SHARE, GAP_US, SHORTEST_US
from .issue.multiprocessor import ERROR
from .issue.predict import DEVICES
from .issue.published import FIRST_GENERATION, RECORD, CasePrediction, read
from .issue.whole_models import CAPACITY, CONTEXT, WholePrediction, read_whole
from .registry import group_of


def deformable_table(found: Records) -> str:
    """Deformable attention by every provider that was measured."""
    notes = (
        "One call without gradients, batch 1. `encoder` and `decoder` are those of Deformable DETR (12,502 and 300 "
        "queries, 8 heads of 32, 4 levels, 4 points), `rt-detr` is RT-DETR at 640 pixels, `adapter` the vision adapter "
        "of MM-Interleaved. The original's steps are grid_sample for each level, as in transformers. Times are "
        "medians; memory is the peak above the inputs."
    )
    return _table(found, "deformable_attention", "deformable attention", notes)


def synchronizer_table(found: Records) -> str:
    """The feature synchronizer by every provider that was measured."""
    notes = (
        "One layer with its products, at the published sizes: `llm-decode` is one token and `llm-prefill512` a prompt "
        "of 512 tokens with n pictures of 1,344 pixels, `unet-64` the block of the diffusion decoder with 64x64 "
        "queries. "
        "The original's steps project the pictures in every call. `torch` is the packed form, whose projected pictures "
        "are kept from before the call; with `values each call` it makes them, too. Times are medians; memory is the "
        "peak above inputs, weights and kept values."
    )
    return _table(found, "feature_sync", "the feature synchronizer", notes)


def _table(found: Records, group: str, title: str, notes: str) -> str:
    """Every measured case of a group, a row for each and a column for each provider."""
    columns = [(device, case) for device in found for case in found[device] if group_of(case) == group]
    measured = [row["provider"] for column in columns for row in rows_of(found, *column) if shown(row)]
    names = {"reference": "`reference`: the original's steps", "torch": "`torch`", "triton": "`triton`"}
    providers = list(dict.fromkeys(["reference", "torch", *measured]))
    rows = [
        [
            f"{device_title(device)}, {case.removeprefix(f'{group}/')}",
            *(figure(row_of(found, device, case, provider)) for provider in providers),
        ]
        for device, case in columns
    ]
    table = markdown([title, *(names.get(provider, provider) for provider in providers)], rows)
    return "\n".join([table, "", wrapped(notes + gpu_note(found)), *conditions(found, columns)])


def issue_table(found: Records) -> str:
    """Times that the instructions of kernels predict, of the first generation and today, and what a GPU measured."""
    before, today, devices, device = read(FIRST_GENERATION), read(RECORD), gpus(found), DEVICES["h200"]

    def measured(name: str, provider: str) -> list[str]:
        none = {"ok": False, "median_ms": None}
        times = [measured_us(row_of(found, gpu, name, provider) or none) for gpu in devices]
        return [duration(us / 1e3) if us else NOT_YET for us in times] or [NOT_YET]

    rows = []
    for (name, provider), both in read_whole(RECORD).items():
        times = (_whole(name, one) for one in both)
        rows.append([f"{name}, {provider}", *times, both.today.binds, *measured(name, provider)])
    for name, case in today.items():
        rows.append([name, _us(before.get(name)), _us(case), _binds(case), *measured(name, "triton")])
    notes = (
        "One picture or one call on an H200, assumed to run at 1.755 GHz, predicted from machine code (`python -m "
        f"bench issue`). No GPU has calibrated the model, so an error of {ERROR:.0%} is an estimate and no bound. Most "
        "rows are kernels alone, without the library's products around them. `issue` means that the instructions take "
        "longest, `L2` what the second-level cache has to deliver, and `memory` that every tensor has to be moved "
        "once. The resize has not changed: of the first generation one program of a launch was followed, today it is "
        "five, some of which load more."
    )
    whole = (
        "Rows with a provider are whole: the ConvNeXt tower, the 23 layers of CLIP that run, over 577 tokens, a "
        "picture to its image tokens (`pixels` resized before, `decoded` resized there), and one token of an answer "
        f"after {CONTEXT} others. They are sums over all launches, in a CUDA graph. Our kernels count as in the other "
        f"rows; a product by its FLOP at {device.tensor_tflops:.0f} TFLOP/s in whole rounds of programs, attention at "
        f"{ATTENTION_TFLOPS:.0f} TFLOP/s, and anything by its bytes at {device.memory_gbps / 1e3:.1f} TB/s. No launch "
        f"takes less than {SHORTEST_US:.0f} us, and {GAP_US:.0f} us lies between two of them. These rates are the "
        "library's best, so that real times are longer. The two towers of a picture are added up, though they run at "
        "the same time. Nothing of CLIP has changed. Decoding has: the first generation repeated keys and values for "
        f"every head of a group, and its compiled passes attended to all {CAPACITY} positions of the cache. A compiled "
        "pass is counted as if whatever lies between two products became one launch. What binds is given by its share "
        "of the time, from a tenth on: `products` by their FLOP, `memory` by their bytes, and `short kernels` by "
        "neither."
    )
    titles = [f"measured on {gpu}" for gpu in devices] or ["measured"]
    head = ["case", "first generation, predicted", "today, predicted", "what binds today", *titles]
    return "\n".join([markdown(head, rows), "", wrapped(notes), "", wrapped(whole)])


def choice_table(found: Records) -> str:
    """What the model says of our kernels and of the library at the same shapes, and what `auto` takes."""
    rows = []
    for name, choice in read_choices().items():
        library = f"{choice.library.us:.1f} us in {choice.library.launches} launches: {choice.library.binds}"
        rows.append([name, f"{choice.kernel_us:.1f} us", library, f"`{choice.takes}`"])
    notes = (
        "Predicted for an H200, not measured. Both forms have the gaps between their launches; the library is counted "
        f"as in the table above, and cuDNN's depthwise convolution by its bytes at {DEPTHWISE_SHARE:.0%} of a copy's "
        "rate, in the middle of what public measurements found."
    )
    return "\n".join([markdown(["case", "our kernels", "torch's library", "`auto` takes"], rows), "", wrapped(notes)])


def _whole(name: str, prediction: WholePrediction) -> str:
    """The time of a whole model, and the tokens that it makes in a second of decoding."""
    rate = f" ({1e6 / prediction.us:.0f} tokens/s)" if "-decode-" in name else ""
    return f"{prediction.us / 1e3:.2f} ms{rate}"


def _us(case: CasePrediction | None) -> str:
    return "-" if case is None else f"{case.us:.1f} us"


def _binds(case: CasePrediction) -> str:
    return ", ".join(dict.fromkeys(launch.binds for launch in case.launches))
