"""What GPUs are able to do, by their data sheets and by measurement."""

from dataclasses import dataclass, replace

from ..errors import UnknownName
from ..registry import Ceilings


@dataclass(frozen=True)
class Gpu:
    """What the maker of a GPU promises.

    Args:
        memory_gb: 1e9 bytes.
        sheet: dense rates, without sparsity; those of float32 without TF32.
        reached: what one such card was seen to reach; None: never measured.
    """

    name: str
    memory_gb: float
    sheet: Ceilings
    reached: Ceilings | None = None

    @property
    def ceilings(self) -> Ceilings:
        """What was reached; the data sheet's rates where nothing was measured."""
        if self.reached is None:
            return self.sheet
        return replace(self.reached, matmul_tflops={**self.sheet.matmul_tflops, **self.reached.matmul_tflops})


def _sheet(gbps: float, half: float, single: float) -> Ceilings:
    return Ceilings(gbps, {"bfloat16": half, "float16": half, "float32": single})


GPUS = {
    # NVIDIA A100 Tensor Core GPU datasheet, SXM.
    "a100-40": Gpu("NVIDIA A100 SXM 40 GB", 40, _sheet(1555, 312, 19.5)),
    "a100-80": Gpu("NVIDIA A100 SXM 80 GB", 80, _sheet(2039, 312, 19.5)),
    # NVIDIA H100 Tensor Core GPU datasheet, SXM. Its 1979 TFLOP/s are with sparsity.
    "h100": Gpu("NVIDIA H100 SXM", 80, _sheet(3350, 989, 67)),
    # NVIDIA H200 Tensor Core GPU datasheet, SXM. Reached: a copy and a bfloat16 product, measured on one card.
    "h200": Gpu("NVIDIA H200", 141, _sheet(4800, 989, 67), Ceilings(4300, {"bfloat16": 790, "float16": 790})),
    # NVIDIA DGX B200 datasheet, an eighth of it; float32 from the Blackwell architecture brief, HGX B200.
    "b200": Gpu("NVIDIA B200", 180, _sheet(8000, 2250, 80)),
    # NVIDIA L40S datasheet.
    "l40s": Gpu("NVIDIA L40S", 48, _sheet(864, 362, 91.6)),
    # NVIDIA Ada GPU architecture whitepaper, GeForce RTX 4090; products that accumulate in float32.
    "4090": Gpu("NVIDIA GeForce RTX 4090", 24, _sheet(1008, 165.2, 82.6)),
}


# Memory of common cards in 10^9 bytes. Cards sold by 2^30 have 7 % more, which is left to the driver and the libraries.
CARDS_GB = (16, 24, 40, 48, 80, 141)


def find_gpu(name: str) -> Gpu:
    """The GPU of this name in GPUS; raises UnknownName where there is none."""
    if name not in GPUS:
        raise UnknownName(f"no GPU is called {name!r}: expected one of {', '.join(GPUS)}")
    return GPUS[name]
