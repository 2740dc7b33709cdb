"""Grouping neurons: equal sizes, reproducible, and better than chance."""

import pytest
import torch

from lte.nn.clustering import CoactivationCounts, balanced_kmeans, check_expert_size, group_neurons, inertia


def order_of(features, expert_size, method="kmeans", seed=0):
    return group_neurons(features, num_neurons=len(features), expert_size=expert_size, method=method, seed=seed)


def planted(num_experts, expert_size, width, noise, seed=0):
    """Rows around well separated centres, shuffled; returns rows and their true cluster."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_experts).repeat_interleave(expert_size)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centres = torch.randn(num_experts, width, generator=generator)
    return centres[labels] + noise * torch.randn(len(labels), width, generator=generator), labels


@pytest.mark.parametrize("method", ["kmeans", "coactivation", "random", "contiguous"])
@pytest.mark.parametrize(("neurons", "size"), [(64, 32), (96, 32), (100, 10), (64, 64), (64, 1), (1536, 32)])
def test_every_order_is_a_permutation(method, neurons, size):
    features = torch.randn(neurons, neurons).abs()
    order = order_of(features, size, method)
    assert order.sort().values.equal(torch.arange(neurons))
    assert order.dtype == torch.int64


@pytest.mark.parametrize("method", ["kmeans", "random"])
def test_a_seed_fixes_the_grouping_and_another_changes_it(method):
    features = torch.randn(256, 24)
    assert order_of(features, 32, method, 1).equal(order_of(features, 32, method, 1))
    assert not order_of(features, 32, method, 1).equal(order_of(features, 32, method, 2))


def test_kmeans_does_not_depend_on_the_number_of_threads():
    features, threads = torch.randn(512, 40), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = order_of(features, 32)
    finally:
        torch.set_num_threads(threads)
    assert single.equal(order_of(features, 32))


def test_clusters_have_exactly_equal_sizes():
    # All rows want the same centroid: nine tenths of them lie on one point.
    features = torch.zeros(320, 8)
    features[:32] = torch.randn(32, 8)
    assert (torch.bincount(torch.from_numpy(balanced_kmeans(features, 10, seed=0))) == 32).all()


def test_each_neuron_is_nearer_to_its_planted_group_than_chance():
    features, labels = planted(num_experts=12, expert_size=32, width=48, noise=0.1)
    grouped = labels[order_of(features, 32)].view(12, 32)
    purity = sum((row == row.mode().values).sum().item() for row in grouped) / labels.numel()
    # One random start may merge two groups; chance is about 0.2.
    assert purity > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kmeans_beats_random_grouping(dtype):
    features, _ = planted(num_experts=16, expert_size=32, width=64, noise=1.0)
    found = inertia(features, order_of(features.to(dtype), 32), 32)
    chance = inertia(features, order_of(features, 32, "random"), 32)
    assert found < 0.75 * chance


def test_duplicates_and_zero_rows_give_no_nan():
    features = torch.zeros(64, 8)
    assert order_of(features, 32).sort().values.equal(torch.arange(64))


def test_coactivation_finds_neurons_that_fire_together():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8).repeat_interleave(16)[torch.randperm(128, generator=generator)]
    counts = CoactivationCounts(128, top_fraction=1 / 8)
    for _ in range(4):
        topic = torch.randint(0, 8, (100, 1), generator=generator)
        noise = 0.1 * torch.randn(100, 128, generator=generator)
        counts.update(torch.where(labels[None] == topic, -1.0, 0.0) + noise)
    assert counts.counts.diagonal().sum() == 400 * 16
    grouped = labels[order_of(counts.counts, 16, "coactivation")].view(8, 16)
    assert sum((row == row.mode().values).sum().item() for row in grouped) / 128 > 0.8


def test_a_size_that_does_not_fit_names_those_that_do():
    with pytest.raises(ValueError, match=r"expert_size=32 for 1000 neurons; sizes that fit: 8, 10, 20, 25, 40, 50"):
        check_expert_size(1000, 32)


def test_missing_features_and_unknown_methods_are_errors():
    with pytest.raises(ValueError, match="features must have 64 rows for method=kmeans"):
        group_neurons(None, num_neurons=64, expert_size=32, method="kmeans", seed=0)
    with pytest.raises(ValueError, match="did you mean kmeans"):
        group_neurons(None, num_neurons=64, expert_size=32, method="kmean", seed=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_of_the_weights_does_not_matter():
    features = torch.randn(1536, 576)
    assert order_of(features, 32).equal(order_of(features.cuda(), 32))
