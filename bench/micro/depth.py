"""Compare the cost of the flow head, with a few evaluations, and of a depth transformer, with 36 codes in sequence.

Other speech models generate the codes of a frame one by one with a small causal transformer, a depth transformer. See
RQ-Transformer (arXiv 2203.01941) and Moshi (arXiv 2410.00037). Here a depth transformer has the flow head's width and
number of layers. Both generate 36 acoustic codes from the same hidden state and semantic code. The cost of generating
the semantic code is left out on both sides. Only the architectures are compared, at equal size. Published depth
transformers are often narrower. The quality of the sound is not compared.

``python -m bench depth`` prints figures for one request: the bytes of weights that a frame streams, launches, the time
that bench/static/roofline.py predicts, and the time in plain PyTorch on this machine. The two are timed in turn.

The flow head's launches are those of its fused module. The depth transformer has no fused module. Its launches for each
code are counted like those of other fused modules: 5 a layer and 1 norm, as in the backbone; 2 for the logits and their
argmax, as for the semantic code; and 1 to gather the next input. Once a frame, 1 launch projects the hidden state.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from bench.command_line import parser_of
from bench.results import ResultRow
from bench.static.roofline import GPU, GPUS, frame_on, predict
from bench.static.work import Work, backbone_step, dram_bytes, launches, public, weight_bytes, work_of
from voxkern.kernels.launch_config import target_arch
from voxkern.random_checkpoint import public_params, random_tensor
from voxkern.reference import Config
from voxkern.reference.attention import Attend, TransformerBlock, attention, rope_table, rotate
from voxkern.reference.backbone import Backbone
from voxkern.reference.config import N_SPECIAL_CODES, AcousticTransformerConfig, AudioModelConfig, BackboneConfig
from voxkern.reference.flow_head import quantise
from voxkern.reference.layers import RMSNorm
from voxkern.reference.transformer_head import FlowMatchingAudioTransformer

STEPS = (4, 8, 16)
THETA = 10_000.0
ROUNDS = {"reduced": 15, "public": 5}
COMMAND = "python -m bench depth"
DEPTH = "depth transformer"
LAYER_SIZES = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads")


class DepthTransformer(nn.Module):
    """Generates a frame's acoustic codes one after another, from the hidden state and the codes before."""

    cos: Tensor
    sin: Tensor
    offsets: Tensor

    def __init__(self, config: AcousticTransformerConfig, audio: AudioModelConfig) -> None:
        """Make layers of the flow head's sizes, and an embedding and an output layer for each codebook."""
        super().__init__()
        self.config, self.audio = config, audio
        self.llm_projection = nn.Linear(config.input_dim, config.dim, bias=False)
        self.embeddings = nn.Embedding(audio.embedding_rows, config.dim)
        self.layers = nn.ModuleList(
            TransformerBlock(
                config.dim, config.hidden_dim, config.n_heads, config.n_kv_heads, config.head_dim, config.norm_eps
            )
            for _ in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.outputs = nn.ModuleList(
            nn.Linear(config.dim, audio.acoustic_codebook_size, bias=False) for _ in range(audio.n_acoustic_codebook)
        )
        cos, sin = rope_table(torch.arange(audio.n_acoustic_codebook), config.head_dim, THETA)
        self.register_buffer("cos", cos.float(), persistent=False)
        self.register_buffer("sin", sin.float(), persistent=False)
        offsets = torch.tensor(audio.embedding_offsets)
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, h: Tensor, codes: Tensor) -> Tensor:
        """Return the logits of every acoustic code given the codes before it, in one causal pass.

        Args:
            h: [B, input_dim], hidden states.
            codes: int64 [B, 1 + K] with the +2 offset, semantic code first; the last column is not read.

        Returns:
            Logits [B, K, levels].
        """
        K = self.audio.n_acoustic_codebook
        x = self.llm_projection(h).unsqueeze(1) + self.embeddings(codes[:, :K] + self.offsets[:K])

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin), v, causal=True)

        for layer in self.layers:
            x = layer(x, attend)
        return torch.stack([output(x[:, i]) for i, output in enumerate(self.outputs)], dim=1)

    def decode(self, h: Tensor, semantic: Tensor) -> tuple[Tensor, Tensor]:
        """Generate a frame's codes greedily, with a cache of keys and values.

        Args:
            h: [B, input_dim], hidden states.
            semantic: int64 [B] with the +2 offset.

        Returns:
            Codes int64 [B, 1 + K] with the +2 offset, and the logits [B, K, levels].
        """
        config, B, K = self.config, len(h), self.audio.n_acoustic_codebook
        cache = h.new_empty(config.n_layers, 2, B, K, config.n_kv_heads, config.head_dim)
        hidden, codes, logits = self.llm_projection(h), [semantic], []
        for i, output in enumerate(self.outputs):
            x = (hidden + self.embeddings(codes[-1] + self.offsets[i])).unsqueeze(1)
            for layer, memory in zip(self.layers, cache, strict=True):
                x = layer(x, self._attend(memory, i))
            logits.append(output(x[:, 0]))
            codes.append(logits[-1].argmax(-1) + N_SPECIAL_CODES)
        return torch.stack(codes, dim=1), torch.stack(logits, dim=1)

    def _attend(self, memory: Tensor, i: int) -> Attend:
        """Return the attention function of token `i`, which also writes the token's keys and values to `memory`.

        `memory` is [2, B, K, Hkv, D].
        """
        cos, sin = self.cos[i : i + 1], self.sin[i : i + 1]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            memory[0, :, i : i + 1], memory[1, :, i : i + 1] = rotate(k, cos, sin), v
            return attention(rotate(q, cos, sin), memory[0, :, : i + 1], memory[1, :, : i + 1], causal=False)

        return attend


