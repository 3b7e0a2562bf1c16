"""Files of ``SaveTrained`` in mmsegmentation's documented ways: inference, testing, averages, the best validation."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vpeft
from tests.support.mmseg import NUMBER, config, run, runner_of, same, scenes
from vpeft.integrations.mmseg import load_trained, trained_tensors

CLASSES, PALETTE = ("none", "a", "b"), [[0, 0, 0], [255, 0, 0], [0, 255, 0]]
EMA = {"custom_hooks": [{"type": "EMAHook", "momentum": 0.3}]}


def best(cfg):
    cfg.default_hooks.checkpoint.update(save_best="mIoU", keep=9)
    cfg.train_cfg.val_interval = 2


def metadata(file):
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["vpeft"])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def averaged(root, tmp_path_factory):
    """A run with an average and the best validation: its folder, its Runner, what each validation measured and on what."""
    work, judged = tmp_path_factory.mktemp("averaged"), {}

    def watch(cfg):
        best(cfg)
        from mmengine.hooks import Hook

        from vpeft.integrations.mmseg import VPEFT_HOOKS

        class Watch(Hook):
            priority = "LOWEST"

            def before_val_iter(self, runner, batch_idx, data_batch=None):
                judged[runner.iter] = [{n: t.clone() for n, t in trained_tensors(runner.model).items()}, None]

            def after_val_epoch(self, runner, metrics=None):
                judged[runner.iter][1] = metrics["mIoU"]

        VPEFT_HOOKS.register_module(name="Watch", module=Watch, force=True)
        cfg.custom_hooks.append({"type": "vpeft.Watch"})

    return work, run(root, work, change=watch, **EMA), judged


def inferred(root, work, **more):
    """The configuration for inference, on the frozen weights of the run: random ones, of the run's seed."""
    cfg = config(root, work, **more)
    cfg.test_dataloader, cfg.test_evaluator, cfg.test_cfg = cfg.val_dataloader, cfg.val_evaluator, {"type": "TestLoop"}
    cfg.visualizer = {"type": "SegLocalVisualizer", "vis_backends": [], "name": f"v{next(NUMBER)}"}
    cfg.test_pipeline = [step for step in cfg.val_dataloader.dataset.pipeline if step["type"] != "LoadAnnotations"]
    torch.manual_seed(1)
    return cfg


def equal(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[n], t) for n, t in wanted.items())


# ---- the average ----


@pytest.mark.slow
def test_files_hold_the_average_that_was_judged(root, averaged):
    work, runner, judged = averaged
    for iteration, (tensors, miou) in judged.items():
        file = load_file(work / f"iter_{iteration}.safetensors")
        assert equal({n.removeprefix("model/"): t for n, t in file.items()}, tensors)
        tester = inferred(root, work / "test", load_from=str(work / f"iter_{iteration}.safetensors"))
        tester = runner_of(tester)
        assert tester.test()["mIoU"] == pytest.approx(miou)
    raw = trained_tensors(runner.model)
    assert not equal(raw, judged[6][0])
    state = load_file(work / "state.safetensors")
    assert equal({n.removeprefix("model/"): t for n, t in state.items() if n.startswith("model/")}, raw)


def test_testing_under_the_same_hook_measures_the_average_too(root, averaged, tmp_path):
    work, _, judged = averaged
    tester = runner_of(inferred(root, tmp_path, load_from=str(work / "iter_6.safetensors"), **EMA))
    assert tester.test()["mIoU"] == pytest.approx(judged[6][1])


def test_the_average_goes_on_after_an_interruption(root, averaged, tmp_path):
    work, whole, _ = averaged
    run(root, tmp_path, stop=3, change=best, **EMA)
    again = run(root, tmp_path, change=best, resume=True, **EMA)
    assert same(whole, again)
    for name in ("iter_6.safetensors", "state.safetensors"):
        assert equal(load_file(tmp_path / name), load_file(work / name))
    assert metadata(tmp_path / "state.safetensors")["average"] == {"type": "ExponentialMovingAverage", "steps": 6}
    assert {p.name for p in tmp_path.glob("best*")} == {p.name for p in work.glob("best*")}


