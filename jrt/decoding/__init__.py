"""Fast decoding inside transformers' `generate`: after the prompt, a token costs a small step, not a `forward` call.

    loop      greedy and sampled decoding, with the results of transformers' own loop
    session   a step that is ready to run; on a GPU it is one CUDA graph, which may include the choice of the token
    choice    how the next token is chosen
    step      the interface of a step: one token for each row; plain: in PyTorch; fused: with Triton kernels
        (`jrt.ops.steps`)
    states    the layers' states, in buffers that are updated in place
    tables    constants that a step looks up

`JRTForCausalLM._sample` asks `loop.unsupported` first, and runs transformers' own loop if that gives a reason.
"""
