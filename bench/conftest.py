"""Options of `pytest bench`."""


def pytest_addoption(parser):
    group = parser.getgroup("bench", "the benchmark's cases")
    group.addoption(
        "--cases",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="names, shell patterns or groups, written after the folder; default: the quick cases on a CPU, "
        "the cases made for it on a GPU",
    )
    group.addoption("--bench-device", help="cpu or cuda; default: a GPU where there is one")
