"""What a run shows at its end: the curves of its epochs, a page of everything, and a table."""

from typing import Any

from ..reporting.pictures import figure, plain, save
from ..tasks.step import Step
from ..tuning.handle import Handle
from .results import write_report
from .run import RunFolder, environment


def draw_curves(run: RunFolder, task: Step) -> None:
    """curves.png in a run's folder: losses, the validation metric that the task monitors, and the learning rate."""
    rows = run.rows()
    if not rows:
        return
    from matplotlib.ticker import MaxNLocator

    drawn = figure(13, 3.6)
    axes = drawn.subplots(1, 3)
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
    drawn.suptitle(plain(run.path, 100))
    save(drawn, run.file("curves.png"))


def report(run: RunFolder, handle: Handle, task: Step, metrics: dict[str, Any]) -> None:
    """report.html of a finished run, where the configuration asks for it."""
    config = run.config
    if config.report == "none":
        return
    facts = {
        "task": config.task,
        "data": config.data.source,
        "backbone": config.model.name,
        "method": _method(handle),
        "parameters of the method": sum(p.numel() for p in handle.parameters()),
        "trained parameters, head included": metrics["trainable"],
        "epoch that was chosen": metrics["epoch"],
        "seconds per epoch": metrics["seconds_per_epoch"],
    }
    facts |= {_name(k, task): v for k, v in metrics.items() if k not in ("epoch", "trainable", "seconds_per_epoch")}
    row = (run.rows() or [{}])[-1]
    names = {"samples_per_second": "samples per second, last epoch", "peak_memory_gb": "peak memory, GB"}
    facts |= {name: row[key] for key, name in names.items() if key in row}
    again = ["vpeft", "train", "--cfg", str(run.file("config.yaml")), f"name={config.name}-again"]
    write_report(run.folder, str(run.path), config, facts, environment(), again)


def _method(handle: Handle) -> str:
    options = ", ".join(f"{k}={v}" for k, v in handle.method.options().items())
    return f"{handle.method.name} ({options})" if options else handle.method.name


def _name(key: str, task: Step) -> str:
    """A metric's key for people, with its unit."""
    split, _, name = key.partition("_")
    if name == task.monitor:
        return f"{split} {task.title}"
    return f"{split} expected calibration error, %" if name == "ece" else key.replace("_", " ")


def show(run: RunFolder, handle: Handle, task: Step, metrics: dict[str, Any]) -> None:
    """Print the final table, two columns wide, and log which files there are."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    rows = [
        ("method", f"{handle.method.name} ({run.config.train.solver})" if "solver" in metrics else handle.method.name),
        ("parameters", f"{sum(p.numel() for p in handle.parameters()):,}"),
        ("with head", f"{metrics['trainable']:,}"),
        ("epoch", str(metrics["epoch"])),
    ]
    for key, name in (
        ("seconds_per_epoch", "s/epoch"),
        *((f"{split}_{task.monitor}", f"{split} {task.title}") for split in ("val", "test")),
        ("test_ece", "test calibration error, %"),
    ):
        if metrics.get(key) is not None:
            rows.append((name, f"{metrics[key]:.2f}"))
    table = Table(title=escape(str(run.path)), show_header=False)
    table.add_column()
    table.add_column(justify="right", overflow="fold")
    for name, value in rows:
        table.add_row(name, escape(value))
    Console().print(table)
    files = ["best.safetensors", "last.safetensors", "metrics.json", "predictions.csv", "report.html"]
    files = [name for name in files if run.file(name).is_file()]
    pictures = sorted(p.name for p in run.path.glob("*.png"))
    run.logger.info("%s are in %s", ", ".join([*files, *pictures]), run.path)
