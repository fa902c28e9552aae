"""What must hold for `longctx demo --linear` to succeed: its exit code."""

from __future__ import annotations

from longctx.demo.checks import Check
from longctx.demo.linear_measure import DENSE, LINEAR, SDPA, Result

# Rounding of a float32 model in another order of sums.
TOLERANCE = 1e-4
# Times of equal work on a machine that does other things too; what grows with the length would be off by its ratio.
NOISE = 2.0
# Keys and values of such a model in float32, 3 layers of 128 channels, would take so much a character.
KEYS_AND_VALUES = 3 * 2 * 128 * 4
GROWTH = 32 << 20  # which the allocator may keep, where it is less than half of them


def all_checks(result: Result) -> list[Check]:
    return [loss_falls(result), exact(result), flat_rate(result), beats_dense(result), *constant(result)]


def loss_falls(result: Result) -> Check:
    bits = result.training.held_out
    detail = f"{bits[0]:.2f} before, {bits[-1]:.2f} after; frequencies of characters alone {result.entropy:.2f}"
    passed = bits[-1] < result.entropy and bits[-1] < bits[0]
    return Check("training makes unseen text cheaper, in bits a character", passed, detail)


def exact(result: Result) -> Check:
    claim = f"characters one at a time give the logits of one call (within {TOLERANCE:g})"
    return Check(claim, result.one_by_one_error <= TOLERANCE, f"relative error {result.one_by_one_error:.1e}")


def flat_rate(result: Result) -> Check:
    linear = result.of(LINEAR)
    first, last = linear[0], linear[-1]
    detail = f"{first.rate:,.0f} tokens/s at {first.length}, {last.rate:,.0f} at {last.length}"
    claim = f"linear attention keeps its rate from {first.length} to {last.length} tokens (within {NOISE:g}x)"
    return Check(claim, last.rate * NOISE >= first.rate, detail)


def beats_dense(result: Result) -> Check:
    linear = {timing.length: timing for timing in result.of(LINEAR)}
    pairs = [(timing, linear[timing.length]) for timing in (result.of(DENSE)[-1], result.of(SDPA)[-1])]
    detail = ", ".join(f"{theirs.seconds / ours.seconds:.0f}x {theirs.name} at {ours.length}" for theirs, ours in pairs)
    passed = all(ours.seconds < theirs.seconds for theirs, ours in pairs)
    return Check("linear attention is faster than dense where that ends", passed, detail)


def constant(result: Result) -> list[Check]:
    positions = result.positions
    span = f"from {positions[0].position} to {positions[-1].position} characters"
    times = [position.token_seconds for position in positions]
    sizes = {position.state_bytes for position in positions}
    grown = positions[-1].peak_bytes - positions[0].peak_bytes
    kept = KEYS_AND_VALUES * (positions[-1].position - positions[0].position)
    detail = f"by {grown / 2**20:.1f} MiB; keys and values would be {kept / 2**20:.0f}"
    return [
        Check(
            f"a character costs the same time {span} (within {NOISE:g}x)",
            max(times) <= NOISE * min(times),
            f"{min(times) * 1e3:.2f} to {max(times) * 1e3:.2f} ms",
        ),
        Check(f"the cache has one size {span}", len(sizes) == 1, f"{max(sizes) / 1024:.0f} KiB"),
        Check(f"the process does not grow {span}", grown <= min(GROWTH, kept / 2), detail),
    ]
