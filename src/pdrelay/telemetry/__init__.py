"""What GPUs do while something runs: NVML's counters, sampled. Torch-free, and optional."""
