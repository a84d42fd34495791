"""Hashes of SGLang's hooked functions as they were read against docs/design.md, "Contracts with SGLang", by release.

Blocks are printed by `python -m hardkv_sglang.engine.reviewed_sources` on an installation of the release.
"""

from __future__ import annotations

from collections.abc import Mapping

CHANGES: Mapping[str, Mapping[str, str]] = {
    "0.5.17": {
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes":
            "44968c414b76caa9",
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mha_kv_pool":
            "f13be7332f64f364",
        "sglang.srt.model_executor.model_runner.ModelRunner.init_attention_backends":
            "339d4aa45ac99a15",
        "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue":
            "e7755aa541e9d279",
        "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_decode":
            "d5a04da1cae5d816",
        "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation":
            "92db45e932b4adea",
        "sglang.srt.managers.scheduler.Scheduler.process_batch_result":
            "89adb4bce2136e96",
        "sglang.srt.mem_cache.common.release_kv_cache":
            "0fb7e224c7441212",
        "sglang.srt.mem_cache.common.maybe_cache_unfinished_req":
            "1711eac8200b7000",
        "sglang.srt.managers.schedule_policy.PrefillAdder.__init__":
            "5b450328ed853f7d",
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req":
            "bd89cdcf19fcb51e",
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req":
            "5e88d3ab43c32b9e",
        "sglang.srt.managers.schedule_policy.PrefillAdder.preempt_to_schedule":
            "c0f6035df122ea6c",
        "sglang.srt.managers.scheduler.Scheduler._get_new_batch_prefill_raw":
            "53250b561fd8429d",
        "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker._get_total_uncached_sizes":
            "a7e9f849094af112",
        "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker.self_check_during_busy":
            "645d85a0575c217f",
        "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker._check_req_pool":
            "8e5ae3e42e583336",
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state":
            "1dac0a0d07204d61",
        "sglang.srt.managers.scheduler.Scheduler.init_model_worker":
            "1175bfb3a44d6e2c",
        "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.log_stats":
            "1a2a111e2ab43c1a",
        "sglang.srt.managers.scheduler_components.pool_stats_observer.PoolStats.get_decode_usage_msg_parts":
            "36522e58e184fef3",
    },
}  # fmt: skip
"""By release, oldest first: functions that differ from the release before, with the start of the SHA-256 of their
source. What is not named is as it was."""
