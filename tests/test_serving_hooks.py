"""vllm_hook against a real HTTP server on this machine that answers as vLLM does."""

import http.server
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from test_fork import in_child
from test_hold import until
from test_serving_publish_to import make_model
from training import same_bits

from cylora import ConfigError, InputError
from cylora.formats import load_peft
from cylora.serving import AdapterPublisher, vllm_hook


class Vllm:
    """What vLLM's server does with adapters: a name once, a path that must load, errors in JSON."""

    def __init__(self) -> None:
        self.loaded: dict[str, Path] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: list[tuple[int, bytes] | str] = []  # instead of vLLM's, from the first on
        self.served = threading.Event()
        self.go_on = threading.Event()
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests.append((self.path, body))
                owner.headers.append(dict(self.headers))
                answer = owner.answers.pop(0) if owner.answers else owner.answer(self.path, body)
                if answer == "hang":
                    owner.go_on.wait(60)
                    return
                if answer == "hang up":
                    return
                status, content = answer
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", f"{owner.url}/elsewhere")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(60)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        name = body["lora_name"]
        if path.endswith("/v1/load_lora_adapter"):
            if name in self.loaded and not body.get("load_inplace"):
                return error(
                    400, f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in"
                )
            self.loaded[name] = Path(body["lora_path"])
            load_peft(body["lora_path"])
            return 200, f"Success: LoRA adapter '{name}' added successfully.".encode()
        assert path.endswith("/v1/unload_lora_adapter")
        if name not in self.loaded:
            return error(404, f"The lora adapter '{name}' cannot be found.")
        del self.loaded[name]
        return 200, f"Success: LoRA adapter '{name}' removed successfully.".encode()


def error(status: int, message: str) -> tuple[int, bytes]:
    return status, json.dumps({"error": {"message": message, "type": "InvalidUserInput", "code": status}}).encode()


@pytest.fixture
def vllm() -> Iterator[Vllm]:
    with closing(Vllm()) as server:
        yield server


def announced(url: str, tmp_path: Path, **options: Any) -> AdapterPublisher:
    publisher = AdapterPublisher(make_model(), name="tenant")
    publisher.add_hook(vllm_hook(url, **options))
    publisher.publish_to(tmp_path)
    return publisher


def changed(publisher: AdapterPublisher) -> AdapterPublisher:
    publisher._adapters.flat.vector[...] += 1
    return publisher


# ------------------------------------------------------------------ loading


def test_the_server_loads_each_version_under_its_own_name_and_path(vllm: Vllm, tmp_path: Path) -> None:
    publisher = announced(vllm.url, tmp_path)
    first = publisher.latest
    path = changed(publisher).publish_to(tmp_path)
    assert publisher.last_hook_error is None
    names = [body["lora_name"] for _, body in vllm.requests]
    assert len(set(names)) == 2
    assert names[1] == path.name
    assert [where for where, _ in vllm.requests] == ["/v1/load_lora_adapter"] * 2
    assert vllm.requests[1][1] == {"lora_name": path.name, "lora_path": str(path)}
    assert vllm.headers[0]["Content-Type"] == "application/json"
    assert vllm.loaded == {name: tmp_path / name for name in names}
    assert same_bits(load_peft(vllm.loaded[names[0]]).flat.vector, first.vector)


