"""Each flow library's own inverse against `parallel`, interleaved, on trained flows; samples and gradients.

    python benchmarks/maf.py [--models FOLDER] [--out benchmarks/results/maf_cpu.json] [--rows NAMES] [--dims 8,64,784]

The flows are trained once (about 15 minutes on 2 cores) and kept in FOLDER. Data: an AR(1) process (D = 8), scikit-learn's digits, 8 x 8 and
upsampled to 28 x 28 (D = 64, 784), the same binarised (the paper's binary MNIST), 2-D Ising configurations at T = 3.0 that a
Metropolis sampler draws (the paper's), and a chaotic chain (a worst case). The noise of a row is drawn once; what is timed is
the map from noise to samples. A row whose baseline is slow has fewer rounds, and says how many.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import nflows.distributions
import nflows.flows
import nflows.transforms as nt
import normflows
import torch
import torch.nn.functional as F
import zuko
from sklearn.datasets import load_digits
from torch import Tensor, nn

from parallel_decode.adapters.maf import parallel
from parallel_decode.adapters.maf.inverse import Parallel
from parallel_decode.adapters.tarflow.bench.record import write

ROUNDS, BUDGET, LIMIT = 7, 90.0, 200.0  # rounds; seconds for all of a row's; seconds beyond which a baseline is not run
TOLERANCES = (0.0, 1e-5)
WIDTH = {8: 64, 16: 64, 64: 128, 256: 256, 784: 512}  # hidden units by D
LAYERS = {8: 3, 64: 3, 784: 1}
STEPS = {8: 2000, 16: 2000, 64: 1500, 256: 600, 784: 300}


def ar1(n: int, generator: torch.Generator, length: int = 8) -> Tensor:
    """x_l = 0.9 x_{l-1} + noise, stationary with variance 1: shape (n, length)."""
    x = torch.randn(n, length, generator=generator)
    for position in range(1, length):
        x[:, position] = 0.9 * x[:, position - 1] + (1 - 0.81) ** 0.5 * x[:, position]
    return x


def chaotic(n: int, generator: torch.Generator, length: int = 64) -> Tensor:
    """The logistic map at 3.9 with small noise, from x_0 uniform: shape (n, length)."""
    x = torch.rand(n, length, generator=generator)
    for position in range(1, length):
        before = x[:, position - 1]
        x[:, position] = (3.9 * before * (1 - before) + 0.002 * (x[:, position] - 0.5)).clamp(0, 1)
    return 4 * (x - 0.5)


def images(n: int, generator: torch.Generator, side: int = 8, binary: bool = False) -> Tensor:
    """Digits with noise (with less, trained flows overflow where the noise of a sample is rare), shape (n, side * side), deviation 1."""
    data = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    if side != 8:
        data = F.interpolate(data, (side, side), mode="bilinear", align_corners=False)
    x = data[torch.randint(len(data), (n,), generator=generator)].flatten(1)
    x = (x > 0.5).float() if binary else x
    x = x + torch.rand(x.shape, generator=generator) * (1.0 if binary else 0.3)
    return (x - x.mean()) / x.std()


def ising(n: int, generator: torch.Generator, side: int = 16, temperature: float = 3.0, sweeps: int = 300) -> Tensor:
    """Spins by Metropolis' rule on a checkerboard with periodic edges, with uniform noise: shape (n, side * side).

    Critical slowing down does not trouble at T = 3.0 (the correlation length is about two sites), so 300 sweeps from random spins do.
    """
    spins = torch.randint(0, 2, (n, side, side), generator=generator).float() * 2 - 1
    parity = (torch.arange(side)[:, None] + torch.arange(side)) % 2
    for sweep in range(2 * sweeps):
        around = sum(spins.roll(shift, dim) for shift in (1, -1) for dim in (1, 2))
        accept = torch.rand(spins.shape, generator=generator) < torch.exp(-2 / temperature * spins * around)
        spins = torch.where(accept & (parity == sweep % 2), -spins, spins)
    return spins.flatten(1) + torch.rand(n, side * side, generator=generator) - 0.5


DATA: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "AR(1)": ar1,
    "digits 8 x 8": images,
    "digits 28 x 28": lambda n, g: images(n, g, 28),
    "binary digits 28 x 28": lambda n, g: images(n, g, 28, binary=True),
    "Ising 16 x 16": ising,
    "chaotic chain": chaotic,
}
BY_DIMENSION = {8: "AR(1)", 64: "digits 8 x 8", 784: "digits 28 x 28"}


def zuko_flow(kind: Any, features: int, transforms: int) -> nn.Module:
    return kind(features, transforms=transforms, hidden_features=[WIDTH[features]] * 2)  # type: ignore[no-any-return]


def nflows_flow(features: int, transforms: int) -> Any:
    parts: list[nn.Module] = []
    for _ in range(transforms):
        parts += [
            nt.ReversePermutation(features),
            nt.MaskedAffineAutoregressiveTransform(features, WIDTH[features], num_blocks=1),
        ]
    return nflows.flows.Flow(nt.CompositeTransform(parts), nflows.distributions.StandardNormal([features]))


class Reverse(normflows.flows.Flow):  # type: ignore[misc]
    """Features in reverse."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z.flip(1), z.new_zeros(len(z))

    inverse = forward


