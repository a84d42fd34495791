"""Every place where the runtime enters SGLang, as one table; `installation.py` puts it in place.

Hook functions take the attachment first, then the arguments of their kind: BEFORE `(*args)`, AFTER
`(result, *args)`, AROUND `(original, *args)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from hardkv_sglang.engine import compat
from hardkv_sglang.engine.admission_hooks import (
    after_get_new_batch_prefill_raw,
    after_prefill_adder_init,
    around_add_chunked_req,
    around_add_one_req,
    around_preempt_to_schedule,
)
from hardkv_sglang.engine.assembly import Attachment
from hardkv_sglang.engine.installation import Hook
from hardkv_sglang.engine.memory_budget import left_for_pool
from hardkv_sglang.engine.overrides import is_opted_out, override_error
from hardkv_sglang.engine.refusals.models import refused_model
from hardkv_sglang.engine.request import Request


def before_build_mha_kv_pool(hardkv: Attachment, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """_build_mha_kv_pool(self, *, max_total_num_tokens, mha_pool_class, quant_method): builds our pool class."""
    from hardkv_sglang.memory_pool.pool import HeadPagedTokenToKVPool

    return args, {**kwargs, "mha_pool_class": HeadPagedTokenToKVPool}


def after_profile_available_bytes(
    hardkv: Attachment, available: int, configurator: Any, *_args: Any, **_kwargs: Any
) -> int:
    """_profile_available_bytes(self, pre_model_load_memory): the model is loaded, the pool not sized yet."""
    problems = refused_model(configurator)
    if problems:
        raise ValueError("--kv-compression hardkv does not support this model:\n  " + "\n  ".join(problems))
    return left_for_pool(hardkv.options, configurator, available)


def after_init_attention_backends(hardkv: Attachment, _result: None, model_runner: Any) -> None:
    """init_attention_backends(self): the pool exists, CUDA graphs do not yet."""
    hardkv.attach(model_runner)


def before_add_request_to_queue(hardkv: Attachment, _scheduler: Any, req: Request, *_args: Any, **_kwargs: Any) -> None:
    """_add_request_to_queue(self, req, is_retracted): SGLang has checked every field and refuses nothing after this."""
    hardkv.runtime.preemption.note_queued(req)
    if compat.is_ending(req):
        return
    problem = override_error(compat.custom_params(req)) or compat.refused_sampling(req)
    problem = problem or hardkv.runtime.admission.refusal(req)
    if problem is not None:
        req.set_finish_with_abort(problem)


def before_prepare_for_decode(hardkv: Attachment, batch: Any) -> None:
    """prepare_for_decode(self): retraction is decided, and the batch is launched in this iteration."""
    hardkv.runtime.plan_decode(batch)


def around_forward_batch_generation(
    hardkv: Attachment, original: Callable[..., Any], worker: Any, batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """forward_batch_generation(self, batch, ...): we are on the forward stream, before the step's metadata."""
    reports = hardkv.runtime.launch(batch) if batch is not None else []
    result = original(worker, batch, *args, **kwargs)
    result.hardkv_reports = reports
    return result


def after_process_batch_result(hardkv: Attachment, _returned: None, _scheduler: Any, _batch: Any, result: Any) -> None:
    """process_batch_result(self, batch, result): the step's device-to-host copies have been waited for."""
    hardkv.runtime.settle(getattr(result, "hardkv_reports", []))


def before_release_kv_cache(hardkv: Attachment, req: Request, tree_cache: Any, *_args: Any, **_kwargs: Any) -> None:
    """release_kv_cache(req, tree_cache, is_insert or checkpoint): finish, abort and retraction all end here."""
    hardkv.runtime.release(req, tree_cache)


def around_maybe_cache_unfinished_req(
    hardkv: Attachment, original: Callable[..., Any], req: Request, tree_cache: Any, **kwargs: Any
) -> None:
    """maybe_cache_unfinished_req(req, tree_cache), since 0.5.22 checkpoint_kv_cache: a retracted request re-prefills
    its own output; the tree must not own that part, or it could never be compressed again."""
    if is_opted_out(compat.custom_params(req)):
        original(req, tree_cache, **kwargs)
    else:
        compat.cache_dense_prefix(original, req, tree_cache, **kwargs)


def after_get_total_uncached_sizes(hardkv: Attachment, sizes: tuple[int, int], checker: Any) -> tuple[int, int]:
    """_get_total_uncached_sizes(self): strict mode compares lengths with the pool; compressed requests hold less."""
    reqs = compat.active_requests(checker.get_last_batch(), checker.get_running_batch())
    return sizes[0] - hardkv.runtime.uncached_tokens(reqs), sizes[1]


