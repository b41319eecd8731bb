"""SeT attention: one operator, four implementations of it.

attention.py        `set_attention`, its config, and which implementation computes it
op.py               the PyTorch operator `torch.ops.setformer.set_attention`
problem.py          tensors, numbers and gradients, as every implementation takes and gives them
reference.py        every equation one line, gradients by autograd
in_torch.py         PyTorch, few heads at a time, so that n x m matrices stay in cache
cpp.py              C++ for CPUs, fused
split.py            tokens of an image on several ranks, by sums over the group
split_torch.py      in PyTorch
split_cpp.py        by the C++ kernel, pass by pass
split_triton.py     in Triton kernels, pass by pass
split_common.py     what these share: a part and the whole image, messages
triton.py           GPUs: buffers and launches
triton_kernels.py   its Triton kernels
triton_short_kernels.py  those for few tokens
triton_split_kernels.py  those of split_triton.py
"""
