"""The page store: the same attention from any tiers, memory that is never exceeded, pages that stay or leave."""

import threading

import numpy as np
import pytest
import torch

import longctx
from longctx.store import PageGeometry, PageStore, TierPart, attend_tiers
from op_case import generator
from store_cases import BATCHED, GEOMETRY, assert_attends, fill_with_nan, open_store, pick, queries, tokens

pytest.importorskip("longctx._host", reason="longctx._host was not built")


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("geometry", "on_disk", "tiers"),
    [
        (GEOMETRY, False, {"frames": 1024}),
        (GEOMETRY, True, {"frames": 24, "num_last_pages": 1}),
        (GEOMETRY, False, {"frames": 1024, "device_frames": 64}),
        (BATCHED, True, {"frames": 48}),
        (BATCHED, True, {"frames": 64, "device_frames": 64}),
    ],
    ids=["host", "two layers' windows and disk", "device and host", "host and disk", "three tiers"],
)
def test_equals_tokens_in_one_piece(tmp_path, geometry, on_disk, tiers):
    """From memory alone, from disk, from both; also where a selection does not fit into memory at once."""
    with open_store(geometry, tmp_path / "kv" if on_disk else None, **tiers) as store:
        fill_with_nan(store)
        k, v = tokens(geometry, 603)
        for layer in store.layers:
            for begin, end in ((0, 5), (5, 500), (500, 501), (501, 603)):
                layer.append(k[:, :, begin:end], v[:, :, begin:end])
        num_pages = geometry.num_pages(603)
        for step, layer in enumerate(2 * store.layers):
            q = queries(geometry, seed=step)
            pages = pick(geometry, num_pages, 12, seed=step)
            assert_attends(layer, k, v, pages, q, num_first=3, num_last=13)
            counts = torch.randint(0, 12, pages.shape[:3], generator=generator(step)).int()
            assert_attends(layer, k, v, pages, q, counts=counts, softcap=3.0)
            bias = torch.randn(pages.shape, generator=generator(step))
            assert_attends(layer, k, v, pages, q, bias=bias, softmax_scale=0.3)
        q = queries(geometry, 3)
        for heads in (1, geometry.num_kv_heads, 2 * geometry.num_kv_heads):
            assert_attends(layer, k, v, pick(geometry, num_pages, 9, heads=heads, seqlen_q=3), q, num_last=9)
        small_blocks = pick(geometry, num_pages * 4, 30, heads=1)
        assert_attends(layer, k, v, small_blocks, queries(geometry), block_size_k=2, num_last=8)
        everything = torch.arange(num_pages, dtype=torch.int32).expand(geometry.batch, 1, 1, -1)
        assert_attends(layer, k, v, everything, queries(geometry))
        nothing = torch.empty(geometry.batch, 1, 1, 0, dtype=torch.int32)
        assert_attends(layer, k, v, nothing, queries(geometry), num_last=4)
        for begin, end in ((0, 603), (7, 300), (598, 603), (40, 40)):
            assert all(torch.equal(a, b[:, :, begin:end]) for a, b in zip(layer.read(begin, end), (k, v), strict=True))
        for tier in store.tiers:
            assert tier.frames.num_used <= tier.num_frames
        assert store.stats.host_bytes <= store.host.max_bytes


def test_rewind_and_decode(tmp_path):
    with open_store(GEOMETRY, tmp_path / "kv", frames=40) as store:
        k, v = tokens(GEOMETRY, 400)
        layer = store.layers[1]
        layer.append(k, v)
        k2, v2 = tokens(GEOMETRY, 40, seed=1)
        for keep in (397, 320, 100, 3, 0):
            layer.rewind(keep)
            assert layer.num_tokens == keep
            for i in range(20):
                layer.append(k2[:, :, i : i + 1], v2[:, :, i : i + 1])
            whole_k, whole_v = (torch.cat([x[:, :, :keep], y[:, :, :20]], dim=2) for x, y in ((k, k2), (v, v2)))
            pages = pick(GEOMETRY, GEOMETRY.num_pages(keep + 20), 2)
            assert_attends(layer, whole_k, whole_v, pages, queries(GEOMETRY), num_first=2, num_last=12)
            k, v = whole_k, whole_v
        store.commit()
        file = store.file
        assert [file.num_tokens(lane) for lane in range(4)] == [0, 0, 20, 20]


