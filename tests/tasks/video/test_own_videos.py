"""Videos as people have them: turned, in any container, cut off, in folders of frames, in lists of any tool."""

import csv
import json
import shutil
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import vpeft
from tests.support.videos import frames_of, sequential, turned, write
from vpeft.cli import main
from vpeft.engine.config import AugmentConfig, DataConfig, VideoConfig
from vpeft.errors import DataError
from vpeft.tasks.video.data import build_clips, find_videos, open_files
from vpeft.tasks.video.data.decode import read_frames, scan
from vpeft.tasks.video.data.endings import video_endings
from vpeft.tasks.video.data.folders import find_frames, fits, read_folder
from vpeft.tasks.video.data.index import open_index
from vpeft.tasks.video.data.lists import Video, read_hmdb51, read_list

STATS = {
    "input_size": (3, 16, 16), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear",
    "crop_pct": 1.0, "crop_mode": "center",
}  # fmt: skip
EXAMPLE = Path(__file__).parents[3] / "configs" / "examples" / "videos.yaml"


def section(cls, **values):
    return OmegaConf.merge(OmegaConf.structured(cls), values)


def opened(root, data=None, video=None, order=None):
    data = section(DataConfig, **({"source": "list", "root": str(root)} | (data or {})))
    video = section(VideoConfig, **({"frames": 2} | (video or {})))
    return build_clips(data, section(AugmentConfig), video, STATS, order=order)


# ---- how a file says that it is shown ----

