"""The launches of a frame by arithmetic on the config's shapes: what each streams, moves and multiplies.

tests/test_roofline.py holds these formulas to what bench/frame.py counts in the interpreter.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from voxkern.random_checkpoint import public_params
from voxkern.reference import Config
from voxkern.reference.config import (
    N_SPECIAL_CODES,
    AcousticTransformerConfig,
    AudioModelConfig,
    BackboneConfig,
    CodecConfig,
)

CONTEXT = 400  # tokens before the frame: a voice of 150, a sentence, and some ten seconds of speech
CHUNK = 1  # frames the codec decodes at once: the engine says each as soon as it is made
BF16 = 2
Layered = BackboneConfig | AcousticTransformerConfig


@dataclass(frozen=True, kw_only=True)
class Work:
    """Launches of one kind.

    Attributes:
        operator: the ledger's name; one that it does not hold is taken to have enough bytes in flight.
        case: of the ledger, up to the batch.
        launch: its place among the launches of one call.
        times: how often it is launched.
        rows: of activations, or requests where they are not tiled.
        prepared: the most rows, by which launch configs are chosen.
        tiled: whether tiles of rows share the weights; otherwise each request reads them for itself.
        weights: bytes of weights that one launch reads.
        cache: bytes of keys and values that it reads.
        moved: bytes of activations, in and out.
        multiply_adds: of its products.
    """

    operator: str
    case: str = ""
    launch: int = 0
    times: float
    rows: int
    prepared: int
    tiled: bool = True
    weights: int = 0
    cache: int = 0
    moved: int = 0
    multiply_adds: int = 0

    @property
    def dram(self) -> int:
        """Distinct bytes of one launch, as the counters count them."""
        return self.weights + self.cache + self.moved


def launches(work: Iterable[Work]) -> float:
    """Kernels started."""
    return sum(one.times for one in work)


def dram_bytes(work: Iterable[Work]) -> int:
    """Distinct bytes of every launch."""
    return round(sum(one.times * one.dram for one in work))


def weight_bytes(work: Iterable[Work]) -> int:
    """Weights of every launch."""
    return round(sum(one.times * one.weights for one in work))


def total_multiply_adds(work: Iterable[Work]) -> int:
    """Of matrices, and of attention over the cache."""
    return round(sum(one.times * one.multiply_adds for one in work))


def decoder(c: Layered, tokens: int, B: int, context: float) -> list[Work]:
    """`tokens` times a token each of B requests through all layers: 5 launches a layer, and a norm.

    `context` is the mean number of tokens that one attends to.
    """
    n, (q, kv) = tokens * c.n_layers, _widths(c)
    project, attended = (q + kv) * c.dim, B * context  # context may be halves, widths are even
    return [
        Work(
            operator="norm_qkv_append", times=n, rows=B, prepared=B, weights=BF16 * project,
            moved=BF16 * (c.dim + B * (c.dim + q + kv)), multiply_adds=B * project,
        ),
        Work(
            operator="paged_attention", times=n, rows=B, prepared=B, tiled=False, cache=int(BF16 * attended * kv),
            moved=BF16 * B * 2 * q, multiply_adds=int(attended * 2 * q),
        ),
        _linear(n, B, B, c.dim, q),
        *_feed_forward(c, n, B, B),
        Work(
            operator="rms_norm", times=tokens, rows=B, prepared=B, tiled=False, moved=BF16 * (2 * B + 1) * c.dim
        ),
    ]  # fmt: skip


def flow_head(c: AcousticTransformerConfig, audio: AudioModelConfig, B: int, steps: int) -> list[Work]:
    """A frame: 13 launches a step (16 for more than one request) and 5 once; see voxkern/fused/transformer_head.py."""
    K, codes = audio.n_acoustic_codebook, audio.semantic_codebook_size + N_SPECIAL_CODES
    work = [*semantic_head(c.dim, codes, 1, B), _linear(1, B, 6 * B, c.dim, c.input_dim), _qkv(c, 1, B, B, B)]
    for i in range(c.n_layers):
        first = i == 0
        rows = 2 * B if i == c.n_layers - 1 else 6 * B  # in the last layer only the x tokens ask
        work.append(_qkv(c, steps, B, B, B) if first else _qkv(c, steps, B, 6 * B, rows))
        work += _token_attention(c, steps, B, rows, first) + _feed_forward(c, steps, rows, 6 * B)
    token, state = BF16 * c.dim, 4 * 2 * K * B  # x and the last velocity are fp32
    known, end, started = token * (1 + 2 * B), token * K, token * (1 + 4 * B)  # a projection of the state is K tokens
    next_embedding = token * (K + 2) * B + 8 * (K + 1) * B  # its embeddings and their sum, and the codes
    for name, times, ends, moved, products in (
        ("flow_start", 1, 1, started, 1),
        ("flow_step", steps - 1, 2, known + started, 3),  # out for both branches, and in
        ("flow_finish", 1, 1, known + next_embedding, 2),
    ):
        work.append(
            Work(
                operator=name, case="frame-", times=times, rows=B, prepared=B, tiled=False, weights=ends * end,
                moved=state + moved, multiply_adds=products * B * K * c.dim,
            )
        )  # fmt: skip
    return work


def semantic_head(dim: int, codes: int, times: int, B: int) -> list[Work]:
    """Logits and the greatest of each tile in one launch, the greatest of all in another."""
    return [
        Work(
            operator="semantic_argmax", case="frame-", times=times, rows=B, prepared=B, weights=BF16 * codes * dim,
            moved=BF16 * B * dim, multiply_adds=B * codes * dim,
        ),
        Work(
            operator="semantic_argmax", case="frame-", launch=1, times=times, rows=B, prepared=B, tiled=False,
            moved=8 * B,
        ),
    ]  # fmt: skip


def codec_chunk(c: CodecConfig, B: int, frames: int) -> list[Work]:
    """One frame's share of the codec's decoder over a chunk: 5 launches a layer, one a convolution, and two."""
    D, q, rate = c.dim, c.n_heads * c.head_dim, 1
    n_layer = 4 * q * D + 3 * D * c.hidden_dim
    n_moved = 4 * D + 8 * q + 2 * c.hidden_dim  # columns in and out of the five
    work = []
    for i, (n_layers, kernel, stride) in enumerate(c.decoder_stages):
        work.append(_convolution(B * frames * rate, kernel, D if i else c.latent_dim, D, stride * BF16 * D))
        rate *= stride
        rows = B * frames * rate
        work.append(  # the five of a layer as five alike
            Work(
                operator="codec layer", times=5 * n_layers, rows=rows, prepared=rows, weights=BF16 * n_layer // 5,
                moved=BF16 * rows * n_moved // 5, multiply_adds=rows * n_layer // 5,
            )
        )  # fmt: skip
    patch, said = c.pretransform_patch_size, 8 * (1 + c.acoustic_dim) + BF16 * (c.semantic_dim + c.latent_dim)
    work += [
        _convolution(B * frames * rate, c.patch_proj_kernel_size, D, patch, 4 * patch),  # sound is fp32
        Work(operator="codec dequantise", times=1, rows=B, prepared=B, moved=B * frames * said),
        Work(operator="codec update state", times=1, rows=B, prepared=B, moved=12 * B),
    ]
    return [replace(one, times=one.times / frames) for one in work]


@functools.cache
def public() -> Config:
    """The public shapes."""
    return Config.from_params(public_params())


def frame(B: int, steps: int, context: int = CONTEXT, config: Config | None = None) -> dict[str, list[Work]]:
    """A whole frame of `B` requests by its parts."""
    config = config or public()
    assert isinstance(config.acoustic_transformer, AcousticTransformerConfig)
    said = B * (2 * 8 * config.audio.n_codebooks + 28)  # codes in and out, and four counters
    return {
        "backbone": decoder(config.backbone, 1, B, context),
        "flow head": flow_head(config.acoustic_transformer, config.audio, B, steps),
        "bookkeeping": [Work(operator="update_decode_state", times=1, rows=B, prepared=B, tiled=False, moved=said)],
        "codec": codec_chunk(config.codec, B, CHUNK),
    }


def _widths(c: Layered) -> tuple[int, int]:
    """Columns of q, and of k and v together."""
    return c.n_heads * c.head_dim, 2 * c.n_kv_heads * c.head_dim


def _linear(times: int, rows: int, prepared: int, N: int, K: int, residual: int = 0) -> Work:
    """``x w + residual``: written in place, or with `residual` columns elsewhere. N is that of the ledger's case."""
    return Work(
        operator="linear", case="down-", times=times, rows=rows, prepared=prepared, weights=BF16 * N * K,
        moved=BF16 * rows * (N + K + residual), multiply_adds=rows * N * K,
    )  # fmt: skip


