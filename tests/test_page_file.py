"""The page file: what was committed is there after anything, and what is damaged is never read."""

import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import page_file_process as process

_host = pytest.importorskip("longctx._host", reason="longctx._host was not built")
PageFile, PageFileError = _host.PageFile, _host.PageFileError

PAGE_OF = {"header": 40, "record 0": 4096 + 8, "record 1": 8192 + 1, "entry": 12288 + 32 * 5 + 12}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "pages")


def create(path, pages=0):
    file = PageFile.create(path, process.GEOMETRY)
    if pages:
        process.add_pages(file, pages)
        file.commit()
    return file


def every_page(file):
    return [(lane, page) for lane in range(process.NUM_LANES) for page in range(file.num_pages(lane))]


def start(role, path, *arguments):
    command = [sys.executable, process.__file__, _host.__file__, role, path, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def flip_bit(path, offset):
    with open(path, "r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ 4]))


def test_checksum_is_crc32c():
    assert _host.crc32c(b"123456789") == (0xE3069283, 0xE3069283)  # the published check value
    data = bytes(np.random.default_rng(0).integers(0, 256, 1001, dtype=np.uint8))
    for size in (0, 1, 7, 8, 9, 1001):
        assert len(set(_host.crc32c(data[:size]))) == 1


@pytest.mark.sanitize
def test_written_pages_come_back(path):
    file = create(path, 150)  # more than a segment holds
    process.check(file, every_page(file))
    del file
    again = PageFile.open(path, writable=True)
    assert [again.num_pages(lane) for lane in range(process.NUM_LANES)] == [150] * 6
    again.verify()
    process.check(again, every_page(again))
    process.add_pages(again, 3)
    process.check(again, [(5, 152)])  # the writer reads what is not committed yet


@pytest.mark.sanitize
def test_only_commits_count(path):
    file = create(path, 10)
    process.add_pages(file, 5)
    assert PageFile.open(path).num_pages(0) == 10
    file.rollback()
    assert file.num_pages(0) == 10
    process.add_pages(file, 1)
    file.commit(sync=True)
    reader = PageFile.open(path)
    assert reader.num_pages(0) == 11
    process.check(reader, every_page(reader))


@pytest.mark.sanitize
def test_cut_and_replaced_pages(path):
    file = create(path, 20)
    reader = PageFile.open(path)
    blocks = os.stat(path).st_blocks
    for lane in range(process.NUM_LANES):
        file.share(lane, lane, 8)
    file.commit()
    assert os.stat(path).st_blocks < blocks or os.uname().sysname != "Linux"
    process.add_pages(file, 2)
    # A page that is partly filled is replaced when it has more tokens, and must be before another follows.
    partial = process.content(0, 10)[None]
    file.append([0], [10], [1], partial, [0])
    with pytest.raises(PageFileError, match=r"cannot take page 11 of layer 0.*partly filled"):
        file.append([0], [11], [4], partial, [0])
    file.append([0], [10], [3], partial, [0])
    file.commit()
    assert (file.num_tokens(0), file.num_tokens(1)) == (10 * 4 + 3, 10 * 4)
    with pytest.raises(
        PageFileError, match=r"has been written to, and page 15 .* is not what it was: see what there is by `refresh`"
    ):
        process.check(reader, [(0, 15)])
    assert reader.refresh().tolist() == [8] * 6
    with pytest.raises(PageFileError, match="has no page 15"):
        process.check(reader, [(0, 15)])
    for f in (file, reader, PageFile.open(path)):
        assert [f.num_pages(lane) for lane in range(3)] == [11, 10, 10]
        f.verify()
        process.check(f, every_page(f))


@pytest.mark.parametrize("after", [1, 3, 8])
def test_killed_writer(path, after):
    """kill -9 in the middle of writes, twice on one file; what the writer reported is there, and whole."""
    create(path)
    for _ in range(2):
        writer = start("write", path)
        reported = int(list(itertools.islice(writer.stdout, after))[-1])
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.communicate()[0].splitlines()
        assert writer.returncode == -signal.SIGKILL
        file = PageFile.open(path, writable=True)  # the lock died with the writer
        counts = {file.num_pages(lane) for lane in range(process.NUM_LANES)}
        assert len(counts) == 1
        assert counts.pop() >= int([reported, *rest][-1])
        file.verify()
        process.check(file, every_page(file))
        process.add_pages(file, 2)
        file.commit()
        del file


@pytest.mark.parametrize("after", [2, 40])
def test_killed_writer_whose_lanes_share_pages(path, after):
    """What is there is what was committed, once and not more: lanes and pages as after one of the last commits."""
    writer = start("share", path)
    reported = int(list(itertools.islice(writer.stdout, after))[-1])
    os.kill(writer.pid, signal.SIGKILL)
    reported = int([reported, *writer.communicate()[0].splitlines()][-1])
    file = PageFile.open(path, writable=True)
    file.verify()
    states = list(itertools.islice(process.changes(), reported + 2))
    assert process.held(file) in states[reported:]


@pytest.mark.sanitize
def test_lanes_share_pages(path):
    """What lanes hold after shares and cuts, for the writer, for a reader beside it, and for whoever opens the file."""
    file = PageFile.create(path, process.SHARED)
    reader = PageFile.open(path)
    before = [[], [], []]
    for state in itertools.islice(process.changes(file), 25):
        changed = reader.refresh()
        assert process.held(file) == process.held(reader) == process.held(PageFile.open(path)) == state
        for lane in range(3):  # what refresh() does not name is as it was
            assert before[lane][: changed[lane]] == state[lane][: changed[lane]]
        before = state
    common = sum(a == b for a, b in zip(state[0], state[1], strict=False))
    assert file.num_shared(0, 1) == common
    # A page is stored once, however many lanes have it.
    blocks = os.stat(path).st_blocks * 512
    distinct = len(set().union(*state))
    assert distinct * 4096 <= blocks <= (distinct + 129) * 4096 + 12288 + 4096 * (1 + len(state))
    with pytest.raises(PageFileError, match="cannot give lane 0 the first 9999 of"):
        file.share(0, 1, 9999)
    with pytest.raises(PageFileError, match="cannot give lane 0"):  # another head of the sequence
        create(path + "2", 3).share(0, 1, 1)


@pytest.mark.sanitize
def test_rollback_to_a_mark_keeps_cuts_before_it(path):
    file = PageFile.create(path, process.SHARED)
    *_, state = itertools.islice(process.changes(file), 5)
    longest = max(range(3), key=lambda lane: len(state[lane]))
    file.share(0, longest, 4)
    mark = file.mark()
    page = process.content(0, 3999)[None]
    file.append([0], [4], [4], page, [0])
    file.rollback(mark)
    assert process.held(file)[0] == state[longest][:4]
    file.append([0], [4], [4], page, [0])
    file.commit()
    assert process.held(PageFile.open(path))[0] == [*state[longest][:4], 3999]
    with pytest.raises(PageFileError, match="cannot go back"):
        file.rollback(mark)


def test_readers_beside_a_writer(path):
    file = create(path)
    total, failures = 600, []
    readers = [start("read", path, str(total)) for _ in range(2)]

    def read_here():
        try:
            process.read(_host, path, total)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read_here) for _ in range(2)]
    for thread in threads:
        thread.start()
    while file.num_pages(0) < total:
        process.add_pages(file, 4)
        file.commit()
    for thread in threads:
        thread.join()
    assert not failures
    for reader in readers:
        assert reader.communicate()[1] == ""
        assert reader.returncode == 0


