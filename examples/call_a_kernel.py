"""Call one kernel on tensors, and compare its result with plain PyTorch and with fp64.

Run it with ``python examples/call_a_kernel.py`` on a GPU. Without a GPU, kernels run only in Triton's interpreter:
``TRITON_INTERPRET=1 python examples/call_a_kernel.py``. The variable must be set before triton is first imported.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from voxkern.kernels.norm_linear import norm_linear
from voxkern.validation import resolve_backend

M, N, K = 6, 96, 256  # rows of activations, outputs and inputs of the layer
EPS = 1e-5


def plain(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    """Compute RMSNorm and the linear layer after it in plain PyTorch, [M, K] -> [M, N]."""
    return F.linear(F.rms_norm(x, (K,), norm, EPS), weight)


def main() -> None:
    """Run RMSNorm and a linear layer in one launch, and print the largest errors of both implementations."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if resolve_backend("auto", device) != "triton":
        raise SystemExit("kernels need Triton, and a GPU or TRITON_INTERPRET=1 in the environment")
    torch.manual_seed(0)
    x, norm, weight = torch.randn(M, K), 1 + 0.1 * torch.randn(K), torch.randn(N, K) / K**0.5
    x, norm, weight = (tensor.to(device, torch.bfloat16) for tensor in (x, norm, weight))
    exact = plain(x.double(), norm.double(), weight.double())
    # the launch config depends on max_rows, not on M: a row's result is the same among fewer or more rows
    y = norm_linear(x, norm, weight, EPS, max_rows=8)
    print(f"result: {list(y.shape)}, {y.dtype}")
    print(f"largest error of the kernel: {(y - exact).abs().max():.4f}")
    print(f"largest error of plain PyTorch: {(plain(x, norm, weight) - exact).abs().max():.4f}")


if __name__ == "__main__":
    main()
