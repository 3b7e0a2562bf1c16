"""Pairs of images and masks: composed scenes, folders, the field's layouts, and the transforms of both together."""

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import vpeft
from tests.support.fashion import fashion_root
from vpeft.data.images import IGNORED, coloured, overlay, read_mask, write_mask
from vpeft.data.loader import make_loader
from vpeft.engine.config import DataConfig
from vpeft.tasks.segmentation.config import ScenesConfig, SegConfig
from vpeft.tasks.segmentation.data import (
    LAYOUTS,
    Augment,
    PairTransform,
    SegmentationSet,
    Source,
    _warn_of_white,
    build_segmentation,
    palette,
)
from vpeft.tasks.segmentation.scenes import SCENE_CLASSES, SceneOptions, Scenes, write_scenes
from vpeft.tasks.segmentation.step import of_one_size

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def data(**kwargs):
    return SimpleNamespace(**({"classes": None, "num_classes": None} | kwargs))


def save(path, values, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8), mode).save(path)


# ---- scenes ----


def test_a_scene_depends_on_seed_split_and_index_alone(tmp_path):
    root = fashion_root(tmp_path)
    first, again = (Scenes("train", 6, root=root) for _ in range(2))
    image, mask = first[3]
    again[0]
    assert (image == again[3][0]).all()
    assert (mask == again[3][1]).all()
    assert (image != Scenes("train", 6, SceneOptions(seed=1), root)[3][0]).any()
    assert (mask != first[2][1]).any()
    assert (Scenes("val", 6, root=root)[3][1] != mask).any()


def test_scenes_are_those_of_earlier_versions():
    """Which files and results of then were made with: the digest was taken before scenes had further options."""
    digest = hashlib.sha256()
    for split in ("train", "val", "test"):
        for options in (SceneOptions(), SceneOptions(occlusion=False)):
            for image, mask in map(Scenes(split, 20, options).__getitem__, range(20)):
                digest.update(image.tobytes() + mask.tobytes())
    assert digest.hexdigest()[:16] == "a1b0b49266a077f0"


def test_masks_are_the_garments_pixels(tmp_path):
    root = fashion_root(tmp_path)
    scenes = Scenes("test", 12, SceneOptions(objects=(1, 1), scales=(1.0, 1.0)), root)
    for image, mask in (scenes[i] for i in range(12)):
        found = set(np.unique(mask)) - {0}
        assert len(found) == 1
        inside = mask > 0
        assert inside.sum() == 14 * 16  # the hole is filled
        grey = 80 + 15 * (found.pop() - 1)
        assert np.isin(image[inside], [grey, 0]).all()


def test_scenes_refuse_what_cannot_be(tmp_path):
    root = fashion_root(tmp_path)
    for options, words in (
        ({"size": 8}, "too small"),
        ({"objects": (3, 2)}, "fewest <= most"),
        ({"scales": (0.5, 3)}, "size / 28"),
        ({"jitter": 2}, r"56 pixels has 4 squares of 28; objects \(2, 5\) must be at most as many"),
        ({"jitter": -1, "objects": (1, 2)}, "jitter at least 0"),
    ):
        with pytest.raises(vpeft.DataError, match=words):
            SceneOptions(**options)
    with pytest.raises(vpeft.DataError, match="split 'dev'"):
        Scenes("dev", 3, root=root)


def batches(scenes, epoch, seed=0, workers=0):
    """What a loader gives in one epoch, in one order: images and masks, unchanged."""
    loader = make_loader(SegmentationSet(scenes, PairTransform(**PLAIN)), 3, train=False, seed=seed, workers=workers)
    loader.batch_sampler.epoch = epoch
    images, masks = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(masks)


