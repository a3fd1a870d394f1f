# SPDX-License-Identifier: MIT
"""vLLM's CPU worker, told that videos are compressed.

CPUModelRunner.load_model of vLLM 0.32 and 0.33 replaces GPUModelRunner's and forgets what it does last:
without ``is_multimodal_pruning_enabled`` positions are never recomputed and the first
compressed video crashes the engine; without ``requires_sequential_video_encoding`` many raw videos
may enter one step of the encoder. Can go when upstream's CPU runner sets them.
"""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker as _CPUWorker


class CPUWorker(_CPUWorker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        runner.is_multimodal_pruning_enabled = True
        runner.requires_sequential_video_encoding = hasattr(runner.get_model(), "requires_sequential_video_encoding")
