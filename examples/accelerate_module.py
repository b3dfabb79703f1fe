"""Replace a reference module's computation by kernels, compare the codes, and restore the module.

Run it with ``python examples/accelerate_module.py`` on a GPU. Without a GPU, kernels run only in Triton's interpreter:
``TRITON_INTERPRET=1 python examples/accelerate_module.py``. The variable must be set before triton is first imported.
"""

import torch

import voxkern
from voxkern.random_checkpoint import random_tensor, tiny_params
from voxkern.validation import use_kernels


def tiny_model() -> voxkern.reference.VoxtralTTS:
    """Create a model with the public structure and 0.6 M random weights, in fp32."""
    model = voxkern.reference.VoxtralTTS(voxkern.Config.from_params(tiny_params()))
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: random_tensor(name, shape, generator) for name, shape in shapes.items()})
    return model


@torch.inference_mode()  # kernels compute no gradients
def main() -> None:
    """Run a flow head as plain PyTorch, on kernels and restored, and print how many codes differ."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not use_kernels("auto", device):
        raise SystemExit("kernels need Triton, and a GPU or TRITON_INTERPRET=1 in the environment")
    torch.manual_seed(0)
    head = tiny_model().to(device).acoustic_transformer
    h, noise = torch.randn(2, 64, device=device), torch.randn(2, 36, device=device)  # 2 requests
    cfg_alpha = torch.full((2,), 1.2, device=device)
    before = head(h, cfg_alpha, noise)
    print(f"accelerated: {', '.join(voxkern.accelerate(head, max_batch=2))}")
    on_kernels = head(h, cfg_alpha, noise)  # a code at a rounding edge may differ by one level
    print(f"codes that differ on kernels: {int((on_kernels != before).sum())} of {before.numel()}")
    print(f"restored: {', '.join(voxkern.restore(head))}")
    print(f"codes that differ after restore: {int((head(h, cfg_alpha, noise) != before).sum())} of {before.numel()}")


if __name__ == "__main__":
    main()
