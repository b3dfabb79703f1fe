"""Hand-written Triton kernels, one family of fused operations a file. They know no model."""
