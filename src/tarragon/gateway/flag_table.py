"""Every flag of ``vllm serve``: does it apply to Tarragon, and if not, why.

Names are those of vLLM's parsed arguments. A test compares this table with the installed vLLM, so that an
upgrade cannot add a flag whose meaning here nobody has decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_APPLIES: Final = """
    allow_credentials allowed_headers allowed_methods allowed_origins anthropic_disabled_thinking_effort
    api_key chat_template chat_template_content_format cohere_format cohere_is_reasoning_model
    default_chat_template_kwargs disable_access_log_for_endpoints disable_fastapi_docs
    disable_uvicorn_access_log enable_auto_tool_choice enable_force_include_usage enable_log_deltas
    enable_log_outputs enable_log_requests enable_offline_docs enable_per_request_metrics
    enable_prompt_tokens_details enable_request_id_headers enable_server_load_tracking enable_ssl_refresh
    enable_tokenizer_info_endpoint exclude_tools_when_tool_choice_none fingerprint_mode fingerprint_value
    h11_max_header_count h11_max_incomplete_event_size log_error_stack max_log_len middleware
    response_role return_tokens_as_token_ids root_path sse_keep_alive_interval ssl_ca_certs ssl_cert_reqs
    ssl_ciphers tool_call_parser tool_parser_plugin tool_strict_level
    trust_request_chat_template uvicorn_log_level

    dtype enforce_eager generation_config logprobs_mode max_logprobs max_model_len
    override_generation_config reasoning_config reasoning_parser reasoning_parser_plugin
    renderer_num_workers seed served_model_name structured_outputs_config tokenizer tokenizer_mode

    safetensors_load_strategy safetensors_prefetch_block_size safetensors_prefetch_num_threads
    use_tqdm_on_load

    block_size disable_hybrid_kv_cache_manager disable_sliding_window enable_chunked_prefill
    enable_prefix_caching prefix_cache_retention_interval prefix_caching_hash_algo

    long_prefill_token_threshold long_prefill_token_threshold_adaptive max_num_active_seqs
    max_num_batched_tokens max_num_queued_reqs max_num_queued_tokens max_num_scheduled_tokens max_num_seqs
    prefill_schedule_interval scheduler_reserve_full_isl scheduling_policy stream_interval watermark

    aggregate_engine_logging collect_detailed_traces custom_histogram_buckets disable_log_stats
    enable_logging_iteration_details enable_mfu_metrics fail_on_environ_validation kv_cache_metrics
    kv_cache_metrics_sample log_level otlp_traces_endpoint show_hidden_metrics_for_version
    """

APPLIES: Final[frozenset[str]] = frozenset(_APPLIES.split())
"""Pass through: to the gateway's server, to the engines, or to both."""

OWN: Final[Mapping[str, str]] = {
    "async_scheduling": "a token leaves its worker only once the step that sampled it is safe",
    "config": "Tarragon reads a configuration file of its own (TOML), given with its own --config",
    "distributed_executor_backend": "each attention worker runs its engine inside its own process",
    "gpu_memory_utilization": "--kv-cache-bytes sets the size of each attention worker's KV cache",
    "help": "`tarragon serve --help` lists the settings",
    "host": "Tarragon's own --host sets the address",
    "kv_cache_memory_bytes": "--kv-cache-bytes sets the size of each attention worker's KV cache",
    "load_format": "weights are read from safetensors files only",
    "model": "the model is the first argument of `tarragon serve`",
    "model_tag": "the model is the first argument of `tarragon serve`",
    "num_gpu_blocks_override": "--kv-cache-bytes sets the size of each attention worker's KV cache",
    "port": "Tarragon's own --port sets the port",
    "ssl_certfile": "Tarragon's own --ssl-certfile sets the certificate",
    "ssl_keyfile": "Tarragon's own --ssl-keyfile sets the certificate's key",
    "shutdown_timeout": "--shutdown-grace-s sets how long a worker may take to stop",
}
"""Set by Tarragon itself: what to do instead, or why there is no choice."""

