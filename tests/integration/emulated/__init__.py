"""An emulated CUDA device, which checks the correctness and order of operations but not speed.

Its tensors have their own device type, so mixing them with host tensors is an error, as with CUDA.
Asynchronous copies complete as late as CUDA allows: a host target contains garbage until the host
waits, a host source must not be overwritten until then, and another stream sees a copy only if it
waits for it. The parts of `torch.cuda` that the project uses are replaced. Kernels run on the CPU,
so results say nothing about the numerics of a GPU.
"""
