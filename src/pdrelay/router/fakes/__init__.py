"""Engines without a model, for tests and benchmarks: native ranks, vLLM, SGLang."""