def test_sequences_of_a_store(tmp_path):
    """Of different lengths, shared and parted; one frame and one place in the file for what they share."""
    geometry = PageGeometry(num_layers=1, batch=3, num_kv_heads=2, head_dim=32, page_size=8, dtype=torch.float32)
    k, v = tokens(geometry, 100)
    with open_store(geometry, tmp_path / "kv", frames=100, device_frames=60) as store:
        layer = store.layers[0]
        layer.summarize()
        layer.append(k[:1], v[:1], sequences=range(1))
        layer.append(k[1:2], v[1:2], sequences=range(1, 2), skip=[60])
        used, written = store.stats.host_bytes, store.stats.bytes_written
        store.share([(2, 0)])
        assert (store.stats.host_bytes, store.stats.bytes_written) == (used, written)
        assert store.lengths.tolist() == [100, 40, 100]
        layer.append(k[:, :, :9], v[:, :, 9:18])  # each goes on where it ends
        held = [
            [torch.cat([x[row, :, begin:], y[row, :, a : a + 9]], 1) for x, y, a in ((k, k, 0), (v, v, 9))]
            for row, begin in ((0, 0), (1, 60))
        ]
        parted = [torch.cat([x[0], y[2, :, a : a + 9]], 1) for x, y, a in ((k, k, 0), (v, v, 9))]
        for row, (rows_k, rows_v) in enumerate([*held, parted]):
            own = range(row, row + 1)
            pages = pick(geometry, geometry.num_pages(rows_k.shape[1]), 5)[row : row + 1]
            q = queries(geometry)[row : row + 1]
            assert_attends(layer, rows_k[None], rows_v[None], pages, q, num_last=9, sequences=own)
            mine = layer.summary.of(own)[:, :, : geometry.num_pages(rows_k.shape[1])]
            torch.testing.assert_close(mine, longctx.summarize_pages(rows_k[None], 8, method="minmax"))
        layer.rewind(45, sequences=range(2, 3))
        layer.append(k[2:, :, :30], v[2:, :, :30], sequences=range(2, 3))
        assert all(torch.equal(a[0], b) for a, b in zip(layer.read(0, 109, sequences=range(1)), held[0], strict=True))
    with PageStore.open(tmp_path / "kv", max_host_bytes=100 * geometry.page_bytes) as store:
        assert store.lengths.tolist() == [109, 49, 75]
        layer = store.layers[0]
        before = store.stats.host_bytes
        layer.read(0, 40, sequences=range(1))
        after = store.stats.host_bytes
        found = layer.read(0, 75, sequences=range(2, 3))
        assert store.stats.host_bytes - after < after - before  # five pages were there for both
        for a, b in zip(found, (k, v), strict=True):
            assert torch.equal(a[0], torch.cat([b[0, :, :45], b[2, :, :30]], 1))


def test_least_recently_used_leaves_first(tmp_path):
    geometry = PageGeometry(num_layers=1, num_kv_heads=1, head_dim=8, page_size=4, dtype=torch.float32)
    with open_store(geometry, tmp_path / "kv", frames=10, num_first_pages=1, num_last_pages=2) as store:
        store.layers[0].append(*tokens(geometry, 20 * 4))
        order = [page for _, page in store.host.frames.eviction_order]
        assert order == list(range(11, 18))  # 0, 18 and 19 are pinned
        q = queries(geometry)

        def use(*pages):
            store.layers[0].attend(q, torch.tensor(pages, dtype=torch.int32).view(1, 1, 1, -1))
            return [page for _, page in store.host.frames.eviction_order]

        store.reset_stats()
        assert use(12, 11) == [13, 14, 15, 16, 17, 11, 12]
        assert use(5, 14) == [15, 16, 17, 11, 12, 5, 14]
        assert use(0, 19) == [15, 16, 17, 11, 12, 5, 14]
        stats = store.stats
        assert (stats.host_hits, stats.misses, stats.evictions) == (5, 1, 1)
        assert stats.hit_rate == pytest.approx(5 / 6)
        assert stats.bytes_read == geometry.page_bytes
        # Pinned pages are never evicted, however many others come.
        for page in range(1, 18):
            use(page)
        assert store.host.resident(np.zeros(3, int), np.array([0, 18, 19])).all()


def test_read_ahead_brings_the_next_layers_pages(tmp_path):
    with open_store(GEOMETRY, tmp_path / "kv", frames=40) as store:
        k, v = tokens(GEOMETRY, 80 * 8)
        for layer in store.layers:
            layer.append(k, v)
        far = torch.tensor([5, 6, 7, 8], dtype=torch.int32).expand(1, 1, 1, 4)
        store.layers[1].attend(queries(GEOMETRY), far)
        for first in range(20, 40, 4):  # others take the frames
            store.layers[1].attend(queries(GEOMETRY), (far - 5 + first))
        store.layers[1].attend(queries(GEOMETRY), far)
        store.layers[1].read(400, 600)
        lanes, pages = store.layers[1].lanes.repeat(4), np.tile(np.arange(5, 9), 2)
        assert not store.host.resident(lanes, pages).any()
        store.reset_stats()
        store.layers[0].attend(queries(GEOMETRY), far)
        store.settle()
        assert store.host.resident(lanes, pages).all()
        assert store.stats.read_ahead == 8
        misses = store.stats.misses
        assert_attends(store.layers[1], k, v, far, queries(GEOMETRY))
        assert (store.stats.misses, store.stats.read_ahead_hits) == (misses, 8)


