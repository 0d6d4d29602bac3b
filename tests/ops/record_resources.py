"""Compiles kernels ahead of time and records the resources that they need, after an intended change.

python -m tests.ops.record_resources              # all kernels
python -m tests.ops.record_resources pointwise    # the kernels of some files of kernels/

Each release of Triton has tables of its own, and the installed one writes its own. So run this with the Python of both
environments: .venv/bin/python, and .venv-newest/bin/python, which `make test-newest` makes.
"""

import sys

from .ahead_of_time_checks import FAMILIES, REWRITE
from .ahead_of_time_gate import compiling, faults, write_table


def main(families: list[str]) -> str | None:
    if not FAMILIES.keys() >= set(families):
        return f"usage: {REWRITE} [{' '.join(FAMILIES)}]"
    wrong = []
    with compiling() as put_off:
        for family in families or FAMILIES:
            jobs = {case: put_off(case) for case in FAMILIES[family].cases()}
            write_table(family, {name: found for job in jobs.values() for name, found in job.result().items()})
            wrong += [
                f"{name}: {fault}"
                for case, job in jobs.items()
                for name, found in job.result().items()
                for fault in faults(case, name, found)
            ]
    return "\n".join(wrong) or None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
