# SPDX-License-Identifier: MIT
"""vLLM engines inside the test process, and prompts for them."""

import functools
import gc
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: 4 s to start
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

if os.environ.get("FLASHVID_RUNNER") == "v2":
    from . import v2_on_cpu

    v2_on_cpu.install()

pytest.importorskip("vllm")

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@functools.cache
def prepare_process() -> None:
    """Once, when vLLM is imported: what makes engines start in seconds.

    vLLM looks at a model's class in a process of its own, which imports it all again, so as not to touch a GPU here;
    and it collects garbage eight times an engine, each time among all that was ever imported.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()
    gc.collect()
    gc.freeze()


def prepare_process_of_ranks() -> None:
    """The same of a process of its own, whose engines and ranks are its forks, so that all is imported once: vLLM would
    spawn them on a CPU, for the sake of a pool of threads that this process does not have."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    prepare_process()
    let_vllm_fork()


def let_vllm_fork() -> None:
    """All processes that vLLM starts from now on are forks of this one."""
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda _=None: get_context("fork")  # type: ignore[assignment]


@dataclass(frozen=True)
class Clip:
    """A made-up video: noise that moves over a still scene, so that tokens merge and differ."""

    num_frames: int
    height: int
    width: int
    seconds_per_frame: float = 0.5
    seed: int = 0

    def frames(self) -> np.ndarray:
        """[num_frames, height, width, 3] uint8."""
        rng = np.random.default_rng(self.seed)
        frames = np.repeat(rng.integers(0, 255, (1, self.height, self.width, 3), dtype=np.uint8), self.num_frames, 0)
        for t in range(self.num_frames):
            y, x = (28 * t) % (self.height - 27), (42 * t) % (self.width - 27)
            frames[t, y : y + 28, x : x + 28] = rng.integers(0, 255, (28, 28, 3), dtype=np.uint8)
        return frames

    def metadata(self) -> dict[str, Any]:
        """As vLLM's video loaders give it."""
        return {
            "fps": 1 / self.seconds_per_frame, "duration": self.num_frames * self.seconds_per_frame,
            "total_num_frames": self.num_frames, "frames_indices": list(range(self.num_frames)),
            "video_backend": "opencv", "do_sample_frames": False,
        }  # fmt: skip


def picture(height: int = 84, width: int = 56, seed: int = 5) -> np.ndarray:
    """[height, width, 3] uint8."""
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


@contextmanager
def engine(model: Path | str, **options: Any) -> Iterator[Any]:
    """A ``vllm.LLM`` in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 4096, "enforce_eager": True, "seed": 0,
        "limit_mm_per_prompt": {"video": 3, "image": 3}, "enable_prefix_caching": True, "max_num_seqs": 8,
    }  # fmt: skip
    prepare_process()
    ENGINES.close()  # one at a time
    llm = LLM(str(model), **(defaults | options))
    try:
        with _watch_positions(llm):
            yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def first_layer(model: Any) -> Any:
    """The language model's: the class around its layers has a __call__ of its own, without hooks."""
    return model.language_model.model.layers[0]


_lowest: list[Tensor] = []  # position that the language model was given since `no_position_below_0` last looked


def no_position_below_0() -> None:
    """AssertionError if a token reached the language model of this process's engine at a position below 0."""
    lowest, _lowest[:] = [int(position) for position in _lowest], []
    assert not lowest or lowest[0] >= 0, f"the language model was given the position {lowest[0]}"


@contextmanager
def _watch_positions(llm: Any) -> Iterator[None]:
    """Keeps `_lowest`, whatever the engine is asked; not of compiled models nor of workers in other processes."""

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        lowest = (args[0] if args else kwargs["positions"]).min()
        _lowest[:] = [torch.minimum(lowest, *_lowest) if _lowest else lowest]

    _lowest.clear()
    executor: Any = getattr(llm.llm_engine, "model_executor", None)  # there is none with workers of their own
    if not llm.llm_engine.model_config.enforce_eager or type(executor).__name__ != "UniProcExecutor":
        yield
        return
    hook = first_layer(executor.driver_worker.get_model()).register_forward_pre_hook(keep, with_kwargs=True)
    yield
    hook.remove()
    no_position_below_0()


