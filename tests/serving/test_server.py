"""The HTTP server in this process: answers, batches, errors, clients that go away, files that change, and its end."""

import asyncio
import base64
import io
import json
import shutil
import threading
from pathlib import Path

from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.support.served import IMAGES, METHODS, Served, differ, picture, write_book
from tests.support.signed import edited
from vpeft.data.images import read_mask
from vpeft.engine.predict import predict


def run(work):
    return asyncio.run(asyncio.wait_for(work, 60))


def test_mixed_requests_are_batched_and_get_what_a_forward_of_their_own_gives(book, truth):
    jobs = [(name, i) for i in range(8) for name in METHODS]

    async def work():
        async with Served(book, window_ms=200, max_batch=32) as served:
            found = await asyncio.gather(*(served.ask(name, IMAGES[i]) for name, i in jobs))
            one = await served.client.post(
                "/predict?task=boots&topk=2", content=IMAGES[0], headers={"content-type": "image/png"}
            )
            return found, one, served.counted("vpeft_batch_size_count"), served.counted("vpeft_batch_size_sum"), {
                how: served.counted("vpeft_forwards_total", how=how) for how in ("routed", "separate")
            }  # fmt: skip

    found, one, batches, total, forwards = run(work())
    assert {r.status_code for r in found} == {200}
    worst = max(differ(r.json()["classes"], truth[name][i]) for r, (name, i) in zip(found, jobs, strict=True))
    assert worst < 1e-5
    assert [len(r.json()["classes"]) for r in found[:3]] == [3, 4, 5]
    assert one.json()["classes"] == found[0].json()["classes"][:2]
    assert total == 25
    assert batches <= 4, "24 requests at once, within 200 ms"
    assert forwards["routed"] <= batches
    assert forwards["separate"] <= batches


def test_a_mask_is_that_of_predict(shelf_folder, book, tmp_path):
    data = picture(3, (40, 30))
    (tmp_path / "a.png").write_bytes(data)
    (truth,) = predict(shelf_folder / "masks.safetensors", [tmp_path / "a.png"], out=tmp_path / "out")

    async def work():
        async with Served(book) as served:
            plain, direct, by_accept, both, topk, wrong = [
                await served.ask("masks", data),
                await served.ask("masks", data, format="png"),
                await served.client.post("/predict?task=masks", content=data, headers={"accept": "image/png"}),
                await asyncio.gather(served.ask("boots", data), served.ask("masks", data)),
                await served.ask("masks", data, topk=1),
                await served.ask("boots", data, format="png"),
            ]
            assert [topk.status_code, wrong.status_code] == [422, 422]
            assert direct.headers["content-type"] == by_accept.headers["content-type"] == "image/png"
            return plain.json(), direct.content, by_accept.content, both[1].json()

    plain, direct, by_accept, again = run(work())
    assert plain == again
    assert plain["classes"] == truth["classes"]
    assert base64.b64decode(plain["mask"]) == direct == by_accept
    assert (read_mask(truth["mask"]) == read_mask(io.BytesIO(direct))).all()
    assert len(plain["classes"]) == 2, "the mask has both classes"


