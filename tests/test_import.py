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