SHOWN = {  # a, b, c, d of the matrix, and what numpy makes of a stored picture (H, W, 3)
    "90": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "180": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "270": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "upside down mirrored": ((1, 0, 0, -1), lambda p: p[::-1]),
    "transposed": ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
    "transposed the other way": ((0, -1, -1, 0), lambda p: np.rot90(p, 2).transpose(1, 0, 2)),
    "nothing said": ((0, 0, 0, 0), lambda p: p),
    "scaled": ((0, 2, -2, 0), lambda p: np.rot90(p, -1)),
    "rounded": ((-1e-5, 1, -1, 1e-5), lambda p: np.rot90(p, -1)),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write(tmp_path_factory.mktemp("plain") / "plain.mp4", frames_of(12))


@pytest.mark.parametrize("name", SHOWN)
def test_frames_are_upright(plain, tmp_path, name):
    matrix, shown = SHOWN[name]
    path = turned(plain, tmp_path / "turned.mp4", *matrix)
    truth = np.stack([shown(frame) for frame in sequential(plain)])
    for wanted in (range(12), [7], [3, 3, 1]):
        assert np.array_equal(read_frames(path, wanted), truth[list(wanted)])


def test_training_tests_and_predictions_see_the_same_upright_frames(plain, tmp_path):
    turned(plain, tmp_path / "a.mp4", 0, 1, -1, 0)
    upright = write(tmp_path / "b.mp4", np.rot90(frames_of(12), -1, (1, 2)).copy())
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("a.mp4 0\nb.mp4 1\n")
    data = opened(tmp_path)
    files = open_files([str(tmp_path / "a.mp4"), str(upright)], section(VideoConfig, frames=2), STATS)
    drawn = [(torch.manual_seed(0), data.train[i][0])[1] for i in (0, 1)]
    for a, b in (drawn, (data.test[0][0], data.test[1][0]), (files.clip(0), files.clip(1))):
        assert (a - b).abs().mean() < 0.02, "equal but for the coding"
    assert torch.equal(data.test[0][0], files.clip(0))


def test_other_angles_are_refused_when_the_list_is_opened(plain, tmp_path):
    path = turned(plain, tmp_path / "odd.mp4", 0.7, 0.7, -0.7, 0.7)
    for read in (scan, lambda p: read_frames(p, [0])):
        with pytest.raises(DataError, match=r"odd\.mp4: it is to be shown turned by 45 degrees; multiples of 90"):
            read(path)


# ---- containers ----


@pytest.mark.parametrize(
    ("name", "codec", "extra"),
    [
        ("a.ts", "libx264", {"options": {"x264-params": "open-gop=1:bframes=3:keyint=7:scenecut=0"}}),
        ("a.mpg", "mpeg2video", {"base": 25}),
        ("a.avi", "libx264", {}),  # which stores no times: those after a seek are guesses
        ("a.asf", "libx264", {}),
        ("a.gif", "gif", {"pixels": "rgb8", "bframes": 0}),
        ("a.OGV", "libvpx", {"bframes": 0}),
        ("a.3gp", "mpeg4", {}),
        ("a.h264", "libx264", {}),
        ("a.m4v", "mpeg4", {}),
        ("a.flv", "flv", {"bframes": 0}),
    ],
)
def test_any_container_gives_the_frames_of_sequential_decoding(tmp_path, name, codec, extra):
    path = write(tmp_path / name, frames_of(20), codec=codec, **extra)
    truth, timeline = sequential(path), scan(path)
    assert timeline.count == len(truth) == 20
    for i in range(20):
        assert np.array_equal(read_frames(path, [i], timeline)[0], truth[i]), i
    assert find_videos([tmp_path]) == [str(path)]


@pytest.mark.parametrize("container", ["mkv", "mp4"])
def test_a_copy_of_an_old_avi_whose_times_are_those_of_decoding(tmp_path, container):
    old = write(tmp_path / "old.avi", frames_of(20))
    copy = tmp_path / f"copy.{container}"
    with av.open(str(old)) as source, av.open(str(copy), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.stream = packet.dts, stream
                target.mux(packet)
    truth, timeline = sequential(copy), scan(copy)
    for i in range(len(truth)):
        assert np.array_equal(read_frames(copy, [i], timeline)[0], truth[i]), i


@pytest.mark.parametrize(("start", "frames"), [(0, 40), (3, 40), (6, 40), (7, 10), (20, 5)])
def test_edit_lists_begin_and_end_anywhere(tmp_path, start, frames):
    """An edit list that leaves out frames at both ends, wherever the key frames are."""
    path = write(tmp_path / "a.mp4", frames_of(40))
    data = bytearray(path.read_bytes())
    entry = data.index(b"elst") + 12
    duration, media = struct.unpack(">Ii", data[entry : entry + 8])
    whole = sequential(path)
    (packet,) = {round(p.duration) for p in _packets(path)}
    left = min(frames, 40 - start)
    data[entry : entry + 8] = struct.pack(">Ii", duration * left // 40, media + start * packet)
    path.write_bytes(data)
    truth, timeline = sequential(path), scan(path)
    assert timeline.count == len(truth) == left
    assert np.array_equal(truth, whole[start : start + left])
    for i in range(left):
        assert np.array_equal(read_frames(path, [i], timeline)[0], truth[i]), i


def test_recordings_put_into_one_file(tmp_path):
    """Times begin anew in the middle, at other ones than those of the first part."""
    path = tmp_path / "both.ts"
    parts = [
        write(tmp_path / f"{i}.ts", frames_of(50, seed=i), bframes=2 * i, times=[(41 + 12 * i) * t for t in range(50)])
        for i in (0, 1)
    ]
    path.write_bytes(b"".join(p.read_bytes() for p in parts))
    truth, timeline = sequential(path), scan(path)
    assert timeline.count == len(truth) == 100
    for i in (0, 1, 30, 49, 50, 51, 77, 99):
        assert np.array_equal(read_frames(path, [i], timeline)[0], truth[i]), i


def test_only_what_may_be_wrong_is_decoded_whole(plain, tmp_path, monkeypatch):
    from vpeft.tasks.video.data import decode

    seen, real = [], decode._watched
    monkeypatch.setattr(decode, "_watched", lambda path: seen.append(path.suffix) or real(path))
    for ending, bframes in (("mp4", 2), ("mkv", 2), ("ts", 2), ("nut", 0)):
        assert scan(write(tmp_path / f"a.{ending}", frames_of(20), bframes=bframes)).start is not None
    assert seen == [".nut"]


def _packets(path):
    with av.open(str(path)) as container:
        return [p for p in container.demux(video=0) if p.size]


def test_one_frame_is_a_video(tmp_path):
    for name, codec in (("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.webm", "libvpx-vp9")):
        path = write(tmp_path / name, frames_of(1), codec=codec, bframes=0)
        assert scan(path).count == 1
        assert open_files([str(path)], section(VideoConfig, frames=4, views=2), STATS).clip(0).shape == (2, 3, 4, 16, 16)


def test_a_file_that_is_cut_off_is_named(tmp_path):
    from vpeft.tasks.video.motion import write_video

    whole = tmp_path / "whole.mp4"
    write_video(tmp_path / "plain.mp4", frames_of(40))
    with (
        av.open(str(tmp_path / "plain.mp4")) as source,
        av.open(str(whole), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert scan(whole).count == 40
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    with pytest.raises(DataError, match=r"cut\.mp4: the file is cut off: \d+ of its 40 frames are missing"):
        scan(cut)


def test_a_cover_is_no_video(tmp_path):
    """Pictures that go with the film or the song are passed over."""
    from av.stream import Disposition

    frames = frames_of(6)
    for name, moving in (("film.mp4", True), ("song.m4a", False)):
        with av.open(str(tmp_path / name), "w", format="mp4") as container:
            cover = container.add_stream("mjpeg", rate=1)
            cover.height, cover.width, cover.pix_fmt, cover.disposition = 48, 64, "yuvj420p", Disposition.attached_pic
            film = container.add_stream("libx264", rate=25) if moving else container.add_stream("aac", rate=8000)
            if moving:
                film.height, film.width, film.pix_fmt = 48, 64, "yuv420p"
            container.mux(cover.encode(av.VideoFrame.from_ndarray(frames[0], "rgb24").reformat(format="yuvj420p")))
            container.mux(cover.encode(None))
            for frame in frames if moving else ():
                container.mux(film.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            container.mux(film.encode(None))
    assert scan(tmp_path / "film.mp4").count == 6
    with pytest.raises(DataError, match=r"song\.m4a: the file has no picture stream"):
        scan(tmp_path / "song.m4a")


def test_endings_are_those_of_moving_pictures():
    endings = video_endings()
    wanted = [
        "mp4",
        "m4v",
        "mov",
        "avi",
        "mkv",
        "webm",
        "mpg",
        "mpeg",
        "ts",
        "mts",
        "m2ts",
        "3gp",
        "3g2",
        "ogv",
        "gif",
        "flv",
        "wmv",
        "asf",
        "vob",
        "mxf",
        "y4m",
    ]
    assert {f".{e}" for e in wanted} <= set(endings)
    unwanted = [
        "png",
        "jpg",
        "tif",
        "bmp",
        "webp",
        "avif",
        "mp3",
        "m4a",
        "wma",
        "flac",
        "wav",
        "txt",
        "srt",
        "json",
        "m3u8",
        "py",
    ]
    assert not {f".{e}" for e in unwanted} & set(endings)


def test_what_is_no_video_in_a_folder_is_said(plain, tmp_path, caplog):
    (tmp_path / "b").mkdir()
    for name in ("b/2.MP4", "1.mp4"):
        (tmp_path / name).write_bytes(plain.read_bytes())
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".DS_Store").write_text("x")
    assert find_videos([tmp_path]) == [str(tmp_path / "1.mp4"), str(tmp_path / "b" / "2.MP4")]
    assert f"{tmp_path}: left out, as no videos: notes.txt" in caplog.text
    assert "DS_Store" not in caplog.text


# ---- folders of frames ----


@pytest.fixture
def frames(tmp_path):
    """Makes a folder of frames with these names; frame i is a picture of the grey i + 1."""

    def make(*names, folder="v", size=(8, 6)):
        (tmp_path / folder).mkdir(exist_ok=True, parents=True)
        for grey, name in enumerate(names, 1):
            kind = "PNG" if name.lower().endswith("png") else "BMP"
            Image.new("RGB", size, (grey,) * 3).save(tmp_path / folder / name, format=kind)
        return tmp_path / folder

    return make


def greys(folder, template, wanted):
    return read_folder(folder, template, wanted)[:, 0, 0, 0].tolist()


def test_numbers_begin_anywhere_and_are_padded_anyhow(frames):
    folder = frames("img_98.bmp", "img_0099.bmp", "img_100.BMP", "img_00101.bmp")
    (folder / "notes.txt").write_text("x")
    (folder / "img_first.bmp").write_text("x")
    assert find_frames(folder, "img_{:05d}.bmp").first == 98
    assert greys(folder, "img_{:05d}.bmp", [0, 3, 1, 1]) == [1, 4, 2, 2]
    with pytest.raises(DataError, match=r"frames \[4\] asked for, but the video has 4"):
        read_folder(folder, "img_{:05d}.bmp", [4])
    inner = frames("0.png", "1.png", folder="w/frames")
    assert greys(inner.parent, "frames/{}.png", [1]) == [2]


def test_gaps_and_doubles_are_refused_by_name(frames, tmp_path):
    folder = frames("f7.png", "f8.png", "f10.png")
    with pytest.raises(DataError, match=r"v: f009\.png is missing between f7\.png and f10\.png: a gap"):
        find_frames(folder, "f{:03d}.png")
    frames("f009.bmp")
    with pytest.raises(DataError, match=r"f009\.png is missing .*f009\.bmp has another ending"):
        find_frames(folder, "f{:03d}.png")
    frames("f9.png", "f09.png")
    with pytest.raises(DataError, match=r"v: f09\.png and f9\.png are one frame"):
        find_frames(folder, "f{:03d}.png")
    with pytest.raises(
        DataError, match=r"v: no frame has a name such as img_1\.png .*it holds f009\.bmp, f09\.png, f10\.png and"
    ):
        find_frames(folder, "img_{}.png")
    with pytest.raises(DataError, match="no such folder of frames"):
        find_frames(tmp_path / "none", "f{:03d}.png")


def test_frames_of_two_sizes_are_named(frames):
    folder = frames("1.png", "2.png")
    Image.new("RGB", (5, 9)).save(folder / "3.png")
    assert read_folder(folder, "{}.png", [0, 1]).shape == (2, 6, 8, 3)
    with pytest.raises(DataError, match=r"v: the picture size changes .*: 1\.png is 8x6, 3\.png is 5x9"):
        read_folder(folder, "{}.png", [0, 1, 2])


@pytest.mark.parametrize(
    ("template", "good"),
    [("{}.jpg", True), ("img_{0:05d}.jpg", True), ("a/{:d}.png", True), ("{:5d}.png", True), ("{{{:d}}}.png", True),
     ("img.jpg", False), ("{:x}.jpg", False), ("{}_{}.jpg", False), ("{0}_{0}.jpg", False), ("{name}.jpg", False),
     ("img_%05d.jpg", False), ("{:,}.jpg", False), ("{", False)],
)  # fmt: skip
def test_templates(template, good):
    assert fits(template) == good


def test_lists_and_predictions_treat_folders_alike(frames, tmp_path, caplog):
    video = {"template": "{:03d}.png", "frames": 2}
    frames("005.png", "006.png", "007.png", "008.png", folder="a")
    frames("000.png", "001.png", folder="sub/b")
    frames("x.png", folder="other")
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("a 3 0\nsub/b 1\n")
    found = find_videos([tmp_path], video["template"])
    assert found == [str(tmp_path / "a"), str(tmp_path / "sub" / "b")]
    assert f"{tmp_path}: left out, as no videos: ." in caplog.text or "other" in caplog.text
    data = opened(tmp_path, video=video)
    assert [t.count for t in data.test.timelines] == [3, 2], "the list's first three; all that are there"
    files = open_files(found, section(VideoConfig, **video), STATS)
    assert torch.equal(data.test[1][0], files.clip(1))
    frames("010.png", folder="a")  # a gap, which the stored counts must not hide
    for read in (lambda: opened(tmp_path, video=video), lambda: files.subset([0], timelines=[None]).clip(0)):
        with pytest.raises(DataError, match=r"a: 009\.png is missing"):
            read()
    with pytest.raises(DataError, match=r"train\.txt is a file; the model was trained on folders of frames"):
        find_videos([tmp_path / "train.txt"], video["template"])
    with pytest.raises(DataError, match=r"holds no folder of frames named img_\{\}\.png"):
        find_videos([tmp_path], "img_{}.png")


def test_counts_of_folders_are_kept_and_follow_them(frames, tmp_path, monkeypatch):
    from vpeft.tasks.video.data import index

    seen, real = [], index.scan_folder
    monkeypatch.setattr(index, "scan_folder", lambda *given: seen.append(given) or real(*given))
    folder = frames("1.png", "2.png")
    videos = [Video(str(folder), 0)]
    for template, count, scans in (("{}.png", 2, 1), ("{}.png", 2, 1), ("{:d}.png", 2, 2), ("{:d}.png", 2, 2)):
        assert open_index(videos, tmp_path / "i.json", template=template)[0][0].count == count
        assert len(seen) == scans
    frames("1.png", "2.png", "3.png")
    assert open_index(videos, tmp_path / "i.json", template="{:d}.png")[0][0].count == 3


# ---- lists ----


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbfa.mp4,0\r\nb c.mp4,1\r\n",
        "﻿a.mp4,0\nb c.mp4,1".encode("utf-16-le"),
        b'"a.mp4",0\n"b c.mp4",1\n',
        b'path,label\n"a.mp4","0"\n\n# note\n"b c.mp4","1"\n',
        b"a.mp4 0\rb c.mp4 1\r",
        b"a.mp4\t0\nb c.mp4\t1\n",
        b"a.mp4;0\nb c.mp4;1\n",
        b"./a.mp4 0\nb c.mp4 1\n",
    ],
)
def test_lists_of_any_tool(tmp_path, data):
    (tmp_path / "l.csv").write_bytes(data)
    assert read_list(tmp_path / "l.csv") == [Video(str(tmp_path / "a.mp4"), 0), Video(str(tmp_path / "b c.mp4"), 1)]


def test_latin_letters_and_quotes_in_paths(tmp_path):
    (tmp_path / "l.txt").write_bytes("caf\xe9.mp4 0\n".encode("latin-1"))
    assert read_list(tmp_path / "l.txt")[0].path == str(tmp_path / "café.mp4")
    (tmp_path / "l.txt").write_text('"say ""hi"", twice.mp4",3\n"#1.mp4",3\n')
    assert [v.path for v in read_list(tmp_path / "l.txt")] == [
        str(tmp_path / 'say "hi", twice.mp4'),
        str(tmp_path / "#1.mp4"),
    ]


def test_labels_are_names_or_numbers(tmp_path):
    file = tmp_path / "l.csv"
    file.write_text("a b.mp4,wave a hand\nc.mp4,run\n")
    assert [v.label for v in read_list(file)] == ["wave a hand", "run"]
    file.write_text("a,12,wave\nb,7,run\n")
    assert [(v.frames, v.label) for v in read_list(file, folders=True)] == [(12, "wave"), (7, "run")]
    for text, message in (
        ("a.mp4,0\nb.mp4,run\n", r"line 2: the label 'run' and the label '0' of line 1"),
        ("a.mp4,0\nb.mp4,1\na.mp4,1\n", r"line 3: .*a\.mp4 has the label '1', and '0' in line 1"),
        ("a.mp4\n", "line 1: expected 'path label'"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_list(file)


def test_lines_that_repeat_are_said(tmp_path, caplog):
    (tmp_path / "l.csv").write_text("a.mp4,0\nb.mp4,1\na.mp4,0\n")
    assert len(read_list(tmp_path / "l.csv")) == 3
    assert "1 lines repeat a video" in caplog.text


def test_names_of_hmdb51_begin_with_a_hash(tmp_path):
    (tmp_path / "ride_test_split1.txt").write_bytes(b"\xef\xbb\xbf#437_a ride.avi 1 \r\nb.avi 1\r\n")
    videos, _ = read_hmdb51(tmp_path, "/v", "train")
    assert [v.path for v in videos] == ["/v/ride/#437_a ride.avi", "/v/ride/b.avi"]
    with pytest.raises(DataError, match="fold 1 names no video of the split test"):
        read_hmdb51(tmp_path, "/v", "test")


# ---- labels belong to names ----


@pytest.fixture
def tree(plain, tmp_path):
    """Makes ROOT/<split>/<class>/<video>, or lists with names."""

    def make(**splits):
        for split, classes in splits.items():
            for name in classes:
                (tmp_path / split / name).mkdir(parents=True)
                (tmp_path / split / name / "v.mp4").write_bytes(plain.read_bytes())
            (tmp_path / f"{split}.txt").write_text("".join(f"{split}/{n}/v.mp4,{n}\n" for n in reversed(classes)))
        return tmp_path

    return make


@pytest.mark.parametrize("source", ["folder", "list"])
def test_the_training_splits_names_are_the_classes(tree, source):
    root = tree(train=["circle", "square", "stripes"], test=["square", "stripes"])
    data = opened(root, {"source": source})
    assert data.classes == ("circle", "square", "stripes")
    assert sorted(data.test.labels) == [1, 2]
    data = opened(root, {"source": source, "classes": ["stripes", "circle", "square"]})
    assert sorted(data.test.labels) == [0, 2], "data.classes gives the order, names decide"
    for classes, message in (
        (["stripes", "circle"], f"data.classes: '{source}' also has square"),
        (["stripes", "circle", "square", "dots"], f"data.classes: '{source}' has no class dots"),
        (["stripes", "circle", "sqare"], f"'{source}' has no class sqare; did you mean 'square'"),
    ):
        with pytest.raises(DataError, match=message):
            opened(root, {"source": source, "classes": classes})


@pytest.mark.parametrize("source", ["folder", "list"])
def test_a_class_that_training_lacks_is_named(tree, source):
    root = tree(train=["circle", "square"], test=["squares"])
    with pytest.raises(
        DataError, match=r"the split 'test' has the class squares, which is not one of the 2 .*mean 'square'"
    ):
        opened(root, {"source": source})


def test_numbers_follow_the_names_beside_the_list(tree):
    root = tree(train=["a", "b"], test=["a", "b"])
    for split in ("train", "test"):
        (root / f"{split}.txt").write_text(f"{split}/a/v.mp4 0\n{split}/b/v.mp4 1\n")
    assert opened(root).classes == ("0", "1")
    (root / "classes.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert opened(root).classes == ("a", "b")
    data = opened(root, {"classes": ["b", "a"]})
    assert (data.classes, data.test.labels) == (("b", "a"), [1, 0])
    (root / "classes.txt").unlink()
    (root / "test.txt").write_text("test/a/v.mp4 a\n")
    with pytest.raises(DataError, match=r"data\.train_split: its labels are numbers, but another split's are names"):
        opened(root)


def test_folders_that_are_no_classes(tree, plain):
    root = tree(train=["a", "b"], test=["a", "b"])
    (root / "train" / "stray.mp4").write_bytes(plain.read_bytes())
    with pytest.raises(DataError, match=r"stray\.mp4 lies beside the folders of the classes"):
        opened(root, {"source": "folder"})
    (root / "train" / "stray.mp4").unlink()
    (root / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="1 folders of classes hold no video: empty"):
        opened(root, {"source": "folder"})
    with pytest.raises(DataError, match=r"data\.train_split: '.*trian' does not exist; did you mean 'train'"):
        opened(root, {"source": "folder", "train_split": "trian"})


def test_a_test_split_may_lack_videos_of_a_class(tree):
    root = tree(train=["a", "b", "c"], test=["b", "c"])
    (root / "test" / "a").mkdir()
    data = opened(root, {"source": "folder"})
    assert (data.classes, data.test.labels) == (("a", "b", "c"), [1, 2])
    assert data.test.sample_name(0) == str(root / "test/b/v.mp4")
    (root / "test" / "d").symlink_to("/nowhere/d")
    with pytest.raises(DataError, match=r"test/d is a link that leads nowhere"):
        opened(root, {"source": "folder"})


def test_numbers_that_training_lacks_are_refused(tree):
    root = tree(train=["a", "b"], test=["a", "b"])
    (root / "train.txt").write_text("train/a/v.mp4 0\ntrain/b/v.mp4 1\n")
    (root / "test.txt").write_text("test/a/v.mp4 1\ntest/b/v.mp4 2\n")
    with pytest.raises(DataError, match=r"test/b/v\.mp4 has the label 2, but there are 2 classes"):
        opened(root)
    assert opened(root, {"num_classes": 3}).classes == ("0", "1", "2")
    (root / "test.txt").write_text("test/b/v.mp4,b\n")
    data = opened(root, {"classes": ["a", "b"]})
    assert (data.classes, data.test.labels) == (("a", "b"), [1])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry: entry.pop("count"),
        lambda entry: entry.update(steps=[[1]]),
        lambda entry: entry.update(count="9"),
        lambda entry: (entry.clear(), entry.update(stamp=None, error="no decoder")),
    ],
)
def test_a_damaged_index_is_made_anew(tree, spoil):
    """And what could not be read once is looked at again, although the file is the same."""
    root = tree(train=["a"], test=["a"])
    before = opened(root).test.timelines
    file = root / "test.txt.frames.json"
    stored = json.loads(file.read_text())
    stamp = stored["videos"][str(root / "test/a/v.mp4")]["stamp"]
    spoil(stored["videos"][str(root / "test/a/v.mp4")])
    stored["videos"][str(root / "test/a/v.mp4")]["stamp"] = stamp
    for text in (json.dumps(stored), json.dumps(stored | {"videos": []}), json.dumps(stored | {"videos": {str(root): 3}})):
        file.write_text(text)
        assert opened(root).test.timelines == before
        assert json.loads(file.read_text())["videos"][str(root / "test/a/v.mp4")]["count"] == before[0].count


def test_numbers_are_no_order_of_a_checkpoints_names(tree):
    """A list of numbers beside a checkpoint of names: which is which, nothing says."""
    root = tree(test=["a", "b"])
    (root / "test.txt").write_text("test/a/v.mp4 1\ntest/b/v.mp4 0\n")
    alone = {"train_split": "", "test_split": "test"}
    with pytest.raises(DataError, match=r"data\.test_split: its labels are numbers, but the checkpoint's are names"):
        opened(root, alone, order=("a", "b"))
    assert opened(root, alone, order=("0", "1")).test.labels == [1, 0]
    assert opened(root, alone | {"classes": ["b", "a"]}, order=("a", "b")).test.labels == [0, 1]


# ---- the example ----


def test_the_example_trains_tests_and_predicts(tmp_path, capsys, monkeypatch):
    """``configs/examples/videos.yaml`` as a new user starts it, on tiny videos in folders of classes."""
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("brighter", "darker")):
            folder = tmp_path / "videos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                ramp = np.linspace(40, 200, 10)[:: 1 - 2 * label].astype(np.uint8)
                write(folder / f"{i}.mp4", np.broadcast_to(ramp[:, None, None, None], (10, 32, 48, 3)).copy() + np.uint8(i))
    small = ["model.name=vit_micro_patch4_28.vpeft_fashion", "train.epochs=1", "data.root=videos"]
    main(["train", "--cfg", str(EXAMPLE), *small])
    metrics = json.loads(Path("runs/videos/metrics.json").read_text())
    best = "runs/videos/best.safetensors"
    capsys.readouterr()
    shutil.rmtree("videos/train")  # which a test has no need of
    main(["test", "--cfg", str(EXAMPLE), "--ckpt", best, *small])
    assert json.loads(capsys.readouterr().out)["test_top1"] == pytest.approx(metrics["test_top1"])
    main(["predict", "--ckpt", best, "videos/test", "--save", "found.csv"])
    rows = list(csv.DictReader(Path("found.csv").read_text().splitlines()))
    assert [r["file"] for r in rows] == [f"videos/test/{c}/{i}.mp4" for c in ("brighter", "darker") for i in (0, 1)]
    right = sum(Path(r["file"]).parent.name == r["class_1"] for r in rows)
    assert 25 * right == pytest.approx(metrics["test_top1"])
    # One broken video: the run ends with its path, after what came before; or it is left out and counted.
    Path("videos/test/darker/0.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit):
        main(["predict", "--ckpt", best, "videos/test", "--json", "found.json"])
    assert "darker/0.mp4: not a readable video" in capsys.readouterr().err
    assert len(json.loads(Path("found.json").read_text())) == 2
    main(["predict", "--ckpt", best, "videos/test", "--skip-broken", "--json", "found.json"])
    assert "3 of 4 files predicted, 1 left out" in capsys.readouterr().err
    assert len(json.loads(Path("found.json").read_text())) == 3
    with pytest.raises(vpeft.ConfigError, match="--out"):
        vpeft.engine.predict.predict(best, ["videos/test"], out="pictures")
