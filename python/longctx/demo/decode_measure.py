"""One prefill, then every cache answers the same questions about it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import longctx
from longctx.cache import CallContext, DenseCache, LongctxCache, LongctxLayer, TieredQuestCache
from longctx.cache.cache import CACHE_NAME
from longctx.demo.decode_rows import CacheRow
from longctx.demo.measure import timed_forwards
from longctx.demo.task import ModelSpec

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class Question:
    """Words after the context, and the words that answer them."""

    tokens: tuple[int, ...]
    expected: tuple[int, ...]
    depth: float  # of the needle in the context, 0 to 1
    reach: int  # tokens from the needle's key to the end of the context


@dataclass(frozen=True)
class DecodeTask:
    """A context and questions asked once it is in the cache: no method knows them while it reads."""

    model: ModelSpec
    context: tuple[int, ...]
    questions: tuple[Question, ...]
    source: str
    sha256: str


@dataclass
class Decoded:
    """All that is known of one row."""

    name: str
    right: list[bool] = field(default_factory=list)  # a question each
    token_seconds: float = 0.0  # median over the tokens of all answers
    fill_seconds: float = 0.0  # to take the context over, summaries and clusters included
    keys_read: float = 0.0  # a token, layer and kv head
    keys_stored: float = 0.0  # of
    hit_rate: float | None = None  # of pages wanted, those that were in memory; None: everything is


@dataclass(frozen=True)
class Past:
    """What one layer computed of the context: `[1, heads, tokens, head_dim]` each."""

    q: Tensor
    k: Tensor
    v: Tensor


class _Recorder(LongctxLayer):
    """A dense layer that keeps the queries of the prefill too."""

    def prefilled(self, q: Tensor, k: Tensor, v: Tensor, context: CallContext) -> None:
        self.past = Past(q, k, v)


class _RecorderCache(DenseCache):
    name = "demo_recorder"

    def __init__(self, config: Any) -> None:
        LongctxCache.__init__(self, config, _Recorder, {}, None)


def prefill(model: PreTrainedModel, context: tuple[int, ...]) -> list[Past]:
    """Dense attention over the context, once for all rows."""
    cache = _RecorderCache(model.config)
    model(torch.tensor([context]), **cache.as_argument(), logits_to_keep=1)
    return [layer.past for layer in cache.layers]  # type: ignore[attr-defined]


def fill(cache: Cache, pasts: list[Past]) -> None:
    """Hands a cache the context as if its own model had just prefilled it."""
    for layer, past in zip(cache.layers, pasts, strict=True):
        if isinstance(layer, LongctxLayer):
            layer.fill(past.k, past.v, past.q)
        else:
            layer.update(past.k, past.v)  # type: ignore[union-attr]
    for layer in cache.layers:
        if isinstance(layer, LongctxLayer):
            layer.make_room(1)  # the prompt is over: what a method evicts or clusters then, it does once


def read(model: PreTrainedModel, cache: Cache, context: tuple[int, ...], turn: int) -> None:
    """Lets a cache that decides at every turn what it keeps read the context, `turn` tokens at a time."""
    for end in range(turn, len(context) + turn, turn):
        cache.read(model, torch.tensor([context[:end]]))  # type: ignore[attr-defined]


def decode(model: PreTrainedModel, row: CacheRow, task: DecodeTask, pasts: list[Past]) -> Decoded:
    """Answers every question from the same filled cache."""
    result = Decoded(row.name)
    if row.method is not None:
        longctx.apply(model, "dense")
    else:
        model.set_attn_implementation("sdpa")
    with row.open(model) as cache:
        start = time.perf_counter()
        if row.turn:
            read(model, cache, task.context, row.turn)
        else:
            fill(cache, pasts)
        result.fill_seconds = time.perf_counter() - start
        seconds: list[float] = []
        for question, branch in zip(task.questions, _branches(row, cache, len(task.questions)), strict=True):
            tokens, times = answer(model, branch, task.context + question.tokens, len(question.expected))
            result.right.append(tokens == question.expected)
            seconds += times
            _tally(branch, result)
        result.token_seconds = statistics.median(seconds)
        result.hit_rate = cache.store.stats.hit_rate if isinstance(cache, TieredQuestCache) else None
    return result


def answer(
    model: PreTrainedModel, cache: Cache, prompt: tuple[int, ...], num_tokens: int
) -> tuple[tuple[int, ...], list[float]]:
    """The most probable tokens by plain `generate`, and the seconds of each token after the first."""
    ids = torch.tensor([prompt])
    with timed_forwards(model) as seconds:
        out = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE_NAME: cache},
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=model.config.vocab_size,  # no word: all answers have one length, silent ones too
        )
    return tuple(out[0, len(prompt) :].tolist()), seconds[1:]


def _branches(row: CacheRow, cache: Cache, count: int) -> Iterator[Cache]:
    """The same past again and again: forks, or the cache itself cut back."""
    length = cache.get_seq_length()
    for _ in range(count):
        if row.forks:
            yield cache.fork()  # type: ignore[attr-defined]
        else:
            yield cache
            cache.crop(length - cache.get_seq_length())


def _tally(cache: Cache, result: Decoded) -> None:
    if not isinstance(cache, LongctxCache):
        return
    counts = cache.stats().layers
    tokens = sum(layer.tokens for layer in counts)
    result.keys_read = sum(layer.keys_read for layer in counts) / tokens
    result.keys_stored = sum(layer.keys_stored for layer in counts) / tokens
