"""A million tokens of KV in bounded memory: `python bench/million.py --path DIRECTORY`.

Fills a page store directly (nothing is prefilled: there is no model), then decodes: for each layer and token, pages are
scored by their summaries, the best are brought from wherever they are, and attended to. Prints tokens per
second, hit rate and peak resident memory of this process. Needles in the context prove that the pages are the
right ones: a query for one must give its value. The file, 8 GiB, is deleted at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import longctx
from longctx.store import PageGeometry, PageStore, StoreLayer
from longctx.store.read_ahead import ReadAhead

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 128
CHUNK = 4096  # tokens appended at once
NEEDLES = 4  # in each layer


def peak_bytes() -> int:
    """The most memory this process ever had resident, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def needle(layer: int, number: int, num_tokens: int) -> tuple[int, Tensor, Tensor]:
    """Its position, and K and V `[num_kv_heads, head_dim]`."""
    generator = torch.Generator().manual_seed(1000 * layer + number)
    position = int(torch.randint(num_tokens // 8, num_tokens - num_tokens // 8, (), generator=generator))
    key, value = torch.randn(2, NUM_KV_HEADS, HEAD_DIM, generator=generator)
    return position, key * (20 / key.norm(dim=-1, keepdim=True)), value


def chunks(layer: int, num_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """K and V of a layer: slices of one random block at random places, and the needles."""
    generator = torch.Generator().manual_seed(layer)
    block = torch.randn(2, 1, NUM_KV_HEADS, 2 * CHUNK, HEAD_DIM, generator=generator, dtype=torch.bfloat16)
    needles = [needle(layer, number, num_tokens) for number in range(NEEDLES)]
    for begin in range(0, num_tokens, CHUNK):
        offset = int(torch.randint(0, CHUNK, (), generator=generator))
        k, v = block[:, :, :, offset : offset + min(CHUNK, num_tokens - begin)].clone()
        for position, key, value in needles:
            if begin <= position < begin + CHUNK:
                k[0, :, position - begin], v[0, :, position - begin] = key.bfloat16(), value.bfloat16()
        yield k, v


def attend(layer: StoreLayer, q: Tensor, budget: int, read_ahead: int = 0) -> Tensor:
    """One layer of one step: score the pages, choose, attend; the next best ones come in the background."""
    page_size = layer.geometry.page_size
    assert layer.summary is not None
    scores = longctx.page_scores(q, layer.summary.pages, head_reduce="group_max")
    pages, counts = longctx.topk_select(scores, min(budget // page_size, scores.shape[-1]))
    ahead = None
    if read_ahead:
        ahead, _ = longctx.topk_select(scores, min(budget // page_size + read_ahead, scores.shape[-1]))
    out, _ = layer.attend(q, pages, counts, num_first=page_size, num_last=page_size, ahead=ahead)
    return out


class FarFile:
    """A page file behind a network: every 16 pages take so many milliseconds more."""

    def __init__(self, file: Any, milliseconds: float) -> None:
        self.file, self.milliseconds = file, milliseconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def read(self, lanes: Any, pages: Any, buffer: Any, rows: Any) -> None:
        time.sleep(self.milliseconds / 1000 * -(-len(pages) // 16))
        self.file.read(lanes, pages, buffer, rows)


def move_away(store: PageStore, milliseconds: float) -> None:
    store.tiers.file = FarFile(store.file, milliseconds)  # type: ignore[assignment]
    store.tiers.ahead = ReadAhead(store.tiers.file, store.host)


def queries_of(store: PageStore, trace: str, seed: int) -> Iterator[Tensor]:
    """Queries `[layers, 1, num_q_heads, 1, head_dim]` of one token after the other.

    A trace is the cosine of a query with the one before, or "topics": queries turn to one direction for 16 tokens, then
    to another.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(store.layers), 1, NUM_Q_HEADS, 1, HEAD_DIM)
    queries = torch.randn(shape, generator=generator)
    for step in itertools.count():
        if trace != "topics" or step % 16 == 0:
            fresh = torch.randn(shape, generator=generator)
        similarity = 0.95 if trace == "topics" else float(trace)
        queries = similarity * queries + (1 - similarity**2) ** 0.5 * fresh
        queries *= HEAD_DIM**0.5 / queries.norm(dim=-1, keepdim=True)
        yield queries.bfloat16()


def decode(store: PageStore, steps: int, budget: int, trace: str, read_ahead: int, seed: int) -> dict[str, object]:
    """Steps of a trace that no run before has seen, behind eight that bring its first pages."""
    generator = torch.Generator().manual_seed(seed)
    trace_queries = queries_of(store, trace, seed)

    def run(count: int) -> None:
        for queries in itertools.islice(trace_queries, count):
            for layer, q in zip(store.layers, queries, strict=True):
                k, v = torch.randn(2, 1, NUM_KV_HEADS, 1, HEAD_DIM, generator=generator).bfloat16()
                layer.append(k, v)
                attend(layer, q, budget, read_ahead)

    run(8)
    store.settle()
    store.reset_stats()
    read = store.stats.bytes_read
    began = time.perf_counter()
    run(steps)
    seconds = time.perf_counter() - began
    stats = store.stats
    return {
        "queries": trace,
        "read ahead": read_ahead,
        "tokens/s": steps / seconds,
        "hit rate": stats.hit_rate,
        "misses per token": stats.misses / steps,
        "read-ahead hits per token": stats.read_ahead_hits / steps,
        "MiB read per token": (stats.bytes_read - read) / steps / 2**20,
    }


def find_needles(store: PageStore, num_tokens: int, budget: int) -> int:
    """How many needles a query for them finds."""
    found = 0
    for index, layer in enumerate(store.layers):
        for number in range(NEEDLES):
            _, key, value = needle(index, number, num_tokens)
            q = key.repeat_interleave(NUM_Q_HEADS // NUM_KV_HEADS, dim=0).bfloat16()[None, :, None]
            out = attend(layer, q, budget)[0, :, 0].float()
            expected = value.repeat_interleave(NUM_Q_HEADS // NUM_KV_HEADS, dim=0)
            found += bool(torch.allclose(out, expected, atol=0.05, rtol=0.05))
    return found


def run(arguments: argparse.Namespace, path: Path) -> dict[str, object]:
    at_start = peak_bytes()
    geometry = PageGeometry(
        num_layers=arguments.layers, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, page_size=arguments.page_size
    )
    with PageStore(
        geometry, path=path, max_host_bytes=arguments.max_host_mib << 20, direct_io=not arguments.buffered
    ) as store:
        began = time.perf_counter()
        for index, layer in enumerate(store.layers):
            layer.summarize(max_tokens=arguments.tokens + 4096)
            for k, v in chunks(index, arguments.tokens):
                layer.append(k, v)
        store.commit(sync=True)
        seconds = time.perf_counter() - began
        if arguments.far:
            move_away(store, arguments.far)
        result: dict[str, object] = {
            "tokens": store.num_tokens,
            "KV GiB": store.stats.bytes_written / 2**30,
            "fill seconds": seconds,
            "runs": [
                decode(store, arguments.steps, arguments.budget, trace, read_ahead, seed)
                for seed, (trace, read_ahead) in enumerate(itertools.product(arguments.queries, arguments.read_ahead))
            ],
            "needles": NEEDLES * arguments.layers,
            "needles found": find_needles(store, arguments.tokens, arguments.budget),
            "frames MiB": store.host.max_bytes / 2**20,
            "peak beyond imports MiB": (peak_bytes() - at_start) / 2**20,
            "peak resident MiB": peak_bytes() / 2**20,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, default=None, help="directory for the file (default: a temporary one)")
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--budget", type=int, default=2048, help="tokens that each kv head selects")
    parser.add_argument("--max-host-mib", type=int, default=1024, help="memory for pages")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--queries", nargs="+", default=["0", "0.98"], help="cosines of neighbours, or topics")
    parser.add_argument("--read-ahead", nargs="+", type=int, default=[0], help="next best pages that are brought too")
    parser.add_argument(
        "--far", type=float, default=0, help="milliseconds that 16 pages take more, as behind a network"
    )
    parser.add_argument("--buffered", action="store_true", help="read through the page cache, which fills with pages")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.path) as directory:
        result = run(arguments, Path(directory) / "kv")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
