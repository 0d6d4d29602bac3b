"""Two documents side by side: whether the same comparisons came to the same ratios."""


def compare(before: dict, after: dict, within: float) -> tuple[str, bool]:
    """A table of what both documents have, and whether all their ratios to the baseline agree.

    Ratios, not times: two runs on one machine differ in its clock and its other work, two machines in everything.

    Args:
        within: by what part ratios may differ.
    """
    rows = {(row["name"], row["provider"]): row for row in before["cases"]}
    broken = []
    lines = [f"before: {_conditions(before)}", f"after:  {_conditions(after)}"]
    lines.append(
        f"{'case':<34} {'provider':<24} {'ms before':>10} {'after':>10} {'ratio before':>13} {'after':>8} {'differ':>7}"
    )
    agree, common = True, 0
    for row in after["cases"]:
        other = rows.get((row["name"], row["provider"]))
        if other is None:
            continue
        if (other["median_ms"] is None) != (row["median_ms"] is None) or (other["ok"] is False) != (row["ok"] is False):
            told = [f"{when}: {of['why'] or 'measured'}" for when, of in (("before", other), ("after", row))]
            broken.append(f"{row['name']:<34} {row['provider']:<24} {'; '.join(told)} <<<")
            continue
        if row["median_ms"] is None:
            continue
        common += 1
        times = f"{other['median_ms']:>10.3g} {row['median_ms']:>10.3g}"
        ratios = other.get("speedup"), row.get("speedup")
        shown = f"{'-':>13} {'-':>8} {'-':>7}"
        if None not in ratios:
            differ = max(ratios) / min(ratios) - 1
            agree &= differ <= within
            shown = f"{ratios[0]:>12.2f}x {ratios[1]:>7.2f}x {differ:>7.1%}" + " <<<" * (differ > within)
        lines.append(f"{row['name']:<34} {row['provider']:<24} {times} {shown}")
    lines += broken
    agree &= not broken
    if not common and not broken:
        return "\n".join([*lines[:2], "nothing was measured in both"]), False
    after_only = {(row["name"], row["provider"]) for row in after["cases"]}
    if missing := [key for key in rows if key not in after_only]:
        lines.append(f"measured before and not after: {'; '.join(', '.join(key) for key in missing)}")
    lines.append(f"ratios {'agree' if agree else 'DO NOT agree'} within {within:.0%}")
    return "\n".join(lines), agree


def _conditions(document: dict) -> str:
    """One line of where and when."""
    where = document["gpu"] if document["device"] == "cuda" else f"{document['cpu']}, {document['threads']} threads"
    return f"{where}, torch {document['torch']}, commit {document['commit']}, {document['date']}, load {document.get('load')}"