def depth_work(
    config: AcousticTransformerConfig, audio: AudioModelConfig, B: int, gpu: GPU = GPUS["H100 SXM"]
) -> list[Work]:
    """Return the depth transformer's launches in a frame of `B` requests: with three layers, 18 for each code and 1."""
    K, levels, dim = audio.n_acoustic_codebook, audio.acoustic_codebook_size, config.dim
    with torch.device("meta"):
        x, state = torch.empty(B, config.input_dim, dtype=torch.bfloat16), torch.empty(B, dim, dtype=torch.bfloat16)
        projection, output = state.new_empty(dim, config.input_dim), state.new_empty(levels, dim)
        codes = torch.empty(B, dtype=torch.int64)
        backbone = Backbone(as_backbone(config), audio).bfloat16()
    of_output = {"out": codes, "h": state, "weight": output, "n_codes": levels, "max_batch": B}
    none: dict[str, None] = dict.fromkeys(("bias", "gate", "residual"))
    with target_arch(gpu.arch, gpu.multiprocessors):
        last = work_of("semantic_argmax", of_output)
        once = work_of("linear", {"out": state, "x": x, "weight": projection, "max_rows": B, **none})
    each = [
        Work(operator="depth input", times=1, rows=B, moved=6 * B * dim),  # two rows are read, one is written
        *backbone_step(backbone, B, (K + 1) / 2, gpu.arch, gpu.multiprocessors),
        last,
    ]
    return [once, *(replace(one, times=K * one.times) for one in each)]


def as_backbone(config: AcousticTransformerConfig) -> BackboneConfig:
    """Return the config of a backbone with the flow head's layers, and a vocabulary of 64."""
    sizes = {name: getattr(config, name) for name in LAYER_SIZES}
    return Config.from_params(public_params() | sizes | {"vocab_size": 64}).backbone


def flow_work(B: int, steps: int, gpu: GPU = GPUS["H100 SXM"]) -> list[Work]:
    """Return a frame's launches of the public flow head for `B` requests, without those of the semantic code."""
    return [one for one in frame_on(gpu, B, steps)["flow head"] if one.operator != "semantic_argmax"]


def candidates(B: int = 1, gpu: GPU = GPUS["H100 SXM"]) -> dict[tuple[str, str], list[Work]]:
    """Return (name, steps) -> a frame's launches for `B` requests on `gpu`, at the public shapes."""
    config, audio = public().acoustic_transformer, public().audio
    assert isinstance(config, AcousticTransformerConfig)
    found = {(DEPTH, f"codes:{audio.n_acoustic_codebook}"): depth_work(config, audio, B, gpu)}
    return found | {("flow head", f"euler:{steps}"): flow_work(B, steps, gpu) for steps in STEPS}


def reduced() -> AcousticTransformerConfig:
    """Return a config with a quarter of the public head's width, and the same number of layers."""
    config = public().acoustic_transformer
    assert isinstance(config, AcousticTransformerConfig)
    return replace(config, input_dim=768, dim=768, hidden_dim=2304, n_heads=8, n_kv_heads=2)


