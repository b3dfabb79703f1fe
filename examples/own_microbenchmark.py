"""Time one operator against plain PyTorch: RMSNorm and the gate of a feed-forward layer, in the public model's sizes.

Run it with ``python examples/own_microbenchmark.py``. Only a GPU can time the kernel. On a CPU, Triton's
interpreter executes the kernel in Python, and that time means nothing: the script times plain PyTorch only.
"""

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

M, N, K, EPS = 6, 9216, 3072, 1e-5  # 6 rows: the flow head has 6 per request


def milliseconds(call: Callable[[], torch.Tensor], on_gpu: bool) -> float:
    """Return the median time of one call; on a CPU with one thread, which is Timer's default."""
    if on_gpu:
        from triton.testing import do_bench  # clears the L2 cache before each call: weights come from memory

        return float(do_bench(call, return_mode="median"))  # type: ignore[no-untyped-call]
    return Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.5).median * 1e3


def main() -> None:
    """Time plain PyTorch and, on a GPU, check and time the kernel; print milliseconds and bandwidth."""
    on_gpu = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    tensors = torch.randn(M, K), torch.ones(K), torch.randn(N, K) / K**0.5, torch.randn(N, K) / K**0.5
    x, norm, w1, w3 = (tensor.to("cuda" if on_gpu else "cpu", torch.bfloat16) for tensor in tensors)

    def plain() -> torch.Tensor:
        n = F.rms_norm(x, (K,), norm, EPS)
        return F.silu(F.linear(n, w1)) * F.linear(n, w3)

    calls = {"plain PyTorch": plain}
    if on_gpu:
        from voxkern.kernels.norm_linear import norm_swiglu

        calls["norm_swiglu"] = lambda: norm_swiglu(x, norm, w1, w3, EPS, max_rows=M)
        torch.testing.assert_close(calls["norm_swiglu"](), plain(), rtol=0.03, atol=0.03)
    else:
        print("norm_swiglu is not timed: without a GPU it runs in Triton's interpreter, whose time means nothing")
    for name, call in calls.items():
        ms = milliseconds(call, on_gpu)
        print(f"{name}: {ms:.3f} ms, {(w1.nbytes + w3.nbytes) / ms / 1e6:.1f} GB of weights per second")


if __name__ == "__main__":
    main()
