"""The ways of decoding that the experiments compare, by the names that their tables use."""

import parallel_decode as pd

TAU = 0.5  # of the paper


def paper(tau: float = TAU) -> dict[str, pd.Schedule | pd.Selective]:
    """The paper's: position by position; uniform Jacobi (UJD); the first block sequential and the others Jacobi (SeJD). Sweeps start from zeros and
    stop once nothing in the batch changes by tau or more."""
    jacobi = pd.Jacobi(freeze=False, absolute=True, tol=tau, start="zeros")
    return {"sequential": pd.Sequential(), "UJD": jacobi, "SeJD": pd.Selective((pd.Sequential(), jacobi))}


def ours() -> dict[str, pd.Schedule | pd.Selective]:
    """Windows chosen as they run: at the paper's tau, and at the default tolerance."""
    return {f"auto (tau = {TAU})": pd.Auto(tol=TAU), "auto": pd.Auto()}
