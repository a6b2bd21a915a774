"""Random numbers are Philox4x32-10 to the word, and depend on seed, stream, step and position alone.

Oracle: the known-answer vectors that Salmon et al. publish with Random123 (`kat_vectors`).
"""

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nfscale.rng import Stream, as_tensor, datum_seed, normal, philox, rademacher, uniform, words

SEEDS = as_tensor([datum_seed(0, f"datum-{index}") for index in range(64)])

KNOWN_ANSWERS = [
    # counter, key, expected
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, expected):
    keys = as_tensor([key[0] | key[1] << 32])
    from_numbers = philox(keys, counter)
    from_tensors = philox(keys, tuple(torch.tensor([word]) for word in counter))
    assert tuple(int(word) for word in from_numbers) == expected
    assert tuple(int(word) for word in from_tensors) == expected


def test_philox_of_a_batch_is_philox_of_each_member():
    keys = as_tensor([key[0] | key[1] << 32 for _, key, _ in KNOWN_ANSWERS])
    counter = tuple(torch.tensor(word) for word in zip(*(c for c, _, _ in KNOWN_ANSWERS), strict=True))
    drawn = torch.stack(philox(keys, counter), dim=-1)
    assert drawn.tolist() == [list(expected) for _, _, expected in KNOWN_ANSWERS]


def philox_of_integers(key: int, counter: list[int]) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers, as the paper writes it."""
    word = 0xFFFFFFFF
    k0, k1 = key & word, key >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & word, (p0 >> 32) ^ c3 ^ k1, p0 & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return [c0, c1, c2, c3]


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_philox_equals_unbounded_integer_arithmetic(key, counter):
    assert [int(word) for word in philox(as_tensor([key]), tuple(counter))] == philox_of_integers(key, counter)


def test_words_are_the_lanes_of_the_counter_in_order():
    seed, step = datum_seed(0, "datum-0"), 5
    lanes = [philox_of_integers(seed, [lane, step, int(Stream.SAMPLING), 0]) for lane in range(3)]
    assert words(as_tensor([seed]), Stream.SAMPLING, step, 10).tolist() == [
        [word for lane in lanes for word in lane][:10]
    ]


@pytest.mark.parametrize("draw", [words, uniform, normal, rademacher])
def test_a_draw_does_not_depend_on_the_place_in_the_batch(draw):
    together = draw(SEEDS, Stream.PROBE, 3, 37)
    order = torch.arange(len(SEEDS)).flip(0)
    assert torch.equal(draw(SEEDS[order], Stream.PROBE, 3, 37), together[order])
    for index in (0, 5, 63):
        assert torch.equal(draw(SEEDS[index : index + 1], Stream.PROBE, 3, 37)[0], together[index])


@pytest.mark.parametrize("draw", [words, uniform, normal, rademacher])
def test_a_longer_draw_begins_with_the_shorter(draw):
    assert torch.equal(draw(SEEDS, Stream.INIT, 0, 101)[:, :33], draw(SEEDS, Stream.INIT, 0, 33))


@pytest.mark.parametrize("draw", [words, uniform, normal, rademacher])
def test_steps_of_a_batch_are_the_fields_own(draw):
    steps = torch.arange(len(SEEDS)) * 7
    together = draw(SEEDS, Stream.SAMPLING, steps, 40)
    for index in (0, 1, 42):
        assert torch.equal(draw(SEEDS, Stream.SAMPLING, int(steps[index]), 40)[index], together[index])


def test_streams_steps_and_seeds_share_no_words():
    draws = [
        words(SEEDS[:8], stream, step, 64) for stream in (Stream.INIT, Stream.SAMPLING, Stream.PROBE) for step in (0, 1)
    ]
    everything = torch.cat([d.flatten() for d in draws])
    # 3,072 words of 2^32: 0.001 coincidences are expected.
    assert len(everything.unique()) == len(everything)


def test_streams_keep_their_numbers():
    assert {stream.name: int(stream) for stream in Stream}.items() >= {"INIT": 0, "SAMPLING": 1, "PROBE": 2}.items()


def test_uniform_has_range_and_moments_of_the_unit_interval():
    drawn = uniform(SEEDS, Stream.INIT, 0, 4096)
    assert drawn.dtype == torch.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert torch.equal(drawn * 2**24, (drawn * 2**24).round())
    values, count = drawn.double(), drawn.numel()
    for moment in (1, 2, 3, 4):
        expected, variance = 1 / (moment + 1), 1 / (2 * moment + 1) - 1 / (moment + 1) ** 2
        assert abs(values.pow(moment).mean() - expected) < 4 * (variance / count) ** 0.5


def test_uniform_draws_of_neighbouring_positions_and_seeds_are_uncorrelated():
    drawn = uniform(SEEDS, Stream.INIT, 0, 4096).double() - 0.5
    for product in (drawn[:, 1:] * drawn[:, :-1], drawn[1:] * drawn[:-1]):
        assert abs(product.mean()) < 4 / 12 / product.numel() ** 0.5


def test_normal_has_the_distribution_of_its_name():
    drawn = normal(SEEDS, Stream.NOISE, 2, 4097)
    assert drawn.shape == (64, 4097)
    assert drawn.dtype == torch.float32
    law, count = scipy.stats.norm, drawn.numel()
    assert (
        scipy.stats.kstest(drawn.flatten().numpy(), law.cdf).statistic < 1.63 / count**0.5
    )  # 1 % of true draws are above
    pairs = drawn[:, :4096].double().view(64, -1, 2)
    assert abs(pairs.prod(dim=2).mean()) < 4 / pairs[..., 0].numel() ** 0.5


def test_rademacher_is_balanced_signs():
    signs = rademacher(SEEDS, Stream.PROBE, 0, 4099)
    assert signs.shape == (64, 4099)
    assert signs.dtype == torch.float32
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    assert abs(signs.mean()) < 4 / signs.numel() ** 0.5
    # Each of a word's 32 bits on its own, and each sign against the next.
    bits = signs[:, :4096].reshape(-1, 32)
    assert (bits.mean(dim=0).abs() < 4 / len(bits) ** 0.5).all()
    assert abs((signs[:, 1:] * signs[:, :-1]).mean()) < 4 / signs.numel() ** 0.5


def test_datum_seed_never_changes():
    # Frozen: stored tables name these seeds, and another hash would make every one of them irreproducible.
    assert datum_seed(0, "datum-0") == 5513091600957548537
    assert datum_seed(2**40, "bücher/π.png") == 7222625972469419013


def test_datum_seeds_differ_by_seed_and_by_id():
    seeds = {datum_seed(seed, f"{index}") for seed in range(20) for index in range(200)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**64 for seed in seeds)
    # The separator keeps seed 1 with id "23" apart from seed 12 with id "3".
    assert datum_seed(1, "23") != datum_seed(12, "3")


def test_seeds_keep_all_their_64_bits_as_a_tensor():
    seeds = [0, 1, 2**63 - 1, 2**63, 2**64 - 1]
    tensor = as_tensor(seeds)
    assert tensor.dtype == torch.int64
    assert [int(seed) % 2**64 for seed in tensor] == seeds