@pytest.mark.slow
def test_an_average_that_cannot_go_on_is_refused(root, averaged, tmp_path):
    work, _, _ = averaged
    with pytest.raises(vpeft.CheckpointError, match=r"written with ExponentialMovingAverage.*has no EMAHook"):
        run(root, tmp_path, resume=True, load_from=str(work / "state.safetensors"))
    other = {"custom_hooks": [{"type": "EMAHook", "ema_type": "StochasticWeightAverage"}]}
    with pytest.raises(vpeft.CheckpointError, match="this configuration has StochasticWeightAverage"):
        run(root, tmp_path, resume=True, load_from=str(work / "state.safetensors"), **other)
    with pytest.raises(vpeft.VpeftError, match="2 EMAHooks"):
        run(root, tmp_path, custom_hooks=EMA["custom_hooks"] * 2)
    with pytest.raises(vpeft.VpeftError, match="before EMAHook averages"):
        run(root, tmp_path, custom_hooks=[{"type": "EMAHook", "priority": "LOWEST"}])
    assert not list(tmp_path.glob("*.safetensors"))


def test_hooks_that_write_into_mmengines_checkpoints_are_refused(root, tmp_path):
    from mmengine.hooks import Hook

    from vpeft.integrations.mmseg import VPEFT_HOOKS

    class Writes(Hook):
        def before_save_checkpoint(self, runner, checkpoint):
            checkpoint["mine"] = 1

    VPEFT_HOOKS.register_module(name="Writes", module=Writes, force=True)
    with pytest.raises(vpeft.VpeftError, match=r"Writes\.before_save_checkpoint would never be called"):
        run(root, tmp_path, custom_hooks=[{"type": "vpeft.Writes"}])


# ---- the best validation ----


def test_the_best_validation_is_kept(averaged):
    work, _, judged = averaged
    value = max(miou for _, miou in judged.values())
    first = next(i for i, (_, miou) in judged.items() if miou == value)
    assert [p.name for p in work.glob("best*")] == [f"best_mIoU_iter_{first}.safetensors"]
    file = load_file(work / f"best_mIoU_iter_{first}.safetensors")
    assert equal({n.removeprefix("model/"): t for n, t in file.items()}, judged[first][0])
    assert metadata(work / "state.safetensors")["best"] == {"mIoU": [value, f"best_mIoU_iter_{first}.safetensors"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_best": "mIuO"}, "did you mean 'mIoU'"),
        ({"save_best": "mDice"}, "measured by no evaluator"),
        ({"rule": "grater"}, "did you mean 'greater'"),
        ({"by_epoch": True}, "by_epoch=True, but the loop is a IterBasedTrainLoop"),
        ({"filename_tmpl": "x_{}"}, "no option filename_tmpl.*_delete_=True"),
    ],
)
def test_what_the_hook_cannot_do_is_said_before_training(root, tmp_path, options, message):
    with pytest.raises(vpeft.VpeftError, match=message):
        run(root, tmp_path, change=lambda cfg: cfg.default_hooks.checkpoint.update(options))
    assert not list(tmp_path.glob("*.safetensors"))


def test_less_may_be_better_and_nan_is_never():
    from vpeft.integrations.mmseg.best import BestValidation

    found = BestValidation(["loss", "mIoU"], None)
    assert found.better({"loss": 2.0, "mIoU": float("nan")}) == ["loss"]
    assert found.better({"loss": 3.0, "mIoU": np.float32(1)}) == ["mIoU"]
    assert found.better({"loss": 1.0, "mIoU": 0.5}) == ["loss"]
    with pytest.raises(vpeft.VpeftError, match="measured by no evaluator"):
        found.better({"mIoU": 1})
    assert BestValidation("auto", "less").better({"x": 1, "y": 2}) == ["x"]


# ---- inference ----


