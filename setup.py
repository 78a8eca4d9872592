"""What pyproject.toml cannot say: the folder ``bundles`` is installed as ``alice_monai/bundles``."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["custom*"]), "alice_monai", "alice_monai.bundles"],
    package_dir={"alice_monai.bundles": "bundles"},
)
