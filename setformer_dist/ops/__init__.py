"""Pure tensor functions of the models: kernels, optimal transport, set attention. No state, files or ranks.

cast_attention.py       CAST: softmax attention inside clusters of tokens, summaries between them
cpp.py                  our C++ for CPUs (csrc/), built for this very CPU when a process first asks for it, and kept
kmeans.py               K-means of many groups at once
set_attention.py        SeT attention: `set_attention`, and which implementation computes it
set_cpu.py              SeT attention in C++, fused
set_fast.py             SeT attention in PyTorch, few heads at a time, so that n x m matrices stay in cache
set_op.py               SeT attention as PyTorch operators: `torch.ops.setformer.set_attention`
set_problem.py          the numbers of one SeT attention, as every implementation takes them
set_reference.py        SeT attention, every equation one line, gradients by autograd
set_triton.py           SeT attention on GPUs: buffers and launches
set_triton_kernels.py   its Triton kernels
sinkhorn.py             entropic optimal transport with uniform marginals: the plan that SeT uses as attention
splitmix.py             SplitMix64 on tensors
soft_attention.py       SOFT: a Gaussian kernel between tokens by way of m landmarks
kernels.py              kernel maps and position filters: pure functions from features to similarities
"""
