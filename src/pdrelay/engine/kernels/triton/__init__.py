"""Triton kernels of the CUDA engine, for dense bf16 Llama and Qwen3 on sm_90.

Every module here imports triton, so nothing outside may import one at module level. One concept a
file; each wrapper takes and returns torch tensors, launches on the current stream and never
synchronises, so that a CUDA graph can capture it.
"""
