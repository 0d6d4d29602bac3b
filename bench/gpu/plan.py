"""The steps of a run on a GPU: what each finds out, in which order, and how long it may take."""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import UnknownCase
from ..registry import Case, choose, choose_names

ROOT = Path(__file__).parents[2]
SUMMARY, LOG = "summary.md", "log.txt"
ENVIRONMENT, CASES, END_TO_END = "environment.json", "cases.json", "end-to-end.json"
CORRECTNESS, TUNING = "correctness.txt", "tuning.txt"
FILES = (SUMMARY, LOG, ENVIRONMENT, CASES, END_TO_END, CORRECTNESS, TUNING)
# seconds of a default run, of which this many are kept for what is written at the end
MINUTES, RESERVE = 6.0, 5.0
# a provider that does not come back within so many seconds is given up, and its process with it; compilers get nearly a
# step's budget
HANGS_AFTER, COMPILING_HANGS_AFTER = 25.0, 75.0
# the same of a test
TEST_HANGS_AFTER = 40.0


@dataclass(frozen=True)
class Part:
    """Cases by name, and the providers of them that are measured; both are shell patterns, and cases come in the order
    of theirs.

    Args:
        baseline: what the providers are compared with, where it is not the case's own baseline. That one is not
            measured then.
    """

    cases: tuple[str, ...]
    providers: tuple[str, ...]
    baseline: str | None = None


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        name: by which it is asked for.
        finds: what it finds out.
        seconds: its budget. None: what is left, if that is at least `least`.
        into: the file that it adds to: a document (.json) is asked for by `--out`, a text is the standard output.
        words: the command after `python -m`. Those of a step of cases are made from its parts.
        parts: the cases that it measures, in this order.
        environment: variables of its own.
        least: seconds below which it is not worth beginning.
    """

    name: str
    finds: str
    seconds: float | None
    into: str
    words: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    least: float = 5.0


def cases_of(step: Step, cases: Mapping[str, Case], device: str) -> list[Case]:
    """The cases of a step with the providers that it measures, one after another; a case stands once for every part
    that names it.
    """
    chosen = []
    for part in step.parts:
        of_part = dict.fromkeys(case.name for pattern in part.cases for case in choose(cases, [pattern], device))
        of_part = [replace(cases[name], baseline=part.baseline or cases[name].baseline) for name in of_part]
        chosen += [case.only(part.providers) for case in of_part]
    return chosen


def remaining(chosen: Sequence[Case], rows: Sequence[Mapping]) -> list[Case]:
    """What of the chosen cases has no row yet.

    The baseline is measured again beside what is left of a case, for its ratios, unless it failed before.
    """
    found = {(row["name"], row["provider"]): row for row in rows}
    left = []
    for case in chosen:
        missing = [name for name in case.providers if (case.name, name) not in found]
        baseline = found.get((case.name, case.baseline))
        if not missing:
            continue
        if baseline is not None and baseline["median_ms"] is not None:
            missing.insert(0, case.baseline)
        left.append(case.restricted(missing))
    return left


def full_plan(device: str = "cuda") -> list[Step]:
    """The steps on a GPU, by importance."""
    # the project's own options ask for less words, so that a single -v would name no test
    tests = ("pytest", "-vv", "-rfE", *_kernel_tests())
    tests += ("-p", "bench.gpu.pytest_plugin", "-p", "no:cacheprovider", "--tb=short")
    # a test that hangs ends its worker, and another one takes its place
    tests += ("-o", f"faulthandler_timeout={TEST_HANGS_AFTER:.0f}", "-o", "faulthandler_exit_on_timeout=true")
    if importlib.util.find_spec("pytest_timeout"):
        # the same where pytest is too old for these options
        tests += (f"--timeout={TEST_HANGS_AFTER:.0f}", "--timeout-method=thread")
    if importlib.util.find_spec("xdist"):
        # in turn, so that the published sizes, which come first, are spread over all workers
        tests += ("-n", str(max(1, min(14, (os.cpu_count() or 1) - 2))), "--dist", "load")
    plain = ("reference", "torch", "triton")
    step = "end-to-end/7b-decode-b1-bfloat16"
    return [
        Step(
            "environment",
            "the machine, its clocks under load, what a copy and a product reach",
            30,
            ENVIRONMENT,
            ("bench", "ceilings", "--device", device),
        ),
        Step(
            "smoke",
            "every kernel launched once and right, then under memcheck and racecheck",
            60,
            CORRECTNESS,
            ("bench", "smoke", "--device", device),
        ),
        Step(
            "mining",
            "patch info mining of one picture",
            50,
            CASES,
            parts=(
                Part(("patch_mining/768-b1-bfloat16", "patch_mining/1536-hd-b1-bfloat16"), (*plain, "reference, SDPA")),
                Part(("patch_mining/768-b1-bfloat16",), ("torch, compiled",)),
                Part(("patch_mining/768-b1-float16", "patch_mining/768-b1-float32"), plain),
            ),
        ),
        Step(
            "towers",
            "both towers and the projector of one picture",
            60,
            CASES,
            parts=(
                Part(("tower/768-b1-bfloat16",), (*plain, "reference, channels last", "auto")),
                Part(
                    ("clip/768-b1-bfloat16",),
                    ("reference", "reference, flash attention", "reference, SDPA cuDNN", "23 layers", "packed"),
                ),
                Part(("projector/768-b1-bfloat16",), ("reference",)),
                Part(("tower/1536-hd-b1-bfloat16",), ("reference, channels last", "auto")),
                Part(("tower/768-b1-bfloat16",), ("reference, channels last, compiled",)),
            ),
        ),
        Step(
            "pixels",
            "pixels on the device to image tokens, with a table of the kernels",
            40,
            CASES,
            parts=(
                Part(("pixels/768-b1-bfloat16", "pixels/1536-hd-b1-bfloat16"), ("reference", "auto")),
                Part(("decoded/768-b1-bfloat16",), ("reference", "auto")),
                Part(("pixels/768-b1-bfloat16",), ("reference, channels last, compiled",)),
            ),
        ),
        Step(
            "kernels",
            "the other kernels alone",
            40,
            CASES,
            parts=(
                Part(("dwconv_norm/768-*-b1-bfloat16",), plain),
                Part(("linear_gelu/768-*-b1-bfloat16", "linear_residual/768-*-b1-bfloat16"), plain),
                # the case's own baseline is Pillow on the host, whose time is no business of a GPU's
                Part(("dual_resize/*",), ("torch", "triton"), baseline="torch"),
            ),
        ),
        Step(
            "decode",
            "answers of a 7B model: first token, one more token, a table of its kernels, compiled",
            80,
            END_TO_END,
            parts=(
                Part((step,), ("reference", "auto")),
                Part(("end-to-end/7b-first-token-b1-bfloat16",), ("reference", "auto", "reference, flash attention")),
                # ours first, each with the baseline anew, since either may take all the time that is left
                Part((step,), ("auto, compiled",)),
                Part((step,), ("auto, static cache",)),
            ),
        ),
        Step("tests", "all tests of the kernels, the published sizes first", 120, CORRECTNESS, tests),
        Step(
            "tuning",
            "faster tiles for kernels/configs.py",
            None,
            TUNING,
            ("bench", "tune", "--seconds", "60"),
            least=30,
        ),
    ]


def _kernel_tests() -> list[str]:
    """The files with tests of the kernels, published sizes first; random cases are left to `make fuzz`."""
    files = sorted((ROOT / "tests").rglob("test_interpreted_*.py"))
    files.sort(key=lambda path: path.name != "test_interpreted_published_sizes.py")
    return [str(path.relative_to(ROOT)) for path in files]


def tiny_plan(device: str = "cpu") -> list[Step]:
    """The same kinds of steps in a minute on a CPU: what a test runs."""
    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    return [
        Step(
            "environment",
            "the machine, and what a copy and a product reach",
            60,
            ENVIRONMENT,
            ("bench", "ceilings", "--device", device),
        ),
        Step(
            "smoke",
            "every kernel launched once and right",
            60,
            CORRECTNESS,
            ("bench", "smoke", "--device", device),
            environment=interpreted,
        ),
        Step("kernels", "a kernel alone", 60, CASES, parts=(Part(("dwconv_norm/768-stage3-b1-float32",), ("torch",)),)),
        Step(
            "decode",
            "answers of a tiny model",
            60,
            END_TO_END,
            parts=(
                Part(
                    ("end-to-end/tiny-first-token-b1-float32", "end-to-end/tiny-decode-b1-float32"),
                    ("reference", "auto"),
                ),
            ),
        ),
        Step(
            "tests",
            "a test of the kernels",
            60,
            CORRECTNESS,
            (
                "pytest",
                "-vv",
                "tests/bench/test_interpreted_tune.py",
                "-p",
                "bench.gpu.pytest_plugin",
                "-p",
                "no:cacheprovider",
            ),
            environment=interpreted,
        ),
    ]


PLANS: dict[str, Callable[[str], list[Step]]] = {"full": full_plan, "tiny": tiny_plan}


def choose_steps(steps: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """The steps that names or shell patterns ask for, in the plan's order; without names all.

    Raises:
        UnknownCase: a name asks for none.
    """
    every = [step.name for step in steps]
    try:
        chosen = choose_names(every, names)
    except UnknownCase:
        unknown = next(name for name in names if not any(_is_named(step, name) for step in every))
        raise UnknownCase(f"no step is called {unknown!r}: expected one or more of {', '.join(every)}") from None
    return [step for step in steps if step.name in chosen]


def _is_named(step: str, name: str) -> bool:
    try:
        return bool(choose_names([step], [name]))
    except UnknownCase:
        return False


def command(step: Step, plan: str, device: str) -> tuple[str, ...]:
    """What runs a step, after `python -m`."""
    return step.words or ("bench", "step", step.name, "--plan", plan, "--device", device)


def shown(words: Sequence[str], environment: Mapping[str, str]) -> str:
    """A command as one would type it."""
    quoted = (f"'{word}'" if set(word) & set("*?[ ,'") else word for word in words)
    return " ".join([*(f"{name}={value}" for name, value in environment.items()), "python -m", *quoted])


def budget(steps: Sequence[Step]) -> float:
    """Seconds of all steps that have a budget of their own."""
    return sum(step.seconds or 0 for step in steps)


def describe(steps: Sequence[Step], seconds: float, plan: str = "full", device: str = "cuda") -> str:
    """The plan: each step with its budget, when it begins if all before it take theirs, its command and what it
    measures.
    """
    lines, begin = [], 0.0
    for step in steps:
        takes = f"{step.seconds:>4.0f} s" if step.seconds is not None else "the rest"
        reached = f"from {begin:.0f} s" if begin + step.least <= seconds - RESERVE else "in a later call"
        lines.append(f"{step.name:<12} {takes:<8} {reached:<16} {step.finds}")
        lines.append(f"{'':<38} {shown(command(step, plan, device), step.environment)}")
        lines += [f"{'':<38}   {', '.join(part.cases)}: {'; '.join(part.providers)}" for part in step.parts]
        begin += step.seconds or 0
    lines.append(
        f"{budget(steps):.0f} s of work in all; this call takes {seconds:.0f} s, and --resume goes on where it was cut."
    )
    lines.append(f"At most {len(FILES)} files: {', '.join(FILES)}.")
    return "\n".join(lines)
