"""Stands in for sglang-kernel, which wants CUDA or AMX: its names, which fail when called."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is not to be had here")

    return missing
