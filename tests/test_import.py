import subprocess
import sys

HEAVY = (
    "wandb",
    "mmseg",
    "mmengine",
    "mmcv",
    "matplotlib",
    "av",
    "sklearn",
    "accelerate",
    "torchmetrics",
    "rich",
    "omegaconf",
)


def test_import_is_light():
    # timm itself imports wandb where that is installed, hence the difference.
    code = f"import timm, sys; had = set(sys.modules); import vpeft; print([m for m in {HEAVY!r} if m in sys.modules.keys() - had])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_costs_little_beyond_timm():
    """Below 0.3 s of this process's own time: what else the machine does meanwhile is no cost of ours; best of three."""
    code = "import timm, time; t = time.process_time(); import vpeft; print(time.process_time() - t)"
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(float(done.stdout))
    assert min(times) < 0.3, times


def test_the_command_line_starts_without_the_engine():
    """The parsers of all commands are made at every start; the motion clips' options come from their dataclass alone."""
    code = f"""
import sys, vpeft
from vpeft.cli import main
try:
    main(["motion-clips", "--help"])
except SystemExit:
    pass
heavy = [m for m in sys.modules if m in {("omegaconf", "torchmetrics", "mmseg", "accelerate", "av")!r}]
print(heavy + [m for m in sys.modules if m.startswith(("vpeft.engine", "vpeft.bench", "vpeft.tasks.video.data"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--turn" in done.stdout
