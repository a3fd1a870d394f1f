# SPDX-License-Identifier: MIT
"""vLLM's CPU worker, told that videos are compressed.

CPUModelRunner.load_model of vLLM 0.32 and 0.33 replaces GPUModelRunner's and forgets what it does last:
without ``is_multimodal_pruning_enabled`` positions are never recomputed and the first
compressed video crashes the engine; without ``requires_sequential_video_encoding`` many raw videos
may enter one step of the encoder. Can go when upstream's CPU runner sets them.

A stage of a pipeline behind the first makes ``intermediate_tensors``, where it takes what the one before hands on, in a
warm-up that the CPU's worker leaves out where nothing is compiled and the size of the KV cache is given: the first
request would crash it. Can go when it makes them elsewhere.
"""

from typing import Any

from vllm.distributed import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker as _CPUWorker


class CPUWorker(_CPUWorker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        model = runner.get_model()
        runner.is_multimodal_pruning_enabled = True
        runner.requires_sequential_video_encoding = hasattr(model, "requires_sequential_video_encoding")
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.intermediate_tensors = model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
