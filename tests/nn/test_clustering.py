"""Grouping neurons: equal sizes, the same groups everywhere, and better than chance."""

import pytest
import torch

from lte.nn.balanced_kmeans import MAX_NORM, integer_gram, partition
from lte.nn.clustering import (
    ChunkProducts,
    CoactivationCounts,
    ContributionProducts,
    check_expert_size,
    group_neurons,
    inertia,
)

METHODS = ["kmeans", "coactivation", "contribution", "chunks", "random", "contiguous"]
SHAPES = [(64, 100, 32), (96, 8, 32), (100, 24, 10), (64, 7, 64), (64, 5, 1), (1536, 16, 32)]


def order_of(features, expert_size, method="kmeans", seed=0):
    return group_neurons(features, num_neurons=len(features), expert_size=expert_size, method=method, seed=seed)


def planted(num_experts, expert_size, width, noise):
    """Rows around well separated centres, shuffled; returns rows and their true cluster."""
    labels = torch.arange(num_experts).repeat_interleave(expert_size)[torch.randperm(num_experts * expert_size)]
    centres = torch.randn(num_experts, width)
    return centres[labels] + noise * torch.randn(len(labels), width), labels


def purity(labels, order, expert_size):
    grouped = labels[order].view(-1, expert_size)
    return (grouped == grouped.mode(1, keepdim=True).values).float().mean().item()


def features_of(weights, method):
    """What `method` takes for neurons whose activations are the rows of `weights`."""
    if method == "chunks":
        products = ChunkProducts(weights.norm(dim=1), chunk=2)
        tokens = weights.shape[1] + weights.shape[1] % 2
        rows = torch.nn.functional.pad(weights, (0, tokens - weights.shape[1])).T[None]
        products.update_rows(rows, torch.ones(1, tokens, dtype=torch.bool))
        return products.gram
    if method not in ("coactivation", "contribution"):
        return weights
    collector = (
        CoactivationCounts(len(weights)) if method == "coactivation" else ContributionProducts(weights.norm(dim=1))
    )
    collector.update(weights.T)
    return collector.gram


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("neurons", "width", "size"), SHAPES)
def test_every_order_is_a_permutation_in_canonical_order(method, neurons, width, size):
    features = torch.randn(neurons, width)
    order = order_of(features_of(features, method), size, method)
    assert order.dtype == torch.int64
    assert order.sort().values.equal(torch.arange(neurons))
    experts = order.view(-1, size)
    assert (experts.diff(dim=1) > 0).all()
    assert (experts[:, 0].diff() > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_fixes_the_grouping_whatever_the_global_seed(method):
    features = torch.randn(256, 256).abs()
    first = order_of(features, 32, method, 1)
    torch.manual_seed(99)
    assert first.equal(order_of(features, 32, method, 1))


@pytest.mark.parametrize("method", ["kmeans", "random"])
def test_another_seed_gives_another_grouping(method):
    features = torch.randn(256, 24)
    assert not order_of(features, 32, method, 1).equal(order_of(features, 32, method, 2))


def test_kmeans_does_not_depend_on_the_number_of_threads():
    features, threads = torch.randn(2304, 40), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = order_of(features, 32)
        torch.set_num_threads(2)
        assert single.equal(order_of(features, 32))
    finally:
        torch.set_num_threads(threads)


def test_kmeans_does_not_depend_on_the_matmul_precision_or_autocast():
    features, precision = torch.randn(512, 40), torch.get_float32_matmul_precision()
    plain = order_of(features, 32)
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert plain.equal(order_of(features, 32))
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_gram_matrix_is_exact_and_close_to_the_true_one(scale, relative_rms):
    features = torch.randn(1100, 96)
    gram = integer_gram(features * scale)
    assert gram.equal(gram.round())
    assert gram.equal(gram.T)
    assert gram.abs().max() <= MAX_NORM**2
    # Another order of the columns is another order of summation.
    assert gram.equal(integer_gram((features * scale).flip(1)))
    centred = features - features.mean(0)
    true = centred @ centred.T
    assert relative_rms(gram * (true.trace() / gram.trace()), true) < 1e-2


def test_a_huge_row_leaves_resolution_for_the_others():
    features, labels = planted(num_experts=8, expert_size=16, width=32, noise=0.1)
    features[5] *= 1e3
    rest = torch.arange(128) != 5
    order = order_of(features, 16)
    # The huge row moves the mean and takes a place somewhere; the others still find together.
    assert purity(labels, order, 16) > 0.9
    assert integer_gram(features).diagonal()[rest].min() > 1000


def test_planted_clusters_are_recovered():
    features, labels = planted(num_experts=12, expert_size=32, width=48, noise=0.1)
    assert purity(labels, order_of(features, 32), 32) == 1


def test_hardly_a_swap_of_two_neurons_helps_in_the_end():
    features = torch.randn(48, 6)
    order = order_of(features, 8)
    found = inertia(features, order, 8)
    for here in range(48):
        for there in range(here // 8 * 8 + 8, 48):
            swapped = order.clone()
            swapped[[here, there]] = order[[there, here]]
            # Only the best leaver of each expert was tried for each other expert, on rounded rows.
            assert inertia(features, swapped, 8) > 0.99 * found


# Gaussian rows have no clusters: at D = 64 and groups of 32 there are about 10% to gain.
@pytest.mark.parametrize(("noise", "at_most"), [(0.5, 0.25), (1.0, 0.6), (1e3, 0.93)])
def test_kmeans_beats_random_grouping(noise, at_most):
    features, _ = planted(num_experts=16, expert_size=32, width=64, noise=noise)
    found = inertia(features, order_of(features, 32), 32)
    assert found < at_most * inertia(features, order_of(features, 32, "random"), 32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_group_as_their_fp32_values(dtype):
    features = torch.randn(256, 24).to(dtype)
    order = order_of(features, 32)
    assert order.equal(order_of(features.to(torch.float32), 32)) or dtype == torch.float64
    assert inertia(features, order, 32) < 0.9 * inertia(features, order_of(features, 32, "random"), 32)


@pytest.mark.parametrize("method", ["kmeans", "coactivation"])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-45])
def test_equal_rows_give_a_grouping_and_no_nan(method, value):
    features = torch.full((64, 64), value)
    assert order_of(features, 32, method).sort().values.equal(torch.arange(64))


def test_many_duplicates_are_grouped_with_equal_sizes():
    # All rows want the same centroid: nine tenths of them lie on one point.
    features = torch.zeros(320, 8)
    features[:32] = torch.randn(32, 8)
    order = order_of(features, 32)
    assert order.sort().values.equal(torch.arange(320))
    assert inertia(features, order, 32) < inertia(features, order_of(features, 32, "random"), 32)


def test_strided_features_with_gradient_are_accepted():
    weight = torch.randn(24, 64, requires_grad=True)
    assert order_of(weight.T, 32).equal(order_of(weight.detach().T.contiguous(), 32))


def test_inertia_is_the_mean_squared_distance_to_the_centroid():
    features = torch.tensor([[0.0], [10.0], [2.0], [14.0]])
    assert inertia(features, torch.tensor([0, 2, 1, 3]), 2) == pytest.approx((1 + 1 + 4 + 4) / 4)


def test_counts_are_those_of_neurons_that_fire_together():
    counts = CoactivationCounts(4, top_fraction=0.5)
    counts.update(torch.tensor([[3.0, -4.0, 1.0, 0.5], [0.0, 0.0, 2.0, 0.0]]).bfloat16())
    counts.update(torch.tensor([[1.0, 0.0, 0.0, -1.0]]))
    expected = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0]))
    expected[0, 1] = expected[1, 0] = expected[0, 3] = expected[3, 0] = 1
    assert counts.gram.equal(expected)


