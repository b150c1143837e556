"""The choice of a next token: what a request says of it, and the same seed, the same token."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from torchserve_dag import Chat, InputError, Prompt
from torchserve_dag.runtime.models.language.transformers.sampler import DefaultSampling, Sampler

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])
PROBABILITIES = LOGITS.softmax(-1).tolist()
DRAWS = 1000
GREEDY = DefaultSampling()


def sampler(defaults: DefaultSampling = GREEDY, index: int = 0, **sampling) -> Sampler:
    return Sampler(Chat.of("", **sampling), index, defaults, len(LOGITS))


def drawn(**sampling) -> dict[int, float]:
    """How often each token was chosen, each at a place of its own."""
    chooser = sampler(seed=7, **sampling)
    return {
        token: count / DRAWS
        for token, count in Counter(chooser.choose(LOGITS, [0] * place) for place in range(DRAWS)).items()
    }


def test_without_a_temperature_the_most_probable_token_is_chosen() -> None:
    assert not sampler().changes
    assert drawn() == {0: 1.0}
    assert drawn(temperature=0) == {0: 1.0}


def test_tokens_are_drawn_by_their_probabilities() -> None:
    """Within four standard deviations; the seed is fixed, so that the test cannot fail by chance."""
    shares = drawn(temperature=1)

    for token, probability in enumerate(PROBABILITIES):
        assert shares[token] == pytest.approx(probability, abs=4 * (probability * (1 - probability) / DRAWS) ** 0.5)


def test_a_lower_temperature_sharpens_and_the_lowest_overflows_nothing() -> None:
    assert drawn(temperature=0.5)[0] > drawn(temperature=1)[0] > drawn(temperature=2)[0]
    assert drawn(temperature=1e-300) == {0: 1.0}


def test_top_p_leaves_the_fewest_tokens_that_reach_it() -> None:
    first, second = PROBABILITIES[:2]

    assert set(drawn(temperature=1, top_p=first - 0.01)) == {0}
    assert set(drawn(temperature=1, top_p=first + 0.01)) == {0, 1}
    assert set(drawn(temperature=1, top_p=first + second + 0.01)) == {0, 1, 2}
    assert set(drawn(temperature=1, top_p=0)) == {0}


def test_the_model_says_how_it_writes_where_the_request_does_not() -> None:
    defaults = DefaultSampling(temperature=1.0, top_k=2)
    chosen = {sampler(defaults, seed=3).choose(LOGITS, [0] * place) for place in range(200)}

    assert chosen == {0, 1}
    assert not sampler(defaults, temperature=0).changes


def test_a_seed_gives_the_same_token_in_the_same_place_only() -> None:
    places = [[sampler(temperature=1, seed=seed, index=index).choose(torch.zeros(4), [0] * place) for place in range(50)]
              for seed, index in ((1, 0), (1, 0), (2, 0), (1, 1))]  # fmt: skip

    assert places[0] == places[1]
    assert places[0] != places[2]
    assert places[0] != places[3]
    assert sampler(temperature=1, seed=-5).choose(LOGITS, []) == sampler(temperature=1, seed=-5).choose(LOGITS, [])
    sampler(temperature=1, seed=2**80).choose(LOGITS, [])


def test_a_bias_is_added_and_penalties_count_what_is_written() -> None:
    """2 against 1: a token written once loses .6 + .5, one written twice 2 * .6 + .5."""
    assert sampler(logit_bias={"3": 4}).choose(LOGITS, []) == 3
    assert sampler(logit_bias={"0": -100, "1": -100}).choose(LOGITS, []) == 2
    assert sampler(presence_penalty=1.5).choose(LOGITS, [0]) == 1
    assert sampler(frequency_penalty=0.6).choose(LOGITS, [0]) == 0
    assert sampler(frequency_penalty=0.6).choose(LOGITS, [0, 0]) == 1
    assert sampler(presence_penalty=-2).choose(LOGITS, [1]) == 1
    assert torch.equal(LOGITS, torch.tensor([2.0, 1.0, 0.0, -1.0]))  # not written into


def test_a_bias_of_a_token_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match="logit_bias: the model has no token 4; its last is 3"):
        sampler(logit_bias={"4": 1})


def test_log_probabilities_are_those_before_temperature_and_bias() -> None:
    chooser = sampler(temperature=0.1, seed=1, logit_bias={"2": 100}, logprobs=True, top_logprobs=2)
    token = chooser.choose(LOGITS, [])
    noted = chooser.take_logprobs(0, token, str)

    assert token == 2
    assert noted is not None
    assert noted[0].logprob == pytest.approx(LOGITS.log_softmax(-1)[2].item())
    assert [each.token for each in noted[0].top_logprobs or []] == ["0", "1"]
    assert sampler().take_logprobs(0, 0, str) is None
    assert Sampler(Prompt(prompt="", logprobs=0), 0, DefaultSampling(), 4).changes
