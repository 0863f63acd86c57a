"""A run's requests come in one order, which every round enters where the one before it left."""

import itertools

import pytest
import torch

from beear.draws import PURPOSES, Draws, Purpose


def taken(purpose: Purpose, seed: int, number: int, n: int = 20, batch: int = 3, each: int = 4) -> list[list[int]]:
    return list(itertools.islice(Draws(seed, number).batches(purpose, n, batch, each), each))


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("seed", [0, 7])
def test_rounds_meet_every_request_before_they_meet_one_twice(purpose: Purpose, seed: int) -> None:
    met = [i for number in range(1, 6) for batch in taken(purpose, seed, number) for i in batch]
    assert len(met) == 60
    for k in range(3):
        assert sorted(met[20 * k : 20 * k + 20]) == list(range(20))


def test_a_purpose_draws_the_same_whatever_else_was_drawn() -> None:
    busy = Draws(1, 3)
    torch.rand(7, generator=busy.noise)
    list(itertools.islice(busy.batches("anchored", 20, 3, 4), 9))
    assert list(itertools.islice(busy.batches("entrapped", 20, 3, 4), 4)) == taken("entrapped", 1, 3)
    list(itertools.islice(busy.batches("entrapped", 20, 3, 4), 2))
    noise = torch.Generator().manual_seed(0)
    noise.set_state(busy.noise.get_state())
    assert torch.equal(torch.rand(12, generator=Draws(1, 3).noise)[7:], torch.rand(5, generator=noise))


def test_seeds_rounds_and_purposes_draw_apart() -> None:
    drawn = [taken(purpose, seed, number) for purpose in PURPOSES for seed in (0, 1) for number in (1, 2)]
    assert all(one != other for one, other in itertools.combinations(drawn, 2))
    noise = [torch.rand(5, generator=Draws(seed, number).noise) for seed in (0, 1) for number in (1, 2)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(noise, 2))


def test_fewer_requests_than_a_batch_are_met_together() -> None:
    assert [sorted(batch) for batch in taken("hardened", 0, 2, n=2)] == [[0, 1]] * 4
