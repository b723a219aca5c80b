"""What all tests share: a CUDA device, pretended where there is none."""

pytest_plugins = ["pretended_cuda.plugin"]
