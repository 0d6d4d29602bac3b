"""The package mapping only: the top-level kernels/ folder installs as mg_fast.kernels (see mg_fast/kernels.py), nano's
weights as data.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mg_fast", "mg_fast.*"]), "mg_fast.kernels"],
    package_dir={"mg_fast": "mg_fast", "mg_fast.kernels": "kernels"},
    package_data={"mg_fast": ["nano/*"]},
)