def test_fresh_scenes_depend_on_seed_epoch_and_index(tmp_path):
    root = fashion_root(tmp_path)
    scenes = Scenes("train", 6, root=root, fresh=True)
    images, masks = batches(scenes, 0)
    assert len({mask.numpy().tobytes() for mask in masks}) == 6
    for again in (batches(scenes, 0), batches(Scenes("train", 6, root=root, fresh=True), 0, workers=2)):
        assert torch.equal(again[0], images)
        assert torch.equal(again[1], masks)
    for other in (batches(scenes, 1), batches(scenes, 0, seed=1)):
        assert all((a != b).any() for a, b in zip(other[1], masks, strict=True))
    kept = Scenes("train", 6, root=root)
    assert torch.equal(batches(kept, 0)[0], batches(kept, 1)[0])


def scenes_of(tmp_path, **keys):
    """The splits that a configuration's section ``seg.scenes`` gives."""
    section = DataConfig(
        source="scenes", root=str(fashion_root(tmp_path)), train_split="train", val_split="val", test_split="test"
    )
    seg = SegConfig(crop=56, scenes=ScenesConfig(**{"train": 9, "val": 2, "test": 9, **keys}))
    return build_segmentation(OmegaConf.structured({"data": section, "seg": seg}), PLAIN | {"input_size": (3, 56, 56)})


def test_only_training_scenes_are_fresh(tmp_path):
    found = scenes_of(tmp_path, fresh=True)
    for split in (found.val, found.test):
        first, again = (batches(split.source, epoch) for epoch in (0, 1))
        assert torch.equal(first[0], again[0])
    assert not torch.equal(batches(found.train.source, 0)[0], batches(found.train.source, 1)[0])


def test_keys_say_how_scenes_are_composed(tmp_path):
    def garments(**keys):
        """Of each test scene: how many pixels each class has."""
        scenes = scenes_of(tmp_path, **keys).test.source
        return [np.bincount(scenes[i][1].ravel(), minlength=11)[1:] for i in range(len(scenes))]

    assert all((n > 0).sum() == 1 for n in garments(objects=[1, 1]))
    assert all(n.sum() == 14 * 16 for n in garments(objects=[1, 1], scales=[1, 1]))  # the stand-in's garments
    assert all(n.sum() > 3 * 14 * 16 for n in garments(objects=[1, 1], scales=[2, 2]))
    assert all((n % (14 * 16) == 0).all() for n in garments(scales=[1, 1], occlusion=False))
    assert not all((n % (14 * 16) == 0).all() for n in garments(scales=[1, 1], occlusion=True))
    with pytest.raises(vpeft.DataError, match=r"seg\.scenes: scales \(0\.5, 3\.0\).* size / 28"):
        scenes_of(tmp_path, scales=[0.5, 3])
    with pytest.raises(vpeft.DataError, match=r"seg\.scenes: objects \(3, 2\).* fewest <= most"):
        scenes_of(tmp_path, objects=[3, 2])


def test_with_jitter_garments_stand_side_by_side(tmp_path):
    """Each near the middle of a square of its own; with none they stand exactly where they do in a garment's image."""

    def corners(jitter):
        """Of each garment: where its first row and column are in its square."""
        options = SceneOptions(objects=(4, 4), scales=(1.0, 1.0), jitter=jitter)
        scenes = Scenes("test", 8, options, fashion_root(tmp_path))
        squares = [scenes[i][1][y : y + 28, x : x + 28] > 0 for i in range(8) for y in (0, 28) for x in (0, 28)]
        assert all(square.any() for square in squares)
        return [(square.any(1).argmax(), square.any(0).argmax(), square.sum()) for square in squares]

    still = corners(0)
    assert all(2 <= y < 8 and n == 14 * 16 for y, _, n in still)  # the stand-in's blobs begin there
    moved = corners(3)
    assert {y for y, _, _ in moved} > {y for y, _, _ in still}
    assert all(y < 8 + 3 for y, _, _ in moved)


def test_written_scenes_are_read_back_as_they_were(tmp_path):
    root = fashion_root(tmp_path / "fashion")
    write_scenes(tmp_path / "out", train=3, test=2, root=root)
    source = LAYOUTS["folder"](tmp_path / "out", "test", data(classes=SCENE_CLASSES))
    scenes = Scenes("test", 2, root=root)
    for index in range(2):
        for read, made in zip(source[index], scenes[index], strict=True):
            assert (read == made).all()
    assert source.classes[0] == "background"


