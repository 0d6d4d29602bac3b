"""A plug-in of pytest for the tests of a GPU run.

Tests that passed in an earlier run are left out, as its verbose output tells. MG_FAST_PASSED_BEFORE names the file that
holds this output. The file must not change while tests run: every worker of pytest-xdist reads it, also one that takes
the place of another, and all must collect the same tests. Without the variable or the file all tests run.

A test that breaks the GPU's context takes all later ones of its process with it. A worker therefore ends after such a
test, and pytest-xdist puts another one in its place.
"""

import os
import re
import sys
from pathlib import Path

# "path::test PASSED [ 10%]", and by a worker of pytest-xdist "[gw3] [ 10%] PASSED path::test"
_PASSED = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] PASSED (?P<worker>\S.*?)|(?P<alone>\S.*?::.*?) PASSED(?: +\[ *\d+%\])?) *$", re.MULTILINE
)


def passed(text: str) -> set[str]:
    """The tests that a verbose output says have passed."""
    return {match["worker"] or match["alone"] for match in _PASSED.finditer(text)}


def pytest_configure(config):
    path = Path(os.environ.get("MG_FAST_PASSED_BEFORE", ""))
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    config.passed_before = passed(text)


def pytest_collection_modifyitems(config, items):
    before = [item for item in items if item.nodeid in config.passed_before]
    if before:
        config.hook.pytest_deselected(items=before)
        items[:] = [item for item in items if item.nodeid not in config.passed_before]


def pytest_report_header(config):
    if config.passed_before:
        return f"{len(config.passed_before)} tests passed in an earlier run and are left out"


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 5 and session.config.passed_before:
        # No test is left, since all had passed.
        session.exitstatus = 0


def pytest_runtest_logfinish(nodeid, location):
    # By now the reports of the test have left this process.
    if "PYTEST_XDIST_WORKER" in os.environ and is_lost():
        os._exit(70)


def is_lost() -> bool:
    """Whether an earlier kernel has broken this process' GPU context."""
    # Neither module is imported at the top: what no test has needed would cost the collection seconds.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return False
    from bench.gpu_timing import why_lost

    return why_lost() is not None
