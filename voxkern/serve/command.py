"""The command ``voxkern serve``."""

import ipaddress
from typing import Annotated

import torch
import typer

from ..plain_errors import err, plain_errors
from .settings import ServeSettings, settings_for

DEFAULT = ServeSettings(())


def serve(
    model: Annotated[str | None, typer.Option(help="Checkpoint folder or hub id; default: the demo voice.")] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="Name of the model in requests, several times if need be; default: --model's last part."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.", min=0, max=65535)] = 8000,
    max_batch: Annotated[int, typer.Option(help="Requests that run side by side.")] = 32,
    cache_tokens: Annotated[int | None, typer.Option(help="Tokens of the KV cache, as for load().")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU if torch finds one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; default: the checkpoint's.")] = None,
    backend: Annotated[str, typer.Option(help="auto, triton, packed or torch, as for load().")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="int8 or fp8, as for load().")] = None,
    overlap: Annotated[bool, typer.Option("--overlap", help="As for load(overlap=True).")] = False,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of the model; default: torch's number less one, for connections.", min=1),
    ] = None,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more get status 429.", min=0)] = (
        DEFAULT.max_waiting
    ),
    max_chars: Annotated[int, typer.Option(help="Most characters of a text.", min=1)] = DEFAULT.max_chars,
    max_body: Annotated[int, typer.Option(help="Most bytes of a request's body.", min=1)] = DEFAULT.max_body,
    body_seconds: Annotated[float, typer.Option(help="Most seconds for a body.", min=0.1)] = DEFAULT.body_seconds,
    request_seconds: Annotated[
        float, typer.Option(help="Most seconds for a whole request.", min=0.1)
    ] = DEFAULT.request_seconds,
    max_sessions: Annotated[int, typer.Option(help="WebSocket sessions that may be open.", min=0)] = (
        DEFAULT.max_sessions
    ),
    idle_seconds: Annotated[
        float, typer.Option(help="Seconds after which an idle session ends.", min=0.1)
    ] = DEFAULT.idle_seconds,
    shutdown_seconds: Annotated[
        float, typer.Option(help="Seconds that running requests may take after SIGTERM.", min=1)
    ] = DEFAULT.shutdown_seconds,
    api_key: Annotated[
        str | None, typer.Option(envvar="VOXKERN_API_KEY", help="Key that requests to /v1 must have.")
    ] = None,
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="Allow a --host that other machines can reach without a key.")
    ] = False,
) -> None:
    """Serve a model through OpenAI's speech API: POST /v1/audio/speech.

    SIGTERM ends the server: running requests are completed, new ones are refused, and the exit status is 0.
    """
    with plain_errors():
        _check(host, api_key, no_api_key)
        settings = settings_for(
            model,
            name or (),
            max_waiting=max_waiting,
            max_chars=max_chars,
            max_body=max_body,
            body_seconds=body_seconds,
            request_seconds=request_seconds,
            shutdown_seconds=shutdown_seconds,
            max_sessions=max_sessions,
            idle_seconds=idle_seconds,
            api_key=api_key,
        )
        try:
            from .app import load_app
            from .server import make_server
        except ModuleNotFoundError as error:
            raise ValueError(
                f"voxkern serve needs {error.name}, which is not installed: pip install 'voxkern[serve]', or "
                "'.[serve]' in a clone"
            ) from None
        # torch's threads wait for the slowest one, so leave one core for connections
        torch.set_num_threads(threads or max(1, torch.get_num_threads() - 1))
        with err.status("loading"):
            app = load_app(
                model,
                settings,
                device=device,
                dtype=dtype,
                backend=backend,
                max_batch=max_batch,
                cache_tokens=cache_tokens,
                quantize=quantize,
                overlap=overlap,
            )
        server = make_server(app, host, port)
    server.run()


def _check(host: str, api_key: str | None, no_api_key: bool) -> None:
    """Raise a ValueError if other machines could send requests without a key."""
    if api_key is not None and not api_key.strip():
        raise ValueError("--api-key is empty")
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # the name of a machine
        local = False
    if not (local or api_key or no_api_key):
        raise ValueError(
            f"--host {host} lets other machines send requests: set a key in VOXKERN_API_KEY, or give --no-api-key"
        )
