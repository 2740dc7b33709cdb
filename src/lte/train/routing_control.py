"""How a trainer of routing goes through its stages and holds the target sparsity."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lte.nn.shards import is_sharded, scale_and_shift_, whole
from lte.nn.sparse_ffn import SparseFfn
from lte.nn.wrapped_ffn import WrappedFfn
from lte.train.arguments import RoutingArguments
from lte.train.checkpoints import control_state_of
from lte.train.compilation import checkpoint_compiled_
from lte.train.config import Stage
from lte.train.dropped_start import DroppedStart
from lte.train.interruption import StopRequest
from lte.train.layer_prices import LayerPrices
from lte.train.narrow_adam import with_fast_steps
from lte.train.objective import NonFiniteLossError
from lte.train.optimisers import keep_routers_wide_
from lte.train.regrouping import Regrouping, check_movable, kept_contributions
from lte.train.routing_loss import AnyTrainer
from lte.train.schedule import Schedule
from lte.train.sharding import widen_routers_, zero_moments_
from lte.train.sparsity_controller import BIAS_RATE, EtaController, shift_router_biases_
from lte.train.universal import discard_universal, settle_universal_

_WHOLE = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
"""Of processes that each have whole gradients."""
MOST_SKIPPED = 10
"""Steps in a row that may be left out."""


class RoutingControl(AnyTrainer):
    """The part of `lte.train.trainer.RoutingMixin` that owns optimiser groups, schedule, stages and controllers."""

    lr_scheduler: Any
    _created_lr_scheduler: bool
    routing: RoutingArguments
    wrapped_ffns: list[WrappedFfn]
    ffns: list[SparseFfn]
    steered: list[SparseFfn]
    stages: tuple[Stage, Stage]
    target_sparsity: float
    sums: dict[str, tuple[Tensor | float, int]]
    step_active: list[float]
    step_layers: list[list[float]]
    step_targets: list[Tensor]
    step_tokens: list[Tensor]
    # Of the passes whose values the host has read.
    settled_tokens: int
    _passes: list[Any]
    _finite: Tensor | None
    _regrouped_text: list[dict[str, Tensor]]
    dropped_start: DroppedStart | None
    prices: LayerPrices | None
    stop_request: StopRequest
    # Whether the step that just ended is the last one, since a process was asked to end.
    stops = False
    # Whether a pass of the step at hand was not finite, and whether the step is left out for it.
    is_nonfinite = False
    skips_step = False
    # Of this run, and since the last step that was none of them.
    skipped_steps = 0
    skipped_in_row = 0
    _resumed: Path | None
    _reads_universal: bool
    _fingerprint: dict[str, Any] | None
    _task_terms: dict[str, Tensor]

    @classmethod  # the trainer's is called on the class, too
    def get_optimizer_cls_and_kwargs(cls, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """As the trainer's; torchao's optimisers with steps that take less of the host's time."""
        kind, settings = super().get_optimizer_cls_and_kwargs(*args, **kwargs)
        return with_fast_steps(kind), settings

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The trainer's optimiser, with a parameter group of its own for the routers."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        routers = {id(p) for p in self._router_parameters()}
        own = [p for group in optimizer.param_groups for p in group["params"] if id(p) in routers]
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in routers]
        if own:
            own_rate = self.routing.router_learning_rate
            rate = self.args.learning_rate if own_rate is None else own_rate
            optimizer.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0})
            keep_routers_wide_(optimizer, self.model, own)
        if self.is_fsdp_enabled:
            # A distributed checkpoint forgets the settings of groups without parameters.
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _router_parameters(self) -> list[nn.Parameter]:
        routers = [getattr(ffn, "router", None) for ffn in self.wrapped_ffns]
        return [p for router in routers if router is not None for p in router.parameters()]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The recipe's learning rate over both stages, or the trainer's own if its type is not `linear`."""
        self.schedule = Schedule(
            self.stages,
            num_training_steps,
            round(self.routing.stage1_ratio * num_training_steps),
            self.target_sparsity,
            self.routing.ramp_ratio,
            self.args.get_warmup_steps,
            self._stage2_rate,
            self.routing.regroup_count if self._regroups else 0,
        )
        if self.schedule.regroup_steps:
            check_movable(self.optimizer if optimizer is None else optimizer)
        if self.lr_scheduler is not None or self.args.lr_scheduler_type != "linear":
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        routers = {id(p) for ffn in self.ffns for p in ffn.router.parameters()}
        groups = [
            bool(group["params"]) and all(id(p) in routers for p in group["params"]) for group in optimizer.param_groups
        ]
        rates: list[Any] = [partial(self.schedule.learning_rate, routers=routers) for routers in groups]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_learning_rate(self) -> Any:
        """As the trainer's, in each step, but one on a GPU is read where it is logged alone."""
        # DeepSpeed's schedulers have none before their first step, which the trainer knows.
        if self.is_deepspeed_enabled or not isinstance(self.optimizer.param_groups[0]["lr"], Tensor):
            return super()._get_learning_rate()
        return self.lr_scheduler.get_last_lr()[0]

    @property
    def _stage2_rate(self) -> float:
        """The peak learning rate of stage 2 over that of stage 1."""
        second, first = self.routing.stage2_learning_rate, self.args.learning_rate
        return 1.0 if second is None or not first else second / first

    def begin_stages(self) -> None:
        """Enters the stage of the first step, with the control state of the checkpoint that training goes on from."""
        self.eta_controller, self.tokens_trained = EtaController(), 0
        self.skipped_steps = self.skipped_in_row = 0
        self.stops = self.skips_step = self.is_nonfinite = False
        # What an interrupted step of an earlier training left.
        lists = (self.step_active, self.step_layers, self.step_tokens, self.step_targets)
        for kept in (self.sums, *lists, self._task_terms, self._passes):
            kept.clear()
        self._finite, self.settled_tokens = None, 0
        if self.routing.compile_layers:
            checkpoint_compiled_(self.model)
        if self.is_fsdp_enabled:
            widen_routers_(self.model)
        if self._resumed is None and self.shards_model:
            self.prepare_routing()
        self._enter(self.schedule.stage_at(self.state.global_step))
        if self._resumed is not None:
            if self._reads_universal:
                settle_universal_(self.deepspeed, self.optimizer, self._resumed)
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    discard_universal(self._resumed)
            self.load_control_state(self._resumed)

    def begin_step(self) -> None:
        """Switches to stage 2 where it starts: other switching of experts, and an optimiser without memory.

        Moves neurons between experts before the steps that the settings say.
        """
        if self.schedule.starts_stage2(self.state.global_step):
            settled = self.eta_controller.settled if self.stage.controls_eta else None
            self._enter(self.schedule.stage_at(self.state.global_step), settled)
            if self.is_deepspeed_enabled:
                zero_moments_(self.optimizer)
            else:
                self.optimizer.state.clear()
        if self.state.global_step in self.schedule.regroup_steps:
            self.regroup_()

    @property
    def _regroups(self) -> bool:
        return bool(self.ffns and self.routing.regroup_count and self.routing.recipe != "dense")

    def regroup_(self) -> None:
        """Moves neurons, and what the optimiser remembers of them, to the experts whose routers fit them."""
        with self.compute_loss_context_manager(), torch.compiler.set_stance("force_eager"):
            found = kept_contributions(self.model, self._regrouped_text, self._target_logits)
            regrouping = self._of_first_process(Regrouping.of(found))
        regrouping.apply_(self.ffns, self.optimizer)
        self.log(regrouping.logged(self.ffns))

    def _enter(self, stage: Stage, first_eta: float | None = None) -> None:
        self.stage = stage
        for ffn in self.ffns:
            ffn.set_mode(stage.mode)
            ffn.record_logits = stage.mode != "dense"
        if first_eta:
            self.eta_controller = EtaController.starting_at(first_eta)
            if self.prices is not None:
                self.prices.restart()
        self.eta = self.eta_controller.eta if stage.controls_eta else stage.eta

    def control_sparsity(self) -> None:
        """Updates eta and the router biases from the active fraction of the step that just ended; counts its tokens."""
        found = [self.settled_tokens, int(self.stop_request.asked)]
        if self.accelerator.num_processes > 1:
            tokens = torch.stack(self.step_tokens).sum()
            # Processes may be asked to end at different times: they do so after the same step.
            asked = torch.full_like(tokens, found[1])
            found = self.accelerator.reduce(torch.stack([tokens, asked]), reduction="sum").tolist()
        self.step_tokens.clear()
        self.settled_tokens = 0
        self.stops = found[1] > 0
        if self.skips_step:
            self._count_skipped()
            return
        self.skipped_in_row = 0
        self.tokens_trained += found[0]
        if not self.step_active:
            return
        active = sum(self.step_active) / len(self.step_active)
        if self.accelerator.num_processes > 1:
            over_processes = torch.tensor(active, device=self.accelerator.device)
            active = self.accelerator.reduce(over_processes, reduction="mean").item()
        self.step_active.clear()
        target, sparsity = self.schedule.target_at(self.state.global_step), 1 - active
        if self.dropped_start is not None and self.target_sparsity:
            self.dropped_start.follow_(target / self.target_sparsity)
        layers = self._layer_sparsities()
        if self.stage.controls_eta:
            self.eta = self.eta_controller.update(target, sparsity)
            if self.prices is not None and self.target_sparsity:
                self.eta = self.prices.update(target / self.target_sparsity, layers)
        if self.stage.controls_bias:
            self._hold_target()
        if self.routing.recipe == "annealed" and self.stage.number == 1:
            self._sharpen_routers_()

    def drop_nonfinite_step(self) -> None:
        """Takes the gradients off, in all processes, where a loss or a gradient of the step is not finite."""
        self.settle_passes()
        self.skips_step = False
        if self.routing.on_nonfinite == "stop":
            return
        found, self.is_nonfinite = self.is_nonfinite, False
        if self.accelerator.num_processes > 1:
            everywhere = torch.full((), float(found), device=self.accelerator.device)
            found = self.accelerator.reduce(everywhere, reduction="sum").item() > 0
        if found:
            self.skips_step = True
            self.optimizer.zero_grad()

    def _clip_grad_norm(self, model: Any) -> Any:
        by_dtype = self._whole_gradients(model)
        if set(by_dtype) == {torch.bfloat16, torch.float32}:
            norm = self._clip_each_dtype_(by_dtype)
        else:
            norm = super()._clip_grad_norm(model)
        if norm is not None and self.routing.on_nonfinite == "skip":
            self.is_nonfinite |= not math.isfinite(float(whole(torch.as_tensor(norm))))
        return norm

    def _whole_gradients(self, model: Any) -> dict[torch.dtype, list[nn.Parameter]]:
        """The parameters with a gradient, by its dtype; none where gradients are spread over processes."""
        if self.accelerator.distributed_type not in _WHOLE:
            return {}
        found = defaultdict[torch.dtype, list[nn.Parameter]](list)
        for parameter in model.parameters():
            if parameter.grad is not None:
                if is_sharded(parameter):
                    return {}
                found[parameter.grad.dtype].append(parameter)
        return found

    def _clip_each_dtype_(self, by_dtype: dict[torch.dtype, list[nn.Parameter]]) -> Tensor:
        """Clips the gradients of weights in 16 bits and of routers in fp32 by their common norm, which it returns.

        PyTorch has one norm for all, in fp32, and multiplies each gradient of another dtype by a kernel of its own.
        """
        self.accelerator.unscale_gradients()
        norm = get_total_norm([each.grad for group in by_dtype.values() for each in group if each.grad is not None])
        for dtype, group in by_dtype.items():
            clip_grads_with_norm_(group, self.args.max_grad_norm, norm.to(dtype))
        return norm

    def _count_skipped(self) -> None:
        """Counts a step that changed nothing, and forgets what it measured.

        Raises:
            NonFiniteLossError: if it is the tenth in a row: then the weights are not finite, most likely.
        """
        for kept in (self.step_active, self.step_layers, self.step_targets):
            kept.clear()
        self.skipped_steps += 1
        self.skipped_in_row += 1
        if self.skipped_in_row >= MOST_SKIPPED:
            raise NonFiniteLossError(
                f"the losses of {MOST_SKIPPED} steps in a row are not finite, the last one at step "
                f"{self.state.global_step}, so the weights may not be either; go on from an earlier checkpoint with a "
                "lower learning_rate"
            )

    def _layer_sparsities(self) -> list[float]:
        """The sparsity of each layer in the step that just ended; none where layers have no targets of their own."""
        if not self.step_layers:
            return []
        active = torch.tensor(self.step_layers).mean(0)
        self.step_layers.clear()
        if self.accelerator.num_processes > 1:
            active = self.accelerator.reduce(active.to(self.accelerator.device), reduction="mean")
        return (1 - active).tolist()

    def _hold_target(self) -> None:
        """Moves the router biases so that the target's share of scores lies below the threshold."""
        targets = torch.stack(self.step_targets)
        self.step_targets.clear()
        # A pass without a counted token has none.
        found = targets.isfinite()
        sums = torch.stack([targets.where(found, torch.zeros_like(targets)).sum(0), found.sum(0)])
        total, count = self.accelerator.reduce(sums, reduction="sum")
        shift = -BIAS_RATE * (total / count - self.ffns[0].threshold_logit)
        # Where nothing was counted, nothing moves.
        shift = shift.where(count > 0, 0.0)
        if self.prices is None:
            shift_router_biases_(self.steered, shift)
            return
        for ffn, own in zip(self.ffns, shift, strict=True):
            shift_router_biases_([ffn] if ffn in self.steered else [], own)

    @torch.no_grad()
    def _sharpen_routers_(self) -> None:
        factor = self.routing.router_sharpening ** (1 / self.schedule.stage1_steps)
        for ffn in self.steered:
            tau = ffn.threshold_logit
            scale_and_shift_(ffn.router.weight, factor, 0.0)
            scale_and_shift_(ffn.router.bias, 1.0, -tau)
            scale_and_shift_(ffn.router.bias, factor, tau)

    @property
    def settled_eta(self) -> float | None:
        """The weight of the efficiency loss on which its controller had settled in the last stage that had one."""
        ran = [s for s in self.stages if s.number == 1 or self.schedule.stage1_steps < self.schedule.max_steps]
        ran = ran if self.schedule.stage1_steps else ran[1:]
        return self.eta_controller.settled if any(stage.controls_eta for stage in ran) else None

    def control_state(self) -> dict[str, Any]:
        """What a checkpoint must hold beyond the trainer's own state."""
        return {
            "eta": self.eta,
            "controller": asdict(self.eta_controller),
            "tokens_trained": self.tokens_trained,
            **({"skipped_steps": self.skipped_steps} if self.skipped_steps else {}),
            "fingerprint": self._fingerprint,
            **({} if self.dropped_start is None else {"dropped_start": self.dropped_start.state()}),
            **({} if self.prices is None else {"prices": self.prices.state()}),
        }

    def load_control_state(self, checkpoint: Path) -> None:
        """Restores `control_state` from a checkpoint folder."""
        state = control_state_of(checkpoint)
        state["controller"]["log_range"] = tuple(state["controller"]["log_range"])
        self.eta, self.eta_controller = state["eta"], EtaController(**state["controller"])
        self.tokens_trained, self.skipped_steps = state["tokens_trained"], state.get("skipped_steps", 0)
        if "dropped_start" in state:
            self.dropped_start = DroppedStart.of_state(self.ffns, state["dropped_start"])
        if "prices" in state:
            self.prices = LayerPrices.of_state(state["prices"])
