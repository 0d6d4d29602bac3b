"""The package mapping only: the top-level kernels/ folder installs as mg_fast.kernels (see mg_fast/kernels.py), nano's weights as data."""

from setuptools import setup

setup(
    packages=[
        "mg_fast",
        "mg_fast.decoding",
        "mg_fast.mini_gemini",
        "mg_fast.modules",
        "mg_fast.ops",
        "mg_fast.quantization",
        "mg_fast.swap",
        "mg_fast.kernels",
    ],
    package_dir={"mg_fast": "mg_fast", "mg_fast.kernels": "kernels"},
    package_data={"mg_fast": ["nano/*"]},
)
