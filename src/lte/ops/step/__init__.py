"""One decoding step of a whole decoder: what it computes (`plan`), in plain PyTorch, on the CPU and on a GPU."""
