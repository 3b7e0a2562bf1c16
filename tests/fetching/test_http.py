"""Files over http from a server that misbehaves: nothing half-written is used, and nothing is sent twice."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import vpeft
from tests.support.models import images, make
from tests.support.servers import Served, Server, serving
from vpeft import checkpoint
from vpeft.errors import CheckpointError, DownloadError, WriteError
from vpeft.fetching import http, local_file, places, progress


def kept(cache: Path) -> list[str]:
    """The files of the cache but locks and notes."""
    return sorted(p.name for p in cache.rglob("*") if p.is_file() and p.suffix not in (".lock", ".json"))


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- what works ----


def test_a_url_stands_where_a_checkpoint_is_taken(adapter):
    with serving(a=Served(adapter)) as server:
        model = make("vit")
        handle = vpeft.load(model, f"{server.url}/a.safetensors?download=true")
        assert handle.name == "lora"
        assert checkpoint.read(f"{server.url}/a.safetensors?download=true").metadata["method"]["name"] == "lora"
    assert server.sent == len(adapter)
    assert server.statuses == [200, 304]


@pytest.mark.parametrize("validator", [{}, {"etag": "", "modified": "Mon, 02 Nov 2026 10:00:00 GMT"}])
def test_a_cut_download_goes_on_where_it_stopped(adapter, validator):
    with serving(a=Served(adapter, cuts=[4000, 3000], **validator)) as server:
        path = local_file(f"{server.url}/a.safetensors")
        assert path.read_bytes() == adapter
    assert server.statuses == [200, 206, 206]
    assert [answer.headers.get("Range") for answer in server.log] == [None, "bytes=4000-", "bytes=7000-"]
    assert server.sent == len(adapter), "no byte twice"


def test_without_a_validator_only_a_checksum_lets_a_download_go_on(adapter, cache):
    with serving(a=Served(adapter, etag="", cuts=[4000])) as server:
        assert local_file(f"{server.url}/a.safetensors").read_bytes() == adapter
        assert server.statuses == [200, 200]
    with serving(a=Served(adapter, etag="", cuts=[4000])) as server:
        assert local_file(f"{server.url}/a.safetensors#sha256={sha(adapter)}").read_bytes() == adapter
        assert server.statuses == [200, 206]


def test_a_weak_tag_is_no_reason_to_go_on(adapter):
    with serving(a=Served(adapter, etag='W/"1"', cuts=[4000])) as server:
        assert local_file(f"{server.url}/a.safetensors").read_bytes() == adapter
        assert server.statuses == [200, 200]


def test_a_refused_range_begins_again(adapter):
    with serving(a=Served(adapter, cuts=[4000], ranges=False)) as server:
        assert local_file(f"{server.url}/a.safetensors").read_bytes() == adapter
    assert server.statuses == [200, 200]
    assert server.sent == 4000 + len(adapter)


def test_a_later_process_goes_on_with_what_an_earlier_one_has(adapter, cache):
    url = "/a.safetensors"
    with serving(a=Served(adapter, cuts=[5000, 0, 0, 0, 0])) as server:
        address = server.url + url
        with pytest.raises(DownloadError, match=r"5000 bytes are kept for the next time"):
            local_file(address)
        assert kept(cache) == ["a.safetensors.part"]
        server.paths[url].cuts.clear()
        assert local_file(address).read_bytes() == adapter
    assert server.sent == len(adapter)
    assert kept(cache) == ["a.safetensors"]


def test_a_part_of_another_version_is_not_mixed_with_this_one(adapter):
    other = bytes(reversed(adapter))
    with serving(a=Served(other, cuts=[5000, 0, 0, 0, 0])) as server:
        address = f"{server.url}/a.safetensors"
        with pytest.raises(DownloadError):
            local_file(address)
        server.paths["/a.safetensors"] = Served(adapter)
        assert local_file(address).read_bytes() == adapter
        assert server.log[-1].headers["If-Range"]


@pytest.mark.parametrize(
    ("old", "new", "longer"),
    [
        ({}, {}, b""),
        (
            {"etag": "", "modified": "Mon, 02 Nov 2026 10:00:00 GMT"},
            {"etag": "", "modified": "Tue, 03 Nov 2026 10:00:00 GMT"},
            b"",
        ),
        ({}, {"etag": ""}, b"."),
    ],
    ids=["tag", "date", "length"],
)
def test_halves_of_two_versions_are_not_joined_where_the_server_ignores_if_range(tmp_path, old, new, longer):
    first, second = b"a" * 9000, b"b" * 9000 + longer
    with serving(a=Served(first, cuts=[5000, 0, 0, 0, 0], **old)) as server:
        address = f"{server.url}/a.safetensors"
        with pytest.raises(DownloadError, match="5000 bytes are kept"):
            http.fetch(address, check=Path.stat)
        server.paths["/a.safetensors"] = Served(second, conditions=False, **new)
        assert http.fetch(address, check=Path.stat).read_bytes() == second
    assert server.statuses[-2:] == [206, 200]


def test_a_part_that_repeats_no_tag_is_gone_on_from_all_the_same(cache):
    """A 206 may leave out what the first answer said; the tag is kept for the next attempt."""
    body = bytes(range(250)) * 40
    with serving(a=Served(body, cuts=[4000, 0, 0, 0, 0])) as server:
        with pytest.raises(DownloadError):
            http.fetch(f"{server.url}/a.safetensors", check=Path.stat)
        tag = server.paths["/a.safetensors"].tag
        server.paths["/a.safetensors"] = Served(body, etag="", conditions=False, cuts=[1000])
        assert http.fetch(f"{server.url}/a.safetensors", check=Path.stat).read_bytes() == body
    assert [answer.headers["If-Range"] for answer in server.log[-2:]] == [tag, tag]
    assert server.sent == len(body)


@pytest.mark.parametrize("length", [True, False])
def test_a_bound_holds_while_it_is_downloaded(cache, length):
    with serving(a=Served(b" " * 2**22, length=length, block=2**12)) as server:
        with pytest.raises(DownloadError, match=r"(at most|more than) 10000"):
            http.fetch(f"{server.url}/a.safetensors", check=Path.stat, most=10_000)
        assert kept(cache) == []


def test_halves_of_two_versions_without_validators_are_had_again(adapter):
    other = bytes(reversed(adapter))
    with serving(a=Served(other, etag="", cuts=[5000, 0, 0, 0, 0])) as server:
        address = f"{server.url}/a.safetensors#sha256={sha(adapter)}"
        with pytest.raises(DownloadError):
            local_file(address)
        server.paths["/a.safetensors"] = Served(adapter, etag="")
        assert local_file(address).read_bytes() == adapter
        assert server.statuses[-2:] == [206, 200]


def test_a_whole_part_needs_no_further_byte(adapter, cache):
    """A process was killed between the last byte and the end."""
    with serving(a=Served(adapter)) as server:
        address = f"{server.url}/a.safetensors"
        path = local_file(address)
        seen = json.loads(path.with_name("a.safetensors.json").read_text())
        path.rename(path.with_name("a.safetensors.part"))
        path.with_name("a.safetensors.part.json").write_text(json.dumps({**seen, "sha256": ""}))
        assert local_file(address).read_bytes() == adapter
    assert server.sent == len(adapter)


def test_a_slow_server_is_waited_for(adapter, monkeypatch):
    monkeypatch.setenv("VPEFT_TIMEOUT", "0.5")
    with serving(a=Served(adapter, block=len(adapter) // 8, pause=0.1)) as server:
        started = time.perf_counter()
        assert local_file(f"{server.url}/a.safetensors").read_bytes() == adapter
        assert time.perf_counter() - started > 0.5, "longer in all than the timeout for one byte"
    assert server.statuses == [200]


def test_a_server_that_says_nothing_is_given_up(adapter, monkeypatch):
    monkeypatch.setenv("VPEFT_TIMEOUT", "0.1")
    with serving(a=Served(adapter, etag="", block=1000, pause=2.0)) as server:
        started = time.perf_counter()
        with pytest.raises(DownloadError, match="timed out"):
            local_file(f"{server.url}/a.safetensors")
        assert time.perf_counter() - started < 2


@pytest.mark.parametrize(("smallest", "terminal"), [(0, True), (10**9, True), (0, False)])
def test_a_bar_for_what_is_large_on_a_terminal(adapter, monkeypatch, smallest, terminal):
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setattr(progress, "SMALLEST", smallest)
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    with serving(a=Served(adapter, block=4000, pause=0.05)) as server:
        local_file(f"{server.url}/a.safetensors")
    shown = screen.getvalue()
    assert bool(shown) == (terminal and not smallest)
    assert not shown or ("a.safetensors" in shown and "kB" in shown)


def test_an_unknown_length_is_no_obstacle(adapter):
    with serving(a=Served(adapter, length=False)) as server:
        assert local_file(f"{server.url}/a.safetensors").read_bytes() == adapter


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed(adapter, code):
    with serving(a=Served(to="/b.safetensors", code=code), b=Served(adapter, cuts=[4000])) as server:
        assert local_file(f"{server.url}/a.safetensors").read_bytes() == adapter
    assert server.sent == len(adapter), "a range goes along"


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_server_in_trouble_is_asked_again(adapter, status):
    with serving(a=Served(adapter, statuses=[status, status])) as server:
        assert local_file(f"{server.url}/a.safetensors").read_bytes() == adapter
    assert server.statuses == [status, status, 200]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("served", "message"),
    [
        (Served(statuses=[404] * 9), "404"),
        (Served(statuses=[403] * 9), "403"),
        (Served(statuses=[410] * 9), "410"),
        (Served(statuses=[503] * 9), "503"),
        (Served(to="/a.safetensors"), "redirected without end"),
        (Served(to="file:///etc/passwd"), "to nowhere"),
        (Served(to="ftp://127.0.0.1/x"), "leads to ftp://"),
        (Served(b"<html>log in</html>"), "no safetensors file"),
        (Served(b"\x80\x04\x95"), "no safetensors file"),
        (Served(b""), "no safetensors file"),
        (Served(b"x" * 100, headers={"Content-Encoding": "gzip"}), "gzip"),
    ],
    ids=["404", "403", "410", "503", "circle", "to a file", "to ftp", "a page", "a pickle", "nothing", "packed"],
)
def test_what_is_no_file_is_refused_and_leaves_nothing(served, message, cache):
    with serving(a=served) as server:
        address = f"{server.url}/a.safetensors"
        with pytest.raises(DownloadError, match=message) as error:
            local_file(address)
        assert address in str(error.value)
        assert "\n" not in str(error.value)
    assert kept(cache) == []


def test_a_truncated_file_is_never_used(adapter, cache):
    with serving(a=Served(adapter, cuts=[5000] * 9, ranges=False)) as server:
        with pytest.raises(DownloadError, match=f"5000 of {len(adapter)} bytes"):
            local_file(f"{server.url}/a.safetensors")
        assert len(server.log) <= 1 + http.STALLS
    assert "a.safetensors" not in kept(cache)


def test_a_truncated_file_of_unknown_length_is_never_used(adapter, cache):
    served = Served(adapter, cuts=[5000] * 9, length=False)
    with serving(a=served) as server, pytest.raises(DownloadError, match="damaged or no safetensors"):
        local_file(f"{server.url}/a.safetensors")
    assert kept(cache) == []


def test_a_wrong_checksum_is_refused_and_leaves_nothing(adapter, cache):
    wrong = f"wrong checksum.*{sha(adapter)}.*{'0' * 64}"
    with serving(a=Served(adapter)) as server, pytest.raises(DownloadError, match=wrong):
        local_file(f"{server.url}/a.safetensors#sha256={'0' * 64}")
    assert kept(cache) == []
    assert server.statuses == [200], "and is not had again"


def test_a_changed_bit_is_refused_where_the_checkpoint_says_so(adapter, cache):
    changed = bytearray(adapter)
    changed[-1] ^= 1
    with serving(a=Served(bytes(changed))) as server:
        address = f"{server.url}/a.safetensors"
        with pytest.raises(CheckpointError, match="damaged") as error:
            vpeft.load(make("vit"), address)
        assert address in str(error.value)


@pytest.mark.parametrize(
    "source",
    [
        "http://user:hunter2@127.0.0.1/a.safetensors", "ftp://user:hunter2@127.0.0.1/a.safetensors",
        "http://user:hunter2@127.0.0.1/a.safetensors#md5=1", "http://user:hunter2@127.0.0.1/a.pt", "http:///a.safetensors", "http://127.0.0.1:99999/a.safetensors",
        "http://127.0.0.1/a b.safetensors", "http://127.0.0.1/ä.safetensors", "http://127.0.0.1/a.safetensors#md5=1",
        "http://127.0.0.1/a.safetensors\r\nX: y", "http://[::1/a.safetensors", "http://127.0.0.1/a.bin",
        "http://127.0.0.1/a.pt?x=.safetensors", "http://127.0.0.1/", "ftp://127.0.0.1/a.safetensors",
        "file:///etc/a.safetensors", "s3://bucket/a.safetensors",
    ],
)  # fmt: skip
def test_what_is_no_address_of_an_adapter_is_refused_without_the_network(source, cache):
    with pytest.raises(DownloadError) as error:
        local_file(source)
    assert "hunter2" not in str(error.value)
    assert not cache.exists()


def test_a_server_that_is_not_there(cache):
    with Server() as server:
        pass
    with pytest.raises(DownloadError, match="refused"):
        local_file(f"{server.url}/a.safetensors")


@pytest.mark.parametrize("value", ["", "0", "-1", "nan", "inf", "soon"])
def test_a_timeout_that_is_none(value, monkeypatch):
    monkeypatch.setenv("VPEFT_TIMEOUT", value)
    with pytest.raises(DownloadError, match="VPEFT_TIMEOUT"):
        places.timeout()


# ---- the cache ----


def test_a_warm_cache_serves_offline(adapter, monkeypatch, caplog):
    with serving(a=Served(adapter)) as server:
        address = f"{server.url}/a.safetensors"
        first = local_file(address)
    assert local_file(address) == first  # the server is gone
    assert "the copy in the cache is taken" in caplog.text
    monkeypatch.setenv("VPEFT_OFFLINE", "1")
    assert local_file(address) == first
    with pytest.raises(DownloadError, match="network is off"):
        local_file(f"{server.url}/b.safetensors")


def test_a_known_checksum_needs_no_server(adapter, caplog):
    with serving(a=Served(adapter)) as server:
        address = f"{server.url}/a.safetensors#sha256={sha(adapter)}"
        first = local_file(address)
        assert local_file(address) == first
        assert len(server.log) == 1
    assert local_file(address) == first
    assert not caplog.text


def test_a_changed_file_on_the_server_is_had_again(adapter):
    with serving(a=Served(adapter)) as server:
        address = f"{server.url}/a.safetensors"
        local_file(address)
        model = make("vit")
        other = vpeft.attach(model, "bitfit").save(local_file(address).parent / "other.safetensors").read_bytes()
        server.paths["/a.safetensors"].body = other
        assert local_file(address).read_bytes() == other


@pytest.mark.parametrize("damage", ["cut", "bit", "note"])
def test_a_damaged_cache_is_had_again(adapter, damage):
    with serving(a=Served(adapter)) as server:
        address = f"{server.url}/a.safetensors"
        path = local_file(address)
        if damage == "cut":
            path.write_bytes(adapter[:5000])
        elif damage == "bit":
            path.write_bytes(adapter[:-1] + bytes([adapter[-1] ^ 1]))
        else:
            path.with_name("a.safetensors.json").write_text('{"etag": 3}')
        assert local_file(address).read_bytes() == adapter
        assert server.statuses == [200, 200]


@pytest.mark.parametrize(
    "last",
    ["..safetensors", "CON.safetensors", "nul.safetensors", "%2e%2e%2fa.safetensors", "..%5C..%5Ca.safetensors", "a%00b.safetensors",
     "-rf.safetensors", "a:b.safetensors", ".a.safetensors", f"{'a' * 300}.safetensors", "~.safetensors", "a*.safetensors"],
)  # fmt: skip
def test_no_name_leaves_the_cache(adapter, last, cache):
    with Server(**{f"/{last}": Served(adapter)}) as server:
        found = local_file(f"{server.url}/{last}")
    assert found.resolve().is_relative_to(cache.resolve())
    assert found.parent.parent == cache / "http"
    assert places.is_plain(found.name)


def test_a_link_does_not_lead_out_of_the_cache(adapter, cache, tmp_path):
    with serving(a=Served(adapter)) as server:
        address = f"{server.url}/a.safetensors"
        folder = local_file(address).parent
        outside = tmp_path / "outside"
        folder.rename(outside)
        folder.symlink_to(outside)
        with pytest.raises(DownloadError, match="leads out of the cache"):
            local_file(address)


def test_a_cache_that_cannot_be_written(adapter, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VPEFT_CACHE", str(tmp_path / "file"))
    with serving(a=Served(adapter)) as server, pytest.raises(WriteError, match="VPEFT_CACHE"):
        local_file(f"{server.url}/a.safetensors")


@pytest.mark.parametrize("name", ["a.safetensors", "A-b_c.1.safetensors", "_x"])
def test_plain_names(name):
    assert places.is_plain(name)
    assert places.tame(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".a",
        "a/b",
        "a\\b",
        "a\0b",
        "a:b",
        "a.",
        "con",
        "Aux.txt",
        "LPT1.safetensors",
        "-a",
        "ä",
        "a b",
        "a" * 200,
    ],
)
def test_other_names(name):
    assert not places.is_plain(name)
    assert places.is_plain(places.tame(name))


# ---- several at once ----


def test_two_threads_download_once(adapter):
    with serving(a=Served(adapter, block=len(adapter) // 4, pause=0.05)) as server:
        address, found = f"{server.url}/a.safetensors#sha256={sha(adapter)}", []
        threads = [threading.Thread(target=lambda: found.append(local_file(address))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(found)) == 1
    assert server.sent == len(adapter)


def process(address: str, cache: Path) -> subprocess.Popen:
    code = f"from vpeft.fetching import local_file; print(local_file({address!r}).stat().st_size)"
    environment = {**os.environ, "VPEFT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_download_once(adapter, cache):
    with serving(a=Served(adapter, block=len(adapter) // 10, pause=0.5)) as server:
        address = f"{server.url}/a.safetensors#sha256={sha(adapter)}"
        both = [process(address, cache) for _ in range(2)]
        printed = [p.communicate(timeout=120)[0].strip() for p in both]
    assert printed == [str(len(adapter))] * 2
    assert server.sent == len(adapter)


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock_and_its_bytes_are_gone_on_with(adapter, cache):
    with serving(a=Served(adapter, block=1000, pause=0.2)) as server:
        address = f"{server.url}/a.safetensors"
        first = process(address, cache)
        while server.sent < 5000:
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        server.paths["/a.safetensors"].pause = 0.0
        assert local_file(address).read_bytes() == adapter
    assert server.statuses[-1] == 206
    assert server.log[-1].sent < len(adapter) - 3000


def test_the_same_outputs_whether_by_path_or_by_url(adapter, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(adapter)
    found = []
    with serving(a=Served(adapter)) as server:
        for source in (tmp_path / "a.safetensors", f"{server.url}/a.safetensors"):
            model = make("vit")
            vpeft.load(model, source)
            found.append(model.eval()(images(model)))
    assert torch.equal(*found)
