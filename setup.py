"""Maps folders to packages: the top-level folder kernels/ installs as mg_fast.kernels (see mg_fast/kernels.py).

The weights of nano install as package data. All other metadata is in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    # setuptools wants folders of data to be named as packages, too.
    packages=[*find_packages(include=["mg_fast", "mg_fast.*"]), "mg_fast.kernels", "mg_fast.nano"],
    package_dir={"mg_fast": "mg_fast", "mg_fast.kernels": "kernels"},
    package_data={"mg_fast.nano": ["*", "painter/*", "painter/*/*"]},
)
