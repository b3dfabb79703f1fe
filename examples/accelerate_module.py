"""Make a reference module faster, compare the codes, and restore the module.

Run it with ``python examples/accelerate_module.py``. It uses kernels on a GPU, and the packed flow head on a CPU. With
``TRITON_INTERPRET=1`` in the environment, it uses kernels in Triton's interpreter.
"""

import torch

import voxkern
from voxkern.random_checkpoint import random_tensor, tiny_params


def tiny_model() -> voxkern.reference.VoxtralTTS:
    """Create a model with the public structure and 0.6 M random weights, in fp32."""
    model = voxkern.reference.VoxtralTTS(voxkern.Config.from_params(tiny_params()))
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: random_tensor(name, shape, generator) for name, shape in shapes.items()})
    return model


@torch.inference_mode()  # an accelerated module computes no gradients
def main() -> None:
    """Run a flow head as plain PyTorch, accelerated and restored, and print how many codes differ."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    head = tiny_model().to(device).acoustic_transformer
    h, noise = torch.randn(2, 64, device=device), torch.randn(2, 36, device=device)  # 2 requests
    cfg_alpha = torch.full((2,), 1.2, device=device)
    before = head(h, cfg_alpha, noise)
    print(f"accelerated: {', '.join(voxkern.accelerate(head, max_batch=2))}")
    faster = head(h, cfg_alpha, noise)  # a code at a rounding edge may differ by one level
    print(f"codes that differ after accelerate: {int((faster != before).sum())} of {before.numel()}")
    print(f"restored: {', '.join(voxkern.restore(head))}")
    print(f"codes that differ after restore: {int((head(h, cfg_alpha, noise) != before).sum())} of {before.numel()}")


if __name__ == "__main__":
    main()
