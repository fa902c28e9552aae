"""The table and the figure of `longctx demo --decode`."""

from __future__ import annotations

from pathlib import Path

import torch

from longctx.demo.decode_measure import Decoded, DecodeTask
from longctx.demo.decode_rows import SDPA
from longctx.demo.report import plain_table

NOTES = [
    "What this shows: each cache runs under plain generate(), and whether what it keeps or reads still holds one fact",
    "of a long text that was read before the question was known. What it does not: how well a trained model keeps its",
    "quality. These weights are constructed: methods that keep what earlier queries looked at have nothing to go by,",
    "since nobody looks at a needle before it is asked for; and keys are signs, of which the extremes over a page of",
    "16 say almost nothing, so Quest needs smaller pages here than in a trained model.",
]


def lines(task: DecodeTask, results: list[Decoded], prefill_seconds: float) -> list[str]:
    sdpa = next(result for result in results if result.name == SDPA.name)
    spec = task.model
    return [
        f"text    {task.source}",
        f"sha256  {task.sha256}",
        f"model   constructed Llama, 2 layers, {spec.num_heads} query and {spec.num_kv_heads} kv heads, {spec.dtype}, "
        f"{torch.get_num_threads()} threads",
        f"cache   {len(task.context)} tokens, prefilled once by dense attention in {prefill_seconds:.1f} s",
        "",
        *plain_table(
            ["cache", "needles", "a token [ms]", "vs SDPA", "keys read", "of", "share", "hit rate", "to fill [s]"],
            [
                [
                    result.name,
                    f"{sum(result.right)}/{len(result.right)}",
                    f"{result.token_seconds * 1e3:.2f}",
                    f"{sdpa.token_seconds / result.token_seconds:.2f}x",
                    f"{result.keys_read:.0f}" if result.keys_stored else "-",
                    f"{result.keys_stored:.0f}" if result.keys_stored else "-",
                    f"{result.keys_read / result.keys_stored:.2%}" if result.keys_stored else "-",
                    "-" if result.hit_rate is None else f"{result.hit_rate:.1%}",
                    f"{result.fill_seconds:.2f}",
                ]
                for result in results
            ],
        ),
        "",
        "a token: whole forward of the model, median; keys read: a token, layer and kv head; hit rate: of the pages",
        "that a tiered cache wanted, those that were in memory.",
        "",
    ]


def draw(task: DecodeTask, results: list[Decoded], directory: Path) -> Path:
    """Writes decode.png: what a token costs under every cache; raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.36 * len(results) + 1.2), layout="constrained")
    total = len(task.questions)
    places = range(len(results))
    found = [sum(result.right) / total for result in results]
    milliseconds = [result.token_seconds * 1e3 for result in results]
    axes.barh(places, milliseconds, color=matplotlib.colormaps["RdYlGn"](found), ec="black", lw=0.6)
    for place, result, width in zip(places, results, milliseconds, strict=True):
        keys = result.keys_read or len(task.context)
        axes.text(
            width * 1.05, place, f"{sum(result.right)}/{total} needles, {keys:,.0f} keys", va="center", fontsize=8
        )
    axes.set_yticks(places, [result.name for result in results])
    axes.invert_yaxis()
    axes.set(
        xscale="log", xlabel="a token of the whole model [ms]", xlim=(min(milliseconds) / 2, max(milliseconds) * 6)
    )
    axes.set_title(f"Decoding behind {len(task.context)} tokens: time, needles found, keys read a kv head")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "decode.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
