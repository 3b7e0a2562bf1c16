"""What a run shows at its end: the curves of its epochs, and a table."""

from pathlib import Path
from typing import Any

from ..tasks.step import Step
from ..tuning.handle import Handle
from .run import RunFolder


def draw_curves(run: RunFolder, task: Step) -> None:
    """curves.png in a run's folder: losses, the validation metric that the task monitors, and the learning rate."""
    rows = run.rows()
    if not rows:
        return
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    epochs = [r["epoch"] + 1 for r in rows]
    marker = "o" if len(rows) == 1 else ""  # a line through one point shows nothing
    axes[0].plot(epochs, [r["train_loss"] for r in rows], label="train", marker=marker)
    val = [r for r in rows if "val_loss" in r]
    if val:
        seen = [r["epoch"] + 1 for r in val]
        axes[0].plot(seen, [r["val_loss"] for r in val], label="val", marker=marker)
        axes[1].plot(seen, [r[f"val_{task.monitor}"] for r in val], label="val", color="C1", marker=marker)
    axes[0].set(xlabel="epoch", ylabel="loss")
    axes[0].legend()
    axes[1].set(xlabel="epoch", ylabel=task.title)
    if not val:
        axes[1].text(0.5, 0.5, "no validation split", ha="center", transform=axes[1].transAxes)
    axes[2].plot(epochs, [r["lr"] for r in rows], marker=marker)
    axes[2].set(xlabel="epoch", ylabel="learning rate")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.suptitle(str(run.path))
    figure.savefig(Path(run.file("curves.png")), dpi=110)


def show(run: RunFolder, handle: Handle, task: Step, metrics: dict[str, Any]) -> None:
    """Print the final table, and log which files there are."""
    from rich.console import Console
    from rich.table import Table

    own = sum(p.numel() for p in handle.parameters())
    table = Table(title=str(run.path))
    for column in ("method", "parameters", "with head", "epoch", "s/epoch", f"val {task.title}", f"test {task.title}"):
        table.add_column(column, justify="left" if column == "method" else "right")

    def number(key: str) -> str:
        return f"{metrics[key]:.2f}" if metrics.get(key) is not None else "-"

    solver = f" ({run.config.train.solver})" if "solver" in metrics else ""
    table.add_row(
        handle.method.name + solver, f"{own:,}", f"{metrics['trainable']:,}", str(metrics["epoch"]),
        number("seconds_per_epoch"), number(f"val_{task.monitor}"), number(f"test_{task.monitor}"),
    )  # fmt: skip
    Console().print(table)
    pictures = sorted(p.name for p in run.path.glob("*.png"))
    files = [n for n in ("best.safetensors", "last.safetensors", "metrics.json") if (run.path / n).exists()]
    run.logger.info("%s are in %s", ", ".join([*files, *pictures]), run.path)