@pytest.mark.sanitize
def test_one_writer(path):
    file = create(path, 2)
    with pytest.raises(PageFileError, match="is being written"):
        PageFile.open(path, writable=True)
    with pytest.raises(PageFileError, match="is being written"):
        PageFile.create(path, process.GEOMETRY, overwrite=True)
    with pytest.raises(PageFileError, match="exists already"):
        PageFile.create(path, process.GEOMETRY)
    with pytest.raises(PageFileError, match="for reading only"):
        process.add_pages(PageFile.open(path), 1)
    del file
    assert PageFile.create(path, process.GEOMETRY, overwrite=True).num_pages(0) == 0
    assert os.listdir(Path(path).parent) == ["pages"]


def test_disk_full(path):
    """The disk is full where this process may not write a larger file; then there is room again."""
    file = create(path, 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path), hard))
    try:
        with pytest.raises(
            PageFileError, match=r"is full: page \d+ of layer \d, sequence 0, kv head \d was not stored"
        ):
            process.add_pages(file, 1000)
        assert file.num_pages(0) == 20
        process.check(file, every_page(file))
        process.add_pages(file, 1)  # what is left of the last segment
        file.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    process.add_pages(file, 500)
    file.commit()
    del file
    file = PageFile.open(path)
    assert file.num_pages(0) == 521
    file.verify()
    process.check(file, every_page(file))


