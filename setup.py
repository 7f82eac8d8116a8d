"""The wheel's packages: the folders at the top of the repository, below one name.  All else stands in pyproject.toml."""

from setuptools import find_packages, setup

ROOMS = ("configs", "datamodules", "defenses", "interpret", "lightning_modules")

setup(
    packages=["glassarmor", *(f"glassarmor.{name}" for name in find_packages(include=[f"{room}*" for room in ROOMS]))],
    package_dir={"glassarmor": "glassarmor", **{f"glassarmor.{room}": room for room in ROOMS}},
)