def normflows_flow(features: int, transforms: int) -> Any:
    """Its MAF maps noise to samples in one pass and samples to noise in D: what is slow is the density."""
    parts: list[nn.Module] = []
    for _ in range(transforms):
        parts += [
            Reverse(),
            normflows.flows.MaskedAffineAutoregressive(features, WIDTH[features], num_blocks=1),
        ]
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(features, trainable=False), parts)


LIBRARIES: dict[str, Callable[[int], nn.Module]] = {
    "zuko MAF": lambda d: zuko_flow(zuko.flows.MAF, d, LAYERS[d]),
    "zuko NSF": lambda d: zuko_flow(zuko.flows.NSF, d, LAYERS[d]),
    "nflows MAF": lambda d: nflows_flow(d, LAYERS[d]),
    "normflows MAF": lambda d: normflows_flow(d, LAYERS[d]),
}


def log_likelihood(flow: Any, x: Tensor) -> Tensor:
    """The fast direction of each library: for normflows the mean log density of x under the reversed flow."""
    if isinstance(flow, normflows.NormalizingFlow):
        z, log_det = flow.forward_and_log_det(x)
        return (flow.q0.log_prob(z) + log_det).mean()  # type: ignore[no-any-return]
    return (flow().log_prob(x) if isinstance(flow, zuko.flows.Flow) else flow.log_prob(x)).mean()  # type: ignore[no-any-return]


def slow(flow: Any, z: Tensor) -> Tensor:
    """The direction of D passes, from noise."""
    if isinstance(flow, normflows.NormalizingFlow):
        return flow.inverse(z)  # type: ignore[no-any-return]
    if isinstance(flow, zuko.flows.Flow):
        return flow().transform.inv(z)  # type: ignore[no-any-return]
    return flow._transform.inverse(z)[0]  # type: ignore[no-any-return]


def trained(name: str, data: str, make: Callable[[], nn.Module], folder: Path, steps: int) -> tuple[nn.Module, float]:
    """A flow by maximum likelihood, from the folder if it was trained before; and its held-out log density per feature."""
    torch.manual_seed(0)
    flow, path = make(), folder / f"{name}, {data}.pt".replace(" ", "_")
    generator = torch.Generator().manual_seed(1)
    held_out = DATA[data](256, torch.Generator().manual_seed(2))
    if path.exists():
        flow.load_state_dict(torch.load(path, weights_only=True))
    else:
        optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        pool = DATA[data](4096, generator)
        for _ in range(steps):
            loss = -log_likelihood(flow, pool[torch.randint(len(pool), (128,), generator=generator)])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(flow.state_dict(), path)
    with torch.no_grad():
        return flow.eval(), log_likelihood(flow, held_out).item() / held_out.shape[1]


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    began = time.perf_counter()
    value = run()
    return time.perf_counter() - began, value


