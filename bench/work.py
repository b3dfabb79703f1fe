"""The launches of a frame with their bytes and multiply-adds, computed from the config's shapes.

tests/test_roofline.py checks that these formulas give the counts of bench/frame.py in the interpreter.
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

CONTEXT = 400  # tokens before the frame: a voice of 150, a sentence, and about ten seconds of speech
CHUNK = 1  # frames that the codec decodes at once: the engine decodes each frame as soon as it is generated
BF16 = 2  # bytes of an element
Layered = BackboneConfig | AcousticTransformerConfig


@dataclass(frozen=True, kw_only=True)
class Work:
    """Launches of one kind in a frame.

    Attributes:
        operator: the operator's name in the ledger. An operator that the ledger does not have is assumed to have enough
            bytes in flight.
        case: the case's name in the ledger, without its last part ``bN``.
        launch: index of the launch among those of one call.
        times: number of launches.
        rows: rows of activations; requests, if `tiled` is false.
        prepared: the most rows that the launch is prepared for. This number selects the launch config.
        tiled: whether tiles of rows share the weights. Otherwise each request reads all weights.
        weights: bytes of weights that one launch reads.
        cache: bytes of keys and values that one launch reads.
        moved: bytes of activations that one launch reads and writes.
        multiply_adds: multiply-adds of one launch's products.
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
        """Distinct bytes of one launch, by the rule of bench/counters.py."""
        return self.weights + self.cache + self.moved


def launches(work: Iterable[Work]) -> float:
    """Return the number of launches. A frame's share of a codec chunk may make it a fraction."""
    return sum(one.times for one in work)


def dram_bytes(work: Iterable[Work]) -> int:
    """Return the distinct bytes of each launch, summed over all launches."""
    return round(sum(one.times * one.dram for one in work))


def weight_bytes(work: Iterable[Work]) -> int:
    """Return the bytes of weights, summed over all launches."""
    return round(sum(one.times * one.weights for one in work))


def total_multiply_adds(work: Iterable[Work]) -> int:
    """Return the multiply-adds of all launches: of matrix products, and of attention over the cache."""
    return round(sum(one.times * one.multiply_adds for one in work))


