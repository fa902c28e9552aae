"""Every measured case, by family."""

from __future__ import annotations

from longctx.benchmark import cache_cases, kv_cases, linear_cases, page_cases, prefill_cases, topk_cases

_FAMILIES = (prefill_cases, linear_cases, topk_cases, page_cases, kv_cases, cache_cases)
CASES = [case for family in _FAMILIES for case in family.CASES]
