"""Seeds: EDM's order of draws, and images of a seed that do not depend on the batch around it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdd_fast.errors import ConfigError
from gdd_fast.sampling.seeds import SeedStreams, latents, parse_seeds

SHAPE = (3, 4, 4)


def test_a_seed_draws_its_latent_then_its_class_from_its_own_generator():
    z, labels = latents([7, 123456], SHAPE, label_dim=10)
    for i, seed in enumerate([7, 123456]):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(z[i], torch.randn(SHAPE, generator=generator))
        assert labels[i].argmax() == torch.randint(10, (), generator=generator)
    assert z.dtype == labels.dtype == torch.float32
    assert torch.equal(labels.sum(1), torch.ones(2))


def test_the_batch_does_not_change_an_image():
    seeds = [5, 0, 99, 3]
    together, labels = latents(seeds, SHAPE, label_dim=1000)
    for i, seed in enumerate(seeds):
        alone, label = latents([seed], SHAPE, label_dim=1000)
        assert torch.equal(alone[0], together[i])
        assert torch.equal(label[0], labels[i])


def test_a_class_replaces_the_label_and_leaves_the_latents():
    drawn, _ = latents(range(6), SHAPE, label_dim=10)
    chosen, labels = latents(range(6), SHAPE, label_dim=10, class_index=3)
    assert torch.equal(drawn, chosen)
    assert labels.argmax(1).tolist() == [3] * 6


def test_without_classes_there_are_no_labels():
    assert latents([0], SHAPE)[1] is None


def test_noise_of_a_stochastic_sampler_goes_on_where_the_label_ended():
    streams = SeedStreams([4])
    streams.start(SHAPE, label_dim=10)
    generator = torch.Generator().manual_seed(4)
    torch.randn(SHAPE, generator=generator)
    torch.randint(10, (), generator=generator)
    expected = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    assert torch.equal(streams.normal_like(torch.empty(1, *SHAPE, dtype=torch.float64))[0], expected)


def test_seeds_wrap_at_32_bits():
    assert torch.equal(latents([1 << 32], SHAPE)[0], latents([0], SHAPE)[0])


def test_no_seeds_make_an_empty_batch():
    z, labels = latents([], SHAPE, label_dim=10)
    assert z.shape == (0, *SHAPE)
    assert labels.shape == (0, 10)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    latents([1, 2], SHAPE, label_dim=10)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("class_index", "label_dim"), [(0, 0), (10, 10), (-1, 10)])
def test_a_class_the_network_does_not_have(class_index, label_dim):
    with pytest.raises(ConfigError, match="class"):
        latents([0], SHAPE, label_dim, class_index=class_index)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-3,12", [0, 1, 2, 3, 12]), ("7", [7]), (" 3 , 5-6", [3, 5, 6]), ("9,0-1", [9, 0, 1]), ("4-4", [4])],
)
def test_seed_lists(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1,", "1-", "-1", "1--2", "5-3", "1.5", "0-3,2", "1;2", "4294967296"])
def test_malformed_seed_lists(text):
    with pytest.raises(ConfigError, match="--seeds"):
        parse_seeds(text)


@given(st.sets(st.integers(0, 2**32 - 1), min_size=1, max_size=8).map(sorted))
def test_any_list_of_seeds_is_read_back(seeds):
    assert parse_seeds(",".join(map(str, seeds))) == seeds