def gif() -> bytes:
    frames, file = [Image.new("L", (8, 8), 20 * i) for i in range(3)], io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def black(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


WRONG = [
    ("boot", picture(), {}, 404, "task: 'boot' is not served here; did you mean 'boots'?"),
    (None, picture(), {}, 422, "task: missing; known: bags, boots, coats, masks"),
    ("boots", None, {}, 422, "image: "),
    ("boots", b"", {}, 422, "image: no bytes"),
    ("boots", b"no image at all", {}, 415, "image: these 15 bytes are no image"),
    ("boots", picture()[:500], {}, 400, "image is not a readable image"),
    ("boots", gif(), {}, 400, "holds 3 pictures"),
    ("boots", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {}, 415, "are no image"),
    ("boots", black(300, 200), {}, 413, "200x300 are more than 50000 pixels"),
    ("boots", bytes(70_000), {}, 413, "larger than 60000 bytes"),
    ("boots", picture(), {"topk": "0"}, 422, "topk: '0' is no whole number above 0"),
    ("boots", picture(), {"topk": "many"}, 422, "topk: 'many' is no whole number"),
    ("boots", picture(), {"topk": "4"}, 422, "topk: 4 classes asked for, but task 'boots' has 3"),
    ("boots", picture(), {"tokp": "1"}, 422, "'tokp': unknown field; did you mean 'topk'?"),
    ("boots", picture(), {"format": "jpg"}, 422, "format: 'jpg'"),
]


def test_each_wrong_request_has_its_status_and_a_line(book):
    async def work():
        async with Served(book, max_bytes="60000", max_pixels=50_000) as served:
            wrong = [(await served.ask(task, data, **fields)) for task, data, fields, *_ in WRONG]
            post, data = served.client.post, picture()
            others = [
                (await post("/predict?task=boots", json={}), 415, "content type 'application/json'"),
                (await post("/predict?task=boots", data={"task": "bags"}, files={"image": data}), 422, "'boots' and 'bags'; give one"),
                (await post("/predict?task=boots", files={"photo": data}), 422, "must be called 'image'"),
                (await post("/predict?task=boots", files=[("image", data), ("image", data)]), 422, "Too many files"),
                (await post("/predict", content=b"x", headers={"content-type": "multipart/form-data"}), 422, "form cannot be read"),
                (await served.client.get("/predict"), 405, "GET /predict: Method Not Allowed"),
                (await served.client.get("/nothing"), 404, "/nothing: Not Found"),
                (await post("/tasks/boot/reload"), 404, "did you mean 'boots'?"),
            ]  # fmt: skip
            good = await served.ask("boots", data)
            assert served.counted("vpeft_requests_total", task="boots", status="422") == 5
            assert served.service.open == 0
            return wrong, others, good

    wrong, others, good = run(work())
    for response, (*_, status, text) in zip(wrong, WRONG, strict=True):
        assert (response.status_code, list(response.json())) == (status, ["error"]), response.text
        assert text in response.json()["error"]
        assert "\n" not in response.json()["error"]
    for response, status, text in others:
        assert response.status_code == status, response.text
        assert text in response.json()["error"]
    assert good.status_code == 200


def test_an_endless_body_is_refused_while_it_comes(book):
    sent = []

    async def body():
        for _ in range(10_000):
            sent.append(1)
            yield bytes(100_000)

    async def work():
        async with Served(book, max_bytes="1MB") as served:
            return await served.client.post("/predict?task=boots", content=body())

    assert run(work()).status_code == 413
    assert len(sent) < 200, "a thousand megabytes were to come"


def test_adapters_are_loaded_when_asked_for_and_stay_within_memory(shelf_folder, tmp_path, truth):
    boots, bags = shelf_folder / "boots.safetensors", shelf_folder / "bags.safetensors"
    book = write_book(tmp_path, a=boots, b=bags, c=boots, d=bags)
    right = {n: truth[{"a": "boots", "b": "bags", "c": "boots", "d": "bags"}[n]][0] for n in "abcd"}
    data = IMAGES[0]

    async def work():
        async with Served(book, memory=str(int(2.1 * boots.stat().st_size)), window_ms=50) as served:
            shelf = served.service.shelf
            assert not shelf.loaded
            for name in "aabaca":
                assert differ((await served.ask(name, data)).json()["classes"], right[name]) < 1e-5
            assert list(shelf.loaded) == ["c", "a"], "b was used least recently"
            assert served.counted("vpeft_adapter_changes_total", what="load") == 3
            together = await asyncio.gather(*(served.ask(n, data) for n in "dcbadcba"))
            for name, response in zip("dcbadcba", together, strict=True):
                assert differ(response.json()["classes"], right[name]) < 1e-5
            assert 0 < shelf.bytes <= shelf.memory
            assert list(vars(shelf.model)["_modules"]["vpeft"].trees) == [h.handle.name for h in shelf.loaded.values()]
            metrics = (await served.client.get("/metrics")).text
            found = {f.name: f for f in text_string_to_metric_families(metrics)}
            assert found["vpeft_loaded_adapters"].samples[0].value == len(shelf.loaded) >= 2
            assert found["vpeft_loaded_bytes"].samples[0].value == shelf.bytes
            assert found["vpeft_queue_length"].samples[0].value == 0
            assert {s.labels["task"] for s in found["vpeft_requests"].samples} == set("abcd")
            assert found["vpeft_request_seconds"].type == found["vpeft_batch_size"].type == "histogram"

    run(work())


def test_adapters_that_are_switched_come_and_go_and_leave_the_backbone_as_it_was(shelf_folder, tmp_path, truth):
    """Those that are not routed write into the model; each is evicted right after it acted."""
    coats, masks = shelf_folder / "coats.safetensors", shelf_folder / "masks.safetensors"
    book = write_book(tmp_path, boots=shelf_folder / "boots.safetensors", coats=coats, again=coats, masks=masks)

    async def work():
        async with Served(book, memory=str(int(1.01 * coats.stat().st_size))) as served:
            bare = {n: t.clone() for n, t in served.service.shelf.model.state_dict().items()}
            masked = []
            for name in ("coats", "again", "masks", "boots", "again", "boots", "coats", "masks", "coats", "boots"):
                found = (await served.ask(name, IMAGES[1])).json()
                if name == "masks":
                    masked.append(found["mask"])
                else:
                    assert differ(found["classes"], truth["boots" if name == "boots" else "coats"][1]) < 1e-5
            assert masked[0] == masked[1]
            shelf = served.service.shelf
            for name in list(shelf.loaded):
                await asyncio.wrap_future(served.service.batcher.call(lambda name=name: shelf.drop(name)))
            assert shelf.bytes == 0
            assert all((bare[n] == t).all() for n, t in shelf.model.state_dict().items())

    run(work())


def test_a_changed_or_broken_file_fails_alone_until_it_is_reloaded(shelf_folder, tmp_path, truth):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    for file in (good, bad):
        shutil.copy(shelf_folder / "boots.safetensors", file)
    book, data = write_book(tmp_path, good=good, bad=bad), IMAGES[0]

    async def work():
        async with Served(book, window_ms=50) as served:
            assert (await served.ask("bad", data)).status_code == 200
            bad.touch()
            assert (await served.ask("bad", data)).status_code == 200, "the same bytes"
            shutil.copy(shelf_folder / "bags.safetensors", bad)
            first, second = await asyncio.gather(served.ask("bad", data), served.ask("good", data))
            assert (first.status_code, second.status_code) == (503, 200)
            assert "has changed since it was read; POST /tasks/bad/reload" in first.json()["error"]
            again = await served.client.post("/tasks/bad/reload")
            assert again.status_code == 200
            assert again.json()["classes"] == ["1-0", "1-1", "1-2", "1-3"]
            assert differ((await served.ask("bad", data)).json()["classes"], truth["bags"][0]) < 1e-5
            shutil.copy(edited(good, lambda m, t: m.update(config={"model": {"img_size": 56}})), bad)
            other = await served.client.post("/tasks/bad/reload")
            assert (other.status_code, "one book has one backbone" in other.json()["error"]) == (503, True)
            bad.write_bytes(b"x" * 1000)
            refused = await served.client.post("/tasks/bad/reload")
            assert refused.status_code == 503
            assert "damaged" in refused.json()["error"]
            first, second = await asyncio.gather(served.ask("bad", data), served.ask("good", data))
            assert (first.status_code, second.status_code) == (503, 200)
            assert "damaged" in first.json()["error"]
            tasks = {t["task"]: t for t in (await served.client.get("/tasks")).json()["tasks"]}
            assert "damaged" in tasks["bad"]["error"]
            assert (tasks["good"]["loaded"], tasks["bad"]["loaded"]) == (True, False)
            good.unlink()
            gone = await served.ask("good", data)
            assert gone.status_code == 503
            assert "cannot be read any more" in gone.json()["error"]

    run(work())


class Held:
    """Holds the model's thread between two batches."""

    def __init__(self, service):
        self.free, began = threading.Event(), threading.Event()

        def hold() -> None:
            began.set()
            self.free.wait(30)

        service.batcher.call(hold)
        began.wait(30)


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_a_client_that_goes_away_is_left_out_and_nobody_gets_its_answer(book, truth):

    async def leaves(served, data: bytes) -> None:
        """A client of ASGI that disconnects once its body was read."""
        sent, queued = [False], served.service.batcher.waiting + 1

        async def receive():
            if not sent[0]:
                sent[0] = True
                return {"type": "http.request", "body": data, "more_body": False}
            await until(lambda: served.service.batcher.waiting >= queued)
            return {"type": "http.disconnect"}

        async def send(message):
            assert message.get("status", 499) == 499

        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"task=boots", "headers": []}
        await served.client._transport.app(scope, receive, send)

    async def work():
        async with Served(book) as served:
            held = Held(served.service)
            for number in (0, 1, 2):
                await leaves(served, IMAGES[number])
            asked = [asyncio.ensure_future(served.ask("boots", IMAGES[i])) for i in (3, 4, 5)]
            await until(lambda: served.service.batcher.waiting == 6)
            held.free.set()
            found = [(await a).json()["classes"] for a in asked]
            assert served.counted("vpeft_batch_size_sum") == 3, "three of six were left out"
            assert served.counted("vpeft_requests_total", task="boots", status="499") == 3
            assert served.service.open == 0
            return found

    for found, right in zip(run(work()), truth["boots"][3:6], strict=True):
        assert differ(found, right) < 1e-5


