"""One torch thread: the models are tiny, and threads would only wait for one another."""

import torch

torch.set_num_threads(1)
