"""`transformers.Trainer` with the LTE losses, logs, and sparsity control."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer

from lte.data.rows import routing_masks
from lte.hf.inputs import check_packing, predicts_next_token
from lte.hf.install import require_wrapped_ffns
from lte.nn.sparse_ffn import SparseFfn
from lte.train.callbacks import CONTROL_STATE_FILE, LteProgress, SparsityControl
from lte.train.config import Stage, TrainConfig
from lte.train.objective import head_divergence, language_terms, routing_terms, stack_layers
from lte.train.processes import autocast
from lte.train.sparsity_controller import (
    BIAS_RATE,
    EtaController,
    SparsityRamp,
    shift_router_biases_,
    target_logit,
)

# What a term of `routing_terms` is called in the log, if not by its own name.
LOG_KEYS = {"efficiency": "efficiency_loss", "separability": "separability_loss", "active_by_layer": "active"}
# The log's names of each layer's active fraction, before its number.
LAYER_PREFIX = "layers/active_"


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the batch was saved and no checkpoint was overwritten."""


class LteTrainer(Trainer):
    """Trains one stage of an LTE model.

    L_task is the cross entropy with the next token, or for a model with another head (a classifier, a masked language
    model, an encoder-decoder) the loss that it returns for the batch's labels.

    The loss is (1 - a) L_task + a KL(teacher || student) + eta L_eff + lambda L_sep, with a the distillation weight;
    lambda is 0 in stage 2, and so is eta while the routers are frozen.

    Args:
        stage: which stage, from `stages_of`.
        train_config: the recipe's settings.
        target_sparsity: where the controllers lead.
        teacher: a dense model for distillation, or `None`.
        first_eta: where the controller of eta starts; `None` takes its own start.
        kwargs: as for `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        stage: Stage,
        train_config: TrainConfig,
        target_sparsity: float,
        teacher: nn.Module | None = None,
        first_eta: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.model: Any
        # Every loss term is a mean over one forward pass; Trainer then averages over accumulated passes.
        self.model_accepts_loss_kwargs = False
        if self.accelerator.ddp_handler is not None:
            # Gradients lie in DDP's buckets and not beside them: 4 bytes per parameter less.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self.stage = stage
        self.train_config = train_config
        self.target_sparsity = target_sparsity
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        wrapped = require_wrapped_ffns(self.model)
        self.ffn_names, self.wrapped_ffns = list(wrapped), list(wrapped.values())
        self.ffns = [ffn for ffn in self.wrapped_ffns if isinstance(ffn, SparseFfn)]
        self.predicts_next_token = predicts_next_token(self.model)
        self.eta_controller = EtaController.starting_at(first_eta) if first_eta else EtaController()
        self.eta = self.eta_controller.eta if stage.controls_eta else stage.eta
        self.target_logit = torch.zeros(())
        # Sums of each term since the last log entry, and how many there were.
        self.sums: dict[str, tuple[Tensor | float, int]] = {}
        self.step_active: list[float] = []
        self._language_terms = torch.compile(language_terms) if train_config.compile else language_terms
        self._routing_terms = torch.compile(routing_terms) if train_config.compile else routing_terms
        self.add_callback(SparsityControl(self))
        if self.pop_callback(ProgressCallback):
            self.add_callback(LteProgress)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a parameter group of its own for the routers."""
        if self.optimizer is None:
            routers = [getattr(ffn, "router", None) for ffn in self.wrapped_ffns]
            router_ids = {id(p) for router in routers if router is not None for p in router.parameters()}
            trained = [p for p in self.model.parameters() if p.requires_grad]
            rate = self.train_config.router_learning_rate
            scale = rate / self.train_config.learning_rate if rate else 1.0
            groups = [
                {
                    "params": [p for p in trained if id(p) not in router_ids],
                    "weight_decay": self.args.weight_decay,
                },
                {
                    "params": [p for p in trained if id(p) in router_ids],
                    "lr": self.args.learning_rate * scale,
                    "weight_decay": 0.0,
                },
            ]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class([group for group in groups if group["params"]], **options)
        return self.optimizer

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Autocast around each loss. Accelerate's own, which `TrainingArguments.bf16` asks for, would turn the logits
        to fp32: 6 GB for 32k tokens of a 49k vocabulary."""
        return autocast(self.train_config)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of all terms for one batch; collects each term for the log."""
        if self.predicts_next_token:
            check_packing(self.model, inputs)
            features = {key: value for key, value in inputs.items() if key not in ("labels", "token_mask")}
            outputs = model(**features, use_cache=False)
            pair = outputs.logits, inputs["labels"]
            task, divergence = self._language_terms(*pair, self._teacher_logits(features))
        else:
            outputs = model(**inputs)
            task, divergence = self._own_terms(outputs, inputs)
        by_name = routing_masks(self.model, self.ffn_names, inputs)
        masks = [by_name[name] for name in self.ffn_names]
        routing = self._routing(masks)
        weight = self.train_config.distillation_weight if self.teacher is not None else 0.0
        loss = (1 - weight) * task + weight * divergence
        if routing:
            loss = loss + self.eta * routing["efficiency"]
            if self.stage.number == 1 and self.train_config.separability_weight:
                loss = loss + self.train_config.separability_weight * routing["separability"]
        auxiliary = self._auxiliary_loss(masks)
        if auxiliary is not None:
            loss = loss + auxiliary
        if self.model.training:
            self._check_finite(loss, inputs)
            if routing:
                # Read here, where the check has just waited for the GPU, not after the step, where it would wait again.
                self.step_active.append(routing["active_fraction"].item())
            terms = {} if auxiliary is None else {"auxiliary_loss": auxiliary}
            self._collect({"task_loss": task, "distillation_loss": divergence, "loss_total": loss, **terms, **routing})
        return (loss, outputs) if return_outputs else loss

    def _own_terms(self, outputs: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss that a model with another head computes itself, and the divergence from the teacher."""
        if outputs.loss is None:
            raise ValueError(f"batches must hold labels for {type(self.model).__name__}, got {', '.join(inputs)}")
        teacher_logits = self._teacher_logits(inputs)
        if teacher_logits is None:
            return outputs.loss, outputs.loss.new_zeros(())
        return outputs.loss, head_divergence(outputs.logits, inputs["labels"], teacher_logits)

    def _routing(self, masks: list[Tensor]) -> dict[str, Tensor]:
        if self.stage.mode == "dense":
            return {}
        logits = [ffn.logits for ffn in self.ffns if ffn.logits is not None]
        for ffn in self.ffns:
            ffn.logits = None
        if self.stage.controls_bias:
            self.target_logit = target_logit(logits, masks, self.target_sparsity)
        stacked = stack_layers(logits, masks)
        return self._routing_terms(*stacked, self.ffns[0].threshold_logit, self.train_config.pole_guard)

    def _auxiliary_loss(self, masks: list[Tensor]) -> Tensor | None:
        """The sum over layers of what FFNs of another method than LTE add to the loss; `None` if nothing."""
        losses = [ffn.auxiliary_loss(mask) for ffn, mask in zip(self.wrapped_ffns, masks, strict=True)]
        added = [loss for loss in losses if loss is not None]
        return torch.stack(added).sum() if added else None

    def _teacher_logits(self, features: dict[str, Any]) -> Tensor | None:
        if self.teacher is None or not self.train_config.distillation_weight:
            return None
        # In the teacher's own dtype: autocast would only add casts.
        with torch.no_grad(), torch.autocast(self.args.device.type, enabled=False):
            cache = {"use_cache": False} if self.predicts_next_token else {}
            return self.teacher(**features, **cache).logits

    def _check_finite(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        if math.isfinite(loss.item()):
            return
        path = Path(str(self.args.output_dir)) / f"nonfinite-step-{self.state.global_step}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({key: value.cpu() for key, value in inputs.items() if isinstance(value, Tensor)}, path)
        raise NonFiniteLossError(
            f"the loss became {loss.item()} at step {self.state.global_step} of stage {self.stage.number}; its batch "
            f"is in {path}, the last checkpoint is untouched. Lower learning_rate, or eta and lambda_ if you set them."
        )

    def _collect(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            key = LOG_KEYS.get(name, name)
            total, count = self.sums.get(key, (0.0, 0))
            self.sums[key] = (total + value.detach(), count + 1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of all terms since the last entry, the active fraction of each layer, eta, and the target."""
        if "loss" in logs and self.sums:
            logs.update(self._means())
            logs.update(eta=self.eta, target_sparsity=self.target_at_step(), stage=self.stage.number)
            self.sums.clear()
        super().log(logs, start_time)

    def _means(self) -> dict[str, float]:
        """The mean of each term over all processes; of one with a value per layer a mean for each, `layers/...`."""
        by_name = {name: torch.as_tensor(total) / count for name, (total, count) in self.sums.items()}
        means = self.accelerator.reduce(torch.cat([mean.reshape(-1) for mean in by_name.values()]), reduction="mean")
        names: list[str] = []
        for name, mean in by_name.items():
            names += [name] if mean.ndim == 0 else [f"layers/{name}_{layer:02d}" for layer in range(len(mean))]
        return dict(zip(names, means.tolist(), strict=True))

    def target_at_step(self) -> float:
        """The target sparsity that holds after the current step."""
        if self.stage.number == 2:
            return self.target_sparsity
        ramp_steps = int(self.train_config.ramp_ratio * self.state.max_steps)
        return SparsityRamp(self.target_sparsity, ramp_steps).at(self.state.global_step)

    def control_sparsity(self) -> None:
        """Updates eta and the router biases from the active fraction of the step that just ended."""
        if not self.step_active:
            return
        active = sum(self.step_active) / len(self.step_active)
        if self.accelerator.num_processes > 1:
            over_processes = torch.tensor(active, device=self.accelerator.device)
            active = self.accelerator.reduce(over_processes, reduction="mean").item()
        self.step_active.clear()
        target, sparsity = self.target_at_step(), 1 - active
        if self.stage.controls_eta:
            self.eta = self.eta_controller.update(target, sparsity)
        if self.stage.controls_bias:
            error = self.accelerator.reduce(self.target_logit, reduction="mean") - self.ffns[0].threshold_logit
            shift_router_biases_(self.ffns, -BIAS_RATE * error)
        if self.train_config.recipe == "annealed" and self.stage.number == 1:
            self._sharpen_routers_()

    @torch.no_grad()
    def _sharpen_routers_(self) -> None:
        factor = self.train_config.router_sharpening ** (1 / self.state.max_steps)
        for ffn in self.ffns:
            ffn.router.weight.mul_(factor)
            ffn.router.bias.sub_(ffn.threshold_logit).mul_(factor).add_(ffn.threshold_logit)

    def control_state(self) -> dict[str, Any]:
        """What a checkpoint must hold beyond Trainer's own state."""
        return {"eta": self.eta, "controller": asdict(self.eta_controller)}

    def load_control_state(self, checkpoint: Path) -> None:
        """Restores `control_state` from a checkpoint folder."""
        state = json.loads((checkpoint / CONTROL_STATE_FILE).read_text())
        state["controller"]["log_range"] = tuple(state["controller"]["log_range"])
        self.eta, self.eta_controller = state["eta"], EtaController(**state["controller"])
