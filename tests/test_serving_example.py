"""The server of docs/examples/server: its own process, driven over HTTP."""

import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from served import DEADLINE, served

from cylora import LoraTrainer
from cylora.formats import load_checkpoint

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "server"


def module(name):
    """Import a file of the example as its neighbours do: by its bare name."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def example():
    """The example's modules, in the order of their imports."""
    names = ("model", "bodies", "learner", "app", "client")
    former = {name: sys.modules.pop(name, None) for name in names}
    yield {name: module(name) for name in names}
    for name in names:
        del sys.modules[name]
    sys.modules.update({name: one for name, one in former.items() if one is not None})


def started(folder, *options):
    """Start the example on any free port, with its tenants in ``folder``; a warning is an error there."""
    folder.mkdir(exist_ok=True)
    command = ("-W", "error", EXAMPLE / "app.py", "--port", 0, "--folder", folder / "tenants", *options)
    return served(folder / f"log-{len(list(folder.glob('log-*')))}", *command)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with started(tmp_path_factory.mktemp("server")) as server:
        server.said("Application startup complete")
        yield server
        assert server.stop() == -signal.SIGTERM
        assert "Traceback" not in server.text, server.text


@pytest.fixture
def client(server, example):
    with example["client"].Client(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def digits(example):
    """The images turned by a quarter, and what they are."""
    _, turned, labels = example["client"].digits()
    return turned, labels


def body(images, labels=None):
    return {"images": images.tolist()} | ({} if labels is None else {"labels": labels.tolist()})


def described(client, tenant):
    status, _, answer = client.request("GET", f"/v1/tenants/{tenant}")
    assert status == 200, answer
    return answer


# ------------------------------------------------------------------ learning


def test_tenant_that_corrects_is_read_better_and_another_stays_to_the_bit(server, client, example, capsys):
    """By the example's own client: one tenant's scanner turns its pages, the other posts nothing."""
    client.create("content")
    before = described(client, "content")
    example["client"].main([server.url])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    feedbacks, turning, content = ([float(row[i].rstrip("%")) for row in rows] for i in range(3))
    assert feedbacks == [0, 40, 80, 120, 160, 200]
    assert turning[0] < 25
    assert turning[-1] > 80
    assert content == content[:1] * 6
    assert content[0] > 90
    assert described(client, "content") == before
    after = described(client, "turning")
    assert after["step"] == 200
    assert after["content_hash"] != before["content_hash"]


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000", "localhost:8000", "localhost", "", "//localhost", "http://", "http://:8000", "https://localhost",
        "http://localhost:port", "http://localhost:99999", "http://[::1", "http://localhost/path", "http://localhost?query",
        "http://user:word@localhost", "http://local host",
    ],
)  # fmt: skip
def test_client_says_what_a_url_must_be(example, capsys, url):
    rule = f"url must be http://host[:port], got {url!r}"
    with pytest.raises(ValueError, match=re.escape(rule)):
        example["client"].Client(url)
    with pytest.raises(SystemExit):
        example["client"].main([url])
    assert capsys.readouterr().err.endswith(f"error: {rule}\n")


def test_client_takes_any_host_and_port(example):
    for url, address in {
        "http://host": ("host", 80),
        "http://host:8000/": ("host", 8000),
        "HTTP://Host:1": ("host", 1),
        "http://[::1]:8000": ("::1", 8000),
    }.items():
        connection = example["client"].Client(url)._connection  # connects with the first request
        assert (connection.host, connection.port) == address


def test_learning_through_the_server_gives_the_bits_of_learning_without_it(client, example, digits):
    client.create("twin")
    twin = Twin(example, "twin")
    assert described(client, "twin")["content_hash"] == twin.content_hash()
    for batch in batches(20):
        answer = client.feedback("twin", digits[0][batch], digits[1][batch])
        assert answer.pop("version") <= described(client, "twin")["version"]  # one more may be published meanwhile
        assert answer == twin.learn(digits[0][batch], digits[1][batch]).to_dict()
    assert described(client, "twin")["content_hash"] == twin.content_hash()
    assert client.predict("twin", digits[0][:16]) == twin.predict(digits[0][:16])


def batches(count):
    return np.random.default_rng(3).integers(1797, size=(count, 16))


