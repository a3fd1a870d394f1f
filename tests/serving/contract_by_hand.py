# SPDX-License-Identifier: MIT
"""What we build on in vLLM and the checker of tests/serving/contract.py cannot read off our sources by itself.

It does find imports, attributes of imported modules, base classes, overridden methods, ``super()``, ``self`` and what
hangs on them as far as types are written down (`python -m tests.serving.contract --unchecked` lists where they are
not). What is left goes here; a name in READ that our sources do not contain is reported.
"""

# Attributes that we read or set where no type says whose they are: class or module -> names.
READ = {
    "vllm.config.CompilationConfig": "compile_mm_encoder cudagraph_mm_encoder",
    "vllm.config.LoRAConfig": "enable_tower_connector_lora",
    "vllm.config.ModelConfig": "architecture dtype model multimodal_config uses_mrope",
    "vllm.config.MultiModalConfig": (
        "get_limit_per_prompt is_multimodal_pruning_enabled limit_per_prompt mm_encoder_attn_backend "
        "mm_encoder_attn_dtype mm_encoder_tp_mode mm_processor_kwargs"
    ),
    "vllm.config.ParallelConfig": "pipeline_parallel_size tensor_parallel_size worker_cls",
    "vllm.config.SchedulerConfig": "async_scheduling",
    "vllm.config.VllmConfig": (
        "compilation_config ec_transfer_config lora_config model_config parallel_config scheduler_config "
        "speculative_config use_v2_model_runner"
    ),
    "vllm.engine.arg_utils.EngineArgs": (
        "_api_process_count _api_process_rank add_cli_args create_engine_config mm_processor_kwargs video_pruning_rate"
    ),
    "vllm.distributed.parallel_state.GroupCoordinator": "is_first_rank",
    "vllm.entrypoints.pooling.base.serving": "validate_request_mm_kwargs",
    "vllm.lora.layers.VocabParallelEmbeddingWithLoRA": "base_layer",
    "vllm.model_executor.layers.attention.mm_encoder_attention.MMEncoderAttention": (
        "_fa_version attn_backend forward fp8_enabled head_size num_heads scale"
    ),
    "vllm.model_executor.models.clip.CLIPAttention": "attn",
    "vllm.model_executor.models.clip.CLIPEncoderLayer": "self_attn",
    "vllm.model_executor.models.clip.CLIPVisionEmbeddings": (
        "class_embedding forward patch_embedding position_embedding"
    ),
    "vllm.model_executor.models.llava_onevision.LlavaOnevisionProcessingInfo": "_get_num_frame_tokens",
    "vllm.model_executor.models.llava_onevision.LlavaOnevisionVideoPixelInputs": "pixel_values_videos",
    "vllm.model_executor.models.qwen2.Qwen2Model": "embed_tokens",
    "vllm.model_executor.models.qwen2_5_vl.Qwen2_5_VisionAttention": "attn",
    "vllm.model_executor.models.qwen2_5_vl.Qwen2_5_VisionBlock": "attn",
    "vllm.model_executor.models.qwen2_5_vl.Qwen2_5_VisionTransformer": "blocks dtype forward out_hidden_size",
    "vllm.model_executor.models.qwen2_5_vl.Qwen2_5_VLVideoPixelInputs": (
        "pixel_values_videos second_per_grid_ts timestamps video_grid_thw"
    ),
    "vllm.model_executor.models.qwen2_5_vl.Qwen2_5_VLProcessingInfo": "_get_vision_info",
    "vllm.model_executor.models.qwen3_vl.Qwen3VLProcessingInfo": "_get_vision_info",
    "vllm.model_executor.models.qwen3_vl.Qwen3_VisionBlock": "attn",
    "vllm.model_executor.models.qwen3_vl.Qwen3_VisionTransformer": "blocks dtype forward out_hidden_size",
    "vllm.model_executor.models.siglip.SiglipAttention": "attn",
    "vllm.model_executor.models.siglip.SiglipEncoder": "layers",
    "vllm.model_executor.models.siglip.SiglipEncoderLayer": "self_attn",
    "vllm.model_executor.models.siglip.SiglipVisionEmbeddings": "forward patch_embedding position_embedding",
    "vllm.multimodal.inputs.BaseMultiModalField": "keep_on_cpu",
    "vllm.multimodal.inputs.MultiModalFeatureSpec": "data identifier mm_hash mm_position modality",
    "vllm.multimodal.inputs.MultiModalFieldElem": "data",
    "vllm.multimodal.parse.MultiModalDataItems": "get_count",
    "vllm.multimodal.processing.BaseProcessingInfo": "get_hf_config get_hf_processor get_tokenizer",
    "vllm.multimodal.processing.ProcessorInputs": "hf_processor_mm_kwargs mm_data_items",
    "vllm.multimodal.processing.PromptUpdate": "modality",
    "vllm.multimodal.processing.processor.MultiModalProcessingResult": "hashes kwargs prompt_updates",
    "vllm.multimodal.processing.processor.ResolvedPromptUpdate": "content",
    "vllm.v1.worker.cpu_worker.CPUWorker": "model_runner",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": "intermediate_tensors max_num_tokens",
}

# Definitions by which vLLM finds us, or decides what it knows of our classes.
KNOWN_BY = (
    "vllm.model_executor.layers.attention.mm_encoder_attention.MMEncoderAttention.forward_native",
    "vllm.model_executor.models.registry._ModelInfo",
    "vllm.plugins.DEFAULT_PLUGINS_GROUP",
    "vllm.v1.worker.cpu_model_runner.CPUModelRunner.load_model",
)

# Where vLLM calls what we override or sets what we correct: module, class or function -> names; every use is recorded.
USED_IN = {
    "vllm.model_executor.models.qwen2_5_vl.Qwen2_5_VisionAttention": "attn",
    "vllm.model_executor.models.vision.run_dp_sharded_mrope_vision_model": "out_hidden_size spatial_merge_size",
    "vllm.v1.worker.cpu_model_runner": "is_multimodal_pruning_enabled",
    "vllm.v1.worker.gpu.mm.encoder_runner": "embed_input_ids embed_multimodal",
    "vllm.v1.worker.gpu.mm.rope": "get_mrope_input_positions",
    "vllm.v1.worker.gpu.model_runner": "make_empty_intermediate_tensors",
    "vllm.v1.worker.gpu.model_states.mm_pruning": "is_multimodal_pruning_enabled recompute_mrope_positions",
    "vllm.v1.worker.gpu_model_runner": (
        "embed_input_ids embed_multimodal get_mrope_input_positions is_multimodal_pruning_enabled "
        "make_empty_intermediate_tensors recompute_mrope_positions requires_sequential_video_encoding"
    ),
}

# Names whose every mention counts, so that a new caller beside those above is seen: package -> names.
MENTIONED_IN = {
    "vllm": "get_and_update_features validate_request_mm_kwargs",
    "vllm.v1": "embed_multimodal get_mrope_input_positions is_multimodal_pruning_enabled recompute_mrope_positions",
}
