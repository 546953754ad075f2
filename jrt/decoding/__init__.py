"""Decoding behind transformers' `generate`: after the prompt is read, one small step a token instead of a `forward` call.

    loop      transformers' loop of greedy and sampled decoding, around a session
    session   a step that is ready to run; on a GPU captured as one CUDA graph, with the choice of tokens in it
    choice    how the next token is chosen
    step      what all steps share; plain: in PyTorch; fused: with the Triton kernels of `jrt.ops.steps`
    states    what a text leaves, in buffers that are written in place; tables: constants that are looked up

`JRTForCausalLM._sample` asks `loop.unsupported` first, and runs transformers' own loop where that names a reason.
"""
