"""The mask function against transformers' own boolean mask, built from the same arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import sdpa_mask

from longctx.integrations.transformers.mask import is_key_ranges, key_ranges_mask
from transformers_models import padding


def to_mask(ranges: Tensor, kv_length: int) -> Tensor:
    """bool [batch, seqlen_q, kv_length]"""
    key = torch.arange(kv_length)
    return ((key >= ranges[..., :1]) & (key < ranges[..., 1:])).any(dim=1)


def check(q_length: int, kv_length: int, **options: object) -> Tensor:
    """Both functions show every token the same keys; rows that are padding see nothing of ours."""
    arguments = {"batch_size": 2, "q_length": q_length, "kv_length": kv_length, **options}
    ours = key_ranges_mask(**arguments)
    theirs = sdpa_mask(**{**arguments, "allow_is_causal_skip": False})[:, 0]
    assert is_key_ranges(ours, q_length)
    assert ours.shape[0] == 2
    seen = to_mask(ours, kv_length)
    attention_mask, q_offset = options.get("attention_mask"), int(options.get("q_offset", 0))
    if attention_mask is not None:
        is_token = attention_mask[:, q_offset : q_offset + q_length].bool()
        theirs = theirs & is_token[..., None]
    assert torch.equal(seen, theirs)
    # Where the query stands, also in a row that is padding.
    own = torch.arange(q_length) + q_offset - options.get("kv_offset", 0)
    assert torch.equal(ours[:, -1, :, 1], (own + 1).int().expand(2, -1))
    return ours


SLIDING = {"mask_function": masking_utils.sliding_window_causal_mask_function(5), "local_size": 5}


@pytest.mark.parametrize("q_length", [20, 7, 1])
def test_plain_causal_needs_no_mask(q_length: int) -> None:
    kv_length = 20
    arguments = {"batch_size": 2, "q_length": q_length, "kv_length": kv_length, "q_offset": kv_length - q_length}
    assert key_ranges_mask(**arguments) is None
    all_present = torch.ones(2, kv_length, dtype=torch.bool)
    assert key_ranges_mask(**arguments, attention_mask=all_present) is None
    window_not_reached = masking_utils.sliding_window_causal_mask_function(kv_length)
    assert key_ranges_mask(**arguments, mask_function=window_not_reached, local_size=kv_length) is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [{}, SLIDING], ids=["full", "window"])
def test_padding(side: str, extra: dict) -> None:
    attention_mask = padding([20, 13], side).bool()
    ranges = check(20, 20, attention_mask=attention_mask, **extra)
    assert ranges.shape[1] == 1
    check(6, 20, q_offset=14, attention_mask=attention_mask, **extra)


@pytest.mark.parametrize("extra", [{}, SLIDING], ids=["full", "window"])
def test_gap_of_padding_takes_two_ranges(extra: dict) -> None:
    attention_mask = torch.ones(2, 20, dtype=torch.bool)
    attention_mask[1, 8:12] = False
    ranges = check(20, 20, attention_mask=attention_mask, **extra)
    assert ranges.shape[1] == 2
    check(6, 20, q_offset=14, attention_mask=attention_mask, **extra)
    attention_mask[1, :3] = False
    check(20, 20, attention_mask=attention_mask, **extra)


def test_two_gaps_raise() -> None:
    attention_mask = torch.ones(2, 20, dtype=torch.bool)
    attention_mask[1, [4, 9]] = False
    with pytest.raises(NotImplementedError, match="more than one gap of padding"):
        key_ranges_mask(2, 20, 20, attention_mask=attention_mask)


@pytest.mark.parametrize("extra", [{}, SLIDING], ids=["full", "window"])
@pytest.mark.parametrize("with_padding", [False, True])
def test_static_cache(extra: dict, with_padding: bool) -> None:
    """K is a buffer longer than the sequence, and the offset may be a tensor."""
    attention_mask = padding([12, 9], "left").bool() if with_padding else None
    assert check(12, 30, attention_mask=attention_mask, **extra).shape[1] == 1
    for length in (1, 4):
        now = None if attention_mask is None else torch.nn.functional.pad(attention_mask, (0, length), value=True)
        check(length, 30, q_offset=torch.tensor(12), attention_mask=now, **extra)


def test_sliding_cache() -> None:
    """A sliding cache returns the last `window - 1` keys and the new ones."""
    for q_length in (1, 6):
        check(q_length, 4 + q_length, q_offset=20, kv_offset=16, **SLIDING)
        attention_mask = padding([20 + q_length, 8 + q_length], "left").bool()
        check(q_length, 4 + q_length, q_offset=20, kv_offset=16, attention_mask=attention_mask, **SLIDING)


def test_chunked_attention() -> None:
    for attention_mask in (None, padding([23, 17], "left").bool()):
        left = torch.zeros(2, dtype=torch.int64) if attention_mask is None else (~attention_mask).sum(1)
        function = masking_utils.chunked_causal_mask_function(6, left)
        check(23, 23, mask_function=function, local_size=6, attention_mask=attention_mask)


@pytest.mark.parametrize("window", [None, 5])
def test_packed_documents(window: int | None) -> None:
    position_ids = torch.cat([torch.arange(9), torch.arange(1), torch.arange(13)]).expand(2, -1)
    documents = masking_utils.find_packed_sequence_indices(position_ids)
    function = masking_utils.causal_mask_function
    if window is not None:
        function = masking_utils.sliding_window_causal_mask_function(window)
    packed = masking_utils.and_masks(masking_utils.packed_sequence_mask_function(documents), function)
    assert check(23, 23, mask_function=packed, local_size=window, allow_is_causal_skip=False).shape[1] == 1


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_bidirectional(window: int | None, side: str) -> None:
    function = masking_utils.bidirectional_mask_function
    if window is not None:
        function = masking_utils.sliding_window_bidirectional_mask_function(window)
    arguments = {"batch_size": 2, "q_length": 12, "kv_length": 12, "mask_function": function}
    attention_mask = padding([12, 7], side).bool()
    ours = key_ranges_mask(**arguments, attention_mask=attention_mask, allow_is_bidirectional_skip=True)
    theirs = sdpa_mask(**arguments, attention_mask=attention_mask, allow_is_causal_skip=False)[:, 0]
    assert torch.equal(to_mask(ours, 12), theirs)
    attention_mask[1] = torch.arange(12) % 5 != 2
    with pytest.raises(NotImplementedError, match="padding between tokens"):
        key_ranges_mask(**arguments, attention_mask=attention_mask, allow_is_bidirectional_skip=True)


def test_masks_that_are_not_intervals_raise() -> None:
    blocks = torch.full((2, 20), -1)
    blocks[:, 5:9] = 0
    image_blocks = masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.blockwise_overlay(blocks))
    with pytest.raises(NotImplementedError, match="not one interval"):
        key_ranges_mask(2, 20, 20, mask_function=image_blocks, allow_is_causal_skip=False)

    def even_keys(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & ((kv % 2 == 0) | (kv == q))

    with pytest.raises(NotImplementedError, match="not one interval"):
        key_ranges_mask(2, 20, 20, mask_function=even_keys, allow_is_causal_skip=False)


def test_cache_that_drops_needed_keys_raises() -> None:
    with pytest.raises(NotImplementedError, match="fewer than the 6 queries"):
        key_ranges_mask(2, 6, 10, q_offset=20, kv_offset=0)


def test_custom_mask_functions_raise() -> None:
    with pytest.raises(NotImplementedError, match="custom mask functions"):
        key_ranges_mask(2, 20, 20, use_vmap=True)


def test_long_rows_never_build_a_matrix() -> None:
    """A million tokens: a mask of a terabit as a matrix, 8 MB as ranges."""
    length = 1 << 20
    function = masking_utils.sliding_window_causal_mask_function(4096)
    ranges = key_ranges_mask(1, length, length, mask_function=function, local_size=4096)
    row = torch.tensor([0, 5000, length - 1])
    assert torch.equal(ranges[0, 0, row], torch.stack([(row - 4095).clamp(min=0), row + 1], dim=-1).int())
