"""The examples that users copy: docstrings and the README."""

from __future__ import annotations

import doctest
import importlib.util
import re
from pathlib import Path

import pytest
import torch

import longctx
from longctx import linear, ops, prefill, store

README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"
PUBLIC = {
    **{f"ops.{name}": getattr(ops, name) for name in ops.__all__},
    **{f"linear.{name}": getattr(linear, name) for name in linear.__all__},
    **{f"prefill.{name}": getattr(prefill, name) for name in prefill.__all__},
    **{f"store.{name}": getattr(store, name) for name in store.__all__},
    "info": longctx.info,
}
if importlib.util.find_spec("transformers") is not None:
    PUBLIC |= {f"models.{name}": getattr(longctx.models, name) for name in longctx.models.__all__}
    PUBLIC |= {f"cache.{name}": getattr(longctx.cache, name) for name in longctx.cache.__all__}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_docstring_examples(name: str) -> None:
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    examples = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs={})
    for example in examples:
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("name", ops.__all__)
def test_every_op_has_an_example(name: str) -> None:
    assert ">>>" in (getattr(ops, name).__doc__ or "")


def test_readme_snippet() -> None:
    snippet, _, _ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    exec(snippet, namespace)
    out = namespace["out"]
    assert isinstance(out, torch.Tensor)
    assert out.shape == (1, 8, 4096, 128)


def test_readme_cache() -> None:
    _, snippet, _ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=64)
    namespace = {"longctx": longctx, "model": transformers.LlamaForCausalLM(config)}
    namespace["input_ids"] = torch.ones(1, 100, dtype=torch.long)
    exec(snippet, namespace)
    assert namespace["cache"].get_seq_length() > 100


def test_readme_page_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    from cache_cases import ours
    from transformers_models import tokens

    _, _, snippet = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    namespace = {"longctx": longctx, "model": ours(), "input_ids": tokens(1, 100)}
    exec(snippet.replace("1 << 30", "1 << 24"), namespace)
    assert namespace["store"].num_tokens > 100  # type: ignore[attr-defined]
    assert (tmp_path / "context.kv").stat().st_size > 0


def test_speculative_decoding_document() -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / "speculative_decoding.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, {})
