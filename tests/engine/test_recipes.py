"""Published settings make configurations. The numbers here were typed from the papers' own tables, not from ours."""

import pytest
from omegaconf import OmegaConf

from tests.support.places import ROOT
from vpeft.cli import main
from vpeft.engine import recipes
from vpeft.engine.config import Config, from_container, load_config
from vpeft.errors import ConfigError, VpeftError
from vpeft.methods import create
from vpeft.tasks.models import make_method

CONFIGS = ROOT / "configs"
AUGREG, ORIG = "vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.orig_in21k"
COMMON = {"optim.name": "adamw", "optim.lr": 1e-3, "optim.weight_decay": 1e-4, "train.batch_size": 64, "train.epochs": 100}
WARM = {"schedule.name": "cosine", "schedule.warmup_epochs": 10, "schedule.warmup_lr": 1e-6, "schedule.min_lr": 1e-5}
PETL = (
    COMMON | WARM | {"model.name": ORIG, "model.drop_path": 0.1, "train.drop_last": True, "data.preset": "noah", "seed": 42}
)
SSF = {"model.name": AUGREG, "train.batch_size": 64, "schedule.cooldown_epochs": 10, "schedule.warmup_lr": 1e-7,
       "schedule.min_lr": 1e-8, "data.preset": "timm", "optim.name": "adamw", "augment.enabled": False}  # fmt: skip
DTL = {"optim.weight_decay": 0.05, "train.batch_size": 32, "schedule.cooldown_epochs": 10, "method.options.beta": 100}
OSU = {"data.preset": "raw", "model.drop_path": 0.1, "train.batch_size": 64, "schedule.warmup_lr": 1e-6, "seed": 42}
OPT, SWIN = "method.options.", "swin_base_patch4_window7_224.ms_in22k"

