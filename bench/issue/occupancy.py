"""How many programs of a kernel reside on one multiprocessor at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor.

    They are those of the CUDA C++ Programming Guide ("Technical Specifications per Compute Capability"), for 10.3 and
    11.0 those of libcu++ (`cuda::arch_traits` in NVIDIA/cccl).

    Attributes:
        registers: 32-bit registers.
        warps, blocks: the most that reside at once.
        shared: bytes of shared memory; every block takes 1 KiB more than it asks for.
    """

    registers: int
    warps: int
    blocks: int
    shared: int


MULTIPROCESSORS = {
    80: Multiprocessor(65536, 64, 32, 167936),
    86: Multiprocessor(65536, 48, 16, 102400),
    89: Multiprocessor(65536, 48, 24, 102400),
    90: Multiprocessor(65536, 64, 32, 233472),
    100: Multiprocessor(65536, 64, 32, 233472),
    103: Multiprocessor(65536, 64, 32, 233472),
    110: Multiprocessor(65536, 48, 24, 233472),
    120: Multiprocessor(65536, 48, 32, 102400),
}
# Bytes of shared memory that the system takes of every block, and the unit that registers of a warp are given out in.
RESERVED_SHARED, REGISTER_UNIT = 1024, 256


def blocks_per_multiprocessor(architecture: int, registers: int, shared: int, warps: int) -> tuple[int, str]:
    """The programs that reside at once, and what limits them: registers, shared memory, warps or blocks.

    Args:
        architecture: compute capability; 90 stands for sm_90.
        registers: of one thread.
        shared: bytes of one program.
        warps: of one program.
    """
    has = MULTIPROCESSORS[architecture]
    of_a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    limits = {
        "registers": has.registers // (of_a_warp * warps),
        "shared memory": has.shared // (shared + RESERVED_SHARED),
        "warps": has.warps // warps,
        "blocks": has.blocks,
    }
    limit = min(limits, key=limits.get)
    return limits[limit], limit
