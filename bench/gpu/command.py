"""`python -m bench gpu`, `step` and `keep`: from words to a run."""

import shlex
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from mg_fast.testing.environment import environment

from .. import records
from ..cases import all_cases
from ..devices import check_device
from ..errors import BadRecord, BenchError
from ..registry import Ceilings
from ..run import RunOptions, run
from ..watch import Watchdog
from . import plan as plans
from .plan import Step
from .runner import Settings, run_plan
from .summary import Outcome, earlier_outcomes

# What two runs must have in common to be one: figures of different machines or versions do not belong into one table.
SAME = ("gpu", "torch", "triton", "transformers", "commit")


def gpu(
    out: Path | None,
    *,
    minutes: float = plans.MINUTES,
    names: Sequence[str] = (),
    resume: Path | None = None,
    device: str = "cuda",
    plan: str = "full",
    dry: bool = False,
) -> int:
    """Runs a plan, or prints it; returns the exit status, 1 where a step failed or a kernel was not found right.

    Args:
        resume: the folder of an earlier run. Its results are taken over, and its finished steps and measured cases are
            not run again.

    Raises:
        NoDevice: the device is not here.
        UnknownCase: a name asks for no step.
        BadRecord: the earlier run cannot be read, or was made on something else, or the folder cannot be used.
    """
    if out is None and resume is None and not dry:
        raise BenchError("expected --out DIR, --resume DIR, or --dry-run")
    steps = plans.choose_steps(plans.PLANS[plan](device), names)
    if dry:
        print(plans.describe(steps, 60 * minutes, plan, device))
        return 0
    check_device(device)
    out = out or resume
    earlier: list[Outcome] = []
    if resume is not None:
        earlier = earlier_outcomes(resume)
        _check_same(resume)
    _check_usable(out, resume)
    if resume is not None and out.resolve() != resume.resolve():
        for name in plans.FILES:
            if (resume / name).exists():
                # Only the content is copied: a file that came back from a lent machine may be read-only.
                shutil.copyfile(resume / name, out / name)
    # When a caller's time limit ends this process, it ends like after an interrupt.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    outcomes = run_plan(steps, out, 60 * minutes, Settings(plan, device), earlier)
    print(f"kept in {out}: {', '.join(name for name in plans.FILES if (out / name).exists())}")
    return verdict(steps, outcomes)


def verdict(steps: Sequence[Step], outcomes: Sequence[Outcome]) -> int:
    """The exit status of a run: 1 for a wrong or unproven kernel.

    A slow case, or an opponent that fails, is a finding and no failure.
    """
    unproven = any(outcome.state != "done" for step, outcome in zip(steps, outcomes) if step.into == plans.CORRECTNESS)
    return int(unproven or any(outcome.state == "failed" for outcome in outcomes))


def _check_same(resume: Path) -> None:
    """Raises BadRecord where an earlier run was made on another GPU, stack or commit."""
    files = [resume / name for name in (plans.ENVIRONMENT, plans.CASES, plans.END_TO_END)]
    found = next((path for path in files if path.exists()), None)
    if found is None:
        return
    before, now = records.read(found), environment()
    if different := [f"{key} {before.get(key)} there, {now[key]} here" for key in SAME if before.get(key) != now[key]]:
        raise BadRecord(
            f"{resume} cannot be resumed, since its figures would not belong together with new ones: "
            f"{'; '.join(different)}"
        )


def _check_usable(out: Path, resume: Path | None) -> None:
    """Raises BadRecord where nothing can be kept in a folder, which may not exist yet."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = sorted({path.name for path in out.iterdir()}.intersection(plans.FILES))
    except OSError as error:
        raise BadRecord(f"{out} cannot be used: {error.strerror}: expected a folder to write to") from None
    if found and (resume is None or out.resolve() != resume.resolve()):
        expected = f"expected a new folder, or --resume {out} to go on with it"
        raise BadRecord(f"{out} holds {', '.join(found)} of an earlier run: {expected}")


def step(
    name: str,
    *,
    plan: str,
    device: str,
    out: Path | None = None,
    done: Path | None = None,
    ceilings: Path | None = None,
    watch: Watchdog | None = None,
) -> dict:
    """Measures the cases of one step, for a process that `run_plan` starts, and returns the document.

    Args:
        done: a document of cases that are not measured again.
        ceilings: a document that has them, of this device.
    """
    check_device(device)
    [chosen] = plans.choose_steps(plans.PLANS[plan](device), [name])
    cases = plans.cases_of(chosen, all_cases(), device)
    cases = plans.remaining(cases, records.read(done)["cases"]) if done is not None else cases
    known = Ceilings(**records.read(ceilings)["ceilings"]) if ceilings is not None else None
    seconds = 4 if device == "cuda" else 0.1
    options = RunOptions(seconds, memory=device == "cuda", kernels=True, watch=watch or Watchdog())
    words = shlex.join(["python", "-m", "bench", "gpu", "--steps", name])
    return run(cases, device, options, ceilings=known, out=out, command=words)


def keep(folder: Path) -> str:
    """Keeps what a run on a GPU found under bench/results: every case by device and name, and the summary.

    Raises:
        BadRecord: the folder holds no document of cases.
    """
    documents = [records.read(folder / name) for name in (plans.CASES, plans.END_TO_END) if (folder / name).exists()]
    documents = [document for document in documents if document["cases"]]
    if not documents:
        raise BadRecord(f"{folder} holds no cases: expected {plans.CASES} or {plans.END_TO_END} of a `bench gpu`")
    paths = [path for document in documents for path in records.save(document)]
    where = paths[0].parent
    for name in (plans.SUMMARY, plans.CORRECTNESS):
        if (folder / name).exists():
            paths.append(Path(shutil.copyfile(folder / name, where / f"{documents[0]['date']}-{name}")))
    return "\n".join(f"kept {path}" for path in paths)
