"""Time our plain PyTorch flow head and the public server's module, at the public size, on this machine.

``python -m bench.server_head`` needs vLLM-Omni (README, "Against the public server"). Both heads have the same random
bf16 weights and make 7 evaluations. The heads are called in turn, and the medians and the ratio of the medians are
printed.
"""

import copy
import statistics
import time
from collections.abc import Callable

import torch

from voxkern.random_checkpoint import public_params, random_tensor
from voxkern.reference import Config
from voxkern.reference.transformer_head import FlowMatchingAudioTransformer

ROUNDS = 7


def main() -> None:
    """Time both heads, and print one line for each batch size."""
    from vllm_omni.model_executor.models.voxtral_tts import voxtral_tts_audio_generation as server

    params = public_params()
    config = Config.from_params(params)
    args = copy.deepcopy(params["multimodal"]["audio_model_args"])
    args["acoustic_transformer_args"]["n_decoding_steps"] = 7
    with torch.device("meta"):
        ours = FlowMatchingAudioTransformer(config.acoustic_transformer, config.audio)
    generator = torch.Generator().manual_seed(0)
    state = {name: random_tensor(name, t.shape, generator).bfloat16() for name, t in ours.state_dict().items()}
    ours.load_state_dict(state, assign=True)
    theirs = server.FlowMatchingAudioTransformer(args)
    theirs.load_state_dict(state, assign=True, strict=False)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, bf16, 7 evaluations, {ROUNDS} rounds")
    print("batch  server s/frame  voxkern s/frame  server / voxkern")
    for B in (1, 4, 16):
        h, alpha = torch.randn(B, 3072, generator=generator).bfloat16(), torch.full((B,), 1.2)
        noise = torch.randn(B, 36, generator=generator)
        a, b = alternate(lambda: theirs(h, alpha), lambda: ours(h, alpha, noise))  # noqa: B023
        print(f"{B:5d}  {a:14.3f}  {b:15.3f}  {a / b:16.2f}", flush=True)


@torch.inference_mode()
def alternate(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Time two calls in turn, after one call of each to warm up, and return the median seconds of each."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(ROUNDS + 1):
        for call, times in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            call()
            if i:
                times.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


if __name__ == "__main__":
    main()
