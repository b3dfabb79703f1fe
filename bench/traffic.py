"""The fewest bytes that a call of an operator can move: arguments and results once, but what it leaves alone.

Bytes per second are of these. What a kernel moves beyond them is counted in the interpreter (``bench/counters.py``).
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from bench.registry import Entry, listed

Args = Mapping[str, Any]


def fewest_bytes(entry: Entry, args: Args) -> int:
    """Of one call with these arguments."""
    made = entry.op.declare(**args)
    results = [made] if isinstance(made, Tensor) else list(made or ())
    parts = {name: arg for name, arg in args.items() if isinstance(arg, Tensor)}
    left = {name: elements(args) for name, elements in PARTLY.get(entry.name, {}).items()}
    sizes = [left.get(name, arg.numel()) * arg.element_size() for name, arg in parts.items()]
    return sum(sizes) + sum(_bytes(one) for one in (*listed(args), *results))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _read_cache(args: Args) -> int:
    """Keys and values of the tokens that are there; the caches of the registry have other pages among them."""
    _, _, HKV, _, D = args["kv_cache"].shape
    return int(args["lengths"].sum() * 2 * HKV * D)


def _written_cache(rows: str) -> Callable[[Args], int]:
    """Keys and values of a token a row."""
    return lambda args: len(args[rows]) * 2 * args["kv_cache"].shape[2] * args["kv_cache"].shape[4]


def _embedded(args: Args) -> int:
    """A row of embeddings a codebook."""
    return len(args["semantic"]) * (1 + len(args["w_out"])) * int(args["embeddings"].shape[1])


def _codes(args: Args) -> int:
    return int(args["codes"].shape[0] * args["codes"].shape[2])


# operators that read or write a part of an argument: elements of it that they cannot do without
PARTLY: dict[str, dict[str, Callable[[Args], int]]] = {
    "paged_attention": {"kv_cache": _read_cache},
    "prefill_attention": {"kv_cache": _read_cache},
    "norm_qkv_append": {"kv_cache": _written_cache("x")},
    "rope_append": {"kv_cache": _written_cache("qkv")},
    "flow_start": {"quantiles": lambda args: 0},
    "mlp_start": {"quantiles": lambda args: 0},
    "flow_finish": {"embeddings": _embedded},
    "mlp_finish": {"embeddings": _embedded},
    "semantic_argmax": {"weight": lambda args: args["n_codes"] * int(args["weight"].shape[1])},
    "codec_dequantise": {
        "embedding_sum": lambda args: _codes(args) * int(args["embedding_sum"].shape[1]),
        "cluster_usage": _codes,
    },
}
