# SPDX-License-Identifier: MIT
"""The model: what is trained (projector, newline, LLM) as one module, and the LLaVA-OneVision directory around it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2ForCausalLM
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector

from ..common import clip_model
from ..common.record import write_weights
from ..common.tiny_model import save as save_directory
from ..common.tiny_model.llava import HUB_NAMES
from ..common.tiny_model.parts import Parts
from .features import PATCHES, WIDTH
from .tokens import IMAGE, VIDEO, encode, tokenizer

TOKENS = PATCHES // 4  # of a frame
POSITIONS = 8192
WEIGHTS = Path(__file__).parent / "weights" / "tinyvlm.safetensors"
# names here -> in the state dict of transformers' model
NAMES = {
    "projector.": "model.multi_modal_projector.",
    "newline": "model.image_newline",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}


@dataclass(frozen=True)
class Size:
    """Of the language model."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    intermediate: int = 768
    width: int = WIDTH  # of the tower


def config(size: Size = Size(), tower: Mapping[str, Any] = clip_model.SHAPE) -> Any:  # LlavaOnevisionConfig
    """CLIP ViT-B/16 read after its last layer but one, without the class token; a small Qwen2.

    ``tower``: its shape, which tests make smaller.
    """
    words = tokenizer()
    text = {
        "model_type": "qwen2",
        "vocab_size": -(-len(words) // 64) * 64,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": words.pad_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    vision = {
        "model_type": "clip_vision_model",
        **tower,
        "image_size": clip_model.PIXELS,
        "patch_size": 16,
        "projection_dim": 512,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    return LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_grid_pinpoints=[[clip_model.PIXELS, clip_model.PIXELS]],
        image_token_index=encode(IMAGE)[0],
        video_token_index=encode(VIDEO)[0],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


class TinyVlm(nn.Module):
    """What is trained. It starts where the tower ends."""

    def __init__(self, size: Size = Size()) -> None:
        super().__init__()
        whole = config(size, {**clip_model.SHAPE, "hidden_size": size.width})
        self.size = size
        self.projector = LlavaOnevisionMultiModalProjector(whole)
        self.newline = nn.Parameter(torch.randn(size.hidden) * 0.02)
        self.language_model = Qwen2ForCausalLM._from_config(whole.text_config, attn_implementation="sdpa")
        self._start_alike()

    @torch.no_grad()
    def _start_alike(self) -> None:
        """Start with attention to tokens alike, which copies what they are: keys as queries, outputs as values.

        The head starts as the embeddings for the same reason. As in mimetic initialization (arXiv 2305.09828): what a
        pretrained LLM knows before it sees a video, finding a word again and copying, is not left to be discovered.
        """
        std = 1 / math.sqrt(self.size.hidden)
        for layer in self.language_model.model.layers:
            attention = layer.self_attn
            nn.init.normal_(attention.q_proj.weight, std=std)
            attention.k_proj.weight.copy_(
                attention.q_proj.weight + 0.3 * std * torch.randn_like(attention.k_proj.weight)
            )
            nn.init.normal_(attention.v_proj.weight, std=std)
            attention.o_proj.weight.copy_(0.5 * attention.v_proj.weight.T)
        embeddings = self.language_model.get_input_embeddings().weight
        nn.init.normal_(embeddings, std=std)
        self.language_model.lm_head.weight.copy_(embeddings)

    @torch.no_grad()
    def fit_projector(self, features: Tensor) -> None:
        """Start the projector at random directions of the whitened features [..., width] of some frames.

        The tower's channels differ in size by two orders of magnitude and nothing normalises them: without this the
        LLM sees little but the few large ones for the first thousands of steps.
        """
        x = features.reshape(-1, self.size.width).float()
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        hidden = self.size.hidden
        scale = (values[-hidden:] + 0.01 * values[-hidden:].mean()).rsqrt()
        turn = torch.linalg.qr(torch.randn(hidden, hidden)).Q
        first, second = self.projector.linear_1, self.projector.linear_2
        first.weight.copy_(turn @ (vectors[:, -hidden:] * scale).T)
        first.bias.copy_(-first.weight @ mean)
        nn.init.normal_(second.weight, std=0.3 / math.sqrt(hidden))
        nn.init.zeros_(second.bias)

    def video_tokens(self, features: Tensor) -> Tensor:
        """[T, 196, 768] of the tower -> [T, 49, D], as transformers and vLLM do: project, then pool.

        What has 49 tokens already is projected alone.
        """
        return pool(self.projector(features))

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [...] -> [..., D]."""
        rows: Tensor = self.language_model.get_input_embeddings()(ids)
        return rows

    def forward(self, rows: Tensor, mask: Tensor | None, positions: Tensor) -> tuple[Tensor, ...]:
        """Embeddings [B, L, D], who sees whom [B, 1, L, L] (None: causal), positions [B, L] -> states of all layers.

        They are [B, L, D] each: the embeddings', every layer's, the last one's normalised.
        """
        states: tuple[Tensor, ...] = self.language_model.model(
            inputs_embeds=rows, attention_mask=mask, position_ids=positions, use_cache=False, output_hidden_states=True
        ).hidden_states
        return states

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., vocabulary]."""
        logits: Tensor = self.language_model.lm_head(hidden)
        return logits


def pool(x: Tensor) -> Tensor:
    """[T, 196, ...] -> [T, 49, ...]; what has 49 already stays.

    Halving an even side by bilinear interpolation is the mean of 2 x 2.
    """
    if x.shape[1] == TOKENS:
        return x
    side = math.isqrt(x.shape[1])
    return x.unflatten(1, (side // 2, 2, side // 2, 2)).mean((2, 4)).flatten(1, 2)


def save_weights(model: TinyVlm, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """The trained weights, with the size of the LLM, in a file of a few MB; without the tower's."""
    tensors = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
    write_weights(tensors, path, {"format": "pt", **{name: str(value) for name, value in vars(model.size).items()}})


def load_weights(path: Path = WEIGHTS) -> TinyVlm:
    """The trained model, float32, in eval mode. Raises FileNotFoundError with the remedy."""
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}; python -m benchmarks.tinyvlm train makes them")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    model = TinyVlm(Size(**{name: int(metadata[name]) for name in vars(Size()) if name in metadata}))
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return model.eval().requires_grad_(False)


def build(model: TinyVlm, directory: Path, dtype: torch.dtype = torch.float32, tower: Any = None) -> Path:
    """A directory that transformers and vLLM load as LLaVA-OneVision; fetches CLIP's weights on first use.

    ``tower``: a `CLIPVisionModel` in the place of CLIP ViT-B/16, for tests. Raises ValueError if the directory holds
    anything.
    """
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"directory must be new or empty, got {directory}")
    tower = clip_model.tower(clip_model.load()) if tower is None else tower
    shape = {name: getattr(tower.config, name) for name in clip_model.SHAPE}
    whole = LlavaOnevisionForConditionalGeneration(config(model.size, shape))
    weights = {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    whole.load_state_dict(weights | rename(model.state_dict(), NAMES), strict=True)
    directory.mkdir(parents=True, exist_ok=True)
    save_directory(Parts(whole, tokenizer(), _processor(), partial(rename, names=HUB_NAMES)), directory, dtype)
    return directory


def rename(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights with the beginnings of their names changed as ``names`` says."""
    renamed = {}
    for name, weight in weights.items():
        old = next((old for old in names if name.startswith(old)), "")
        renamed[names.get(old, "") + name.removeprefix(old)] = weight
    return renamed


def _processor() -> dict[str, dict[str, Any]]:
    """The processor's files: frames as squares of 224 pixels, CLIP's mean and standard deviation."""
    size = clip_model.PIXELS
    pixels: dict[str, Any] = {
        "processor_class": "LlavaOnevisionProcessor",
        "size": {"height": size, "width": size},
        "image_mean": list(clip_model.MEAN),
        "image_std": list(clip_model.STD),
    }
    return {
        "preprocessor_config": {
            **pixels,
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": [[size, size]],
        },
        "video_preprocessor_config": {**pixels, "video_processor_type": "LlavaOnevisionVideoProcessor"},
        "processor_config": {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": PATCHES + 1,
            "vision_feature_select_strategy": "default",
            "vision_aspect_ratio": "anyres_max_9",
            "image_token": IMAGE,
            "video_token": VIDEO,
        },
    }
