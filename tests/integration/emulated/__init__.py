"""A CUDA device for machines without one: what its code does, and in which order, not how fast.

Tensors on it are of a device of their own, so that one on the host in their midst is an error, as
it is with CUDA. Copies that are not waited for are as late as a device may be: what lands on the
host is garbage until it is waited for, what leaves the host must not be overwritten until then, and
what one stream copies another one sees only if it waits. `torch.cuda` is replaced as far as the
project uses it. Kernels are the CPU's: what they compute says nothing of a device's own.
"""
