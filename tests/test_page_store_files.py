"""The file of a page store in good and bad hours: reopened, read beside its writer, forked, full, damaged."""

import os
import re
import resource
import runpy
import sys

import pytest
import torch

import longctx
from longctx.store import PageGeometry, PageStore, PageStoreError
from store_cases import GEOMETRY, assert_attends, open_store, pick, queries, tokens

pytest.importorskip("longctx._host", reason="longctx._host was not built")


def test_reopened_store(tmp_path):
    """With the tokens of pages that are not full, from where the writer closed it; and what a reader sees."""
    path, (k, v) = tmp_path / "kv", tokens(GEOMETRY, 101)
    with open_store(GEOMETRY, path) as store:
        for layer in store.layers:
            layer.append(k[:, :, :90], v[:, :, :90])
        store.commit(sync=True)
        with pytest.raises(PageStoreError, match="is being written"):
            PageStore.open(path, max_host_bytes=1 << 20)
        reader = PageStore.open(path, max_host_bytes=1 << 16, writable=False)
        assert reader.num_tokens == 90
        with pytest.raises(PageStoreError, match="for reading only"):
            reader.layers[0].append(k, v)
        for layer in store.layers:
            layer.append(k[:, :, 90:91], v[:, :, 90:91])
    with pytest.raises(PageStoreError, match="is closed"):
        store.layers[0].append(k, v)
    assert reader.refresh()
    assert not reader.refresh()
    with PageStore.open(path, GEOMETRY, max_host_bytes=20 * GEOMETRY.page_bytes) as store:
        for layer, beside in zip(store.layers, reader.layers, strict=True):
            assert_attends(beside, k[:, :, :91], v[:, :, :91], pick(GEOMETRY, 12, 5), queries(GEOMETRY), num_last=20)
            layer.append(k[:, :, 91:], v[:, :, 91:])
            assert_attends(layer, k, v, pick(GEOMETRY, 13, 5), queries(GEOMETRY), num_last=20)


def test_reader_sees_what_was_written_anew(tmp_path):
    """The writer takes tokens back and appends as many others: a reader keeps no page of the first ones."""
    (k, v), (k2, v2) = tokens(GEOMETRY, 200), tokens(GEOMETRY, 200, seed=1)
    with open_store(GEOMETRY, tmp_path / "kv") as store:
        store.layers[0].append(k, v)
        store.layers[1].append(k, v)
        store.commit()
        with PageStore.open(tmp_path / "kv", max_host_bytes=1 << 20, writable=False) as reader:
            reader.layers[0].summarize()
            assert_attends(reader.layers[0], k, v, pick(GEOMETRY, 25, 25), queries(GEOMETRY))
            store.rewind(50)
            for layer in store.layers:
                layer.append(k2[:, :, 50:], v2[:, :, 50:])
            assert_attends(reader.layers[0], k, v, pick(GEOMETRY, 25, 5), queries(GEOMETRY))  # from its frames
            with pytest.raises(
                PageStoreError, match=r"has been written to, and page 9 .* see what there is by `refresh`"
            ):
                reader.layers[1].attend(queries(GEOMETRY), torch.full((1, 1, 1, 1), 9, dtype=torch.int32))
            assert reader.refresh()
            k[:, :, 50:], v[:, :, 50:] = k2[:, :, 50:], v2[:, :, 50:]
            for layer in reader.layers:
                assert_attends(layer, k, v, pick(GEOMETRY, 25, 25), queries(GEOMETRY))
            expected = longctx.summarize_pages(k, 8, method="minmax")
            torch.testing.assert_close(reader.layers[0].summary.pages, expected)


def test_a_store_that_is_let_go(tmp_path):
    """Without `close`, the lock goes with the last reference and full pages stay; `close` twice is once."""
    path, (k, v) = tmp_path / "kv", tokens(GEOMETRY, 50)
    store = open_store(GEOMETRY, path)
    for layer in store.layers:
        layer.append(k, v)
        layer.summarize()
        layer.attend(queries(GEOMETRY), pick(GEOMETRY, 6, 3))
    del layer, store
    store = PageStore.open(path, max_host_bytes=1 << 20)
    assert store.num_tokens == 48
    store.close()
    store.close()
    store.close(commit=False)
    with pytest.raises(PageStoreError, match="is closed"):
        store.layers[0].append(k, v)
    PageStore.open(path, max_host_bytes=1 << 20).close()


