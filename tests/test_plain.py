"""The sampler that others are compared with, and the threads that the demo takes."""

import pytest
import torch

import parallel_decode as pd
from parallel_decode._threads import best_threads
from parallel_decode.adapters.tarflow import TarFlow
from parallel_decode.adapters.tarflow.plain import plain_sample


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("classes", [0, 3])
def test_the_plain_sampler_draws_what_sequential_decoding_draws(nvp: bool, classes: int) -> None:
    torch.manual_seed(0)
    flow = TarFlow(3, 8, 2, 64, 3, 2, nvp=nvp, num_classes=classes).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    z, y = torch.randn(2, 16, 12, dtype=torch.double), torch.tensor([1, 2]) if classes else None
    truth = pd.solve(flow.system(z, y=y), "sequential").value
    assert (truth - flow.unpatchify(z)).abs().max() > 0.1
    torch.testing.assert_close(plain_sample(flow, z, y), truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("seconds", "best"), [({1: 1.0, 2: 3.0}, 1), ({1: 3.0, 2: 1.0}, 2)])
def test_the_faster_number_of_threads_is_taken_for_a_while(
    seconds: dict[int, float], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, threads = [0.0], [2]

    def run() -> None:
        now[0] += seconds[threads[0]]

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("torch.get_num_threads", lambda: threads[0])
    monkeypatch.setattr("torch.set_num_threads", lambda n: threads.__setitem__(0, n))
    with pytest.raises(KeyError), best_threads(run) as chosen:
        assert chosen == threads[0] == best
        raise KeyError
    assert threads == [2], "as before, whatever happens"
