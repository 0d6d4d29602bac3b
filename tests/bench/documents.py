"""Documents of the benchmark with made-up figures, for the tests of the code that reads them."""

PROVIDERS = {
    # By provider: ok, why, median_ms, peak_mib, speedup.
    "reference": (True, None, 4200.0, 1508.0, 1.0),
    "reference, SDPA": (True, None, 4700.0, 1720.0, 0.89),
    "reference, oneDNN": (True, None, 3100.0, 1508.0, 1.35),
    "reference, compiled": (False, "wrong result: error 1e-2 | expected at most 1e-6", None, None, None),
    "reference, compiled max-autotune": (None, "not here: mode max-autotune is for GPUs", None, None, None),
    "torch": (True, None, 114.0, 41.0, 36.8),
    "triton": (None, "not here: Triton runs on a GPU", None, None, None),
}
STAGES = ("preprocess", "LR tower", "HR tower", "patch info mining", "projector")


def row(name, provider, ok=True, why=None, median_ms=10.0, peak_mib=5.0, speedup=1.0, **more):
    measured = median_ms is not None
    return {
        "name": name,
        "provider": provider,
        "baseline": "reference",
        "ok": ok,
        "why": why,
        "median_ms": median_ms,
        "p20_ms": median_ms and 0.95 * median_ms,
        "p80_ms": median_ms and 1.1 * median_ms,
        "warm_ms": None,
        "graphed_ms": None,
        "first_call_ms": median_ms and 2 * median_ms,
        "peak_mib": peak_mib,
        "speedup": speedup,
        "relative_error": 1e-7 if ok else None,
        **(
            {"samples": 7, "halves_differ": 0.03, "tflops": 80.0 / median_ms, "gbps": 900.0 / median_ms}
            if measured
            else {}
        ),
        **({"speedup_p20": 0.9 * speedup, "speedup_p80": 1.1 * speedup} if speedup else {}),
        **more,
    }


def document(rows, device="cpu", **more):
    gpu = "NVIDIA H200" if device == "cuda" else None
    rates = {"float32": 55.0, "bfloat16": 790.0, "float16": 780.0} if gpu else {"float32": 0.13, "bfloat16": 0.25}
    return {
        "date": "2026-11-22",
        "gpu": gpu,
        "driver": gpu and "580.95",
        "clocks": gpu and "1980 MHz",
        "cpu": "AMD EPYC avx2",
        "threads": 2,
        "memory_gib": 23.5,
        "load": 0.4,
        "python": "3.11.7",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "transformers": "5.17.0",
        "commit": "0123456789ab",
        "device": device,
        "ceilings": {"copy_gbps": 4300.0 if gpu else 18.0, "matmul_tflops": rates},
        "complete": True,
        "command": f"python -m bench run {rows[0]['name']} --save",
        "cases": rows,
        **more,
    }


def mining(setting="768", dtype="float32", device="cpu", scale=1.0):
    """All providers of patch info mining; one is wrong, one slower, two are not here."""
    name = f"patch_mining/{setting}-b1-{dtype}"
    rows = []
    for provider, (ok, why, ms, mib, speedup) in PROVIDERS.items():
        rows.append(row(name, provider, ok, why, ms and ms * scale, mib and mib * scale, speedup))
    return document(rows, device)


def picture(dtype="float32", device="cpu", setting="768"):
    """One picture to image tokens, with the times of its stages."""
    name = f"picture/{setting}-b1-{dtype}"

    def stages(*times):
        return [{"name": stage, "ms": ms, "peak_mib": 40.0} for stage, ms in zip(STAGES, times)]

    rows = [
        row(name, "reference", median_ms=16738.0, peak_mib=1742.0, stages=stages(75.4, 3035.0, 8677.0, 5591.0, 261.0)),
        row(name, "torch", median_ms=9000.0, peak_mib=300.0, speedup=1.86, halves_differ=0.2),
        row(
            name,
            "auto",
            median_ms=8055.0,
            peak_mib=239.0,
            speedup=2.08,
            stages=stages(106.0, 2690.0, 5764.0, 180.0, 201.0),
        ),
    ]
    return document(rows, device)
