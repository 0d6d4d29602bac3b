"""Tiles and warps per (kernel, GPU architecture, shape bucket), and the limits of the architectures they are made for.

Data only: launches take their tiles from here, nothing is tuned at run time.
"""

# shared memory in bytes that one block may use, by compute capability (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"): ahead-of-time compiling fails a configuration that needs more
SHARED_MEMORY_LIMITS = {
    80: 166912,
    86: 101376,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
}
