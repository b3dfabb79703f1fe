"""The fewest bytes that a call of an operator can move: each argument and result once, without parts that are not used.

Bytes per second are computed from these bytes. ``bench/counters.py`` counts in the interpreter the bytes that a kernel
really moves.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from bench.registry import Entry, listed

Args = Mapping[str, Any]


def fewest_bytes(entry: Entry, args: Args) -> int:
    """Return the fewest bytes that one call of the operator `entry` with these arguments can move."""
    made = entry.op.declare(**args)
    results = [made] if isinstance(made, Tensor) else list(made or ())
    parts = {name: arg for name, arg in args.items() if isinstance(arg, Tensor)}
    left = {name: elements(args) for name, elements in PARTLY.get(entry.name, {}).items()}
    sizes = [left.get(name, arg.numel()) * arg.element_size() for name, arg in parts.items()]
    return sum(sizes) + sum(_bytes(one) for one in (*listed(args), *results))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _read_cache(args: Args) -> int:
    """Return the number of elements in the requests' keys and values. The registry's caches also have unused pages."""
    _, _, HKV, _, D = args["kv_cache"].shape
    return int(args["lengths"].sum() * 2 * HKV * D)


def _written_cache(rows: str) -> Callable[[Args], int]:
    """Return a function that counts the elements of one token's keys and values for each row of the argument `rows`."""
    return lambda args: len(args[rows]) * 2 * args["kv_cache"].shape[2] * args["kv_cache"].shape[4]


def _embedded(args: Args) -> int:
    """Return the number of elements that are read of the embeddings: one row for each request and codebook."""
    return len(args["semantic"]) * (1 + len(args["w_out"])) * int(args["embeddings"].shape[1])


def _codes(args: Args) -> int:
    return int(args["codes"].shape[0] * args["codes"].shape[2])


# operator -> argument that it uses in part -> function that returns how many elements of this argument it must use
PARTLY: dict[str, dict[str, Callable[[Args], int]]] = {
    "paged_attention": {"kv_cache": _read_cache},
    "prefill_attention": {"kv_cache": _read_cache},
    "norm_qkv_append": {"kv_cache": _written_cache("x")},
    "rope_append": {"kv_cache": _written_cache("qkv")},
    "flow_start": {"quantiles": lambda args: 0},
    "flow_finish": {"embeddings": _embedded},
    "semantic_argmax": {"weight": lambda args: args["n_codes"] * int(args["weight"].shape[1])},
    "codec_dequantise": {
        "embedding_sum": lambda args: _codes(args) * int(args["embedding_sum"].shape[1]),
        "cluster_usage": _codes,
    },
}
