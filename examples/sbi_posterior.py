"""Simulation-based inference with sbi: a posterior whose density estimator samples in parallel.

pip install sbi "parallel-decode[maf]"
"""

import torch
from sbi.inference import NPE
from sbi.utils import BoxUniform

from parallel_decode.adapters.maf import parallel

torch.manual_seed(0)
features = 12
prior = BoxUniform(-2 * torch.ones(features), 2 * torch.ones(features))
theta = prior.sample((1000,))
x = theta + 0.3 * torch.randn_like(theta)  # the simulator

inference = NPE(prior, density_estimator="maf", show_progress_bars=False)
estimator = inference.append_simulations(theta, x).train(max_num_epochs=5)
posterior = inference.build_posterior(parallel(estimator))

samples = posterior.sample((1000,), x=torch.zeros(features), show_progress_bars=False)
print(samples.mean(0), parallel.report(posterior.posterior_estimator), sep="\n")