def interleaved(runs: dict[str, Callable[[], Tensor]]) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Seconds of each in turn, round after round, as many rounds as the budget lets."""
    values: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    once = 0.0
    for name, run in runs.items():
        taken, values[name] = timed(run)
        if taken < 1:  # the first also allocates
            taken, values[name] = timed(run)
        once += taken
        seconds[name].append(taken)
    rounds = max(1, min(ROUNDS if once > 0.2 else 5 * ROUNDS, int(BUDGET / once)))
    if rounds > 1:
        seconds = {name: [] for name in runs}
    for _ in range(rounds if rounds > 1 else 0):
        for name, run in runs.items():
            taken, values[name] = timed(run)
            seconds[name].append(taken)
    return seconds, values


def deviation(x: Tensor, truth: Tensor) -> float:
    """The largest of all rows that are finite in the library's own result, relative to 1 + the row's largest number."""
    rows = truth.isfinite().all(1)
    scale = 1 + truth[rows].abs().amax(1, keepdim=True)
    return ((x[rows] - truth[rows]).abs() / scale).max().item() if bool(rows.any()) else 0.0


def passes(flow: nn.Module) -> list[int]:
    return [
        module.last_solution.passes
        for module in flow.modules()
        if isinstance(module, Parallel) and module.last_solution is not None
    ]


def sampling(flow: nn.Module, z: Tensor) -> dict[str, Any]:
    """The library's own against `parallel` at each tolerance."""
    fast = {tol: parallel(flow, tol=tol) for tol in TOLERANCES}

    def of(flow: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return slow(flow, z)

        return run

    began = time.perf_counter()
    with torch.no_grad():
        log_likelihood(flow, z)  # the fast direction takes as long as a pass of the slow one, or longer
    about = (time.perf_counter() - began) * z.shape[1]
    runs = {str(tol): of(f) for tol, f in fast.items()}
    seconds, values = interleaved(runs if about > LIMIT else {"own": of(flow)} | runs)
    own = seconds.get("own")
    row: dict[str, Any] = {
        "rounds": len(seconds["0.0"]),
        "own_seconds": statistics.median(own) if own else None,
        "own_about_seconds": about,
        "finite_rows": int(values["own"].isfinite().all(1).sum()) if own else None,
    }
    for tol, f in fast.items():
        key = str(tol)
        row[f"tol {tol:g}"] = {
            "ratio": statistics.median(a / b for a, b in zip(own, seconds[key], strict=True)) if own else None,
            "seconds": statistics.median(seconds[key]),
            "largest_deviation": deviation(values[key], values["own"]) if own else None,
            "finite_rows": int(values[key].isfinite().all(1).sum()),
            "passes": passes(f),
        }
    return row


def with_gradient(flow: nn.Module, z: Tensor) -> dict[str, Any]:
    """A sample and the gradient of its reverse-KL-like loss with respect to the parameters."""
    fast = parallel(flow)
    parameters = [p for p in flow.parameters() if p.requires_grad]

    def of(flow: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = slow(flow, z).square().mean()
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

        return run

    seconds, values = interleaved({"own": of(flow), "parallel": of(fast)})
    difference = (values["own"] - values["parallel"]).norm() / values["own"].norm()
    return {
        "rounds": len(seconds["own"]),
        "own_seconds": statistics.median(seconds["own"]),
        "tol 0": {
            "ratio": statistics.median(a / b for a, b in zip(seconds["own"], seconds["parallel"], strict=True)),
            "seconds": statistics.median(seconds["parallel"]),
            "largest_deviation": difference.item(),
            "passes": passes(fast),
        },
    }


def rows(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    wanted = [part.strip().lower() for part in options.rows.split(",")] if options.rows else [""]
    dims, batches = (list(map(int, text.split(","))) for text in (options.dims, options.batches))

    def noise(n: int, features: int) -> Tensor:
        return torch.randn(n, features, generator=torch.Generator().manual_seed(3))

    cases: list[tuple[str, str, Callable[[], nn.Module], int, list[int], bool]] = []
    for d in dims:
        for library, of in LIBRARIES.items():
            cases.append((library, BY_DIMENSION[d], partial(of, d), d, batches, False))
    cases.append(("nflows MAF of 8 layers", "Ising 16 x 16", partial(nflows_flow, 256, 8), 256, [1000], False))
    cases.append(("nflows MAF of 8 layers", "binary digits 28 x 28", partial(nflows_flow, 784, 8), 784, [100], False))
    cases.append(("zuko MAF", "chaotic chain", lambda: zuko_flow(zuko.flows.MAF, 64, 1), 64, [64], False))
    cases.append(("zuko MAF", "digits 8 x 8", lambda: zuko_flow(zuko.flows.MAF, 64, 3), 64, [64], True))
    cases.append(("nflows MAF", "digits 8 x 8", lambda: nflows_flow(64, 3), 64, [64], True))
    for library, data, make, d, sizes, gradient in cases:
        name = f"{library}, {data}" + (", sample and gradient" if gradient else "")
        if not any(part in name.lower() for part in wanted):
            continue
        flow, held_out = trained(library, data, make, options.models, max(1, round(STEPS[d] * options.train)))
        for batch in sizes:
            found = (with_gradient if gradient else sampling)(flow, noise(batch, d))
            yield name, {"features": d, "batch": batch, "held_out_log_density": held_out, **found}


def line(name: str, row: dict[str, Any]) -> str:
    """One row of the table."""
    text = f"{name:48}{row['features']:4}{row['batch']:6}"
    text += f"{row['own_seconds']:10.3g}" if row["own_seconds"] else f"{row['own_about_seconds']:9.0f}?"
    for tol in (key for key in row if key.startswith("tol")):
        found = row[tol]
        what = (
            f"{found['ratio']:.2f}x, {found['largest_deviation']:.1e}"
            if found["ratio"]
            else f"{found['seconds']:.3g} s"
        )
        text += f"   {tol[4:]}: {what}, {found['passes']}"
    lost = row["batch"] - row.get("finite_rows", row["batch"]) if row.get("own_seconds") else 0
    text += f"   (own: {lost} rows not finite, tol 0: {row['batch'] - row['tol 0']['finite_rows']})" if lost else ""
    return text + (f"   ({row['rounds']} rounds)" if row["rounds"] < 5 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/maf"), help="folder of the trained flows")
    parser.add_argument("--rows", help="parts of names of rows, as in 'nflows,gradient'")
    parser.add_argument("--dims", default="8,64,784")
    parser.add_argument("--batches", default="1,64,1024")
    parser.add_argument("--train", type=float, default=1.0, help="training steps, as a factor")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    figures: list[dict[str, Any]] = []
    print(
        f"{'':48}{'D':>4}{'batch':>6}{'own, s':>10}   tol: ratio, largest deviation, passes (a baseline with ? was not run)"
    )
    for name, row in rows(options):
        print(line(name, row), flush=True)
        figures.append({"row": name, **row})
        if options.out:
            write(options.out, {"rows": figures})


if __name__ == "__main__":
    main()
