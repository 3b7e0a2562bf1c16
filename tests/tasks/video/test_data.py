"""Video data on real files: frame-exact decoding, lists, sampling, transforms, what happens with broken videos."""

import json
import os
import random

import av
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from tests.support.videos import frames_of, sequential, write
from vpeft.data import make_loader
from vpeft.data.embedded import EXCERPT, FASHION_ROOT, fashion_digest, fashion_mnist
from vpeft.engine.config import AugmentConfig, DataConfig, VideoConfig
from vpeft.errors import DataError
from vpeft.files import write_text
from vpeft.tasks.video.data import ClipOptions, Clips, build_clips, find_videos, open_files
from vpeft.tasks.video.data import index as index_module
from vpeft.tasks.video.data import sampling as s
from vpeft.tasks.video.data.build import clip_transforms
from vpeft.tasks.video.data.decode import Timeline, read_frames, scan
from vpeft.tasks.video.data.folders import read_folder
from vpeft.tasks.video.data.index import open_index, usable
from vpeft.tasks.video.data.lists import Video, read_hmdb51, read_list
from vpeft.tasks.video.data.transforms import Crops, SameForAll
from vpeft.tasks.video.motion import MOTIONS, make_motion, motion_frames, write_video

STATS = {
    "input_size": (3, 16, 16), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear",
    "crop_pct": 1.0, "crop_mode": "center",
}  # fmt: skip


def settings(cls, **changes):
    return OmegaConf.merge(OmegaConf.structured(cls), changes)


# ---- decoding ----


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("b_frames.mp4", {}),
        ("one_key.mp4", {"gop": 500}),
        ("open_gop.mp4", {"options": {"x264-params": "open-gop=1:bframes=3:keyint=7:scenecut=0"}}),
        ("variable.mkv", {"times": list(np.cumsum(np.random.default_rng(0).integers(5, 90, 40)))}),
        ("late_start.mp4", {"times": [1000 + 40 * i for i in range(40)]}),
        ("mpeg4.avi", {"codec": "mpeg4", "bframes": 0}),
        ("mpeg4_b.avi", {"codec": "mpeg4", "bframes": 2}),
    ],
)
def test_every_frame_is_the_one_of_sequential_decoding(tmp_path, name, kwargs):
    path = write(tmp_path / name, frames_of(40), **kwargs)
    truth = sequential(path)
    assert len({t.tobytes() for t in truth}) == len(truth), "frames differ, or the test tells nothing"
    timeline = scan(path)
    assert timeline.count == len(truth)
    for i in range(len(truth)):
        assert np.array_equal(read_frames(path, [i], timeline)[0], truth[i]), i
    picked = [31, 2, 2, 17, 39, 0]
    assert np.array_equal(read_frames(path, picked, timeline), truth[picked]), "in the order asked for, with repeats"
    with pytest.raises(DataError, match=rf"{name}: frames \[{len(truth)}\].*has {len(truth)}"):
        read_frames(path, [len(truth)], timeline)


def test_seeking_decodes_a_part_only(tmp_path, monkeypatch):
    from vpeft.tasks.video.data import decode

    path = write(tmp_path / "long.mp4", frames_of(60), gop=10, bframes=0)
    seen, real = [], decode._decode

    def counted(*args):
        for frame in real(*args):
            seen.append(frame.pts)
            yield frame

    timeline = scan(path)
    monkeypatch.setattr(decode, "_decode", counted)
    read_frames(path, [45, 47], timeline)
    assert len(seen) == 8, "from the key frame 40 to frame 47"


def test_a_seek_that_lands_too_late_does_no_harm(tmp_path, monkeypatch):
    from vpeft.tasks.video.data import decode

    path = write(tmp_path / "a.mp4", frames_of(30))
    truth, timeline, real = sequential(path), scan(path), decode._decode
    monkeypatch.setattr(decode, "_decode", lambda path, time: real(path, None if time is None else time + 6000))
    for i in (3, 14, 29):
        assert np.array_equal(read_frames(path, [i], timeline)[0], truth[i])


