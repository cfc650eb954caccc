"""Tensor functions and Triton kernels that know no cache and no model."""