def test_relative_paths_and_places_that_cannot_be_written(tmp_path, monkeypatch):
    k, v = tokens(GEOMETRY, 500)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with open_store(GEOMETRY, "kv", frames=40) as store:
        monkeypatch.chdir(tmp_path / "elsewhere")
        store.layers[0].append(k, v)
        assert_attends(store.layers[0], k, v, pick(GEOMETRY, 63, 9), queries(GEOMETRY))
        with PageStore.open("../kv", max_host_bytes=1 << 20, writable=False) as reader:
            assert reader.layers[0].num_tokens == 496
    for path in ("nowhere/kv", "/proc/kv"):
        with pytest.raises(PageStoreError, match=rf"{path} cannot be created: "):
            open_store(GEOMETRY, path)
    with pytest.raises(PageStoreError, match="elsewhere cannot be opened: Is a directory"):
        PageStore.open(tmp_path / "elsewhere", max_host_bytes=1 << 20)


def test_forked_process(tmp_path):
    """A child is told to open the file again, and does not keep the lock when its parent is done."""
    path, (k, v) = tmp_path / "kv", tokens(GEOMETRY, 90)
    store = open_store(GEOMETRY, path)
    store.layers[0].append(k, v)
    told, tell = os.pipe()
    go, let = os.pipe()
    child = os.fork()
    if child == 0:
        seen = b""
        for use in (
            lambda: store.layers[0].append(k, v),
            lambda: store.layers[0].attend(queries(GEOMETRY), pick(GEOMETRY, 11, 3)),
            store.commit,
            store.refresh,
            store.close,
        ):
            try:
                use()
                seen += b"done "
            except PageStoreError as error:
                seen += b"told " if "open it again here, with `writable=False`" in str(error) else b"else "
        os.write(tell, seen)
        os.read(go, 1)
        os._exit(0)
    assert os.read(told, 100) == b"told told told told done "
    store.layers[1].append(k, v)
    store.close()
    with PageStore.open(path, max_host_bytes=1 << 20) as store:  # the child is still there
        assert store.num_tokens == 90
    os.write(let, b".")
    assert os.waitpid(child, 0)[1] == 0


def test_reopened_where_the_last_pages_do_not_fit_on_the_device(tmp_path):
    """They have to: the next token is written into one of them."""
    k, v = tokens(GEOMETRY, 21)
    with open_store(GEOMETRY, tmp_path / "kv") as store:
        for layer in store.layers:
            layer.append(k, v)
    memory = {"max_host_bytes": 1 << 20, "device": "cpu"}
    with pytest.raises(
        PageStoreError, match="pages need a frame of their own; the store needs more `max_device_bytes`"
    ):
        PageStore.open(tmp_path / "kv", max_device_bytes=11 * GEOMETRY.page_bytes, **memory)
    with PageStore.open(tmp_path / "kv", max_device_bytes=12 * GEOMETRY.page_bytes, **memory) as store:
        store.layers[0].append(k[:, :, :1], v[:, :, :1])
        assert torch.equal(store.layers[0].read(0, 22)[0], torch.cat([k, k[:, :, :1]], 2))


def test_writer_that_died_between_layers(tmp_path):
    path, (k, v) = tmp_path / "kv", tokens(GEOMETRY, 50)
    store = open_store(GEOMETRY, path)
    store.layers[0].append(k, v)
    store.layers[1].append(k[:, :, :20], v[:, :, :20])
    store.close(commit=False)
    with PageStore.open(path, max_host_bytes=1 << 20) as store:
        assert [layer.num_tokens for layer in store.layers] == [48, 16]
        store.rewind(store.num_tokens)
        for layer in store.layers:
            layer.append(k[:, :, 16:], v[:, :, 16:])
            assert_attends(layer, k, v, pick(GEOMETRY, 7, 4), queries(GEOMETRY))


def test_no_room_leaves_the_layer_as_it_was(tmp_path):
    k, v = tokens(GEOMETRY, 300)
    with open_store(GEOMETRY, frames=40) as store:
        layer = store.layers[0]
        layer.append(k[:, :, :100], v[:, :, :100])
        with pytest.raises(PageStoreError, match="needs more `max_host_bytes` or a `path`"):
            layer.append(k[:, :, 100:], v[:, :, 100:])
        assert layer.num_tokens == 100
        layer.append(k[:, :, 100:110], v[:, :, 100:110])
        assert_attends(layer, k[:, :, :110], v[:, :, :110], pick(GEOMETRY, 14, 5), queries(GEOMETRY), num_last=7)
    with (
        open_store(GEOMETRY, tmp_path / "kv", frames=2) as store,
        pytest.raises(PageStoreError, match="needs more `max_host_bytes` or fewer pinned pages"),
    ):
        store.layers[0].append(k, v)


