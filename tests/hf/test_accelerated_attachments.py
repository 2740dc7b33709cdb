"""What is attached to an accelerated model, or replaced or edited in it by any means, is what it computes with."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

import lte
from lte.nn.accelerated import AcceleratedFfn
from lte.nn.hooks import before_each_call
from lte.nn.passing import PassingDown, PassingUp
from lte.nn.router import Router
from lte.nn.sparse_ffn import SparseFfn
from tests.tiny_models import NEURONS, logits_of, tiny_sparse_model

Change = Callable[[Any], object]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is computed by plain PyTorch")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def first(model: Any) -> Any:
    return next(iter(lte.sparse_ffns(model).values()))


def up_of(model: Any) -> Any:
    return first(model).part(first(model).layout.up)


def down_of(model: Any) -> Any:
    return first(model).part(first(model).layout.down)


def random_like(tensor: Tensor, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * tensor.shape[-1] ** -0.5


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


class OwnRouter(Router):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


@torch.no_grad()
def average(model: Any) -> None:
    """As the copy of an exponential moving average is put in place."""
    for parameter in model.parameters():
        parameter.data.copy_(random_like(parameter))


def edit_memory(model: Any) -> None:
    for parameter in (first(model).router.weight, up_of(model).weight, down_of(model).weight):
        parameter.detach().numpy()[...] *= -1


def replace_twice(model: Any) -> None:
    for seed in (1, 2):
        for parameter in first(model).own_parameters():
            parameter.data = random_like(parameter, seed)


def set_storage(model: Any) -> None:
    with torch.no_grad():
        for parameter in first(model).own_parameters():
            parameter.set_(random_like(parameter))


def swap(model: Any) -> None:
    router = first(model).router
    torch.utils.swap_tensors(router.weight, nn.Parameter(random_like(router.weight)))


def new_parameters(model: Any) -> None:
    ffn = first(model)
    for module in (ffn.router, up_of(model), down_of(model)):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(random_like(parameter)))


def new_module(kind: type[nn.Linear]) -> Change:
    def change(model: Any) -> None:
        down = down_of(model)
        torch.manual_seed(3)
        new = kind(NEURONS, 32, bias=down.bias is not None)
        root = first(model).block[0] if first(model).block else first(model)
        root.set_submodule(first(model).layout.down, new.to(down.weight.dtype))

    return change


def new_router(kind: type[Router]) -> Change:
    def change(model: Any) -> None:
        router = kind(32, 8)
        with torch.no_grad():
            for parameter in router.parameters():
                parameter.copy_(random_like(parameter))
        first(model).router = router

    return change


def new_activation(model: Any) -> None:
    setattr(first(model), first(model)._activation_name, nn.Tanh())


def pruned(model: Any, *, for_good: bool = False) -> None:
    prune.l1_unstructured(up_of(model), "weight", 0.7)
    if for_good:
        prune.remove(up_of(model), "weight")


def loaded(model: Any) -> None:
    state = {name: random_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def of_own_gates(model: Any) -> None:
    first(model).gate_values = torch.ones_like


EDITS: dict[str, Change] = {
    "average": average,
    "memory": edit_memory,
    "replaced twice": replace_twice,
    "set_": set_storage,
    "swap_tensors": swap,
    "new parameters": new_parameters,
    "a bias of the router": lambda model: first(model).router.bias.data.neg_(),
    "load_state_dict": loaded,
    "another module": new_module(nn.Linear),
    "another router": new_router(Router),
    "pruned for good": lambda model: pruned(model, for_good=True),
    "a threshold": lambda model: setattr(first(model), "threshold_logit", 0.4),
}
ATTACHMENTS: dict[str, Change] = {
    "module of a subclass": new_module(OwnLinear),
    "router of a subclass": new_router(OwnRouter),
    "activation": new_activation,
    "parametrization": lambda model: parametrize.register_parametrization(up_of(model), "weight", Doubled()),
    "weight norm": lambda model: parametrizations.weight_norm(down_of(model)),
    "older weight norm": lambda model: nn.utils.weight_norm(up_of(model)),
    "pruned": pruned,
    "gates": of_own_gates,
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize(("model_type", "dtype"), [("llama", "float32"), ("llama", "bfloat16"), ("opt", "float32")])
def test_edits_are_seen_by_the_kernels(
    model_type: str, dtype: str, change: Change, tokens: Tensor, calls: list[int]
) -> None:
    """The same numbers, bit for bit, as those of a model that is accelerated after the edit."""
    if dtype == "bfloat16" and change is edit_memory:
        pytest.skip("numpy has no bfloat16")
    model, expected = (tiny_sparse_model(model_type).to(getattr(torch, dtype)) for _ in range(2))
    for network in (model, expected):
        for ffn in lte.sparse_ffns(network).values():
            ffn.router.float()
    logits_of(lte.accelerate_(model), tokens)
    change(model)
    change(expected)
    plain = logits_of(expected, tokens)
    accelerated = logits_of(lte.accelerate_(expected), tokens)
    calls.clear()
    found = logits_of(model, tokens)
    # A projection that does not pass the kernels' output on leaves its FFN to PyTorch.
    replaced = model_type == "opt" and change is EDITS["another module"]
    assert len(calls) == 2 - replaced
    assert torch.allclose(found, accelerated, atol=1e-5) if replaced else torch.equal(found, accelerated)
    if dtype == "float32":
        assert torch.allclose(accelerated, plain, atol=1e-4)
    assert torch.equal(logits_of(lte.decelerate_(model), tokens), plain)


@pytest.mark.parametrize("change", ATTACHMENTS.values(), ids=ATTACHMENTS)
@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_attachments_are_computed_by_plain_pytorch(
    model_type: str, change: Change, tokens: Tensor, calls: list[int], request: pytest.FixtureRequest
) -> None:
    model, plain = lte.accelerate_(tiny_sparse_model(model_type)), tiny_sparse_model(model_type)
    logits_of(model, tokens)
    before = logits_of(plain, tokens)
    change(model)
    change(plain)
    calls.clear()
    assert torch.allclose(logits_of(model, tokens), logits_of(plain, tokens), atol=1e-5)
    assert torch.allclose(before, logits_of(plain, tokens), atol=1e-3) == ("norm" in request.node.name)
    assert len(calls) == 1, "the other FFN stays with the kernels"


def hooked_modules(model: Any) -> dict[str, nn.Module]:
    """The modules of the first FFN's block that a user may look at."""
    ffn = first(model)
    found = {name: ffn.part(name) for name in ffn.layout.parts}
    found |= {"router": ffn.router, "activation": ffn.activation_function, "ffn": ffn}
    if ffn.block and "." in ffn.layout.up:
        found |= {name: ffn.block[0].get_submodule(name) for name in ("intermediate", "output")}
    return found


