"""The ratios that the CUDA backend is held to, worked out from measured cases and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longctx.benchmark import gpu_gather, gpu_linear, gpu_topk
from longctx.benchmark.gpu_cases import DENSE_16K, FLEXPREFILL, SPARSE

if TYPE_CHECKING:
    from longctx.benchmark.gpu import Ceilings, Result

K = 1024
TENTH = SPARSE.format(0.1)
H200_BYTES_PER_SECOND = 4.3e12


@dataclass(frozen=True)
class Target:
    """A ratio with what it should reach: at least `minimum`, or at most it where `at_most`."""

    work: str
    beside: str
    minimum: float
    goal: float | None
    measured: float | None  # None: a case that it needs was not timed
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.minimum if self.at_most else self.measured >= self.minimum

    def line(self) -> str:
        measured = "not measured" if self.measured is None else f"{self.measured:.3g}"
        if self.met is False:
            measured = f"**{measured}**, missed"
        relation = "at most " if self.at_most else ""
        goal = "" if self.goal is None else f"{self.goal:g}"
        return f"| {self.work} | {self.beside} | {measured} | {relation}{self.minimum:g} | {goal} |"


def evaluated(results: Sequence[Result], ceilings: Ceilings | None = None) -> list[Target]:
    """Every target; measured where its cases were."""
    by_case = {(result.case, result.length): result for result in results}

    def seconds(case: str, length: int, contender: str, *, best: bool = False) -> float | None:
        result = by_case.get((case, length))
        if result is None:
            return None
        if best:
            found = result.best(contender)
            return None if found is None else found[1]
        return result.seconds.get(contender)

    def ratio(above: float | None, below: float | None) -> float | None:
        return None if above is None or below is None else above / below

    def sparse_efficiency() -> float | None:
        """Dense time, scaled to the pairs that the sparse call visits, over its time."""
        result = by_case.get((TENTH, 64 * K))
        if result is None or result.ours is None or "longctx dense" not in result.seconds:
            return None
        visited = result.flops / (4.0 * 32 * 128)
        share = visited / (64 * K * (64 * K + 1) / 2)
        return share * result.seconds["longctx dense"] / result.ours

    def beside(case: str, length: int, contender: str, ours: str = "longctx") -> Callable[[], float | None]:
        best = contender.endswith("*")
        return lambda: ratio(seconds(case, length, contender.removesuffix("*"), best=best), seconds(case, length, ours))

    def of_floor(case: str, length: int) -> Callable[[], float | None]:
        """The time in which an H200 reads every input and writes every output once, over ours."""

        def share() -> float | None:
            result = by_case.get((case, length))
            return None if result is None else ratio(result.bytes / H200_BYTES_PER_SECOND, result.ours)

        return share

    def of_copy(case: str) -> Callable[[], float | None]:
        """Bytes per second of a gather from 128k keys over those of a copy in the same run."""

        def share() -> float | None:
            result = by_case.get((case, 128 * K))
            if result is None or result.ours is None or ceilings is None:
                return None
            return result.bytes / result.ours / ceilings.copy_bytes_per_second

        return share

    linear, linear_backward = gpu_linear.LARGE, gpu_linear.LARGE + gpu_linear.BACKWARD
    policy_ratio = beside(FLEXPREFILL, 128 * K, "sdpa*")
    rows: list[tuple[str, str, float, float | None, bool, Callable[[], float | None]]] = [
        ("dense causal bf16 D=128, 16k, 32 heads", "best SDPA backend", 0.85, 1.1, False,
         beside(DENSE_16K, 16 * K, "sdpa*")),
        ("efficiency of computed blocks, 10%, 64k, blocks of 128", "our own dense kernel", 0.80, 0.95, False,
         sparse_efficiency),
        ("10% density, 64k", "best dense SDPA backend", 6, 9, False, beside(TENTH, 64 * K, "sdpa*")),
        ("10% density, 64k", "compiled FlexAttention", 1.5, 2.5, False, beside(TENTH, 64 * K, "flex")),
        ("FlexPrefill end to end, 128k, the demo's prompt", "best dense SDPA backend", 3, 6, False, policy_ratio),
        ("sm_80 path, dense D=128, 16k", "SDPA flash backend", 0.6, 0.8, False,
         beside(DENSE_16K, 16 * K, "sdpa flash", "longctx sm_80 path")),
        *(
            (f"FlexPrefill's selection, {length // K}k", "our own dense kernel", 0.03, None, True,
             lambda length=length: ratio(seconds(FLEXPREFILL, length, "selection"),
                                         seconds(FLEXPREFILL, length, "longctx dense")))
            for length in (32 * K, 128 * K)
        ),
        ("sparse kernel at density 1, 16k", "our own dense kernel", 1.02, None, True,
         lambda: ratio(seconds(SPARSE.format(1), 16 * K, "longctx"),
                       seconds(SPARSE.format(1), 16 * K, "longctx dense"))),
        ("linear attention, 8k, 96 heads, D=128", "an H200's memory, 0.187 ms", 0.65, 0.85, False,
         of_floor(linear, 8 * K)),
        ("the same with its backward", "an H200's memory, 0.655 ms", 0.5, 0.75, False,
         of_floor(linear_backward, 8 * K)),
        ("linear attention, 8k, 96 heads, D=128", "flash-linear-attention", 2, 2.7, False,
         beside(linear, 8 * K, "fla")),
        ("linear attention, 8 x 1k, 8 heads, D=64", "flash-linear-attention", 3, 8, False,
         beside(gpu_linear.LAUNCH_BOUND, K, "fla")),
        ("a step of Quest at 128k, batch 1, heads 32/8", "best dense SDPA backend", 6, 10, False,
         beside(gpu_topk.QUEST, 128 * K, "sdpa*")),
        ("the 2048 best of 128k scores, 8 rows", "microseconds", 25, 12, True,
         lambda: ratio(seconds(gpu_topk.ROWS.format("random"), 128 * K, "longctx"), 1e-6)),
        ("gather_attention over 256 MiB of pages of 16 keys", "measured copy bandwidth", 0.75, 0.9, False,
         of_copy(gpu_gather.PAGES)),
        ("gather_attention over 256 MiB of scattered keys", "measured copy bandwidth", 0.6, 0.75, False,
         of_copy(gpu_gather.TOKENS)),
    ]  # fmt: skip
    return [
        Target(work, beside_what, minimum, goal, measured(), at_most)
        for work, beside_what, minimum, goal, at_most, measured in rows
    ]
