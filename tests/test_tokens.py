"""What systems of tokens share: couplings of drafts with distributions, and guesses."""

import pytest
import torch
from torch import Tensor

from parallel_decode.tokens import (
    Choice,
    Draft,
    Drafting,
    Greedy,
    Guess,
    Gumbel,
    Last,
    Maximal,
    NGram,
    Repeat,
    Speculative,
)

V, MANY = 5, 20000


def distribution(seed: int) -> Tensor:
    """Scores of one position, shape (V,)."""
    return torch.randn(V, generator=torch.Generator().manual_seed(seed))


def batch(*scores: Tensor) -> Tensor:
    """The same scores for MANY rows, a position each: (MANY, W, V)."""
    return torch.stack(scores).expand(MANY, -1, -1)


def frequencies(tokens: Tensor) -> Tensor:
    return torch.bincount(tokens, minlength=V) / len(tokens)


def close(tokens: Tensor, scores: Tensor) -> bool:
    """Whether tokens are a sample of softmax(scores): every frequency within 5 standard deviations."""
    p = scores.softmax(-1)
    return bool(((frequencies(tokens) - p).abs() < 5 * (p * (1 - p) / len(tokens)).sqrt() + 1e-9).all())


def positions(*at: int, rows: int = MANY) -> Tensor:
    return torch.tensor(at).expand(rows, -1)


ROWS = torch.arange(MANY)


@pytest.mark.parametrize("choice", [Maximal, Speculative])
def test_what_is_drawn_has_the_distribution_whatever_the_draft(choice: type[Maximal]) -> None:
    torch.manual_seed(0)
    p = [distribution(seed) for seed in range(3)]
    for draft in range(V):
        drafts = torch.full((MANY, 3), draft)
        tokens = choice()(batch(*p), drafts, torch.ones_like(drafts).bool(), positions(0, 1, 2), ROWS)
        assert all(close(tokens[:, w], p[w]) for w in range(3))


def test_a_draft_from_another_distribution_is_kept_as_often_as_any_rule_can() -> None:
    """The draft comes from q and what is chosen from p: they agree with probability sum min(p, q), the most that a coupling reaches."""
    torch.manual_seed(0)
    q, p, choice = distribution(0), distribution(1), Maximal()
    none = torch.zeros(MANY, 2, dtype=torch.long)
    drafts = choice(batch(q, q), none, torch.ones_like(none).bool(), positions(7, 8), ROWS)
    tokens = choice(batch(p, p), drafts, torch.zeros_like(none).bool(), positions(7, 8), ROWS)
    agreement = torch.minimum(p.softmax(-1), q.softmax(-1)).sum()
    for at in (0, 1):
        assert close(drafts[:, at], q) and close(tokens[:, at], p)
        assert ((drafts == tokens)[:, at].float().mean() - agreement).abs() < 5 * (0.25 / MANY) ** 0.5
    again = choice(batch(p, p), tokens, torch.zeros_like(none).bool(), positions(7, 8), ROWS)
    assert torch.equal(again, tokens), "a sample of the same distribution stays"


def test_a_window_of_one_is_drawn_anew() -> None:
    torch.manual_seed(0)
    q, p, choice = distribution(0), distribution(1), Maximal()
    none = torch.zeros(MANY, 1, dtype=torch.long)
    drafts = choice(batch(q), none, torch.ones_like(none).bool(), positions(7), ROWS)
    tokens = choice(batch(p), drafts, torch.zeros_like(none).bool(), positions(7), ROWS)
    assert close(drafts[:, 0], q) and close(tokens[:, 0], p)
    independent = (p.softmax(-1) * q.softmax(-1)).sum()
    assert ((drafts == tokens).float().mean() - independent).abs() < 5 * (0.25 / MANY) ** 0.5


def test_speculative_draws_anew_beyond_the_first_refusal() -> None:
    torch.manual_seed(0)
    certain, other = torch.full((V,), -torch.inf), distribution(3)
    certain[2] = 0.0
    choice, none = Speculative(), torch.zeros(MANY, 2, dtype=torch.long)
    first = choice(batch(certain, other), none, torch.ones_like(none).bool(), positions(0, 1), ROWS)
    moved = torch.full((V,), -torch.inf)
    moved[1] = 0.0
    second = choice(batch(moved, other), first, torch.zeros_like(none).bool(), positions(0, 1), ROWS)
    assert (first[:, 0] == 2).all() and (second[:, 0] == 1).all()
    assert close(second[:, 1], other)
    p = other.softmax(-1)
    assert ((first[:, 1] == second[:, 1]).float().mean() - (p * p).sum()).abs() < 0.02, "independent of the draft"
    third = choice(batch(moved, other), second, torch.zeros_like(none).bool(), positions(0, 1), ROWS)
    assert torch.equal(third, second)


