"""The processes in which kernels are compiled ahead of time; nothing is started where no test asks for them."""

import pytest


@pytest.fixture(scope="session")
def put_off():
    # Here, because Triton is not everywhere, and a process that interprets must not import what compiles.
    from tests.ops.ahead_of_time_gate import compiling

    with compiling() as put_off:
        yield put_off


@pytest.fixture(scope="session")
def jobs(request, put_off):
    """The cases of the tests that were selected, all under way at once: futures by case."""
    from tests.ops.ahead_of_time_checks import start

    parametrised = (getattr(item, "callspec", None) for item in request.session.items)
    cases = dict.fromkeys(c.params["kernel"][0] for c in parametrised if c and "kernel" in c.params)
    return start(cases, put_off)
