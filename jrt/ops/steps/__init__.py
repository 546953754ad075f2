"""Triton kernels of one decoding step, a few a layer. `jrt.decoding.fused` puts them together; nothing else calls them.

A step at batch 1 reads every weight once and computes almost nothing, so each kernel is a matrix-vector product that
streams its weights, with what comes before (RMSNorm) and after (gate, convolution, residual) done on chip.
"""
