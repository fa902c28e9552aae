"""Compares an op with its float64 twin under the accuracy rule, and records that it did."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import support_matrix
import target
from cases import CASES
from longctx.reference._mask import listed_keys, visible_keys
from longctx.reference.gather_attention import Selection, from_pages, rotated, selected_keys, token_positions
from longctx.testing import active_isa, error_ratio, unit_in_last_place
from op_case import Call

SEQUENCE_OPTIONS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
MASK_OPTIONS = (
    "causal", "window_size_left", "window_size_right", "num_sink_tokens", "key_ranges", *SEQUENCE_OPTIONS,
)  # fmt: skip
# PyTorch's CPU flash attention takes a fast exponential on 16-bit inputs: its lse is off by up to this (measured).
LSE_ERROR_16_BIT = 6e-5
BLOCK_OPTIONS = ("block_indptr", "block_indices", "block_size_q", "block_size_k")


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_same_bits(actual: Any, expected: Any) -> None:
    for a, b in zip(as_tuple(actual), as_tuple(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_same_result(op: str, actual: Any, expected: Any) -> None:
    """Of a call whose layout alone differs: the same bits, unless it decides which of a GPU's two kernels serves."""
    if target.name == "cuda" and op in ("attention", "block_sparse_attention"):
        assert_equal_to_rounding(actual, expected)
    else:
        assert_same_bits(actual, expected)


def pick(call: Call, names: tuple[str, ...]) -> Call:
    return {name: call[name] for name in names if name in call}


ALWAYS_FLOAT32 = frozenset({"bias", "key_scores", "rope_cos_sin", "sinks"})


