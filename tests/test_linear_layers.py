"""LightningAttention against its formula, transformers' MiniMax layer, and itself by chunks and tokens."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import sigmoid, silu

from checks import assert_same_bits
from longctx import linear, reference
from longctx.linear import LightningAttention, LightningState
from op_case import DTYPES, randn
from test_linear_attention import TOLERANCE, relative_error
from test_linear_decays import minimax_config

HIDDEN = 48
SHAPES: dict[str, dict[str, Any]] = {
    "transnormer": {},
    "grouped": {"num_kv_heads": 2},
    "lrpe": {"use_lrpe": True},
    "grouped lrpe": {"num_kv_heads": 1, "use_lrpe": True, "bias": True},
    "minimax": {"variant": "minimax", "head_dim": 20},
}


def layer_of(dtype: torch.dtype = torch.float32, **options: Any) -> LightningAttention:
    torch.manual_seed(0)
    log_decay = linear.transnormer_code_log_decay(4, layer_idx=1, num_layers=6)
    layer = LightningAttention(HIDDEN, 4, log_decay, **options)
    if isinstance(layer.norm, nn.RMSNorm):
        nn.init.normal_(layer.norm.weight)
    return layer.to(dtype).requires_grad_(False)


def inputs(seqlen: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    return randn(batch, seqlen, HIDDEN, dtype=dtype, seed=seqlen)


def formula(layer: LightningAttention, x: Tensor) -> Tensor:
    """The layer from the papers' formulas, in the dtype of its weights, around the recurrence of the twin."""
    batch, seqlen, _ = x.shape
    q, k, v, u = layer.qkvu_proj(x).split(layer.widths, dim=-1)
    q, k, v = (y.reshape(batch, seqlen, -1, layer.head_dim).transpose(1, 2) for y in (silu(q), silu(k), v))
    if layer.lrpe is not None:
        angle = torch.arange(seqlen)[:, None].double() * layer.lrpe.theta.double()
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        group_size = q.shape[1] // k.shape[1]
        q, k = (
            torch.cat([y * cos.repeat_interleave(n, 0), y * sin.repeat_interleave(n, 0)], dim=-1)
            for y, n in ((q, group_size), (k, 1))
        )
    minimax = layer.variant == "minimax"
    out, _ = reference.linear_attention(q, k, silu(v) if minimax else v, layer.log_decay)
    out = out.transpose(1, 2).reshape(batch, seqlen, -1)
    wide = out.double()
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    if minimax:
        normed = normed * layer.norm.weight.double()
    return layer.out_proj((sigmoid(u) if minimax else u) * normed.to(x.dtype))  # type: ignore[no-any-return]


