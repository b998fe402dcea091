"""Serve a digit reader with adapters of its own for each tenant, and learn from what tenants correct.

``python docs/examples/server/app.py`` serves at http://127.0.0.1:8000 until SIGTERM or Ctrl-C. README.md lists the
routes.

Requests are answered in the event loop, from published snapshots. What takes longer than an answer does not happen
there: one thread computes the gradients of corrections, one reads and writes files, one steps.
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

import uvicorn
from bodies import MAX_BYTES, BodyError, batch_of
from learner import Learner, adapters_of
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from cylora import CyloraError, InputError, StoreError
from cylora.serving import AdapterSnapshot

__all__ = ["Service", "application", "be_prompt", "main"]

logger = logging.getLogger("uvicorn.error")  # the server's own
_Result = TypeVar("_Result")
STOP_SECONDS = 10  # that a client may take for the rest of its request once the server is told to stop
RETRY_SECONDS = 1  # a queue of a thousand steps is empty much sooner
SWITCH_SECONDS = 1e-3  # shorter costs more: the event loop, too, has to give the GIL away so often (bench/serving.py)
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Service:
    """The routes, and the threads that work for them."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self._gradients = ThreadPoolExecutor(1, "gradients", initializer=learner.give_way)
        self._files = ThreadPoolExecutor(1, "files")
        self._computing = 0  # corrections whose gradients are not there yet; of the event loop alone

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/v1/tenants/{tenant}", self.create, methods=["PUT"]),
            Route("/v1/tenants/{tenant}", self.describe, methods=["GET"]),
            Route("/v1/tenants/{tenant}/predict", self.predict, methods=["POST"]),
            Route("/v1/tenants/{tenant}/feedback", self.feedback, methods=["POST"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/healthz", self.health, methods=["GET"]),
        ]

    async def create(self, request: Request) -> Response:
        """Make a tenant; it is no error if it is there."""
        tenant = tenant_of(request)
        is_new = await self._beside(self._files, self.learner.create, tenant)
        return JSONResponse({"tenant": tenant, "created": is_new}, 201 if is_new else 200)

    async def describe(self, request: Request) -> Response:
        """Say which version of a tenant is being served."""
        snapshot = await self._served(request)
        return JSONResponse({"version": snapshot.version, "step": snapshot.step, "content_hash": snapshot.content_hash})

    async def predict(self, request: Request) -> Response:
        """Read the digits in some images."""
        snapshot = await self._served(request)
        images, _ = batch_of(await body_of(request), with_labels=False)
        digits = self.learner.reader.predict(adapters_of(snapshot), images)
        return JSONResponse({"digits": digits, "version": snapshot.version})

    async def feedback(self, request: Request) -> Response:
        """Take what was really in some images. With ``?wait=1`` answer when it is learned, else when it is queued."""
        tenant = tenant_of(request)
        waits = request.query_params.get("wait", "0")
        if waits not in ("0", "1"):
            raise HTTPException(400, f"wait must be 0 or 1, got {waits!r}")
        await self._served(request)
        images, labels = batch_of(await body_of(request), with_labels=True)
        if self._computing >= self.learner.queue_size:
            raise busy()
        self._computing += 1
        try:
            ticket = await self._beside(self._gradients, self.learner.submit, tenant, images, labels)
        except TimeoutError:
            raise busy() from None
        finally:
            self._computing -= 1
        if waits == "0":
            return JSONResponse({"queued": len(labels)}, 202)
        record = await asyncio.wrap_future(ticket)
        snapshot = await self._beside(self._files, self.learner.published, tenant, record.step)
        return JSONResponse({**record.to_dict(), "version": snapshot.version})

    async def metrics(self, request: Request) -> Response:
        """Answer Prometheus."""
        return PlainTextResponse(self.learner.metrics.text(), media_type=METRICS_TYPE)

    async def health(self, request: Request) -> Response:
        """Say that the server answers."""
        return JSONResponse({"status": "ok", **self.learner.metrics.values()})

    # ------------------------------------------------------------------ parts

    async def _served(self, request: Request) -> AdapterSnapshot:
        """Return what to serve the request's tenant from, without waiting for any step."""
        tenant = tenant_of(request)
        if tenant not in self.learner.store:
            raise HTTPException(404, f"tenant must be one that was created, by PUT /v1/tenants/NAME, got {tenant!r}")
        snapshot = self.learner.store.latest(tenant)
        return await self._beside(self._files, self.learner.restored, tenant) if snapshot is None else snapshot

    async def _beside(self, pool: ThreadPoolExecutor, function: Callable[..., _Result], *arguments: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(pool, partial(function, *arguments))

    async def save_regularly(self, seconds: float) -> None:
        """Write what was learned to disk every so often, so that no kill takes more than that."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await asyncio.to_thread(self.learner.store.flush)
            except StoreError:  # a full disk, say: everything stays in memory, and the next time may go well
                logger.exception("some tenants could not be saved")

    def close(self) -> None:
        """Let the threads finish what they have, learn all that is queued, and write every tenant to disk."""
        self._gradients.shutdown()
        self._files.shutdown()
        self.learner.close()


def tenant_of(request: Request) -> str:
    """Return the tenant that the path names; what is no UTF-8 would else become the same characters for many."""
    try:
        unquote_to_bytes(request.scope["raw_path"]).decode()
    except UnicodeDecodeError:
        raise HTTPException(400, "the tenant must be UTF-8, percent-encoded, got other bytes") from None
    return str(request.path_params["tenant"])


async def body_of(request: Request) -> bytes:
    """Return the request's body; as soon as it is too long, refuse it."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f"the body must have at most {MAX_BYTES} bytes, got more")
    return bytes(body)


def busy() -> HTTPException:
    """Return what a client gets while the queue is full."""
    message = "the queue of feedback is full; nothing of this one was taken"
    return HTTPException(429, message, {"Retry-After": str(RETRY_SECONDS)})


def refused(request: Request, error: Exception) -> Response:
    """Answer as all errors are answered: ``{"error": message}``."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)  # which nobody will read
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    if isinstance(error, (BodyError, InputError)):
        return JSONResponse({"error": str(error)}, 400)
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)  # a damaged file, a full disk
    return JSONResponse({"error": "the server could not do this; its log says why"}, 500)


def application(learner: Learner, save_seconds: float) -> Starlette:
    """Return the application around a learner, which it closes when it is stopped."""
    service = Service(learner)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        saving = asyncio.create_task(service.save_regularly(save_seconds))
        with contextlib.closing(service):
            yield
            saving.cancel()

    handlers = dict.fromkeys((HTTPException, ClientDisconnect, BodyError, CyloraError, OSError), refused)
    return Starlette(routes=service.routes(), exception_handlers=handlers, lifespan=lifespan)


def be_prompt() -> None:
    """Let no thread keep the others for long."""
    # Steps run without the GIL, but the Python around them holds it, for at most so long once the event loop wants it.
    # Python's own 5 ms are ten answers' time.
    sys.setswitchinterval(SWITCH_SECONDS)
    # A full collection looks at all objects there are, for 20 ms, and learning makes enough of them for several each
    # second. What is there now stays, and need not be looked at again.
    gc.collect()
    gc.freeze()


def main(argv: list[str] | None = None) -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free")
    parser.add_argument("--folder", type=Path, default=Path("tenants"), help="where the tenants are kept")
    parser.add_argument("--memory-mib", type=int, default=256, metavar="MIB", help="for the tenants in memory")
    parser.add_argument("--queue-size", type=int, default=1024, metavar="N", help="feedbacks that may wait")
    parser.add_argument("--save-seconds", type=float, default=30.0, metavar="S", help="from one save to the next")
    parser.add_argument(
        "--learner-cpus", type=int, nargs="+", metavar="N", help="learn on these CPUs and serve on the others"
    )
    options = parser.parse_args(argv)
    if not 0 <= options.port <= 65535:
        parser.error(f"argument --port: must be from 0 to 65535, got {options.port}")
    if not 0 < options.save_seconds < float("inf"):
        parser.error(f"argument --save-seconds: must be above 0, got {options.save_seconds}")
    try:
        learner = Learner(options.folder, options.memory_mib * 2**20, options.queue_size, cpus=options.learner_cpus)
    except (CyloraError, OSError) as error:
        parser.error(str(error))
    be_prompt()
    if options.learner_cpus and (others := os.sched_getaffinity(0) - {*options.learner_cpus}):
        os.sched_setaffinity(0, others)
    app = application(learner, options.save_seconds)
    where = {"host": options.host, "port": options.port}
    uvicorn.run(app, **where, access_log=False, ws="none", timeout_graceful_shutdown=STOP_SECONDS)


if __name__ == "__main__":
    main()
