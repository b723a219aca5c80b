"""A CUDA device for machines without one: tensors of the CPU that say `cuda:0` and refuse to meet others.

    with pretended(): ...

`marks.py` keeps which memory is the device's; `operators.py` checks and marks the tensors of each operator;
`tensors.py` is what a tensor says of itself and how it moves; `driver.py` is `torch.cuda`; `device.py` puts
all this in place and takes it away; `plugin.py` gives it to pytest.

What it finds, with a GPU's own error where the GPU has one:

- tensors of two devices in one operator, forward, backward or in an optimizer (a buffer that stayed on the
  CPU, a forgotten `device=`); numbers without dimensions and indices may be the CPU's, as on a GPU
- `.numpy()` or `numpy.asarray` of a tensor of the device
- a generator of one device that draws for the other, and products that depend on numbers drawn on the device:
  its own generator gives others than the CPU's
- comparing a tensor's device, `cuda:0`, with the device asked for, `cuda`
- files that hold tensors of the device: they are stored with its name
- integer matrix products and convolutions, which CUDA does not have
- operators that have no deterministic form on CUDA, under `torch.use_deterministic_algorithms`
- an index or label out of range, which stops a GPU with an assertion
- operators that wait for the device, under `torch.cuda.set_sync_debug_mode("error")`

What it cannot find: whatever kernels themselves do (rounding, TF32, the order of sums, limits of size,
memory), streams and races, pinned memory, and several devices. Autocast is the CPU's, whose list differs.
Tracing by `torch.export` is left alone while the network and its inputs are on the CPU; else the test is
skipped. Sparse tensors, other threads and other processes do not see the device.
"""

from pretended_cuda.device import pretended

__all__ = ["pretended"]