@pytest.mark.parametrize("model_type", ["llama", "opt", "bert", "t5"])
def test_hooks_see_what_they_see_on_the_plain_model(model_type: str, tokens: Tensor, calls: list[int]) -> None:
    plain, model = tiny_sparse_model(model_type), lte.accelerate_(tiny_sparse_model(model_type))
    expected = logits_of(plain, tokens)
    for name in hooked_modules(plain):
        seen: list[list[Tensor]] = []
        for network in (plain, model):
            tensors: list[Tensor] = []
            module = hooked_modules(network)[name]
            handles = [
                module.register_forward_pre_hook(lambda module, args, tensors=tensors: tensors.append(args[0])),
                module.register_forward_hook(lambda module, args, output, tensors=tensors: tensors.append(output)),
            ]
            logits_of(network, tokens)
            for handle in handles:
                handle.remove()
            seen.append(tensors)
        assert len(seen[0]) == len(seen[1]) == 2, name
        assert all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(*seen, strict=True)), name
    calls.clear()
    assert torch.allclose(logits_of(model, tokens), expected, atol=1e-5)
    assert len(calls) == len(lte.sparse_ffns(model)), "without hooks the kernels are back"


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_hook_on_all_modules_sees_all(model_type: str, tokens: Tensor) -> None:
    counts = []
    for model in (tiny_sparse_model(model_type), lte.accelerate_(tiny_sparse_model(model_type))):
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output, seen=seen: seen.append(type(module).__name__)
        )
        logits_of(model, tokens)
        handle.remove()
        counts.append(len(seen))
    assert counts[0] == counts[1]


def test_it_is_said_once_which_ffn_and_why(tokens: Tensor) -> None:
    model = lte.accelerate_(tiny_sparse_model())
    for ffn in lte.sparse_ffns(model).values():
        ffn.down_proj.register_forward_hook(lambda *args: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits_of(model, tokens)
        logits_of(copy.deepcopy(model), tokens)
    messages = [str(w.message) for w in caught if "plain PyTorch" in str(w.message)]
    assert len(messages) == 1
    assert messages[0].startswith(
        "model.layers.0.mlp is computed by plain PyTorch and not by the kernels, as its down_p"
    )


def test_int8_weights_refuse_hooks_in_one_sentence(tokens: Tensor) -> None:
    model = lte.accelerate_(tiny_sparse_model(), "int8")
    up_of(model).register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"int8 weights must run .*, and its up_proj has hooks; .*decelerate_"):
        logits_of(model, tokens)


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_offloaded_weights(model_type: str, tokens: Tensor) -> None:
    model = tiny_sparse_model(model_type)
    expected = logits_of(model, tokens)
    accelerate.cpu_offload(lte.accelerate_(model), "cpu")
    assert first(model).router.weight.is_meta
    assert torch.allclose(logits_of(model, tokens), expected, atol=1e-5)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "bert", "opt", "t5", "t5 gated", "distilbert"])
def test_dynamically_quantised_projections(model_type: str, accelerated: bool, tokens: Tensor) -> None:
    model = tiny_sparse_model(model_type)
    expected = logits_of(model, tokens)
    if accelerated:
        lte.accelerate_(model)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    found = logits_of(quantised, tokens)
    assert (found - expected).abs().mean() < 0.2 * expected.abs().mean()
    assert not torch.equal(found, expected)


