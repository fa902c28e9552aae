"""A stock `LlamaForCausalLM` whose weights are written down instead of trained: it retrieves by construction.

Layer 0 copies the two words before each word next to it (previous-token heads); layer 1 looks for a place where the
words before were the present ones (an induction head) and says the word that stood there, or says nothing (BOS) where
no place matches. The other heads attend to the first token, to near words, and to words of the same topic; what they
gather flows through scratch channels to the logits, too weak to turn an answer over.

The residual stream, 384 channels: own word | previous word | the one before | answer | constant | scratch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaAttention

HEAD_DIM = 128
HIDDEN = 384
CODE = 64  # signs a word
WORD = CODE + 1  # and a channel of its own for BOS, whose norm is that of any word: sqrt(64)
OWN, PREVIOUS, BEFORE, ANSWER = (slice(i * WORD, (i + 1) * WORD) for i in range(4))
CONSTANT = 4 * WORD
SCRATCH = slice(CONSTANT + 1, HIDDEN)
BOS = 0
MAX_VOCAB = 1 << 15

# RoPE rotates pair i of a head by theta^(-i / 64) a token: the first pairs turn fast enough to tell neighbours apart,
# from pair 31 on nothing turns by more than 0.2 rad within 128k tokens, so that content there ignores distance.
ROPE_THETA = 1e12
NUM_FAST = 28
BOS_PAIR = 31
CONTENT_PAIRS = slice(32, 64)

# The induction head adds the codes of two words, the second halved and with every second and third sign flipped. As
# codes overlap in at most 16 of 64 signs, and in at most 20 after the flip, a place that matches both words scores at
# least 64 + 16 - 20 = 60 and any other that does not match the first at most 16 + 16 + 20 = 52; BOS stands between.
SECOND = 0.5
NO_MATCH = 56.0
SHARPNESS = 2.0  # nats a unit of score

NORM = 32.0  # the constant channel: large, so that what heads write hardly changes the RMS norm


@dataclass(frozen=True, kw_only=True)
class Head:
    """One query head; all kinds read the same keys and values."""

    kind: str  # previous, before, induction, clustered, local, sink
    variant: int = 0  # heads of one kind differ in reach, strength and the words they take for one topic


def heads_of_layer(layer: int, num_heads: int) -> tuple[Head, ...]:
    """The heads of a layer: those that retrieve, then clustered, local and sink heads in turn."""
    retrieving = [Head(kind=kind) for kind in (("previous", "before") if layer == 0 else ("induction",))]
    others = ("clustered", "local", "sink")
    rest = [Head(kind=others[i % 3], variant=i // 3) for i in range(num_heads - len(retrieving))]
    return (*retrieving, *rest)


def word_codes(vocab_size: int) -> Tensor:
    """Float32 `[vocab_size, 65]`: +-1 codes of which any two differ in 24 to 40 of 64 signs; BOS is apart from all.

    Code `i` is the output of a 15-stage shift register started on the bits of `i` (the dual of a BCH code with zeros
    1, 5 and 9). The first 15 signs are the number of the word itself: words numbered by first appearance share the
    high ones with their topic.
    """
    if vocab_size > MAX_VOCAB:
        raise ValueError(f"longctx: the constructed model has codes for {MAX_VOCAB} words; got {vocab_size}")
    numbers = torch.arange(vocab_size)
    bits = [(numbers >> i) & 1 for i in range(15)]
    while len(bits) < CODE - 1:
        n = len(bits) - 15
        bits.append(sum(bits[n + tap] for tap in (0, 2, 7, 8, 9, 10, 12, 13)) % 2)  # type: ignore[arg-type]
    bits.append(torch.zeros_like(numbers))
    codes = torch.zeros(vocab_size, WORD)
    codes[:, :CODE] = 1.0 - 2.0 * torch.stack(bits, dim=1).float()
    codes[BOS] = 0.0
    codes[BOS, CODE] = math.sqrt(CODE)
    return codes


def retrieval_model(
    vocab_size: int,
    *,
    num_heads: int = 8,
    num_kv_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A two-layer `LlamaForCausalLM` that continues "... A B" with what followed "A B" before.

    Args:
        vocab_size: number of words, at most 32768; word 0 is BOS, which every prompt must start with and which is
            the answer where no place matches.
        num_heads: at least 2; the first two of layer 0 and the first of layer 1 retrieve.
        num_kv_heads: must divide `num_heads` (default: as many).
        dtype: of all weights; float32 or bfloat16 (8 bits suffice: codes are signs).
        seed: of the channels and signs in which heads differ that retrieval does not depend on.

    Returns:
        The model in eval mode, with the attention implementation that transformers chooses.

    Example:
        >>> from longctx.models.constructed import retrieval_model
        >>> model = retrieval_model(16)
        >>> prompt = torch.tensor([[0, 3, 7, 5, 9, 1, 2, 3, 7]])
        >>> model.generate(prompt, max_new_tokens=2, do_sample=False)[0, 9:].tolist()
        [5, 9]
    """
    from transformers import LlamaForCausalLM

    config = retrieval_config(vocab_size, num_heads, num_kv_heads)
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        codes = word_codes(vocab_size)
        model.model.embed_tokens.weight[:, OWN] = codes
        model.model.embed_tokens.weight[:, CONSTANT] = NORM
        for index, layer in enumerate(model.model.layers):
            # The norm of what stands in the residual so far: the heads then read plain signs.
            words = 1 if index == 0 else 3
            layer.input_layernorm.weight.fill_(_rms(words))
            layer.post_attention_layernorm.weight.fill_(1.0)
            _write_layer(layer.self_attn, index, heads_of_layer(index, num_heads), generator)
        model.model.norm.weight.fill_(_rms(4))
        # A right answer stands 12 nats above any other; the scratch channels move a logit by tenths.
        model.lm_head.weight[:, ANSWER] = 0.25 * codes
        model.lm_head.weight[:, SCRATCH] = 0.02 * torch.randn(vocab_size, HIDDEN - SCRATCH.start, generator=generator)
    model.to(dtype).eval()  # type: ignore[arg-type]
    return model


