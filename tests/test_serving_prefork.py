"""A pre-fork server: gunicorn loads the application, which trains with two threads, and forks; its children go on."""

import http.client
import json
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served import DEADLINE, served
from worker_preforked import STEPS_IN_PARENT, Training

HERE = Path(__file__).parent
WORKERS = 2
REQUESTS = 24


def answer(url: str) -> dict:
    place = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=DEADLINE)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    assert response.status == 200, body
    return json.loads(body)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the children answered, and who loaded the application."""
    folder = tmp_path_factory.mktemp("gunicorn")
    command = ("-m", "gunicorn", "--preload", "--workers", WORKERS, "--bind", "127.0.0.1:0", "--timeout", DEADLINE)
    command += ("--no-control-socket", "--pythonpath", HERE, "worker_preforked:loaded()")
    with served(folder / "log", *command) as server, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(answer, [server.url] * REQUESTS))
        parent = server.process.pid
        assert server.stop() == 0, server.text
        assert "WORKER TIMEOUT" not in server.text
    return parent, found


def test_children_of_a_preforking_server_go_on_to_the_bits_of_a_process_that_never_forked(answers):
    """Every request is answered, so nothing hung; the twin steps with one thread."""
    _, found = answers
    twin = Training(threads=1)
    expected = dict(twin.step() for _ in range(STEPS_IN_PARENT + REQUESTS))
    assert len(found) == REQUESTS
    assert all(one["fingerprint"] == expected[one["steps"]] for one in found)


def test_children_begin_where_the_parent_was_and_share_nothing_afterwards(answers):
    parent, found = answers
    assert {one["loaded_in"] for one in found} == {parent}
    children = {one["process"] for one in found}
    assert parent not in children
    assert all(one["helpers_at_the_fork"] >= 1 and one["helpers"] >= 1 for one in found), "two threads were not used"
    assert 1 <= len(children) <= WORKERS
    for child in children:
        steps = sorted(one["steps"] for one in found if one["process"] == child)
        assert steps == list(range(STEPS_IN_PARENT + 1, STEPS_IN_PARENT + 1 + len(steps)))
