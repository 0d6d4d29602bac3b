"""`python -m bench roofline`: what a GPU allows for an answer, and what was measured on it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import records
from .costs.answer import ModelledAnswer
from .costs.gpus import find_gpu
from .costs.mining import reference_mining
from .errors import BadRecord
from .registry import Ceilings


def measured_stages(rows: Sequence[Mapping], answer: ModelledAnswer) -> dict[str, tuple[float, str]]:
    """The fastest right row of each stage: its milliseconds, and the name of its provider."""
    setting = f"{answer.config.image_size_aux}{'-hd' if answer.hd else ''}"
    ending = f"{setting}-b{answer.batch}-{answer.dtype}"
    cases = {
        f"dual_resize/{setting}-float32": "preprocess",
        f"clip/{ending}": "LR tower",
        f"tower/{ending}": "HR tower",
        f"patch_mining/{ending}": "patch info mining",
    }
    if answer.config.text_config.hidden_size == 4096:
        # The projector is measured at this width alone.
        cases[f"projector/{ending}"] = "projector"
    # The case of a whole answer gives the stage that has no case of its own.
    whole, last = f"end-to-end/{answer.model}-first-token-b{answer.batch}-{answer.dtype}", answer.stages[-1].name
    found: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        if row["name"] in cases and row["ok"] and row["median_ms"]:
            found.setdefault(cases[row["name"]], []).append((row["median_ms"], row["provider"]))
        if row["name"] == whole and row["ok"] is not False:
            times = [(stage["ms"], row["provider"]) for stage in row.get("stages") or () if stage["name"] == last]
            found.setdefault(last, []).extend(times)
    return {stage: min(times) for stage, times in found.items() if times}


def recorded_ceilings(document: Mapping) -> Ceilings | None:
    """The ceilings that a document was measured under; None where it holds none."""
    ceilings = document.get("ceilings")
    return Ceilings(ceilings["copy_gbps"], ceilings["matmul_tflops"]) if ceilings else None


def table(gpu: str, measured: Path | None, **options) -> str:
    """The roofline of an answer on a GPU as text.

    Args:
        options: of `ModelledAnswer`.
        measured: a document, or a folder of them, whose ceilings and times stand beside the floors.
    """
    gpu, answer, times = find_gpu(gpu), ModelledAnswer(**options), {}
    dtype = answer.dtype
    ceilings, source = gpu.ceilings, "the data sheet's, which no program reaches"
    if gpu.reached is not None:
        source = "reached on one card"
    if measured is not None:
        document = records.read(measured)
        if document.get("device") != "cuda" or (recorded := recorded_ceilings(document)) is None:
            raise BadRecord(
                f"{measured}: expected documents measured on a GPU, with their ceilings; --measured needs such"
            )
        ceilings, source, times = recorded, f"measured on {document['gpu']}", measured_stages(document["cases"], answer)
        if dtype not in ceilings.matmul_tflops:
            raise BadRecord(f"{measured}: no ceiling of {dtype} products among {', '.join(ceilings.matmul_tflops)}")
    tflops, bandwidth = ceilings.matmul_tflops[dtype], ceilings.copy_gbps
    total = answer.first_token_ms(ceilings)
    lines = [
        f"{gpu.name}, {answer.model} in {dtype}, batch {answer.batch}: "
        f"{answer.image_tokens} image and {answer.text_tokens} text tokens, {answer.new_tokens} new ones",
        f"rates, {source}: {bandwidth / 1e3:.2f} TB/s, {tflops:.0f} TFLOP/s of {dtype} products",
        "",
        f"{'stage':<24}{'GFLOP':>11}{'MB':>11}{'FLOP/B':>9}{'floor ms':>10}{'bound':>11}{'share':>7}"
        + f"{'measured':>10}" * bool(times),
    ]
    for stage in [*answer.stages, answer.decode]:
        floor = stage.floor_ms(ceilings, dtype)
        share = f"{floor / total:.1%}" if stage in answer.stages else "-"
        line = f"{stage.name:<24}{_figure(stage.cost.flop / 1e9):>11}{_figure(stage.cost.bytes / 1e6):>11}"
        line += f"{stage.intensity:>9.1f}{floor:>10.3f}{stage.bound(ceilings, dtype):>11}{share:>7}"
        ms, provider = times.get(stage.name, (None, None))
        lines.append(line + (f"{ms:>10.3f} {provider}" if provider else ""))
    original = reference_mining(answer.mining)
    products, copies = original.flop / tflops / 1e9, original.bytes / bandwidth / 1e6
    room = gpu.memory_gb - (answer.weight_bytes + answer.cache_bytes) / 1e9
    fits = f"fits into {gpu.memory_gb:g} GB, {room:.1f} GB are left for the tensors that a call makes"
    does_not = f"DOES NOT FIT into {gpu.memory_gb:g} GB, {-room:.1f} GB are missing"
    lines += [
        "",
        f"mining by the original's steps: {original.flop / 1e9:.0f} GFLOP and {original.bytes / 1e9:.1f} GB, "
        f"{max(products, copies):.2f} ms where products and copies overlap, {products + copies:.2f} ms where they take "
        "turns",
        f"time to first token: at least {total:.1f} ms, "
        f"{total - answer.stages[-1].floor_ms(ceilings, dtype):.1f} ms of which pass before the language model begins",
        f"decode: at most {answer.tokens_per_second(ceilings):.0f} tokens/s"
        + " of the whole batch" * (answer.batch > 1),
        f"memory: weights {answer.weight_bytes / 1e9:.1f} GB, KV cache {answer.cache_bytes / 1e9:.2f} GB: "
        + (fits if room > 0 else does_not),
    ]
    return "\n".join(lines)


def _figure(value: float) -> str:
    return "-" if not value else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
