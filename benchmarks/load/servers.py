# SPDX-License-Identifier: MIT
"""The servers that a load benchmark compares, and the models of realistic proportions that it makes for them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..common.clips import ROOT, cache_directory, probe
from ..common.machine import dtype_option, model_dtype
from ..common.options import prompt_room
from ..common.tiny_model import STAMP, make_tiny_model

SERVERS = ("plain", "evs", "vidcom2", "flashvid")
# and with a share of the encoder's work; on demand only
ENCODERS = {f"flashvid-encoder-{share}": share for share in ("0.5", "0.25", "auto")}
# and with tokens dropped inside the LLM too, or there alone; on demand only
INNER = {"flashvid-inner": ["--flashvid-config", '{"inner": true}'], "fastv": ["--flashvid-method", "fastv"]}
ON_DEMAND = (*ENCODERS, *INNER)
EXTENSION = "benchmarks.load.worker_times.WorkerTimes"
TEXT_ROOM = 64  # tokens of the question and the answer with the tokenizer of a model that is made here, at most


@dataclass(frozen=True)
class Shape:
    """A model with random weights that is made here.

    Attributes:
        kind: of `common.tiny_model`.
        about: its sizes in words.
        tokens_per_frame: of a video.
        on_demand: whether it is measured only where it is named.
    """

    kind: str
    about: str
    tokens_per_frame: int
    on_demand: bool = False


SHAPES = {
    "clip-b-0.1b": Shape(
        "llava_onevision_load", "LLaVA-OneVision of CLIP ViT-B/16 and a Qwen2 of 0.1 B, 49 tokens a frame", 49
    ),
    "llava-onevision-0.5b": Shape(
        "llava_onevision_0.5b",
        "the sizes of llava-onevision-qwen2-0.5b-ov: SigLIP so400m and Qwen2 0.5 B, 196 tokens a frame",
        196,
    ),
    "28-layers": Shape(
        "llava_onevision_deep",
        "LLaVA-OneVision of two layers of CLIP ViT-B/16 and a Qwen2 of 28 layers of 512, 49 tokens a frame",
        49,
        on_demand=True,
    ),
}


@dataclass(frozen=True)
class Target:
    """A model to serve.

    Attributes:
        name: for the results; no machine's path.
        about: what it is, in words.
        model: a directory or a name on a hub.
        identity: changes when the model does.
        shape: None for a real model.
    """

    name: str
    about: str
    model: str
    identity: str
    shape: Shape | None = None


def target_of_shape(name: str) -> Target:
    """The model of a shape, made if it is not there yet (half a minute, 2 GB for the larger one)."""
    shape = SHAPES[name]
    directory = make_tiny_model(shape.kind, cache_directory().parent / "models" / shape.kind)
    about = f"{shape.about}; random weights, {model_dtype()}"
    return Target(name, about, str(directory), (directory / STAMP).read_text(), shape)


def target_of_model(model: str) -> Target:
    """A model of the user's."""
    name = Path(model).name if Path(model).is_dir() else model
    return Target(name, name, model, str(Path(model).resolve()) if Path(model).is_dir() else model)


def vllms_own_pruning(model: str) -> tuple[str, ...]:
    """Which methods `--video-pruning-rate` has for a model on this machine.

    None for LLaVA-OneVision, where it does nothing, and none on a CPU, where the first pruned video ends vLLM 0.32:
    its CPU runner does not know that positions must be computed again (`flashvid_vllm.serving.cpu_worker`).
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins
    from vllm.transformers_utils.config import get_config

    if current_platform.is_cpu():
        return ()
    load_general_plugins()
    methods: set[str] = set()
    for architecture in get_config(model, trust_remote_code=False).architectures or ():
        if architecture in ModelRegistry.models:
            kind = ModelRegistry.models[architecture].load_model_cls()
            methods |= set(getattr(kind, "supported_video_pruning_methods", ()))
    return tuple(sorted(methods))


def compression(server: str, ratio: float, own: tuple[str, ...]) -> tuple[str, list[str]]:
    """Whose implementation a server of SERVERS or ON_DEMAND runs, in words, and its options for ``ratio``.

    ``own``: what `vllms_own_pruning` said.
    """
    if server == "plain":
        return "vLLM without options", []
    if server in own:
        return "vLLM's", ["--video-pruning-rate", f"{1 - ratio:g}", "--video-pruning-method", server]
    options = ["--plugin", "flashvid", "--flashvid-retention-ratio", f"{ratio:g}"]
    if server == "flashvid":
        return "this plugin's", options
    if server in ENCODERS:
        return "this plugin's", [*options, "--flashvid-encoder-ratio", ENCODERS[server]]
    if server in INNER:
        return "this plugin's", [*options, *INNER[server]]
    return "through the plugin", [*options, "--flashvid-method", server]


def common_arguments(target: Target, frames: int, clip: Path, repeat: bool, num_frames: int | None = None) -> list[str]:
    """Arguments of `vllm serve` that all servers have, for videos of ``frames`` frames.

    Args:
        target: the model.
        frames: of a video, at most.
        clip: one of the videos, for its size.
        repeat: whether clips come again; if not, vLLM's cache of preprocessed videos is off, which only costs memory.
        num_frames: to sample of a video, -1 for all it has; default: ``frames``.
    """
    room = prompt_room(probe(clip), frames)
    if target.shape is not None:
        room = -(-(frames * target.shape.tokens_per_frame + 1 + TEXT_ROOM) // 128) * 128
    # vLLM refuses a video with more placeholders than one step's budget; 2048 is its default
    arguments = ["--max-model-len", str(room), "--max-num-batched-tokens", str(max(room, 2048)), "--max-num-seqs", "64"]
    # some families sample by number, some by rate; a rate that is a hair too high is rounded down
    rate = -1 if num_frames == -1 else 1.0001 * frames / probe(clip).seconds
    sampling = {"num_frames": num_frames or frames, "fps": rate}
    arguments += ["--media-io-kwargs", json.dumps({"video": sampling})]
    arguments += ["--limit-mm-per-prompt", json.dumps({"video": 1, "image": 0})]
    arguments += ["--worker-extension-cls", EXTENSION]
    arguments += [] if repeat else ["--mm-processor-cache-gb", "0"]
    return [*arguments, "--enforce-eager", *dtype_option()] if target.shape is not None else arguments


def environment(target: Target) -> dict[str, str]:
    """Variables for `vllm serve`: the worker must find its extension, and tell what it measured."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path}
    # vLLM's 300 s are less than a step of the larger shape takes on some CPUs
    variables["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] = os.environ.get("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "3600")
    # a real model on a CPU needs more than the 1 GiB that does for these shapes; a GPU does not read this
    if target.shape is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        variables["VLLM_CPU_KVCACHE_SPACE"] = "4"
    return variables
