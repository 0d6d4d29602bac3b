"""The steps of a run on a GPU: what each finds out, in which order, and how long it may take."""

import fnmatch
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import UnknownCase
from ..registry import Case, choose

ROOT = Path(__file__).parents[2]
SUMMARY, LOG = "summary.md", "log.txt"
ENVIRONMENT, CASES, END_TO_END = "environment.json", "cases.json", "end-to-end.json"
CORRECTNESS, TUNING = "correctness.txt", "tuning.txt"
FILES = (SUMMARY, LOG, ENVIRONMENT, CASES, END_TO_END, CORRECTNESS, TUNING)
# Minutes of a default run, and the seconds of it that are left for writing at its end.
MINUTES, RESERVE = 6.0, 5.0
# Seconds after which a provider that does not come back is given up, and its process with it. A compiler gets nearly a
# step's budget.
HANGS_AFTER, COMPILING_HANGS_AFTER = 25.0, 75.0
# The same for a test.
TEST_HANGS_AFTER = 40.0


@dataclass(frozen=True)
class Part:
    """Cases, in the order of their names or shell patterns, and the providers of these that are measured.

    Args:
        baseline: what the providers are compared with, instead of the case's own baseline, which is then not measured.
    """

    cases: tuple[str, ...]
    providers: tuple[str, ...]
    baseline: str | None = None


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        finds: what it finds out.
        seconds: its budget. None: what is left, if that is at least `least`.
        into: the file that it adds to. The process writes a document (.json) itself, by its option --out; a text is its
            standard output.
        words: the command after `python -m`. For a step of cases it is made from the parts.
        least: with fewer seconds left the step is not begun.
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
    """The cases of a step with the providers that it measures; a case stands once for every part that names it."""
    chosen = []
    for part in step.parts:
        for name in dict.fromkeys(case.name for pattern in part.cases for case in choose(cases, [pattern], device)):
            case = replace(cases[name], baseline=part.baseline or cases[name].baseline)
            chosen.append(case.only(part.providers))
    return chosen


def remaining(chosen: Sequence[Case], rows: Sequence[Mapping]) -> list[Case]:
    """The part of the chosen cases that has no row yet.

    The baseline is measured again beside what is left of a case, for the ratios, unless it failed before.
    """
    found = {(row["name"], row["provider"]): row for row in rows}
    left = []
    for case in chosen:
        missing = [name for name in case.providers if (case.name, name) not in found]
        baseline = found.get((case.name, case.baseline))
        if missing and baseline is not None and baseline["median_ms"] is not None:
            missing.append(case.baseline)
        if missing:
            left.append(case.restricted(missing))
    return left