def calls(
    config: AcousticTransformerConfig, audio: AudioModelConfig, dtype: torch.dtype
) -> dict[tuple[str, str], Callable[[], object]]:
    """Return (name, steps) -> a call that computes one request's frame, on random weights.

    The depth transformer and the flow head share the weights of their layers.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = [
            DepthTransformer(config, audio).state_dict(),
            FlowMatchingAudioTransformer(config, audio).state_dict(),
        ]
    states = {name: random_tensor(name, t.shape, generator).to(dtype) for state in shapes for name, t in state.items()}
    depth, flow = DepthTransformer(config, audio), FlowMatchingAudioTransformer(config, audio)
    for module in (depth, flow):
        module.load_state_dict({name: states[name] for name in module.state_dict()}, assign=True)
    h, noise = (torch.randn(1, n, generator=generator) for n in (config.input_dim, audio.n_acoustic_codebook))
    h, alpha, semantic = h.to(dtype), torch.full((1,), 1.2), torch.full((1,), 5)

    def flow_frame(steps: int) -> Tensor:
        return quantise(flow.solve(h, alpha, noise, steps), audio.acoustic_codebook_size)

    found: dict[tuple[str, str], Callable[[], object]] = {
        (DEPTH, f"codes:{audio.n_acoustic_codebook}"): partial(depth.decode, h, semantic)
    }
    return found | {("flow head", f"euler:{steps}"): partial(flow_frame, steps) for steps in STEPS}


@torch.inference_mode()
def alternate(calls: dict[tuple[str, str], Callable[[], object]], rounds: int) -> dict[tuple[str, str], list[float]]:
    """Time the calls in turn, and return the milliseconds of each round by name. The first round only warms up."""
    times: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def arithmetic_rows() -> list[ResultRow]:
    """Return the counted and predicted figures, at the public shapes for one request."""
    found = []
    for (subject, steps), work in candidates().items():
        counts = {"bytes of weights": (weight_bytes(work), "B"), "bytes": (dram_bytes(work), "B")}
        counts["launches"] = (round(launches(work)), "1")
        for metric, (value, unit) in counts.items():
            found.append(_row(subject, steps, metric, value, unit, "counted"))
    for name, gpu in GPUS.items():
        for (subject, steps), work in candidates(1, gpu).items():
            found.append(_row(subject, steps, f"time on {name}", 1e3 * predict(work, gpu), "ms", "predicted"))
    return found


def measured_rows(width: str) -> list[ResultRow]:
    """Time one frame on this machine, at the width ``reduced`` in fp32 or ``public`` in bf16, and return the rows."""
    config = reduced() if width == "reduced" else public().acoustic_transformer
    assert isinstance(config, AcousticTransformerConfig)
    dtype, name = (torch.float32, "fp32") if width == "reduced" else (torch.bfloat16, "bf16")
    found = []
    for (subject, steps), times in alternate(calls(config, public().audio, dtype), ROUNDS[width]).items():
        low, *_, high = statistics.quantiles(times, n=5)
        row = _row(subject, steps, "time", statistics.median(times), "ms", "measured", f"frame-b1 width {config.dim}")
        found.append(replace(row, provider="torch", dtype=name, low=low, high=high))
    return found


def rows() -> list[ResultRow]:
    """Return all figures. Measuring takes about a minute."""
    return arithmetic_rows() + measured_rows("reduced") + measured_rows("public")


def _row(
    subject: str, steps: str, metric: str, value: float, unit: str, how: str, shape: str = "frame-b1"
) -> ResultRow:
    provider = "" if subject == DEPTH else "voxkern"  # voxkern has no kernels for a depth transformer
    return ResultRow(
        "depth", subject, metric, value, unit, how, COMMAND, provider=provider, shape=shape, dtype="bf16", steps=steps
    )


def main(arguments: Sequence[str]) -> int:
    """Print the counts and predictions of each candidate, then the measured times at each width."""
    parser_of("depth", __doc__).parse_args(arguments)
    print("One request, public shapes, bf16. Bytes and launches are counted; times on GPUs are PREDICTED, ms.")
    print(f"{'':30s}GB of weights  launches" + "".join(f"{name:>12s}" for name in GPUS))
    on_each = [(gpu, candidates(1, gpu)) for gpu in GPUS.values()]
    for (subject, steps), work in candidates().items():
        print(
            f"{subject + ' ' + steps:30s}{weight_bytes(work) / 1e9:13.2f}{launches(work):10.0f}"
            + "".join(f"{1e3 * predict(found[subject, steps], gpu):12.2f}" for gpu, found in on_each)
        )
    for width in ROUNDS:
        print(f"\nMeasured on this machine, plain PyTorch, {torch.get_num_threads()} threads, {ROUNDS[width]} rounds")
        print(f"{'':30s}{'':22s}    ms      p20      p80")
        for row in measured_rows(width):
            name = f"{row.subject} {row.steps}"
            print(
                f"{name:30s}{row.shape + ' ' + row.dtype:22s}{row.value:9.1f}{row.low:9.1f}{row.high:9.1f}", flush=True
            )
    return 0
