# SPDX-License-Identifier: MIT
"""Where a worker of vLLM spends its time: vision encoder, compression, prefill, decoding. For benchmarks only.

    vllm serve MODEL --worker-extension-cls benchmarks.load.worker_times.WorkerTimes    (with VLLM_SERVER_DEV_MODE=1)
    POST /collective_rpc {"method": "worker_times"}     what was measured since the last such call; then from 0 again

On a GPU it waits for the device before and after everything that it times, which costs some of the overlap that vLLM
lives on: load every server with it that is compared, or none. One process imports this file: the worker.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# What turns the encoder's output into fewer tokens, our plugin's and vLLM's own: functions of the modules that the
# model's classes come from, and a method. FlashVID's reading of the encoder's attention belongs to it.
COMPRESSING = ("compress", "frame_attention", "compute_retention_mask", "vidcom2_compute_retention_mask")
POSTPROCESSING = ("_postprocess_video_embeds_evs", "_compress")  # Qwen's: vLLM's mask and positions, the plugin's


def prefill_tokens(step: Any) -> int:
    """Prompt tokens among those that a step of the scheduler (vLLM's SchedulerOutput) runs."""
    cached = step.scheduled_cached_reqs
    ids = [request.req_id for request in step.scheduled_new_reqs]
    ids += [name for name, made in zip(cached.req_ids, cached.num_output_tokens, strict=True) if not made]
    return sum(step.num_scheduled_tokens.get(name, 0) for name in ids)


class Stopwatch:
    """Seconds and calls by name. What is timed inside something else of the same name counts once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.running: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """From 0 again."""
        self.values = dict.fromkeys(("encoder_s", "compression_s", "prefill_s", "decode_s"), 0.0)
        self.counts = dict.fromkeys(("videos", "prefill_steps", "decode_steps", "prefill_tokens"), 0)

    def now(self) -> float:
        """Seconds, when the device has done what it was told to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the context to ``name``."""
        if name in self.running:
            yield
            return
        self.running.add(name)
        start = self.now()
        try:
            yield
        finally:
            self.values[name] += self.now() - start
            self.running.discard(name)

    def within(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed as ``name``."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timed(name):
                return function(*args, **kwargs)

        return timed


class WorkerTimes:
    """What vLLM adds to its worker class. Its names must be none of a worker's own."""

    model_runner: Any
    device: torch.device

    def worker_times(self) -> dict[str, Any]:
        """What was measured since the last call, and from now on from 0. The first call only begins.

        Seconds: ``encoder_s`` embed_multimodal without compression, ``compression_s``, ``prefill_s`` steps with prompt
        tokens without both (input preparation, forward pass, logits; tokens of others that decode in the same step are
        in it), ``decode_s`` all other steps. Counts: ``videos`` (calls of the encoder: one for each video with a
        compressing server, a batch may be one call otherwise), steps, prompt tokens. ``pid`` of this process. On a GPU
        ``memory_bytes`` and ``peak_bytes``: allocated, now and at most.
        """
        watch: Stopwatch | None = getattr(self, "_stopwatch", None)
        if watch is None:
            watch = self._stopwatch = self._install_stopwatch()
        found: dict[str, Any] = {**watch.values, **watch.counts, "pid": os.getpid(), "threads": torch.get_num_threads()}
        found["encoder_s"] -= found["compression_s"]
        if self.device.type == "cuda":
            found["memory_bytes"] = torch.cuda.memory_allocated(self.device)
            found["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        watch.reset()
        return found

    def _install_stopwatch(self) -> Stopwatch:
        """Wrap the model's and the runner's methods in this process."""
        watch = Stopwatch(self.device)
        model = self.model_runner.get_model()
        for module in {sys.modules[kind.__module__] for kind in type(model).__mro__}:
            for name in COMPRESSING:
                if callable(function := vars(module).get(name)):
                    setattr(module, name, watch.within("compression_s", function))
        for name in POSTPROCESSING:
            if hasattr(model, name):
                setattr(model, name, watch.within("compression_s", getattr(model, name)))
        self._time_encoder(watch, model)
        self._time_steps(watch)
        return watch

    def _time_encoder(self, watch: Stopwatch, model: Any) -> None:
        encode = model.embed_multimodal

        @functools.wraps(encode)
        def embed_multimodal(**kwargs: Any) -> Any:
            watch.counts["videos"] += 1
            with watch.timed("encoder_s"):
                return encode(**kwargs)

        model.embed_multimodal = embed_multimodal

    def _time_steps(self, watch: Stopwatch) -> None:
        execute = self.model_runner.execute_model

        @functools.wraps(execute)
        def execute_model(step: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = prefill_tokens(step)
            kind = "prefill" if tokens else "decode"
            encoding = watch.values["encoder_s"]
            with watch.timed(f"{kind}_s"):
                result = execute(step, *args, **kwargs)
            watch.values[f"{kind}_s"] -= watch.values["encoder_s"] - encoding
            watch.counts[f"{kind}_steps"] += step.total_num_scheduled_tokens > 0
            watch.counts["prefill_tokens"] += tokens
            return result

        self.model_runner.execute_model = execute_model