def paths(layer: LightningAttention, x: Tensor) -> dict[str, tuple[Tensor, LightningState]]:
    """The same tokens in one call, in pieces, token by token, and as a prompt that decoding continues."""
    seqlen = x.shape[1]
    whole = layer(x)
    pieces, state = [], None
    for begin, end in ((0, 64), (64, 65), (65, 65), (65, seqlen)):
        out, state = layer(x[:, begin:end], state)
        pieces.append(out)
    assert state is not None
    tokens = layer.new_state(x.shape[0])
    steps = [layer.decode(x[:, t : t + 1], tokens) for t in range(seqlen)]
    prompt, mixed = layer(x[:, :70])
    drafts = [prompt] + [layer.decode(x[:, t : t + 3], mixed) for t in range(70, seqlen, 3)]
    return {
        "prefill": whole,
        "chunked prefill": (torch.cat(pieces, dim=1), state),
        "decode": (torch.cat(steps, dim=1), tokens),
        "prefill, then decode": (torch.cat(drafts, dim=1), mixed),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_in_one_in_chunks_and_by_token(dtype: torch.dtype, shape: str) -> None:
    layer, x = layer_of(dtype, **SHAPES[shape]), inputs(130, dtype)
    exact = formula(layer_of(dtype, **SHAPES[shape]).double(), x.double())
    # What the projections cost in this dtype, and what the op may add.
    tolerance = relative_error(formula(layer, x), exact) + TOLERANCE[dtype]
    results = paths(layer, x)
    key_dim = layer.head_dim * (2 if layer.lrpe is not None else 1)
    for name, (out, state) in results.items():
        assert out.dtype == dtype
        assert relative_error(out, exact) <= tolerance, f"{name}: {relative_error(out, exact):.1e} > {tolerance:.1e}"
        assert state.kv.shape == (2, 4, key_dim, layer.head_dim)
        assert state.kv.dtype == torch.promote_types(dtype, torch.float32)
        assert relative_error(state.kv, results["prefill"][1].kv) <= 2 * tolerance, name
        assert state.num_tokens.tolist() == [130, 130]


@pytest.mark.parametrize("split", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_of_64_resume_bitwise(shape: str, split: int) -> None:
    """With projections whose sums are exact (small integers over a power of two), in any order of terms."""
    layer, x = layer_of(**SHAPES[shape]), inputs(150).mul(2).round()
    for parameter in layer.qkvu_proj.parameters():
        parameter.copy_(parameter.mul(8).round() / 8)
    layer.out_proj = PassThrough(layer.out_proj.weight)  # type: ignore[assignment]
    out, state = layer(x, num_segments=1)
    first, between = layer(x[:, :split], num_segments=1)
    rest, last = layer(x[:, split:], between, num_segments=1)
    assert_same_bits((torch.cat([first, rest], dim=1), last.kv), (out, state.kv))


class PassThrough(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("shape", SHAPES)
def test_no_output_sees_the_future_or_another_sequence(shape: str) -> None:
    layer, x = layer_of(**SHAPES[shape]), inputs(100)
    out, _ = layer(x, num_segments=1)
    changed = x.clone()
    changed[:, 70:] = 100.0
    changed[1] = 100.0
    again, _ = layer(changed, num_segments=1)
    assert_same_bits(again[0, :70], out[0, :70])
    assert (again[0, 70:] != out[0, 70:]).any()


def test_sequences_stand_at_their_own_positions() -> None:
    """States after prompts of different lengths, in one batch."""
    layer, x = layer_of(use_lrpe=True), inputs(40)
    states = [layer(x[b : b + 1, :length])[1] for b, length in enumerate((11, 30))]
    joined = LightningState(
        kv=torch.cat([state.kv for state in states]), num_tokens=torch.cat([state.num_tokens for state in states])
    )
    after = torch.stack([x[0, 11:14], x[1, 30:33]])
    out = layer.decode(after, joined)
    for b, state in enumerate(states):
        torch.testing.assert_close(out[b : b + 1], layer.decode(after[b : b + 1], state), rtol=0, atol=1e-6)
    assert joined.num_tokens.tolist() == [14, 33]


def test_only_decode_changes_a_state() -> None:
    layer, x = layer_of(), inputs(80)
    _, state = layer(x[:, :70])
    before = state.clone()
    out, _ = layer(x[:, 70:71], state)
    assert_same_bits((state.kv, state.num_tokens), (before.kv, before.num_tokens))
    branch = state.clone()
    torch.testing.assert_close(layer.decode(x[:, 70:71], branch), out, rtol=0, atol=1e-6)
    assert_same_bits((state.kv, state.num_tokens), (before.kv, before.num_tokens))
    assert (branch.kv != before.kv).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_in_nothing_out(shape: str) -> None:
    layer = layer_of(**SHAPES[shape])
    out, state = layer(inputs(0))
    assert out.shape == (2, 0, HIDDEN)
    assert not state.kv.any()
    assert not state.num_tokens.any()
    out, state = layer(inputs(5)[:0])
    assert out.shape == (0, 5, HIDDEN)
    assert state.kv.shape[0] == 0


def test_minimax_layer_is_that_of_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax", reason="transformers is missing")
    torch.manual_seed(0)
    stock = modeling.MiniMaxLightningAttention(minimax_config(4, 6), layer_idx=2).requires_grad_(False)
    nn.init.normal_(stock.norm.weight)
    log_decay = linear.minimax_log_decay(4, layer_idx=2, num_layers=6)
    layer = LightningAttention(HIDDEN, 4, log_decay, head_dim=20, variant="minimax").requires_grad_(False)
    # Theirs is [heads, (q, k, v), head_dim], ours [(q, k, v), heads, head_dim].
    qkv = stock.qkv_proj.weight.view(4, 3, 20, HIDDEN).transpose(0, 1).reshape(-1, HIDDEN)
    layer.qkvu_proj.weight.copy_(torch.cat([qkv, stock.output_gate.weight]))
    layer.norm.load_state_dict(stock.norm.state_dict())
    layer.out_proj.load_state_dict(stock.out_proj.state_dict())

    x, cache = inputs(103), modeling.MiniMaxCache()
    out, state = layer(x[:, :100])
    expected, kv = stock(x[:, :100], None, None, cache)
    assert relative_error(out, expected) < 1e-5
    assert relative_error(state.kv, kv) < 1e-5
    for t in range(100, 103):
        expected, kv = stock(x[:, t : t + 1], None, None, cache)
        assert relative_error(layer.decode(x[:, t : t + 1], state), expected) < 1e-5
        assert relative_error(state.kv, kv) < 1e-5


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_gradients(options: dict[str, Any]) -> None:
    """Of the inputs, a state and every parameter, through the output and the state behind it."""
    layer = layer_of(torch.float64, **options).requires_grad_(True)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = inputs(3, torch.float64, batch=1).requires_grad_()
    kv = randn(*layer.new_state(1).kv.shape, dtype=torch.float64, seed=1).requires_grad_()

    def call(x: Tensor, kv: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        state = LightningState(kv=kv, num_tokens=torch.tensor([7]))
        out, after = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, state))
        return out, after.kv

    assert torch.autograd.gradcheck(call, (x, kv, *parameters), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_trains(dtype: torch.dtype) -> None:
    """A few steps on one batch: the loss falls in every dtype."""
    layer = layer_of(dtype, use_lrpe=True).requires_grad_(True)
    x, target = inputs(100, dtype), randn(2, 100, HIDDEN, dtype=torch.float32, seed=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses = []
    for _ in range(5):
        loss = (layer(x)[0].float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_decode_refuses_gradients() -> None:
    layer, x = layer_of().requires_grad_(True), inputs(5)
    state = layer.new_state(2)
    with pytest.raises(NotImplementedError, match="longctx::linear_attention_decode has no backward"):
        layer.decode(x, state)
    assert not state.kv.any()
    assert not state.num_tokens.any()
    with torch.no_grad():
        layer.decode(x, state)
    assert state.num_tokens.tolist() == [5, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cast_keeps_decays_and_angles(dtype: torch.dtype) -> None:
    layer = layer_of(use_lrpe=True)
    assert layer.lrpe is not None
    before = layer.log_decay.clone(), layer.lrpe.theta.detach().clone()
    layer.to(dtype)
    assert layer.qkvu_proj.weight.dtype == dtype
    assert_same_bits((layer.log_decay, layer.lrpe.theta.detach()), before)
    layer.double().to(dtype).float()
    assert_same_bits((layer.log_decay, layer.lrpe.theta.detach()), before)
    out, _ = layer(inputs(5))
    assert out.dtype == torch.float32


def test_saves_and_loads_through_meta() -> None:
    layer, x = layer_of(use_lrpe=True, variant="minimax"), inputs(30)
    with torch.device("meta"):
        other = LightningAttention(HIDDEN, 4, torch.empty(4), use_lrpe=True, variant="minimax")
    other.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert_same_bits(other.requires_grad_(False)(x)[0], layer(x)[0])


def test_layers_do_not_share_a_decay() -> None:
    log_decay = linear.retnet_log_decay(4)
    first, second = (LightningAttention(HIDDEN, 4, log_decay) for _ in range(2))
    with torch.no_grad():
        first.log_decay.zero_()
    assert_same_bits(second.log_decay, linear.retnet_log_decay(4))


DECAY = torch.full((4,), -0.5)
BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({"num_heads": 0}, "`num_heads` must be at least 1; got 0"),
    "uneven heads": ({"hidden_size": 50}, "`hidden_size` must be a multiple of num_heads = 4 where head_dim is not"),
    "uneven groups": ({"num_kv_heads": 3}, "`num_kv_heads` must divide num_heads = 4; got 3"),
    "no groups": ({"num_kv_heads": 0}, "`num_kv_heads` must divide num_heads = 4; got 0"),
    "no head_dim": ({"head_dim": 0}, "`head_dim` must be at least 1; got 0"),
    "unknown variant": ({"variant": "retnet"}, "`variant` must be one of transnormer, minimax; got 'retnet'"),
    "slopes": ({"log_decay": -DECAY}, "`log_decay` must be <= 0; got [0.5, 0.5, 0.5, 0.5]"),
    "not a number": ({"log_decay": DECAY * torch.nan}, "`log_decay` must be <= 0; got [nan, nan, nan, nan]"),
    "decay shape": ({"log_decay": DECAY[:3]}, "`log_decay` must be float32 of shape [num_heads] = [4]; got"),
    "decay dtype": ({"log_decay": DECAY.bfloat16()}, "`log_decay` must be float32 of shape [num_heads] = [4]; got"),
}


@pytest.mark.parametrize("why", BAD_OPTIONS)
def test_bad_options(why: str) -> None:
    options, message = BAD_OPTIONS[why]
    with pytest.raises(ValueError, match=re.escape(f"longctx::LightningAttention: {message}")):
        LightningAttention(**{"hidden_size": HIDDEN, "num_heads": 4, "log_decay": DECAY} | options)


@pytest.mark.parametrize("call", ["forward", "decode"])
def test_bad_inputs_leave_the_state_alone(call: str) -> None:
    layer, x = layer_of(), inputs(3)
    good = layer.new_state(2)
    for bad_x in (x[0], x[..., :40], x[..., None]):
        with pytest.raises(ValueError, match=r"longctx::LightningAttention: `x` must have shape"):
            getattr(layer, call)(bad_x, good)
    for field, value in (
        ("kv", good.kv[:1]),
        ("kv", good.kv[:, :2]),
        ("kv", good.kv[..., :5]),
        ("num_tokens", good.num_tokens[:1]),
        ("num_tokens", good.num_tokens.int()),
    ):
        state = good.clone()
        setattr(state, field, value)
        with pytest.raises(ValueError, match=rf"longctx::LightningAttention: `state.{field}` must"):
            getattr(layer, call)(x, state)
    state = LightningState(kv=good.kv.double(), num_tokens=good.num_tokens)
    with pytest.raises(ValueError, match="state` must have dtype float32; got float64"):
        getattr(layer, call)(x, state)
    assert not good.kv.any()
    assert not good.num_tokens.any()
