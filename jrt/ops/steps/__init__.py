"""Triton kernels of one decoding step, a few for each layer. Only `jrt.decoding.fused` calls them.

With one row, a step reads every weight once and does little arithmetic, so its time is that of reading the weights.
Therefore most kernels are a matrix-vector product together with the operations before it (RMSNorm) and after it (gate,
convolution, residual), whose intermediate results never go to memory.
"""