PAIRS = [
    ("fact_tt clevr_dist", PETL | {OPT + "rank": 4, OPT + "scale": 10}),
    ("fact_tt kitti", {OPT + "rank": 16, OPT + "scale": 10}),
    ("fact_tk dtd", {OPT + "rank": 16, OPT + "scale": 0.01}),
    ("fact_tk dsprites_loc", {OPT + "rank": 32, OPT + "scale": 100}),
    ("convpass kitti", PETL | {OPT + "scale": 10, OPT + "init": "xavier"}),
    ("convpass sun397", {OPT + "scale": 0.1, OPT + "init": "identity"}),
    ("convpass_attn caltech101", {OPT + "scale": 100, OPT + "init": "xavier"}),
    ("repadapter smallnorb_azi", PETL | {OPT + "bottleneck": 8, OPT + "scale": 10}),
    ("repadapter dsprites_ori method.options.variant=attn", {OPT + "scale": 5, OPT + "variant": "attn"}),
    ("ssf clevr_dist", SSF | {"optim.lr": 5e-2, "optim.weight_decay": 5e-2, "model.drop_path": 0.1}),
    ("ssf eurosat", {"optim.lr": 3e-3, "optim.weight_decay": 5e-2, "model.drop_path": 0.2}),
    ("ssf smallnorb_azi", {"optim.lr": 2e-2, "optim.weight_decay": 5e-5, "model.drop_path": 0.1}),
    ("dtl dsprites_loc", DTL | {"optim.lr": 0.01, "model.drop_path": 0, OPT + "rank": 2, "model.name": ORIG}),
    ("dtl oxford_flowers102", {"optim.lr": 0.008, "model.drop_path": 0.2}),
    ("dtl_plus patch_camelyon", DTL | {"optim.lr": 0.003, "model.drop_path": 0, OPT + "kernel": 4}),
    (f"dtl caltech101 model.name={SWIN}", {"optim.lr": 0.001, "model.drop_path": 0.4, OPT + "rank": 4, OPT + "read": "4-23",
                                           OPT + "feedback_from": 14, "model.name": SWIN}),
    (f"dtl_plus resisc45 model.name={SWIN}", {"optim.lr": 0.003, "model.drop_path": 0.5, OPT + "kernel": 5}),
    ("noah svhn", PETL | {OPT + "tokens": [10, 5, 5, 10, *[5] * 8], OPT + "rank": [5, 5, 5, 10, 5, 5, 5, 10, 10, 10, 10, 5]}),
    ("adapter_plus svhn", {OPT + "bottleneck": 8, "schedule.min_lr": 0, "train.precision": "bf16", "data.mean": [0.5] * 3}),
    ("adapter_plus svhn recipe=tuned", {OPT + "bottleneck": 16}),
    ("adapter_plus diabetic_retinopathy recipe=tuned", {OPT + "bottleneck": 32}),
    ("sct oxford_iiit_pet", {"optim.lr": 0.0007, "optim.weight_decay": 0.8, OPT + "scale": 0.2, OPT + "variant": "scale",
                             OPT + "channels": 96, "augment.enabled": True, "augment.auto_augment": "rand-m9-mstd0.5",
                             "augment.hflip": 0.5, "train.label_smoothing": 0.1, "model.drop_path": 0.1}),
    ("sct dsprites_loc", {"optim.lr": 0.003, "optim.weight_decay": 0.001, OPT + "scale": 0.3, OPT + "variant": "scale_on_x",
                          "augment.enabled": False, "augment.auto_augment": None, "train.label_smoothing": 0}),
    ("sct kitti", {OPT + "variant": "scale", "augment.enabled": True, "train.label_smoothing": 0.1}),
    ("sct smallnorb_ele", {"optim.lr": 0.0011, OPT + "variant": "scale_on_x", "augment.enabled": False}),
    ("gps patch_camelyon", {"optim.name": "adam", "optim.weight_decay": 0, "optim.lr": 0.004, "train.batch_size": 32,
                            OPT + "k": 2, "model.name": AUGREG, "schedule.cooldown_epochs": 10}),
    ("gps diabetic_retinopathy", {"optim.lr": 0.002, "train.batch_size": 32, "model.drop_path": 0.2, OPT + "k": 1}),
    ("lora cifar", PETL | {OPT + "rank": 8, OPT + "scale": 1, OPT + "dropout": 0.1, OPT + "targets": ["qkv"]}),
    ("adapter dmlab", PETL | {OPT + "bottleneck": 8, OPT + "act": "quick_gelu", OPT + "init": "noah"}),
    ("adaptformer dtd", PETL | {OPT + "bottleneck": 8, OPT + "scale": 0.1}),
    ("vpt_deep clevr_dist", {OPT + "tokens": 200, "seed": 18}),
    ("vpt_deep dmlab recipe=vpt", {OPT + "tokens": 100, "optim.name": "sgd", "optim.lr": 0.25, "optim.weight_decay": 1e-3,
                                   "train.batch_size": 64, "model.drop_path": 0, "data.preset": "vpt"}),
    ("vpt_deep sun397 recipe=vpt", {OPT + "tokens": 5, "optim.lr": 12.5, "optim.weight_decay": 1e-4, "train.batch_size": 128}),
    ("vpt_deep diabetic_retinopathy recipe=osu", OSU | {OPT + "tokens": 100, "optim.lr": 1e-2}),
    ("vpt_shallow svhn", OSU | {OPT + "tokens": 200, "optim.lr": 1e-2}),
    ("adaptformer oxford_iiit_pet recipe=osu", OSU | {OPT + "bottleneck": 4, OPT + "scale": 0.05, "optim.lr": 1e-3}),
    ("lora cifar recipe=osu", OSU | {OPT + "rank": 1, "optim.lr": 1e-2}),
    ("houlsby dsprites_loc", OSU | {OPT + "bottleneck": 4, OPT + "scale": 1, "optim.lr": 1e-3}),
    ("pfeiffer sun397", OSU | {OPT + "bottleneck": 8, OPT + "scale": 0.01, "optim.lr": 1e-2, OPT + "init": "lora"}),
    ("repadapter dsprites_loc recipe=osu", OSU | {OPT + "bottleneck": 8, OPT + "scale": 10, "optim.lr": 1e-3}),
    ("convpass kitti recipe=osu", OSU | {OPT + "bottleneck": 16, OPT + "scale": 100, OPT + "init": "xavier", "optim.lr": 1e-3}),
    ("fact_tk smallnorb_ele recipe=osu", OSU | {OPT + "rank": 16, OPT + "scale": 100, "optim.lr": 1e-3}),
    ("fact_tt oxford_flowers102 recipe=osu", OSU | {OPT + "rank": 32, OPT + "scale": 1, "optim.lr": 1e-3}),
    ("ssf dtd recipe=osu", OSU | {"optim.lr": 1e-2, "model.name": ORIG}),
    ("bitfit clevr_count", OSU | {"optim.lr": 1e-3}),
    ("norm svhn", OSU | {"optim.lr": 1e-2}),
    ("linear dtd", OSU | {"optim.lr": 1e-3}),
    ("full cifar", {"optim.lr": 1e-4}),
    ("full diabetic_retinopathy recipe=osu", OSU | {"optim.lr": 1e-2}),
]  # fmt: skip


