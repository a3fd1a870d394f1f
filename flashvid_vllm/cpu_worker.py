# SPDX-License-Identifier: MIT
"""vLLM's CPU worker, told that videos are compressed.

CPUModelRunner.load_model of vLLM 0.32 replaces GPUModelRunner's and forgets what it does last:
without ``is_multimodal_pruning_enabled`` positions are never recomputed and the first
compressed video crashes the engine. Can go when upstream's CPU runner sets the flag.
"""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker as _CPUWorker


class CPUWorker(_CPUWorker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.model_runner.is_multimodal_pruning_enabled = True
