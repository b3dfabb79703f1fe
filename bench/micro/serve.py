"""Time ``voxkern serve`` with the demo voice and many clients at once: ``python -m bench serve``.

The server runs in a process of its own, on this machine. Each client sends one text after the other over one connection
to 127.0.0.1, and reads the sound as pcm. The received bytes are compared with those of ``generate`` with the same seed.
Clients and server share the processors: the model has one thread less than torch takes by default.
"""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import torch

from bench.command_line import parser_of
from bench.results import FILE, ResultRow, store, with_provenance
from voxkern import load

COMMAND = "python -m bench serve"
SERVER = "voxkern serve"
CLIENTS, REPLICA_CLIENTS = (1, 8, 32, 128), 32
TEXTS = ("seven three one", "good evening", "four six", "nine nine two five", "monday", "two zero", "eight", "one two")
MAX_BATCH, WAITING = 32, 128
BYTES_A_SECOND = 48_000  # of sound: 24 kHz, 16 bits
LEAST_REQUESTS = 32  # a few clients send several texts each, so that the percentiles mean something


@dataclass(frozen=True)
class Received:
    """What a client received for one text.

    Attributes:
        status: the HTTP status.
        first: seconds from the request to its first byte of sound.
        received: number of bytes that arrived.
        expected: number of bytes of the whole sound.
        is_equal: whether the bytes are those of ``generate``.
    """

    status: int
    first: float
    received: int
    expected: int
    is_equal: bool


@contextlib.contextmanager
def running_server(*flags: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run ``voxkern serve`` on a free port until the ``with`` block ends; yield its process and its address.

    Args:
        flags: flags of the command.
        variables: environment variables of the process.
    """
    command = [sys.executable, "-c", "from voxkern.cli import app; app()", "serve", "--port", "0", *flags]
    with subprocess.Popen(
        command, env=os.environ | variables, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        try:
            lines = (line for line in process.stderr if "running on http" in line)
            if (line := next(lines, None)) is None:
                raise RuntimeError("the server ended before it listened")
            yield process, line.split("running on ")[1].split()[0]
        finally:
            process.terminate()
            process.communicate()


async def post(client: httpx.AsyncClient, text: str, seed: int, expected: bytes) -> Received:
    """Send one text, and return what arrived."""
    body = {"input": text, "seed": seed, "response_format": "pcm"}
    start, first, received = time.perf_counter(), float("nan"), b""
    async with client.stream("POST", "/v1/audio/speech", json=body) as response:
        with contextlib.suppress(httpx.RemoteProtocolError):  # a body without an end
            async for part in response.aiter_bytes():
                if not received:
                    first = time.perf_counter() - start
                received += part
    return Received(response.status_code, first, len(received), len(expected), received == expected)


async def post_all(address: str, n_clients: int, expected: Sequence[bytes]) -> tuple[list[Received], float]:
    """Let all clients send their texts at once; return what they received, and the seconds of all together."""
    limits = httpx.Limits(max_connections=n_clients)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=600) as client:

        async def one_client(index: int) -> list[Received]:
            own = range(index, max(n_clients, LEAST_REQUESTS), n_clients)
            return [await post(client, TEXTS[i % len(TEXTS)], i % len(TEXTS), expected[i % len(TEXTS)]) for i in own]

        start = time.perf_counter()
        answers = await asyncio.gather(*map(one_client, range(n_clients)))
        return [answer for own in answers for answer in own], time.perf_counter() - start


@contextlib.contextmanager
def running_replicas(n: int, **arguments: object) -> Iterator[str]:
    """Run replicas of the server on Ray Serve until the ``with`` block ends, and yield their address.

    Args:
        n: number of replicas.
        arguments: further arguments of :func:`voxkern.serve.ray_app.app`.
    """
    import ray  # optional
    from ray import serve

    from voxkern.serve.ray_app import app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=n + 1, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        arguments |= {"replicas": n, "no_api_key": "true"}
        serve.run(app({name: str(value) for name, value in arguments.items()}))
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


def measured(address: str, server: str, n_clients: int, expected: Sequence[bytes]) -> list[ResultRow]:
    """Let clients send their texts, and return the rows; `server` is the rows' subject."""
    answers, seconds = asyncio.run(post_all(address, n_clients, expected))
    first = [answer.first for answer in answers if answer.status == 200]
    figures = {
        "requests": (len(answers), "requests"),
        "first sound, p50": (float(np.percentile(first, 50)), "s"),
        "first sound, p95": (float(np.percentile(first, 95)), "s"),
        "sound": (sum(answer.received for answer in answers) / BYTES_A_SECOND / seconds, "s/s"),
        "failures": (sum(answer.status != 200 or not answer.is_equal for answer in answers), "requests"),
        "bytes lost": (sum(max(0, answer.expected - answer.received) for answer in answers), "B"),
    }
    shape, command = f"{n_clients} clients", COMMAND if server == SERVER else f"{COMMAND} --ray"
    return [
        ResultRow("serve", server, metric, value, unit, "measured", command, "torch", shape)
        for metric, (value, unit) in figures.items()
    ]


def expected_sounds(n_threads: int) -> list[bytes]:
    """Return the sounds of :data:`TEXTS`, with as many threads as a server takes."""
    torch.set_num_threads(n_threads)
    audios = load(max_batch=MAX_BATCH).generate(list(TEXTS), seed=list(range(len(TEXTS))))
    return [audio.pcm16() for audio in audios]


def rows() -> list[ResultRow]:
    """Measure each number of clients, and return the rows."""
    expected, found = expected_sounds(max(1, torch.get_num_threads() - 1)), []
    with running_server("--max-batch", str(MAX_BATCH), "--max-waiting", str(WAITING)) as (_, address):
        for n_clients in CLIENTS:
            found += measured(address, SERVER, n_clients, expected)
    return found


def replica_rows() -> list[ResultRow]:
    """Measure one and two replicas on this machine, each with one thread, and return the rows."""
    expected, found = expected_sounds(1), []
    for n in (1, 2):
        with running_replicas(n, max_batch=MAX_BATCH, max_waiting=WAITING) as address:
            measured(address, "warm-up", REPLICA_CLIENTS, expected)
            found += measured(address, f"Ray Serve, replicas: {n}", REPLICA_CLIENTS, expected)
    return found


def main(arguments: Sequence[str]) -> int:
    """Print a line for each figure, and write the rows if ``--csv`` is given."""
    parser = parser_of("serve", __doc__)
    parser.add_argument("--ray", action="store_true", help="measure replicas on Ray Serve instead")
    parser.add_argument(
        "--csv", type=Path, nargs="?", const=FILE, metavar="FILE", help=f"store the rows in FILE, or in {FILE.name}"
    )
    args = parser.parse_args(arguments)
    found = with_provenance(replica_rows() if args.ray else rows())
    for row in found:
        print(f"{row.subject}, {row.shape}: {row.metric} {row.value:.3g} {row.unit}")
    if args.csv:
        store(found, args.csv)
    return 0
