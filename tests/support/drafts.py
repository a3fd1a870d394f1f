# SPDX-License-Identifier: MIT
"""Weights for vLLM's drafters beside the tiny models: what they draft is often right, and often wrong.

A drafter with random weights drafts nothing that the target accepts. These hand the target's own hidden state to the
target's own head, so that they draft the last token once more: right where an answer repeats itself, wrong elsewhere.
Attention and experts are random and small, so that what a drafter sees of the prompt still counts.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

SMALL = 0.02  # of the drafter's own layer


def make_eagle3(target: Path, directory: Path) -> Path:
    """An EAGLE-3 drafter of ``target``, in the new ``directory``: one layer of Llama on three of the target's."""
    from safetensors.torch import load_file, save_file

    text = json.loads((target / "config.json").read_text())["text_config"]
    hidden, inner, vocabulary = (text[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, groups = text["num_attention_heads"], text["num_key_value_heads"]
    head = text.get("head_dim") or hidden // heads
    weights = load_file(target / "model.safetensors")
    own = {
        "midlayer.self_attn.q_proj": (heads * head, 2 * hidden),
        "midlayer.self_attn.k_proj": (groups * head, 2 * hidden),
        "midlayer.self_attn.v_proj": (groups * head, 2 * hidden),
        "midlayer.self_attn.o_proj": (hidden, heads * head),
        "midlayer.mlp.gate_proj": (inner, hidden),
        "midlayer.mlp.up_proj": (inner, hidden),
        "midlayer.mlp.down_proj": (hidden, inner),
    }
    generator = torch.Generator().manual_seed(0)
    drafter = {f"{name}.weight": SMALL * torch.randn(shape, generator=generator) for name, shape in own.items()}
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    drafter |= {f"midlayer.{name}.weight": torch.ones(hidden) for name in norms}
    drafter["fc.weight"] = torch.cat([torch.zeros(hidden, 2 * hidden), torch.eye(hidden)], dim=1)  # the last of three
    drafter["norm.weight"] = _ending(weights, "language_model.norm.weight")
    drafter["lm_head.weight"] = _ending(weights, "lm_head.weight").clone()
    directory.mkdir(parents=True)
    save_file(drafter, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head,
        "num_hidden_layers": 1,
        "vocab_size": vocabulary,
        "draft_vocab_size": vocabulary,
        "max_position_embeddings": text["max_position_embeddings"],
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        # after the layers of the target whose output the drafter takes
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 4], "use_aux_hidden_state": True},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _ending(weights: dict[str, Tensor], ending: str) -> Tensor:
    """The weight whose name ends so, of the language model."""
    found = [name for name in weights if name.endswith(ending)]
    if not found:  # Qwen2.5-VL as transformers saves it
        found = [name for name in weights if name.endswith("model.norm.weight") and "visual" not in name]
    return weights[found[0]]