@pytest.mark.parametrize("strided", [1, 2])
def test_the_distributions_of_the_last_window_are_found_by_row_and_position(strided: int) -> None:
    """Rows leave, windows move, each row by its own: a sample whose distribution has not changed stays, wherever it is."""
    torch.manual_seed(0)
    choice, rows = Maximal(), torch.arange(6)
    scores = torch.randn(6, 12, 50)
    at = (torch.arange(0, 8, strided)).expand(6, -1)
    guessed = torch.ones(at.shape, dtype=torch.bool)
    text = torch.zeros(6, 12, dtype=torch.long)
    text.scatter_(
        1, at, choice(scores.gather(1, at[..., None].expand(-1, -1, 50)), text.gather(1, at), guessed, at, rows)
    )
    stay = torch.tensor([1, 2, 5])
    at = torch.arange(2, 10, strided) + torch.tensor([[0], [strided], [2 * strided]]).clamp(max=2)
    drafts, known = text[stay].gather(1, at), at < 8
    tokens = choice(scores[stay].gather(1, at[..., None].expand(-1, -1, 50)), drafts, ~known, at, stay)
    assert torch.equal(tokens[known], drafts[known]) and not torch.equal(tokens, drafts)
    assert choice._last is not None and choice._last[2].shape == (3, at.shape[1], 50), "of the last window alone"


def test_draws_reach_every_token_that_has_a_probability_and_no_other() -> None:
    torch.manual_seed(0)
    scores = torch.full((MANY, 1, V), -torch.inf)
    scores[..., 1], scores[..., 3] = 0.0, -3.0
    none = torch.zeros(MANY, 1, dtype=torch.long)
    tokens = Maximal()(scores, none, torch.ones_like(none).bool(), positions(0), ROWS)
    assert set(tokens.flatten().tolist()) == {1, 3}


@pytest.mark.parametrize("choice", [Greedy(), Gumbel(2, torch.device("cpu"))], ids=["greedy", "gumbel"])
def test_functions_of_the_scores_do_not_ask_what_was_guessed(choice: Choice) -> None:
    scores, at = torch.randn(2, 3, V), positions(0, 1, 2, rows=2)
    tokens = choice(scores, torch.zeros(2, 3, dtype=torch.long), None, at, torch.arange(2))
    assert torch.equal(choice(scores, tokens, None, at, torch.arange(2)), tokens) and not choice.couples


def test_a_gumbel_for_another_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="row 2 of a batch of 2"):
        Gumbel(2, "cpu")(torch.randn(3, 1, V), torch.zeros(3, 1), None, positions(0, rows=3), torch.arange(3))


# guesses


def test_an_n_gram_goes_on_as_the_text_did() -> None:
    guess = NGram(longest=3)
    guess.begin([[1, 2, 3, 1, 2]])
    text = [1, 2, 3, 1, 2]
    assert guess.draft(0, text, [], 7) == ([3, 1, 2, 3, 1, 2, 3], 2)
    text = [*text, 9]
    assert guess.draft(0, text, [], 4) == ([], 0)
    text = [*text, 1]
    assert guess.draft(0, text, [], 4) == ([2, 9, 1, 2], 1), "the latest place counts"
    assert Repeat().draft(0, text, [], 2) == ([1, 1], 1) and Last().draft(0, text, [], 2) == ([], 0)
    with pytest.raises(ValueError, match="shortest is 3"):
        NGram(2, 3)


def test_fresh_drafts_go_on_behind_the_predictions_and_do_not_learn_from_them() -> None:
    guess = NGram(longest=2, fresh=True)
    guess.begin([[5, 6, 7, 8]])
    assert guess.draft(0, [5, 6, 7, 8], [5, 6], 2) == ([7, 8], 2)
    assert guess.draft(0, [5, 6, 7, 8], [9, 9], 2) == ([], 0)
    assert guess.draft(0, [5, 6, 7, 8, 9], [], 2) == ([], 0), "9 9 was a prediction, not text"
    assert Repeat().draft(0, [5], [6], 2) == ([6, 6], 1)
    assert Draft(lambda text, most: [len(text)]).draft(0, [5], [6, 7], 2) == ([3], 1)


def test_refused_predictions_are_remembered_where_the_text_has_nothing() -> None:
    guess = NGram(longest=2, recycles=True)
    guess.begin([[1, 2]])
    guess.refused(0, [1, 2], [3, 4, 5])
    assert guess.draft(0, [1, 2, 9, 3], [], 4) == ([4, 5], 3)  # a kind of its own, since it comes true less often
    assert guess.draft(0, [1, 2, 9, 3, 4], [], 4) == ([5], 4)
    assert guess.draft(0, [1, 2, 9, 3, 4, 3], [], 1) == ([4], 1), "the text goes before"
    assert NGram().recycles is False


# drafting


