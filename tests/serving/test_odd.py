"""What was found by breaking the server: reloads in the middle, methods and names that few use, waits that nobody needs."""

import asyncio
import gc
import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image

import vpeft.serving.server as module
import vpeft.serving.shelf as shelf_module
from tests.serving.test_server import Held, run, until
from tests.support.served import IMAGES, Served, differ, picture, write_book
from tests.support.signed import edited
from vpeft.engine.predict import predict
from vpeft.errors import DataError
from vpeft.numerics import collector_passes_over
from vpeft.serving.book import read_book, refresh
from vpeft.serving.listing import Wanted, predict_list
from vpeft.serving.settings import ServeOptions
from vpeft.serving.shelf import Shelf
from vpeft.tasks.protocol import PredictOptions
from vpeft.tasks.segmentation.pictures import shares


def test_a_request_alone_does_not_wait_for_the_window_and_no_batch_for_more_than_was_sent(book):
    async def work():
        async with Served(book, window_ms=5000) as served:
            start = time.monotonic()
            assert (await served.ask("boots", IMAGES[0])).status_code == 200
            found = await asyncio.gather(*(served.ask(n, IMAGES[1]) for n in ("boots", "bags", "boots")))
            assert {r.status_code for r in found} == {200}
            assert time.monotonic() - start < 4
            assert served.counted("vpeft_batch_size_count") == 2, "three that came together are one batch"

    run(work())


def test_an_image_prepared_for_the_file_before_a_reload_is_prepared_again(shelf_folder, tmp_path, truth):
    """Otherwise it would be normalised for one checkpoint and answered by the other."""
    file = tmp_path / "a.safetensors"
    shutil.copy(edited(shelf_folder / "boots.safetensors", lambda m, t: m["data"].update(mean=[0.9] * 3)), file)
    book = write_book(tmp_path, a=file)

    async def work():
        async with Served(book) as served:
            service, prepare = served.service, served.service._prepare

            def then_reload(*arguments):
                item = prepare(*arguments)
                service._prepare = prepare
                shutil.copy(shelf_folder / "bags.safetensors", file)
                service.batcher.call(lambda: service.shelf.reload("a")).result(30)
                return item

            service._prepare = then_reload
            found = await served.ask("a", IMAGES[0])
            assert differ(found.json()["classes"], truth["bags"][0]) < 1e-5

    run(work())


def test_classes_that_the_reloaded_file_does_not_have_are_refused(shelf_folder, tmp_path):
    file = tmp_path / "a.safetensors"
    shutil.copy(shelf_folder / "bags.safetensors", file)
    book = write_book(tmp_path, a=file)

    async def work():
        async with Served(book) as served:
            service = served.service
            held = Held(service)
            shutil.copy(shelf_folder / "boots.safetensors", file)
            again = asyncio.ensure_future(served.client.post("/tasks/a/reload"))
            await until(lambda: service.batcher.waiting == 1)
            asked = asyncio.ensure_future(served.ask("a", IMAGES[0], topk=4))  # four classes now, three after the reload
            await until(lambda: service.batcher.waiting == 2)
            held.free.set()
            assert (await again).status_code == 200
            found = await asked
            assert (found.status_code, found.json()) == (422, {"error": "topk: 4 classes asked for, but task 'a' has 3"})

    run(work())


def test_names_that_are_no_unicode_are_said_all_the_same(shelf_folder, tmp_path):
    labels = ["\ud800", "b", "c"]
    book = write_book(tmp_path, a={"file": str(shelf_folder / "boots.safetensors"), "labels": labels})

    async def work():
        async with Served(book) as served:
            found = await served.ask("a", picture())
            return found, await served.client.get("/tasks")

    found, tasks = run(work())
    assert (found.status_code, tasks.status_code) == (200, 200)
    assert {c["class"] for c in found.json()["classes"]} == set(labels)
    assert tasks.json()["tasks"][0]["classes"] == labels


