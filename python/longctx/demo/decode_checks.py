"""What must hold for `longctx demo --decode` to succeed: its exit code."""

from __future__ import annotations

from longctx.demo.checks import Check
from longctx.demo.decode_measure import Decoded, DecodeTask
from longctx.demo.decode_rows import CacheRow


def all_checks(task: DecodeTask, rows: list[CacheRow], results: list[Decoded]) -> list[Check]:
    by_name = {row.name: row for row in rows}
    checks = [_finds_all([result for result in results if by_name[result.name].finds_all])]
    for result in results:
        reach = by_name[result.name].reach
        if reach is not None:
            checks.append(_control(task, result, reach))
    return [*checks, _reads_less(results)]


def _finds_all(results: list[Decoded]) -> Check:
    names = ", ".join(result.name for result in results)
    wrong = [f"{result.name} {sum(result.right)}/{len(result.right)}" for result in results if not all(result.right)]
    return Check(f"{names} find every needle", not wrong, "; ".join(wrong))


def _control(task: DecodeTask, result: Decoded, reach: int) -> Check:
    """What the window has passed is gone; what it holds is found."""
    expected = [question.reach + len(question.tokens) < reach for question in task.questions]
    detail = f"found {result.right}, inside the window {expected}"
    claim = f"{result.name} finds the needle inside it and none outside"
    return Check(
        claim, result.right == expected and len(set(expected)) == 2, "" if result.right == expected else detail
    )


def _reads_less(results: list[Decoded]) -> Check:
    selecting = [result for result in results if result.keys_stored and result.name != "Dense"]
    most = max(selecting, key=lambda result: result.keys_read / result.keys_stored)
    share = most.keys_read / most.keys_stored
    return Check("every method reads fewer keys than dense", share < 1.0, f"at most {share:.1%}, {most.name}")