class Engines:
    """Engines that tests and files share: one that the next test asks for again is not started again."""

    def __init__(self) -> None:
        self._key, self._llm, self._stack = "", None, ExitStack()

    def __call__(self, model: Path | str, settings: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """A ``vllm.LLM`` of ``model`` with FlashVID's ``settings`` (None: without the plugin) and vLLM's ``options``.

        It is the caller's until another one is asked for.
        """
        from flashvid_vllm import engine_args

        key = repr((str(model), settings and sorted(settings.items()), sorted(options.items())))
        if self._llm is None or key != self._key:
            flashvid = {} if settings is None else engine_args(**settings)
            stack = ExitStack()
            self._llm = stack.enter_context(engine(model, **flashvid, **options))
            self._stack, self._key = stack, key
        return self._llm

    def close(self) -> None:
        """End the engine that lives."""
        self._llm, stack, self._stack = None, self._stack, ExitStack()
        stack.close()


ENGINES = Engines()


def prompt_of(
    text: str, clips: Sequence[Clip] = (), images: Sequence[np.ndarray] = (), flashvid: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A vLLM prompt; ``text`` holds IMAGE and VIDEO where the media go."""
    data: dict[str, Any] = {}
    if clips:
        data["video"] = [(clip.frames(), clip.metadata()) for clip in clips]
    if images:
        from PIL import Image

        data["image"] = [Image.fromarray(image) for image in images]
    prompt: dict[str, Any] = {"prompt": text, "multi_modal_data": data}
    if flashvid is not None:
        prompt["mm_processor_kwargs"] = {"flashvid": flashvid}
    return prompt


@contextmanager
def chunked(llm: Any, tokens: int | None = 32) -> Iterator[None]:
    """Let an engine prefill prompts in chunks of so many tokens, smaller than a video; None changes nothing."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    before = scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = tokens or before
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = before


def greedy(
    llm: Any, prompts: list[Any], max_tokens: int = 6, logprobs: int = 5, keep_prefixes: bool = False
) -> list[Any]:
    """Greedy answers to a batch: a list of vLLM's RequestOutput. Prefixes of earlier ones are forgotten before."""
    from vllm import SamplingParams

    if not keep_prefixes:
        assert llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=logprobs, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    no_position_below_0()
    return outputs


def tokens_and_logprobs(output: Any) -> tuple[list[int], list[dict[int, float]]]:
    """Chosen ids, and the top logprobs of every step, of a RequestOutput."""
    answer = output.outputs[0]
    return list(answer.token_ids), [{i: p.logprob for i, p in step.items()} for step in answer.logprobs]


def check(output: Any, expected: tuple[list[int], list[Tensor]], tolerance: float) -> None:
    """That a RequestOutput has the ids of ``expected``, and its log-probabilities [vocabulary] of every step."""
    ids, steps = tokens_and_logprobs(output)
    assert ids == expected[0]
    for step, row in zip(steps, expected[1], strict=True):
        assert max(abs(value - float(row[token])) for token, value in step.items()) < tolerance


def same(one: Any, other: Any, tolerance: float) -> None:
    """That two RequestOutputs answer the same prompt alike: ids, and log-probabilities of what both list."""
    assert one.prompt_token_ids == other.prompt_token_ids
    same_answers([tokens_and_logprobs(one)], [tokens_and_logprobs(other)], tolerance)


def same_answers(answers: Sequence[Any], others: Sequence[Any], tolerance: float) -> None:
    """The same of what `tokens_and_logprobs` gives for each of several prompts; ``others`` may have been JSON."""
    for (ids, steps), (other_ids, other_steps) in zip(answers, others, strict=True):
        assert ids == other_ids
        for step, other in zip(steps, other_steps, strict=True):
            other = {int(token): value for token, value in other.items()}
            assert max(abs(step[i] - other[i]) for i in step.keys() & other.keys()) < tolerance


def record_positions(llm: Any, prompts: list[Any], max_tokens: int = 6) -> list[Tensor]:
    """The positions [3, n] that the language model receives at every step while it answers one prompt: none below 0."""
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["positions"]).clone())

    hooks = llm.apply_model(lambda model: first_layer(model).register_forward_pre_hook(keep, with_kwargs=True))
    try:
        greedy(llm, prompts, max_tokens)
    finally:
        hooks[0].remove()
    assert all(int(step.min()) >= 0 for step in seen), f"positions below 0: {[int(step.min()) for step in seen]}"
    return seen


def in_new_process(function: Callable[..., Any], directory: Path, *arguments: Any, env: Mapping[str, str] = {}) -> Any:
    """What a function of a test module returns in a Python of its own, arguments and result passed as JSON.

    ``directory``: where its script goes. A file, since ranks are spawned and import their parent's main module.
    """
    script = directory / "call.py"
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    script.write_text(
        "import json, sys\n"
        f"from {function.__module__} import {function.__name__} as call\n"
        'if __name__ == "__main__":\n'
        '    print("RESULT", json.dumps(call(*json.loads(sys.argv[1]))))\n'
    )
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(arguments, default=str)],
        env=os.environ | {"PYTHONPATH": path, **env},
        capture_output=True, text=True, timeout=1800, cwd=directory,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("RESULT ")).removeprefix("RESULT "))
