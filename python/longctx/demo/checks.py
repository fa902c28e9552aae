"""What must hold for the demo to succeed: its exit code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from longctx.demo.measure import Measurement
from longctx.demo.rows import DENSE, SDPA, WINDOW, WINDOW_ROW
from longctx.demo.task import Task

# Relative error of a layer's output (norm of the difference over norm) that rounding alone explains.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}


@dataclass(frozen=True)
class Check:
    claim: str
    passed: bool
    detail: str = ""


def all_checks(task: Task, rows: dict[str, Measurement]) -> list[Check]:
    """Every check that applies; those on needles only where the right answers are known."""
    ran = {name: row for name, row in rows.items() if not row.refused}
    checks = [*exact(task, [row for name, row in ran.items() if name != SDPA.name]), ran_on_our_ops(ran)]
    if task.main.expected is None:
        return checks
    refused = [row.refused for row in rows.values() if row.refused]
    return [
        dense_right(ran),
        window_control(ran[WINDOW_ROW.name]),
        absent_key(ran.values()),
        *checks,
        Check("every method ran", not refused, "; ".join(refused)),
    ]


def dense_right(rows: dict[str, Measurement]) -> Check:
    wrong = [
        f"{name} at {answer.trial.length} tokens, depth {answer.trial.depth}"
        for name in (SDPA.name, DENSE.name)
        for answer in rows[name].answers
        if answer.trial.kind != "absent" and not answer.right
    ]
    return Check("SDPA and Dense find every needle", not wrong, "; ".join(wrong))


def window_control(row: Measurement) -> Check:
    needles = [answer for answer in row.answers if answer.trial.kind != "absent"]
    unlike = [answer for answer in needles if answer.right != (answer.trial.reach < WINDOW)]
    both = {answer.trial.reach < WINDOW for answer in needles} == {True, False}
    detail = "; ".join(f"{answer.trial.reach} tokens back: right is {answer.right}" for answer in unlike)
    return Check(
        f"a window of {WINDOW} finds needles inside its reach and none outside",
        both and not unlike,
        detail if both else "the prompts do not test both sides",
    )


def absent_key(rows: Iterable[Measurement]) -> Check:
    """Dense attention says nothing; no row says what belongs to another key."""
    wrong = []
    for row in rows:
        for answer in row.answers:
            if answer.trial.kind == "absent":
                told = set(answer.tokens) & set(answer.trial.values)
                silent = answer.right or row.name not in (SDPA.name, DENSE.name)
                if told or not silent:
                    wrong.append(row.name)
    return Check("a key that is not in the text is not answered", not wrong, ", ".join(wrong))


def exact(task: Task, ours: list[Measurement]) -> list[Check]:
    tolerance = TOLERANCE[task.model.dtype]
    claims = {
        "full density": "each policy at full density equals Dense",
        "masked dense": "each policy equals a masked dense run from the formula",
    }
    checks = []
    for probe, claim in claims.items():
        errors = {row.name: row.exactness[probe] for row in ours if probe in row.exactness}
        worst = max(errors, key=lambda name: errors[name])
        passed = all(error <= tolerance for error in errors.values())
        checks.append(Check(f"{claim} (within {tolerance:g})", passed, f"largest error {errors[worst]:.1e}, {worst}"))
    return checks


def ran_on_our_ops(rows: dict[str, Measurement]) -> Check:
    wrong = []
    for row in rows.values():
        for answer in row.answers:
            if row.name == SDPA.name:
                fine = answer.sdpa_calls > 0
            else:
                sparse = answer.sparse_calls > 0 or row.name == DENSE.name
                fine = answer.sdpa_calls == 0 and answer.unreached_layers == 0 and sparse
            if not fine and row.name not in wrong:
                wrong.append(row.name)
    return Check("our ops ran in every layer and SDPA did not (and did in its own row)", not wrong, ", ".join(wrong))
