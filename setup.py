"""Maps folders to packages: the top-level folder kernels/ installs as mg_fast.kernels (see mg_fast/kernels.py).

The weights of nano and of its painter install as package data. All other metadata is in pyproject.toml.
"""

from pathlib import Path

from setuptools import find_packages, setup

# setuptools wants folders of data to be named as packages, too.
NANO = Path("mg_fast/nano")
DATA = [".".join(folder.parts) for folder in (NANO, *sorted(NANO.rglob("*"))) if folder.is_dir()]

setup(
    packages=[*find_packages(include=["mg_fast", "mg_fast.*"]), "mg_fast.kernels", *DATA],
    package_dir={"mg_fast": "mg_fast", "mg_fast.kernels": "kernels"},
    package_data={name: ["*"] for name in DATA},
)
