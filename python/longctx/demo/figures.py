"""The figure: prefill time against length; needles and coverage against density."""

from __future__ import annotations

from pathlib import Path

from longctx.demo.measure import Measurement
from longctx.demo.report import needles
from longctx.demo.task import Task


def draw(task: Task, rows: list[Measurement], directory: Path) -> Path:
    """Writes demo.png; raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time, recall, coverage) = pyplot.subplots(1, 3, figsize=(16, 5), layout="constrained")
    colors = pyplot.get_cmap("Paired")
    for index, row in enumerate(row for row in rows if not row.refused):
        style = {"color": colors(index), "marker": "osD^v<>PX*hd"[index % 12], "label": row.name}
        seconds: dict[int, list[float]] = {}
        for answer in row.answers:
            seconds.setdefault(answer.trial.length, []).append(answer.prefill_seconds)
        lengths = sorted(seconds)
        time.plot(lengths, [sorted(seconds[n])[len(seconds[n]) // 2] for n in lengths], **style)
        densities = [answer.density for answer in row.answers if answer.trial.length == task.sweep_length]
        density = 100 * sum(densities) / len(densities)
        right, total = needles(row)
        recall.plot(density, right, linestyle="none", **style)
        if row.coverage_mean is not None:
            coverage.plot(density, 100 * row.coverage_mean, linestyle="none", **style)
    time.set(xscale="log", yscale="log", xlabel="prompt [tokens]", ylabel="prefill [s]", title="Prefill time")
    time.set_xscale("log", base=2)
    recall.set(xlabel=f"density at {task.sweep_length} tokens [%]", ylabel="needles right", title="Needles found")
    recall.set_ylim(-0.3, total + 0.3)
    coverage.set(xlabel=f"density at {task.sweep_length} tokens [%]", ylabel="softmax mass kept, mean [%]")
    coverage.set_title("Coverage")
    for axes in (time, recall, coverage):
        axes.grid(alpha=0.3)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "demo.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
