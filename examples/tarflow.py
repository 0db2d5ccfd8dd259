"""Digits from a trained TarFlow: the same images by two schedules."""

import torch

import parallel_decode as pd
from parallel_decode.adapters.tarflow import digits

flow = digits()  # TarFlow.from_checkpoint("model.pth") for your own
z = torch.randn(1, *flow.var.shape, generator=torch.Generator().manual_seed(0))
truth = pd.solve(flow.system(z, y=torch.tensor([3])), "sequential")
solution = pd.solve(flow.system(z, y=torch.tensor([3])), pd.Sliding(64), verify=True)

for layer in solution.layers:
    assert layer.residual is not None
    print(f"{layer.passes:3} passes in place of 256, residual {layer.residual.max():.1e}")
print(f"largest deviation {(solution.value - truth.value).abs().max():.1e} on images in [-1, 1]")
for row in flow.denoised(solution.value, torch.tensor([3]))[0, 0]:
    print("".join(" .:-=+*#%@"[int((v.item() + 1) / 2 * 9.99)] * 2 for v in row.clamp(-1, 0.999)))
