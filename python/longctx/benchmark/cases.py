"""Every measured case, by family."""

from __future__ import annotations

from longctx.benchmark import cache_cases, kv_cases, linear_cases, prefill_cases, topk_cases

CASES = [*prefill_cases.CASES, *linear_cases.CASES, *topk_cases.CASES, *kv_cases.CASES, *cache_cases.CASES]
