"""Every option of everything public, fed with what it should not get: a TypeError or ValueError that says what came, or it works."""

import copy
import json
import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import parallel_decode as pd
from parallel_decode.plan import Measurement
from tests.systems import Chain, Hooked, Problem, RandomCorrection, Rows, halves, problem, watch_finals

JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**70, 0.5, -0.5, 3.5, float("nan"), float("inf"), 1j, "", "secant", "jacobi", "zeros", "3", b"x",
    (), (1,), (0,), (1, 2.5), ("jacobi",), [], [3], [None], {}, {"a": 1}, {1, 2}, object(), int, pd.Jacobi, pd.Jacobi(),
    pd.SecantCorrection(), pd.SecantCorrection, torch.zeros(()), torch.zeros(2, 40), torch.zeros(2, 40, dtype=torch.long), print,
]  # fmt: skip
GUESS = torch.zeros(2, 40)
MAKERS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "Sequential": (pd.Sequential, ("tol", "start", "correction")),
    "Jacobi": (pd.Jacobi, ("tol", "start", "correction", "freeze", "absolute")),
    "GaussSeidelJacobi": (pd.GaussSeidelJacobi, ("block", "tol", "start", "correction")),
    "JacobiGaussSeidel": (pd.JacobiGaussSeidel, ("block", "tol", "start", "correction")),
    "Sliding": (pd.Sliding, ("width", "per_row", "tol", "start", "correction")),
    "Auto": (pd.Auto, ("widths", "secant", "per_row", "tol", "start", "correction")),
    "Selective": (pd.Selective, ("layers",)),
    "Selective.sejd": (pd.Selective.sejd, ("tau",)),
    "Plan": (lambda layers=("jacobi",), **more: pd.Plan(layers, **more), ("layers", "made_for", "measurements")),
    "SecantCorrection": (pd.SecantCorrection, ("lags", "order", "memory", "ridge")),
    "from_function": (
        lambda f=torch.zeros_like, initial=GUESS, lipschitz=None: pd.from_function(f, initial, lipschitz=lipschitz),
        ("f", "initial", "lipschitz"),
    ),
}  # fmt: skip
SOLVE = ("system", "schedule", "tol", "initial", "max_passes", "verify", "callback", "differentiable")
CALIBRATE = ("model", "batch_size", "schedules", "tol", "runs")


def refused(call: Callable[[], Any], value: Any) -> bool:
    """Whether a call is refused with an error of the right kind that is not one of the machinery's."""
    try:
        call()
    except (TypeError, ValueError) as error:
        assert "unsupported operand" not in str(error) and "object is not" not in str(error), (value, error)
        assert "has no attribute" not in str(error) and "unexpected keyword" not in str(error), (value, error)
        return True
    return False


@pytest.mark.filterwarnings("ignore:this plan was made for")
@pytest.mark.parametrize("name", MAKERS)
def test_schedules_and_systems(name: str) -> None:
    make, options = MAKERS[name]
    for option in options:
        outcomes = [refused(partial(make, **{option: value}), (option, value)) for value in JUNK]
        assert any(outcomes) and not all(outcomes), f"{option}: nothing is refused, or everything"
        for value, bad in zip(JUNK, outcomes, strict=True):
            if not bad and name not in ("SecantCorrection", "from_function"):
                made = make(**{option: value})
                assert hash(made) == hash(copy.deepcopy(made)) and made == pickle.loads(pickle.dumps(made)), made
                assert repr(made)
                assert not refused(partial(pd.solve, halves(), made), (option, value))


@pytest.mark.parametrize("option", SOLVE)
@pytest.mark.parametrize("layered", [False, True])
def test_solve(option: str, layered: bool) -> None:
    def call(value: Any) -> pd.Solution:
        system = Chain(torch.zeros(2, 40)) if layered else halves()
        return pd.solve(**{"system": system, option: value})

    outcomes = [refused(partial(call, value), (option, value)) for value in JUNK]
    assert any(outcomes)
    assert option == "system" or not all(outcomes)


