"""Checkpoints side by side on one backbone: the same answers as ``vpeft predict`` gives, whoever asks meanwhile."""

import base64
import io
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import vpeft
from tests.support.videos import frames_of, write
from vpeft.cli import main
from vpeft.data.embedded import FASHION_CLASSES
from vpeft.demo import Adapters, Answer, drawing
from vpeft.demo.adapters import _read_pictures
from vpeft.demo.bare import own_classes
from vpeft.demo.page import answered
from vpeft.engine.predict import predict
from vpeft.tasks.segmentation.pictures import write_pictures

VIT = "vit_micro_patch4_28.vpeft_fashion"
NAMES = ["<b>boot</b>", "bag ${x} {{y}}", "coat"]
METHODS = {"lora": {"rank": 2}, "bitfit": {}, "vpt_deep": {"tokens": 2}, "full": {}}


def saved(path, method, name=VIT, config=None, **options):
    """A checkpoint whose tensors were moved away from where the method starts."""
    torch.manual_seed(len(method))
    model = timm.create_model(name, pretrained=True, num_classes=3).eval()
    handle = vpeft.attach(model, method, **options)
    with torch.no_grad():
        for parameter in handle.trainable_parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return handle.save(path, class_names=NAMES, config=config)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ckpt")
    return {m: saved(folder / f"{m}.safetensors", m, **o) for m, o in METHODS.items()}


@pytest.fixture(scope="module")
def adapters(files):
    return Adapters(list(files.values()))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    found = [folder / f"{i}.png" for i in range(4)]
    for file in found:
        Image.fromarray(rng.integers(0, 255, (40, 30, 3), np.uint8)).save(file)
    return found


def bare(file):
    """The pretrained model's own probabilities, by timm alone."""
    model = timm.create_model(VIT, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    with torch.no_grad(), Image.open(file) as image:
        return model(transform(image.convert("RGB"))[None])[0].softmax(-1)


def test_each_says_what_predict_says_and_the_backbone_what_timm_says(adapters, files, images):
    first, *others = adapters.look(images[0])
    assert [a.title for a in others] == list(METHODS)
    for answer, file in zip(others, files.values(), strict=True):
        (row,) = predict(file, [images[0]])
        assert not answer.problem
        assert [(n, p) for n, p, _ in answer.classes] == [(c["class"], c["probability"]) for c in row["classes"]]
    scores = bare(images[0])
    assert [n for n, _, _ in first.classes] == [FASHION_CLASSES[i] for i in scores.topk(5).indices]
    assert [p for _, p, _ in first.classes] == pytest.approx(scores.topk(5).values.tolist(), abs=2e-6)
    assert not any(a.handle.enabled for a in adapters.adapters)


def test_threads_do_not_switch_each_others_adapters(adapters, images):
    jobs = [(image, title) for image in images for title in adapters.titles] * 2
    alone = [adapters.look(*job[:1], [job[1]]) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: adapters.look(job[0], [job[1]]), jobs))
    assert together == alone
    assert len({str(a[1].classes) for a in alone}) == len(images) * len(METHODS)


def test_one_page_has_one_backbone(files, tmp_path):
    other = saved(tmp_path / "swin.safetensors", "bitfit", "swin_micro_patch2_window7_28.vpeft_fashion")
    with pytest.raises(vpeft.CheckpointError, match=r"swin\.safetensors: made for another .* here that of .*lora\.saf"):
        Adapters([files["lora"], other])
    with pytest.raises(vpeft.CheckpointError, match="missing"):
        Adapters([tmp_path / "missing.safetensors"])
    with pytest.raises(vpeft.ConfigError, match="no checkpoint"):
        Adapters([])


def test_random_weights_have_no_classes_of_their_own(tmp_path, images):
    torch.manual_seed(0)
    file = tmp_path / "a.safetensors"
    model = timm.create_model(VIT, num_classes=3).eval()
    vpeft.attach(model, "lora", rank=1).save(
        file, class_names=NAMES, config={"seed": 0, "model": {"name": VIT, "pretrained": False}}
    )
    timm_weights = {n: t for n, t in model.state_dict().items() if not n.startswith(("vpeft", "head"))}
    save_file(timm_weights, tmp_path / "backbone.safetensors")
    first, second = Adapters([file]).look(images[0])
    assert "no classifier" in first.problem
    assert not second.problem
    assert len(second.classes) == 3


def test_files_that_are_no_images_are_told_by_their_names_alone(adapters, tmp_path):
    broken, missing, text = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.mp4"
    broken.write_bytes(b"no image")
    text.write_text("x")
    for file, words in ((broken, "a.png is not a readable image"), (missing, "b.png"), (text, "c.mp4 is not a readable")):
        shown, answers = answered(adapters, str(file), adapters.titles)
        assert words in answers
        assert str(tmp_path) not in answers
        assert 'role="alert"' in answers
        assert not shown
        assert all(a.problem and str(tmp_path) not in a.problem for a in adapters.look(file))
    assert "Drop a file" in answered(adapters, None, [])[1]