def after_self_check_during_busy(hardkv: Attachment, _result: None, checker: Any) -> None:
    """self_check_during_busy(self): strict mode only."""
    if checker.get_last_batch() is not None:
        reqs = compat.active_requests(checker.get_last_batch(), checker.get_running_batch())
        hardkv.runtime.check_integrity(reqs, checker.tree_cache)


def after_check_req_pool(hardkv: Attachment, _result: None, checker: Any) -> None:
    """_check_req_pool(self): SGLang's own leak check of an idle server just passed."""
    hardkv.runtime.check_idle(checker.tree_cache)


def after_get_internal_state(hardkv: Attachment, output: Any, _scheduler: Any, _request: Any) -> Any:
    """get_internal_state(self, recv_req): adds our block to /server_info."""
    output.internal_state["hardkv"] = hardkv.runtime.describe()
    return output


def after_init_model_worker(hardkv: Attachment, _result: None, scheduler: Any) -> None:
    """init_model_worker(self): the runtime exists; SGLang has made its own series before."""
    labels = compat.metric_labels(scheduler)
    if labels is not None:
        hardkv.runtime.start_metrics(labels)


def after_log_stats(hardkv: Attachment, _result: None, _collector: Any, _stats: Any) -> None:
    """log_stats(self, stats): SGLang updates its own series, at every log line and when the server gets idle."""
    hardkv.runtime.publish_metrics()


def after_get_decode_usage_msg_parts(hardkv: Attachment, parts: list[str], _stats: Any) -> list[str]:
    """get_decode_usage_msg_parts(self): the pool's part of the decode log line."""
    return [*parts, f"kv kept: {100 * hardkv.runtime.occupancy().kept_ratio:.1f} %"]


RUNTIME_HOOKS = (
    Hook(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._profile_available_bytes",
        HookType.AFTER, after_profile_available_bytes, "tables come out of the pool's share",
    ),
    Hook(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mha_kv_pool",
        HookType.BEFORE, before_build_mha_kv_pool, "head pages need one storage over all layers",
    ),
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.init_attention_backends",
        HookType.AFTER, after_init_attention_backends, "tables and decode attention",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue",
        HookType.BEFORE, before_add_request_to_queue, "refuse a malformed override, and what could never start",
    ),
    Hook(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_decode",
        HookType.BEFORE, before_prepare_for_decode, "plan events, move pages",
    ),
    Hook(
        "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation",
        HookType.AROUND, around_forward_batch_generation, "run events on the forward stream",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.process_batch_result",
        HookType.AFTER, after_process_batch_result, "read the counts of finished events",
    ),
    Hook(
        "sglang.srt.mem_cache.common.release_kv_cache",
        HookType.BEFORE, before_release_kv_cache, "free condensed pages, keep the tree exact",
    ),
    Hook(
        "sglang.srt.mem_cache.common.maybe_cache_unfinished_req",
        HookType.AROUND, around_maybe_cache_unfinished_req, "retracted requests stay compressible",
        later_name="sglang.srt.mem_cache.common.checkpoint_kv_cache",
    ),
    Hook(
        "sglang.srt.managers.schedule_policy.PrefillAdder.__init__",
        HookType.AFTER, after_prefill_adder_init, "no reservation for outputs",
    ),
    Hook(
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req",
        HookType.AROUND, around_add_chunked_req, "no reservation for outputs",
    ),
    Hook(
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
        HookType.AROUND, around_add_one_req, "admit by footprint",
    ),
    Hook(
        "sglang.srt.managers.schedule_policy.PrefillAdder.preempt_to_schedule",
        HookType.AROUND, around_preempt_to_schedule, "preempt by footprint, and only for who will start",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler._get_new_batch_prefill_raw",
        HookType.AFTER, after_get_new_batch_prefill_raw, "queue whom a pass preempted in vain",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker._get_total_uncached_sizes",
        HookType.AFTER, after_get_total_uncached_sizes, "keep SGLang's strict memory check exact",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker.self_check_during_busy",
        HookType.AFTER, after_self_check_during_busy, "page ownership in strict mode",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker._check_req_pool",
        HookType.AFTER, after_check_req_pool, "page ownership at idle",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        HookType.AFTER, after_get_internal_state, "counters in /server_info",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.init_model_worker",
        HookType.AFTER, after_init_model_worker, "series on /metrics",
    ),
    Hook(
        "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.log_stats",
        HookType.AFTER, after_log_stats, "update the series when SGLang updates its own",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.pool_stats_observer.PoolStats.get_decode_usage_msg_parts",
        HookType.AFTER, after_get_decode_usage_msg_parts, "kept share in the decode log line",
    ),
)  # fmt: skip
