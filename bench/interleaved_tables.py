"""The report's table about MM-Interleaved: what its steps cost at the published size, predicted or measured."""

import json
from collections.abc import Mapping

from . import records
from .figures import Records, figure, gpus, is_measured, markdown, row_of, wrapped

GROUP = "interleaved/13b-"
# The rows by the end of a case's name.
TITLES = {
    **{f"decode-n{n}": f"one more token, {n} picture{'s' * (n > 1)} in context" for n in (1, 4, 8)},
    **{f"prefill-n{n}": f"a prompt with {n} picture{'s' * (n > 1)} and 64 more tokens" for n in (1, 4, 8)},
    "step": "one step of a drawing, with guidance",
}
FORMS = {"plain": "without pictures", "original": "the original's steps", "auto": "mg_fast"}
# What a run on a GPU calls the forms.
PROVIDERS = {"original": "reference", "auto": "auto"}


def interleaved_table(found: Records) -> str:
    """What a token, a prompt, a step of a drawing and the whole model cost."""
    predicted = json.loads((records.RESULTS / "predicted.json").read_text(encoding="utf-8"))["cases"]
    rows = []
    for ending, title in TITLES.items():
        name = f"{GROUP}{ending}-b1-bfloat16"
        case = predicted[name]
        cells = [_measured(found, name, form) or _cost(case[form], case["plain"]) for form in FORMS]
        rows.append([title, *cells])
    whole = predicted[f"{GROUP}whole-n4-b1-bfloat16"]
    rows.append(
        ["memory of the whole model, four pictures", "-", *(_memory(whole[form]) for form in ("original", "auto"))]
    )
    rows += [
        [f"{title}, measured", "-", *cells]
        for ending, title in {"picture": "a picture", "round": "a text and a picture"}.items()
        if any(cells := [_measured(found, f"{GROUP}{ending}-b1-bfloat16", form) for form in PROVIDERS])
    ]
    notes = (
        "Vicuna-13B, CLIP ViT-L/14 and Stable Diffusion 2.1 base, counted on tensors without values (`python -m bench "
        "memory 'interleaved/*'`): the original in float32, as it runs, the rest in bfloat16. GFLOP of matrix products "
        "and convolutions, and launches of kernels, each also as a multiple of what the language model or the U-Net "
        "takes without any picture. A prompt's pictures are seen already; mg_fast also projects them there, once for "
        "all tokens that follow. Memory is the weights with everything packed, and the most that is allocated at once "
        "while four pictures are seen, a token is written and a picture is drawn, without CUDA graphs."
    )
    head = ["MM-Interleaved on a GPU, predicted", *FORMS.values()]
    return "\n".join([markdown(head, rows), "", wrapped(notes)])


def _cost(row: Mapping, plain: Mapping) -> str:
    told = f"{row['flop'] / 1e9:,.0f} GFLOP, {row['launches']:,} launches"
    if row is plain:
        return told
    return f"{told} ({row['flop'] / plain['flop']:.2f} and {row['launches'] / plain['launches']:.2f} times)"


def _memory(row: Mapping) -> str:
    weights, peak = row["weights"] / 1e9, row["peak"] / 1e9
    return f"{weights + peak:.1f} GB, of which {weights:.1f} GB are weights"


def _measured(found: Records, case: str, form: str) -> str:
    """The figures of a form on every GPU that it was measured on."""
    provider = PROVIDERS.get(form)
    rows = {device: row_of(found, device, case, provider) for device in gpus(found)} if provider else {}
    return "; ".join(f"measured on {device}: {figure(row)}" for device, row in rows.items() if is_measured(row))
