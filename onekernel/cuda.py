"""A kernel for NVIDIA GPUs (to come)."""
def identity(): return "cuda"
def unavailable(): return "no GPU kernels yet"
