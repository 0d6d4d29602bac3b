"""The two tables of the README follow the records."""

from bench.readme_table import readme_table, status_table
from tests.bench import documents


def by_case(*made):
    return {document["cases"][0]["name"]: document for document in made}


ON_A_CPU = {"cpu": by_case(documents.mining(), documents.picture())}
ON_A_GPU = {
    **ON_A_CPU,
    "nvidia-h200": by_case(
        documents.mining("768", "bfloat16", "cuda", 1e-3), documents.picture("bfloat16", "cuda", "1536-hd")
    ),
}


def rows(found):
    """The cells of every row, by what stands in the first one."""
    lines = [line for line in readme_table(found).splitlines()[2:] if line.startswith("|")]
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {first: rest for first, *rest in cells}


def test_a_row_for_every_measured_case():
    assert rows(ON_A_CPU) == {
        "one picture of 768x768 pixels to image tokens, float32": [
            *("16.7 s", "8.05 s", "2.1 times", "1742 MiB", "239 MiB"),
        ],
        "patch info mining alone, 768x768 pixels, float32": [
            *("4.20 s", "114 ms", "36.8 times", "1508 MiB", "41 MiB"),
        ],
    }
    assert "Measured on AMD EPYC avx2, 2 threads: medians" in readme_table(ON_A_CPU)


def test_what_a_figure_must_not_be_read_without():
    document = documents.picture()
    document["cases"][-1] |= {"halves_differ": 0.3, "peak_mib": None, "speedup": 0.5}
    [cells] = rows({"cpu": by_case(document)}).values()
    assert cells[2:] == ["slower: 0.50 times; unsteady: halves of the turns differ by 30%", "1742 MiB", "not measured"]


def test_a_gpu_adds_its_rows():
    added = rows(ON_A_GPU).keys() - rows(ON_A_CPU).keys()
    assert added == {"NVIDIA H200: one HD picture of 1536x1536 pixels to image tokens, bfloat16"}


def test_nothing_recorded():
    assert rows({}) == {} and "Measured on nothing yet" in readme_table({})


def test_the_status_box():
    assert status_table(ON_A_CPU).startswith("> **Measured on a CPU. On a GPU: predicted, not run yet.**")
    box = status_table(ON_A_GPU)
    assert all(line.startswith("> ") for line in box.splitlines()) and "predicted, not run yet" not in box
    told = " ".join(box.replace("\n>", "").split())
    assert told.startswith("> - **nvidia-h200**, measured on 2026-11-22 at commit 0123456789ab: 2 cases, in which")
    assert "Wrong or broken: none. Slower than the baseline: none." in told
