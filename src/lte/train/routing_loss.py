"""What a trainer of routing adds to the loss, and to the log.

Shapes: B sequences, T tokens, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lte.config import IGNORED
from lte.data.rows import routing_masks
from lte.files import explained_write_errors
from lte.hf.inputs import check_packing
from lte.nn.global_sums import num_sharing
from lte.nn.sparse_ffn import SparseFfn
from lte.nn.wrapped_ffn import WrappedFfn
from lte.train.added_terms import AddedTerms, term_counts, weighted_sum
from lte.train.arguments import RoutingArguments
from lte.train.chunked_loss import WITHOUT_LOGITS, ChunkedLoss
from lte.train.config import Stage
from lte.train.documents import follows_document
from lte.train.late_values import LateValues
from lte.train.layer_prices import LayerPrices
from lte.train.matching import OutputMatch
from lte.train.objective import NonFiniteLossError, head_divergence, stack_layers
from lte.train.schedule import Schedule
from lte.train.sparsity_controller import target_logit

# What a term of `routing_terms` is called in the log, if not by its own name.
LOG_KEYS = {"efficiency": "efficiency_loss", "separability": "separability_loss", "active_by_layer": "active"}
LOG_KEYS |= {name: f"{name}_loss" for name in ("margin", "predecessor", "union", "even", "match", "chunk_efficiency")}
# The log's names of each layer's active fraction, before its number.
LAYER_PREFIX = "layers/active_"

Masks = list[Tensor | None]
# Any trainer of transformers' kind comes after these classes; for the type checker it may be all.
AnyTrainer: Any = object


@dataclass(frozen=True)
class Pass:
    """A pass of a step that the optimiser has not taken yet.

    Attributes:
        inputs: of the model, to be saved if its loss stops the run.
        terms: of the loss, and statistics, without gradients.
        values: for the host: the loss, the tokens without padding, and where experts are switched the active fraction,
            and those of the layers where they have targets of their own.
    """

    inputs: dict[str, Any]
    terms: dict[str, Tensor]
    values: LateValues


class RoutingLoss(AnyTrainer):
    """The part of `lte.train.trainer.RoutingMixin` that computes the loss of a batch and collects its terms."""

    model: Any
    compute_loss_func: Any
    routing: RoutingArguments
    ffn_names: list[str]
    wrapped_ffns: list[WrappedFfn]
    ffns: list[SparseFfn]
    predicts_next_token: bool
    teacher: nn.Module | None
    distillation_weight: float
    stage: Stage
    schedule: Schedule
    eta: float
    target_sparsity: float
    sums: dict[str, tuple[Tensor | float, int]]
    step_active: list[float]
    step_layers: list[list[float]]
    step_targets: list[Tensor]
    step_tokens: list[Tensor]
    separators: tuple[int, ...]
    match: OutputMatch | None
    terms: AddedTerms
    prices: LayerPrices | None
    is_nonfinite: bool
    skipped_steps: int
    settled_tokens: int
    _passes: list[Pass]
    _finite: Tensor | None
    _chunked: ChunkedLoss | None
    _inputs: dict[str, Any]
    _task_terms: dict[str, Tensor]
    _evaluated: list[tuple[Tensor, Tensor]] | None
    # Whether the pass of an evaluation is asked for its loss alone.
    _loss_alone = False
    # Whether a batch was looked at for chunks that count.
    _saw_chunks = False
    # Whether the model was called for its last hidden states, not its logits.
    _without_logits = False

    @property
    def _distills(self) -> bool:
        return self.teacher is not None and self.distillation_weight > 0

    def autocast_smart_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """Autocast around each loss, with `bf16`: it keeps its copies of weights until it ends."""
        if self._autocasts:
            return torch.autocast(self.args.device.type, torch.bfloat16)
        return super().autocast_smart_context_manager(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's loss and, in training, the weighted terms of routing; collects each term for the log."""
        inputs = dict(inputs)
        if num_items_in_batch is not None:
            # A batch without labels has a loss of 0.
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        if self.model.training:
            for ffn in self.ffns:
                ffn.record_logits = self.stage.mode != "dense"
            if self.match is not None and self.stage.mode != "dense":
                self.match.begin()
        masks = self._token_masks(inputs)
        inputs.pop("token_mask", None)
        if self.predicts_next_token:
            check_packing(self.model, inputs)
            inputs["use_cache"] = False
        self._inputs = inputs
        # Another head computes its own loss; the divergence is added here.
        other_head = self._distills and not self.predicts_next_token and self.model.training
        with_outputs = return_outputs or other_head
        loss_alone = not return_outputs if self.model.training else self._loss_alone
        self._without_logits = self._chunked is not None and loss_alone and "labels" in inputs
        called = {**inputs, **(WITHOUT_LOGITS if self._without_logits else {})}
        result = super().compute_loss(model, called, with_outputs, num_items_in_batch)
        outputs: Any
        loss, outputs = result if with_outputs else (result, None)
        if self.model.training:
            self.step_tokens.append(num_tokens_of(inputs, loss.device))
            self._task_terms = self._task_terms or {"task_loss": loss.detach()}
            if other_head:
                divergence = head_divergence(outputs.logits, inputs["labels"], self._teacher_logits())
                self._task_terms["distillation_loss"] = divergence.detach()
                loss = (1 - self.distillation_weight) * loss + self.distillation_weight * divergence
            loss = self._with_routing(loss, masks, num_items_in_batch)
        elif self._evaluated is not None:
            self._count_active(masks)
        return (loss, outputs) if return_outputs else loss

    def _token_masks(self, inputs: dict[str, Any]) -> Masks:
        """Which tokens count in each FFN, [B, T] bool; all of them in batches of other trainers' kinds."""
        if "input_ids" not in inputs:
            return [None] * len(self.ffn_names)
        by_name = routing_masks(self.model, self.ffn_names, inputs)
        return [by_name[name] for name in self.ffn_names]

    def _language_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Cross entropy and divergence from the teacher in one; in evaluation cross entropy alone."""
        distills = self._distills and self.model.training
        weight = self.distillation_weight if distills else 0.0
        if self._without_logits:
            assert self._chunked is not None
            inputs = self._teacher_inputs() if distills else None
            loss, task, divergence = self._chunked(labels, weight, num_items_in_batch, inputs)
        else:
            teacher_logits = self._teacher_logits() if distills else None
            task, divergence = self._language_terms(outputs.logits, labels, teacher_logits, num_items_in_batch)
            loss = (1 - weight) * task + weight * divergence
        if self.model.training:
            everywhere = self.args.average_tokens_across_devices and num_items_in_batch is not None
            scale = self.accelerator.num_processes if everywhere else 1
            terms = {"task_loss": task, **({"distillation_loss": divergence} if distills else {})}
            self._task_terms = {name: scale * value.detach() for name, value in terms.items()}
        return loss

    def _teacher_inputs(self) -> dict[str, Any]:
        # An encoder-decoder makes its decoder's inputs of the labels.
        left_out = ("labels",) if self.predicts_next_token else ()
        return {key: value for key, value in self._inputs.items() if key not in left_out}

    def _teacher_logits(self) -> Tensor:
        assert self.teacher is not None
        # In the teacher's own dtype: autocast would only add casts.
        with torch.no_grad(), torch.autocast(self.args.device.type, enabled=False):
            return self.teacher(**self._teacher_inputs()).logits

    def _with_routing(self, task: Tensor, masks: Masks, num_items: Tensor | int | None) -> Tensor:
        """The loss with the routing terms, which are means over one forward pass.

        A loss that is divided by the labels of all accumulated passes is not divided by their number any more: the
        terms of routing are, here.
        """
        passes = self.current_gradient_accumulation_steps if self._is_scaled(num_items) else 1
        if self._distills and "distillation_loss" not in self._task_terms:
            raise ValueError(
                f"teacher must be None for {type(self).__name__}, whose loss is not one of the model's logits, got one"
            )
        terms = {name: passes * value for name, value in self._task_terms.items()}
        self._task_terms = {}
        share = self._share_of_tokens(masks)
        routing = self._routing(masks, share)
        added = task.new_zeros(())
        if routing:
            added = added + self._weighted(routing).to(added.device)
        matched = None if self.match is None else self.match.take_loss(masks, self._recomputes_alike)
        if matched is not None:
            matched = (matched * share).to(added.device)
            added, terms["match"] = added + self.routing.match_weight * matched, matched
        auxiliary = self._auxiliary_loss(masks)
        if auxiliary is not None:
            auxiliary = auxiliary.to(added.device)
            added, terms["auxiliary_loss"] = added + auxiliary, auxiliary
        loss = task + added / passes
        in_shards = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.accelerator.num_processes > 1 and not (self.stage.train_routers or in_shards):
            # DistributedDataParallel waits for a gradient of every parameter; those of ZeRO-3 are empty here.
            loss = loss + 0.0 * sum(p.sum() for p in self._router_parameters() if p.requires_grad)
        total = (passes * loss).detach()
        self._passes.append(self._pass(total, {**terms, "loss_total": total, **routing}))
        finite = total.isfinite()
        self._finite = finite if self._finite is None else self._finite & finite
        if self.is_deepspeed_enabled or not self.is_in_train:
            # DeepSpeed's backward pass takes the step, and no step follows a call from outside of training.
            self.settle_passes()
        return loss

    def _pass(self, total: Tensor, terms: dict[str, Tensor]) -> Pass:
        terms = {name: value.detach() for name, value in terms.items()}
        values = [total, self.step_tokens[-1]]
        if "active_fraction" in terms:
            values.append(terms["active_fraction"])
            if self.prices is not None:
                values.append(terms["active_by_layer"])
        # A step that is left out needs no batch to show.
        inputs = self._inputs if self.routing.on_nonfinite == "stop" else {}
        return Pass(inputs, terms, LateValues(values))

    def settle_passes(self) -> None:
        """Reads what the passes of a step have left for the host, before the optimiser takes the step.

        Not in the passes: until here the host can queue all of the backward pass, and here it waits for the forward
        pass alone.

        Raises:
            NonFiniteLossError: for the first loss that is not finite, if the settings say so.
        """
        passes, self._passes, self._finite = self._passes, [], None
        for each in passes:
            loss, tokens, *active = each.values.read()
            self.settled_tokens += int(tokens)
            counts = self._check_finite(loss, each.inputs)
            if counts and active:
                self.step_active.append(active[0])
                if active[1:]:
                    self.step_layers.append(active[1:])
            self._collect(each.terms, counts)

    def _weighted(self, routing: dict[str, Tensor]) -> Tensor:
        """The terms on router logits with their weights; takes out what is of no use in the log."""
        by_layer, mean = routing.pop("efficiency_by_layer"), routing["efficiency"]
        if self.terms.priced_chunks:
            by_layer, mean = routing.pop("chunk_efficiency_by_layer"), routing["chunk_efficiency"]
        if self.prices is not None and self.stage.controls_eta:
            added = (self.prices.etas(by_layer.device) * by_layer).mean()
        else:
            added = self.eta * mean
        if self.stage.number == 1 and self.routing.separability_weight:
            added = added + self.routing.separability_weight * routing["separability"]
        if self.terms.names:
            added = added + weighted_sum({name: routing[name] for name in self.terms.names}, self.terms)
        return added

    def _is_scaled(self, num_items: Tensor | int | None) -> bool:
        """Whether the trainer takes a loss as the share of one pass in the loss of all accumulated ones."""
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return said
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    @property
    def _recomputes_alike(self) -> bool:
        """Whether layers record in the backward pass, too: a compiled one that does not is another graph, which saves
        other tensors, and checkpointing refuses those. `checkpoint_compiled_` lets go of that."""
        return self.routing.compile_layers

    def _stop_recording(self) -> None:
        for ffn in self.ffns:
            ffn.record_logits = False
        if self.match is not None:
            self.match.forget()

    def _take_logits(self) -> list[Tensor]:
        """The router logits of the pass that just ended, layer by layer."""
        logits = [ffn.logits for ffn in self.ffns if ffn.logits is not None]
        for ffn in self.ffns:
            ffn.logits = None
            if self.model.training and not self._recomputes_alike:
                # Activations that the backward pass computes again would stay with these logits.
                ffn.record_logits = False
        return logits

    def _share_of_tokens(self, masks: Masks) -> Tensor | float:
        """The counted tokens of this process over the mean of all processes: 1 where there is one.

        Means over the tokens of a process, times this, have as their mean over processes that over all tokens. Where
        the FFNs of a model see different tokens, encoder and decoder say, it goes by all of them.
        """
        if num_sharing() == 1 or not masks or masks[0] is None:
            return 1.0
        counts = torch.stack([mask.sum() for mask in masks if mask is not None]).sum().float()
        total = counts.clone()
        dist.all_reduce(total)
        return counts * num_sharing() / total.clamp_min(1)

    def _routing(self, masks: Masks, share: Tensor | float) -> dict[str, Tensor]:
        """The terms of routing; means of a process times its share, see `_share_of_tokens`."""
        logits = self._take_logits()
        if not logits:
            return {}
        if self.stage.controls_bias:
            self.step_targets.append(self._target_logits(logits, masks))
        stacked, threshold = stack_layers(logits, masks), self.ffns[0].threshold_logit
        found = self._routing_terms(*stacked, threshold, self.routing.pole_guard)
        self.terms = AddedTerms.at(self.routing, self.schedule.share_of_stage2(self.state.global_step))
        if not isinstance(share, float):
            found = {name: value * share for name, value in found.items()}
        if not self.terms:
            return found
        follows = self._follows(stacked[0]) if self.terms.neighbours else None
        device = stacked[0][0].device
        target = self._target_active(device) if self.terms.even else None
        added = self._added_terms(*stacked, follows, threshold, self.terms, target)
        shares = self._shares(stacked[1], follows, device)
        return {**found, **{name: value * shares.get(name, share) for name, value in added.items()}}

    def _shares(self, masks: Masks, follows: Tensor | None, device: torch.device) -> dict[str, Tensor]:
        """As `_share_of_tokens`, of terms that are means over something else, by their names."""
        checks = follows is not None and not self._saw_chunks
        if num_sharing() == 1 and not checks:
            return {}
        counts = {name: count.to(device) for name, count in term_counts(masks, follows, self.terms).items()}
        if not counts:
            return {}
        own = torch.stack(list(counts.values())).float()
        total = own.clone()
        if num_sharing() > 1:
            dist.all_reduce(total)
        if checks and "union" in counts:
            self._saw_chunks = True
            if not total[list(counts).index("union")] and self.is_world_process_zero():
                self._warn_of_no_chunks()
        return dict(zip(counts, own * num_sharing() / total.clamp_min(1), strict=True))

    def _warn_of_no_chunks(self) -> None:
        given = {"price_on=union": self.terms.priced_chunks, "union_weight": self.terms.union}
        warnings.warn(
            f"{' and '.join(name for name, is_on in given.items() if is_on)} found no chunk of "
            f"union_tokens={self.terms.chunk} tokens in the first batch, and does nothing where there is none: texts, "
            "or the parts of them that count, are shorter; lower union_tokens, or leave it out",
            stacklevel=2,
        )

    def _target_active(self, device: torch.device) -> Tensor:
        """The share of experts that shall be active in this step, by which the controller will judge it, too."""
        return torch.full((), 1 - self.schedule.target_at(self.state.global_step + 1), device=device)

    def _follows(self, stacks: list[Tensor]) -> Tensor:
        """Which tokens go on with the document of the token before them, bool [B, T]."""
        ids = self._inputs.get("input_ids")
        if ids is None or any(stack[0, ..., 0].numel() != ids.numel() for stack in stacks):
            raise ValueError(
                "predecessor_weight and union_weight must be 0, and price_on mean, where a batch does not hold the "
                f"input_ids of all routed tokens, got {', '.join(self._inputs)} of {type(self).__name__}"
            )
        return follows_document(self._inputs, self.separators)

    def _target_logits(self, logits: list[Tensor], masks: Masks) -> Tensor:
        """Where the threshold would have to lie, for all layers, or [L] where each has a target of its own."""
        gather = self._of_all_processes if num_sharing() > 1 else None
        if self.prices is None:
            return target_logit(logits, masks, self.target_sparsity, gather)
        pairs = zip(logits, masks, self.prices.targets, strict=True)
        found = [target_logit([layer], [mask], target, gather) for layer, mask, target in pairs]
        return torch.stack([each.to(found[0].device) for each in found])

    def _of_all_processes(self, values: Tensor) -> Tensor:
        """Values [N] of each process, in one row; where some have fewer, NaN fills up."""
        padded = self.accelerator.pad_across_processes(values, pad_index=float("nan"))
        return self.accelerator.gather(padded)

    def _auxiliary_loss(self, masks: Masks) -> Tensor | None:
        """The sum over layers of what FFNs of another method than LTE add to the loss; `None` if nothing."""
        losses = [ffn.auxiliary_loss(mask) for ffn, mask in zip(self.wrapped_ffns, masks, strict=True)]  # type: ignore[arg-type]
        added = [loss for loss in losses if loss is not None]
        return torch.stack([loss.to(added[0].device) for loss in added]).sum() if added else None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the trainer's; a loss that is not finite and is left out counts as 0 in the log."""
        loss = super().training_step(*args, **kwargs)
        self._stop_recording()
        if self.routing.on_nonfinite == "skip" and self._finite is not None:
            return loss.where(self._finite, 0.0)
        return loss

    def _check_finite(self, loss: float, inputs: dict[str, Any]) -> bool:
        """Whether a loss is finite; if not and the settings say so, its step is left out, else it raises."""
        if math.isfinite(loss):
            return True
        if self.routing.on_nonfinite == "skip":
            self.is_nonfinite = True
            return False
        path = Path(str(self.args.output_dir)) / f"nonfinite-step-{self.state.global_step}.pt"
        batch = {key: value.cpu() for key, value in inputs.items() if isinstance(value, Tensor)}
        where = f"is in {path}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with explained_write_errors(path):
                torch.save(batch, path)
        except OSError:
            where = f"could not be written to {path}"
        raise NonFiniteLossError(
            f"the loss became {loss} at step {self.state.global_step} of stage {self.stage.number}; its batch "
            f"{where}, the last checkpoint is untouched. Lower learning_rate, or eta and lambda_ if you set them; "
            "on_nonfinite=skip leaves such steps out."
        )

    def _collect(self, terms: dict[str, Tensor], counts: bool = True) -> None:
        """Adds up the terms of a pass; of one that does not count their names alone, which all processes must share."""
        for name, value in terms.items():
            key = LOG_KEYS.get(name, name)
            total, count = self.sums.get(key, (0.0, 0))
            self.sums[key] = (total + (value.detach() if counts else torch.zeros_like(value)), count + counts)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of all terms since the last entry, the active fraction of each layer, eta, and the target."""
        if "loss" in logs and self.sums:
            means = self._means()
            if means:
                logs.update(means)
                logs.update(eta=self.eta, target_sparsity=self.schedule.target_at(self.state.global_step))
                if self.prices is not None:
                    logs.update(self.prices.logged())
            self.sums.clear()
        if "loss" in logs and self.skipped_steps:
            logs["skipped_steps"] = self.skipped_steps
        if isinstance(logs.get("learning_rate"), Tensor):
            logs["learning_rate"] = float(logs["learning_rate"])
        if self.is_in_train:
            logs["stage"] = self.stage.number
        super().log(logs, *args, **kwargs)

    def _means(self) -> dict[str, float]:
        """The mean of each term over all processes; of one with a value per layer a mean for each, `layers/...`.

        A process without a pass that counts has no part in it; where none has one, there are no means.
        """
        by_name = {name: torch.as_tensor(total) / max(1, count) for name, (total, count) in self.sums.items()}
        device = self.accelerator.device
        flat = torch.cat([mean.reshape(-1).to(device) for mean in by_name.values()])
        counts = flat.new_tensor([float(any(count for _, count in self.sums.values()))])
        *means, share = self.accelerator.reduce(torch.cat([flat, counts]), reduction="mean").tolist()
        if not share:
            return {}
        names: list[str] = []
        for name, mean in by_name.items():
            names += [name] if mean.ndim == 0 else [f"layers/{name}_{layer:02d}" for layer in range(len(mean))]
        return dict(zip(names, (mean / share for mean in means), strict=True))


def num_tokens_of(inputs: dict[str, Any], device: torch.device) -> Tensor:
    """Tokens of a batch that are no padding, on the device.

    Packed rows have no mask. Their padding is a document of its own at the end of a row, of one repeated token and
    without a label.
    """
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        return mask.sum().to(device)
    ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if ids is None:
        return torch.zeros((), dtype=torch.long, device=device)
    shape = ids.shape[:2]
    # Made there: a number of the host would be waited for.
    count = torch.full((), shape.numel(), device=device)
    positions, labels = inputs.get("position_ids"), inputs.get("labels")
    if "input_ids" not in inputs or any(each is None or each.shape != shape for each in (positions, labels)):
        return count
    places = torch.arange(shape[1], device=ids.device)
    last_start = places.where(torch.as_tensor(positions == 0), 0).amax(1, keepdim=True)
    is_last = places >= last_start
    is_padding = (((labels == IGNORED) & (ids == ids[:, -1:])) | ~is_last).all(1)
    return count - (is_last.sum(1) * is_padding).sum().to(device)