def full_plan(device: str = "cuda") -> list[Step]:
    """The steps on a GPU, by importance."""
    plain = ("reference", "torch", "triton")
    compiled = "reference, channels last, compiled"
    decode, first_token = "end-to-end/7b-decode-b1-bfloat16", "end-to-end/7b-first-token-b1-bfloat16"
    environment = "the machine, its clocks under load, what a copy and a product reach"
    smoke = "every kernel launched once and right, then under memcheck and racecheck"
    patch_mining = (
        Part(("patch_mining/768-b1-bfloat16", "patch_mining/1536-hd-b1-bfloat16"), (*plain, "reference, SDPA")),
        Part(("patch_mining/768-b1-bfloat16",), ("torch, compiled",)),
        Part(("patch_mining/768-b1-float16", "patch_mining/768-b1-float32"), plain),
    )
    sampling = (
        Part(("deformable_attention/detr-encoder-b1-bfloat16",), (*plain, "reference, deformops")),
        Part(("feature_sync/unet-64-b1-bfloat16", "feature_sync/llm-decode-n4-b1-bfloat16"), plain),
        # The kernel of the Hugging Face Hub takes float32 alone.
        Part(("deformable_attention/detr-encoder-b1-float32",), ("triton", "reference, hub kernel")),
        Part(("deformable_attention/detr-encoder-training-b1-bfloat16",), ("triton", "triton, atomics")),
        _alone(
            "deformable_attention/detr-decoder-b1-bfloat16",
            "deformable_attention/rt-detr-b1-bfloat16",
            "deformable_attention/adapter-*-b1-bfloat16",
            "feature_sync/llm-decode-n[18]-b1-bfloat16",
            "feature_sync/llm-prefill*-b1-bfloat16",
            "feature_sync/unet-[!6]*-b1-bfloat16",
        ),
    )
    clip = ("reference", "reference, flash attention", "reference, SDPA cuDNN", "23 layers", "packed")
    towers = (
        Part(("tower/768-b1-bfloat16",), (*plain, "reference, channels last", "auto")),
        Part(("clip/768-b1-bfloat16",), clip),
        Part(("projector/768-b1-bfloat16",), ("reference",)),
        Part(("tower/1536-hd-b1-bfloat16",), ("reference, channels last", "auto")),
        Part(("tower/768-b1-bfloat16",), (compiled,)),
    )
    pixels = (
        Part(("pixels/768-b1-bfloat16", "pixels/1536-hd-b1-bfloat16"), ("reference", "auto")),
        Part(("decoded/768-b1-bfloat16",), ("reference", "auto")),
        Part(("pixels/768-b1-bfloat16",), (compiled,)),
    )
    kernels = (
        Part(("dwconv_norm/768-*-b1-bfloat16",), plain),
        Part(("linear_gelu/768-*-b1-bfloat16", "linear_residual/768-*-b1-bfloat16"), plain),
        # The case's own baseline is Pillow on the host, which takes none of the GPU's time.
        Part(("dual_resize/*",), ("torch", "triton"), baseline="torch"),
        _alone(*(f"{name}/1536-*-b1-bfloat16" for name in ("dwconv_norm", "linear_gelu", "linear_residual"))),
    )
    answers = (
        Part((decode,), ("reference", "auto")),
        Part((first_token,), ("reference", "auto", "reference, flash attention")),
        # Our own compiled form comes before the opponent. Each is measured beside the baseline anew, since either may
        # take all the time that is left.
        Part((decode,), ("auto, compiled",)),
        Part((decode,), ("auto, static cache",)),
        # Its heads share keys and values, which those of the 7B model do not.
        Part(("end-to-end/8b-decode-b1-bfloat16",), ("auto", "auto, compiled"), baseline="auto"),
    )
    # The published size of MM-Interleaved, by the original's steps and by ours.
    interleaved = (
        Part(("interleaved/13b-decode-n4-b1-bfloat16",), ("reference", "auto")),
        Part(("interleaved/13b-picture-b1-bfloat16",), ("reference", "auto")),
    )
    several = "MM-Interleaved: one more token with four pictures in context, and a picture of 30 steps"
    found = "answers of a 7B model: first token, one more token, a table of its kernels, compiled"
    return [
        Step("environment", environment, 25, ENVIRONMENT, ("bench", "ceilings", "--device", device)),
        Step("smoke", smoke, 60, CORRECTNESS, ("bench", "smoke", "--device", device)),
        Step("patch_mining", "patch info mining of one picture", 40, CASES, parts=patch_mining),
        Step("sampling", "deformable attention and the synchronizer", 40, CASES, parts=sampling),
        Step("towers", "both towers and the projector of one picture", 45, CASES, parts=towers),
        Step("pixels", "pixels on the device to image tokens, with a table of the kernels", 30, CASES, parts=pixels),
        Step("kernels", "the other kernels alone", 30, CASES, parts=kernels),
        Step("decode", found, 60, END_TO_END, parts=answers),
        Step("interleaved", several, 30, END_TO_END, parts=interleaved),
        Step("tests", "all tests of the kernels, the published sizes first", 120, CORRECTNESS, _tests()),
        Step(
            "tuning",
            "faster tiles for kernels/configs.py",
            None,
            TUNING,
            ("bench", "tune", "--seconds", "60"),
            least=30,
        ),
    ]


def _alone(*cases: str) -> Part:
    """Cases of kernels that are measured to be compared with what `python -m bench issue` predicts, and nothing else.

    They come last in their step. What its budget does not allow for is left to the next call.
    """
    return Part(cases, ("triton",), baseline="triton")


PLUG_IN = ("-p", "bench.gpu.pytest_plugin", "-p", "no:cacheprovider")