def names(work):
    return [next(work.glob("best*")).name, "iter_6.safetensors", "state.safetensors"]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_init_model_and_the_inferencer_take_every_file(root, averaged, tmp_path, number):
    from mmseg.apis import MMSegInferencer, inference_model, init_model

    work, _, judged = averaged
    name = names(work)[number]
    wanted = judged[int(name.split("_")[-1].partition(".")[0]) if number < 2 else 6][0]
    image = f"{root}/images/val/0.png"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(class names|Checkpoint is not loaded).*")
        model = init_model(inferred(root, tmp_path), str(work / name), device="cpu")
        torch.manual_seed(1)
        inferencer = MMSegInferencer(inferred(root, tmp_path), weights=str(work / name), device="cpu")
    for found in (model, inferencer.model):
        assert equal(trained_tensors(found), wanted)
        assert found.dataset_meta == {"classes": CLASSES, "palette": PALETTE}
    mask = inference_model(model, image).pred_sem_seg.data[0].numpy()
    assert np.array_equal(mask, inferencer(image, out_dir=str(tmp_path))["predictions"])
    assert inferencer.visualizer.dataset_meta["classes"] == CLASSES


def test_paths_are_taken_where_their_names_are(root, averaged, tmp_path):
    from mmengine.runner import load_checkpoint
    from mmseg.apis import MMSegInferencer, init_model

    work, _, judged = averaged
    file, own = work / "iter_6.safetensors", tmp_path / "own.py"
    inferred(root, tmp_path).dump(own)
    torch.manual_seed(1)
    model = init_model(own, file, device="cpu")
    torch.manual_seed(1)
    for found in (model, MMSegInferencer(model=own, weights=file, device="cpu").model):
        assert equal(trained_tensors(found), judged[6][0])
    assert load_checkpoint(model, file)["meta"]["iter"] == 6


