# SPDX-License-Identifier: MIT
"""Fixtures that several test files share."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def sharp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny fp32 Qwen2.5-VL whose answers depend on what it sees and where.

    With the usual initialisation attention is nearly uniform: a wrong position or a wrong token hardly
    moves a logprob. Larger projections change that; much larger ones would also amplify rounding.
    """
    from safetensors.torch import load_file, save_file

    from benchmarks.tiny_model import make_tiny_model

    directory = tmp_path_factory.mktemp("sharp")
    make_tiny_model("qwen2_5_vl", directory, dtype=torch.float32)
    path = directory / "model.safetensors"
    weights = load_file(path)
    scales = {"q_proj.weight": 3, "k_proj.weight": 3, "v_proj.weight": 4, "o_proj.weight": 4}
    for name in weights:
        if "visual" in name and "qkv.weight" in name:
            weights[name] *= 6
        elif "visual" not in name:
            weights[name] *= next((s for ending, s in scales.items() if name.endswith(ending)), 1)
    save_file(weights, path, metadata={"format": "pt"})
    return directory
