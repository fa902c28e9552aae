"""Prompts without a download: a needle in real local text, and a word-level tokenizer of exactly those words."""

from __future__ import annotations

import hashlib
import inspect
import pydoc
import random
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS_WORD = "<s>"
UNKNOWN = 1  # number of the word that stands for all beyond the vocabulary
WORD = re.compile(r"\w+|[^\w\s]")
TEMPLATE = "number of {key}"
NUM_VALUES = 4


@dataclass(frozen=True)
class Needle:
    """A fact to find again: "number of KEY" followed by its values."""

    key: str
    values: tuple[str, ...]

    @property
    def question(self) -> list[str]:
        return TEMPLATE.format(key=self.key).split()

    @property
    def words(self) -> list[str]:
        return [*self.question, *self.values]

    @classmethod
    def parse(cls, text: str) -> Needle:
        """From "KEY v1 v2 ..."."""
        key, *values = text.split()
        if not values:
            raise ValueError(f"longctx: a needle is 'KEY v1 [v2 ...]'; got {text!r}")
        return cls(key, tuple(values))

    @classmethod
    def random(cls, generator: random.Random, taken: set[str]) -> Needle:
        """A pronounceable key and four 4-digit values, none of them in `taken`, to which they are added."""
        while True:
            key = "".join(generator.choice("bdfgklmnprstvz") + generator.choice("aeiou") for _ in range(4))
            values = [str(value) for value in generator.sample(range(1000, 10_000), NUM_VALUES)]
            if taken.isdisjoint([key, *values]):
                taken.update([key, *values])
                return cls(key, tuple(values))


@dataclass(frozen=True)
class Haystack:
    """Real text as words."""

    source: str
    words: tuple[str, ...]

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(" ".join(self.words).encode()).hexdigest()

    @classmethod
    def read(cls, path: Path | None, num_words: int) -> Haystack:
        """The words of a file, or of Python's own documentation, at least `num_words` of them."""
        source, text = read_text(path, num_words)
        words = WORD.findall(text)
        if len(words) < num_words:
            raise ValueError(f"longctx: {source} has {len(words)} words; {num_words} are needed for this length")
        return cls(source, tuple(words[:num_words]))

    def prompt(self, needle: Needle, *, length: int, depth: float, question: list[str] | None = None) -> list[str]:
        """`length` words: text with the needle at `depth` of it (0 to 1), then the question (the needle's own)."""
        question = needle.question if question is None else question
        room = length - 1 - len(needle.words) - len(question)  # beside BOS
        if not 0 <= depth <= 1 or room < 0:
            raise ValueError(f"longctx: no prompt of {length} words with a needle at depth {depth}")
        at = round(depth * room)
        return [BOS_WORD, *self.words[:at], *needle.words, *self.words[at:room], *question]

    def context(self, needles: list[Needle], *, length: int, depths: tuple[float, ...]) -> list[str]:
        """`length` words: BOS and text with each needle at its depth (0 to 1, ascending), without a question."""
        room = length - 1 - sum(len(needle.words) for needle in needles)
        if list(depths) != sorted(depths) or not all(0 <= depth <= 1 for depth in depths) or room < 0:
            raise ValueError(f"longctx: no text of {length} words with needles at depths {depths}")
        words, done = [BOS_WORD], 0
        for needle, depth in zip(needles, depths, strict=True):
            at = round(depth * room)
            words += [*self.words[done:at], *needle.words]
            done = at
        return words + list(self.words[done:room])


def read_text(path: Path | None, num_words: int = 0) -> tuple[str, str]:
    """What it is and what it says: a file, or Python's own documentation, of about `num_words` or more."""
    if path is not None:
        return str(path), path.read_text(encoding="utf-8")
    return _python_documentation(num_words)


def tokenizer(*texts: tuple[str, ...] | list[str], max_words: int = 1 << 15) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose words are numbered by first appearance in `texts`; BOS is 0.

    Words beyond `max_words` read as the unknown word.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = list(dict.fromkeys([BOS_WORD, "<unk>", *(word for text in texts for word in text)]))
    words = words[:max_words]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(WORD.pattern), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token=BOS_WORD, eos_token=BOS_WORD, unk_token="<unk>")


def _python_documentation(num_words: int) -> tuple[str, str]:
    """The language reference that `help()` shows; docstrings of the standard library where that is too short."""
    from pydoc_data.topics import topics

    version = sys.version.split()[0]
    text = "\n".join(topics[name] for name in sorted(topics))
    if len(WORD.findall(text)) >= num_words:
        return f"pydoc_data.topics of Python {version}", text
    return f"pydoc_data.topics and docstrings of Python {version}", "\n".join([text, *_docstrings()])


def _docstrings() -> list[str]:
    """Docstrings of the pure Python modules of the standard library, read without importing them."""
    import ast

    found = []
    for path in sorted(Path(inspect.getfile(pydoc)).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        nodes = (node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)))
        found += [doc for doc in (ast.get_docstring(node) for node in nodes) if doc]
    return found
