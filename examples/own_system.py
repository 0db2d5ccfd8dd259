"""Your own recurrence in one line: a logistic map with random kicks, 1000 steps long, for 64 particles at once."""

import torch

import parallel_decode as pd

kicks = 0.05 * torch.randn(64, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def step(x: torch.Tensor) -> torch.Tensor:
    """x_l = 2.5 x_{l-1} (1 - x_{l-1}) + kick_l for all l at once; the first comes from x = 0.5."""
    before = torch.nn.functional.pad(x[:, :-1], (1, 0), value=0.5)
    return 2.5 * before * (1 - before) + kicks


system = pd.from_function(step, torch.full_like(kicks, 0.5))
truth = pd.solve(system, "sequential")
for schedule in ("jacobi", pd.GaussSeidelJacobi(100), pd.Sliding(200)):
    solution = pd.solve(system, schedule, tol=0)
    assert torch.equal(solution.value, truth.value)
    print(f"{schedule!r:30} {solution.passes:4} passes in place of {truth.passes}, bit for bit the same")