def test_read_ahead_brings_what_is_wished_for_and_evicts_nothing_that_is_needed(tmp_path):
    geometry = PageGeometry(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, dtype=torch.float32)
    with open_store(geometry, tmp_path / "kv", frames=20) as store:
        k, v = tokens(geometry, 60 * 4)
        for layer in store.layers:
            layer.append(k, v)

        def step(layer, pages, ahead):
            pages, ahead = (torch.tensor(x, dtype=torch.int32).view(1, 1, 1, -1) for x in (pages, ahead))
            assert_attends(store.layers[layer], k, v, pages, queries(geometry), ahead=ahead)
            store.settle()

        def resident(layer, pages):
            return store.host.resident(np.full(len(pages), layer), np.array(pages)).all()

        for _ in range(2):  # 6 pages are pinned, 10 more belong to a token
            step(0, [5, 6, 7, 8, 9], [])
            step(1, [5, 6, 7, 8, 9], [])
        store.reset_stats()
        step(0, [5, 6, 7, 8, 9], [20, 21, -1, 99])
        assert resident(0, [20, 21])
        step(1, [5, 6, 7, 8, 9], range(30, 50))  # no more than what neither layer needs
        assert resident(0, [5, 6, 7, 8, 9])
        assert resident(1, [5, 6, 7, 8, 9, 30, 31])
        assert store.stats.misses == 0
        step(0, [5, 6, 7, 8, 20], [])
        stats = store.stats
        assert (stats.misses, stats.read_ahead, stats.read_ahead_hits, stats.read_ahead_unused) == (0, 4, 1, 0)
        for page in range(40, 60):
            step(0, [page], [])
        stats = store.stats  # of layer 1's last pages too, which came back again and again
        assert stats.read_ahead_hits == 1
        assert 3 <= stats.read_ahead_unused <= stats.read_ahead - 1
        assert stats.host_bytes <= store.host.max_bytes


def test_threads_attend_to_one_store(tmp_path):
    """Frames change hands all the time; nobody reads a page that is leaving."""
    with open_store(GEOMETRY, tmp_path / "kv", frames=60) as store:
        k, v = tokens(GEOMETRY, 600)
        for layer in store.layers:
            layer.append(k, v)
        failures = []

        def work(seed):
            try:
                for i in range(30):
                    pages = pick(GEOMETRY, 75, 5, seed=100 * seed + i)
                    assert_attends(store.layers[seed % 2], k, v, pages, queries(GEOMETRY, seed=i), num_last=8)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert store.stats.evictions > 100


def test_no_copy_to_the_host_is_left_unfinished():
    """What a GPU sends is read at once."""
    asked = []

    class OnGpu(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.to and kwargs:
                asked.append((str(args[1]), kwargs["non_blocking"]))
            return super().__torch_function__(func, types, args, kwargs)

    x = torch.randn(1, 2, 8, 16)
    part = TierPart(x, x, torch.zeros(1, 1, dtype=torch.int32))
    q, indices = torch.randn(1, 2, 1, 16).as_subclass(OnGpu), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    attend_tiers(q, [part], indices, seqused_k=torch.tensor([8], dtype=torch.int32), block_size_k=8)
    assert asked[0] == ("cpu", False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 3, 4, 32)}, r"`k` of a page store must have shape .* = \[1, 2, 4, 32\]; got \[1, 3, 4, 32\]"),
        ({"v": (1, 2, 3, 16)}, r"`v` of a page store must have shape .* = \[1, 2, 4, 16\]; got \[1, 2, 3, 16\]"),
        ({"dtype": torch.float16}, "must be torch.float32; got torch.float16"),
        ({"q": (1, 3, 1, 32)}, r"`q` must have shape"),
        ({"heads": 3}, "must have 1, num_kv_heads or num_q_heads heads"),
        ({"block": 3}, "`block_size_k` must divide the page size 8; got 3"),
    ],
)
def test_bad_input(change, message):
    with open_store(GEOMETRY) as store:
        layer = store.layers[0]
        layer.append(*tokens(GEOMETRY, 20))
        dtype = change.get("dtype", torch.float32)
        k, v = (torch.zeros(change.get(x, (1, 2, 4, dim)), dtype=dtype) for x, dim in (("k", 32), ("v", 16)))
        q = torch.zeros(change.get("q", (1, 4, 1, 32)))
        indices = torch.zeros(1, change.get("heads", 2), 1, 2, dtype=torch.int32)
        if {"k", "v", "dtype"} & set(change):
            with pytest.raises(ValueError, match=message):
                layer.append(k, v)
        else:
            with pytest.raises(ValueError, match=message):
                layer.attend(q, indices, block_size_k=change.get("block"))
        assert layer.num_tokens == 20


def test_fetch_gives_pages_to_read_in_place(tmp_path):
    with open_store(GEOMETRY, tmp_path / "kv", frames=40) as store:
        k, v = tokens(GEOMETRY, 500)
        store.layers[1].append(k, v)
        q, pages = queries(GEOMETRY), pick(GEOMETRY, 63, 6)
        with store.layers[1].fetch(pages[:, :, 0]) as part:
            used = torch.full((2,), 500, dtype=torch.int32)
            out, _ = longctx.gather_attention(
                q.view(2, 2, 1, 32), part.k, part.v, pages.view(2, 1, 1, 6), block_size_k=8,
                seqused_k=used, page_table=part.page_table,
            )  # fmt: skip
        expected, _ = longctx.gather_attention(q, k, v, pages, block_size_k=8)
        torch.testing.assert_close(out.view_as(expected), expected)