def test_the_path_is_absolute(vllm: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    publisher = announced(vllm.url, Path())
    assert publisher.last_hook_error is None
    assert vllm.requests[0][1]["lora_path"] == str(next(tmp_path.glob("tenant@*")))


def test_versions_in_memory_alone_are_not_the_servers_concern(vllm: Vllm) -> None:
    publisher = AdapterPublisher(make_model())
    publisher.add_hook(vllm_hook(vllm.url))
    publisher.publish()
    publisher.rollback(1)
    assert vllm.requests == []
    assert publisher.last_hook_error is None


def test_a_path_before_v1_and_headers_are_sent(vllm: Vllm, tmp_path: Path) -> None:
    headers = {"Authorization": "Bearer secret"}
    publisher = announced(f"{vllm.url}/behind/a/proxy/", tmp_path, headers=headers)
    assert publisher.last_hook_error is None
    assert vllm.requests[0][0] == "/behind/a/proxy/v1/load_lora_adapter"
    assert vllm.headers[0]["Authorization"] == "Bearer secret"


def test_in_place_keeps_one_name_for_new_paths(vllm: Vllm, tmp_path: Path) -> None:
    publisher = announced(vllm.url, tmp_path, in_place=True)
    path = changed(publisher).publish_to(tmp_path)
    assert publisher.last_hook_error is None
    assert vllm.loaded == {"tenant": path}
    assert vllm.requests[1][1] == {"lora_name": "tenant", "lora_path": str(path), "load_inplace": True}


def test_a_version_that_the_server_has_already_is_no_error(vllm: Vllm, tmp_path: Path) -> None:
    publisher = announced(vllm.url, tmp_path)
    publisher.publish_to(tmp_path, version=1)
    assert publisher.last_hook_error is None
    assert len(vllm.requests) == 2
    assert len(vllm.loaded) == 1


# ------------------------------------------------------------------ unloading


def test_older_versions_are_unloaded_after_the_new_one_is_loaded(vllm: Vllm, tmp_path: Path) -> None:
    publisher = announced(vllm.url, tmp_path, keep=2)
    for _ in range(3):
        changed(publisher).publish_to(tmp_path)
    assert publisher.last_hook_error is None
    assert [name.partition("-")[0] for name in vllm.loaded] == ["tenant@v3", "tenant@v4"]
    actions = [(where[4:].partition("_")[0], body["lora_name"].partition("-")[0][7:]) for where, body in vllm.requests]
    assert actions == [
        ("load", "v1"), ("load", "v2"), ("load", "v3"), ("unload", "v1"), ("load", "v4"), ("unload", "v2"),
    ]  # fmt: skip


def test_a_version_that_comes_back_is_the_last_to_be_unloaded(vllm: Vllm, tmp_path: Path) -> None:
    publisher = announced(vllm.url, tmp_path, keep=2)
    changed(publisher).publish_to(tmp_path)
    publisher.publish_to(tmp_path, version=1)
    changed(publisher).publish_to(tmp_path)
    assert [name.partition("-")[0] for name in vllm.loaded] == ["tenant@v1", "tenant@v3"]


def test_what_is_gone_already_is_unloaded(vllm: Vllm, tmp_path: Path) -> None:
    publisher = announced(vllm.url, tmp_path, keep=1)
    vllm.loaded.clear()  # as after a restart
    changed(publisher).publish_to(tmp_path)
    assert publisher.last_hook_error is None
    assert [name.partition("-")[0] for name in vllm.loaded] == ["tenant@v2"]


def test_what_could_not_be_unloaded_is_tried_again_after_the_next_version(vllm: Vllm, tmp_path: Path) -> None:
    publisher = announced(vllm.url, tmp_path, keep=1)
    vllm.answers = [(200, b""), error(500, "the engine is busy")]
    changed(publisher).publish_to(tmp_path)
    assert publisher.last_hook_error.endswith("/v1/unload_lora_adapter must answer 200, got 500: 'the engine is busy'")
    changed(publisher).publish_to(tmp_path)
    assert publisher.last_hook_error is None
    unloaded = [body["lora_name"].partition("-")[0] for where, body in vllm.requests if "unload" in where]
    assert unloaded == ["tenant@v1", "tenant@v1", "tenant@v2"]


def test_one_hook_serves_several_publishers(vllm: Vllm, tmp_path: Path) -> None:
    hook = vllm_hook(vllm.url, keep=1)
    publishers = [AdapterPublisher(make_model(seed), name=f"tenant-{seed}") for seed in range(2)]
    for publisher in publishers:
        publisher.add_hook(hook)
    for _ in range(2):
        for publisher in publishers:
            changed(publisher).publish_to(tmp_path)
            assert publisher.last_hook_error is None
    assert sorted(name[: len("tenant-0@v2")] for name in vllm.loaded) == ["tenant-0@v2", "tenant-1@v2"]


def test_threads_that_publish_under_one_name_leave_the_last_versions_and_no_error(vllm: Vllm, tmp_path: Path) -> None:
    hook = vllm_hook(vllm.url, keep=2)
    publishers = [AdapterPublisher(make_model(seed), name="tenant") for seed in range(4)]

    def work(publisher: AdapterPublisher, root: Path) -> None:
        root.mkdir()
        for _ in range(10):
            changed(publisher).publish_to(root)

    threads = []
    for number, publisher in enumerate(publishers):
        publisher.add_hook(hook)
        threads.append(threading.Thread(target=work, args=(publisher, tmp_path / str(number))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [publisher.counters()["hook_errors"] for publisher in publishers] == [0] * 4
    told = [(where.partition("/v1/")[2].partition("_")[0], body["lora_name"]) for where, body in vllm.requests]
    loads = [name for action, name in told if action == "load"]
    assert len(set(loads)) == len(loads) == 40
    assert [name for action, name in told if action == "unload"] == loads[:-2]  # each once, oldest first
    assert list(vllm.loaded) == loads[-2:]


def test_threads_that_publish_under_different_names_do_not_wait_for_one_another(vllm: Vllm, tmp_path: Path) -> None:
    hook = vllm_hook(vllm.url, keep=1, timeout=60)
    vllm.answers = ["hang"]
    slow, quick = (AdapterPublisher(make_model(), name=name) for name in ("slow", "quick"))
    for publisher in (slow, quick):
        publisher.add_hook(hook)
    waiting = threading.Thread(target=slow.publish_to, args=(tmp_path,))
    waiting.start()
    until(lambda: vllm.requests)
    path = quick.publish_to(tmp_path)
    assert vllm.loaded == {path.name: path}
    vllm.go_on.set()
    waiting.join(60)
    assert quick.last_hook_error is None
    assert "RemoteDisconnected" in slow.last_hook_error


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_tells_the_server_though_another_thread_was_telling_it(vllm: Vllm, tmp_path: Path) -> None:
    publisher = AdapterPublisher(make_model(), name="tenant")
    publisher.add_hook(vllm_hook(vllm.url, timeout=60))
    vllm.answers = ["hang"]
    waiting = threading.Thread(target=publisher.publish_to, args=(tmp_path,))
    waiting.start()
    until(lambda: vllm.requests)

    def child() -> None:
        sys.settrace(None)  # coverage has a lock of its own, which another thread may have held at the fork
        publisher.publish_to(tmp_path)
        assert publisher.last_hook_error is None

    try:
        assert in_child(child) == 0
    finally:
        vllm.go_on.set()
        waiting.join(60)
    assert [name.partition("-")[0] for name in vllm.loaded] == ["tenant@v2"]


# ------------------------------------------------------------------ what goes wrong: the version stands


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (error(400, "Both 'lora_name' and 'lora_path' must be provided."), "400: \"Both 'lora_name' and"),
        ((400, b'{"object": "error", "message": "no such adapter"}'), "400: 'no such adapter'"),
        ((404, b'{"detail": "Not Found"}'), "404: 'Not Found'"),
        ((422, b'{"detail": [{"loc": ["body"]}]}'), "422: \"[{'loc': ['body']}]\""),
        ((500, b"Internal Server Error\nforged line"), r"500: 'Internal Server Error\nforged line'"),
        ((500, b"[1]"), "500: '[1]'"),
        ((500, b'{"error": "text", "why": 1}'), '500: \'{"error": "text", "why": 1}\''),
        ((500, b"\xff\x00"), r"500: '\ufffd\x00'"),
        ((503, b""), "503: ''"),
        ((302, b""), "302: ''"),
        ((204, b""), "204: ''"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_an_answer_that_is_not_200_is_an_error_with_the_servers_reason(
    answer: tuple[int, bytes], reason: str, vllm: Vllm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vllm.answers = [answer]
    publisher = announced(vllm.url, tmp_path)
    shown = publisher.last_hook_error.replace("\N{REPLACEMENT CHARACTER}", r"\ufffd")
    expected = f"version 1: PublishError: {vllm.url}/v1/load_lora_adapter must answer 200, got {reason}"
    assert shown.startswith(expected)
    assert len(vllm.requests) == 1  # no redirection is followed
    assert publisher.latest.version == 1
    assert f"hook vllm_hook('{vllm.url}') raised" in caplog.text
    assert len(list(tmp_path.glob("tenant@v1-*"))) == 1


def test_a_long_reason_is_cut(vllm: Vllm, tmp_path: Path) -> None:
    vllm.answers = [(500, b"x" * 1_000_000)]
    publisher = announced(vllm.url, tmp_path)
    assert publisher.last_hook_error.endswith("x" * 400)
    assert len(publisher.last_hook_error) < 700


def test_a_server_that_hangs_is_given_up_after_the_timeout(vllm: Vllm, tmp_path: Path) -> None:
    vllm.answers = ["hang"]
    publisher = announced(vllm.url, tmp_path, timeout=0.2)
    assert publisher.last_hook_error.endswith("/v1/load_lora_adapter must answer within 0.2 s, got no answer")
    assert publisher.latest.version == 1


def test_a_server_that_hangs_up_or_speaks_something_else_is_an_error(vllm: Vllm, tmp_path: Path) -> None:
    vllm.answers = ["hang up"]
    publisher = announced(vllm.url, tmp_path)
    assert "/v1/load_lora_adapter must answer, got RemoteDisconnected: " in publisher.last_hook_error
    vllm.answers = [(99, b"")]
    changed(publisher).publish_to(tmp_path)
    assert "must answer, got BadStatusLine: HTTP/1.0 99" in publisher.last_hook_error
    assert publisher.latest.version == 2


def test_a_server_that_is_not_there_is_an_error_and_the_next_version_is_loaded_when_it_is(
    vllm: Vllm, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        publisher = announced(f"http://127.0.0.1:{port}", tmp_path)
    refused = f"http://127.0.0.1:{port}/v1/load_lora_adapter must answer, got ConnectionRefusedError: "
    assert refused in publisher.last_hook_error
    publisher.add_hook(vllm_hook(vllm.url))
    publisher.publish_to(tmp_path, version=1)
    assert [name.partition("-")[0] for name in vllm.loaded] == ["tenant@v1"]
    assert publisher.counters()["hook_errors"] == 2


def test_https_is_spoken_to_a_server_that_has_it(vllm: Vllm, tmp_path: Path) -> None:
    publisher = announced(vllm.url.replace("http", "https"), tmp_path)
    assert "SSLError" in publisher.last_hook_error
    assert vllm.requests == []


def test_a_proxy_in_the_environment_is_not_used(vllm: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert announced(vllm.url, tmp_path).last_hook_error is None


# ------------------------------------------------------------------ what is refused at once


@pytest.mark.parametrize(
    "url",
    [
        "", "host", "host:8000", "file:///etc/passwd", "ftp://host", "http://", "http:///path", "http://user:word@host",
        "http://host?query", "http://host#part", "http://host:port", "http://host:99999", "http://[::1", "http://a b",
        "http://host\r\nX: y", "http://:80", None, b"http://host", Path("http://host"),
    ],
)  # fmt: skip
def test_a_wrong_url_is_refused(url: Any) -> None:
    with pytest.raises(InputError, match=re.escape(f", without user, query or fragment, got {url!r}")) as caught:
        vllm_hook(url)
    assert str(caught.value).startswith("url must be http://host[:port][/path] or https://...")


@pytest.mark.parametrize("url", ["http://host", "HTTPS://host:1/", "http://[::1]:8000/a/b", "http://127.0.0.1"])
def test_a_good_url_is_taken(url: str) -> None:
    assert repr(vllm_hook(url)) == f"vllm_hook({url.rstrip('/')!r})"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, r"keep \(if not None\) must be an integer >= 1, got 0"),
        ({"keep": 1, "in_place": True}, "keep must be None with in_place=True, which loads one name, got 1"),
        ({"timeout": 0}, "timeout must be > 0, got 0"),
        ({"timeout": float("inf")}, "timeout must be > 0, got inf"),
        ({"timeout": None}, "timeout must be > 0, got None"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vllm_hook("http://host", **options)