def test_a_full_queue_a_slow_model_and_a_slow_body_are_said(book):
    async def slowly():
        yield b"x"
        await asyncio.sleep(30)

    async def work():
        async with Served(book, queue=2, timeout=0.4) as served:
            held = Held(served.service)
            waiting = [asyncio.ensure_future(served.ask("boots", picture())) for _ in range(2)]
            await until(lambda: served.service.batcher.waiting == 2)
            full = await served.ask("boots", picture())
            assert (full.status_code, full.headers["retry-after"]) == (503, "1")
            assert [(await w).status_code for w in waiting] == [504, 504]
            held.free.set()
            slow = await served.client.post("/predict?task=boots", content=slowly())
            assert slow.status_code == 408
            await until(lambda: served.service.batcher.waiting == 0)
            assert served.counted("vpeft_batch_size_sum") == 0, "what nobody waits for is not computed"
            served.service.options = type(served.service.options)(timeout=30)
            assert (await served.ask("boots", picture())).status_code == 200

    run(work())


def test_a_broken_image_between_good_ones_fails_alone(book, truth):

    async def work():
        async with Served(book, window_ms=100) as served:
            sent = [IMAGES[0], IMAGES[0][:300], IMAGES[1], b"junk", IMAGES[2], IMAGES[3]]
            return await asyncio.gather(*(served.ask("boots", data) for data in sent))

    found = run(work())
    assert [r.status_code for r in found] == [200, 400, 200, 415, 200, 200]
    for response, right in zip([r for r in found if r.status_code == 200], truth["boots"][:4], strict=True):
        assert differ(response.json()["classes"], right) < 1e-5


