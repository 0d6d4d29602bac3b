"""`python -m bench load`: measures, records, and prints the load of a server; and the table of what is recorded."""

import json
from collections.abc import Mapping, Sequence

from . import records, serving_load
from .figures import Records, markdown, wrapped

# Requests of each load by default: the second model takes seconds for one.
REQUESTS = {"nano": 200, "0.5b": 12}
THREADS = {"nano": 1, "0.5b": 2}


def main(models: Sequence[str], *, requests: int | None, threads: int | None, keep: bool) -> str:
    """Measures models, and records them if `keep` is set; returns the table of them.

    Args:
        models: of `serving_load.MODELS`; none: all.
        requests, threads: of each load, and of each kind of serving; None: as is usual for the model.

    Raises:
        UnknownName: there is no such model.
        NoServer: the server did not start.
    """
    found = {}
    for model in models or serving_load.MODELS:
        number, used = requests or REQUESTS.get(model), threads or THREADS.get(model)
        found[model] = serving_load.measure(model, requests=number, threads=used)
        if keep:
            records.write(serving_load.RECORD, recorded() | found)
    return table(found)


def recorded() -> dict[str, dict]:
    """What is recorded of each model; empty if there is nothing."""
    if not serving_load.RECORD.exists():
        return {}
    return json.loads(serving_load.RECORD.read_text(encoding="utf-8"))


def load_of_serving(found: Records) -> str:
    """The table in docs/benchmarks.md, from what is recorded."""
    return table(recorded())


def table(documents: Mapping[str, Mapping]) -> str:
    """What was measured of each model, as a table in Markdown."""
    if not documents:
        return wrapped("Not measured yet: `python -m bench load --save` measures it.")
    head = ["model, pictures, clients"]
    head += [f"{who}: {what}" for who in ("`Pipeline`, one at a time", "vLLM") for what in ("answers/s", "first text")]
    rows = []
    for model, document in documents.items():
        loads = {(row["pictures"], row["clients"]): {} for row in document["rows"]}
        for row in document["rows"]:
            loads[row["pictures"], row["clients"]][row["server"]] = row
        for (pictures, clients), kinds in loads.items():
            plain, served = kinds["pipeline"], kinds["vllm"]
            ratio = f" ({served['per_second'] / plain['per_second']:.1f} times{_unsteady(plain)})"
            rows.append(
                [
                    f"{model}, {pictures}, {clients}",
                    f"{plain['per_second']:.2f}",
                    _first(plain),
                    f"{served['per_second']:.2f}{ratio}",
                    _first(served),
                ]
            )
    notes = (
        "Answers in a second, and milliseconds from a request to the first text of its answer: median and 99th "
        "percentile. Each client sends its next request when the last one is answered; the clients run on the same "
        f"machine. A request is one picture and `{serving_load.QUESTION}`, with at most {serving_load.NEW_TOKENS} new "
        "tokens, all in float32. Pictures are fresh, or the same four. `Pipeline` answers one request after another, "
        "and so takes turns between the clients; it ran before and after the server, and both turns count."
    )
    return "\n".join([markdown(head, rows), "", wrapped(notes), "", *(_conditions(d) for d in documents.values())])


def _first(row: Mapping) -> str:
    median, last = row["first_ms"]
    return f"{median:,.0f} / {last:,.0f} ms"


def _unsteady(row: Mapping) -> str:
    """What to say of a row whose two turns differ by a tenth or more."""
    before, after = row["halves"]
    share = abs(before - after) / max(before, after)
    return f"; unsteady: the two turns differ by {share:.0%}" if share >= 0.1 else ""


def _conditions(document: Mapping) -> str:
    return wrapped(
        f"- {document['model']}: {document['cpu']}, {document['threads']} "
        f"thread{'s' * (document['threads'] > 1)} each, vLLM {document['vllm']}, torch {document['torch']}, "
        f"{document['date']}, commit {document['commit']}, load {document['load']}, options "
        f"`{' '.join(document['options'])}`; {document['same_answers']} of {document['answers']} answers of vLLM were "
        "those of `Pipeline`."
    )