def drafting(guess: Guess, batch: int = 2, couples: bool = False) -> tuple[Drafting, Tensor]:
    made, x = Drafting(guess, [[1, 2], [3]][:batch], 10, couples), torch.zeros(batch, 10, dtype=torch.long)
    made.write(x)
    return made, x


def test_texts_grow_to_the_fronts_and_drafts_follow_them() -> None:
    made, x = drafting(Draft(lambda text, most: [len(text)] * 3))
    assert x[:, :4].tolist() == [[2, 2, 2, 0], [1, 1, 1, 0]]
    x[:, :4] = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    assert made.accept(x, [1, 3], [0, 0], 4) == {0: 1, 1: 3}
    assert made.texts == [[1, 2, 5], [3, 5, 6, 7]] and made.outcomes == [], (
        "of the first pass nothing was drafted before"
    )
    written = made.write(x)
    assert x.tolist()[0][:5] == [5, 3, 3, 3, 0] and x.tolist()[1][:7] == [5, 6, 7, 4, 4, 4, 0]
    assert written == [(0, range(1, 4)), (1, range(3, 6))]
    made.accept(x, [3, 4], [1, 3], 3)
    assert made.outcomes == [(1, 1, 2), (1, 0, 2)], "a kind, how many came true, of how many that were read"


def test_rows_end_are_cut_and_leave() -> None:
    made, x = drafting(Repeat())
    x[:] = 9
    made.accept(x, [4, 4], [0, 0], 4)
    made.cut(0, 2)
    assert made.texts[0] == [1, 2, 9, 9] and made.final(0) == 2
    made.end(0)
    assert made.going() == [1]
    subset = made.select([1])
    x[:] = 0
    subset.write(x[1:])
    assert x.tolist() == [[0] * 10, [0] * 4 + [9] * 6]
    assert subset.accept(x[1:], [10], [4], 6) == {0: 6} and made.final(1) == 10, "texts are shared, not copied"
    assert subset.write(x[1:]) == []


@pytest.mark.parametrize(
    ("fresh", "couples", "behind"),
    [(None, False, False), (None, True, True), (False, True, False), (True, False, True)],
)
def test_couplings_ask_for_fresh_drafts(fresh: bool | None, couples: bool, behind: bool) -> None:
    guess = NGram(fresh=fresh)
    made, x = drafting(guess, 1, couples)
    x[0, :4] = torch.tensor([5, 1, 2, 8])
    made.accept(x, [1], [0], 4)  # 1 2 8 are predictions
    made.write(x)
    assert x[0, 1:4].tolist() == [1, 2, 8], "no n-gram of 5, or behind the predictions: they stay in both"
    x[0, :4] = torch.tensor([5, 1, 7, 7])
    made.accept(x, [2], [1], 3)
    made.write(x)
    assert (x[0, 2:4].tolist() == [7, 7]) == behind, "1 was followed by 2 in the text"


def test_drafts_that_would_bias_a_coupling_are_refused() -> None:
    drafting(NGram(recycles=True), couples=True)
    drafting(NGram(recycles=True, fresh=False))
    with pytest.raises(ValueError, match="bias"):
        drafting(NGram(recycles=True, fresh=False), couples=True)


@pytest.mark.parametrize("coupling", [Maximal, Speculative])
def test_what_could_not_be_drawn_is_no_sample_of_the_next_pass(coupling: type[Maximal]) -> None:
    """Where a wrong draft before it left a position without scores, it is drawn as if it was new."""
    choice = coupling(torch.Generator().manual_seed(0))
    drafts, places, rows = torch.tensor([[1, 2]]), torch.tensor([[0, 1]]), torch.zeros(1, dtype=torch.long)
    scores = torch.zeros(1, 2, 8)
    scores[0, 1] = float("nan")
    found = choice(scores, drafts, torch.ones(1, 2, dtype=torch.bool), places, rows)
    assert choice.undrawable is not None and choice.undrawable.tolist() == [[False, True]]
    scores = torch.full((1, 2, 8), -float("inf"))
    scores[0, 0, found[0, 0]] = scores[0, 1, 5] = 0.0  # nothing else can be
    assert choice(scores, found, torch.zeros(1, 2, dtype=torch.bool), places, rows).tolist() == [[int(found[0, 0]), 5]]
    assert not bool(choice.undrawable.any())


@pytest.mark.parametrize("kind", [Maximal, Speculative])
def test_a_draft_beyond_the_vocabulary_becomes_a_token_of_it(kind: type[Maximal]) -> None:
    """An image's prompt, which windows hold at first, has tokens that the image itself cannot have."""
    drafts, guessed = torch.full((1, 3), 9), torch.ones(1, 3, dtype=torch.bool)
    tokens = kind()(torch.zeros(1, 3, 4), drafts, guessed, torch.arange(3)[None], torch.arange(1))
    assert tokens.shape == (1, 3) and bool((tokens < 4).all())