def decoder(c: Layered, tokens: int, B: int, context: float) -> list[Work]:
    """Return the launches of a decoder without experts. Each token has 5 launches a layer, and a norm.

    Args:
        c: the config of the layers.
        tokens: number of tokens of each request, which run one after another.
        B: number of requests.
        context: the mean number of tokens that a token attends to.
    """
    n, (q, kv) = tokens * c.n_layers, _widths(c)
    project, attended = (q + kv) * c.dim, B * context  # context may be n + 1/2, but widths are even, so bytes are whole
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
    """Return the launches of a flow head's frame for `B` requests; see voxkern/fused/transformer_head.py.

    The frame has 13 launches a step (16 if it has more than one request), and 5 others.
    """
    K, codes = audio.n_acoustic_codebook, audio.semantic_codebook_size + N_SPECIAL_CODES
    work = [*semantic_head(c.dim, codes, 1, B), _linear(1, B, 6 * B, c.dim, c.input_dim), _qkv(c, 1, B, B, B)]
    for i in range(c.n_layers):
        first = i == 0
        rows = 2 * B if i == c.n_layers - 1 else 6 * B  # in the last layer only the x tokens have queries
        work.append(_qkv(c, steps, B, B, B) if first else _qkv(c, steps, B, 6 * B, rows))
        work += _token_attention(c, steps, B, rows, first) + _feed_forward(c, steps, rows, 6 * B)
    token, state = BF16 * c.dim, 4 * 2 * K * B  # x and the last velocity are fp32
    known, end, started = token * (1 + 2 * B), token * K, token * (1 + 4 * B)  # `end`: bytes of one projection's weight
    next_embedding = token * (K + 2) * B + 8 * (K + 1) * B  # K + 1 embeddings read, their sum and the codes written
    for name, times, ends, moved, products in (
        ("flow_start", 1, 1, started, 1),
        ("flow_step", steps - 1, 2, known + started, 3),  # products: an output of each branch, and one input
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
    """Return the launches of an output head with argmax.

    The first launch finds the greatest logit of each tile of codes, and the second launch the greatest of all tiles.

    Args:
        dim: width of the hidden state.
        codes: number of codes.
        times: number of calls.
        B: number of requests.
    """
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
    """Return one frame's share of the launches that decode a chunk: 5 a layer, one a convolution, and two others.

    Args:
        c: the codec's config.
        B: number of requests.
        frames: number of frames in the chunk.
    """
    D, q, rate = c.dim, c.n_heads * c.head_dim, 1
    n_layer = 4 * q * D + 3 * D * c.hidden_dim
    n_moved = 4 * D + 8 * q + 2 * c.hidden_dim  # columns read and written by a layer's five launches
    work = []
    for i, (n_layers, kernel, stride) in enumerate(c.decoder_stages):
        work.append(_convolution(B * frames * rate, kernel, D if i else c.latent_dim, D, stride * BF16 * D))
        rate *= stride
        rows = B * frames * rate
        work.append(  # a layer's five launches, each with a fifth of the layer's bytes and products
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
    """Return the public model's config."""
    return Config.from_params(public_params())


def frame(B: int, steps: int, context: int = CONTEXT, config: Config | None = None) -> dict[str, list[Work]]:
    """Return part -> launches of a whole frame. The parts are backbone, flow head, bookkeeping and codec.

    Args:
        B: number of requests.
        steps: number of evaluations of the velocity.
        context: number of tokens of each request before the frame.
        config: the model's config; None takes the public model's.
    """
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
    """Return the columns of q, and those of k and v together."""
    return c.n_heads * c.head_dim, 2 * c.n_kv_heads * c.head_dim


def _linear(times: int, rows: int, prepared: int, N: int, K: int, residual: int = 0) -> Work:
    """Return the launches of ``x w + residual``, a product [rows, K] x [K, N].

    `residual` is the number of columns of the residual if the residual is not updated in place, else 0. N must be the N
    of the ledger's case ``down-``, because that case gives the grid.
    """
    return Work(
        operator="linear", case="down-", times=times, rows=rows, prepared=prepared, weights=BF16 * N * K,
        moved=BF16 * rows * (N + K + residual), multiply_adds=rows * N * K,
    )  # fmt: skip


def _feed_forward(c: Layered, times: int, rows: int, prepared: int) -> list[Work]:
    """Return the launches of a feed-forward layer: norm, gate and up in one launch, down in another launch."""
    up = 2 * c.hidden_dim * c.dim
    gated = Work(
        operator="norm_swiglu", times=times, rows=rows, prepared=prepared, weights=BF16 * up,
        moved=BF16 * (c.dim + rows * (c.dim + c.hidden_dim)), multiply_adds=rows * up,
    )  # fmt: skip
    return [gated, _linear(times, rows, prepared, c.dim, c.hidden_dim)]


def _qkv(c: Layered, times: int, B: int, rows: int, n_queries: int) -> Work:
    """Return the launches of q | k | v: keys and values of all `rows`, and queries of the first `n_queries` rows."""
    q, kv = _widths(c)
    return Work(
        operator="norm_qkv", times=times, rows=rows, prepared=6 * B, weights=BF16 * (q + kv) * c.dim,
        moved=BF16 * (c.dim + rows * (c.dim + kv) + n_queries * q), multiply_adds=(rows * kv + n_queries * q) * c.dim,
    )  # fmt: skip


def _token_attention(c: Layered, times: int, B: int, rows: int, first: bool) -> list[Work]:
    """Return the launches of the attention over three tokens and of wo, fused into one launch if B is 1."""
    q, kv = _widths(c)
    # In the first layer both branches share the x token, and all requests share the t token. In later layers only
    # `rows` of the 6B tokens have queries.
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
    """Return the launch of a convolution that reads `rows` rows, and writes `written` bytes for each row.

    With a stride of 2, each of the two output rows of an input row uses half of the kernel.
    """
    return Work(
        operator="codec convolution", times=1, rows=rows, prepared=rows, weights=BF16 * kernel * n_in * n_out,
        moved=rows * (BF16 * n_in + written), multiply_adds=rows * kernel * n_in * n_out,
    )  # fmt: skip