def test_a_file_that_does_not_fit_is_refused_wherever_it_is_loaded(root, averaged, tmp_path):
    from mmengine.runner import load_checkpoint
    from mmseg.apis import MMSegInferencer, init_model
    from mmseg.registry import MODELS

    work, _, _ = averaged
    file = str(work / "iter_6.safetensors")
    cfg = inferred(root, tmp_path)
    cfg.model.decode_head.channels = 16
    for build in (init_model, lambda c, f, device: MMSegInferencer(c, weights=f, device=device)):
        torch.manual_seed(1)
        with pytest.raises(vpeft.CheckpointError, match=r"iter_6\.safetensors: decode_head"):
            build(cfg, file, device="cpu")
    with pytest.raises(vpeft.CheckpointError, match="other frozen weights"):
        init_model(config(root, tmp_path), file, device="cpu")  # of another seed
    cfg = inferred(root, tmp_path)
    model = MODELS.build(cfg.model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    torch.save({"state_dict": {"backbone.conv1.weight": torch.zeros(1)}}, tmp_path / "foreign.pth")
    for name, match in (
        ("foreign.safetensors", r"no file of vpeft\.SaveTrained"), ("none.safetensors", "no such file"),
        ("foreign.pth", "nothing in this checkpoint has a name of this model"),
    ):  # fmt: skip
        with pytest.raises(vpeft.CheckpointError, match=match):
            load_checkpoint(model, str(tmp_path / name))
    plain = {n.removeprefix("model/"): t for n, t in load_file(file).items()}
    torch.save({"state_dict": plain}, tmp_path / "without_its_record.pth")
    with pytest.raises(vpeft.CheckpointError, match="load_trained"):
        load_checkpoint(model, str(tmp_path / "without_its_record.pth"))
    assert equal(model.state_dict(), before)


def test_mmengines_own_checkpoints_load_as_ever(root, tmp_path):
    from mmengine.runner import load_checkpoint
    from mmseg.registry import MODELS

    cfg = inferred(root, tmp_path)
    one, other = MODELS.build(cfg.model), MODELS.build(cfg.model)
    torch.save({"state_dict": one.state_dict()}, tmp_path / "whole.pth")
    load_checkpoint(other, str(tmp_path / "whole.pth"))
    assert equal(other.state_dict(), one.state_dict())


def test_files_from_before_names_were_written_still_load(root, averaged, tmp_path):
    from mmseg.registry import MODELS

    work, _, judged = averaged
    old = {k: v for k, v in metadata(work / "iter_6.safetensors").items() if k != "dataset_meta"}
    save_file(load_file(work / "iter_6.safetensors"), tmp_path / "old.safetensors", {"vpeft": json.dumps(old)})
    model = MODELS.build(inferred(root, tmp_path).model)
    assert equal(trained_tensors(load_trained(model, tmp_path / "old.safetensors")), judged[6][0])


@pytest.mark.slow
def test_names_answer_for_the_rows_of_the_head(root, averaged, tmp_path):
    work, _, _ = averaged
    file = str(work / "iter_6.safetensors")
    for classes, match in (
        (("a", "none", "b"), r"metainfo=dict\(classes=\('none', 'a', 'b'\)\)"),
        (("none", "a", "c"), "lacks \\['c'\\]"),
    ):
        cfg = inferred(root, tmp_path, load_from=file)
        cfg.val_dataloader.dataset.metainfo.classes = classes
        with pytest.raises(vpeft.CheckpointError, match=match):
            runner_of(cfg).test()

        def renamed(cfg, classes=classes):
            cfg.train_dataloader.dataset.metainfo.classes = classes

        with pytest.raises(vpeft.CheckpointError, match="trained on the classes none, a, b"):
            run(root, tmp_path, change=renamed, load_from=file)


def test_fine_tuning_starts_from_a_file(root, averaged, tmp_path):
    work, _, judged = averaged
    file = str(work / "iter_6.safetensors")

    def still(cfg, **options):
        cfg.optim_wrapper.optimizer.update(lr=0.0)
        cfg.default_hooks.checkpoint.update(options)

    def trained(runner):
        return {n: p for n, p in trained_tensors(runner.model).items() if "running" not in n and "num_batches" not in n}

    whole = run(root, tmp_path, change=still, load_from=file, iterations=1)
    wanted = {n: t for n, t in judged[6][0].items() if n in trained(whole)}
    assert equal(trained(whole), wanted)
    before = {n: t.clone() for n, t in trained_tensors(whole.model).items()}
    whole.val()
    assert equal(trained_tensors(whole.model), before)  # it is not loaded again
    method = run(root, tmp_path, change=lambda cfg: still(cfg, load_heads=False), load_from=file, iterations=1)
    found = trained(method)
    assert all(torch.equal(found[n], t) for n, t in wanted.items() if n.startswith("backbone."))
    assert not torch.equal(found["decode_head.conv_seg.weight"], wanted["decode_head.conv_seg.weight"])


def test_test_time_augmentation(root, averaged, tmp_path):
    work, _, judged = averaged
    cfg = inferred(root, tmp_path, load_from=str(work / "iter_6.safetensors"))
    cfg.test_dataloader.dataset.pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "TestTimeAug", "transforms": [
            [{"type": "Resize", "scale_factor": s, "keep_ratio": True} for s in (0.6, 1.0, 1.3)],
            [{"type": "RandomFlip", "prob": p, "direction": "horizontal"} for p in (0.0, 1.0)],
            [{"type": "LoadAnnotations"}], [{"type": "PackSegInputs"}],
        ]},
    ]  # fmt: skip
    cfg.model = {"type": "SegTTAModel", "module": cfg.model}
    tester = runner_of(cfg)
    assert 0 <= tester.test()["mIoU"] <= 100
    assert equal(trained_tensors(tester.model.module), judged[6][0])


@pytest.mark.slow
def test_inference_before_the_integration_was_imported():
    """mmsegmentation alone asks for compiled operators; the integration says so, and works after the failure."""
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "try:\n    import mmseg.apis\nexcept ModuleNotFoundError as e:\n    print(e.name)\n"
        "import vpeft.integrations.mmseg\n"
        "from mmseg.apis import MMSegInferencer, inference_model, init_model\n"
        "from mmseg.registry import MODELS\nprint(MODELS.get('UPerHead').__name__, MODELS.get('vpeft.TimmBackbone').__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split()[-2:] == ["UPerHead", "TimmBackbone"], done.stderr