class Twin:
    """A tenant without a server."""

    def __init__(self, example, tenant):
        learner = example["learner"]
        self.reader = learner.DigitReader()
        self.adapters = self.reader.new_adapters(tenant)
        self.trainer = LoraTrainer(learner.TRAINING)
        self._snapshot = learner.AdapterSnapshot

    def learn(self, images, labels):
        loss, gradients = self.reader.loss_and_gradients(self.adapters, images, labels.tolist())
        return self.trainer.step(loss, self.adapters, gradients)

    def predict(self, images):
        return self.reader.predict(self.adapters, images)

    def content_hash(self):
        vector = self.adapters.flat.vector.copy()
        vector.setflags(write=False)
        return self._snapshot(1, None, self.adapters.over(vector), 0.0).content_hash


# ------------------------------------------------------------------ what is refused

IMAGE = [0.5] * 64
WRONG = [
    (b"", "the body must be JSON in UTF-8, got Expecting value"),
    (b"{", "the body must be JSON in UTF-8, got Expecting property name"),
    (b"\xff{}", "the body must be JSON in UTF-8, got 'utf-8' codec can't decode byte 0xff"),
    (b"[" * 60_000, "the body must be JSON in UTF-8, got maximum recursion depth exceeded"),
    (b"9" * 5000, "the body must be JSON in UTF-8, got Exceeds the limit"),
    (b"[]", r"the body must be a JSON object, got \[\]"),
    ({}, "the body must have the keys images, labels, got none"),
    ({"images": [IMAGE], "labels": [1], "label": 1}, "keys images, labels, got 'images', 'label', 'labels'"),
    (b'{"images": [], "images": []}', "a key must not be repeated, got 'images', 'images'"),
    ({"images": {}, "labels": [1]}, r"images must be a list of 1 to 16 images, got \{\}"),
    ({"images": [], "labels": []}, "images must be a list of 1 to 16 images, got 0"),
    ({"images": [IMAGE] * 17, "labels": [1] * 17}, "images must be a list of 1 to 16 images, got 17"),
    ({"images": [IMAGE, 3], "labels": [1, 1]}, r"images\[1\] must be a list of 64 numbers, got 3"),
    ({"images": [IMAGE[1:]], "labels": [1]}, r"images\[0\] must be a list of 64 numbers, got 63"),
    ({"images": [[True, *IMAGE[1:]]], "labels": [1]}, r"images\[0\]\[0\] must be a number from 0 to 1, got True"),
    ({"images": [["a" * 99, *IMAGE[1:]]], "labels": [1]}, r"images\[0\]\[0\] .* got 'a+\.\.\.a+'"),
    ({"images": [[*IMAGE[1:], 1.25]], "labels": [1]}, r"images\[0\]\[63\] must be a number from 0 to 1, got 1\.25"),
    ({"images": [[*IMAGE[1:], -1e-9]], "labels": [1]}, r"images\[0\]\[63\] must be a number from 0 to 1, got -1e-09"),
    ({"images": [[float("nan"), *IMAGE[1:]]], "labels": [1]}, "numbers must be finite, got NaN"),
    ({"images": [[-float("inf"), *IMAGE[1:]]], "labels": [1]}, "numbers must be finite, got -Infinity"),
    (json.dumps({"images": [IMAGE], "labels": [1]}).replace("0.5", "1e999", 1).encode(), "from 0 to 1, got inf"),
    ({"images": [IMAGE], "labels": 1}, "labels must be a list of as many digits as there are images, 1, got 1"),
    ({"images": [IMAGE], "labels": [1, 2]}, "labels must be a list of as many digits as there are images, 1, got 2"),
    ({"images": [IMAGE], "labels": [10]}, r"labels\[0\] must be an integer from 0 to 9, got 10"),
    ({"images": [IMAGE], "labels": [1.0]}, r"labels\[0\] must be an integer from 0 to 9, got 1\.0"),
    ({"images": [IMAGE], "labels": [True]}, r"labels\[0\] must be an integer from 0 to 9, got True"),
]


@pytest.mark.parametrize(("content", "message"), WRONG, ids=[message[:60] for _, message in WRONG])
def test_feedback_that_breaks_a_rule_is_answered_with_it_and_teaches_nothing(client, content, message):
    client.create("strict")
    before = described(client, "strict")
    status, _, answer = client.request("POST", "/v1/tenants/strict/feedback?wait=1", content)
    assert (status, list(answer)) == (400, ["error"])
    assert re.search(message, answer["error"]), answer["error"]
    assert described(client, "strict") == before


