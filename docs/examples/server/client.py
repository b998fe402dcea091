"""Show that one tenant learns and another stays as it was: python docs/examples/server/client.py [URL].

Two customers send digits to the server of app.py. The scanner of the first turns every page by a quarter; after each
answer it posts what was really written. The second is content and posts nothing.
"""

import argparse
import http.client
import json
import re
import time
import urllib.parse
from importlib import resources
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cylora.tasks.digits import parse_digits

__all__ = ["Client", "digits", "main"]

URL = re.compile(r"http://[^\s/?#@]+/?", re.ASCII | re.IGNORECASE)
BATCH = 16  # images in a request, at most
ROUNDS, POSTS = 5, 40


class Client:
    """One connection to the server, kept open. Not for several threads at a time."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(*_address(url), timeout=60)

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], Any]:
        """Send ``body`` (a dict as JSON, all else as it is) and return status, headers and what was answered."""
        self._connection.request(method, path, json.dumps(body).encode() if isinstance(body, dict) else body)
        response = self._connection.getresponse()
        text = response.read().decode()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, json.loads(text) if "json" in headers["content-type"] else text

    def create(self, tenant: str) -> None:
        """Make a tenant, if it is not there yet."""
        self._wanted(self.request("PUT", f"/v1/tenants/{tenant}"))

    def predict(self, tenant: str, images: NDArray[np.float32]) -> list[int]:
        """Return the digits that the server reads for this tenant."""
        digits: list[int] = self._wanted(
            self.request("POST", f"/v1/tenants/{tenant}/predict", {"images": images.tolist()})
        )["digits"]
        return digits

    def feedback(self, tenant: str, images: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, Any]:
        """Post what was really written, wait until it is learned, and return the step's record.

        A server that is busy says when to try again.
        """
        body = {"images": images.tolist(), "labels": labels.tolist()}
        while True:
            status, headers, answer = self.request("POST", f"/v1/tenants/{tenant}/feedback?wait=1", body)
            if status != http.HTTPStatus.TOO_MANY_REQUESTS:
                learned: dict[str, Any] = self._wanted((status, headers, answer))
                return learned
            time.sleep(float(headers["retry-after"]))

    def accuracy(self, tenant: str, images: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
        """Return the share of ``images`` that the server reads rightly for this tenant."""
        right = 0
        for start in range(0, len(images), BATCH):
            read = self.predict(tenant, images[start : start + BATCH])
            right += int((np.array(read) == labels[start : start + BATCH]).sum())
        return right / len(images)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _wanted(self, answered: tuple[int, dict[str, str], Any]) -> Any:
        status, _, answer = answered
        if status >= http.HTTPStatus.BAD_REQUEST:
            raise RuntimeError(f"the server answered {status}: {answer['error']}")
        return answer


def _address(url: str) -> tuple[str, int]:
    """Return host and port, or raise ValueError."""
    try:
        place = urllib.parse.urlsplit(url if URL.fullmatch(url) else "")
        if place.hostname:
            return place.hostname, place.port or http.client.HTTP_PORT
    except ValueError:  # a port that is no number, a bracket that does not close
        pass
    raise ValueError(f"url must be http://host[:port], got {url!r}")


def digits() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Return 1,797 digits as (n, 64) upright and turned by a quarter, and what they are."""
    text = resources.files("cylora.tasks").joinpath("data", "digits.txt").read_text(encoding="ascii")
    images, labels = parse_digits(text)
    turned = np.rot90(images, axes=(1, 2))
    return images.reshape(len(images), -1), turned.reshape(len(images), -1), labels


def main(argv: list[str] | None = None) -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000", metavar="URL")
    options = parser.parse_args(argv)
    try:
        client = Client(options.url)
    except ValueError as error:
        parser.error(str(error))
    upright, turned, labels = digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))
    tested, taught = order[:160], order[160:]  # the accuracies are on images that nobody taught the server
    with client:
        client.create("turning")
        client.create("content")
        print("feedbacks   turning   content")
        for number in range(ROUNDS + 1):
            shares = (
                client.accuracy("turning", turned[tested], labels[tested]),
                client.accuracy("content", upright[tested], labels[tested]),
            )
            print(f"{number * POSTS:9}   {shares[0]:6.1%}   {shares[1]:7.1%}")
            for _ in range(POSTS if number < ROUNDS else 0):
                batch = rng.choice(taught, BATCH)
                client.feedback("turning", turned[batch], labels[batch])


if __name__ == "__main__":
    main()
