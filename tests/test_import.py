import subprocess
import sys

import pytest

HEAVY = (
    "wandb",
    "mmseg",
    "mmengine",
    "mmcv",
    "matplotlib",
    "av",
    "transformers",
    "sklearn",
    "accelerate",
    "torchmetrics",
    "rich",
    "omegaconf",
)


def fresh(code: str) -> str:
    """What a new process prints that has imported timm already, of which ``had`` are the modules and ``now()`` the time."""
    start = "import timm, sys, time; had = set(sys.modules); now = time.process_time; begin = now()\n"
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "statement",
    ["import vpeft", "from vpeft.tasks.video import FramewiseModel", "import vpeft.tasks, vpeft.data, vpeft.engine",
     "import vpeft.cli, vpeft.bench, vpeft.docs, vpeft.integrations",
     "import vpeft.tasks.classification, vpeft.tasks.segmentation, vpeft.files, vpeft.numerics",
     "from vpeft.cli import main; main(['methods'])"],
)  # fmt: skip
def test_import_is_light(statement):
    # timm itself imports wandb where that is installed, hence the difference.
    assert fresh(f"{statement}\nprint([m for m in {HEAVY!r} if m in sys.modules.keys() - had])") == "[]"


@pytest.mark.parametrize(
    "statement",
    ["import vpeft", "import vpeft.cli as c; c.main(['methods', 'lora'])", "import vpeft.cli as c; c.main(['--help'])"],
)
def test_import_and_small_commands_cost_little_beyond_timm(statement):
    """Below 0.3 s of the process's own time: what else the machine does meanwhile is no cost of ours; best of three."""
    code = f"try:\n    {statement}\nexcept SystemExit:\n    pass\nprint(now() - begin)"
    times = [float(fresh(code)) for _ in range(3)]
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


def test_first_names_of_public_modules_still_lead_there():
    from vpeft.engine.config import load_config  # noqa: F401
    from vpeft.engine.train import train  # noqa: F401
    from vpeft.tasks import text
    from vpeft.tasks.segmentation.text import read_text

    assert text.read_text is read_text
