"""Memory that is told before training is the memory that training takes."""

import re
import resource
import time

import pytest
import timm
import torch
from omegaconf import OmegaConf

import vpeft
from tests.support.models import SMALL
from vpeft.backbone.hollow import Hollow
from vpeft.bench.config import BenchConfig
from vpeft.bench.memory import saved_bytes
from vpeft.bench.plan import CHECK, MemoryPlan, optimizer_bytes, plan, settings, told
from vpeft.bench.rows import MethodRow, classifier
from vpeft.cli import main
from vpeft.methods import create, list_methods, on_images

MICRO = "vit_micro_patch4_28"
OTHER = 7  # a batch that no plan measures


def really_saved(model, method, options, precision="fp32"):
    given = {"model": {"name": model}, "batch_size": OTHER, "precision": precision}
    config = OmegaConf.merge(OmegaConf.structured(BenchConfig), given)
    base, batch = classifier(config)
    base.model.eval()
    return saved_bytes(MethodRow("row", base, batch, create(method, **options), False))


@pytest.mark.parametrize(
    ("model", "method", "options", "precision"),
    [
        (MICRO, "vpt_deep", {"tokens": 9}, "bf16"),
        (MICRO, "magnitude", {}, "fp32"),  # which looks at values first
        pytest.param("swin_micro_patch2_window7_28", "ssf", {}, "bf16", marks=pytest.mark.slow),
    ],
)
def test_saved_bytes_at_another_batch_size(model, method, options, precision):
    found = plan(model, method, options, precision=precision)
    assert found.saved_at(OTHER) == pytest.approx(really_saved(model, method, options, precision), rel=0.01)
    assert found.off < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("model", [MICRO, "swin_micro_patch2_window7_28"])
@pytest.mark.parametrize("method", [m for m in list_methods() if m != "fish"])
def test_saved_bytes_of_every_method(model, method):
    options = on_images(method)
    try:
        found = plan(model, method, {})
    except vpeft.UnsupportedModelError:
        assert model.startswith("swin")
        return
    off = 0.05 if found.method.needs_calibration else 0.01  # noise and data decide what the former train
    assert found.saved_at(OTHER) == pytest.approx(really_saved(model, method, options), rel=off)


def test_everything_else_is_counted():
    found = plan(MICRO, "lora", {"rank": 2}, num_classes=7)
    model = timm.create_model(MICRO, num_classes=7)
    bare = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    own = 6 * 2 * 2 * (128 + 128)  # blocks, q and v, rank
    head = 7 * 128 + 7
    assert (found.trained, found.head) == (own + head, head)
    assert found.weights == bare + 4 * own
    assert found.gradients == 4 * (own + head)
    assert found.optimizer == 2 * found.gradients + 4 * len(list(vpeft.attach(model, "lora", rank=2).trainable_parameters()))
    assert found.image == 4 * 3 * 28 * 28
    assert found.total_at(9) == found.weights + found.gradients + found.optimizer + 9 * found.image + found.saved_at(9)


def test_optimizers_differ():
    trained = [torch.nn.Parameter(torch.zeros(30, 20)), torch.nn.Parameter(torch.zeros(5))]
    assert optimizer_bytes("momentum", trained) == 4 * 605
    assert 4 * 605 * 2 <= optimizer_bytes("adamw", trained) <= 4 * 605 * 2 + 8
    assert optimizer_bytes("adafactor", trained) < optimizer_bytes("adamw", trained) / 4, "of rows and columns"
    assert optimizer_bytes("lookahead_adamw", trained) == optimizer_bytes("adamw", trained) + 4 * 605, "its slow weights"
    assert optimizer_bytes("adamw", []) == 0
    with pytest.raises(vpeft.ConfigError, match="--optim: timm cannot make 'adamww'"):
        optimizer_bytes("adamww", trained)


def test_products_are_zeros_of_the_right_kind():
    x, weight = torch.ones(3, 5, 4), torch.ones(6, 4, requires_grad=True)
    with Hollow():
        y = torch.nn.functional.linear(x, weight)
        assert y.shape == (3, 5, 6)
        assert not y.any()
        assert (x + 1 == 2).all(), "the rest is computed"
        y.sum().backward()
    assert weight.grad.shape == weight.shape
    with Hollow(making=True):
        layer = torch.nn.Linear(300, 300)
        assert not layer.weight.any()
    assert torch.nn.Linear(300, 300).weight.any()