def vtab(text: str):
    method, task, *more = text.split()
    return load_config(CONFIGS / "vtab.yaml", [f"method.name={method}", f"task={task}", *more])


def test_vtab_has_the_published_numbers():
    """Of all pairs, what the table gives; what it does not name is the configuration's default."""
    suite, default = recipes.suite("vtab"), OmegaConf.structured(Config)
    for text, wanted in PAIRS:
        method, task, *more = text.split()
        asked = dict(item.split("=") for item in more)
        found = suite.choose(method, task, asked.get("recipe"), asked).of(task, None) | {
            key: value for key, value in asked.items() if key == "model.name"
        }
        assert {key: found[key] if key in found else OmegaConf.select(default, key) for key in wanted} == wanted, text


@pytest.mark.parametrize(("text", "wanted"), PAIRS[::4], ids=[text for text, _ in PAIRS[::4]])
def test_the_configuration_has_them(text, wanted):
    config = vtab(text)
    assert {key: OmegaConf.select(config, key) for key in wanted} == wanted
    task = text.split()[1]
    assert (config.task, config.data.source) == ("classification", f"vtab/{task}")
    assert (config.data.train_split, config.data.test_split, config.train.select) == ("train800val200", "test", "last")
    assert config.origin.startswith(f"vtab/{task}, {config.method.name}: recipe '")
    assert "other than there" not in config.origin


def test_the_found_networks_have_the_size_that_was_counted():
    """In millions; a slip in one of 684 numbers would be seen in most places."""
    counted = [
        "0.32",
        "0.43",
        "0.29",
        "0.39",
        "0.37",
        "0.43",
        "0.29",
        "0.33",
        "0.40",
        "0.37",
        "0.38",
        "0.38",
        "0.35",
        "0.39",
        "0.40",
        "0.33",
        "0.39",
        "0.29",
        "0.32",
    ]
    suite = recipes.suite("vtab")
    for task, size in zip(suite.tasks, counted, strict=True):
        options = suite.choose("noah", task, None, {}).of(task, None)
        tokens, ranks, widths = (options[f"method.options.{k}"] for k in ("tokens", "rank", "bottleneck"))
        assert {len(tokens), len(ranks), len(widths)} == {12}
        assert {*tokens, *ranks, *widths} <= {1, 5, 10}
        total = sum(768 * t for t in tokens) + sum(4 * 768 * r for r in ranks) + sum(2 * 768 * h + h + 768 for h in widths)
        assert f"{total / 1e6:.2f}" == size, task


