# SPDX-License-Identifier: MIT
"""Where the packages lie; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    packages=["flashvid_vllm", "flashvid_vllm.models", "flashvid_vllm.ops"],
    # kernels/ must not be importable as a top-level `kernels`: Hugging Face ships one.
    package_dir={"flashvid_vllm": "flashvid_vllm", "flashvid_vllm.ops": "kernels/ops"},
)
