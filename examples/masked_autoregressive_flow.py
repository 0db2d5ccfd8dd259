"""A zuko flow, sampled in parallel: the same samples, and gradients through them.

pip install "parallel-decode[maf]"
"""

import time

import torch
import zuko

from parallel_decode.adapters.maf import parallel

torch.manual_seed(0)
flow = zuko.flows.MAF(features=64, transforms=3, hidden_features=(128, 128))
target = torch.linspace(-1, 1, 64)

# Reverse-KL training draws a sample at every step: this is where an inverse of 64 passes hurts.
fast = parallel(flow)
optimizer = torch.optim.Adam(fast.parameters(), lr=1e-3)  # both share their parameters
for _ in range(20):
    x, log_q = fast().rsample_and_log_prob((64,))
    loss = (log_q + 0.5 * ((x - target) / 0.5).square().sum(-1)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.1f}")

for name, each in (("zuko", flow), ("parallel", fast)):
    torch.manual_seed(1)
    began = time.perf_counter()
    with torch.no_grad():
        samples = each().sample((64,))
    print(f"{name:9} {1000 * (time.perf_counter() - began):6.1f} ms   mean {samples.mean():.6f}")
print(parallel.report(fast))  # what was done, and the passes of the last call
