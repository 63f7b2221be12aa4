"""The packages of the wheel: commopt's own, and from beside them what `commopt demo` runs."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["commopt*"]),
        "commopt.launch",
        "commopt.configs.clusters",
        "commopt.configs.runs",
    ],
    package_dir={"commopt.launch": "launch", "commopt.configs": "configs"},
)
