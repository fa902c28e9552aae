"""TransNormerLM and MiniMax's layers learn: gradients against autograd through the formulas, and a loss that falls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from test_linear_attention import relative_error
from test_linear_block import block_formula

pytest.importorskip("transformers", reason="transformers is missing")
from longctx.models import LightningCache, TransNormerLM
from test_transformers_minimax import inputs, layer_of, ours, stock
from test_transnormer import SHAPES, VOCAB, tiny, tokens


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


def close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert relative_error(actual[name], gradient) < tolerance, name


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_by_hand(shape: str) -> None:
    model, ids = tiny(**SHAPES[shape]).double().train(), tokens(2, 70)
    x = model.model.embed_tokens(ids) * model.model.embed_scale
    for block in model.model.layers:
        x = block_formula(block, x)
    logits = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() @ model.lm_head.weight.T
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected = gradients(model, loss)
    assert ("model.layers.0.attention.lrpe.theta" in expected) == model.config.use_lrpe
    # transformers takes the loss in float32
    close(gradients(model, model(ids, labels=ids).loss), expected, 1e-5)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, ids = tiny().train(), tokens(2, 70)
    expected = gradients(model, model(ids, labels=ids).loss)
    model.gradient_checkpointing_enable()
    close(gradients(model, model(ids, labels=ids).loss), expected, 1e-5)


def test_gradients_flow_through_the_cache() -> None:
    """A text in three pieces, one of them a single token, is one graph."""
    model, ids, cache, logits = tiny().train(), tokens(2, 70), LightningCache(), []
    for piece in ids.split([40, 1, 29], dim=1):
        logits.append(model(piece, past_key_values=cache).logits)
    weight = torch.randn(2, 70, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = gradients(model, (model(ids).logits * weight).sum())
    close(gradients(model, (torch.cat(logits, dim=1) * weight).sum()), expected, 1e-4)


def test_padding_takes_no_part_in_training() -> None:
    model, ids = tiny().train(), tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, :25] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 25] = -100  # whose prediction is padding's
    total = gradients(
        model, 39 * model(ids[:1], labels=ids[:1]).loss + 14 * model(ids[1:, 25:], labels=ids[1:, 25:]).loss
    )
    close(gradients(model, 53 * model(ids, attention_mask=mask, labels=labels).loss), total, 1e-4)


def test_the_loss_falls() -> None:
    """The token after the next is a function of this one: attention has to look back."""
    model: TransNormerLM = tiny(vocab_size=24, initializer_range=0.05).train()
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(80):
        ids = torch.randint(24, (16, 2), generator=generator)
        for _ in range(20):
            ids = torch.cat([ids, (7 * ids[:, -2:-1] + 5) % 24], dim=1)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Without a look back it stays at log(24) = 3.2: the present token tells nothing about the next.
    assert losses[0] > 3.0
    assert sum(losses[-5:]) / 5 < 2.0


@pytest.mark.parametrize("pieces", [[100], [70, 20, 10]], ids=str)
def test_minimax_gradients_are_those_of_transformers(pieces: list[int]) -> None:
    """Also through the state in the cache."""
    x, mask = inputs(100, torch.float32), torch.ones(2, 100, dtype=torch.bool)
    mask[0, :30] = False
    results: list[dict[str, Tensor]] = []
    for layer in (layer_of(torch.float32), ours(layer_of(torch.float32))):
        layer.requires_grad_(True)
        cache, begin, outs = stock.MiniMaxCache(), 0, []
        leaf: Any = x.clone().requires_grad_()
        for length in pieces:
            here = slice(begin, begin + length)
            outs.append(layer(leaf[:, here], None, mask[:, here], cache)[0])
            begin += length
        results.append(gradients(layer, torch.cat(outs, dim=1).pow(2).sum()) | {"x": leaf.grad})
    close(results[1], results[0], 1e-5)
