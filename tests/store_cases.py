"""What tests of the page store share: small stores, their tokens, and the attention that they must give."""

import torch

import longctx
from longctx.store import PageGeometry, PageStore
from op_case import generator

GEOMETRY = PageGeometry(num_layers=2, num_kv_heads=2, head_dim=32, head_dim_v=16, page_size=8, dtype=torch.float32)
BATCHED = PageGeometry(num_layers=1, batch=2, num_kv_heads=2, head_dim=32, page_size=8, dtype=torch.bfloat16)


def tokens(geometry, count, seed=0):
    shape = (geometry.batch, geometry.num_kv_heads, count)
    make = generator(seed)
    return tuple(
        torch.randn(*shape, dim, generator=make).to(geometry.dtype) for dim in (geometry.head_dim, geometry.head_dim_v)
    )


def queries(geometry, seqlen_q=1, seed=0):
    shape = (geometry.batch, 2 * geometry.num_kv_heads, seqlen_q, geometry.head_dim)
    return torch.randn(*shape, generator=generator(seed)).to(geometry.dtype)


def pick(geometry, num_pages, count, *, heads=None, seqlen_q=1, seed=0):
    """`count` pages of each row, ascending."""
    shape = (geometry.batch, heads or geometry.num_kv_heads, seqlen_q, num_pages)
    order = torch.rand(*shape, generator=generator(seed)).argsort(dim=-1)
    return order[..., :count].sort(dim=-1).values.int()


def open_store(geometry, path=None, *, frames=64, device_frames=0, **options):
    return PageStore(
        geometry,
        path=path,
        max_host_bytes=frames * geometry.page_bytes,
        max_device_bytes=device_frames * geometry.page_bytes,
        device="cpu",
        **options,
    )


def fill_with_nan(store):
    for tier in store.tiers:
        tier.pages.fill_(float("nan"))


def assert_attends(layer, k, v, indices, q, **options):
    """As gather_attention over the tokens in one piece."""
    out, lse = layer.attend(q, indices, **options)
    options = {name: value for name, value in options.items() if name not in ("sequences", "ahead")}
    options.setdefault("block_size_k", layer.geometry.page_size)
    expected = longctx.gather_attention(q, k, v, indices, **options)
    tolerance = 1e-5 if q.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=1e-5)
