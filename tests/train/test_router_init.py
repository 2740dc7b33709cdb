"""Fitting routers before training and setting thresholds after it."""

import pytest
import torch

import lte
from lte.eval.sparsity import measure_sparsity
from lte.train.router_init import calibrate_thresholds_, fit_routers_
from tests.tiny_models import tiny_dense_model, tiny_sparse_model


def batches(count=4):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 99, (count, 8, 24), generator=generator)
    return [{"input_ids": rows, "labels": rows, "token_mask": torch.ones_like(rows, dtype=torch.bool)} for rows in ids]


def test_fitted_routers_rank_the_experts_by_their_norm():
    model = tiny_sparse_model(routed=False)
    ffn = next(iter(lte.sparse_ffns(model).values()))
    with torch.no_grad():
        # Expert e contributes e + 1 times as much.
        ffn.up_proj.weight.mul_(torch.arange(1.0, 9.0).repeat_interleave(8)[:, None])
    inputs = []
    hook = ffn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    fit_routers_(model, batches())
    hook.remove()
    x = torch.cat(inputs).flatten(0, 1)
    blocks = ffn.intermediate(x).unflatten(-1, (8, 1, 8)) @ ffn.down_proj.weight.T.unflatten(0, (8, 8))
    norms, logits = blocks.squeeze(-2).norm(dim=-1).log(), ffn.router(x)
    assert torch.corrcoef(torch.stack([norms.flatten(), logits.flatten()]))[0, 1] > 0.8
    assert logits.mean().item() == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_calibration_meets_the_target_and_restores_the_mode(target):
    model = tiny_sparse_model()
    for ffn in lte.sparse_ffns(model).values():
        ffn.set_mode("soft")
    calibrate_thresholds_(model, batches(), target)
    assert {ffn.mode for ffn in lte.sparse_ffns(model).values()} == {"soft"}
    assert measure_sparsity(model, batches()).sparsity == pytest.approx(target, abs=0.01)


def packed_and_alone():
    """Three documents in rows of their own, and next to each other in one."""
    documents = [
        torch.randint(3, 99, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 6, 9)
    ]
    alone = [{"input_ids": ids[None], "labels": ids[None]} for ids in documents]
    row = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(ids)) for ids in documents])[None]
    return [{"input_ids": row, "labels": row, "position_ids": positions}], alone


def test_packed_documents_set_the_thresholds_that_they_set_alone():
    packed, alone = (tiny_sparse_model(), tiny_sparse_model())
    rows, documents = packed_and_alone()
    shift = calibrate_thresholds_(packed, rows, 0.5, rounds=1)
    assert shift == pytest.approx(calibrate_thresholds_(alone, documents, 0.5, rounds=1), abs=1e-6)


def test_packed_documents_fit_the_routers_that_they_fit_alone():
    packed, alone = (tiny_sparse_model(routed=False) for _ in range(2))
    rows, documents = packed_and_alone()
    fit_routers_(packed, rows)
    fit_routers_(alone, documents)
    for one, other in zip(packed.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_packed_documents_group_the_neurons_that_they_group_alone():
    rows, documents = packed_and_alone()
    settings = lte.LteConfig(expert_size=8, grouping="contribution")
    packed, alone = (lte.sparsify_(tiny_dense_model(), settings, calibration=batches) for batches in (rows, documents))
    assert all(a.equal(b) for a, b in zip(packed.parameters(), alone.parameters(), strict=True))


def test_masked_tokens_do_not_move_the_thresholds():
    plain, padded = tiny_sparse_model(), tiny_sparse_model()
    pad = torch.nn.functional.pad
    extra = [
        {
            "input_ids": pad(batch["input_ids"], (0, 9), value=4),
            "token_mask": pad(batch["token_mask"], (0, 9), value=False),
        }
        for batch in batches()
    ]
    assert calibrate_thresholds_(plain, batches(), 0.4) == pytest.approx(
        calibrate_thresholds_(padded, extra, 0.4), abs=1e-6
    )