def in_float64(call: Call) -> Call:
    """The same call with its floating-point inputs in float64, but for those that are float32 in every call."""
    wide = {name for name, value in call.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return {name: value.double() if name in wide - ALWAYS_FLOAT32 else value for name, value in call.items()}


def selection(call: Call) -> Selection:
    """What a gather_attention call adds to its scores, and where its keys stand."""
    options = {"block_size_k": 1, "num_first": 0, "num_last": 0, "k_position_step": 1}
    options |= dict.fromkeys(("counts", "bias", "tree_mask", "k_positions", "q_positions", "seqused_k"))
    options |= pick(call, tuple(options))
    options["num_positions"] = None if call.get("rope_cos_sin") is None else len(call["rope_cos_sin"])
    sizes = {"num_q_heads": call["q"].shape[1], "seqlen_q": call["q"].shape[2], "seqlen_k": call["k"].shape[2]}
    return selected_keys(call["indices"], **sizes, **options)


def added_scores(call: Call) -> Tensor:
    """Bias where a key is selected, else -inf."""
    return call["added"] if "added" in call else selection(call).added


def rotated_rows(call: Call, dtype: torch.dtype) -> Call:
    """The call with q and k rotated in `dtype` beforehand, each row of q a batch entry."""
    q, k, v = (call[name].to(dtype) for name in ("q", "k", "v"))
    added, positions, _ = selection(call)
    batch, heads, seqlen_q, seqlen_k = added.shape
    rows, table = batch * heads * seqlen_q, call["rope_cos_sin"]
    stands_at = token_positions(batch, seqlen_q, seqlen_k, call.get("q_positions"), call.get("seqused_k"))
    q = rotated(q, stands_at[:, None].expand(q.shape[:3]), table)
    k, v = (t.repeat_interleave(heads // t.shape[1], dim=1)[:, :, None] for t in (k, v))
    k = rotated(k.expand(*positions.shape, -1), positions, table)
    v = v.expand(*positions.shape, -1)
    keys = {"k": k.reshape(rows, 1, seqlen_k, -1), "v": v.reshape(rows, 1, seqlen_k, -1)}
    return call | keys | {"q": q.reshape(rows, 1, 1, -1), "added": added.view(rows, 1, 1, seqlen_k)}


def unpaged(call: Call) -> Call:
    """The call on keys gathered from their pages."""
    if call.get("page_table") is None:
        return call
    keys = {name: from_pages(call[name], call["page_table"], call["seqused_k"]) for name in ("k", "v")}
    return {name: value for name, value in (call | keys).items() if name != "page_table"}


def mask_of(call: Call) -> Tensor:
    """bool [batch, num_q_heads or 1, seqlen_q, seqlen_k]: the keys that each row of an attention call sees."""
    q, k = call["q"], call["k"]
    if "indices" in call:
        return ~torch.isneginf(added_scores(call))
    sizes = {"batch": q.shape[0], "seqlen_q": q.shape[2], "seqlen_k": k.shape[2]}
    mask = visible_keys(**sizes, **({"causal": True} | pick(call, MASK_OPTIONS)))[:, None]
    if "block_indptr" in call:
        mask = mask & listed_keys(
            **pick(call, BLOCK_OPTIONS), **sizes, num_q_heads=q.shape[1], **pick(call, SEQUENCE_OPTIONS)
        )
    return mask


def pytorch_attention(call: Call, mask: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch in the same dtype: SDPA where it has the options, masked math where not."""
    q = call["q"]
    group_size = q.shape[1] // call["k"].shape[1]
    k, v = (call[name].nan_to_num().repeat_interleave(group_size, dim=1) for name in ("k", "v"))
    scale = q.shape[3] ** -0.5 if call.get("softmax_scale") is None else call["softmax_scale"]
    softcap, sinks = call.get("softcap", 0.0), call.get("sinks")
    sees_none = ~mask.any(dim=-1, keepdim=True)
    bias = added_scores(call).nan_to_num(neginf=0.0) if call.get("bias") is not None else None
    bias = bias.flip(3) if bias is not None and call.get("flipped") else bias

    def logits(queries: Tensor, keys: Tensor) -> Tensor:
        scores = scale * (queries @ keys.transpose(2, 3))
        scores = softcap * torch.tanh(scores / softcap) if softcap > 0.0 else scores
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        return scores.masked_fill(~(mask | sees_none), -torch.inf)

    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.logsumexp(logits(q.to(wide), k.to(wide)), dim=-1)
    lse += LSE_ERROR_16_BIT if wide != q.dtype else 0.0
    if softcap > 0.0 or sinks is not None or bias is not None:
        scores = logits(q, k)
        if sinks is not None:
            column = sinks.to(q.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], dim=-1)
        out = torch.softmax(scores, dim=-1)[..., : k.shape[2]] @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | sees_none, scale=scale)
    return out.masked_fill(sees_none, 0.0), lse


def peers_of(call: Call, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """PyTorch with dims and keys in either order: on few elements a single order is luck."""
    for dims, keys in itertools.product(((), (3,)), ((), (2,))):
        reordered = {"q": call["q"].flip(dims), "k": call["k"].flip(dims + keys), "v": call["v"].flip(keys)}
        yield pytorch_attention(call | reordered | {"flipped": bool(keys)}, mask.flip(3) if keys else mask)


def extended_attention(call: Call, mask: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """`(out, lse)` by the formula in extended precision, without regard to overflow."""
    q, k, v = (call[name].double().nan_to_num().numpy().astype(np.longdouble) for name in ("q", "k", "v"))
    group_size = q.shape[1] // k.shape[1]
    k, v = k.repeat(group_size, axis=1), v.repeat(group_size, axis=1)
    visible = mask.numpy()
    scale = q.shape[3] ** -0.5 if call.get("softmax_scale") is None else call["softmax_scale"]
    scores = scale * (q @ k.swapaxes(2, 3))
    if call.get("softcap", 0.0) > 0.0:
        scores = call["softcap"] * np.tanh(scores / call["softcap"])
    if call.get("bias") is not None:
        scores = scores + added_scores(call).nan_to_num(neginf=0.0).numpy()
    weights = np.exp(scores, where=visible, out=np.zeros_like(scores))
    mass = weights.sum(axis=-1, keepdims=True)
    sinks = 0 if call.get("sinks") is None else np.exp(call["sinks"].numpy().astype(np.longdouble)[:, None, None])
    out = weights @ v / np.maximum(mass + sinks, np.finfo(np.longdouble).tiny)
    return out, np.log(mass, where=mass > 0, out=np.full_like(mass, -np.inf))[..., 0]


def residuals(extended: tuple[np.ndarray, np.ndarray], exact: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
    """What `exact`, in float64, misses: a float64 op is as accurate as its twin, which alone cannot judge it."""
    for truth, double in zip(extended, exact, strict=True):
        missed = np.subtract(truth, double.numpy(), where=np.isfinite(truth), out=np.zeros_like(truth))
        yield torch.from_numpy(missed.astype(np.float64))


def check_attention(op: str, call: Call, **keywords: Any) -> tuple[Tensor, Tensor]:
    """Runs an attention op on `call`, compares `out` and `lse` with the twin, and returns them."""
    call = call | keywords
    case = CASES[op]
    out, lse = case.op(**call)
    exact_out, exact_lse = case.twin(**in_float64(call))
    assert out.dtype == call["q"].dtype
    assert lse.dtype == torch.promote_types(out.dtype, torch.float32)
    record(op, out.dtype, call["q"].shape[3])
    wide = call = unpaged(call)
    returned = out, lse
    if call.get("rope_cos_sin") is not None:
        out, lse, exact_out, exact_lse = (
            t.reshape(lse.numel(), 1, 1, *t.shape[3:]) for t in (out, lse, exact_out, exact_lse)
        )
        call, wide = rotated_rows(call, out.dtype), rotated_rows(call, torch.float64)
    mask = mask_of(call).expand(*lse.shape, call["k"].shape[2])
    peers_out, peers_lse = zip(*peers_of(call, mask), strict=True)
    missed_out, missed_lse = residuals(extended_attention(wide, mask), (exact_out, exact_lse))
    assert_accurate("out", out, exact_out, *peers_out, residual=missed_out)

    empty = torch.isneginf(exact_lse)
    assert torch.equal(torch.isneginf(lse), empty), "lse is -inf exactly where a row sees no key"
    assert not out[empty].any(), "a row that sees no key gives 0"
    seen = [tensor[~empty] for tensor in (lse, exact_lse, *peers_lse)]
    assert_accurate("lse", *seen, residual=missed_lse[~empty])
    return returned


def assert_accurate(name: str, actual: Tensor, exact: Tensor, *peers: Tensor, residual: Tensor | None = None) -> None:
    ratio = error_ratio(actual, exact, *peers, residual=residual)
    assert ratio <= 1.0, f"the error of {name} is {ratio:.2f} times what the accuracy rule allows"


def assert_equal_to_rounding(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """`(out, lse)` of the same formula computed in another order: a few units in the last place of the largest."""
    for name, a, b in zip(("out", "lse"), actual, expected, strict=True):
        assert torch.equal(torch.isneginf(a), torch.isneginf(b)), name
        finite = b.where(b.isfinite(), 0)
        slack = 2 * LSE_ERROR_16_BIT if actual[0].dtype.itemsize == 2 and name == "lse" else 0.0
        atol = slack + 8 * unit_in_last_place(float(finite.abs().max()) if b.numel() else 0.0, b.dtype)
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def record(op: str, dtype: torch.dtype, head_dim: int = 0, direction: str = "forward") -> None:
    if op not in target.ops:  # it ran on the kernels of the CPU
        return
    name = str(dtype).removeprefix("torch.")
    isa = active_isa() if direction == "forward" and target.name == "cpu" else "-"
    support_matrix.record(support_matrix.Entry(op, target.label(), name, direction, isa, head_dim))
