"""Hand-written Triton kernels: each file holds one family of fused operators.

The operators take tensors and numbers, and depend on no model. The public names of a file are in its ``__all__``: the
operators, and the functions and classes that a caller needs besides them. Importing this package imports none of its
files, so it works without Triton.
"""

__all__ = [
    "adaln",
    "codec",
    "codec_attention",
    "common",
    "decode_state",
    "flow",
    "launch_config",
    "linear",
    "moe_experts",
    "moe_routing",
    "norm_linear",
    "norm_qkv_attention",
    "operator",
    "overlap",
    "paged_attention",
    "qkv",
    "quantized",
    "rms_norm",
    "rope",
    "semantic_argmax",
    "shares",
    "solver",
    "state_attention",
    "token_attention",
]
