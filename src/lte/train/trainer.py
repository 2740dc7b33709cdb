"""A trainer that trains routing, too: `RoutingMixin` over any trainer of transformers' kind, `LteTrainer` over its own.

Shapes: B sequences, T tokens, L layers, E experts.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, send_to_device
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from lte.config import IGNORED
from lte.data.rows import calibration_batches
from lte.files import check_place, explained_write_errors
from lte.hf.inputs import check_next_token, predicts_next_token, unwrapped
from lte.hf.install import wrapped_ffns
from lte.hf.language_head import splits_head
from lte.hf.loading import is_ours
from lte.methods.calibration import eval_mode
from lte.nn.losses import active_fraction
from lte.nn.matching import relative_error
from lte.nn.shards import whole
from lte.nn.sparse_ffn import SparseFfn
from lte.train.adapters import train_routers_, with_routers
from lte.train.added_terms import AddedTerms, added_terms
from lte.train.arguments import RoutingArguments
from lte.train.callbacks import LteProgress, RoutingCallback
from lte.train.checkpoints import (
    begin_checkpoint,
    clean_up,
    complete_checkpoint,
    discard_checkpoint,
    folder_lock,
    resume_point,
    rotate_checkpoints,
)
from lte.train.chunked_loss import ChunkedLoss
from lte.train.combinations import (
    check_bias_start,
    check_margin,
    check_match,
    check_regrouping,
    refuse_bias_of_adapters,
)
from lte.train.compilation import compiled_layers
from lte.train.config import stages_of
from lte.train.disk_space import check_space, what_to_delete
from lte.train.documents import separators_of
from lte.train.dropped_start import DroppedStart, mean_dropped_outputs
from lte.train.fingerprint import run_fingerprint
from lte.train.interruption import EvaluationCutError, StopRequest, TrainingStopped, keep_workers, noted_sigterm
from lte.train.layer_budgets import BUDGET_TOKENS, budgets, loss_rises
from lte.train.layer_prices import LayerPrices
from lte.train.matching import OutputMatch
from lte.train.memory import explained_memory
from lte.train.objective import language_terms, routing_terms
from lte.train.processes import keeps_weights_on_cpu, wants_fsdp
from lte.train.regrouping import REGROUP_TOKENS
from lte.train.router_init import calibrate_thresholds_, fit_routers_
from lte.train.routing_control import RoutingControl
from lte.train.routing_loss import Masks, Pass, RoutingLoss, num_tokens_of
from lte.train.sharding import ShardKind, check_kind, prepare_deepspeed_, prepare_fsdp_
from lte.train.sparsity_controller import EtaController
from lte.train.universal import is_of_other_processes, make_universal, read_universal_

# In so many tokens of training data a label is looked for.
LABEL_TOKENS = 1 << 16


class RoutingMixin(RoutingLoss, RoutingControl):
    """What makes a trainer train routing: put it before the trainer's class, `class X(RoutingMixin, SFTTrainer): ...`.

    To the loss L of the trainer it adds the terms of routing,

        (1 - a) L + a KL(teacher || student) + eta L_eff + lambda L_sep,

    with a the distillation weight; lambda is 0 in stage 2, and so is eta while the routers are frozen. `train()` runs
    both stages, one after the other in one schedule, and sets the thresholds at the end, so that the model in memory
    has its target sparsity in hard mode. `train(resume_from_checkpoint=True)` goes on from the newest complete
    checkpoint, in either stage, as if there had been no interruption. Evaluation is in hard mode and reports
    `eval_sparsity` besides; with `load_best_model_at_end` the best checkpoint is one of stage 2, at the full target.

    What has `requires_grad=False` keeps it. In a model with adapters of peft, the routers are made to train beside
    them, and belong to the adapter that is saved.

    Args:
        args: as for the trainer. Settings are read from its arguments if they are `RoutingArguments`.
        teacher: a dense model for distillation, or `None`.
        calibration_dataset: rows on which the thresholds are set at the end; `None` takes the training data. The
            sparsity depends on the text, so take what the model will see in use, but nothing that it is tested on.
        kwargs: as for the trainer. A `peft_config` gets the routers added; trainers without one take it, too.

    Raises:
        ValueError: for a model that does not fit the recipe, a distillation without teacher, and checkpointing of
            activations of the reentrant kind, which loses the routers' gradients.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | None = None,
        calibration_dataset: Any = None,
        **kwargs: Any,
    ):
        if kwargs.get("model_init") is not None:
            raise ValueError("model_init must be None, got one: routing belongs to one model; pass model")
        if kwargs.get("peft_config") is not None:
            kwargs["peft_config"] = with_routers(kwargs["peft_config"], args[0] if args else kwargs.get("model"))
            if "peft_config" not in inspect.signature(super().__init__).parameters:
                args, kwargs = _adapted(args, kwargs)
        elif "peft_config" in kwargs:
            # Not every trainer has one that is None.
            del kwargs["peft_config"]
        config = getattr(args[0] if args else kwargs.get("model"), "config", None)
        # Trainer switches it off for good.
        self._use_cache: bool | None = getattr(config, "use_cache", None)
        super().__init__(*args, **kwargs)
        self.routing = self.args if isinstance(self.args, RoutingArguments) else RoutingArguments()
        self.calibration_dataset = calibration_dataset
        train_routers_(self.model)
        wrapped = wrapped_ffns(self.model)
        self.ffn_names, self.wrapped_ffns = list(wrapped), list(wrapped.values())
        self.ffns = [ffn for ffn in self.wrapped_ffns if isinstance(ffn, SparseFfn)]
        check_recipe(self.model, self.routing.recipe)
        self.target_sparsity: float = self.model.target_sparsity if self.wrapped_ffns else 0.0
        self.predicts_next_token = predicts_next_token(self.model)
        if not self.predicts_next_token:
            # Other heads take the number of labels of all accumulated passes and return the mean of one pass.
            self.model_accepts_loss_kwargs = False
        self.distillation_weight = _distillation_weight(self.routing, teacher)
        self.teacher = None if teacher is None else teacher.eval().to(self.args.device)
        self.stages = stages_of(self.routing)
        self.stage = self.stages[0]
        self.eta_controller = EtaController()
        self.eta = 0.0
        # Of each pass of a step, where `target_logit` lies.
        self.step_targets: list[Tensor] = []
        # FFNs whose routers the trainer may move: those that the user did not freeze.
        self.steered: list[SparseFfn] = self.ffns
        # Sums of each term since the last log entry, and how many there were.
        self.sums: dict[str, tuple[Tensor | float, int]] = {}
        self.step_active: list[float] = []
        self.step_tokens: list[Tensor] = []
        # The passes of the step at hand, whether all of their losses are finite, and their tokens once they are read.
        self._passes: list[Pass] = []
        self._finite: Tensor | None = None
        self.settled_tokens = 0
        # Without padding, in all processes.
        self.tokens_trained = 0
        self.stop_request = StopRequest()
        # Of the batch at hand: what the model gets, and the parts of the task's loss.
        self._inputs: dict[str, Any] = {}
        self._task_terms: dict[str, Tensor] = {}
        self._evaluated: list[tuple[Tensor, Tensor]] | None = None
        self._chunked: ChunkedLoss | None = None
        self._resumed: Path | None = None
        self._reads_universal = False
        self._fingerprint: dict[str, Any] | None = None
        compiled = self.routing.compile_layers
        self._language_terms = torch.compile(language_terms) if compiled else language_terms
        self._routing_terms = torch.compile(routing_terms) if compiled else routing_terms
        self._added_terms = torch.compile(added_terms) if compiled else added_terms
        self.terms = AddedTerms()
        self.match = self._output_match(torch.compile(relative_error) if compiled else relative_error)
        collator, processing = self.data_collator, getattr(self, "processing_class", None)
        self.separators = separators_of(unwrapped(self.model), collator, processing)
        self._check_neighbours()
        self._check_bias()
        # What biases start from, if they stand for what is dropped.
        self.dropped_start: DroppedStart | None = None
        # Of layers with targets of their own, and their active fractions in each pass of a step.
        self.prices: LayerPrices | None = None
        self.step_layers: list[list[float]] = []
        # On which it is measured where neurons belong.
        self._regrouped_text: list[dict[str, Tensor]] = []
        if self._distills:
            self._check_own_loss()
        if self._distills and self.predicts_next_token:
            # One pass over the logits for both losses, which the trainer leaves to it.
            self.compute_loss_func = self._language_loss
        self._adapt_trainer()
        self.add_callback(RoutingCallback(self))
        for bar in [each for each in self.callback_handler.callbacks if type(each) is ProgressCallback]:
            self.remove_callback(bar)
            self.add_callback(LteProgress)

    def _adapt_trainer(self) -> None:
        """Sets what a trainer does by default otherwise, where it would lose the routing."""
        if self.args.n_gpu > 1:
            # The copies that `nn.DataParallel` makes would take the router logits with them.
            warnings.warn("training on one GPU; start one process per GPU with torchrun to use all", stacklevel=3)
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size
        if self.is_deepspeed_enabled and self.routing.on_nonfinite == "skip":
            raise ValueError(
                "on_nonfinite must be stop with DeepSpeed, whose optimiser takes its steps by itself, got "
                "on_nonfinite=skip; take FSDP2, or stop"
            )
        if self.routing.on_nonfinite == "skip" and not self.args.max_grad_norm > 0:
            raise ValueError(
                "max_grad_norm must be positive with on_nonfinite=skip, which goes by the norm of the gradients, got "
                f"max_grad_norm={self.args.max_grad_norm}; take a large one to clip nothing"
            )
        if self.is_deepspeed_enabled:
            prepare_deepspeed_(self.accelerator.state.deepspeed_plugin)
        else:
            # The trainer has divided the losses of accumulated passes; in some versions accelerate does it once more.
            self.accelerator.gradient_accumulation_steps = 1
        if self.args.device.type == "cuda":
            # Else the host waits for all that the GPU has to do before it gets the next batch. Copies to MPS may read
            # what was freed meanwhile (https://github.com/pytorch/pytorch/issues/189690).
            self.accelerator.dataloader_config.non_blocking = True
        kind = _checkpointing_of(self.args)
        if self.is_fsdp_enabled:
            kind = prepare_fsdp_(self.accelerator.state.fsdp_plugin, self.args, self.model, kind)
        elif self.args.world_size > 1 and wants_fsdp():
            warnings.warn("accelerate shards models on GPUs alone; each process holds the whole model", stacklevel=3)
        elif keeps_weights_on_cpu():
            warnings.warn(
                "fsdp_offload_params keeps weights, gradients and moments on the CPU for a GPU, got none; the model "
                "trains on the CPU as a whole",
                stacklevel=3,
            )
        if self.accelerator.ddp_handler is not None:
            # Gradients lie in DDP's buckets and not beside them: 4 bytes per parameter less.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        # Accelerate's autocast would turn the logits to fp32: 6 GB for 32k tokens of a 49k vocabulary.
        self._autocasts = self.accelerator.native_amp and self.accelerator.mixed_precision == "bf16"
        if self._autocasts:
            self.accelerator.native_amp = False
        if kind is not None:
            name = f"{kind}_kwargs"
            options = dict(getattr(self.args, name) or {})
            if options.setdefault("use_reentrant", False):
                raise ValueError(f"{name} must hold use_reentrant=False to train routers, got {options}")
            setattr(self.args, name, options)

    def _output_match(self, error: Any) -> OutputMatch | None:
        routing = self.routing
        if not (routing.match_weight and self.ffns) or routing.recipe == "dense":
            return None
        check_match(routing, self._distills)
        return OutputMatch(self.ffns, self.teacher if routing.match_to == "teacher" else None, error)

    @property
    def _drops_into_bias(self) -> bool:
        return bool(self.ffns) and unwrapped(self.model).lte_config.dropped_bias

    def _check_bias(self) -> None:
        if self._drops_into_bias and hasattr(self.model, "peft_config"):
            refuse_bias_of_adapters()

    def _check_neighbours(self) -> None:
        for name, without in (("predecessor_weight", 0), ("union_weight", 0), ("price_on", "mean")):
            given = getattr(self.routing, name)
            if given != without and self.ffns and not self.predicts_next_token:
                raise ValueError(
                    f"{name} must be {without} for models that do not predict the next token, got {name}={given} for "
                    f"{type(self.model).__name__}"
                )

    def _check_own_loss(self) -> None:
        """Refuses a loss of the user's own beside a teacher, whose divergence would take its place."""
        given = {
            "compute_loss_func": self.compute_loss_func,
            "label_smoothing_factor": self.args.label_smoothing_factor,
            "loss_type": getattr(self.args, "loss_type", None) == "dft",
        }
        for name, value in given.items():
            if value:
                raise ValueError(f"{name} must be left at its default with a teacher, got one; leave either out")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains both stages and sets the thresholds; arguments and result are those of the trainer.

        Raises:
            ValueError: for data without labels, a resume without a whole checkpoint, or with other data or settings
                than those of the checkpoint; and for an `output_dir` into which another process trains.
            OSError: if a checkpoint cannot be written; training goes on from the one before with a resume.
            NonFiniteLossError: if the loss becomes NaN or infinite; the batch is saved first. With
                `on_nonfinite="skip"`, if it does so in ten steps in a row.
            TrainingStopped: after a SIGTERM, once a checkpoint is written, unless `save_strategy="no"` or the caller
                has a handler of its own.
            torch.OutOfMemoryError: says which settings to lower. Of several processes the one that raises it is gone 15
                seconds later, as the others wait for it.
        """
        self.stop_request = StopRequest()
        first = next(self._spread_batches(self.train_dataset, 1))
        self.check_batch(first)
        if self._sets_thresholds and self.calibration_dataset is not None:
            next(self._spread_batches(self.calibration_dataset, 1))
        with explained_memory(self.args), ExitStack() as held:
            self._resumed = self._begin(resume_from_checkpoint, held)
            self._check_acting()
            self._read_regrouped_text()
            for name in ("lte_measurement", "lte_curve"):
                if hasattr(self.model.config, name):
                    setattr(self.model.config, name, None)
            held.enter_context(self._training())
            held.enter_context(self._chunking(first))
            if self._resumed is None and not self.shards_model:
                self.prepare_routing()
            resumed = None if self._resumed is None else str(self._resumed)
            with noted_sigterm(self.stop_request, self.args.save_strategy != "no"):
                output = super().train(resumed, *args, **kwargs)
            # A signal that came in the last save or evaluation is seen here, in all processes.
            if self.stops or self._asked_anywhere():
                raise TrainingStopped(self._where_it_stopped())
            self._set_thresholds()
        return output

    def _where_it_stopped(self) -> str:
        step = self.state.global_step
        newest = Path(str(self.args.output_dir)) / f"checkpoint-{step}"
        kept = "holds all of it" if newest.is_dir() else "was not written, go on from the newest one"
        return f"the training ended after step {step} of {self.state.max_steps} by SIGTERM; {newest} {kept}"

    def get_train_dataloader(self) -> Any:
        """As the trainer's; a SIGTERM to all processes of a job leaves its workers for the last step."""
        return keep_workers(super().get_train_dataloader())

    def check_batch(self, batch: dict[str, Any]) -> None:
        """Looks at the first batch before anything runs; a trainer that makes its own labels has nothing to check."""

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Freezes what the settings leave out, compiles, and leaves the model in hard mode with all flags as before."""
        trained = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        self.steered = [ffn for ffn in self.ffns if ffn.router.bias.requires_grad]
        self._freeze()
        # A classifier of a decoder holds a sparse model of its own.
        ours = [module for module in self.model.modules() if is_ours(module)]
        for module in ours:
            module._trains_routing = True
        teacher = self.teacher if self._distills else None
        try:
            with ExitStack() as held:
                if self.match is not None:
                    # Before layers are compiled, which do not see hooks that come later.
                    held.enter_context(self.match.attached())
                held.enter_context(compiled_layers(unwrapped(self.model), teacher, self.routing.compile_layers))
                yield
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(trained.get(name, parameter.requires_grad))
            for ffn in self.ffns:
                ffn.set_mode("hard")
                ffn.record_logits, ffn.logits = False, None
            for module in ours:
                del module._trains_routing
            # Accelerate's mark, by which it would take the model as prepared in the next training.
            vars(self.model).pop("_is_accelerate_prepared", None)
            if self._use_cache is not None:
                self.model.config.use_cache = self._use_cache
            kind = _checkpointing_of(self.args)
            if kind is not None:
                getattr(self.model, f"{kind}_disable")()

    @contextmanager
    def _chunking(self, batch: dict[str, Any]) -> Iterator[None]:
        """Computes the loss of language models over chunks of tokens inside the block, where that gives the same."""
        wanted = self.routing.loss_chunk_tokens
        why_not = self._why_whole_logits(batch) if wanted != 0 else "as asked for"
        if wanted and why_not:
            raise ValueError(f"loss_chunk_tokens must be 0 or unset here, got loss_chunk_tokens={wanted}: {why_not}")
        if why_not:
            yield
            return
        teacher = self.teacher if self._distills else None
        self._chunked = ChunkedLoss(self.model, teacher, wanted, self.routing.compile_layers)
        own, self.compute_loss_func = self.compute_loss_func, self._language_loss
        try:
            yield
        finally:
            self._chunked.remove()
            self._chunked, self.compute_loss_func = None, own

    def _why_whole_logits(self, batch: dict[str, Any]) -> str | None:
        """Why the loss needs the logits of all tokens at once; `None` if it does not."""
        if not self.predicts_next_token:
            return "only heads that predict the next token have a loss over chunks"
        after = type(self).__mro__[type(self).__mro__.index(RoutingLoss) + 1 :]
        if next(each for each in after if "compute_loss" in vars(each)) is not Trainer:
            return "the trainer has a loss of its own, which reads all logits"
        own = [self.compute_loss_func, self.args.label_smoothing_factor, not self.model_accepts_loss_kwargs]
        loss = getattr(unwrapped(self.model), "loss_function", None)
        if not self._distills and (any(own) or loss is not ForCausalLMLoss):
            return "the loss is not the usual cross entropy"
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or parallel is not None:
            return "the head's weight is in shards"
        if self.args.fp16:
            return "gradients in fp16 must be scaled from the loss on"
        with eval_mode(self.model), self.compute_loss_context_manager():
            same = splits_head(self.model, batch)
        if same and self._distills:
            with torch.autocast(self.args.device.type, enabled=False):
                same = splits_head(self.teacher, batch)
        return None if same else "the model's logits are not one product of its last hidden states"

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """As the trainer's; where the loss alone is asked for, without the logits of all tokens if it can be.

        Inside a training a SIGTERM to any process ends the evaluation here.
        """
        if self.is_in_train and self._asked_anywhere():
            raise EvaluationCutError
        self._loss_alone = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._loss_alone = False

    def _freeze(self) -> None:
        """Takes the gradients off what `trainable` and the method's FFNs leave out; nothing is thawed."""
        if self.routing.trainable != "all":
            routers = self.routing.trainable == "routers"
            own = self._router_parameters() if routers else [p for f in self.wrapped_ffns for p in f.own_parameters()]
            trained = {id(parameter) for parameter in own}
            for parameter in self.model.parameters():
                if id(parameter) not in trained:
                    parameter.requires_grad_(False)
        for ffn in self.wrapped_ffns:
            for name in ffn.frozen:
                ffn.get_submodule(name).requires_grad_(False)

    def _spread_batches(self, dataset: Any, num_tokens: int) -> Iterator[dict[str, Tensor]]:
        """About `num_tokens` tokens spread over a data set, on the model's device; in every process the same.

        Without a data set, where the trainer has a loader of its own, they are the first that it gives to the first
        process: by those of each, some would call a model in shards once more than others, and wait for ever.
        """
        if dataset is None:
            # The first process says when its batches are over, too: loaders of others may have more or fewer.
            own = iter(self.get_train_dataloader())
            while num_tokens > 0 and (batch := self._of_first_process(next(own, None))) is not None:
                yield self._prepare_inputs(batch)
                num_tokens -= int(num_tokens_of(batch, torch.device("cpu")))
            return
        collator = self._get_collator_with_removed_columns(self.data_collator, "calibration")
        rows = self.args.per_device_train_batch_size
        for batch in calibration_batches(dataset, num_tokens, rows, collator):
            yield self._prepare_inputs(batch)

    def _check_acting(self) -> None:
        """Refuses settings that could never act in this training."""
        routing = self.routing
        if not self.ffns or routing.recipe == "dense" or self._resumed is not None:
            return
        check_regrouping(routing, routing.stage1_ratio > 0, has_adapters=hasattr(self.model, "peft_config"))
        if routing.regroup_count and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                "regroup_count must be 0 where parameters lie in shards (DeepSpeed, FSDP), got "
                f"regroup_count={routing.regroup_count}; leave it out"
            )
        check_margin(routing, routing.stage1_ratio < 1)
        if self._drops_into_bias and not any(ffn.router.weight.any() for ffn in self.ffns):
            check_bias_start(routing)

    @property
    def shards_model(self) -> bool:
        """Whether no process holds the model whole while it trains."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return bool(self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3))

    @property
    def _shard_kind(self) -> ShardKind | None:
        return "FSDP" if self.is_fsdp_enabled else "DeepSpeed" if self.is_deepspeed_enabled else None

    def prepare_routing(self) -> None:
        """Fits routers and finds the layers' budgets; of a model in shards only once it is sharded."""
        self._fit_routers()
        self._set_budgets()

    def _fit_routers(self) -> None:
        routing = self.routing
        # Routers that were trained before go on from there.
        fresh = all(ffn.router.weight.requires_grad and not whole(ffn.router.weight).any() for ffn in self.ffns)
        if self.ffns and fresh and routing.holds_target and routing.router_fit_tokens and routing.stage1_ratio > 0:
            with self.compute_loss_context_manager(), torch.compiler.set_stance("force_eager"):
                # In a list, so that its progress has an end.
                batches = list(self._spread_batches(self.train_dataset, routing.router_fit_tokens))
                fit_routers_(self.model, batches)
                if self._drops_into_bias:
                    vectors = mean_dropped_outputs(self.model, batches, self.target_sparsity)
                    self.dropped_start = DroppedStart(self.ffns, self._of_first_process(vectors))

    def _set_budgets(self) -> None:
        """Gives each layer a target and a price by how the loss rises with its sparsity, if the settings say so."""
        if not self.ffns or self.routing.layer_budgets == "free" or self.routing.recipe == "dense":
            return
        if any(not whole(ffn.router.weight).any() for ffn in self.ffns):
            raise ValueError(
                "router_fit_tokens must be positive with layer_budgets=sensitivity, which goes by what routers say, "
                f"got router_fit_tokens={self.routing.router_fit_tokens} and routers without weights"
            )
        with self.compute_loss_context_manager(), torch.compiler.set_stance("force_eager"):
            rises = loss_rises(self.model, self._spread_batches(self.train_dataset, BUDGET_TOKENS))
        # A bias of ZeRO-3 may have no length outside of passes.
        routed = 1 - self.ffns[0].router.always_on / self.ffns[0].num_experts
        self.prices = LayerPrices(self._of_first_process(budgets(rises, self.target_sparsity, routed=routed)))

    def _read_regrouped_text(self) -> None:
        # Once, before the first step: a loader of the trainer's own would lose its place later.
        if self._regroups:
            self._regrouped_text = list(self._spread_batches(self.train_dataset, REGROUP_TOKENS))

    def _of_first_process(self, value: Any) -> Any:
        """What the first process found, its tensors on the CPU: the last bits of sums may differ between devices."""
        if self.args.world_size == 1:
            return value
        # Tensors of its GPU would come to that one in all processes.
        held = [send_to_device(value, "cpu")]
        broadcast_object_list(held)
        return held[0]

    @property
    def _sets_thresholds(self) -> bool:
        routing = self.routing
        return bool(self.ffns and routing.holds_target and routing.calibration_tokens and routing.stage1_ratio < 1)

    def _set_thresholds(self) -> None:
        # Routers that the user froze keep their thresholds.
        if not self._sets_thresholds or len(self.steered) < len(self.ffns):
            return
        dataset = self.train_dataset if self.calibration_dataset is None else self.calibration_dataset
        batches = list(self._spread_batches(dataset, self.routing.calibration_tokens))
        with self.compute_loss_context_manager():
            calibrate_thresholds_(self.model, batches, self.target_sparsity)

    def _begin(self, wanted: str | bool | None, held: ExitStack) -> Path | None:
        """Takes the folder, cleans it, and looks for what to go on from: the first process does, for all of them."""
        found: list[Any] = [None, None, False]
        if self.is_world_process_zero():
            folder, writes = Path(str(self.args.output_dir)), self.args.save_strategy != "no"
            try:
                if writes:
                    check_place("output_dir", folder, folder=True)
                    held.enter_context(folder_lock(folder))
                    check_space(folder, self)
                self._fingerprint = run_fingerprint(self)
                found[0] = resume_point(folder, wanted, self._fingerprint) if wanted else None
                if found[0] is not None:
                    check_kind(found[0], self._shard_kind)
                    found[2] = is_of_other_processes(found[0])
                    if found[2]:
                        with explained_write_errors(found[0]):
                            make_universal(found[0])
                if writes:
                    clean_up(folder)
            except (ValueError, OSError) as error:
                if self.args.world_size == 1:
                    raise
                found[1] = error
        if self.args.world_size > 1:
            broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        self._reads_universal = found[2]
        if self.is_deepspeed_enabled:
            read_universal_(self.accelerator.state.deepspeed_plugin, found[2])
        return found[0]

    def _init_training_state(self, max_steps: int, per_epoch: int, epochs: int, *args: Any) -> tuple[int, int]:
        """As the trainer's, which takes one step more where a run goes on from its last checkpoint."""
        found = super()._init_training_state(max_steps, per_epoch, epochs, *args)
        return (epochs, 0) if self._resumed is not None and self.state.global_step >= max_steps else found

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As the trainer's, but a checkpoint counts when all of it is on the disk, and older ones go only then."""
        trial = kwargs.get("trial", args[1] if len(args) > 1 else None)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with explained_write_errors(folder, lambda: what_to_delete(folder)):
                if self.args.should_save:
                    begin_checkpoint(folder)
                if self._ends_stage and not self.is_deepspeed_enabled:
                    # Of a stage that is finished no moments are kept: the next one starts without any.
                    self.optimizer.state.clear()
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(*args, **kwargs)
                # Each process has its own files.
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    complete_checkpoint(folder, self.control_state())
        except OSError as error:
            # Its bytes may be those that others lack; what could not be uploaded stays.
            if self.args.should_save and error.errno is not None:
                discard_checkpoint(folder)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(folder, limit, self.state.best_model_checkpoint)

    @property
    def _ends_stage(self) -> bool:
        step = self.state.global_step
        return self.schedule.starts_stage2(step) or step >= self.schedule.max_steps

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's, in hard mode, with the sparsity of the same passes among the metrics."""
        ffns = [] if self.routing.recipe == "dense" else self.ffns
        before = [(ffn.mode, ffn.record_logits) for ffn in ffns]
        for ffn in ffns:
            ffn.set_mode("hard")
            ffn.record_logits, ffn.logits = True, None
        self._evaluated = []
        try:
            output = super().evaluation_loop(*args, **kwargs)
            if ffns:
                bound = inspect.signature(super().evaluation_loop).bind(*args, **kwargs).arguments
                output.metrics[f"{bound.get('metric_key_prefix', 'eval')}_sparsity"] = self._evaluated_sparsity()
        finally:
            self._evaluated = None
            for ffn, (mode, record) in zip(ffns, before, strict=True):
                ffn.set_mode(mode)
                ffn.record_logits, ffn.logits = record, None
        return output

    def _count_active(self, masks: Masks) -> None:
        """Adds the active fractions [L] of a pass, weighted with its tokens [L]."""
        logits = self._take_logits()
        if not logits or self._evaluated is None:
            return
        pairs = [
            (layer, None if mask is None else mask.to(layer.device)) for layer, mask in zip(logits, masks, strict=True)
        ]
        tau = self.ffns[0].threshold_logit
        active = torch.stack([active_fraction(*pair, threshold_logit=tau).to(logits[0].device) for pair in pairs])
        counts = [each.shape[:-1].numel() if mask is None else int(mask.sum()) for each, mask in pairs]
        tokens = torch.tensor(counts, dtype=torch.float64)
        self._evaluated.append((active.double().cpu() * tokens, tokens))

    def _evaluated_sparsity(self) -> float:
        assert self._evaluated is not None
        none = torch.zeros(len(self.ffns), dtype=torch.float64)
        active, tokens = (torch.stack(each).sum(0) for each in zip((none, none), *self._evaluated, strict=True))
        sums = self.accelerator.reduce(torch.stack([active, tokens]).float().to(self.args.device), reduction="sum")
        return 1 - (sums[0] / sums[1].clamp_min(1)).mean().item()

    def _asked_anywhere(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self.stop_request.asked
        asked = torch.tensor(int(self.stop_request.asked), device=self.args.device)
        return bool(self.accelerator.reduce(asked, reduction="sum"))

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the trainer's; of one that a SIGTERM has cut there are no metrics, and a checkpoint follows."""
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationCutError:
            self.stops = True
            self.control.should_save = self.control.should_training_stop = True
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """While the target still rises no checkpoint is the best one: it would be the least sparse."""
        if self.stops:
            # Saved, as the best ones alone may be, without being one of them.
            return True
        if self.ffns and self.stage.number == 1 and self.schedule.stage1_steps < self.schedule.max_steps:
            return False
        return super()._determine_best_metric(metrics=metrics, trial=trial)


class LteTrainer(RoutingMixin, Trainer):
    """`transformers.Trainer` for models from `lte.sparsify_`, see `RoutingMixin`.

    L is the loss that the model returns: of a language model the cross entropy with the next token, of a classifier,
    a masked language model or an encoder-decoder its own.

    Args:
        model: a model from `lte.sparsify_`, of LTE or another method, or with `recipe="dense"` a stock model.
        args: `lte.LteTrainingArguments`.
        kwargs: `train_dataset` with `input_ids` and `labels`, `data_collator` and all else of `transformers.Trainer`;
            `teacher`, `calibration_dataset` and `peft_config` as for `RoutingMixin`.
    """

    def check_batch(self, batch: dict[str, Any]) -> None:
        """Raises a `ValueError` for a batch without what a loss needs."""
        if not any(name in batch for name in (*self.label_names, "labels")):
            raise ValueError(
                f"batches must hold labels for {type(self.model).__name__}, got {', '.join(batch)}; give the data a "
                "labels column (for language models a copy of input_ids), or take a data_collator that makes one"
            )
        if _nothing_labelled(batch):
            others = self._spread_batches(self.train_dataset, LABEL_TOKENS)
            if all(_nothing_labelled(other) for other in others):
                raise ValueError(
                    f"train_dataset must have labels other than {IGNORED}, got none in rows spread over it"
                )
        if predicts_next_token(self.model):
            check_next_token(unwrapped(self.model).config)


def _nothing_labelled(batch: Mapping[str, Any]) -> bool:
    return "labels" in batch and bool((batch["labels"] == IGNORED).all())


def check_recipe(model: nn.Module, recipe: str) -> None:
    """Raises a `ValueError` unless the recipe is for this kind of model."""
    ffns = wrapped_ffns(model).values()
    if not ffns and recipe != "dense":
        raise ValueError(
            "model must be an LTE model or have FFNs of another method, got neither; call lte.sparsify_(model, ...) "
            "first, or train it as a control with recipe='dense'"
        )
    sparse = any(isinstance(ffn, SparseFfn) for ffn in ffns)
    if ffns and sparse == (recipe == "method"):
        kind = "an LTE model" if sparse else "a model of another method than LTE"
        fitting = "another one" if sparse else "'method'"
        raise ValueError(f"recipe must be {fitting} for {kind}, got recipe={recipe!r}")


def _distillation_weight(routing: RoutingArguments, teacher: nn.Module | None) -> float:
    weight = routing.distillation_weight
    if weight and teacher is None:
        raise ValueError(f"teacher must be a dense model when distillation_weight={weight}, got teacher=None")
    return (0.0 if teacher is None else 1.0) if weight is None else weight


def _checkpointing_of(args: Any) -> str | None:
    """What the arguments call the recomputation of activations, `None` if it is off; it got a new name in 5.2x."""
    names = [name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(args, name)]
    return names[0] if getattr(args, names[0]) else None


def _adapted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a trainer that knows no `peft_config`, with the adapters in its model."""
    from peft import get_peft_model

    config = kwargs.pop("peft_config")
    if args:
        return (get_peft_model(args[0], config), *args[1:]), kwargs
    return args, {**kwargs, "model": get_peft_model(kwargs["model"], config)}
