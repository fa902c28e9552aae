"""LM-Infinite against its definition: every pair of query and key rotated to the distance that the method gives it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longctx.prefill import AttentionContext, Dense, LMInfinite
from longctx.prefill.lminfinite import rerotate
from op_case import int32, randn
from policy_cases import documents, left_padded, rope

GLOBAL, WINDOW = 5, 24


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Llama's rotary embedding of the first 12 of 16 channels; x [batch, heads, n, 16], positions [batch, n]."""
    cos, sin = (t[:, None].to(x.dtype) for t in rope(positions))
    first, second = x[..., :6], x[..., 6:12]
    rotated = torch.cat(
        [first * cos[..., :6] - second * sin[..., :6], second * cos[..., :6] + first * sin[..., :6]], -1
    )
    return torch.cat([rotated, x[..., 12:]], -1)


def naive(q: Tensor, k: Tensor, v: Tensor, *, first_key: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
    """q, k not yet rotated; `first_key` [seqlen_q] is the first key that a query may see. One pair at a time."""
    batch, heads, len_q, dim = q.shape
    len_k = k.shape[2]
    out = torch.zeros(batch, heads, len_q, v.shape[3], dtype=torch.float64)
    zero = torch.zeros(batch, 1, dtype=torch.int64)
    k_at_zero = rotate(k.double(), zero.expand(-1, len_k))
    at_distance = [rotate(q.double(), zero.expand(-1, len_q) + d) for d in range(WINDOW + 1)]
    for i in range(len_q):
        position = i + len_k - len_q
        start = 0 if first_key is None else int(first_key[i])
        seen = [j for j in range(start, position + 1) if position - j < WINDOW or j - start < GLOBAL]
        for b in range(batch):
            for h in range(heads):
                key = [k_at_zero[b, h * k.shape[1] // heads, j] for j in seen]
                query = [at_distance[min(position - j, WINDOW)][b, h, i] for j in seen]
                scores = torch.stack([a @ c for a, c in zip(query, key, strict=True)]) * dim**-0.5
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h, None].double()])
                weights = torch.softmax(scores, 0)[: len(seen)]
                out[b, h, i] = weights @ v[b, h * k.shape[1] // heads, seen].double()
    return out


def inputs(batch: int, len_q: int, len_k: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        3.0 * randn(batch, 4, len_q, 16, seed=1),
        randn(batch, 2, len_k, 16, seed=2),
        randn(batch, 2, len_k, 8, seed=3),
    )


def arange(batch: int, first: int, last: int) -> Tensor:
    return torch.arange(first, last).expand(batch, -1)


POLICY = LMInfinite(num_global_tokens=GLOBAL, window_size=WINDOW)


@pytest.mark.parametrize("shape", [(2, 70, 70), (1, 20, 90), (1, 1, 60), (1, 10, 10)])
def test_equals_every_pair_rotated(shape: tuple[int, int, int]) -> None:
    batch, len_q, len_k = shape
    q, k, v = inputs(*shape)
    out, lse = POLICY(rotate(q, arange(batch, len_k - len_q, len_k)), rotate(k, arange(batch, 0, len_k)), v, rope=rope)
    torch.testing.assert_close(out.double(), naive(q, k, v), rtol=1e-4, atol=1e-4)
    assert bool(lse.isfinite().all())


def test_short_prompts_are_dense() -> None:
    q, k, v = inputs(2, WINDOW, WINDOW)
    expected = Dense()(q, k, v)
    for actual, dense in zip(POLICY(q, k, v, rope=rope), expected, strict=True):
        torch.testing.assert_close(actual, dense, rtol=1e-5, atol=1e-5)


def test_positions_need_not_start_at_zero() -> None:
    """A prompt at positions 1000 and on, as they are in the context."""
    q, k, v = inputs(2, 60, 60)
    positions = arange(2, 1000, 1060)
    out, _ = POLICY(rotate(q, positions), rotate(k, positions), v, rope=rope, positions=positions)
    torch.testing.assert_close(out.double(), naive(q, k, v), rtol=1e-3, atol=1e-3)


def test_padding_on_the_left() -> None:
    """Real tokens count from 0, and the first real ones are global."""
    q, k, v = inputs(2, 70, 70)
    padding = torch.tensor([[13], [0]])
    positions = (arange(2, 0, 70) - padding).clamp(min=0)
    ranges = left_padded(2, 70, [13, 0])
    out, lse = POLICY(rotate(q, positions), rotate(k, positions), v, rope=rope, positions=positions, key_ranges=ranges)
    for b, length in enumerate((13, 0)):
        one = slice(b, b + 1)
        alone = naive(q[one, :, length:], k[one, :, length:], v[one, :, length:])
        torch.testing.assert_close(out[one, :, length:].double(), alone, rtol=1e-4, atol=1e-4)
    assert bool((lse[0, :, :13] == -torch.inf).all())


def test_documents_have_their_own_global_tokens() -> None:
    q, k, v = inputs(1, 80, 80)
    positions = torch.cat([arange(1, 0, 30), arange(1, 0, 50)], 1)
    context = {"rope": rope, "positions": positions, "key_ranges": documents(80, [30])}
    out, _ = POLICY(rotate(q, positions), rotate(k, positions), v, **context)
    first_key = torch.tensor([0] * 30 + [30] * 50)
    torch.testing.assert_close(out.double(), naive(q, k, v, first_key=first_key), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", [False, True], ids=["counted", "given"])
def test_packed_sequences(given: bool) -> None:
    q, k, v = inputs(1, 85, 100)
    cu_q, cu_k = int32(0, 40, 40, 85), int32(0, 40, 40, 100)
    q_positions = torch.cat([arange(1, 0, 40), arange(1, 15, 60)], 1)
    k_positions = torch.cat([arange(1, 0, 40), arange(1, 0, 60)], 1)
    context = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "rope": rope, "positions": k_positions if given else None}
    out, _ = POLICY(rotate(q, q_positions), rotate(k, k_positions), v, **context)
    for rows, keys in ((slice(0, 40), slice(0, 40)), (slice(40, 85), slice(40, 100))):
        alone = naive(q[:, :, rows], k[:, :, keys], v[:, :, keys])
        torch.testing.assert_close(out[:, :, rows].double(), alone, rtol=1e-4, atol=1e-4)


def test_static_cache() -> None:
    q, k, v = inputs(1, 20, 60)
    padded = [torch.nn.functional.pad(t, (0, 0, 0, 30), value=float("nan")) for t in (rotate(k, arange(1, 0, 60)), v)]
    out, _ = POLICY(rotate(q, arange(1, 40, 60)), *padded, rope=rope, seqused_k=int32(60))
    torch.testing.assert_close(out.double(), naive(q, k, v), rtol=1e-4, atol=1e-4)


def test_sinks_count_once() -> None:
    q, k, v = inputs(1, 60, 60)
    sinks = randn(4, seed=9)
    positions = arange(1, 0, 60)
    out, lse = POLICY(rotate(q, positions), rotate(k, positions), v, rope=rope, sinks=sinks)
    torch.testing.assert_close(out.double(), naive(q, k, v, sinks=sinks), rtol=1e-4, atol=1e-4)
    assert torch.equal(lse, POLICY(rotate(q, positions), rotate(k, positions), v, rope=rope)[1])


def test_bfloat16_rotates_in_float32() -> None:
    """Rotating there and back costs no more than the rounding of the input."""
    x = randn(1, 2, 50, 16, seed=1).bfloat16()
    positions = arange(1, 5000, 5050)
    back = rerotate(rerotate(x, positions, positions * 0, rope), positions * 0, positions, rope)
    assert back.dtype == torch.bfloat16
    torch.testing.assert_close(back, x, rtol=2e-2, atol=2e-2)


def test_a_scaled_rotation_is_undone() -> None:
    """Attention scaling as part of cos and sin, as YaRN has it: removed and applied again."""
    x, positions = randn(1, 2, 50, 16, seed=1), arange(1, 0, 50)

    def scaled(p: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rope(p)
        return 1.3 * cos, 1.3 * sin

    rotated = rerotate(x, positions, positions + 7, rope)
    torch.testing.assert_close(rerotate(x, positions, positions + 7, scaled), rotated, rtol=1e-4, atol=1e-4)


def test_mask_is_sinks_and_window() -> None:
    q, k, _ = inputs(1, 70, 70)
    mask = POLICY.select(q, k, AttentionContext(rope=rope)).to_mask()[0, 0]
    i, j = torch.arange(70)[:, None], torch.arange(70)
    assert torch.equal(mask, (j <= i) & ((i - j < WINDOW) | (j < GLOBAL)))


def test_needs_rope() -> None:
    q, k, v = inputs(1, 30, 30)
    assert POLICY.needs == {"rope"}
    with pytest.raises(ValueError, match="longctx::lminfinite: `rope` must be given in the context; got None"):
        POLICY(q, k, v)
