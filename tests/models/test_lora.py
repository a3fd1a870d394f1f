# SPDX-License-Identifier: MIT
"""LoRA on the language model: text between a compressed video's frames has the adapter of its request, and no other's.

It was embedded where the video is encoded, with the adapters of whatever ran in that step, and cached like that for
all.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashvid_vllm import engine_args

from ..support.engine import Clip, check, engine, prompt_of
from ..support.families import QWEN3_VL

pytestmark = pytest.mark.slow

RANK, ALPHA = 8, 16
CLIP = Clip(10, 64, 96)
TEXT = f"{QWEN3_VL.video}What happens?"
# of Qwen3-VL: text tokens, and what the language model makes of them
TARGETS = ("embed_tokens", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")


def make_adapter(directory: Path, model: Path, seed: int) -> Path:
    """A LoRA adapter as PEFT writes it, in a new ``directory``."""
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(model / "model.safetensors")
    adapter = {}
    for name in TARGETS:
        out, into = weights[f"model.language_model.{name}.weight"].shape
        if name == "embed_tokens":
            a, b, kind = (RANK, out), (into, RANK), "lora_embedding_{}"
        else:
            a, b, kind = (RANK, into), (out, RANK), "lora_{}.weight"
        for letter, shape in (("A", a), ("B", b)):
            values = 0.1 * torch.randn(shape, generator=generator)
            adapter[f"base_model.model.model.language_model.{name}.{kind.format(letter)}"] = values
    directory.mkdir()
    save_file(adapter, directory / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in TARGETS})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def merge(directory: Path, model: Path, adapter: Path) -> Path:
    """The model with the adapter added to its weights, in a new ``directory``."""
    shutil.copytree(model, directory)
    weights, lora = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in TARGETS:
        prefix = f"base_model.model.model.language_model.{name}."
        a, b = (next(v for k, v in lora.items() if k.startswith(prefix) and f"_{x}" in k) for x in "AB")
        added = (b @ a) * ALPHA / RANK
        weights[f"model.language_model.{name}.weight"] += added.T if name == "embed_tokens" else added
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@dataclass(frozen=True)
class Served:
    """An engine; adapters, None for none, and what the model with each answers in transformers."""

    llm: Any
    adapters: list[Any]
    oracles: list[Any]

    def ask(self, which: list[int], settings: dict[str, Any], clip: Clip = CLIP) -> None:
        """That requests with the adapters ``which``, all in one batch, answer as each of those models does."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=4, logprobs=5, ignore_eos=True)
        prompts = [prompt_of(TEXT, [clip], flashvid=settings)] * len(which)
        outputs = self.llm.generate(prompts, params, use_tqdm=False, lora_request=[self.adapters[i] for i in which])
        expected = settings if settings.get("enabled", True) else None
        for i, output in zip(which, outputs, strict=True):
            oracle = self.oracles[i]
            embeddings, positions = oracle.assemble(TEXT, [clip], [], expected)
            check(output, oracle.greedy(embeddings, positions, 4), QWEN3_VL.tolerance)


@pytest.fixture(scope="module")
def served(models: Callable[[Any], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    from vllm.lora.request import LoRARequest

    model, folder = models(QWEN3_VL), tmp_path_factory.mktemp("lora")
    paths = [make_adapter(folder / f"adapter{i}", model, i) for i in (1, 2)]
    merged = [merge(folder / f"merged{i}", model, path) for i, path in enumerate(paths)]
    oracles = [QWEN3_VL.load_oracle(directory) for directory in (model, *merged)]
    requests = [None, *(LoRARequest(path.name, i + 1, str(path)) for i, path in enumerate(paths))]
    # one more than there are: vLLM's CPU kernels take the last place's adapter for requests without one
    options = {"enable_lora": True, "max_loras": 3, "max_lora_rank": RANK}
    with engine(model, **engine_args(retention_ratio=0.3), **options) as llm:
        yield Served(llm, requests, oracles)


def test_each_alone(served: Served) -> None:
    for i in range(3):
        served.ask([i], {"enabled": False})
        served.ask([i], {"retention_ratio": 0.3})


@pytest.mark.parametrize("which", [[0, 1, 2], [2, 1, 0], [1, 0, 1]], ids=str)
def test_together(served: Served, which: list[int]) -> None:
    """One video, encoded once for requests with and without adapters: whoever's step encoded it."""
    ratio = 0.21 + 0.1 * which[0]  # used nowhere else: none of it comes from a cache
    served.ask(which, {"retention_ratio": ratio})


def test_one_after_the_other(served: Served) -> None:
    """The embeddings that an adapter's request has left in the cache are the next one's too."""
    for i in (1, 0, 2):
        served.ask([i], {"token_budget": 13})
