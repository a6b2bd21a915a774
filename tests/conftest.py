"""What all tests share: one thread, so that no sum depends on how a machine divides its work."""

import torch

torch.set_num_threads(1)