@pytest.mark.parametrize("option", CALIBRATE)
def test_calibrate(option: str) -> None:
    usual: dict[str, Any] = {"model": Chain(torch.zeros(1, 9)), "runs": 1, "schedules": ["jacobi"], "progress": False}
    small = [value for value in JUNK if not (isinstance(value, int) and value > 9)]
    outcomes = [refused(partial(pd.calibrate, **(usual | {option: value})), (option, value)) for value in small]
    assert any(outcomes) and (option == "model" or not all(outcomes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pd.Jacobi(correction="secant"), "correction is 'secant', expected a Correction such as SecantCorrection"),  # type: ignore[arg-type]
        (lambda: pd.Jacobi(correction=pd.SecantCorrection), "correction is .*expected a Correction"),  # type: ignore[arg-type]
        (lambda: pd.Plan(("jacobi",), made_for=3), "made_for is 3, expected a mapping"),  # type: ignore[arg-type]
        (lambda: pd.Plan(("jacobi",), made_for={"batch": [1]}), "made_for is .*expected a mapping of names to strings and numbers"),  # type: ignore[dict-item]
        (lambda: pd.Plan(("jacobi",), measurements=(3,)), "measurements is .*expected a tuple of Measurements"),  # type: ignore[arg-type]
        (lambda: pd.Auto(3.5), "widths is 3.5, expected whole numbers >= 1"),  # type: ignore[arg-type]
        (lambda: pd.solve(halves(), differentiable=None), "differentiable is None, expected True or False"),  # type: ignore[arg-type]
        (lambda: pd.solve(halves(), verify=1), "verify is 1, expected True or False"),  # type: ignore[arg-type]
        (lambda: pd.solve(halves(), callback=3), "callback is 3, expected a function of a Pass"),  # type: ignore[arg-type]
        (lambda: pd.solve(Chain(torch.zeros(1, 9)), initial=[[0.0], None, None]), "initial holds .*it has to hold tensors"),  # type: ignore[list-item]
        (lambda: pd.solve(Chain(torch.zeros(1, 9)), initial=3), "initial has to hold a tensor or None for each of the 3 layers"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_messages(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_schedule_shows_the_options_that_are_not_the_default() -> None:
    assert repr(pd.Jacobi(start=str(b"system", "ascii"), tol=None)) == "Jacobi()"  # type: ignore[arg-type]
    assert repr(pd.Sliding(tol=0.5, start="zeros")) == "Sliding(tol=0.5, start='zeros', width=64)"


@pytest.mark.parametrize("kind", [pd.Correction, pd.Schedule, pd.TriangularSystem, pd.LayeredSystem])
def test_interfaces_are_abstract(kind: type) -> None:
    with pytest.raises(TypeError, match="abstract"):
        kind()


@pytest.mark.parametrize("missing", ["length", "initial", "evaluate", "depth", "layer", "output"])
def test_every_part_of_a_system_is_asked_for(missing: str) -> None:
    parts: dict[str, Any] = {name: print for name in ("length", "initial", "evaluate", "depth", "layer", "output")}
    for base in (pd.TriangularSystem, pd.LayeredSystem):
        made = {name: part for name, part in parts.items() if name != missing}
        whole = type("Whole", (base,), parts)()
        assert whole is not None
        if missing in base.__abstractmethods__:
            with pytest.raises(TypeError, match=missing):
                type("Partial", (base,), made)()


def test_plans_can_be_hashed_and_compared() -> None:
    measurements = ((Measurement(pd.Jacobi(), 1.0, 2, 0.0),),)
    plan = pd.Plan(("jacobi",), {"batch": 3}, measurements)
    same, other = pd.Plan(("jacobi",), {"batch": 3}, measurements), pd.Plan(("jacobi",), {"batch": 4}, measurements)
    assert plan == same and hash(plan) == hash(same) and plan != other and len({plan, same, other}) == 2


# plans from damaged files


def damaged(text: str, rng: random.Random) -> str:
    """A plan's file with something in it changed."""
    if rng.random() < 0.3:
        at = rng.randrange(len(text))
        return text[:at] + rng.choice(["", "}", "[", '"', "9", "null", "NaN", "\x00"]) + text[at + rng.randrange(3) :]
    content = json.loads(text)
    place: Any = content
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
            break
        place = place[key]
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = rng.choice(
            [None, True, -1, 0, 1e99, 2.5, "", "jacobi", "magic", [], [1], {}, {"name": "auto"}, [[]]]
        )
    return json.dumps(content)


@pytest.mark.filterwarnings("ignore:this plan was made for")
@pytest.mark.parametrize("count", [300, pytest.param(5_000, marks=pytest.mark.slow)])
def test_damaged_plans(count: int, tmp_path: Path) -> None:
    """A ValueError that names the file, or a plan that solves."""
    path, rng = tmp_path / "plan.json", random.Random(0)
    layers = (pd.Sliding(8, per_row=True), pd.Jacobi(correction=pd.SecantCorrection(lags=(1, 4))), pd.Auto((4, 8)))
    measured = tuple((Measurement(layer, 0.5, 3, 1e-6), Measurement(pd.Sequential(), 1.0, 9, 0.0)) for layer in layers)
    pd.Plan(layers, {"batch": 2, "device": "cpu"}, measured).save(path)
    text, loaded = path.read_text(), 0
    for _ in range(count):
        path.write_text(damaged(text, rng))
        try:
            plan = pd.Plan.load(path)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        loaded += 1
        if len(plan.layers) <= 3:
            assert pd.solve(Chain(torch.zeros(1, 9)), plan).passes
        assert pd.Plan.load(path) == plan or "NaN" in path.read_text()
    assert 0 < loaded < count


# systems: everything at once, against plain substitution


def random_case(seed: int) -> tuple[Rows, Problem, dict[str, Any]]:
    """A system and options of `solve`, both at random."""
    rng = random.Random(seed)
    kind = rng.choice(["linear", "tanh", "event", "integer", "sparse", "badly scaled", "overflowing"])
    made = problem(kind, rng.randrange(1, 6), rng.randrange(1, 20), seed)
    width = rng.randrange(1, 25)
    correction = rng.choice([None, None, pd.SecantCorrection(), RandomCorrection(seed)])
    schedule = rng.choice([
        pd.Sequential(), pd.Jacobi(), pd.Jacobi(freeze=False), pd.GaussSeidelJacobi(width), pd.JacobiGaussSeidel(width),
        pd.Sliding(width), pd.Sliding(width, per_row=True), pd.Auto(), pd.Auto((width,), per_row=True),
    ])  # fmt: skip
    if correction is not None and kind not in ("integer", "overflowing"):
        schedule = type(schedule)(**(vars(schedule) | {"correction": correction}))
    options: dict[str, Any] = {"schedule": schedule, "tol": 0}
    if rng.random() < 0.3:
        noise = torch.randn(made.guess.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 9
        options["initial"] = noise.to(made.guess.dtype)
    if rng.random() < 0.2:
        options["verify"] = True
    hooked = rng.random() < 0.4
    return Hooked(made, seed, holds=kind != "overflowing") if hooked else made.system(), made, options


@pytest.mark.parametrize("count", [1000, pytest.param(5_000, marks=pytest.mark.slow)])
def test_fuzzed_systems(count: int) -> None:
    for seed in range(count):
        system, made, options = random_case(seed)
        truth = system.truth() if isinstance(system, Hooked) else made.truth()
        solve = pd.solve if made.kind == "overflowing" else watch_finals
        solution = solve(system, **options)
        assert torch.equal(solution.value.nan_to_num(3.0), truth.nan_to_num(3.0)), (seed, options)
        assert solution.passes <= made.length, (seed, options)
        fronts = solution.layers[0].fronts
        assert bool((fronts.diff(dim=0) >= 0).all()) and bool((fronts[-1] == made.length).all()), (seed, options)
        for status, row in zip(solution.status, truth, strict=True):
            assert status is (pd.Status.EXACT if row.isfinite().all() else pd.Status.NON_FINITE), (seed, options)
