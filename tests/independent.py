"""A second derivation of the model, in float64 numpy, from the equations alone.

The equations are those of the Voxtral TTS paper (arXiv 2603.25551) and of its public serving code. This file shares no
code with the PyTorch reference and computes everything in the plainest way. So a mistake in only one of the two makes
them disagree.
Weights are a mapping from checkpoint names to float64 arrays; params is params.json as a dict. Sequences are stored
rows first, [T, channels], also in the codec.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Weights = Mapping[str, np.ndarray]
Params = Mapping[str, Any]

SPECIALS = 2  # EMPTY_AUDIO and END_AUDIO come before the real codes of every codebook
EMPTY_AUDIO = 0
END_AUDIO = 1
DEFAULT_NORM_EPS = 1e-5
DEFAULT_ENCODER_STRIDES = "2,2,2,1"
DEFAULT_ENCODER_LENGTHS = "2,2,2,2"


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """Divide x [..., n] by its root mean square, and multiply the result by gain [n]."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def swiglu(weights: Weights, prefix: str, x: np.ndarray) -> np.ndarray:
    """Return W2(silu(W1 x) * W3 x) of x [..., n]."""
    gate = x @ weights[f"{prefix}.w1.weight"].T
    up = x @ weights[f"{prefix}.w3.weight"].T
    # silu(g) = g sigmoid(g); sigmoid is computed through tanh, which cannot overflow
    return (gate * 0.5 * (1.0 + np.tanh(gate / 2.0)) * up) @ weights[f"{prefix}.w2.weight"].T