@pytest.mark.sanitize
@pytest.mark.parametrize("where", PAGE_OF)
def test_flipped_bit_beside_the_pages(path, where):
    create(path, 30)
    flip_bit(path, PAGE_OF[where])
    with pytest.raises(PageFileError, match=rf"{re.escape(path)} is damaged: .*({where.split()[0]}|page number 5)"):
        PageFile.open(path)


@pytest.mark.sanitize
def test_flipped_bit_in_a_page(path):
    file = create(path, 30)
    # Pages are stored lane by lane: number 64 is page 4 of lane 2, which is layer 1, head 0.
    flip_bit(path, 12288 + 4096 + 64 * 4096 + 1023)
    expected = "is damaged: page 4 of layer 1, sequence 0, kv head 0"
    for f in (file, PageFile.open(path)):
        with pytest.raises(PageFileError, match=expected):
            f.verify()
        with pytest.raises(PageFileError, match=expected):
            process.check(f, [(2, 3), (2, 4), (2, 5)])
        process.check(f, [id for id in every_page(f) if id != (2, 4)])


@pytest.mark.sanitize
def test_any_damage_is_noticed_or_harmless(path):
    """Bytes changed anywhere: an error of the page file, or every page as it was."""
    create(path, 12)
    whole, rng = Path(path).read_bytes(), np.random.default_rng(0)
    refused = 0
    for i in range(300):
        data = bytearray(whole)
        # Half of them where the file keeps its books.
        end = 12288 + 4096 if i % 2 else len(data)
        for offset in rng.integers(0, end, rng.integers(1, 4)):
            data[offset] = rng.integers(256)
        Path(path).write_bytes(data)
        try:
            file = PageFile.open(path)
            file.verify()
        except PageFileError:
            refused += 1
        else:
            assert file.num_pages(0) == 12
            process.check(file, every_page(file))
    assert refused > 50


@pytest.mark.sanitize
@pytest.mark.parametrize("size", [0, 50, 5000, 12288 + 100, 12288 + 4096 * 40, 12288 + 129 * 4096 + 4096])
def test_truncated(path, size):
    create(path, 30)
    os.truncate(path, size)
    with pytest.raises(PageFileError, match=r"is truncated: .*(page|record)" if size > 100 else "is not a page file"):
        PageFile.open(path)


def test_another_kind_of_file(path):
    Path(path).write_bytes(b"x" * 20000)
    with pytest.raises(PageFileError, match="is not a page file"):
        PageFile.open(path)
    with pytest.raises(PageFileError, match="cannot be opened: No such file"):
        PageFile.open(path + "2")
    os.remove(path)
    create(path, 1)
    with open(path, "r+b") as f:
        f.seek(8)
        f.write(b"\x07")
    with pytest.raises(PageFileError, match="has format version 7; this build reads version 2"):
        PageFile.open(path)