# ---- layouts ----


def test_folder_names_what_is_wrong(tmp_path):
    read = LAYOUTS["folder"]
    with pytest.raises(vpeft.DataError, match=r"data\.num_classes"):
        read(tmp_path, "train", data())
    with pytest.raises(vpeft.DataError, match="images/train' does not exist"):
        read(tmp_path, "train", data(num_classes=3))
    save(tmp_path / "images/train/a.png", np.zeros((4, 6, 3)), "RGB")
    save(tmp_path / "images/train/b.png", np.zeros((4, 6, 3)), "RGB")
    save(tmp_path / "masks/train/a.png", np.zeros((4, 6)))
    with pytest.raises(vpeft.DataError, match=r"b\.png has no mask .*masks/train/b\.png \(1 of 2"):
        read(tmp_path, "train", data(num_classes=3))
    for values, mode, words in (
        (np.zeros((4, 5)), "L", r"b\.png: a mask of 5x4 pixels for an image of 6x4"),
        (np.full((4, 6), 7), "L", r"b\.png: holds the ids \[7\], but there are 3 classes"),
        (np.zeros((4, 6, 3)), "RGB", r"b\.png: a mask holds one class id per pixel"),
    ):
        save(tmp_path / "masks/train/b.png", values, mode)
        source = read(tmp_path, "train", data(num_classes=3))
        source[0]
        with pytest.raises(vpeft.DataError, match=words):
            source[1]
    (tmp_path / "masks/train/b.png").write_bytes(b"no image")
    with pytest.raises(vpeft.DataError, match=r"b\.png is not a readable mask"):
        source[1]
    save(tmp_path / "masks/train/b.png", np.full((4, 6), IGNORED))
    assert (source[1][1] == IGNORED).all()


def test_ade20k_counts_classes_from_one(tmp_path):
    save(tmp_path / "images/training/x/a.jpg", np.zeros((2, 2, 3)), "RGB")
    save(tmp_path / "annotations/training/x/a.png", [[0, 1], [150, 2]])
    source = LAYOUTS["ade20k"](tmp_path, "training", data())
    assert source[0][1].tolist() == [[255, 0], [149, 1]]
    assert len(source.classes) == 150
    lines = ["Idx\tRatio\tTrain\tVal\tName"] + [f"{i}\t0\t0\t0\tthing {i}, other" for i in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(lines))
    assert LAYOUTS["ade20k"](tmp_path, "training", data()).classes[:2] == ("thing 1", "thing 2")


def test_voc_follows_its_lists(tmp_path):
    for name in ("p", "q"):
        save(tmp_path / f"JPEGImages/{name}.jpg", np.zeros((2, 2, 3)), "RGB")
        save(tmp_path / f"SegmentationClass/{name}.png", [[0, 20], [255, 1]])
    save(tmp_path / "SegmentationClassAug/q.png", [[3, 3], [3, 3]])
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("q\np\n")
    (lists / "trainaug.txt").write_text("q\n")
    source = LAYOUTS["voc"](tmp_path, "val", data())
    assert [p.stem for p in source.images] == ["q", "p"]
    assert source[0][1].tolist() == [[0, 20], [255, 1]]
    assert LAYOUTS["voc"](tmp_path, "trainaug", data())[0][1].tolist() == [[3, 3], [3, 3]]
    with pytest.raises(vpeft.DataError, match=r"vall\.txt does not exist; did you mean 'val'"):
        LAYOUTS["voc"](tmp_path, "vall", data())
    (lists / "trainaug.txt").write_text("p\n")
    with pytest.raises(vpeft.DataError, match=r"SegmentationClassAug/p\.png does not exist"):
        LAYOUTS["voc"](tmp_path, "trainaug", data())


