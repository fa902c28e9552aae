"""What every row is asked: one model and a list of prompts with the answer that is expected."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longctx.demo.text import UNKNOWN, Haystack, Needle, tokenizer
from longctx.models.constructed import BOS, MAX_VOCAB, retrieval_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIN_LENGTH = 2048  # well above `min_seqlen_q` of `longctx.apply`
SWEEP_DEPTHS = (0.05, 0.3, 0.55, 0.8, 0.98)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """How a process gets its model: a checkpoint, or the constructed one."""

    dtype: str
    path: Path | None = None
    vocab_size: int = 0
    num_heads: int = 8
    num_kv_heads: int = 2
    seed: int = 0

    def load(self) -> PreTrainedModel:
        dtype = getattr(torch, self.dtype)
        if self.path is not None:
            from transformers import AutoModelForCausalLM

            checkpoint: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                self.path, dtype=dtype, attn_implementation="sdpa"
            )
            return checkpoint
        model = retrieval_model(
            self.vocab_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            dtype=dtype,
            seed=self.seed,
        )
        model.set_attn_implementation("sdpa")
        return model


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One prompt. `main` and `sweep` are scored; `timing` only adds a point to the figure."""

    kind: str  # main, sweep, timing, absent
    prompt: tuple[int, ...]
    expected: tuple[int, ...] | None = None  # None: unknown, as of a checkpoint
    max_new_tokens: int = 4
    depth: float = 0.0
    values: tuple[int, ...] = ()  # of the needle in the prompt, whose key an `absent` question does not ask for
    reach: int = 0  # tokens from the key of the needle to the end of the prompt

    @property
    def length(self) -> int:
        return len(self.prompt)

    @property
    def scored(self) -> bool:
        return self.kind in ("main", "sweep")


@dataclass(frozen=True)
class Task:
    """The model, its prompts, and how to read its answers."""

    model: ModelSpec
    trials: tuple[Trial, ...]
    tokenizer: Any
    source: str  # of the text
    sha256: str
    check_length: int  # of the prompt on which exactness is checked

    def of_kind(self, kind: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.kind == kind]

    @property
    def main(self) -> Trial:
        return self.of_kind("main")[0]

    @property
    def sweep_length(self) -> int:
        return max((trial.length for trial in self.of_kind("sweep")), default=self.main.length)

    def words(self, tokens: tuple[int, ...]) -> str:
        """An answer in words; empty if the model said nothing."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def needle_task(
    model: dict[str, Any],
    *,
    length: int,
    sweep_length: int,
    timing_lengths: tuple[int, ...] = (),
    depths: tuple[float, ...] = SWEEP_DEPTHS,
    depth: float = 0.37,
    needle: Needle | None = None,
    text: Path | None = None,
    seed: int = 0,
) -> Task:
    """Needles in real text, for the constructed model: one at full length, a sweep over depths, an absent key."""
    if min(length, sweep_length) < MIN_LENGTH:
        raise ValueError(
            f"longctx: prompts shorter than {MIN_LENGTH} tokens run dense; got {min(length, sweep_length)}"
        )
    check_length = MIN_LENGTH  # also of the absent key: short is enough
    generator = random.Random(seed)
    haystack = Haystack.read(text, length)
    taken = set(haystack.words)
    if needle is not None and needle.key in taken:
        raise ValueError(f"longctx: the text has the word {needle.key!r} itself; choose another key")
    needles = [needle or Needle.random(generator, taken) for _ in range(1 + len(depths))]
    absent = Needle.random(generator, taken)
    words = tokenizer(absent.words, *(n.words for n in needles), haystack.words, max_words=MAX_VOCAB)
    vocab = words.get_vocab()

    def ids(tokens: Iterable[str]) -> tuple[int, ...]:
        return tuple(vocab.get(token, UNKNOWN) for token in tokens)

    def trial(kind: str, length: int, depth: float, needle: Needle, question: Needle | None = None) -> Trial:
        prompt = haystack.prompt(needle, length=length, depth=depth, question=(question or needle).question)
        at = prompt.index(needle.key, round(depth * (length - 1 - len(needle.words) - len(needle.question))))
        return Trial(
            kind=kind,
            prompt=ids(prompt),
            expected=ids(needle.values) if question is None else (BOS,),
            values=ids(needle.values),
            max_new_tokens=len(needle.values),
            depth=depth,
            reach=length - 1 - at,
        )

    trials = [
        *(trial("sweep", sweep_length, d, n) for d, n in zip(depths, needles[1:], strict=True)),
        *(trial("timing", n, depth, needles[0]) for n in timing_lengths),
        trial("absent", check_length, depth, needles[0], absent),
        trial("main", length, depth, needles[0]),
    ]
    spec = ModelSpec(vocab_size=len(words), seed=seed, **model)
    return Task(spec, tuple(trials), words, haystack.source, haystack.sha256, check_length)


def prompt_task(path: Path, prompt: Path, *, dtype: str, max_new_tokens: int = 32) -> Task:
    """One prompt from a file for a real checkpoint; the answer of dense attention is the one to keep."""
    import hashlib

    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(path)
    text = prompt.read_text(encoding="utf-8")
    tokens = tuple(words(text).input_ids)
    trial = Trial(kind="main", prompt=tokens, max_new_tokens=max_new_tokens)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return Task(ModelSpec(dtype=dtype, path=path), (trial,), words, str(prompt), sha256, min(MIN_LENGTH, len(tokens)))