def test_prediction_takes_images_and_nothing_else(client):
    client.create("strict")
    status, _, answer = client.request("POST", "/v1/tenants/strict/predict", {"images": [IMAGE], "labels": [1]})
    assert (status, answer) == (400, {"error": "the body must have the keys images, got 'images', 'labels'"})


@pytest.mark.parametrize("is_declared", [True, False], ids=["with its length", "in chunks"])
def test_body_that_is_too_long_is_refused_and_the_server_goes_on(client, is_declared):
    client.create("strict")
    before = described(client, "strict")
    content = b" " * (65_536 + 1)
    sent = content if is_declared else iter([content[:40_000], content[40_000:]])
    status, _, answer = client.request("POST", "/v1/tenants/strict/feedback", sent)
    assert (status, answer) == (413, {"error": "the body must have at most 65536 bytes, got more"})
    assert described(client, "strict") == before


def test_client_that_goes_away_in_the_middle_of_a_body_teaches_nothing(server, client):
    """Whatever it makes the server log, it is no traceback: the fixture looks."""
    client.create("strict")
    before = described(client, "strict")
    place = urllib.parse.urlsplit(server.url)
    with socket.create_connection((place.hostname, place.port), DEADLINE) as connection:
        connection.sendall(b"POST /v1/tenants/strict/feedback HTTP/1.1\r\nhost: x\r\ncontent-length: 999\r\n\r\n{")
    assert described(client, "strict") == before


@pytest.mark.parametrize(("method", "path"), [("POST", "/predict"), ("POST", "/feedback"), ("GET", "")])
def test_tenant_that_was_not_created_is_unknown_and_stays_so(client, method, path):
    for _ in range(2):
        status, _, answer = client.request(method, f"/v1/tenants/nobody{path}", {"images": [IMAGE], "labels": [1]})
        assert status == 404
        assert answer == {"error": "tenant must be one that was created, by PUT /v1/tenants/NAME, got 'nobody'"}


def test_tenant_may_be_called_anything_that_is_no_path(client):
    for name in ("..", "%C3%A9t%C3%A9", "a b".replace(" ", "%20"), "CON", "x" * 200):
        assert client.request("PUT", f"/v1/tenants/{name}")[0] in (200, 201), name
    status, _, answer = client.request("PUT", f"/v1/tenants/{'x' * 201}")
    assert status == 400
    assert "tenant must take at most 200 bytes" in answer["error"]
    assert client.request("PUT", "/v1/tenants/..%2Fx")[::2] == (404, {"error": "Not Found"})


def test_creating_twice_changes_nothing(client, digits):
    assert client.request("PUT", "/v1/tenants/again")[::2] == (201, {"tenant": "again", "created": True})
    client.feedback("again", digits[0][:16], digits[1][:16])
    before = described(client, "again")
    assert client.request("PUT", "/v1/tenants/again")[::2] == (200, {"tenant": "again", "created": False})
    after = described(client, "again")
    assert before.pop("version") <= after.pop("version")  # what was learned may be published once more
    assert after == before


def test_method_that_a_route_has_not_is_refused(client):
    assert client.request("GET", "/v1/tenants/x/predict")[::2] == (405, {"error": "Method Not Allowed"})


def test_options_that_break_a_rule_are_answered_before_anything_is_written(tmp_path):
    with started(tmp_path, "--memory-mib", 0) as server:
        assert server.process.wait(DEADLINE) == 2
        assert re.search("error: memory_budget must be .*, got 0", server.text)
    assert not (tmp_path / "tenants").exists()


def test_learner_has_the_cpus_it_is_given(example, tmp_path, digits):
    cpu = max(os.sched_getaffinity(0))
    with started(tmp_path, "--learner-cpus", cpu) as server, example["client"].Client(server.url) as client:
        client.create("pinned")
        client.feedback("pinned", digits[0][:16], digits[1][:16])
        threads = {int(path.name) for path in Path(f"/proc/{server.process.pid}/task").iterdir()}
        pinned = [thread for thread in threads - {server.process.pid} if os.sched_getaffinity(thread) == {cpu}]
        assert len(pinned) >= 3, "one computes gradients, one steps, one publishes"
        others = os.sched_getaffinity(0) - {cpu}
        assert os.sched_getaffinity(server.process.pid) == (others or {cpu})
    with started(tmp_path, "--learner-cpus", 4096) as server:
        assert server.process.wait(DEADLINE) == 2
        assert re.search(r"error: cpus must be .*, got \[4096\]", server.text)


