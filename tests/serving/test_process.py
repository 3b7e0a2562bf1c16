"""The server on a socket: clients that hang up, and an end under load."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.support.served import IMAGES, METHODS, differ
from vpeft.serving.app import Service
from vpeft.serving.book import read_book
from vpeft.serving.server import listen, server_of
from vpeft.serving.settings import ServeOptions


class Client(threading.Thread):
    """Asks again and again, one request after the other on one connection, until the server is gone.

    Attributes:
        answers: of each request: task, image, status, JSON.
        cut: requests that were sent whole and got no answer.
    """

    def __init__(self, port: int, number: int):
        super().__init__(daemon=True)
        self.port, self.number, self.answers, self.cut = port, number, [], 0
        self.start()

    def run(self) -> None:
        names, count = list(METHODS), self.number
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        while True:
            task, image = names[count % len(names)], count % len(IMAGES)
            count += 1
            try:
                connection.request("POST", f"/predict?task={task}", IMAGES[image], {"Content-Type": "image/png"})
            except OSError:
                return
            try:
                response = connection.getresponse()
                self.answers.append((task, image, response.status, json.loads(response.read())))
            except (http.client.HTTPException, OSError):  # an idle connection was closed as the request went out
                self.cut += 1
                return


def hang_up(port: int, whole: bool) -> None:
    """Send a request, or half of it, and go."""
    head = f"POST /predict?task=boots HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(IMAGES[7])}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + (IMAGES[7] if whole else IMAGES[7][:100]))


def check(clients: list[Client], truth) -> int:
    """Every answer is right, or says that the server ends; gives the number of right ones."""
    good = 0
    for task, image, status, answer in (a for c in clients for a in c.answers):
        assert status in (200, 503), answer
        if status == 200:
            assert differ(answer["classes"], truth[task][image]) < 1e-5
            good += 1
        else:
            assert answer == {"error": "the server is shutting down"}
    return good


def test_clients_that_hang_up_disturb_nobody_and_the_end_answers_what_was_accepted(book, truth):
    options = ServeOptions(port=0, window_ms=2)
    listening = listen(options)
    port = listening.getsockname()[1]
    service = Service(read_book(book), options)
    server = server_of(service, listening)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    clients = [Client(port, number) for number in range(6)]
    while sum(len(c.answers) for c in clients) < 30:
        hang_up(port, whole=True)
        hang_up(port, whole=False)
        time.sleep(0.02)
    server.handle_exit(signal.SIGTERM, None)
    thread.join(30)
    for client in clients:
        client.join(30)
    assert not thread.is_alive()
    assert not service.batcher.thread.is_alive()
    assert check(clients, truth) >= 30
    assert service.open == 0
    counted = service.metrics.registry.get_sample_value
    right = sum(counted("vpeft_requests_total", {"task": name, "status": "200"}) or 0 for name in METHODS)
    assert right >= sum(a[2] == 200 for c in clients for a in c.answers)
    assert counted("vpeft_batch_size_sum") >= right
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_in_order_on_a_signal(book, truth, number):
    command = [sys.executable, "-m", "vpeft.cli", "serve", "--book", str(book), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        line = process.stdout.readline()
        assert line.startswith("4 tasks at http://127.0.0.1:"), process.communicate()
        clients = [Client(int(line.rsplit(":", 1)[1]), n) for n in range(8)]
        while sum(len(c.answers) for c in clients) < 100:
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    for client in clients:
        client.join(30)
    assert (process.returncode, out, err) == (0, "", "")
    assert check(clients, truth) >= 100


@pytest.mark.slow
def test_a_port_that_is_taken_is_a_line(book):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "vpeft.cli", "serve", "--book", str(book), "--port", str(taken.getsockname()[1])]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2
    assert "cannot listen at 127.0.0.1:" in found.stderr
    assert found.stderr.count("\n") == 1


def test_answers_do_not_wait_for_acknowledgements():
    with listen(ServeOptions(port=0)) as listening, socket.create_connection(listening.getsockname()[:2]):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
