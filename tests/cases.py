"""One entry an op: valid calls by argument name, and what is illegal about its arguments.

The tests that hold for every op (conventions, bad input, opcheck, compile) loop over `CASES`.
"""

from __future__ import annotations

import kv_cases
import linear_cases
import page_cases
import prefill_cases
import topk_cases

_FAMILIES = (prefill_cases, topk_cases, page_cases, kv_cases, linear_cases)
CASES = {case.name: case for family in _FAMILIES for case in family.CASES}
