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
    """Writes decode.png: time a token against keys read; raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    total = len(task.questions)
    scatter = None
    for result in results:
        keys = result.keys_read or len(task.context)
        scatter = axes.scatter(
            keys, result.token_seconds * 1e3, c=[sum(result.right)], vmin=0, vmax=total, cmap="RdYlGn", s=90, ec="black"
        )
        axes.annotate(
            f"{result.name} {sum(result.right)}/{total}",
            (keys, result.token_seconds * 1e3),
            textcoords="offset points",
            xytext=(8, 4),
            fontsize=8,
        )
    axes.set(xscale="log", yscale="log", xlabel="keys read, a token, layer and kv head", ylabel="a token [ms]")
    axes.set_title(f"Decoding behind {len(task.context)} tokens: speed, keys read and needles found")
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)
    if scatter is not None:
        figure.colorbar(scatter, ax=axes, label=f"needles found of {total}")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "decode.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