def test_cityscapes_reads_train_ids(tmp_path):
    save(tmp_path / "leftImg8bit/val/ulm/ulm_1_2_leftImg8bit.png", np.zeros((2, 2, 3)), "RGB")
    save(tmp_path / "gtFine/val/ulm/ulm_1_2_gtFine_labelTrainIds.png", [[0, 18], [255, 3]])
    source = LAYOUTS["cityscapes"](tmp_path, "val", data())
    assert source[0][1].tolist() == [[0, 18], [255, 3]]
    assert len(source.classes) == 19


def test_two_images_for_one_mask_and_too_many_classes_are_refused(tmp_path):
    for name in ("a.png", "a.jpg"):
        save(tmp_path / f"images/train/{name}", np.zeros((4, 6, 3)), "RGB")
    save(tmp_path / "masks/train/a.png", np.zeros((4, 6)))
    with pytest.raises(vpeft.DataError, match=r"a\.png and .*a\.jpg would have one mask"):
        LAYOUTS["folder"](tmp_path, "train", data(num_classes=3))
    (tmp_path / "images/train/a.jpg").unlink()
    section = {"source": "folder", "root": str(tmp_path), "train_split": "train", "val_split": None, "test_split": None}
    seg = SimpleNamespace(augment=False, crop=4, short=None, scale=(1, 1), cat_max_ratio=1, hflip=0, photometric=False)
    stats = {"mean": (0.5,) * 3, "std": (0.5,) * 3}

    def build(**changes):
        return build_segmentation(
            SimpleNamespace(data=OmegaConf.structured(DataConfig(**(section | changes))), seg=seg), stats
        )

    with pytest.raises(vpeft.DataError, match=r"256 classes; masks have at most 255"):
        build(num_classes=256)
    assert len(build(num_classes=255).train) == 1


def test_black_and_white_masks_are_said_to_have_one_class(tmp_path, caplog):
    source = Source([Path("x")], [tmp_path / "m.png"], ("a", "b"))
    for white, said in ((255, True), (1, False)):
        save(tmp_path / "m.png", [[0, white]])
        caplog.clear()
        _warn_of_white(source)
        assert ("255 means not labelled" in caplog.text) is said


def test_ids_are_labelled_by_their_names(tmp_path):
    save(tmp_path / "i.png", np.zeros((1, 4, 3)), "RGB")
    save(tmp_path / "m.png", [[0, 1, 2, 255]])
    source = Source([tmp_path / "i.png"], [tmp_path / "m.png"], ("a", "b", "c"))
    assert source.labelled(("c", "x", "a", "b"), "here")[0][1].tolist() == [[2, 3, 0, 255]]
    with pytest.raises(vpeft.DataError, match="here has the class c, which is not one of the 2"):
        source.labelled(("a", "b"), "here")
    Image.fromarray(np.array([[0, -1, 2, 255]], np.int32)).save(tmp_path / "m.tif")
    with pytest.raises(vpeft.DataError, match=r"holds the ids \[-1\]"):
        replace(source, masks=[tmp_path / "m.tif"])[0]


# ---- transforms ----