_REASONS: Final[Mapping[str, str]] = {
    "attention, experts and replicas are scaled by numbers of workers "
    "(--attention-workers, --expert-workers), not by parallel ranks": """
    all2all_backend api_server_count cp_kv_cache_interleave_size cpu_distributed_timeout_seconds
    data_parallel_address data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb
    data_parallel_multi_port_external_lb data_parallel_rank data_parallel_rpc_port data_parallel_size
    data_parallel_size_local data_parallel_start_rank data_parallel_supervisor_port
    dbo_decode_token_threshold dbo_prefill_token_threshold dcp_comm_backend dcp_kv_cache_interleave_size
    dcp_q_replicate decode_context_parallel_size disable_custom_all_reduce
    disable_nccl_for_dp_synchronization distributed_timeout_seconds dp_supervisor_probe_failure_threshold
    dp_supervisor_probe_interval_s dp_supervisor_probe_timeout_s dp_sync_interval
    enable_batch_sharded_sampling enable_dbo enable_hc_sp enable_nccl_comm_suspend enable_shm_tensor_arena
    headless master_addr master_port max_parallel_loading_workers nnodes node_rank pipeline_parallel_size
    prefill_context_parallel_size ray_workers_use_nsight tensor_parallel_size ubatch_size""",
    "Tarragon places the experts, their shadows and their replacements itself": """
    elastic_ep_max_dp_size enable_elastic_ep enable_ep_weight_filter enable_eplb enable_expert_parallel
    enable_fault_tolerance enable_return_routed_experts eplb_config expert_placement_strategy
    fault_tolerance_config aux_output_config""",
    "the node agent places workers on cores and devices": """
    device_ids numa_bind numa_bind_cpus numa_bind_nodes worker_cls worker_extension_cls""",
    "KV caches are checkpointed and restored by Tarragon itself, row by row in the model's own type": """
    ec_manager_config ec_transfer_config kv_cache_dtype kv_cache_dtype_skip_layers kv_events_config
    kv_offloading_backend kv_offloading_size kv_sharing_fast_prefill kv_transfer_config
    prefix_match_unit swa_bounded_replay""",
    "speculative decoding is not supported: its drafts would have to survive a failover too": """
    per_request_spec_decode_metrics spec_method spec_model spec_tokens speculative_config""",
    "LoRA adapters are not supported: experts run without them on the expert workers": """
    default_mm_loras enable_lora enable_mixed_moe_lora_format enable_moe_shared_loras
    enable_tower_connector_lora fully_sharded_loras lora_dtype lora_modules lora_target_modules
    max_cpu_loras max_lora_cls_labels max_lora_rank max_loras specialize_active_lora""",
    "quantised weights are not supported: experts are computed in the model's own type": """
    allow_deprecated_quantization quantization quantization_config""",
    "weights stay in the memory of the worker that computes with them": """
    cpu_offload_gb cpu_offload_params enable_cumem_allocator enable_sleep_mode offload_backend
    offload_group_size offload_num_in_group offload_params offload_prefetch_step
    sleep_mode_offload_cudagraph sleep_preserve_parameter_names weight_transfer_config""",
    "multimodal input is not supported: requests are text only": """
    allowed_local_media_path allowed_media_domains disable_chunked_mm_input enable_mm_embeds
    interleave_mm_strings language_model_only limit_mm_per_prompt media_io_kwargs mm_device_do_normalize
    mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path
    mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path mm_encoder_only mm_encoder_tp_mode
    mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb mm_processor_cache_type
    mm_processor_device mm_processor_kwargs mm_shm_cache_max_object_size_mb mm_tensor_ipc
    skip_mm_profiling trust_request_mm_kwargs video_pruning_method video_pruning_rate""",
    "code that comes with a model is never run": "code_revision trust_remote_code",
    "the model is a folder on this host, and every worker reads it as it is": """
    config_format download_dir hf_config_path hf_overrides hf_token ignore_patterns
    model_class_overrides model_loader_extra_config pt_load_map_location revision tokenizer_revision""",
    "attention and expert kernels are chosen so that no row depends on its batch": """
    attention_backend attention_config compilation_config cudagraph_capture_sizes disable_cascade_attn
    enable_flashinfer_autotune ir_op_priority jit_monitor_mode jit_monitor_verbose kernel_config
    linear_backend max_cudagraph_capture_size model_impl moe_backend optimization_level performance_mode
    sparse_indexer_topk_backend cudagraph_metrics""",
    "models with recurrent state are not supported: only attention's KV rows can be restored": """
    enable_mamba_cache_stochastic_rounding enable_mamba_shared_prefix_checkpoint gdn_prefill_backend
    kda_decode_backend kda_prefill_backend mamba_backend mamba_block_size mamba_cache_dtype
    mamba_cache_mode mamba_cache_philox_rounds mamba_ssm_cache_dtype mamba_ssu_algorithm
    replayssm_buffer_len use_replayssm""",
    "tokens are drawn by Tarragon's own sampler, whose state is only a seed and a position": """
    logits_processors return_sampling_mask use_fp64_gumbel watermark_config""",
    "only text generation is served": """
    convert diffusion_config enable_flash_late_interaction engram_config io_processor_plugin
    pooler_config runner""",
    "requests reach the gateway over HTTP as text or tokens, at --host and --port": """
    enable_prompt_embeds enable_scale_out grpc grpc_port skip_tokenizer_init tokens_only uds""",
    "the gateway calls no tools itself": "tool_server",
    "it is a tool for vLLM's developers, and its effect on failover is untested": """
    additional_config enable_layerwise_nvtx_tracing enable_trace_replay profiler_config scheduler_cls""",
    "the node agent collects the output of all workers": "log_config_file logging_config",
}

REFUSED: Final[Mapping[str, str]] = {
    name: reason for reason, names in _REASONS.items() for name in names.split()
}
"""Refused unless the value is harmless: the reason, in words that follow "is refused: "."""

HARMLESS: Final[Mapping[str, frozenset[Any]]] = {
    "api_server_count": frozenset({1}),
    "convert": frozenset({"none"}),
    "data_parallel_size_local": frozenset({1}),
    "distributed_executor_backend": frozenset({"uni"}),
    "load_format": frozenset({"safetensors"}),
    "runner": frozenset({"generate"}),
}
"""Values, besides the default and False, that change nothing and are therefore accepted."""