@pytest.mark.parametrize(
    ("cfg", "given", "wanted"),
    [
        ("fgvc", "method.name=ssf task=nabirds", {"optim.lr": 2e-4, "model.drop_path": 0.1, "train.ema": None,
                                                   "data.train_split": "official_train", "optim.weight_decay": 0.05}),
        ("fgvc", "method.name=ssf task=cub200", {"optim.lr": 1e-2, "train.ema": 0.9998, "data.source": "fgvc/cub"}),
        ("fgvc", "method.name=adapter_plus task=cars", {"method.options.bottleneck": 32, "data.train_split": "trainval"}),
        ("fgvc", "method.name=vpt_deep task=dogs", {"method.options.tokens": 100}),
        ("fewshot", "method.name=dtl task=aircraft shots=8", {"optim.lr": 5e-3, "data.shots": 8, "model.drop_path": 0,
                                                               "train.batch_size": 32, "data.source": "fewshot/fgvc-aircraft",
                                                               "name": "fewshot/dtl/fgvc-aircraft-8shot"}),
        ("fewshot", "method.name=dtl_plus task=flowers shots=2", {"optim.lr": 5e-3, "method.options.kernel": 3}),
        ("fewshot", "method.name=repadapter task=food", {"method.options.scale": 1, "optim.lr": 5e-3, "data.shots": 16,
                                                         "augment.mixup": 0.8, "train.label_smoothing": 0.1}),
        ("imagenet_dg", "method.name=dtl", {"optim.lr": 1e-4, "optim.weight_decay": 0.05, "data.shots": 16, "data.also_test":
                                            ["imagenet-v2", "imagenet-sketch", "imagenet-a", "imagenet-r"]}),
        ("cifar100", "method.name=ssf", {"optim.lr": 1e-3, "train.batch_size": 128, "train.ema": 0.99992,
                                         "data.source": "torch/cifar100", "model.name": AUGREG}),
        ("cifar100", "method.name=full", {"optim.lr": 5e-5}),
        ("cifar100", "method.name=adaptformer", {"optim.name": "sgd", "optim.lr": 0.4, "train.batch_size": 1024,
                                                 "schedule.warmup_epochs": 20, "model.name": "vit_base_patch16_224.mae"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_other_suites(cfg, given, wanted):
    config = load_config(CONFIGS / f"{cfg}.yaml", given.split())
    assert {key: OmegaConf.select(config, key) for key in wanted} == wanted
    make_method(config)


def test_what_has_no_recipe_gets_the_stated_default(capsys):
    for method, rate in (("mona", 1e-3), ("lst", 1e-3)):
        config = vtab(f"{method} kitti")
        assert (config.optim.lr, config.optim.weight_decay, config.model.drop_path, config.data.preset) == (
            rate,
            1e-4,
            0.1,
            "timm",
        )
        assert "the stated default" in config.origin
        assert f"nobody published values of {method} here" in config.origin
    asked = [("ssf", 5e-3, 64), ("vpt_deep", 1e-2, 64), ("linear", 1e-2, 64), ("bitfit", 1e-2, 64), ("dtl", 1e-3, 32)]
    for method, rate, batch in [*asked, ("full", 1e-4, 64)]:
        config = vtab(f"{method} cifar recipe=default")
        assert (config.optim.lr, config.train.batch_size, config.name) == (rate, batch, f"vtab/{method}-default/cifar")
        assert "nobody" not in config.origin
    assert capsys.readouterr().err.count("\n") == 8  # one line each


def test_traps_are_said(capsys):
    for text, said in (
        ("convpass cifar", "best of test evaluations every 10 epochs"), ("ssf cifar", "best epoch on test"),
        ("full cifar recipe=osu", "too high for full fine-tuning"), ("noah dtd", "probably copied by hand"),
    ):  # fmt: skip
        assert said in vtab(text).origin
        assert said in capsys.readouterr().err


def test_what_the_user_sets_goes_before_the_recipe(tmp_path, capsys):
    config = vtab("ssf cifar optim.lr=0.1 train.epochs=12")
    assert (config.optim.lr, config.train.epochs, config.optim.weight_decay) == (0.1, 12, 5e-5)
    assert config.origin.endswith("; other than there: optim.lr, train.epochs")
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        f"base: {CONFIGS}/vtab.yaml\ntask: loc\nmethod: {{name: fact_tk, options: {{scale: 3}}}}\ndata: {{workers: 2}}\n"
    )
    config = load_config(mine)
    assert config.data.source == "vtab/dsprites_loc"
    assert config.method == {"name": "fact_tk", "options": {"rank": 32, "scale": 3}}
    assert config.origin.endswith("; other than there: method.options.scale")
    for more in ("data.num_samples=100", "init=runs/a/best.safetensors"):
        assert vtab(f"ssf cifar {more}").origin.endswith(f"; other than there: {more.partition('=')[0]}")
    assert "other than there" not in vtab("ssf cifar data.workers=3 report=none").origin
    capsys.readouterr()
    config = load_config(mine, ["method.name=ssf"])  # whose options the file's are not
    assert config.method == {"name": "ssf", "options": {}}
    assert config.optim.lr == 1e-2
    assert "the options of fact_tk are dropped" in capsys.readouterr().err


def test_an_alias_of_a_method_has_its_recipe():
    assert vtab("fact clevr_dist").method == {"name": "fact_tt", "options": {"rank": 4, "scale": 10}}


def test_what_is_stored_is_an_ordinary_configuration(tmp_path, capsys):
    config = vtab("lora sun recipe=osu seed=7")
    plain = OmegaConf.to_container(config)
    assert "suite" not in plain
    assert plain["task"] == "classification"
    assert from_container(plain) == config
    file = tmp_path / "config.yaml"
    file.write_text(OmegaConf.to_yaml(config))
    capsys.readouterr()
    assert load_config(file) == config
    assert capsys.readouterr().err == ""


def test_what_is_shown_is_the_same_configuration(tmp_path, capsys):
    main(["configs", "show", "vtab", "task=azi", "method.name=sct", "train.epochs=70"])
    out, err = capsys.readouterr()
    assert err.startswith("vtab/smallnorb_azi, sct: recipe 'paper'")
    assert "min_lr" not in out  # a default
    file = tmp_path / "shown.yaml"
    file.write_text(out)
    assert load_config(file) == vtab("sct smallnorb_azi train.epochs=70")
    main(["configs", "show", "vtab"])
    assert "suite: vtab" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("task=cifr", r"task: VTAB-1k has no task 'cifr'; did you mean 'cifar'\?"),
        ("task=classification", "task: VTAB-1k has no task 'classification'; known: cifar, caltech101"),
        ("method.name=losa", r"method: unknown method 'losa'; did you mean 'lora'\?"),
        ("recipe=oso", r"recipe: lora has no 'oso' on VTAB-1k; did you mean 'osu'\?"),
        ("recipe=vpt method.name=vpt_deep", "recipe: 'vpt' of vpt_deep has values for sun397, eurosat, dmlab alone, not for cifar"),
        ("suite=vtb", r"suite: there is no 'vtb'; did you mean 'vtab'\?"),
        ("shots=4", "shots: VTAB-1k has one training set"),
        ("suite=fewshot task=food101 shots=3", "shots: few-shot FGFS has lists for 1, 2, 4, 8, 16; got 3"),
        ("suite=fewshot task=food101", "shots: few-shot FGFS has lists for 1, 2, 4, 8, 16; got None"),
        ("task=null", r"task: which of VTAB-1k\? Give task=…, one of cifar"),
        ("optim.lrr=1", r"optim.lrr: unknown key; did you mean 'lr'\?"),
        ("method=lora", "method"),
    ],
)  # fmt: skip
def test_impossible_asks_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        load_config(CONFIGS / "vtab.yaml", given.split())


@pytest.mark.parametrize("given", ["shots=4", "recipe=osu"])
def test_other_configurations_have_no_suite_keys(given):
    with pytest.raises(ConfigError, match=f"{given.partition('=')[0]}: only a suite has this key"):
        load_config(CONFIGS / "digits" / "lora.yaml", [given])


def cases():
    for name in recipes.names():
        suite = recipes.suite(name)
        for method, of in suite.recipes.items():
            for recipe in of:
                for task in recipe.only:
                    yield name, method, recipe, task


def make(name, method, recipe, task):
    given = [f"task={task}", f"method.name={method}", f"recipe={recipe.name}"]
    given += [f"{key}={SWIN if key == 'model.name' else pattern}" for key, pattern in recipe.when.items()]
    config = load_config(CONFIGS / f"{name}.yaml", given, tell=False)
    make_method(config)
    assert "other than there" not in config.origin, (name, method, recipe.name, task)


def test_every_recipe_is_one_of_its_method():
    for _, method, recipe, task in cases():
        options = recipe.of(task, None)
        create(method, **{key.removeprefix(OPT): value for key, value in options.items() if key.startswith(OPT)})


@pytest.mark.slow
def test_every_recipe_makes_a_configuration_for_every_task():
    for case in cases():
        make(*case)


def test_tasks_are_the_data_sets():
    """The names of tasks, with the other names, are sources of data."""
    from vpeft.data.sets.registry import get_set

    for name in ("vtab", "fgvc", "fewshot"):
        suite = recipes.suite(name)
        for task in suite.tasks:
            assert get_set(f"{name}/{task}").name.startswith(f"{name}/")
        with pytest.raises(VpeftError):
            suite.task("nowhere")