def coordinates(height, width):
    """An image whose colours say where a pixel was, and a mask that says the same."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, y * 0], -1).astype(np.uint8), ((y + x) % 5).astype(np.uint8)


def test_evaluation_keeps_the_mask_and_the_size():
    image, mask = coordinates(10, 14)
    x, y = PairTransform(mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))(image, mask)
    wanted = (torch.from_numpy(image).permute(2, 0, 1) / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor(
        [0.5, 0.4, 0.3]
    )[:, None, None]
    assert torch.allclose(x, wanted, atol=1e-6)
    assert (y.numpy() == mask).all()
    assert y.dtype == torch.int64
    x, y = PairTransform(**PLAIN, short=20)(image, mask)
    assert x.shape == (3, 20, 28)
    assert y.shape == (10, 14)


def test_crops_flips_and_padding_move_image_and_mask_together():
    image, mask = coordinates(12, 20)
    joint = PairTransform(**PLAIN, crop=16, augment=Augment(scale=(1.0, 1.0), photometric=False, hflip=0.5))
    turned = set()
    for seed in range(20):
        torch.manual_seed(seed)
        x, y = joint(image, mask)
        assert x.shape == (3, 16, 16)
        assert (y[12:] == IGNORED).all()
        assert (x[:, 12:] == 0).all()
        where = (x[:2, :12] * 255).round().long()
        assert torch.equal(y[:12], where.sum(0) % 5)
        turned.add(bool(where[1, 0, 0] > where[1, 0, -1]))
    assert turned == {False, True}
    x, y = PairTransform(**PLAIN, crop=8)(image, mask)  # the middle
    assert (x[:2, 0, 0] * 255).round().tolist() == [2, 6]


def test_masks_are_enlarged_by_the_nearest_pixel():
    mask = np.array([[0, 200], [7, 255]], np.uint8).repeat(4, 0).repeat(4, 1)
    joint = PairTransform(**PLAIN, crop=11, augment=Augment(scale=(1.6, 1.7), hflip=0, photometric=False))
    for seed in range(5):
        torch.manual_seed(seed)
        assert set(joint(np.zeros((8, 8, 3), np.uint8), mask)[1].unique().tolist()) <= {0, 7, 200, 255}


def test_crops_begin_at_multiples_of_their_step():
    image, mask = coordinates(24, 20)
    for step, rows, columns in ((8, {0, 8, 16}, {0, 8}), (1, set(range(17)), set(range(13))), (30, {0}, {0})):
        joint = PairTransform(**PLAIN, crop=8, augment=Augment((1.0, 1.0), 1.0, 0, False, crop_step=step))
        found = set()
        for seed in range(150):
            torch.manual_seed(seed)
            x, _ = joint(image, mask)
            found.add(tuple((x[:2, 0, 0] * 255).round().int().tolist()))
        assert [{f[i] for f in found} for i in range(2)] == [rows, columns]


def test_crops_of_one_class_are_drawn_again():
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :16] = 1
    image = np.zeros((64, 64, 3), np.uint8)
    mixed = {}
    for ratio in (1.0, 0.75):
        joint = PairTransform(**PLAIN, crop=16, augment=Augment((1.0, 1.0), ratio, 0, False))
        found = 0
        for seed in range(60):
            torch.manual_seed(seed)
            found += len(joint(image, mask)[1].unique()) > 1
        mixed[ratio] = found
    assert mixed[0.75] > 10
    assert all(0 < v < 60 for v in mixed.values())


def test_images_of_several_sizes_make_a_batch_of_lists_that_is_judged_by_size():
    class Two:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return coordinates(8, 8 + index)

    dataset = SegmentationSet(Two(), PairTransform(**PLAIN))
    images, masks = dataset.collate([dataset[0], dataset[1], dataset[0]])
    assert [x.shape for x in images] == [(3, 8, 8), (3, 8, 9), (3, 8, 8)]
    found = list(of_one_size(images, masks))
    assert [(len(x), y.shape, rows) for x, y, rows in found] == [(2, (2, 8, 8), [0, 2]), (1, (1, 8, 9), [1])]
    images, masks = dataset.collate([dataset[0], dataset[0]])
    assert images.shape == (2, 3, 8, 8)
    assert masks.shape == (2, 8, 8)


# ---- colours ----


def test_palettes_and_overlays(tmp_path):
    assert palette(4)[:4] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]  # Pascal VOC's first colours
    assert len(set(palette(150))) == 150
    mask = np.array([[0, 1], [2, IGNORED]], np.uint8)
    image = np.full((2, 2, 3), 100, np.uint8)
    assert coloured(mask, palette(3))[1, 1].tolist() == [255, 255, 255]
    found = overlay(image, mask, palette(3))
    assert found.tolist() == [[[50, 50, 50], [114, 50, 50]], [[50, 114, 50], [100, 100, 100]]]
    write_mask(tmp_path / "m.png", mask, palette(3))
    assert (read_mask(tmp_path / "m.png") == mask).all()
