"""Kernels: ops (one derivative per file), the blocks' fused twins, the choice between them."""