# ------------------------------------------------------------------ the full queue


def test_full_queue_is_answered_with_when_to_try_again(example, tmp_path, digits):
    """In this process, so that the test can hold the tenant, and with it the trainer, for as long as it likes."""
    app, learner = example["app"], example["learner"]
    one = learner.Learner(tmp_path / "tenants", memory_budget=2**24, queue_size=2)
    with inside(app.application(one, save_seconds=60.0)) as url, example["client"].Client(url) as client:
        client.create("slow")
        sent = body(digits[0][:16], digits[1][:16])
        with one.store.use("slow"):
            answers = [client.request("POST", "/v1/tenants/slow/feedback", sent)]
            while answers[-1][0] == 202:
                assert len(answers) < 100
                answers.append(client.request("POST", "/v1/tenants/slow/feedback", sent))
            status, headers, answer = answers.pop()
            assert (status, headers["retry-after"]) == (429, "1")
            assert answer == {"error": "the queue of feedback is full; nothing of this one was taken"}
            assert len(client.predict("slow", digits[0][:3])) == 3, "serving waits for training"
        learned = client.feedback("slow", digits[0][:16], digits[1][:16])
        assert learned["step"] == len(answers), "what was queued was learned, what was refused was not"


@contextmanager
def inside(application):
    """Serve an application from a thread of this process, at the URL that this gives."""
    server = uvicorn.Server(uvicorn.Config(application, port=0, ws="none", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + DEADLINE
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(DEADLINE)
    assert not thread.is_alive()


# ------------------------------------------------------------------ metrics


def test_metrics_are_what_prometheus_reads(client, digits):
    client.create("counted")
    for batch in batches(3):
        client.feedback("counted", digits[0][batch], digits[1][batch])
    status, headers, text = client.request("GET", "/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    found = {family.name: family for family in text_string_to_metric_families(text)}
    (steps,) = (one for one in found["cylora_steps"].samples if one.labels == {"tenant": "counted"})
    assert steps.value == 3
    (version,) = (one for one in found["cylora_published_version"].samples if one.labels == {"tenant": "counted"})
    assert 2 <= version.value <= described(client, "counted")["version"]
    assert client.request("GET", "/healthz")[2]["status"] == "ok"


# ------------------------------------------------------------------ the end, and what is there afterwards


def post_until_it_ends(example, url, tenant, digits, *, waits):
    """Post feedback, one after the other, until the server is gone; return how often it was acknowledged."""
    acknowledged = 0
    with example["client"].Client(url) as client:
        for batch in batches(100_000):
            try:
                path = f"/v1/tenants/{tenant}/feedback{'?wait=1' if waits else ''}"
                status, _, _ = client.request("POST", path, body(digits[0][batch], digits[1][batch]))
            except (OSError, http.client.HTTPException):
                return acknowledged
            assert status in ((200,) if waits else (202, 429))
            acknowledged += status != 429
    raise AssertionError("the server has not ended")


def test_sigterm_in_the_middle_of_learning_loses_nothing_that_was_acknowledged(example, tmp_path, digits):
    """Of one tenant the answers were waited for: its bits must be those of a twin. Of the other the queue was full."""
    with started(tmp_path) as server, example["client"].Client(server.url) as client, ThreadPoolExecutor() as pool:
        for tenant in ("waits", "queues"):
            client.create(tenant)
        posts = {
            tenant: pool.submit(post_until_it_ends, example, server.url, tenant, digits, waits=tenant == "waits")
            for tenant in ("waits", "queues")
        }
        deadline = time.monotonic() + DEADLINE
        while any(described(client, tenant)["step"] < 30 for tenant in posts):
            assert time.monotonic() < deadline
        assert server.stop() == -signal.SIGTERM  # as uvicorn ends, after everything else
        assert "Application shutdown complete" in server.text
        acknowledged = {tenant: post.result(DEADLINE) for tenant, post in posts.items()}
    with started(tmp_path) as server, example["client"].Client(server.url) as client:
        kept = {tenant: described(client, tenant) for tenant in posts}
        for tenant in posts:  # the last one may have been learned, and the answer lost
            assert acknowledged[tenant] <= kept[tenant]["step"] <= acknowledged[tenant] + 1
        twin = Twin(example, "waits")
        for batch in batches(100_000)[: kept["waits"]["step"]]:
            twin.learn(digits[0][batch], digits[1][batch])
        assert kept["waits"]["content_hash"] == twin.content_hash()
        batch = batches(1)[0]
        record = client.feedback("waits", digits[0][batch], digits[1][batch])
        assert record["step"] == kept["waits"]["step"]
        twin.learn(digits[0][batch], digits[1][batch])
        assert described(client, "waits")["content_hash"] == twin.content_hash()


def test_client_that_stalls_keeps_no_server_from_stopping_and_saving(example, tmp_path, digits):
    with started(tmp_path) as server, example["client"].Client(server.url) as client:
        client.create("kept")
        batch = batches(1)[0]
        client.feedback("kept", digits[0][batch], digits[1][batch])
        before = described(client, "kept")
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as stalled:
            stalled.sendall(b"POST /v1/tenants/kept/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            described(client, "kept")  # answered after the other has arrived
            assert server.stop() == -signal.SIGTERM
        assert "Application shutdown complete" in server.text
    with started(tmp_path) as server, example["client"].Client(server.url) as client:
        assert described(client, "kept")["content_hash"] == before["content_hash"]


def test_names_that_are_no_text_are_refused(client):
    for name in ("%ff", "%fe", "%ed%a0%80"):
        for method, path in [("PUT", ""), ("GET", ""), ("POST", "/feedback")]:
            status, _, answer = client.request(method, f"/v1/tenants/{name}{path}")
            assert (status, answer) == (400, {"error": "the tenant must be UTF-8, percent-encoded, got other bytes"})


def test_wait_is_yes_or_no(client, digits):
    client.create("waiter")
    batch = body(digits[0][:1], digits[1][:1])
    status, _, answer = client.request("POST", "/v1/tenants/waiter/feedback?wait=true", batch)
    assert (status, answer) == (400, {"error": "wait must be 0 or 1, got 'true'"})
    assert client.request("POST", "/v1/tenants/waiter/feedback?wait=0", batch)[0] == 202
    assert client.request("POST", "/v1/tenants/waiter/feedback?wait=1", batch)[0] == 200


def test_damaged_file_is_the_logs_affair(example, tmp_path):
    with started(tmp_path) as server, example["client"].Client(server.url) as client:
        client.create("hurt")
        assert server.stop() == -signal.SIGTERM
    (saved,) = (tmp_path / "tenants").glob("*.safetensors")
    saved.write_bytes(saved.read_bytes()[:-1])
    with started(tmp_path) as server, example["client"].Client(server.url) as client:
        status, _, answer = client.request("GET", "/v1/tenants/hurt")
        assert (status, answer) == (500, {"error": "the server could not do this; its log says why"})
        assert server.said("FormatError")
        assert saved.name in server.text
        client.create("well")
        assert described(client, "well")["version"] == 1


def test_learner_whose_priority_may_not_change_learns(example, tmp_path, digits, monkeypatch):
    def refuse(*_):
        raise PermissionError("not here")

    monkeypatch.setattr(os, "setpriority", refuse)
    learner = example["learner"].Learner(tmp_path / "tenants", 2**26, 4)
    try:
        learner.create("a")
        learner.give_way()
        assert learner.submit("a", digits[0][:2], digits[1][:2].tolist()).result(DEADLINE).step == 0
    finally:
        learner.close()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--port", "70000"), "argument --port: must be from 0 to 65535, got 70000"),
        (("--save-seconds", "0"), "argument --save-seconds: must be above 0, got 0.0"),
        (("--save-seconds", "nan"), "argument --save-seconds: must be above 0, got nan"),
    ],
)
def test_option_that_breaks_its_rule_is_refused(example, tmp_path, capsys, option, message):
    with pytest.raises(SystemExit):
        example["app"].main([*option, "--folder", str(tmp_path / "none")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_what_was_saved_outlives_a_kill(example, tmp_path, digits):
    with started(tmp_path, "--save-seconds", 0.05) as server, example["client"].Client(server.url) as client:
        client.create("kept")
        for batch in batches(5):
            client.feedback("kept", digits[0][batch], digits[1][batch])
        before = described(client, "kept")
        deadline = time.monotonic() + DEADLINE
        while not (saved := list((tmp_path / "tenants").glob("*.safetensors"))) or steps_in(saved[0]) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    with started(tmp_path) as server, example["client"].Client(server.url) as client:
        after = described(client, "kept")
        assert (after["step"], after["content_hash"]) == (before["step"], before["content_hash"])
        assert after["version"] > 0


def steps_in(path):
    return load_checkpoint(path).trainer.total_steps()
