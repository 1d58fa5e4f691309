"""Engines behind HTTP: what vLLM and SGLang are asked, and how their answers become tokens."""
