"""Two documents side by side: whether the same comparisons came to the same ratios."""


def compare(before: dict, after: dict, within: float) -> tuple[str, bool]:
    """A table of what both documents have, and whether all their ratios to the baseline agree within this share.

    Ratios are compared, not times: clock rate and other load differ between two runs on one machine, and between two
    machines everything differs.
    """
    rows = {_key(row): row for row in before["cases"]}
    lines = [f"before: {_conditions(before)}", f"after:  {_conditions(after)}"]
    table, broken, agree = [], [], True
    for row in after["cases"]:
        other, named = rows.get(_key(row)), f"{row['name']:<34} {row['provider']:<24}"
        if other is None:
            continue
        if (other["median_ms"] is None) != (row["median_ms"] is None) or (other["ok"] is False) != (row["ok"] is False):
            told = f"before: {other['why'] or 'measured'}; after: {row['why'] or 'measured'}"
            broken.append(f"{named} {told} <<<")
        elif row["median_ms"] is not None:
            ratios, shown = (other.get("speedup"), row.get("speedup")), f"{'-':>13} {'-':>8} {'-':>7}"
            if None not in ratios:
                differ = max(ratios) / min(ratios) - 1
                agree &= differ <= within
                shown = f"{ratios[0]:>12.2f}x {ratios[1]:>7.2f}x {differ:>7.1%}" + " <<<" * (differ > within)
            table.append(f"{named} {other['median_ms']:>10.3g} {row['median_ms']:>10.3g} {shown}")
    if not table and not broken:
        return "\n".join([*lines, "nothing was measured in both"]), False
    title = (
        f"{'case':<34} {'provider':<24} {'ms before':>10} {'after':>10} {'ratio before':>13} {'after':>8} {'differ':>7}"
    )
    lines += [title, *table, *broken]
    agree &= not broken
    if missing := [key for key in rows if key not in set(map(_key, after["cases"]))]:
        lines.append(f"measured before and not after: {'; '.join(map(', '.join, missing))}")
    lines.append(f"ratios {'agree' if agree else 'DO NOT agree'} within {within:.0%}")
    return "\n".join(lines), agree


def _key(row: dict) -> tuple[str, str]:
    return row["name"], row["provider"]


def _conditions(document: dict) -> str:
    """The machine, the versions and the date of a document, in one line."""
    where = document["gpu"] if document["device"] == "cuda" else f"{document['cpu']}, {document['threads']} threads"
    when = f"commit {document['commit']}, {document['date']}, load {document.get('load')}"
    return f"{where}, torch {document['torch']}, {when}"
