"""What `lte bench` measures: FFNs, decoding steps and prefill of a sparse model against dense ones in the same run.

Shapes in this package: L layers, T tokens, B sequences, D hidden size, F neurons, E experts of S = F / E neurons each.
"""
