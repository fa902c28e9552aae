"""What the processes of `longctx demo --linear` do: train a small model, stream with it, and time attention alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers.utils.logging import disable_progress_bar

import longctx
from longctx.cache.cache import CACHE_NAME
from longctx.demo.measure import peak_bytes
from longctx.demo.process import Progress
from longctx.models import LightningCache, TransNormerConfig, TransNormerLM

CONTEXT = 512  # characters of a training sequence
BATCH = 8
HELD_OUT = 16 * CONTEXT  # characters in the middle of the text
HEADS, HEAD_DIM = 4, 128  # of the attention that is timed alone
LINEAR, DENSE, SDPA = "linear_attention", "attention (dense)", "SDPA"


@dataclass
class Training:
    """Bits a character, of a part of the text that no step has seen."""

    steps: list[int] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)  # after so many steps
    seconds: float = 0.0
    num_parameters: int = 0
    sample: str = ""


@dataclass(frozen=True)
class Position:
    """Generating after so many characters."""

    position: int
    prefill_seconds: float  # of all characters before
    token_seconds: float  # median
    state_bytes: int
    peak_bytes: int  # of the process, so far
    bits: float  # a character, of the text in the last piece before


@dataclass(frozen=True)
class Timing:
    """Causal attention over one sequence."""

    name: str
    length: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.length / self.seconds


@dataclass(frozen=True)
class Result:
    """All that is known at the end."""

    source: str
    num_characters: int
    entropy: float  # bits a character by frequency alone
    dtype: str  # of attention alone; the model is float32
    training: Training
    one_by_one_error: float
    positions: list[Position]
    timings: list[Timing]

    def of(self, name: str) -> list[Timing]:
        """The timings of one contender, by length."""
        return [timing for timing in self.timings if timing.name == name]


def encode(text: str) -> Tensor:
    """Printable ASCII as 1 to 95, a line break as 96, anything else as 0."""
    codes = torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()
    return torch.where(codes == 10, 96, torch.where((codes >= 32) & (codes < 127), codes - 31, 0))


def decode(ids: Tensor) -> str:
    return "".join("\n" if i == 96 else chr(i + 31) if i else "?" for i in ids.tolist())


def entropy(ids: Tensor) -> float:
    """Bits a character of a model that knows nothing but how often each occurs."""
    shares = ids.bincount().double() / len(ids)
    return -float((shares * shares.clamp(min=1e-30).log2()).sum())


def bits_per_character(logits: Tensor, ids: Tensor) -> float:
    """Of `ids [batch, seqlen]` given logits of all of them, the first one apart."""
    return float(cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())) / math.log(2)


def train(ids: Tensor, num_steps: int, seed: int, path: Path, progress: Progress) -> Training:
    """AdamW, a short warm-up, then half a cosine. Leaves the model in `path`."""
    torch.manual_seed(seed)
    config = TransNormerConfig(
        vocab_size=97, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2
    )
    model, result = TransNormerLM(config), Training()
    result.num_parameters = sum(parameter.numel() for parameter in model.parameters())
    middle = len(ids) // 2
    seen = torch.cat([ids[:middle], ids[middle + HELD_OUT :]])
    unseen = ids[middle : middle + HELD_OUT].view(-1, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.1)
    every = max(1, num_steps // 8)
    for step in range(num_steps + 1):
        if step % every == 0 or step == num_steps:
            with torch.no_grad():
                result.held_out.append(bits_per_character(model(unseen).logits, unseen))
            result.steps.append(step)
            progress("train")
        if step == num_steps:
            break
        start = time.perf_counter()
        begins = torch.randint(len(seen) - CONTEXT, (BATCH,))
        batch = torch.stack([seen[begin : begin + CONTEXT] for begin in begins.tolist()])
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        warm_up = min(1.0, (step + 1) / min(50, num_steps))
        optimizer.param_groups[0]["lr"] = 5e-3 * warm_up * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        optimizer.step()
        result.seconds += time.perf_counter() - start
    disable_progress_bar()
    model.eval().save_pretrained(path)
    prompt = unseen[:1, :200]
    said = model.generate(prompt, max_new_tokens=200, do_sample=True, top_k=5)
    result.sample = decode(said[0, 200:])
    return result


def stream(ids: Tensor, positions: Sequence[int], num_tokens: int, path: Path, progress: Progress) -> list[Position]:
    """One text on one cache: equal pieces of prompt up to each position (a multiple of the first), then `num_tokens`
    characters of the text, one at a time, on a copy of the cache."""
    model = _load(path)
    results: list[Position] = []
    cache, seconds, bits, at = LightningCache(), 0.0, math.nan, 0
    with torch.inference_mode():
        for _ in range(2):  # warm up: two pieces that follow each other have all buffers there are
            model(ids[None, : positions[0]], **{CACHE_NAME: cache})
        _one_by_one(model, cache, ids[:num_tokens])
        cache.reset()
        for position in positions:
            while at < position:
                piece = ids[None, at : at + positions[0]]
                start = time.perf_counter()
                logits = model(piece, **{CACHE_NAME: cache}).logits
                seconds += time.perf_counter() - start
                bits, at = bits_per_character(logits, piece), at + piece.shape[1]
            branch = cache.branch()
            token_seconds = _one_by_one(model, branch, ids[position : position + num_tokens])
            state_bytes = sum(state.kv.nbytes + state.num_tokens.nbytes for state in branch.states)
            results.append(Position(position, seconds, token_seconds, state_bytes, peak_bytes(), bits))
            progress("stream")
    return results


def one_by_one_error(ids: Tensor, path: Path, progress: Progress) -> float:
    """Relative error of logits that were found one token at a time, beside those of one call."""
    model, cache = _load(path), LightningCache()
    with torch.inference_mode():
        whole = model(ids[None]).logits
        steps = torch.cat([model(token[None, None], **{CACHE_NAME: cache}).logits for token in ids], dim=1)
    progress("stream")
    return float((steps - whole).norm() / whole.norm())


def attention_rates(lengths: Sequence[int], dtype: torch.dtype, budget: float, progress: Progress) -> list[Timing]:
    """Attention alone at every length, by turns; the dense ones stop where a call would take longer than `budget`."""
    timings: list[Timing] = []
    last: dict[str, Timing] = {}
    generator = torch.Generator().manual_seed(0)
    log_decay = -(2.0 ** -torch.arange(1.0, 2 * HEADS + 1, 2))
    for length in lengths:
        q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, generator=generator).to(dtype) for _ in range(3))
        contenders: dict[str, Callable[[], object]] = {
            LINEAR: lambda: longctx.linear_attention(q, k, v, log_decay),  # noqa: B023
            DENSE: lambda: longctx.attention(q, k, v),  # noqa: B023
            SDPA: lambda: scaled_dot_product_attention(q, k, v, is_causal=True),  # noqa: B023
        }
        for name, call in contenders.items():
            before = last.get(name)
            if name != LINEAR and before and before.seconds * (length / before.length) ** 2 > budget:
                continue
            last[name] = Timing(name, length, _seconds(call))
            timings.append(last[name])
            progress(name)
    return timings


def _load(path: Path) -> TransNormerLM:
    disable_progress_bar()
    model: TransNormerLM = TransNormerLM.from_pretrained(path)
    return model


def _seconds(call: Callable[[], object]) -> float:
    """The median of up to 5 calls after a first one; of the first alone where that took over a second."""
    seconds: list[float] = []
    with torch.inference_mode():
        while len(seconds) < 6 and (not seconds or seconds[0] < 1.0):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return median(seconds[1:] or seconds)


def _one_by_one(model: TransNormerLM, cache: LightningCache, ids: Tensor) -> float:
    """The median seconds of a call with one token."""
    seconds = []
    for token in ids:
        start = time.perf_counter()
        model(token[None, None], **{CACHE_NAME: cache})
        seconds.append(time.perf_counter() - start)
    return median(seconds)
