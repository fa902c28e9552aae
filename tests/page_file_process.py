"""A process of its own that writes or reads a page file: `python page_file_process.py HOST_MODULE ROLE PATH ..`.

The compiled module is loaded alone, so that a process starts in a tenth of a second.
"""

import functools
import importlib.util
import random
import sys

import numpy as np

GEOMETRY = {
    "num_layers": 3,
    "batch": 1,
    "num_kv_heads": 2,
    "page_size": 4,
    "head_dim": 64,
    "head_dim_v": 64,
    "element_bytes": 2,
    "dtype": "bfloat16",
}
NUM_LANES = 6
PAGE_BYTES = 1024


# Three sequences that share pages, a lane each.
SHARED = {**GEOMETRY, "num_layers": 1, "batch": 3, "num_kv_heads": 1}


def load_host(path):
    spec = importlib.util.spec_from_file_location("longctx._host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def content(lane, page, version=0):
    """The bytes that page `page` of `lane` must hold."""
    return np.random.default_rng((lane, page, version)).integers(0, 256, PAGE_BYTES, dtype=np.uint8)


def add_pages(file, count, version=0):
    """The next `count` pages of every lane, in one call."""
    first = file.num_pages(0)
    lanes = np.repeat(np.arange(NUM_LANES), count)
    pages = np.tile(np.arange(first, first + count), NUM_LANES)
    buffer = np.stack([content(lane, page, version) for lane, page in zip(lanes, pages, strict=True)])
    file.append(lanes, pages, np.full(len(lanes), 4), buffer, np.arange(len(lanes)))


def check(file, chosen):
    """Reads pages `[(lane, page)]` and compares them."""
    lanes, pages = np.array(chosen).reshape(-1, 2).T
    buffer = np.zeros((len(lanes), PAGE_BYTES), dtype=np.uint8)
    file.read(lanes, pages, buffer, np.arange(len(lanes)))
    for row, lane, page in zip(buffer, lanes, pages, strict=True):
        assert (row == content(lane, page)).all(), (lane, page)


def write(host, path):
    """Appends and commits until it is killed; says how many pages a lane has after each commit."""
    file = host.PageFile.open(path, writable=True)
    while True:
        add_pages(file, random.randint(1, 40))
        file.commit()
        print(file.num_pages(0), flush=True)


def read(host, path, total):
    """Reads what is committed, until `total` pages a lane are."""
    file = host.PageFile.open(path)
    while True:
        file.refresh()
        count = file.num_pages(0)
        if count:
            check(file, [(random.randrange(NUM_LANES), random.randrange(count)) for _ in range(20)])
        if count == int(total):
            return


def changes(file=None):
    """What a writer does to three lanes that share pages, by fixed dice: yields after each commit what they hold.

    A page is known by the number of the append that wrote it. Without a file, it only says what would be there.
    """
    dice, lanes, count = random.Random(0), [[], [], []], 0
    while True:
        for _ in range(dice.randint(1, 3)):
            lane, source = dice.randrange(3), dice.randrange(3)
            keep = dice.randint(len(lanes[source]) // 2, len(lanes[source]))
            lanes[lane] = lanes[source][:keep]
            if file is not None:
                file.share(lane, source, keep)
        for lane in range(3):
            added = list(range(count, count + dice.randint(0, 9)))
            count += len(added)
            if file is not None and added:
                pages = len(lanes[lane]) + np.arange(len(added))
                buffer = np.stack([content(lane=0, page=number) for number in added])
                file.append(np.full(len(added), lane), pages, np.full(len(added), 4), buffer, np.arange(len(added)))
            lanes[lane] += added
        if file is not None:
            file.commit()
        yield [list(pages) for pages in lanes]


@functools.cache
def numbers_of_pages():
    return {content(0, number).tobytes(): number for number in range(4000)}


def held(file):
    """What `changes` would call the pages of each lane."""
    numbers, lanes = numbers_of_pages(), []
    for lane in range(3):
        count = file.num_pages(lane)
        buffer = np.zeros((count, PAGE_BYTES), dtype=np.uint8)
        file.read(np.full(count, lane), np.arange(count), buffer, np.arange(count))
        lanes.append([numbers[row.tobytes()] for row in buffer])
    return lanes


def share(host, path):
    """Shares, cuts, appends and commits until it is killed; says how often it has committed."""
    for number, _ in enumerate(changes(host.PageFile.create(path, SHARED))):
        print(number, flush=True)


if __name__ == "__main__":
    {"write": write, "read": read, "share": share}[sys.argv[2]](load_host(sys.argv[1]), *sys.argv[3:])
