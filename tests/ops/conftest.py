"""The processes that compile kernels ahead of time; none is started if no test asks for them."""

import pytest


@pytest.fixture(scope="session")
def put_off():
    # This import is late: Triton is not on every platform, and interpreting processes must not import its compiler.
    from tests.ops.ahead_of_time_gate import compiling

    with compiling() as put_off:
        yield put_off


@pytest.fixture(scope="session")
def jobs(request, put_off):
    """Futures of the selected tests' cases, by case; all of them are started at once."""
    from tests.ops.ahead_of_time_checks import start

    parametrised = (getattr(item, "callspec", None) for item in request.session.items)
    cases = dict.fromkeys(c.params["kernel"][0] for c in parametrised if c and "kernel" in c.params)
    return start(cases, put_off)