def rope(x: np.ndarray, theta: float) -> np.ndarray:
    """Rotate row p of x [T, heads, head_dim] by position p, in interleaved pairs (2i, 2i+1)."""
    rows, _, head_dim = x.shape
    inverse = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = (np.arange(rows)[:, None] * inverse)[:, None, :]
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = np.empty_like(x)
    turned[..., 0::2] = even * np.cos(angle) - odd * np.sin(angle)
    turned[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
    return turned


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return the attention [..., T, heads * d] of queries q to keys k and values v.

    q is [..., T, heads, d], and k and v are [..., T, kv_heads, d]. bias, [heads or 1, T, T], is added to the scores.
    """
    heads, head_dim = q.shape[-2:]
    group = heads // k.shape[-2]
    mixed = []
    for head in range(heads):
        keys, values = k[..., head // group, :], v[..., head // group, :]
        scores = q[..., head, :] @ np.swapaxes(keys, -1, -2) / np.sqrt(head_dim) + bias[head % len(bias)]
        odds = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed.append(odds / odds.sum(axis=-1, keepdims=True) @ values)
    return np.concatenate(mixed, axis=-1)


def split_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """Reshape x [..., heads * d] to [..., heads, d]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def decoder_layer(
    weights: Weights, prefix: str, args: Params, u: np.ndarray, bias: np.ndarray, theta: float | None
) -> np.ndarray:
    """Apply a layer of the backbone, or of the flow head if theta is None, to u [..., T, dim]."""
    eps = args.get("norm_eps", DEFAULT_NORM_EPS)
    a = rms_norm(u, weights[f"{prefix}.attention_norm.weight"], eps)
    q = split_heads(a @ weights[f"{prefix}.attention.wq.weight"].T, args["n_heads"])
    k = split_heads(a @ weights[f"{prefix}.attention.wk.weight"].T, args["n_kv_heads"])
    v = split_heads(a @ weights[f"{prefix}.attention.wv.weight"].T, args["n_kv_heads"])
    if theta is not None:
        q, k = rope(q, theta), rope(k, theta)
    u = u + attend(q, k, v, bias) @ weights[f"{prefix}.attention.wo.weight"].T
    return u + swiglu(weights, f"{prefix}.feed_forward", rms_norm(u, weights[f"{prefix}.ffn_norm.weight"], eps))


def backbone_hidden(weights: Weights, params: Params, embeddings: np.ndarray) -> np.ndarray:
    """Return the hidden states [T, dim] of embeddings [T, dim], after the final norm.

    Every row attends to itself and to all rows before it.
    """
    u = np.asarray(embeddings, dtype=np.float64)
    rows = np.arange(len(u))
    causal = np.where(rows[None, :] <= rows[:, None], 0.0, -np.inf)[None]
    for layer in range(params["n_layers"]):
        u = decoder_layer(weights, f"layers.{layer}", params, u, causal, params["rope_theta"])
    return rms_norm(u, weights["norm.weight"], params.get("norm_eps", DEFAULT_NORM_EPS))


def embed_codes(weights: Weights, params: Params, codes: np.ndarray) -> np.ndarray:
    """Return the backbone's next input [dim], the sum of the embeddings of 37 codes with the +2 offset."""
    audio = params["multimodal"]["audio_model_args"]
    table = weights["mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight"]
    total = np.zeros(table.shape[1])
    offset = 0
    for codebook, code in enumerate(codes):
        total += table[offset + int(code)]
        offset += SPECIALS + audio["semantic_codebook_size" if codebook == 0 else "acoustic_codebook_size"]
    return total


def semantic_logits(weights: Weights, params: Params, h: np.ndarray) -> np.ndarray:
    """Return the semantic logits [B, rows] of h [B, dim]; EMPTY_AUDIO and the padding rows are -inf."""
    logits = np.asarray(h, dtype=np.float64) @ weights["acoustic_transformer.semantic_codebook_output.weight"].T
    logits[:, EMPTY_AUDIO] = -np.inf
    logits[:, SPECIALS + params["multimodal"]["audio_model_args"]["semantic_codebook_size"] :] = -np.inf
    return logits


def time_embedding(t: float, dim: int) -> np.ndarray:
    """Return the sinusoids [dim] of a time in [0, 1], cosines first."""
    half = dim // 2
    angle = t * np.exp(-np.log(10000.0) * np.arange(half) / half)
    return np.concatenate([np.cos(angle), np.sin(angle)])


def velocity(weights: Weights, params: Params, x: np.ndarray, t: float, h: np.ndarray) -> np.ndarray:
    """Return the velocity [B, 36] at state x [B, 36], time t and hidden state h [B, dim]."""
    args = params["multimodal"]["audio_model_args"]["acoustic_transformer_args"]
    if args.get("kind") == "adaln_mlp":
        return mlp_velocity(weights, args, x, t, h)
    prefix = "acoustic_transformer"
    x_row = np.asarray(x, dtype=np.float64) @ weights[f"{prefix}.input_projection.weight"].T
    t_row = time_embedding(t, args["dim"]) @ weights[f"{prefix}.time_projection.weight"].T
    h_row = np.asarray(h, dtype=np.float64) @ weights[f"{prefix}.llm_projection.weight"].T
    y = np.stack([x_row, np.broadcast_to(t_row, x_row.shape), h_row], axis=1)
    open_to_all = np.zeros((1, 3, 3))
    for layer in range(args["n_layers"]):
        y = decoder_layer(weights, f"{prefix}.layers.{layer}", args, y, open_to_all, theta=None)
    first = rms_norm(y[:, 0], weights[f"{prefix}.norm.weight"], args.get("norm_eps", DEFAULT_NORM_EPS))
    return first @ weights[f"{prefix}.acoustic_codebook_output.weight"].T


def affine(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """Return W x + b, [..., m], of x [..., n] and the flow head's linear layer `name`."""
    name = f"acoustic_transformer.{name}"
    return np.asarray(x, dtype=np.float64) @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def silu(x: np.ndarray) -> np.ndarray:
    """Return x / (1 + exp(-x)), computed through tanh."""
    return x * 0.5 * (1.0 + np.tanh(x / 2.0))


def layer_norm(x: np.ndarray, eps: float) -> np.ndarray:
    """Shift and scale x [..., n] to mean 0 and variance 1, without gain."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)


def mlp_velocity(weights: Weights, args: Params, x: np.ndarray, t: float, h: np.ndarray) -> np.ndarray:
    """Return the velocity [B, 36] of MAR's residual MLP (arXiv 2406.11838), from x [B, 36], t and h [B, input_dim]."""
    sinusoids = time_embedding(t, args.get("time_dim", 256))
    time = affine(weights, "time_embed.mlp.2", silu(affine(weights, "time_embed.mlp.0", sinusoids)))
    condition = silu(time + affine(weights, "cond_embed", h))
    eps = args.get("norm_eps", 1e-6)
    u = affine(weights, "input_proj", x)
    for block in range(args["n_layers"]):
        name = f"res_blocks.{block}"
        shift, scale, gate = np.split(affine(weights, f"{name}.adaLN_modulation.1", condition), 3, axis=-1)
        inner = affine(weights, f"{name}.mlp.0", layer_norm(u, eps) * (1.0 + scale) + shift)
        u = u + gate * affine(weights, f"{name}.mlp.2", silu(inner))
    shift, scale = np.split(affine(weights, "final_layer.adaLN_modulation.1", condition), 2, axis=-1)
    return affine(weights, "final_layer.linear", layer_norm(u, eps) * (1.0 + scale) + shift)


def solve(
    weights: Weights, params: Params, h: np.ndarray, noise: np.ndarray, cfg_alpha: np.ndarray, steps: int
) -> np.ndarray:
    """Integrate the guided velocity from noise with Euler's method; return x [B, 36] at time 1, not clamped.

    h is [B, dim], noise is [B, 36], and cfg_alpha is [B].
    """
    x = np.asarray(noise, dtype=np.float64)
    alpha = np.asarray(cfg_alpha, dtype=np.float64)[:, None]
    for step in range(steps):
        t = step / steps
        conditional = velocity(weights, params, x, t, h)
        unconditional = velocity(weights, params, x, t, np.zeros_like(h))
        x = x + (alpha * conditional + (1.0 - alpha) * unconditional) / steps
    return x


def scaled(x: np.ndarray, levels: int) -> np.ndarray:
    """Clamp x, of any shape, to [-1, 1] and scale it to [0, levels - 1], without rounding."""
    return (np.clip(np.asarray(x, dtype=np.float64), -1.0, 1.0) + 1.0) / 2.0 * (levels - 1)


def quantise(x: np.ndarray, levels: int) -> np.ndarray:
    """Clamp x, of any shape, to [-1, 1], scale it to [0, levels - 1], and round it, halves to even."""
    return np.rint(scaled(x, levels)).astype(np.int64)


def edge_distance(x: np.ndarray, levels: int) -> np.ndarray:
    """Return how far the scaled x is from the nearest rounding edge n + 0.5, in levels, 0..0.5."""
    value = scaled(x, levels)
    return np.abs(value - np.floor(value) - 0.5)


def frame(
    weights: Weights, params: Params, h: np.ndarray, noise: np.ndarray, cfg_alpha: np.ndarray, steps: int
) -> np.ndarray:
    """Return the codes [B, 37] of a frame with the +2 offset; a frame of END has level 0 in every acoustic code.

    h is [B, dim], noise is [B, 36], and cfg_alpha is [B].
    """
    levels = params["multimodal"]["audio_model_args"]["acoustic_codebook_size"]
    semantic = np.argmax(semantic_logits(weights, params, h), axis=-1)[:, None]
    acoustic = SPECIALS + quantise(solve(weights, params, h, noise, cfg_alpha, steps), levels)
    return np.concatenate([semantic, np.where(semantic == END_AUDIO, SPECIALS, acoustic)], axis=1)


def numbers(text: str) -> list[int]:
    """Return the integers of a text such as "3,4,4,4"."""
    return [int(part) for part in text.split(",")]


def dequantise(weights: Weights, args: Params, codes: np.ndarray) -> np.ndarray:
    """Return the latents [T, semantic_dim + 36] of codes [37, T] without the +2 offset."""
    prefix = "audio_tokenizer.quantizer.semantic_codebook"
    usage = np.maximum(weights[f"{prefix}.cluster_usage"], 1e-5)
    semantic = (weights[f"{prefix}.embedding_sum"] / usage[:, None])[codes[0]]
    acoustic = 2.0 * codes[1:].T / (args["acoustic_codebook_size"] - 1) - 1.0
    return np.concatenate([semantic, acoustic], axis=1)


def normed_kernel(weights: Weights, prefix: str) -> np.ndarray:
    """Return a convolution's kernel g v / |v|, where |v| is the norm over all axes but the first.

    The first axis is the output channels in a convolution, but the input channels in a transposed one, [in, out, k].
    """
    g = weights[f"{prefix}.conv.parametrizations.weight.original0"]
    v = weights[f"{prefix}.conv.parametrizations.weight.original1"]
    return g * v / np.sqrt(np.sum(v * v, axis=(1, 2), keepdims=True))


def left_pad(x: np.ndarray, pad: int, mode: str) -> np.ndarray:
    """Pad x [T, n] on the left to [pad + T, n]: repeat row 0, or reflect the rows about row 0.

    Reflection needs rows 1..pad. In the public model, the pad is 6 and a frame has 8 rows. If a smaller model has too
    few rows, the missing rows count as zeros.
    """
    if mode == "replicate":
        before = np.repeat(x[:1], pad, axis=0)
    else:
        enough = np.concatenate([x, np.zeros((max(0, pad + 1 - len(x)), x.shape[1]))])
        before = enough[1 : pad + 1][::-1]
    return np.concatenate([before, x])


def causal_conv(x: np.ndarray, kernel: np.ndarray, mode: str, stride: int = 1) -> np.ndarray:
    """Return the causal convolution [ceil(T / stride), out] of x [T, in] with kernel [out, in, k].

    The last row is repeated until T is a multiple of the stride.
    """
    taps = kernel.shape[2]
    rows = -(-len(x) // stride)
    padded = left_pad(np.concatenate([x, *[x[-1:]] * (rows * stride - len(x))]), taps - stride, mode)
    y = np.zeros((rows, kernel.shape[0]))
    for row in range(rows):
        for tap in range(taps):
            y[row] += kernel[:, :, tap] @ padded[row * stride + tap]
    return y


def causal_transposed_conv(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """Return the transposed convolution [stride T, out] of x [T, in] with kernel [in, out, k].

    This is y[s i + r] = sum_m W[r + s m]^T x[i - m], with s the stride, r `phase` and m `back`.
    """
    rows, taps = len(x), kernel.shape[2]
    y = np.zeros((stride * rows, kernel.shape[1]))
    for tap in range(taps):
        back, phase = divmod(tap, stride)
        if back < rows:
            y[stride * back + phase :: stride] += x[: rows - back] @ kernel[:, :, tap]
    return y


def window_bias(rows: int, window: int, heads: int) -> np.ndarray:
    """Return the bias [heads, rows, rows] of attention over a window.

    The bias is slope (j - i) where i - window <= j <= i, and -inf elsewhere. The heads' slopes are r^0, r^1, ... with
    r = 2^(-8 / heads).
    """
    ratio = 2.0 ** (-8.0 / heads)
    ahead = np.arange(rows)[None, :] - np.arange(rows)[:, None]
    seen = (ahead <= 0) & (ahead >= -window)
    return np.stack([np.where(seen, ratio**head * ahead, -np.inf) for head in range(heads)])


def codec_layer(weights: Weights, prefix: str, args: Params, x: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Apply a codec layer to x [T, dim]; q and k are normalised over all their heads at once."""
    n = rms_norm(x, weights[f"{prefix}.attention_norm.weight"], args["norm_eps"])
    q, k, v = (n @ weights[f"{prefix}.attention.{name}.weight"].T for name in ("wq", "wk", "wv"))
    q = rms_norm(q, weights[f"{prefix}.attention.q_norm.weight"], args["qk_norm_eps"])
    k = rms_norm(k, weights[f"{prefix}.attention.k_norm.weight"], args["qk_norm_eps"])
    kv_heads = args["n_kv_heads"]
    mixed = attend(split_heads(q, args["n_heads"]), split_heads(k, kv_heads), split_heads(v, kv_heads), bias)
    x = x + weights[f"{prefix}.attention_scale"] * (mixed @ weights[f"{prefix}.attention.wo.weight"].T)
    n = rms_norm(x, weights[f"{prefix}.ffn_norm.weight"], args["norm_eps"])
    return x + weights[f"{prefix}.ffn_scale"] * swiglu(weights, f"{prefix}.feed_forward", n)


def codec_decode(weights: Weights, params: Params, codes: np.ndarray) -> np.ndarray:
    """Decode codes [37, T], without the +2 offset, to samples [1920 T]."""
    args = params["multimodal"]["audio_tokenizer_args"]
    halves = args.get("half_attn_window_upon_downsampling", True)
    window = args["attn_sliding_window_size"]
    for stride in numbers(args.get("encoder_convs_strides_str", DEFAULT_ENCODER_STRIDES)):
        if halves and stride > 1:
            window //= 2

    x = dequantise(weights, args, np.asarray(codes))
    strides = numbers(args["decoder_convs_strides_str"])
    lengths = numbers(args["decoder_transformer_lengths_str"])
    for stage, (stride, layers) in enumerate(zip(strides, lengths, strict=True)):
        conv = normed_kernel(weights, f"audio_tokenizer.decoder_blocks.{2 * stage}")
        if stage == 0:
            x = causal_conv(x, conv, "replicate")
        else:
            x = causal_transposed_conv(x, conv, stride)
            if halves and stride > 1:
                window *= 2
        bias = window_bias(len(x), window, args["n_heads"])
        for layer in range(layers):
            x = codec_layer(weights, f"audio_tokenizer.decoder_blocks.{2 * stage + 1}.layers.{layer}", args, x, bias)
    return causal_conv(x, normed_kernel(weights, "audio_tokenizer.output_proj"), "reflect").reshape(-1)


def codec_encode(weights: Weights, params: Params, samples: np.ndarray) -> np.ndarray:
    """Encode samples [n] to latents [T, semantic_dim + 36], not quantised, through the encoder's stages."""
    args = params["multimodal"]["audio_tokenizer_args"]
    patch = args["pretransform_patch_size"]
    rows = -(-len(samples) // patch)
    x = np.zeros(rows * patch)
    x[: len(samples)] = samples
    x = causal_conv(x.reshape(rows, patch), normed_kernel(weights, "audio_tokenizer.input_proj"), "reflect")
    window = args["attn_sliding_window_size"]
    strides = numbers(args.get("encoder_convs_strides_str", DEFAULT_ENCODER_STRIDES))
    lengths = numbers(args.get("encoder_transformer_lengths_str", DEFAULT_ENCODER_LENGTHS))
    for stage, (stride, layers) in enumerate(zip(strides, lengths, strict=True)):
        bias = window_bias(len(x), window, args["n_heads"])
        for layer in range(layers):
            x = codec_layer(weights, f"audio_tokenizer.encoder_blocks.{2 * stage}.layers.{layer}", args, x, bias)
        conv = normed_kernel(weights, f"audio_tokenizer.encoder_blocks.{2 * stage + 1}")
        x = causal_conv(x, conv, "replicate", stride)
        if args.get("half_attn_window_upon_downsampling", True) and stride > 1:
            window //= 2
    return x


def codec_codes(weights: Weights, params: Params, latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise latents [T, semantic_dim + 36]; return codes [37, T] without the offset, and their margins [37, T].

    A margin measures how far a code is from changing to another one. The semantic code is that of the nearest vector.
    Its margin is the squared distance to the second nearest vector, minus that to the nearest. The acoustic codes are
    the quantised values of tanh(latent). Their margins are the distances from a rounding edge, in levels.
    """
    args = params["multimodal"]["audio_tokenizer_args"]
    prefix = "audio_tokenizer.quantizer.semantic_codebook"
    table = weights[f"{prefix}.embedding_sum"] / np.maximum(weights[f"{prefix}.cluster_usage"], 1e-5)[:, None]
    semantic, acoustic = np.split(latents, [table.shape[1]], axis=1)
    distance = ((semantic[:, None, :] - table[None]) ** 2).sum(-1)
    ordered = np.sort(distance, axis=1)
    levels = args["acoustic_codebook_size"]
    codes = np.concatenate([distance.argmin(1)[None], quantise(np.tanh(acoustic), levels).T])
    margin = np.concatenate([(ordered[:, 1] - ordered[:, 0])[None], edge_distance(np.tanh(acoustic), levels).T])
    return codes, margin
