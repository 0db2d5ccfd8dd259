"""cuDNN's attention is passed over while a system is solved on a CUDA device, and only then."""

from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import parallel_decode as pd
from parallel_decode._attention import cudnn, without_plans


def enabled_in_a_solve(*, fails: bool = False) -> bool:
    seen: list[bool] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(cudnn())
        if fails:
            raise ArithmeticError
        return 1 + torch.nn.functional.pad(x, (1, -1)) / 2

    with ExitStack() as stack:
        if fails:
            stack.enter_context(pytest.raises(ArithmeticError))
        pd.solve(pd.from_function(f, torch.zeros(1, 4)))
    assert len(set(seen)) == 1
    return seen[0]


@pytest.mark.parametrize("fails", [False, True])
def test_it_is_passed_over_on_cuda_and_comes_back(fails: bool) -> None:
    assert cudnn()
    assert enabled_in_a_solve(fails=fails), "there is no CUDA device here"
    with patch("torch.cuda.is_initialized", return_value=True):
        assert not enabled_in_a_solve(fails=fails)
    assert cudnn()


def test_who_asked_for_cudnn_alone_or_for_none_keeps_that() -> None:
    with patch("torch.cuda.is_initialized", return_value=True):
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            assert enabled_in_a_solve()
        with sdpa_kernel([SDPBackend.MATH]):
            assert not enabled_in_a_solve()
            assert not cudnn()
        with without_plans(), without_plans():
            assert not cudnn()
        assert cudnn()
