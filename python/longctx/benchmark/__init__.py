"""Measuring the ops: correct first, then ratios of interleaved runs beside what one would use instead."""

from longctx.benchmark.case import Case, Contenders
from longctx.benchmark.cases import CASES
from longctx.benchmark.timing import Timing, keep_freed_memory, matmul_ceiling, time_interleaved

__all__ = ["CASES", "Case", "Contenders", "Timing", "keep_freed_memory", "matmul_ceiling", "time_interleaved"]