def test_what_was_accepted_is_answered_when_it_ends_and_nothing_else(book):
    async def work():
        async with Served(book) as served:
            held = Held(served.service)
            asked = [asyncio.ensure_future(served.ask(n, picture())) for n in ("boots", "bags", "coats", "masks") * 3]
            await until(lambda: served.service.batcher.waiting == 12)
            ending = asyncio.ensure_future(asyncio.to_thread(served.service.close))
            await until(lambda: served.service.closing)
            late = await served.ask("boots", picture())
            health = await served.client.get("/healthz")
            held.free.set()
            await ending
            assert [(await a).status_code for a in asked] == [200] * 12
            assert not served.service.batcher.thread.is_alive()
            return late, health

    late, health = run(work())
    assert (late.status_code, late.json()) == (503, {"error": "the server is shutting down"})
    assert (health.status_code, health.json()["status"]) == (503, "closing")


def test_weights_that_give_no_numbers_are_an_error_of_their_task_alone(shelf_folder, tmp_path):
    good = Path(shutil.copy(shelf_folder / "boots.safetensors", tmp_path))
    bad = edited(good, lambda metadata, tensors: tensors["head.bias"].fill_(float("nan")))
    book = write_book(tmp_path, bad=bad, good=good)

    async def work():
        async with Served(book, window_ms=100) as served:
            return await asyncio.gather(*(served.ask(n, picture()) for n in ("good", "bad", "good")))

    found = run(work())
    assert [r.status_code for r in found] == [200, 500, 200]
    assert "not a number" in found[1].json()["error"]
    assert found[0].json() == found[2].json()


def test_tasks_say_what_they_are(book):
    async def work():
        async with Served(book) as served:
            assert (await served.client.get("/healthz")).json() == {"status": "ok", "tasks": 4}
            await served.ask("boots", picture())
            await served.ask("coats", picture())
            return (await served.client.get("/tasks")).json()["tasks"]

    tasks = {t["task"]: t for t in run(work())}
    assert json.loads(json.dumps(tasks["boots"])) == {
        "task": "boots", "answer": "classes", "error": None, "method": "lora", "classes": ["0-0", "0-1", "0-2"],
        "topk": None, "bytes": tasks["boots"]["bytes"], "loaded": True, "routed": True,
    }  # fmt: skip
    assert tasks["coats"]["routed"] is False
    assert tasks["coats"]["bytes"] > 4_000_000, "all weights count"
    assert (tasks["masks"]["answer"], tasks["masks"]["loaded"]) == ("mask", False)