def retrieval_config(vocab_size: int, num_heads: int = 8, num_kv_heads: int | None = None) -> LlamaConfig:
    """The configuration of `retrieval_model`."""
    from transformers import LlamaConfig

    num_kv_heads = num_kv_heads or num_heads
    if num_heads < 2 or num_heads % num_kv_heads:
        raise ValueError(
            "longctx: the constructed model needs `num_heads` >= 2, a multiple of `num_kv_heads`; "
            f"got {num_heads} and {num_kv_heads}"
        )
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=1 << 17,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=BOS,
        pad_token_id=BOS,
    )


def _rms(words: int) -> float:
    return math.sqrt((NORM**2 + words * CODE) / HIDDEN)


def _write_layer(attention: LlamaAttention, layer: int, heads: tuple[Head, ...], generator: torch.Generator) -> None:
    """Writes the projections of one layer."""
    asked, offered = _content(layer)
    group_size = attention.num_key_value_groups
    q, k, v, o = [], [], [], []
    for kv_head in range(len(heads) // group_size):
        # Signs that cancel between q and k, and between v and o: no two kv heads are exchangeable.
        pair_signs = _signs(HEAD_DIM // 2, generator).repeat(2)[:, None]
        value_signs = _signs(HEAD_DIM, generator)[:, None]
        k.append(_key(offered) * pair_signs)
        v.append(_value() * value_signs)
        for head in heads[kv_head * group_size : (kv_head + 1) * group_size]:
            q.append(_query(head, asked) * pair_signs)
            o.append(_output(head, generator) * value_signs.T)
    for name, weight in (("q", torch.cat(q)), ("k", torch.cat(k)), ("v", torch.cat(v)), ("o", torch.cat(o, dim=1))):
        getattr(attention, f"{name}_proj").weight.copy_(weight)


def _content(layer: int) -> tuple[Tensor, Tensor]:
    """What a query asks about and a key offers, each `[CODE, HIDDEN]`: words as they are, or the words before them."""
    flips = torch.tensor([1.0, -1.0, -1.0]).repeat(CODE // 3 + 1)[:CODE]
    own, previous, before = (_read(part) for part in (OWN, PREVIOUS, BEFORE))
    if layer == 0:
        return own, own
    return own + SECOND * flips[:, None] * previous, previous + SECOND * flips[:, None] * before


def _read(part: slice) -> Tensor:
    """`[CODE, HIDDEN]`: the signs of one word of the residual stream."""
    weight = torch.zeros(CODE, HIDDEN)
    weight[:, part.start : part.start + CODE] = torch.eye(CODE)
    return weight


def _key(offered: Tensor) -> Tensor:
    """`[HEAD_DIM, HIDDEN]`: 1 in the first half of each fast pair, BOS in its pair, content in the slow pairs."""
    weight = torch.zeros(2, HEAD_DIM // 2, HIDDEN)
    weight[0, :NUM_FAST, CONSTANT] = 1.0 / NORM
    weight[0, BOS_PAIR, OWN.stop - 1] = 1.0 / math.sqrt(CODE)
    weight[:, CONTENT_PAIRS] = offered.view(2, CODE // 2, HIDDEN)
    return weight.view(HEAD_DIM, HIDDEN)


def _value() -> Tensor:
    """`[HEAD_DIM, HIDDEN]`: the word itself, then as much of the scratch channels as there is room for."""
    weight = torch.zeros(HEAD_DIM, HIDDEN)
    weight[:WORD, OWN] = torch.eye(WORD)
    room = HEAD_DIM - WORD
    weight[WORD:, SCRATCH.start : SCRATCH.start + room] = torch.eye(room)
    return weight


def _query(head: Head, asked: Tensor) -> Tensor:
    """`[HEAD_DIM, HIDDEN]`: scores in nats, hence times the square root that attention divides by."""
    weight = torch.zeros(2, HEAD_DIM // 2, HIDDEN)
    if head.kind in ("previous", "before"):
        # sum_i a_i cos(theta_i (distance - offset)): the next best distance is 0.75 * 24 = 18 nats behind.
        _write_kernel(weight, offset=1 if head.kind == "previous" else 2, first=0, gain=24.0, decay=8.0)
    elif head.kind == "induction":
        weight[:, CONTENT_PAIRS] = SHARPNESS * asked.view(2, CODE // 2, HIDDEN)
        weight[0, BOS_PAIR, CONSTANT] = SHARPNESS * NO_MATCH / NORM
    elif head.kind == "sink":
        # Most of the mass on the first token, the rest near by.
        weight[0, BOS_PAIR, CONSTANT] = (15.0 + head.variant % 3) / NORM
        _write_kernel(weight, offset=0, first=8, gain=1.0)
    elif head.kind == "local":
        # Equal amplitudes fall off like a power of the distance, from about 10^(first * 3 / 16) tokens on.
        _write_kernel(weight, offset=0, first=6 + 3 * head.variant % 9, gain=1.0)
    elif head.kind == "clustered":
        # The signs that carry the high bits of the words' numbers: e^-6 for each bit in which two topics differ.
        topic = torch.zeros(CODE, 1)
        topic[4 + head.variant % 3 : 13] = 3.0
        weight[:, CONTENT_PAIRS] = (topic * asked).view(2, CODE // 2, HIDDEN)
        _write_kernel(weight, offset=0, first=16 + 2 * head.variant % 6, gain=1.0)
    else:
        raise ValueError(f"unknown kind of head {head.kind!r}")
    return weight.view(HEAD_DIM, HIDDEN) * math.sqrt(HEAD_DIM)


def _write_kernel(weight: Tensor, *, offset: int, first: int, gain: float, decay: float = math.inf) -> None:
    """Adds a score that depends on the distance alone, largest at `offset`, from the fast pairs `first` and later."""
    pair = torch.arange(first, NUM_FAST)
    angle = offset * ROPE_THETA ** (-pair / (HEAD_DIM // 2))
    amplitude = gain * torch.exp(-pair / decay) / NORM
    weight[0, first:NUM_FAST, CONSTANT] = amplitude * angle.cos()
    weight[1, first:NUM_FAST, CONSTANT] = -amplitude * angle.sin()


def _output(head: Head, generator: torch.Generator) -> Tensor:
    """`[HIDDEN, HEAD_DIM]`: where a head writes what it gathered."""
    weight = torch.zeros(HIDDEN, HEAD_DIM)
    part = {"previous": PREVIOUS, "before": BEFORE, "induction": ANSWER}.get(head.kind)
    if part is not None:
        weight[part, :WORD] = torch.eye(WORD)
    else:
        num_scratch = HIDDEN - SCRATCH.start
        weight[SCRATCH] = torch.randn(num_scratch, HEAD_DIM, generator=generator) / math.sqrt(num_scratch)
    return weight


def _signs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1.0