def test_what_nobody_foresaw_is_counted_as_500(book):
    async def work():
        async with Served(book) as served:
            served.service._entry = None  # whatever fails
            found = await served.ask("boots", picture())
            assert (found.status_code, found.json()) == (500, {"error": "TypeError in the server"})
            assert served.counted("vpeft_requests_total", task="", status="500") == 1
            assert served.service.open == 0

    run(work())


def test_head_slashes_and_large_numbers(book):
    async def work():
        async with Served(book) as served:
            for path in ("/healthz", "/tasks", "/metrics"):
                head, whole = await served.client.head(path), await served.client.get(path)
                assert (head.status_code, head.headers["content-type"]) == (200, whole.headers["content-type"])
            slash = await served.client.post("/predict/?task=boots")
            assert (slash.status_code, slash.json()) == (404, {"error": "POST /predict/: Not Found"})
            for number in ("1000000000", "9" * 5000):
                large = await served.ask("boots", picture(), topk=number)
                assert large.status_code == 422
                assert large.json()["error"].endswith("classes asked for, but task 'boots' has 3")
                assert len(large.json()["error"]) < 500

    run(work())


def test_classes_of_one_name_have_one_share():
    assert shares(np.array([[0, 1], [1, 2]]), ["x", "x", "y"]) == {"x": 0.75, "y": 0.25}


def test_the_garbage_collector_leaves_the_model_and_the_libraries_alone_while_it_serves(book, monkeypatch):
    """A collection of all objects holds every request for a good part of a second."""
    made, build = [], module.server_of
    monkeypatch.setattr(module, "server_of", lambda *a: made.append(build(*a)) or made[0])
    gc.unfreeze()  # what the suite has frozen
    thread = threading.Thread(target=module.serve, args=(book, ServeOptions(port=0)))
    thread.start()
    try:
        while not made or not made[0].started:
            assert thread.is_alive()
            time.sleep(0.01)
        assert gc.get_freeze_count() > 50_000
    finally:
        made[0].should_exit = True
        thread.join(30)
    assert gc.get_freeze_count() == 0
    gc.freeze()


def test_what_someone_has_frozen_stays_so():
    gc.unfreeze()
    with collector_passes_over():
        assert gc.get_freeze_count() > 50_000
    assert gc.get_freeze_count() == 0
    gc.freeze()
    with collector_passes_over():
        pass
    assert gc.get_freeze_count() > 50_000


def test_a_thin_image_is_refused_before_it_is_enlarged(book, tmp_path):
    """A shorter side of one pixel brought to the model's size makes a gigabyte of a line."""
    thin = tmp_path / "thin.png"
    Image.new("RGB", (1_000_000, 1)).save(thin)

    async def work():
        async with Served(book) as served:
            return await served.ask("boots", thin.read_bytes())

    found = run(work())
    assert found.status_code == 413
    assert found.json()["error"].startswith("image: an image of 1000000x1 pixels would be resized to ")
    with pytest.raises(DataError, match=r"thin\.png: an image of 1000000x1 pixels .* more than 67108864 pixels"):
        list(predict(book.parent / "boots.safetensors", [thin]))
    shelf = Shelf(read_book(book), 10**9)
    with pytest.raises(DataError, match=r"thin\.png: an image of 1000000x1"):
        predict_list(shelf, [Wanted(thin, "boots")], PredictOptions())


def test_a_reload_reads_outside_of_the_models_thread(book, monkeypatch):
    free, reading = threading.Event(), threading.Event()

    def slow(*arguments):
        reading.set()
        assert free.wait(30)
        return refresh(*arguments)

    async def work():
        async with Served(book) as served:
            monkeypatch.setattr(shelf_module, "refresh", slow)
            again = asyncio.ensure_future(served.client.post("/tasks/boots/reload"))
            try:
                await until(reading.is_set)
                assert (await asyncio.wait_for(served.ask("boots", IMAGES[0]), 20)).status_code == 200
                assert not again.done()
            finally:
                free.set()
            assert (await again).status_code == 200
            assert (await served.ask("boots", IMAGES[0])).status_code == 200

    run(work())
