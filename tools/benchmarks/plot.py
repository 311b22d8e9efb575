"""The image of a run: time against dilation and against the number of tokens."""

from pathlib import Path

from dinat_backbones.files import atomic_write


def draw(curves: list[dict], path: Path) -> str:
    """Draw `Bench.curves` to a PNG file.

    Returns:
        What happened, in words: matplotlib may be missing, or there may be nothing to draw.
    """
    if not curves:
        return "no curves in these suites, no image"
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        return f"no image: {error.name} is not installed (pip install matplotlib)"
    axes_names = list(dict.fromkeys(point["axis"] for point in curves))
    figure, axes = pyplot.subplots(1, len(axes_names), figsize=(5.5 * len(axes_names), 4), squeeze=False)
    for axis, drawn in zip(axes_names, axes[0], strict=True):
        points = [point for point in curves if point["axis"] == axis]
        for name in dict.fromkeys(point["name"] for point in points):
            line = sorted((point["at"], point["ms"]) for point in points if point["name"] == name)
            drawn.plot(*zip(*line, strict=True), marker="o", label=name)
        drawn.set(xlabel=axis, ylabel="milliseconds", ylim=(0, None), title=f"time against {axis}")
        drawn.legend()
        drawn.grid(alpha=0.3)
    figure.tight_layout()
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=120)
    pyplot.close(figure)
    return f"wrote {path}"
