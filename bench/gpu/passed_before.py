"""A pytest plug-in that leaves out the tests that passed in an earlier run, as its verbose output tells.

The file is named by MG_FAST_PASSED_BEFORE; without it, or where it does not exist, all tests run. With pytest-xdist every worker reads the
same file, so that all of them collect the same tests.
"""

import os
import re
from pathlib import Path

# "path::test PASSED [ 10%]", and by a worker of pytest-xdist "[gw3] [ 10%] PASSED path::test"
_PASSED = re.compile(r"^(?:\[gw\d+\] \[ *\d+%\] PASSED (?P<theirs>\S.*?)|(?P<ours>\S.*?::.*?) PASSED(?: +\[ *\d+%\])?) *$", re.MULTILINE)


def passed(text: str) -> set[str]:
    """The tests that a verbose output says have passed."""
    return {match["theirs"] or match["ours"] for match in _PASSED.finditer(text)}


def pytest_configure(config):
    path = Path(os.environ.get("MG_FAST_PASSED_BEFORE", ""))
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    # read once: the file grows while the tests run
    config.passed_before = passed(text)


def pytest_collection_modifyitems(config, items):
    before = [item for item in items if item.nodeid in config.passed_before]
    if before:
        config.hook.pytest_deselected(items=before)
        items[:] = [item for item in items if item.nodeid not in config.passed_before]


def pytest_report_header(config):
    return f"{len(config.passed_before)} tests passed in an earlier run and are left out" if config.passed_before else None


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 5 and session.config.passed_before:
        # no test is left: all had passed
        session.exitstatus = 0
