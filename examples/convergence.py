"""How a solution comes about: the largest change of each pass, for each block of the digits' flow, drawn as a figure."""

import sys

import torch
from matplotlib import pyplot as plt

import parallel_decode as pd
from parallel_decode.adapters.tarflow import digits

flow = digits()
z = torch.randn(8, *flow.var.shape, generator=torch.Generator().manual_seed(0))
solution = pd.solve(flow.system(z, y=torch.arange(8)), "jacobi", tol=1e-5)
for index, layer in enumerate(solution.layers):
    plt.semilogy(range(1, layer.passes + 1), layer.residuals.amax(1), label=f"block {index + 1}")
    print(f"block {index + 1}: {layer.passes} passes to a change below 1e-5")
plt.xlabel("passes")
plt.ylabel("largest change over the batch")
plt.legend()
plt.savefig(sys.argv[1] if len(sys.argv) > 1 else "convergence.png")
