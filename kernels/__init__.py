"""Hand-written Triton kernels, one family of fused operators a file. They know no model.

The public names of each file are its ``__all__``: the operators, and what a caller needs beside them. Importing this
package imports none of the files, and needs no Triton.
"""

__all__ = [
    "adaln",
    "codec",
    "codec_attention",
    "common",
    "decode_state",
    "launch_config",
    "linear",
    "mlp_solver",
    "moe_experts",
    "moe_routing",
    "operator",
    "paged_attention",
    "qkv",
    "rms_norm",
    "semantic_argmax",
    "solver",
    "token_attention",
    "transformer_solver",
]