def test_a_large_model_takes_seconds_and_no_memory():
    """ViT-H/14 has 2.4 GiB of weights, of which next to none are written."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    with Hollow(making=True):
        model = timm.create_model("vit_huge_patch14_224", num_classes=10)
    with Hollow(), torch.no_grad():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 10)
    assert time.process_time() - begun < 20, "its products alone are 330 gigaflops"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "KiB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_model", "lora"], "ConfigError: model.name: timm has no 'no_such_model'"),
        ([MICRO, "lorra"], "MethodError: unknown method 'lorra'; did you mean 'lora'"),
        ([MICRO, "lora", "ranks=2"], "MethodError: lora has no hyper-parameter 'ranks'; did you mean 'rank'"),
        ([MICRO, "lora", "rank=["], "ConfigError: option 'rank=['"),
        ([MICRO, "lora", "--precision", "fp31"], "ConfigError: precision: 'fp31' is not one of"),
        ([MICRO, "lora", "--precision", "fp16"], "ConfigError: precision: fp16 needs a GPU"),
        ([MICRO, "lora", "--optim", "adamww"], "ConfigError: --optim: timm cannot make 'adamww'"),
        ([MICRO, "lora", "--batch-size", "0"], "ConfigError: --batch-size: 0 is impossible"),
        (["swin_micro_patch2_window7_28", "lst"], "UnsupportedModelError: lst on swin_micro_patch2_window7_28"),
    ],
)
def test_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--plan", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command(capsys):
    main(["bench", "--plan", MICRO, "lora", "rank=2", "--batch-size", "8", "32", "--optim", "sgd", "--device", "cpu"])
    out = capsys.readouterr().out
    assert out.startswith("lora(rank=2, targets=['q', 'v'], ")
    assert "on vit_micro_patch4_28, fp32, sgd, cpu\n6,144 trained numbers of the method, 12,900 of the head" in out
    assert "| batch | weights | gradients | optimiser | images | saved | sum, MiB |" in out
    assert [line.split(" ")[1] for line in out.splitlines() if line[:3] in ("| 8", "| 3")] == ["8", "32"]
    assert f"with {CHECK} that was 0.00 % off" in out
    assert "What it looks at in the data" not in out
    main(["bench", "--plan", MICRO, "vp", "--device", "cpu"])
    main(["bench", "--plan", MICRO, "ilm_vp", "--device", "cpu"])
    assert capsys.readouterr().out.count("What it looks at in the data was random here") == 1
    with pytest.raises(SystemExit):
        main(["bench"])
    assert "one of the arguments --cfg --plan --check is required" in capsys.readouterr().err


def test_what_fits_into_what_is_free():
    mib = 2**20
    found = MemoryPlan("m", create("lora"), 100 * mib, 9, 3, mib, 2 * mib, mib, (5.0 * mib, 9.0 * mib), None, 0.0)
    text = told(found, [10, 20], 250 * mib, "bf16, adamw, cuda")
    assert "| 10 | 100.0 | 1.0 | 2.0 | 10.0 | 95.0 | 208.0 | yes |" in text
    assert "| 20 | 100.0 | 1.0 | 2.0 | 20.0 | 185.0 | 308.0 | no |" in text
    assert "Free there: 250.0 MiB, enough for about 14 images." in text
    found.peak, found.off = (120.0 * mib, 11.0 * mib), 0.02
    text = told(found, [10], 250 * mib, "bf16, adamw, cuda")
    assert "| 242.0 | yes |" in text
    assert "highest memory of a step" in text
    assert "It is not linear in the batch" in text


def test_settings_are_read_as_yaml():
    assert settings(["rank=4", "targets=[q, v]", "scale=0.5"]) == {"rank": 4, "targets": ["q", "v"], "scale": 0.5}
    for wrong in ("rank", "rank=[1,"):
        with pytest.raises(vpeft.ConfigError, match=f"option '{re.escape(wrong)}'"):
            settings([wrong])
    assert SMALL["depth"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cfg", "x.yaml", "--batch-size", "3"], "--batch-size is for --plan; a configuration is measured with its own"),
        (["--cfg", "x.yaml", "--precision", "fp32"], "--precision is for --plan"),
        (["--cfg", "x.yaml", "--repeats", "0"], "--repeats is for --write-reference and --check"),
        (["--check", "x.json", "--img-size", "32"], "--img-size is for --plan"),
        (["--check", "x.json", "--write-reference", "y.json"], "--write-reference is for --cfg"),
        (["--plan", MICRO, "lora", "--write-reference", "y.json"], "--write-reference is for --cfg"),
        (["--plan", MICRO, "lora", "--num-classes", "0"], "num_classes: 0 is impossible"),
    ],
)
def test_arguments_that_would_change_nothing_are_refused(arguments, said, capsys):
    """``--cfg FILE --precision bf16`` measured fp32, and said nothing."""
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
