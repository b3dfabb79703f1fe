"""The server as replicas of Ray Serve, on one or many machines. It needs ``pip install 'voxkern[ray]'``.

::

    export VOXKERN_API_KEY=...
    serve run voxkern.serve.ray_app:app model=mistralai/Voxtral-4B-TTS-2603 replicas=2 gpus=1

Each replica is one process with one model, and runs the application of ``voxkern serve``. A WebSocket stays on its
replica. If a replica dies, its requests end with an error, and Ray starts a new replica.
"""

import os
from dataclasses import fields
from typing import Any

import torch
from ray import serve
from starlette.applications import Starlette

from .app import load_app
from .settings import ServeSettings, settings_for

# Arguments of `app` and their types. The values of `serve run` are text.
SCALING: dict[str, type] = {"replicas": int, "max_replicas": int, "cpus": float, "gpus": float}
LOADING: dict[str, type] = {
    "max_batch": int, "cache_tokens": int, "device": str, "dtype": str, "backend": str, "quantize": str,
}  # fmt: skip
LIMITS: dict[str, type] = {
    one.name: type(one.default) for one in fields(ServeSettings) if isinstance(one.default, float | int)
}


def app(arguments: dict[str, str]) -> serve.Application:
    """Return the application for ``serve run voxkern.serve.ray_app:app NAME=VALUE ..``.

    The API key of all replicas is the variable ``VOXKERN_API_KEY`` of the process that runs this function.

    Args:
        arguments: each is optional:

            - `model`: a checkpoint folder or hub id that every machine can read; the default is the demo voice;
            - `replicas`: their number (1); `max_replicas`: the number to which they may grow under load;
            - `cpus` (1) and `gpus` (0): those of each replica;
            - arguments of :func:`voxkern.load`, such as `max_batch` (32);
            - the limits of each replica, as for ``voxkern serve``;
            - `no_api_key`: "true" if no key is needed, although Ray may listen beyond this machine.

    Raises:
        ValueError: an argument is unknown, or has a value of a wrong type; or no key is set.
    """
    api_key = os.environ.get("VOXKERN_API_KEY", "").strip() or None
    if api_key is None and arguments.get("no_api_key") != "true":
        raise ValueError("set a key in VOXKERN_API_KEY, or give no_api_key=true: Ray may listen beyond this machine")
    model = arguments.get("model")
    known = SCALING | LOADING | LIMITS
    given = {name: text for name, text in arguments.items() if name not in ("model", "no_api_key")}
    values = {name: _value(name, text, known) for name, text in given.items()}
    loading: dict[str, Any] = {"max_batch": 32} | {name: values[name] for name in LOADING if name in values}
    limits = {name: values[name] for name in LIMITS if name in values}
    settings = settings_for(model, api_key=api_key, **limits)
    n_cpus = values.get("cpus", 1.0)

    def build() -> Starlette:
        """Load the model in a replica, and return the replica's application."""
        torch.set_num_threads(max(1, int(n_cpus)))
        return load_app(model, settings, **loading)

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="voxkern",
        ray_actor_options={"num_cpus": n_cpus, "num_gpus": values.get("gpus", 0.0)},
        graceful_shutdown_timeout_s=settings.shutdown_seconds,
        # more than a replica accepts, so that a full replica answers with 429, and Ray does not keep a queue
        max_ongoing_requests=loading["max_batch"] + settings.max_waiting + settings.max_sessions + 16,
        **_scaling(values, loading["max_batch"]),
    )
    return deployment.bind()


def _scaling(values: dict[str, Any], max_batch: int) -> dict[str, Any]:
    n_replicas = values.get("replicas", 1)
    if "max_replicas" not in values:
        return {"num_replicas": n_replicas}
    sizes = {"min_replicas": n_replicas, "max_replicas": values["max_replicas"]}
    return {"autoscaling_config": sizes | {"target_ongoing_requests": max_batch}}


def _value(name: str, text: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise ValueError(f"{name!r} is not an argument: the arguments are model, no_api_key, {', '.join(known)}")
    try:
        return known[name](text)
    except ValueError:
        raise ValueError(f"{name} must be of type {known[name].__name__}, got {text!r}") from None
