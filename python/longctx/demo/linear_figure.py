"""The figure of `longctx demo --linear`: tokens a second against length."""

from __future__ import annotations

from pathlib import Path

from longctx.demo.linear_measure import DENSE, HEAD_DIM, HEADS, LINEAR, SDPA, Result


def draw(result: Result, directory: Path) -> Path:
    """Writes linear.png; raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, marker in ((LINEAR, "o"), (DENSE, "s"), (SDPA, "D")):
        timings = result.of(name)
        axes.plot([timing.length for timing in timings], [timing.rate for timing in timings], marker=marker, label=name)
    axes.set(xscale="log", yscale="log", xlabel="sequence [tokens]", ylabel="tokens/s")
    axes.set_xscale("log", base=2)
    axes.set_title(f"Causal prefill, attention alone: {HEADS} heads of {HEAD_DIM}, {result.dtype}")
    axes.grid(alpha=0.3)
    axes.legend()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "linear.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