def test_weights_laid_out_in_inference_mode_train_afterwards(tokens: Tensor) -> None:
    model = lte.accelerate_(tiny_sparse_model())
    for parameter in first(model).own_parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    with torch.inference_mode():
        logits_of(model, tokens)
    model(tokens, labels=tokens).loss.backward()
    assert first(model).up_proj.weight.grad.any()


def test_decelerating_leaves_adapters_as_they_are(model_type: str, tokens: Tensor) -> None:
    model = lte.accelerate_(tiny_sparse_model(model_type))
    torch.manual_seed(1)
    projections = [name.rpartition(".")[2] for name in first(model).layout.projections]
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=projections, init_lora_weights=False)
    ).eval()
    expected, kinds = logits_of(adapted, tokens), [type(module) for module in adapted.modules()]
    lte.decelerate_(adapted)
    assert torch.allclose(logits_of(adapted, tokens), expected, atol=1e-5)
    passed = {PassingUp: nn.Linear, PassingDown: nn.Linear, AcceleratedFfn: SparseFfn}
    assert [type(module) for module in adapted.modules()] == [passed.get(kind, kind) for kind in kinds]


@pytest.mark.parametrize("model_type", ["llama", "opt", "bert"])
def test_looking_at_hidden_states_leaves_the_kernels_at_work(model_type: str, tokens: Tensor, calls: list[int]) -> None:
    seen: list[list[Tensor]] = []
    for model in (tiny_sparse_model(model_type), lte.accelerate_(tiny_sparse_model(model_type))):
        found: list[Tensor] = []
        with before_each_call({"x": first(model).reader}, lambda key, args, found=found: found.append(args[0])):
            logits_of(model, tokens)
        seen.append(found)
    assert len(calls) == 2
    assert torch.allclose(seen[0][0], seen[1][0], atol=1e-5)
    assert seen[0][0].shape[-1] == 32


class Negated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


def replace_router(model: Any) -> None:
    router = Router(first(model).hidden_size, first(model).num_experts)
    router.weight.data = random_like(router.weight)
    first(model).router = router


def replace_down(model: Any) -> None:
    down = nn.Linear(NEURONS, first(model).hidden_size)
    down.weight.data, down.bias.data = random_like(down.weight), random_like(down.bias)
    ffn = first(model)
    (ffn.block[0] if ffn.block else ffn).set_submodule(ffn.layout.down, down)


def replace_dropout(model: Any) -> None:
    setattr(first(model), first(model).layout.dropouts[0], Negated())


def replace_forward(model: Any) -> None:
    plain = first(model).forward
    first(model).forward = lambda x: 2 * plain(x)


@pytest.mark.parametrize(
    ("replace", "model_types"),
    [
        (replace_router, ["llama", "gpt2", "bert"]),
        (replace_down, ["llama", "distilbert", "opt"]),
        (replace_dropout, ["gpt2", "distilbert", "t5"]),
        (replace_forward, ["llama", "opt", "bert"]),
    ],
)
def test_what_replaces_a_part_after_calls_is_computed(replace: Change, model_types: list[str], tokens: Tensor) -> None:
    for model_type in model_types:
        plain, accelerated = tiny_sparse_model(model_type), lte.accelerate_(tiny_sparse_model(model_type))
        before = logits_of(accelerated, tokens)
        for model in (plain, accelerated):
            replace(model)
        expected = logits_of(plain, tokens)
        assert (expected - before).abs().max() > 1e-2
        torch.testing.assert_close(logits_of(accelerated, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_an_average_of_accelerated_models_is_that_of_plain_ones(model_type: str) -> None:
    averages = []
    for prepare in (lambda model: model, lte.accelerate_):
        model = prepare(tiny_sparse_model(model_type))
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
        for _ in range(2):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.data = parameter.data + 1
            average.update_parameters(model)
        averages.append(dict(average.module.named_parameters()))
    for name, expected in averages[0].items():
        torch.testing.assert_close(averages[1][name], expected, msg=name)


def test_what_follows_operations_sees_those_of_pytorch() -> None:
    model = lte.accelerate_(tiny_sparse_model().requires_grad_(False))
    ffn, generator = first(model), torch.Generator().manual_seed(0)
    x, other, tangent = (torch.randn(1, 3, ffn.hidden_size, generator=generator) for _ in range(3))
    expected = ffn(other)
    torch.testing.assert_close(make_fx(ffn)(x)(other), expected)
    torch.testing.assert_close(torch.jit.trace(ffn, (x,), check_trace=False)(other), expected)
    with FlopCounterMode(display=False) as counter:
        ffn(x)
    assert counter.get_total_flops() >= 3 * 2 * 3 * ffn.hidden_size * NEURONS
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        ffn(forward_ad.make_dual(x, tangent))


def test_shared_memory_stays_shared() -> None:
    model = lte.accelerate_(tiny_sparse_model()).share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())
