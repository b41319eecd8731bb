"""Pure tensor functions of the models: kernels, optimal transport, set attention. No state, files or ranks.

block.py                the parts of a block on both sides of its attention, for GPUs: each one autograd function
block_kernels.py        its Triton kernels: residual sums, norms, GELU
cast_attention.py       CAST: softmax attention inside clusters of tokens, summaries between them
cpp_library.py          our C++ for CPUs (csrc/), built for this very CPU when a process first asks for it, and kept
kmeans.py               K-means of many groups at once
parts.py                one image on several ranks, cut by rows: sums and rows of neighbours, with their gradients
refit.py                new reference sets by K-means over sampled tokens, matched to the old ones
refit_bytes.py          its problems and solutions as bytes, for processes that solve them elsewhere
reservoir.py            bounded samples of tokens that do not depend on who computes them
set/                    SeT attention: the operator and its implementations
set_attention.py        its public names
sinkhorn.py             entropic optimal transport with uniform marginals: the plan that SeT uses as attention
splitmix.py             SplitMix64 on tensors
soft_attention.py       SOFT: a Gaussian kernel between tokens by way of m landmarks
kernels.py              kernel maps and position filters: pure functions from features to similarities
"""