def _feed_forward(c: Layered, times: int, rows: int, prepared: int) -> list[Work]:
    """Norm, gate and up in one launch, down in another."""
    up = 2 * c.hidden_dim * c.dim
    gated = Work(
        operator="norm_swiglu", times=times, rows=rows, prepared=prepared, weights=BF16 * up,
        moved=BF16 * (c.dim + rows * (c.dim + c.hidden_dim)), multiply_adds=rows * up,
    )  # fmt: skip
    return [gated, _linear(times, rows, prepared, c.dim, c.hidden_dim)]


def _qkv(c: Layered, times: int, B: int, rows: int, n_queries: int) -> Work:
    """Keys and values of `rows`, queries of the first `n_queries` of them."""
    q, kv = _widths(c)
    return Work(
        operator="norm_qkv", times=times, rows=rows, prepared=6 * B, weights=BF16 * (q + kv) * c.dim,
        moved=BF16 * (c.dim + rows * (c.dim + kv) + n_queries * q), multiply_adds=(rows * kv + n_queries * q) * c.dim,
    )  # fmt: skip


def _token_attention(c: Layered, times: int, B: int, rows: int, first: bool) -> list[Work]:
    """Attention over three tokens, and wo: one launch for one request, two for more."""
    q, kv = _widths(c)
    # in the first layer x has no branch and t is the same for all; later ones ask for some queries only
    n_columns = (3 * B + 1) * (q + kv) if first else rows * q + 6 * B * kv
    residual = c.dim if first else 0
    if B == 1:
        fused = Work(
            operator="token_attention_linear", case="wo-", times=times, rows=rows, prepared=6, weights=BF16 * q * c.dim,
            moved=BF16 * (rows * (c.dim + residual) + n_columns), multiply_adds=rows * q * c.dim,
        )  # fmt: skip
        return [fused]
    attend = Work(
        operator="token_attention", case="middle-", times=times, rows=B, prepared=B, tiled=False,
        moved=BF16 * (n_columns + rows * q),
    )  # fmt: skip
    return [attend, _linear(times, rows, 6 * B, c.dim, q, residual)]


def _convolution(rows: int, kernel: int, n_in: int, n_out: int, written: int) -> Work:
    """`rows` in, `written` bytes out for each; a stride of 2 has half of the kernel in each of its rows."""
    return Work(
        operator="codec convolution", times=1, rows=rows, prepared=rows, weights=BF16 * kernel * n_in * n_out,
        moved=rows * (BF16 * n_in + written), multiply_adds=rows * kernel * n_in * n_out,
    )  # fmt: skip