def _tests() -> tuple[str, ...]:
    """The command of the step `tests`: the published sizes come first, random cases are left to `make fuzz`."""
    files = sorted((ROOT / "tests").rglob("test_interpreted_*.py"))
    files.sort(key=lambda path: path.name != "test_interpreted_published_sizes.py")
    # The project's own options make pytest less verbose, so that a single -v would name no test.
    words = ("pytest", "-vv", "-rfE", *(str(path.relative_to(ROOT)) for path in files), *PLUG_IN, "--tb=short")
    # A test that hangs ends its worker, and another one takes its place.
    words += ("-o", f"faulthandler_timeout={TEST_HANGS_AFTER:.0f}", "-o", "faulthandler_exit_on_timeout=true")
    if importlib.util.find_spec("pytest_timeout"):
        # This does the same where pytest is too old for these options.
        words += (f"--timeout={TEST_HANGS_AFTER:.0f}", "--timeout-method=thread")
    if importlib.util.find_spec("xdist"):
        # Tests are dealt out in turn, so that the published sizes, which come first, are spread over all workers.
        words += ("-n", str(max(1, min(14, (os.cpu_count() or 1) - 2))), "--dist", "load")
    return words


def tiny_plan(device: str = "cpu") -> list[Step]:
    """A plan with the same kinds of steps for a CPU, where it takes one to two minutes; a test runs it."""
    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    environment = "the machine, and what a copy and a product reach"
    smoke = ("every kernel launched once and right", 60, CORRECTNESS, ("bench", "smoke", "--device", device))
    kernels = Part(("dwconv_norm/768-stage3-b1-float32",), ("torch",))
    tests = ("pytest", "-vv", "tests/bench/test_interpreted_tune.py", *PLUG_IN)
    return [
        Step("environment", environment, 60, ENVIRONMENT, ("bench", "ceilings", "--device", device)),
        Step("smoke", *smoke, environment=interpreted),
        Step("kernels", "a kernel alone", 60, CASES, parts=(kernels,)),
        Step(
            "decode",
            "answers of a tiny model",
            60,
            END_TO_END,
            parts=(Part(("end-to-end/tiny-decode-b1-float32",), ("reference", "auto")),),
        ),
        Step("tests", "a test of the kernels", 60, CORRECTNESS, tests, environment=interpreted),
    ]


PLANS: dict[str, Callable[[str], list[Step]]] = {"full": full_plan, "tiny": tiny_plan}


def choose_steps(steps: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """The steps that names or shell patterns ask for, in the plan's order; without names all."""
    every = [step.name for step in steps]
    for name in names:
        if not fnmatch.filter(every, name):
            raise UnknownCase(f"no step is called {name!r}: expected one or more of {', '.join(every)}")
    return [step for step in steps if not names or any(fnmatch.fnmatch(step.name, name) for name in names)]


def command(step: Step, plan: str, device: str) -> tuple[str, ...]:
    """The command of a step, after `python -m`."""
    return step.words or ("bench", "step", step.name, "--plan", plan, "--device", device)


def shown(step: Step, plan: str, device: str) -> str:
    """The command of a step as one would type it."""
    quoted = (f"'{word}'" if set(word) & set("*?[ ,'") else word for word in command(step, plan, device))
    return " ".join([*(f"{name}={value}" for name, value in step.environment.items()), "python -m", *quoted])


def budget(steps: Sequence[Step]) -> float:
    """Seconds of all steps that have a budget of their own."""
    return sum(step.seconds or 0 for step in steps)


def describe(steps: Sequence[Step], seconds: float, plan: str = "full", device: str = "cuda") -> str:
    """The steps with budgets, commands and cases; they begin as shown if all steps before take their budgets."""
    lines, begin = [], 0.0
    for step in steps:
        takes = f"{step.seconds:>4.0f} s" if step.seconds is not None else "the rest"
        reached = f"from {begin:.0f} s" if begin + step.least <= seconds - RESERVE else "in a later call"
        lines.append(f"{step.name:<12} {takes:<8} {reached:<16} {step.finds}")
        lines.append(f"{'':<38} {shown(step, plan, device)}")
        lines += [f"{'':<38}   {', '.join(part.cases)}: {'; '.join(part.providers)}" for part in step.parts]
        begin += step.seconds or 0
    lines.append(
        f"{budget(steps):.0f} s of work in all; this call takes {seconds:.0f} s, and --resume goes on where it was cut."
    )
    return "\n".join([*lines, f"At most {len(FILES)} files: {', '.join(FILES)}."])
