"""Hooks that tell a server in another process of a version that was published to a directory.

The one module of cylora that speaks to a network: to the address its caller gives, over HTTP or HTTPS, following no
redirection and reading no proxy from the environment. http.client does that; urllib.request would open files, too.
"""

import http.client
import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cylora import checks
from cylora.errors import ConfigError, InputError, PublishError
from cylora.serving.announcing import Hook
from cylora.serving.snapshot import AdapterSnapshot

__all__ = ["vllm_hook"]

URL = re.compile(r"https?://[^\s?#@]+", re.ASCII | re.IGNORECASE)
MOST_READ = 4096  # bytes of an answer: enough for a reason
CONNECTIONS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}


def vllm_hook(
    url: str,
    *,
    keep: int | None = None,
    in_place: bool = False,
    timeout: float = 10.0,
    headers: Mapping[str, str] | None = None,
) -> Hook:
    """Return a hook that has a vLLM server load each version which is published to a directory.

    It posts ``{"lora_name": "<name>@v<version>-<hash>", "lora_path": "<the directory>"}`` to ``/v1/load_lora_adapter``.
    The server, started with ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``, then serves the version under that name; it must
    see the directory under the same path. Versions that are published in memory alone are none of its concern.

    Parameters
    ----------
    url : str
        Where the server is: ``http://host:8000`` or ``https://...``, perhaps with a path before ``/v1``. No user and
        password in it, since it goes into messages: use ``headers``.
    keep : int >= 1, optional
        Afterwards unload all versions but the last so many that this hook had loaded. None: the server keeps all (it
        holds ``--max-cpu-loras`` in memory).
    in_place : bool
        Load each version in the place of the one before, under the name without version and hash. Clients then need not
        know the version's name, but what the server has cached by name, such as prefixes of prompts, is stale.
    timeout : float > 0, seconds
        For connecting and for each wait for an answer. Whoever publishes waits that long.
    headers : mapping of str to str, optional
        Besides: ``{"Authorization": "Bearer ..."}`` for a server started with ``--api-key``.

    Returns
    -------
    callable
        For `AdapterPublisher.add_hook`; one hook may serve several publishers, in any threads. Those of the same name
        take turns, so that none unloads what another is loading. It raises PublishError where the server cannot be
        reached or does not answer 200, with the server's reason. A version that it has already, or one to be unloaded
        that it has no more, is no error.

    Raises
    ------
    InputError, ConfigError   If an argument breaks its rule.
    """
    return _VllmHook(url, keep, in_place, timeout, headers)


class _VllmHook:
    """The hook; a class so that its name in a log says which server."""

    def __init__(
        self, url: str, keep: int | None, in_place: bool, timeout: float, headers: Mapping[str, str] | None
    ) -> None:
        rule = "url must be http://host[:port][/path] or https://..., without user, query or fragment"
        try:
            parts = urlsplit(url) if isinstance(url, str) and URL.fullmatch(url) else None
            host, port = (None, None) if parts is None else (parts.hostname, parts.port)
        except ValueError:  # a port that is no number, a bracket that does not close
            parts = host = None
        if parts is None or host is None:
            raise InputError(f"{rule}, got {url!r}")
        self._url, self._host, self._port = url.rstrip("/"), host, port
        self._connection, self._path = CONNECTIONS[parts.scheme], parts.path.rstrip("/")
        self._keep = None if keep is None else checks.integer("keep (if not None)", keep, 1)
        if in_place and keep is not None:
            raise ConfigError(f"keep must be None with in_place=True, which loads one name, got {keep}")
        self._in_place = in_place
        self._timeout = checks.real("timeout", timeout, "> 0", lambda x: 0 < x < 1e6)
        self._headers = {"Content-Type": "application/json"} | dict(headers or {})
        self._loaded: dict[str, list[str]] = {}  # by publisher's name: what was loaded, oldest first
        # By process and publisher's name: after a fork, who held one may not exist any more. Re-entrant: a signal
        # handler may publish.
        self._turns: dict[tuple[int, str], threading.RLock] = {}

    def __repr__(self) -> str:
        return f"vllm_hook({self._url!r})"

    def __call__(self, snapshot: AdapterSnapshot, path: Path | None) -> None:
        if path is None:
            return
        name = path.name.rpartition("@")[0]
        with self._turns.setdefault((os.getpid(), name), threading.RLock()):
            self._tell(name, path.name, str(path.absolute()))

    def _tell(self, name: str, full: str, folder: str) -> None:
        if self._in_place:
            self._post("load_lora_adapter", {"lora_name": name, "lora_path": folder, "load_inplace": True})
            return
        self._post("load_lora_adapter", {"lora_name": full, "lora_path": folder}, "already been loaded")
        loaded = self._loaded.setdefault(name, [])
        if full in loaded:  # an older version again: now it is the last
            loaded.remove(full)
        loaded.append(full)
        while self._keep is not None and len(loaded) > self._keep:
            self._post("unload_lora_adapter", {"lora_name": loaded[0]}, "cannot be found")
            del loaded[0]  # only now: what could not be unloaded is tried again after the next version

    def _post(self, action: str, content: dict[str, Any], harmless: str | None = None) -> None:
        """Post, and raise PublishError unless the answer is 200 or its reason has the words ``harmless`` in it."""
        place = f"{self._url}/v1/{action}"
        connection = self._connection(self._host, self._port, timeout=self._timeout)
        try:
            connection.request("POST", f"{self._path}/v1/{action}", json.dumps(content), self._headers)
            answer = connection.getresponse()
            reason = "" if answer.status == http.client.OK else _reason(answer.read1(MOST_READ))
        except TimeoutError:
            raise PublishError(f"{place} must answer within {self._timeout:g} s, got no answer") from None
        except (OSError, http.client.HTTPException) as error:
            raise PublishError(f"{place} must answer, got {type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if answer.status != http.client.OK and not (harmless and harmless in reason):
            raise PublishError(f"{place} must answer 200, got {answer.status}: {reason!r:.500}")


def _reason(body: bytes) -> str:
    """Return the server's words: vLLM's message, FastAPI's detail, or the body as it is."""
    text = body.decode(errors="replace")
    try:
        document = json.loads(text)
    except ValueError:
        return text
    if isinstance(document, dict):
        inner = document.get("error")
        for place in (inner if isinstance(inner, dict) else {}, document):
            for key in ("message", "detail"):
                if key in place:
                    return str(place[key])
    return text
