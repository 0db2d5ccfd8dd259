"""Simulation-based inference with sbi: a posterior whose density estimator samples in parallel.

pip install "parallel-decode[sbi]"
"""

import torch
from sbi.inference import NPE

from parallel_decode.adapters.maf import parallel

torch.manual_seed(0)
features = 16
prior = torch.distributions.MultivariateNormal(torch.zeros(features), torch.eye(features))
theta = prior.sample((1000,))
x = theta + 0.3 * torch.randn_like(theta)  # the simulator

inference = NPE(prior, density_estimator="maf", show_progress_bars=False)
estimator = inference.append_simulations(theta, x).train()

for density in (estimator, parallel(estimator)):  # the same samples, the second time in fewer passes
    posterior = inference.build_posterior(density)
    torch.manual_seed(1)
    samples = posterior.sample((1000,), x=torch.ones(features), show_progress_bars=False)
    print(f"posterior mean {samples.mean():.6f}, deviation {samples.std(0).mean():.6f}")
print(parallel.report(posterior.posterior_estimator))