def test_what_fails_inside_one_adapter_leaves_the_others(adapters, images):
    broken = adapters.adapters[0]
    with torch.no_grad():
        was = next(broken.handle.parameters()).clone()
        next(broken.handle.parameters()).fill_(float("nan"))
        answers = adapters.look(images[0])
        next(broken.handle.parameters()).copy_(was)
    assert "not a number" in answers[1].problem
    assert not any(a.problem for a in (answers[0], *answers[2:]))
    assert adapters.look(images[0])[1].problem == ""


def test_alike_names_are_numbered_and_chosen_one_by_one(tmp_path, images):
    file = saved(tmp_path / "a.safetensors", "lora", config={"name": "digits/lora"}, rank=1)
    twice = Adapters([file, file])
    assert twice.titles == ["digits/lora", "digits/lora (2)"]
    assert [a.title for a in twice.look(images[0], ["digits/lora (2)"])[1:]] == ["digits/lora (2)"]
    assert len(twice.look(images[0], [], topk=2)[0].classes) == 2
    with pytest.raises(vpeft.ConfigError, match="no adapter is called 'x'; there are digits/lora"):
        twice.look(images[0], ["x"])


def test_images_and_videos_on_one_page(files, images, tmp_path):
    config = {"name": "motion", "task": "video", "video": {"frames": 2}}
    both = Adapters([files["lora"], saved(tmp_path / "v.safetensors", "bitfit", config=config)])
    video = write(tmp_path / "clip.mp4", frames_of(5))
    first, image, motion = both.look(video)
    assert image.problem.startswith("clip.mp4 is not a readable image")
    (row,) = predict(tmp_path / "v.safetensors", [video])
    assert [(n, p) for n, p, _ in motion.classes] == [(c["class"], c["probability"]) for c in row["classes"]]
    assert len(first.classes) == 5  # of the frames' own classes, as the video's adapter is given them
    assert first == both.look(video, ["motion"])[0]
    assert len(both.preview(video)) == 5
    first, image, motion = both.look(images[0])
    assert motion.problem == "0.png is no video file; motion takes videos"
    assert first == both.look(images[0], ["lora"])[0]
    assert not image.problem
    assert both.preview(images[0])[0].shape == (40, 30, 3)


def test_own_classes_are_those_that_timm_knows():
    small = {"img_size": 32, "patch_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 1}
    names = own_classes(timm.create_model("vit_tiny_patch16_224", **small))
    assert len(names) == 1000
    assert names[0].startswith("tench")
    assert own_classes(timm.create_model("vit_tiny_patch16_224", num_classes=3, **small)) is None
    assert own_classes(timm.create_model("vit_base_patch16_clip_224.openai", **small)) is None  # a projection
    assert own_classes(timm.create_model(VIT)) == list(FASHION_CLASSES)
    assert own_classes(timm.create_model(VIT, num_classes=0)) is None


def test_names_from_a_file_are_text_on_the_page(adapters, images):
    shown, answers = answered(adapters, str(images[0]), adapters.titles)
    assert "&lt;b&gt;boot&lt;/b&gt;" in answers
    assert "<b>" not in answers
    assert not {"$", "{", "}"} & set(answers)
    assert shown.count("<img") == 1
    assert "http" not in shown + answers + drawing.CSS


def test_a_mask_is_shown_with_its_own_colours(tmp_path):
    names = [f"class {i}" for i in range(4)]
    mask = np.array([[0, 0, 0], [0, 3, 3]])
    row = write_pictures(tmp_path / "a.png", np.zeros((2, 3, 3), np.uint8), mask, names, tmp_path / "a")
    answer = Answer("seg")
    _read_pictures(answer, row, names, 5)
    assert [(n, round(s, 3)) for n, s, _ in answer.classes] == [("class 0", 0.667), ("class 3", 0.333)]
    for number, (_, _, colour) in zip((0, 3), answer.classes, strict=True):
        there = answer.picture[mask == number]
        assert (there == np.array(colour) / 2).all() or abs(there - np.array(colour) / 2).max() <= 1  # half of it, on black
    card = drawing.cards([answer])
    assert f"rgb({', '.join(map(str, answer.classes[1][2]))})" in card
    assert "33.3 %" in card


@pytest.mark.parametrize(("size", "shown"), [((7, 28), (56, 224)), ((300, 200), (300, 200)), ((2000, 1000), (896, 448))])
def test_small_pictures_are_enlarged_and_large_ones_made_smaller(size, shown):
    text = drawing.picture(np.zeros((*size, 3), np.uint8), 'a "picture"')
    data = text.split("base64,")[1].split('"')[0]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == shown[::-1]
    assert "a &quot;picture&quot;" in text


def test_without_gradio_the_command_says_how_to_get_it(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)  # as on a machine without it
    with pytest.raises(SystemExit) as end:
        main(["demo", "--ckpt", str(files["lora"])])
    assert end.value.code == 2
    assert "pip install 'vpeft[demo]'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["demo", "--ckpt", str(files["lora"]), "--topk", "0"])
    assert end.value.code == 2
    assert "--topk: 0" in capsys.readouterr().err