def test_coactivation_groups_planted_sets_whatever_fires_for_every_token():
    labels = torch.arange(8).repeat_interleave(16)[torch.randperm(128)]
    counts = CoactivationCounts(128, top_fraction=1 / 8)
    for _ in range(4):
        topic = torch.randint(0, 8, (100, 1))
        counts.update(torch.where(labels == topic, -1.0, 0.0) + 0.1 * torch.randn(100, 128))
    assert counts.gram.diagonal().sum() == 400 * 16
    assert purity(labels, order_of(counts.gram, 16, "coactivation"), 16) == 1


def test_contributions_group_planted_sets_of_any_scale():
    labels = torch.arange(8).repeat_interleave(16)[torch.randperm(128)]
    scale = torch.rand(128) + 0.5
    products = ContributionProducts(1 / scale)
    for _ in range(4):
        topic = torch.randint(0, 8, (100, 1))
        hidden = torch.where(labels == topic, -1.0, 0.2) * (1 + 0.1 * torch.randn(100, 128))
        products.update(scale * hidden)
    assert purity(labels, order_of(products.gram, 16, "contribution"), 16) == 1


def test_contributions_are_the_centred_roots_of_what_neurons_add():
    hidden, down = torch.randn(5, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    products = ContributionProducts(down.norm(dim=0))
    products.update(hidden[:2].float())
    products.update(hidden[2:].float())
    added = torch.einsum("ti,di->tid", hidden, down).norm(dim=2).sqrt()
    profiles = added - added.mean(1, keepdim=True)
    torch.testing.assert_close(products.gram.double(), profiles.T @ profiles, rtol=1e-4, atol=1e-5)


def test_chunks_are_the_means_of_whole_chunks_that_count():
    hidden, down = torch.randn(2, 7, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 2] = False
    products = ChunkProducts(down.norm(dim=0), chunk=3)
    products.update_rows(hidden.float(), mask)
    added = torch.einsum("rti,di->rtid", hidden, down).norm(dim=3).sqrt()
    profiles = added - added.mean(2, keepdim=True)
    rows = torch.stack([profiles[r, start : start + 3].mean(0) for r, start in ((0, 0), (0, 3), (1, 3))])
    torch.testing.assert_close(products.gram.double(), rows.T @ rows, rtol=1e-4, atol=1e-5)


def test_chunks_group_what_is_strong_in_the_same_stretches():
    labels = torch.arange(8).repeat_interleave(16)[torch.randperm(128)]
    topics = torch.randint(0, 8, (60, 1, 1))
    # Within a stretch each token uses a random half of the set; no two neurons of a set always go together.
    strong = (labels == topics) & (torch.rand(60, 8, 128) < 0.5)
    products = ChunkProducts(torch.ones(128))
    products.update_rows(torch.where(strong, 1.0, 0.01), torch.ones(60, 8, dtype=torch.bool))
    assert purity(labels, order_of(products.gram, 16, "chunks"), 16) == 1


def test_coactivation_keeps_more_pairs_inside_experts_than_chance():
    hidden = torch.randn(500, 8) @ torch.randn(8, 256)
    counts = CoactivationCounts(256)
    counts.update(hidden.relu())

    def inside(order):
        return counts.gram[order][:, order].view(8, 32, 8, 32).diagonal(dim1=0, dim2=2).sum()

    assert inside(order_of(counts.gram, 32, "coactivation")) > 1.5 * inside(order_of(counts.gram, 32, "random"))


def test_partition_splits_a_graph_of_two_cliques():
    clique = torch.arange(8) % 2
    similarity = 100.0 * (clique[:, None] == clique)
    experts = partition(similarity, 4, seed=0)
    assert sorted(clique[experts].float().mean(1).tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("neurons", "size", "message"),
    [
        (1000, 32, "expert_size=32 for 1000 neurons; sizes that fit: 8, 10, 20, 25, 40, 50"),
        (64, 0, "expert_size=0 for 64 neurons; sizes that fit: 1, 2, 4, 8, 16, 32"),
        (7, 3, "expert_size=3 for 7 neurons; sizes that fit: 1, 7"),
    ],
)
def test_a_size_that_does_not_fit_names_those_that_do(neurons, size, message):
    with pytest.raises(ValueError, match=f"expert_size must divide the number of FFN neurons, got {message}"):
        check_expert_size(neurons, size)
    with pytest.raises(ValueError, match=message):
        group_neurons(None, num_neurons=neurons, expert_size=size, method="contiguous", seed=0)


@pytest.mark.parametrize(
    ("method", "features", "shape"),
    [
        ("kmeans", None, "None"),
        ("kmeans", torch.zeros(32, 8), r"\(32, 8\)"),
        ("kmeans", torch.zeros(64, 0), r"\(64, 0\)"),
        ("coactivation", torch.zeros(64, 8), r"\(64, 8\)"),
    ],
)
def test_missing_or_misshapen_features_are_errors(method, features, shape):
    with pytest.raises(ValueError, match=rf"features must have .* for method={method}, got shape {shape}; pass the"):
        group_neurons(features, num_neurons=64, expert_size=32, method=method, seed=0)


@pytest.mark.parametrize("method", ["kmeans", "coactivation"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_errors(method, bad):
    features = torch.ones(64, 64)
    features[3, 3] = bad
    with pytest.raises(ValueError, match=r"features must be finite, got .*; check the"):
        order_of(features, 32, method)


def test_other_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match="did you mean kmeans"):
        group_neurons(None, num_neurons=64, expert_size=32, method="kmean", seed=0)
    with pytest.raises(
        ValueError, match=r"features must be counts from 0 to 2\^24, got values from -1.0 to -1.0; pass"
    ):
        order_of(-torch.ones(64, 64), 32, "coactivation")
    with pytest.raises(ValueError, match=r"top_fraction must lie in \(0, 1\], got top_fraction=0;"):
        CoactivationCounts(64, top_fraction=0)
    with pytest.raises(ValueError, match=r"shape \[tokens, 64\], got shape \(2, 3, 64\); flatten"):
        CoactivationCounts(64).update(torch.zeros(2, 3, 64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["kmeans", "coactivation", "contribution"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_groups_as_the_cpu_does(method, dtype):
    features = torch.randn(1536, 576).to(dtype)
    if method != "kmeans":
        features = features_of(features.float(), method)
    order = order_of(features.cuda(), 32, method)
    assert order.device.type == "cpu"
    assert order.equal(order_of(features, 32, method))