def test_disk_full_leaves_the_layer_as_it_was(tmp_path):
    path, (k, v) = tmp_path / "kv", tokens(GEOMETRY, 6000)
    with open_store(GEOMETRY, path) as store:
        layer = store.layers[0]
        layer.append(k[:, :, :301], v[:, :, :301])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
        try:
            with pytest.raises(PageStoreError, match=r"is full: page \d+ of layer 0, .*stays readable"):
                layer.append(k[:, :, 301:], v[:, :, 301:])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert layer.num_tokens == 301
        assert_attends(layer, k[:, :, :301], v[:, :, :301], pick(GEOMETRY, 38, 9), queries(GEOMETRY), num_last=9)
        layer.append(k[:, :, 301:], v[:, :, 301:])
        assert_attends(layer, k, v, pick(GEOMETRY, 750, 9), queries(GEOMETRY), num_first=5, num_last=9)


def test_disk_full_when_it_is_closed(tmp_path):
    """There is no room for the last tokens: the store stays open and usable, and closes when there is."""
    path, (k, v) = tmp_path / "kv", tokens(GEOMETRY, 6000)
    store = open_store(GEOMETRY, path)
    for layer in store.layers:
        layer.append(k[:, :, :1023], v[:, :, :1023])  # 508 entries: four segments of 128 have room for 4 more
    store.commit()
    store.rewind(1022)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
    try:
        with pytest.raises(PageStoreError, match="is full"):
            store.close()
        for layer in store.layers:
            pages = pick(GEOMETRY, 128, 9)
            assert_attends(layer, k[:, :, :1022], v[:, :, :1022], pages, queries(GEOMETRY), num_last=9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store.close()
    with PageStore.open(path, max_host_bytes=1 << 20) as store:
        assert store.num_tokens == 1022
        assert torch.equal(store.layers[1].read(0, 1022)[0], k[:, :, :1022])


def test_damaged_page_is_refused(tmp_path):
    path = tmp_path / "kv"
    with open_store(GEOMETRY, path) as store:
        store.layers[0].append(*tokens(GEOMETRY, 400))
    with open(path, "r+b") as f:
        f.seek(12288 + 4096 + 10 * 4096 + 3)
        f.write(b"\xff\x01\x02")
    expected = re.escape(str(path)) + " is damaged: page 2 of layer 0, sequence 0, kv head 1"
    with pytest.raises(PageStoreError, match=expected):
        PageStore.open(path, max_host_bytes=1 << 20)
    with PageStore.open(path, max_host_bytes=20 * GEOMETRY.page_bytes, verify=False) as store:
        wanted = torch.tensor([1, 2], dtype=torch.int32).expand(1, 1, 1, 2)
        for _ in range(2):
            with pytest.raises(PageStoreError, match=expected):
                store.layers[0].attend(queries(GEOMETRY), wanted)
        store.layers[0].attend(queries(GEOMETRY), wanted + 2)
        assert store.host.frames.num_used <= 20
    other = PageGeometry(num_layers=2, num_kv_heads=2, head_dim=32, page_size=8, dtype=torch.float32)
    with pytest.raises(PageStoreError, match="another geometry: head_dim_v 16 and not 32"):
        PageStore.open(path, other, max_host_bytes=1 << 20, verify=False)


def test_direct_io(tmp_path):
    geometry = PageGeometry(num_layers=1, num_kv_heads=2, head_dim=64, page_size=16, dtype=torch.float32)
    with open_store(geometry, tmp_path / "kv", frames=40, direct_io=True) as store:
        k, v = tokens(geometry, 1000)
        store.layers[0].append(k, v)
        assert_attends(store.layers[0], k, v, pick(geometry, 63, 9), queries(geometry))
        assert store.stats.bytes_read > 0
    with pytest.raises(PageStoreError, match="pages of 1536 bytes are not multiples of 4096"):
        open_store(GEOMETRY, tmp_path / "kv2", direct_io=True)


def test_without_the_compiled_part(monkeypatch):
    """Importing works, for those who need none of it; a store says what is missing."""
    monkeypatch.setitem(sys.modules, "longctx._host", None)
    host = runpy.run_path(longctx.store._host.__file__)
    for make in (host["FrameTable"], host["PageFile"].open, host["PageFile"].create):
        with pytest.raises(ImportError, match=r"a page store needs longctx\._host"):
            make("path")
