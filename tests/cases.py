"""One entry an op: valid calls by argument name, and what is illegal about its arguments.

The tests that hold for every op (conventions, bad input, opcheck, compile) loop over `CASES`.
"""

from __future__ import annotations

import kv_cases
import linear_cases
import prefill_cases
import topk_cases

CASES = {case.name: case for case in (*prefill_cases.CASES, *topk_cases.CASES, *kv_cases.CASES, *linear_cases.CASES)}