def test_frame_counts_do_not_come_from_the_container(tmp_path):
    whole = write(tmp_path / "whole.mkv", frames_of(30), bframes=0)
    with av.open(str(whole)) as container:
        assert container.streams.video[0].frames != 30, "Matroska does not say"
    assert scan(whole).count == 30
    # Two thirds of a file: header and duration still tell of all frames.
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    count = scan(cut).count
    assert 0 < count < 30
    assert np.array_equal(read_frames(cut, [count - 2]), sequential(whole)[[count - 2]])


def test_timeline_keeps_any_times():
    for times in ([0], [3, 1, 2], [0, 10, 20, 33, 46, 47], [7, 7 + 512]):
        timeline = Timeline.of(times)
        assert timeline.times().tolist() == sorted(times)
        assert timeline.count == len(times)
    assert Timeline.of([0, 40, 80, 120]).steps == ((40, 3),)
    assert Timeline.of([0, 40, 40]) == Timeline(3), "equal times: frames are counted instead"


def test_broken_files_are_named(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video at all" * 100)
    good = write(tmp_path / "good.mp4", frames_of(30), bframes=0)
    (tmp_path / "header.mp4").write_bytes(good.read_bytes()[:900])
    for name, reason in (
        ("empty.mp4", "is empty"), ("text.mp4", "not a readable video"), ("header.mp4", "not a readable video"),
        ("missing.mp4", "no such video file"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=rf"{name}: .*{reason}"):
            scan(tmp_path / name)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(DataError, match=r"sound\.mp4: .*no picture stream"):
        scan(tmp_path / "sound.mp4")


def test_folders_of_frames(tmp_path):
    frames = frames_of(5)
    for first in (0, 1):
        folder = tmp_path / str(first)
        folder.mkdir()
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / f"img_{i + first:05d}.png")
        assert np.array_equal(read_folder(folder, "img_{:05d}.png", [4, 0, 2]), frames[[4, 0, 2]])
    videos = [Video(str(tmp_path / "1"), 0, 5), Video(str(tmp_path / "1"), 0, 6), Video(str(tmp_path / "2"), 0, 5)]
    timelines, reasons = open_index(videos, tmp_path / "i.json", template="img_{:05d}.png")
    assert [t and t.count for t in timelines] == [5, None, None]
    assert "img_00006.png: no such frame" in reasons[0]
    assert "no such folder" in reasons[1]
    (tmp_path / "1" / "img_00002.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"img_00002\.png is not a readable image"):
        read_folder(tmp_path / "1", "img_{:05d}.png", [1])


# ---- index ----


def test_index_is_made_once_and_follows_the_files(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{i}.mp4", frames_of(10 + i)) for i in range(3)]
    videos = [Video(str(p), 0) for p in (*paths, tmp_path / "none.mp4")]
    scanned, real = [], index_module.scan
    monkeypatch.setattr(index_module, "scan", lambda path: scanned.append(path) or real(path))
    file = tmp_path / "train.txt.frames.json"

    def counts():
        scanned.clear()
        timelines, reasons = open_index(videos, file)
        assert len(reasons) == 1
        assert "none.mp4: no such" in reasons[0]
        return [t and t.count for t in timelines], sorted(os.path.basename(p) for p in scanned)

    assert counts() == ([10, 11, 12, None], ["0.mp4", "1.mp4", "2.mp4", "none.mp4"])
    assert counts() == ([10, 11, 12, None], ["none.mp4"])
    write(paths[1], frames_of(21))
    assert counts() == ([10, 21, 12, None], ["1.mp4", "none.mp4"])
    file.write_text("{half a fi")
    assert counts()[0] == [10, 21, 12, None]
    assert set(json.loads(file.read_text())["videos"]) == {v.path for v in videos}
    assert [p.name for p in tmp_path.glob("*.tmp")] == [], "written whole, nothing left"


def test_index_of_a_read_only_place_goes_to_the_cache(tmp_path, caplog):
    video = Video(str(write(tmp_path / "a.mp4", frames_of(10))), 0)
    blocked = tmp_path / "a.mp4" / "list.frames.json"  # below a file: nobody can write there
    assert open_index([video], blocked)[0][0].count == 10
    assert "video.cache" in caplog.text
    open_index([video], blocked, cache=tmp_path / "cache")
    assert (tmp_path / "cache" / "list.frames.json").is_file()


def test_unusable_videos_are_refused_or_left_out(tmp_path):
    videos = [Video("a.mp4", 0), Video("b.mp4", 1), Video("c.mp4", 2)]
    timelines = [Timeline(9), None, Timeline(3)]
    with pytest.raises(DataError, match=r"2 of 3 videos cannot be used, the first is b\.mp4: gone.*skip_broken"):
        usable(videos, timelines, ["b.mp4: gone"], skip=False, fewest=4)
    kept, times, left = usable(videos, timelines, ["b.mp4: gone"], skip=True, fewest=4)
    assert (kept, times) == ([videos[0]], [Timeline(9)])
    assert left == ["b.mp4: gone", "c.mp4: too short: 3 frames, at least 4 wanted"]
    with pytest.raises(DataError, match="none of 3"):
        usable(videos, [None] * 3, ["x"] * 3, skip=True)


# ---- lists ----


def test_lists_as_the_field_writes_them(tmp_path):
    file = tmp_path / "train.csv"
    file.write_text("# made by hand\na/b c.mp4 3\n\nd,e.mp4 0\nf g.mp4,12\n/abs/h.mp4, 7\n")
    assert read_list(file, "/videos") == [
        Video("/videos/a/b c.mp4", 3), Video("/videos/d,e.mp4", 0), Video("/videos/f g.mp4", 12), Video("/abs/h.mp4", 7),
    ]  # fmt: skip
    file.write_text("x y 30 4\nz,8,1\n")
    assert read_list(file, folders=True) == [Video(str(tmp_path / "x y"), 4, 30), Video(str(tmp_path / "z"), 1, 8)]
    for text, message in (
        ("a.mp4 1\nb.mp4\n", "line 2: expected 'path label'"),
        ("a.mp4 1\nb.mp4 cat\n", "line 2: the label 'cat' and the label '1' of line 1"),
        ("\n", "no video"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_list(file)
    with pytest.raises(DataError, match=r"none\.txt"):
        read_list(tmp_path / "none.txt")


def test_hmdb51_splits(tmp_path):
    (tmp_path / "wave_test_split1.txt").write_text("a b.avi 1 \nc.avi 2\nd.avi 0\n")
    (tmp_path / "brush_hair_test_split1.txt").write_text("e.avi 1\n")
    (tmp_path / "brush_hair_test_split2.txt").write_text("e.avi 2\n")
    videos, classes = read_hmdb51(tmp_path, "/v", "train")
    assert classes == ("brush_hair", "wave")
    assert videos == [Video("/v/brush_hair/e.avi", 0), Video("/v/wave/a b.avi", 1)]
    assert read_hmdb51(tmp_path, "/v", "test")[0] == [Video("/v/wave/c.avi", 1)]
    with pytest.raises(DataError, match="_test_split3"):
        read_hmdb51(tmp_path, "/v", "train", 3)


# ---- sampling ----


def test_uniform_by_hand():
    # n = 41, T = 8: segments of 5 frames, [0, 5], [5, 10] … [35, 40]
    assert s.uniform_test(41, 8).tolist() == [[2, 7, 12, 17, 22, 27, 32, 37]]
    # n = 10, T = 4: s = 2.25, edges 0, 2, 4 (4.5 to even), 7 (6.75), 9
    assert s.uniform_test(10, 4).tolist() == [[1, 3, 5, 8]]
    assert s.uniform_test(1, 4).tolist() == [[0, 0, 0, 0]]
    # Segments [0, 5], [5, 10] … in two parts: their middles at a quarter and three quarters.
    assert s.uniform_test(41, 8, 2).tolist() == [[1, 6, 11, 16, 21, 26, 31, 36], [3, 8, 13, 18, 23, 28, 33, 38]]
    assert s.uniform_test(10, 4, 2).tolist() == [[0, 2, 4, 7], [1, 3, 6, 8]]
    generator = torch.Generator().manual_seed(0)
    drawn = np.stack([s.uniform(10, 4, generator) for _ in range(2000)])
    assert [sorted(set(column)) for column in drawn.T.tolist()] == [[0, 1, 2], [2, 3, 4], [4, 5, 6, 7], [7, 8, 9]]
    assert np.bincount(drawn[:, 2])[4:] / 2000 == pytest.approx(np.full(4, 0.25), abs=0.04)


def test_dense_by_hand():
    # n = 100, T = 8, s = 4: span 29, starts 0 … 71
    assert s.dense_test(100, 8, 4, 1).tolist() == [[35, 39, 43, 47, 51, 55, 59, 63]]
    assert s.dense_test(100, 8, 4, 3)[:, 0].tolist() == [0, 36, 71]
    assert s.dense_test(100, 8, 4, 3)[2, -1] == 99
    generator = torch.Generator().manual_seed(0)
    drawn = np.stack([s.dense(100, 8, 4, generator) for _ in range(3000)])
    assert (np.diff(drawn) == 4).all()
    assert (drawn[:, 0].min(), drawn[:, 0].max()) == (0, 71)
    # n = 10, T = 4, s = 4 reaches 0, 4, 8: training repeats 8, testing shows the last frame
    assert s.dense(10, 4, 4).tolist() == [0, 4, 8, 8]
    assert s.dense_test(10, 4, 4, 2).tolist() == [[0, 4, 8, 9], [0, 4, 8, 9]]
    assert s.dense(13, 4, 4).tolist() == [0, 4, 8, 12], "exactly the span: one start"


def test_videomae_by_hand():
    generator = torch.Generator().manual_seed(0)
    drawn = np.stack([s.videomae(100, 4, 5, generator) for _ in range(3000)])
    starts = drawn[:, 0]
    assert (starts.min(), starts.max()) == (0, 79), "ends 20 … 99"
    # linspace(start, start + 20, 4) = 0, 6.67, 13.33, 20; the last one is cut to 19
    assert (drawn - starts[:, None] == [0, 6, 13, 19]).all()
    # n = 11, s = 5: linspace(0, 11, 2) = 0, 11, then the last frame
    assert s.videomae(11, 4, 5).tolist() == [0, 10, 10, 10]
    assert s.videomae(3, 4, 5).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("kind", s.SAMPLINGS)
@pytest.mark.parametrize("frames", [1, 2, 7, 16, 31, 200])
def test_indices_are_frames_of_the_video(kind, frames):
    for indices in (s.random_clip(kind, frames, 8, 4), *s.fixed_clips(kind, frames, 8, 4)):
        assert indices.shape == (8,)
        assert (indices >= 0).all()
        assert (indices < frames).all()
        assert (np.diff(indices) >= 0).all()


# ---- transforms ----


def test_one_random_transform_for_all_frames_of_a_clip():
    from timm.data import create_transform

    transform = create_transform(
        24,
        is_training=True,
        hflip=0.5,
        color_jitter=0.4,
        auto_augment="rand-m7-n4-mstd0.5-inc1",
        re_prob=0.5,
        re_mode="const",
    )
    same = SameForAll(transform)
    frame = frames_of(1, seed=3)[0]
    results = []
    for seed in range(12):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        clip = same(np.stack([frame] * 4))
        assert clip.shape == (3, 4, 24, 24)
        assert (clip == clip[:, :1]).all(), "equal frames stay equal"
        results.append(clip[:, 0])
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        assert torch.equal(transform(Image.fromarray(frame)), clip[:, 0]), "as timm treats one image"
        assert not torch.equal(same(np.stack([frame] * 4))[:, 0], clip[:, 0]), "the next clip is treated otherwise"
    assert len({r.numpy().tobytes() for r in results}) == 12


def test_crops_lie_along_the_long_side():
    wide = np.zeros((2, 16, 40, 3), np.uint8)
    wide[:] = np.arange(40, dtype=np.uint8)[None, None, :, None]
    crops = Crops((16, 16), short=16, crops=3, mean=[0, 0, 0], std=[1 / 255] * 3)
    found = crops(wide)
    assert found.shape == (3, 3, 2, 16, 16)
    assert found[:, 0, 0, 0, 0].round().tolist() == [0, 12, 24]
    assert crops(wide.transpose(0, 2, 1, 3).copy())[:, 0, 0, 0, 0].round().tolist() == [0, 12, 24]
    assert crops.centre(wide)[0, 0, 0, 0].round() == 12
    half = Crops((16, 16), short=16, mean=[0.5] * 3, std=[0.5] * 3)(np.full((1, 32, 64, 3), 255, np.uint8))
    assert half.shape == (1, 3, 1, 16, 16)
    assert torch.allclose(half, torch.ones(())), "(1 - 0.5) / 0.5"


# ---- data sets ----


@pytest.fixture
def folder(tmp_path):
    """Four train and two test videos of 48 x 64, 20 frames, in a list each."""
    for split, count in (("train", 4), ("test", 2)):
        for i in range(count):
            write(tmp_path / f"{split}{i}.mp4", frames_of(20, seed=i))
        (tmp_path / f"{split}.txt").write_text("".join(f"{split}{i}.mp4 {i % 2}\n" for i in range(count)))
    return tmp_path


def opened(folder, data=None, video=None, augment=None, **kwargs):
    data = settings(DataConfig, **({"source": "list", "root": str(folder)} | (data or {})))
    video = settings(VideoConfig, **({"frames": 4} | (video or {})))
    return build_clips(data, settings(AugmentConfig, **(augment or {})), video, STATS, **kwargs)


@pytest.mark.parametrize("sampling", ["dense", "uniform"])
def test_clips_and_views_of_lists(folder, sampling):
    found = opened(folder, video={"sampling": sampling, "stride": 2, "views": 2, "crops": 3})
    assert found.classes == ("0", "1")
    clip, label = found.train[1]
    assert clip.shape == (3, 4, 16, 16)
    assert label == 1
    views, _ = found.test[0]
    assert views.shape == (6, 3, 4, 16, 16)
    fixed = s.dense_test(20, 4, 2, 2) if sampling == "dense" else s.uniform_test(20, 4, 2)
    crops = Crops((16, 16), short=16, crops=3, mean=STATS["mean"], std=STATS["std"], interpolation="bilinear")
    truth = sequential(folder / "test0.mp4")
    assert torch.equal(views, torch.cat([crops(truth[i]) for i in fixed]))
    assert (folder / "train.txt.frames.json").is_file()


def test_scale_jitter_resizes_the_short_side_within_its_bounds_and_cuts_anywhere():
    # Values rise along both sides, so that the slope tells the scale and the corner the place.
    y, x = np.mgrid[:64, :96]
    frames = np.stack([2 * y, 2 * x, 0 * x], -1).astype(np.uint8)[None].repeat(2, 0)
    augment = settings(AugmentConfig, enabled=True, scale_jitter=[1.0, 1.5], hflip=0.0)
    transform, _ = clip_transforms(augment, settings(VideoConfig), STATS)
    torch.manual_seed(0)
    random.seed(0)
    clips = torch.stack([transform(frames) for _ in range(60)]) * 255 / 2
    assert clips.shape == (60, 3, 2, 16, 16)
    assert torch.equal(clips[:, :, 0], clips[:, :, 1])
    inner = clips[:, :, 0, 2:-2, 2:-2]  # the picture's edges bend the slope
    slopes = torch.stack([inner[:, 0].diff(dim=1).mean((1, 2)), inner[:, 1].diff(dim=2).mean((1, 2))])
    factors = 64 / 16 / slopes  # short side of the resized picture over 16
    assert torch.allclose(factors[0], factors[1], rtol=0.06)  # eight-bit values
    assert factors.min() > 0.96
    assert factors.max() < 1.56
    assert factors.max() - factors.min() > 0.4
    lefts = clips[:, 1, 0, 8, 8]
    assert lefts.max() - lefts.min() > 32


def test_training_clips_are_drawn_from_the_seed_of_the_sample(folder):
    data = opened(folder, augment={"enabled": True}, video={"sampling": "dense"})
    batches = [list(make_loader(data.train, 2, train=True, seed=3, workers=w)) for w in (0, 2)]
    for (a, x), (b, y) in zip(*batches, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)


def test_validation_cut_from_training_is_judged_by_views(folder):
    data = opened(folder, data={"val_size": 1}, augment={"enabled": True}, video={"sampling": "dense", "views": 2})
    assert (len(data.train), len(data.val), len(data.test)) == (3, 1, 2)
    assert data.val[0][0].shape == (2, 3, 4, 16, 16)
    assert torch.equal(data.val[0][0], data.val[0][0])
    assert {v.path for v in data.train.videos}.isdisjoint(v.path for v in data.val.videos)


def test_flip_only_where_asked_for_and_never_for_directions(folder):
    def mirrored(video):
        data = opened(folder, augment={"enabled": True, "hflip": 1.0, "scale": [1, 1]}, video=video | {"sampling": "dense"})
        plain = opened(folder, augment={"enabled": True, "hflip": 0.0, "scale": [1, 1]}, video={"sampling": "dense"})
        torch.manual_seed(0), random.seed(0)
        a = data.train[0][0]
        torch.manual_seed(0), random.seed(0)
        b = plain.train[0][0]
        return torch.equal(a, b), torch.allclose(a, b.flip(-1), atol=0.02)

    assert mirrored({})[0]
    assert mirrored({"flip": True}) == (False, True)
    names = ["Pushing something from left to right", "Holding something"]
    with pytest.raises(DataError, match=r"video\.flip: 1 classes such as 'Pushing"):
        opened(folder, data={"classes": names}, augment={"enabled": True}, video={"flip": True})
    opened(folder, data={"classes": ["leftover", "bright"]}, augment={"enabled": True}, video={"flip": True})


def test_broken_videos_end_the_opening_or_are_counted(folder):
    (folder / "train2.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 4 videos cannot be used.*train2\.mp4: the video file is empty.*skip_broken"):
        opened(folder)
    data = opened(folder, video={"skip_broken": True})
    assert len(data.train) == 3
    assert len(data.train.left_out) == 1
    with pytest.raises(DataError, match="too short: 20 frames, at least 21"):
        opened(folder, data={"train_split": "test"}, video={"min_frames": 21})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_video_that_breaks_later_is_dropped_and_counted(folder, workers):
    strict, lenient = opened(folder), opened(folder, video={"skip_broken": True})
    (folder / "train1.mp4").unlink()
    with pytest.raises(DataError, match=r"train1\.mp4: no such"):
        strict.train[1]
    batches = list(make_loader(lenient.train, 2, train=False, workers=workers))
    assert [len(labels) for _, labels in batches] == [1, 2]
    assert [labels.tolist() for _, labels in batches] == [[0], [0, 1]], "nothing in its place"
    assert lenient.train.skipped() == 1
    (folder / "train0.mp4").unlink()
    batches = list(make_loader(lenient.train, 2, train=False, workers=workers))
    assert [labels.tolist() for _, labels in batches] == [[0, 1]], "a batch of which nothing is left is passed over"
    assert lenient.train.skipped() == 2, "a video counts once"
    for i in (2, 3):
        (folder / f"train{i}.mp4").unlink()
    with pytest.raises(DataError, match=r"not one of 4 samples can be read, the first: .*train0\.mp4: no such"):
        list(make_loader(lenient.train, 2, train=False, workers=workers))


def test_mistakes_in_the_data_section(folder):
    for data, video, message in (
        ({"source": "lists"}, {}, "data.source: 'lists'.*did you mean 'list'"),
        ({"train_split": "tain"}, {}, "no list .*tain.*did you mean 'train.txt'"),
        ({"root": str(folder / "no")}, {}, "data.root"),
        ({"classes": ["a"]}, {}, r"train1\.mp4 has the label 1, but there are 1 classes"),
        ({}, {"template": "img.jpg"}, "video.template"),
        ({}, {"lists": "/nowhere"}, "video.lists"),
    ):
        with pytest.raises(DataError, match=message):
            opened(folder, data=data, video=video)


def test_labels_of_lists_belong_to_names(folder):
    (folder / "classes.txt").write_bytes("\ufeffrun\r\njump\r\n".encode())
    found = opened(folder)
    assert found.classes == ("run", "jump")
    assert found.test.labels == [0, 1]
    for changed in (opened(folder, data={"classes": ["jump", "run"]}), opened(folder, order=["jump", "sit", "run"])):
        assert [changed.classes[label] for label in changed.test.labels] == ["run", "jump"]
    with pytest.raises(DataError, match=r"data\.classes: 'list' also has jump"):
        opened(folder, data={"classes": ["run"]})
    with pytest.raises(DataError, match=r"the split 'train' has the class jump, which is not one"):
        opened(folder, order=["run", "sit"])


def test_files_without_a_list(folder):
    found = find_videos([folder])
    assert [os.path.basename(f) for f in found] == ["test0.mp4", "test1.mp4", *(f"train{i}.mp4" for i in range(4))]
    clips = open_files(found, settings(VideoConfig, frames=4, crops=3), STATS)
    assert clips.clip(0).shape == (3, 3, 4, 16, 16)
    with pytest.raises(DataError, match="holds no video"):
        find_videos([folder.joinpath("empty").mkdir() or folder / "empty"])


# ---- motion clips ----


def test_single_frames_of_all_motions_have_one_distribution():
    """Same draws, same first frame whatever the label; place and angle stay uniform as time goes on."""
    garment = np.zeros((28, 28), np.uint8)
    garment[6:22, 10:14] = 255  # a bar, whose angle shows
    kwargs = {"size": 28, "frames": 6, "speed": 2, "turn": 30.0}
    first = [motion_frames(garment, m, rng=np.random.default_rng(5), **kwargs)[0] for m in range(10)]
    assert all(np.array_equal(f, first[0]) for f in first)
    # Averages over many clips, at a late frame: the same grey level everywhere, for every motion.
    for motion in (1, 6, 8):
        rng = np.random.default_rng(0)
        late = np.mean([motion_frames(garment, motion, rng=rng, **kwargs)[5] for _ in range(3000)], 0)
        assert late.std() / late.mean() < 0.08, MOTIONS[motion]


def test_motions_are_what_their_names_say():
    garment = np.zeros((28, 28), np.uint8)
    garment[4:10, 12:16] = 255
    kwargs = {"size": 28, "frames": 3, "speed": 3, "turn": 90.0}
    steps = {"east": (0, 3), "south-west": (3, -3), "north": (-3, 0), "south-east": (3, 3)}
    for name, (down, right) in steps.items():
        clip = motion_frames(garment, MOTIONS.index(name), rng=np.random.default_rng(1), **kwargs)
        assert np.array_equal(clip[1], np.roll(clip[0], (down, right), (0, 1))), name
    # A quarter turn clockwise takes the picture's top to the right: numpy's rot90 with k = -1.
    clip = motion_frames(garment, MOTIONS.index("clockwise"), rng=_Upright(), **kwargs)
    assert np.abs(clip[1].astype(int) - np.rot90(clip[0], -1)).mean() < 2
    clip = motion_frames(garment, MOTIONS.index("counter-clockwise"), rng=_Upright(), **kwargs)
    assert np.abs(clip[1].astype(int) - np.rot90(clip[0], 1)).mean() < 2


class _Upright:
    """Draws the place (0, 0) and the angle 0."""

    def integers(self, *args, size):
        return np.zeros(size, int)

    def uniform(self, *args):
        return 0.0


def test_motion_files_are_seeded_lossless_and_listed(tmp_path):
    motion = {"train": 12, "test": 10, "size": 28, "frames": 6, "speed": 2, "turn": 30.0, "seed": 1}
    a, b = (make_motion(tmp_path / name, OmegaConf.create(motion)) for name in "ab")
    assert (a / "train" / "00007.mp4").read_bytes() == (b / "train" / "00007.mp4").read_bytes()
    videos = read_list(a / "train.txt")
    assert [v.label for v in videos] == [*range(10), 0, 1]
    assert (a / "classes.txt").read_text().split() == list(MOTIONS)
    rng = np.random.default_rng([1, 0, 7])
    garments = fashion_mnist(str(EXCERPT), "train").images
    garment = garments[rng.integers(len(garments))]
    truth = motion_frames(garment, 7, size=28, frames=6, speed=2, turn=30.0, rng=rng)
    found = read_frames(videos[7].path, range(6))
    assert np.abs(found.astype(int) - truth[..., None]).max() <= 2, "RGB to video levels and back, nothing lost beside"
    with pytest.raises(DataError, match=r"other settings in video\.motion: seed"):
        make_motion(a, OmegaConf.create(motion | {"seed": 2}))
    settings = json.loads((a / "motion.json").read_text())
    assert settings.pop("fashion_mnist") == fashion_digest(None)
    write_text(a / "motion.json", json.dumps(settings))  # as earlier versions wrote it, which knew only the whole set
    with pytest.raises(DataError, match=r"garments of the whole Fashion-MNIST than data\.fashion_mnist=None"):
        make_motion(a, OmegaConf.create(motion))
    assert make_motion(a, OmegaConf.create(motion), FASHION_ROOT) == a, "the garments need not be there any more"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(DataError, match="other things"):
        make_motion(tmp_path / "full", OmegaConf.create(motion))


def test_write_video_takes_colour(tmp_path):
    frames = frames_of(6)
    write_video(tmp_path / "c.mp4", frames)
    found = read_frames(tmp_path / "c.mp4", range(6))
    assert np.abs(found.astype(int) - frames).mean() < 3


def test_clips_keep_what_was_left_out():
    clips = Clips([], [], None, ClipOptions(length=4), left_out=["a"])
    assert clips.left_out == ["a"]
    assert clips.skipped() == 0


def test_damage_in_the_middle_is_named(tmp_path):
    """A file whose table of frames is whole, but not what it points at: the frames around the hole can still be had."""
    path = write(tmp_path / "hole.mp4", frames_of(40), bframes=0)
    truth, content = sequential(path), bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 1500] = bytes(1500)
    path.write_bytes(content)
    timeline = scan(path)
    assert timeline.count == 40
    for i in (0, 39):
        assert np.array_equal(read_frames(path, [i], timeline)[0], truth[i])
    with pytest.raises(DataError, match=r"hole\.mp4: damaged video"):
        read_frames(path, range(40), timeline)
