import ast
import subprocess
import sys

import pytest

import vpeft

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
    """What a new process prints that has imported timm already, of which ``had`` are the modules."""
    start = "import timm, sys; had = set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "statement",
    [pytest.param("import vpeft", marks=pytest.mark.slow),
     pytest.param("from vpeft.tasks.video import FramewiseModel", marks=pytest.mark.slow),
     "import vpeft.tasks, vpeft.data, vpeft.engine, vpeft.cli, vpeft.bench, vpeft.docs, vpeft.integrations, "
     "vpeft.tasks.classification, vpeft.tasks.segmentation, vpeft.files, vpeft.numerics",
     pytest.param("from vpeft.cli import main; main(['methods'])", marks=pytest.mark.slow)],
)  # fmt: skip
def test_import_is_light(statement):
    # timm itself imports wandb where that is installed, hence the difference.
    assert fresh(f"{statement}\nprint([m for m in {HEAVY!r} if m in sys.modules.keys() - had])") == "[]"


# Rooms of the package that attaching a method needs; the others are for training, data and measurements.
ROOMS = {
    "vpeft", "vpeft.api", "vpeft.attached", "vpeft.beside_timm", "vpeft.digests", "vpeft.backbone", "vpeft.checkpoint", "vpeft.cli", "vpeft.commands", "vpeft.errors", "vpeft.fetching", "vpeft.files", "vpeft.numerics",
    "vpeft.interventions", "vpeft.metadata", "vpeft.methods", "vpeft.options", "vpeft.shards", "vpeft.stopping", "vpeft.tuning", "vpeft.version",
}  # fmt: skip


@pytest.mark.parametrize(
    ("statement", "calls"),
    [
        pytest.param("import vpeft; vpeft.attach", 60_000, marks=pytest.mark.slow),  # what the next one does, and less
        pytest.param(
            "import vpeft.cli as c, vpeft; c.main(['--help']) if vpeft.attach else 0", 60_000, marks=pytest.mark.slow
        ),
        ("import vpeft.cli as c; c.main(['methods', 'lora'])", 1_200_000),  # makes a ViT-B without its tensors
    ],
)
def test_import_and_small_commands_cost_little_beyond_timm(statement, calls):
    """What is loaded, and how many functions are called: numbers that no other program on the machine changes.

    Counted when this was written: 21,516, 24,764 and 470,022 calls, in 0.05 to 0.2 s.
    """
    code = f"""
calls = [0]
def count(frame, event, arg):
    calls[0] += event == "call"
sys.setprofile(count)
try:
    {statement}
except SystemExit:
    pass
sys.setprofile(None)
print(repr((calls[0], sorted(sys.modules.keys() - had))))
"""
    counted, new = ast.literal_eval(fresh(code))
    assert 0 < counted < calls
    assert {m.partition(".")[0] for m in new} <= {"vpeft", "einops"}
    assert {".".join(m.split(".")[:2]) for m in new if m.startswith("vpeft")} <= ROOMS
    assert "vpeft.tuning.attaching" in new


def test_help_needs_neither_torch_nor_timm():
    code = """
import sys
from vpeft.cli import main
try:
    main(["train", "--help"])
except SystemExit:
    pass
print([m for m in ("torch", "timm", "torchvision", "omegaconf", "vpeft.api", "vpeft.backbone") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--cfg" in done.stdout


@pytest.mark.parametrize(
    "statement",
    ["import vpeft, timm", pytest.param("from timm import create_model; import vpeft; import timm", marks=pytest.mark.slow)],
)
def test_the_embedded_backbones_are_timms_in_either_order(statement):
    code = f"""
import sys
{statement}
waiting = [finder for finder in sys.meta_path if type(finder).__module__ == "vpeft.beside_timm"]
print(timm.is_model("vit_micro_patch4_28"), "vpeft.api" in sys.modules, waiting)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "[]"]


def test_what_waits_for_timm_is_done_once_however_its_import_goes(tmp_path):
    """On a stand-in, whose first import fails."""
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm/__init__.py").write_text("import builtins\nbuiltins.tries += 1\nassert builtins.tries > 1\n")
    (tmp_path / "timm/layers.py").write_text("")
    code = f"""
import builtins, sys
sys.path.insert(0, {str(tmp_path)!r})
builtins.tries, done = 0, []
from vpeft.beside_timm import when_timm_is_there
del sys.meta_path[0]  # of the package itself, which wants timm's own functions
when_timm_is_there(lambda: done.append(len(sys.modules["timm"].__dict__)))
try:
    import timm
except AssertionError:
    assert not done
import timm.layers
assert "exec_module" not in vars(timm.__loader__)
when_timm_is_there(lambda: done.append("at once"))
print(len(done), done[1], timm.__spec__.origin == timm.__file__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["2", "at once True\n"]


def test_the_interface_is_whole():
    names: dict = {}
    exec("from vpeft import *", names)  # as a user may write it
    assert {"attach", "load", "Handle", "LoRA", "SSF", "to_peft", "zoo", "export", "VpeftError"} <= names.keys()
    assert set(vpeft.__all__) <= set(dir(vpeft))
    assert vpeft.attach is names["attach"]
    assert vpeft.checkpoint.fingerprint
    with pytest.raises(AttributeError, match="module 'vpeft' has no attribute 'atach'"):
        vpeft.atach  # noqa: B018
    assert not hasattr(vpeft, "nowhere.further"), "as any module, which raises nothing else"


@pytest.mark.slow
def test_export_is_there_when_it_is_asked_for():
    code = "import vpeft; before = 'vpeft.export' in sys.modules; print(before, callable(vpeft.export.export))"
    assert fresh(code) == "False True"


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
