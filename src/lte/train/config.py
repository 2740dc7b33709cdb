"""Settings of the two training stages, and the recipes that combine them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any, Literal, get_args

from lte.config import POLE_GUARD, FfnMode, check_choice, check_fraction
from lte.settings import option

Recipe = Literal["straight_through", "annealed", "paper", "dense", "method"]
RouterTraining = Literal["trained", "frozen"]
Trainable = Literal["all", "ffn", "routers"]
MatchTo = Literal["teacher", "own"]
Budgets = Literal["free", "sensitivity"]
PriceOn = Literal["mean", "union"]
OnNonfinite = Literal["stop", "skip"]
Dtype = Literal["float32", "bfloat16"]
Optim = Literal["adamw_torch", "adamw_torch_fused", "adamw_torch_8bit", "adamw_torch_4bit", "adamw_bnb_8bit"]
Reporter = Literal["auto", "none", "tensorboard", "trackio", "wandb"]


@dataclass(kw_only=True)
class RecipeSettings:
    """What a recipe leaves open, for every way to train: `TrainConfig`, and `lte.train.arguments` over a trainer's."""

    recipe: Recipe = option(
        "straight_through",
        "straight_through: hard switching in the forward pass from the first step; annealed: soft scores that "
        "sharpen into hard ones; paper: the procedure of the paper, which does not hold a target by itself; dense: "
        "no switching at all, a control with the same data, schedule, and teacher; method: for a model of another "
        "method than LTE, its own switching and losses with the same data, schedule, and teacher.",
        affects="routing",
    )
    router_learning_rate: float | None = option(
        None, "Peak learning rate of the routers; unset: as the model's.", affects="routing"
    )
    stage2_learning_rate: float | None = option(None, "Peak learning rate of stage 2; unset: as in stage 1.")
    eta: float | None = option(None, "Weight of the efficiency loss; unset: a controller finds it.", affects="routing")
    lambda_: float | None = option(
        None,
        "Weight of the separability loss; unset: 0.5 in the paper's recipe, 0 in the others.",
        affects="routing",
    )
    pole_guard: float = option(
        POLE_GUARD, "Added to the squared distance to tau in the separability loss.", affects="routing"
    )
    ramp_ratio: float = option(
        0.6, "Share of stage 1 over which the target sparsity rises from 0 to its value.", affects="routing"
    )
    router_fit_tokens: int = option(
        16384,
        "Tokens on which routers are fitted to the experts' norms before stage 1; 0: start from zero weights.",
        affects="routing",
    )
    stage2_routers: RouterTraining | None = option(
        None,
        "Whether stage 2 trains the routers; unset: trained with straight_through, frozen otherwise.",
        affects="routing",
    )
    router_sharpening: float = option(
        20.0, "annealed: factor by which the router logits grow during stage 1.", affects="routing"
    )
    calibration_tokens: int = option(
        131072,
        "Training tokens on which the thresholds are set to meet the target at the end; 0: leave them.",
        affects="routing",
    )
    trainable: Trainable = option("all", "Which weights train: all, the FFNs and routers, or the routers alone.")
    match_weight: float = option(
        0.0, "Weight of the relative squared error of each sparse FFN's output; 0: without.", affects="routing"
    )
    match_to: MatchTo = option(
        "teacher",
        "What the outputs are matched to. teacher: those of the teacher's FFN in the same layer, from its own pass, "
        "which costs memory for them alone; own: those of the same FFN with all experts on, for the same input, which "
        "costs one more product with the down projection and needs no teacher.",
        affects="routing",
    )
    margin_weight: float = option(
        0.0, "Weight of the loss that pushes router logits away from the threshold in stage 2; 0: without.", "routing"
    )
    margin_width: float = option(1.0, "Distance to the threshold, in logits, up to which it pushes.", affects="routing")
    margin_start: float = option(0.5, "Share of stage 2 after which it sets in.", affects="routing")
    predecessor_weight: float = option(
        0.0, "Weight of the loss that pulls a token's scores to those of the token before it; 0: without.", "routing"
    )
    union_weight: float = option(
        0.0, "Weight of the share of experts that any token of a chunk switches on; 0: without.", affects="routing"
    )
    union_tokens: int = option(8, "Consecutive tokens in such a chunk.", affects="routing")
    price_on: PriceOn = option(
        "mean",
        "What the price of the target is on. mean: the experts of each token; union: those of chunks of union_tokens "
        "tokens in a row, so that experts that neighbours share are cheap. The target is that of tokens either way.",
        affects="routing",
    )
    even_weight: float = option(
        0.0,
        "Weight of the squared distance of each row's share of active neurons to the target, as a share of it, which "
        "makes all kinds of text as sparse; 0: without.",
        affects="routing",
    )
    layer_budgets: Budgets = option(
        "free",
        "free: one price for all layers, which take what they are worth; sensitivity: before stage 1 it is measured "
        "how the loss rises with each layer's sparsity, and each layer gets a target and a price of its own.",
        affects="routing",
    )
    regroup_count: int = option(
        0,
        "How often neurons move to other experts while the target rises, evenly spread over its ramp: to those whose "
        "routers would keep most of what they contribute; 0: the groups stay as they were made.",
        affects="routing",
    )
    loss_chunk_tokens: int | None = option(
        None,
        "Of how many tokens the logits exist at once in the loss of a language model; 0: of all; unset: as many as fit "
        "into 1 GiB in fp32, of all where a model's logits are more than one product of its last hidden states.",
        affects="nothing",
    )

    on_nonfinite: OnNonfinite = option(
        "stop",
        "What a loss or gradient that is NaN or infinite does. stop: it ends the run, and its batch is saved; skip: "
        "the step changes no weight and is counted, and 10 of them in a row end the run.",
    )

    def __post_init__(self) -> None:
        check_choice("recipe", self.recipe, get_args(Recipe))
        check_choice("on_nonfinite", self.on_nonfinite, get_args(OnNonfinite))
        check_choice("trainable", self.trainable, get_args(Trainable))
        if self.stage2_routers is not None:
            check_choice("stage2_routers", self.stage2_routers, get_args(RouterTraining))
        if not 0 < self.ramp_ratio <= 1:
            raise ValueError(f"ramp_ratio must lie in (0, 1], got ramp_ratio={self.ramp_ratio}")
        counts = ("router_fit_tokens", "calibration_tokens", "regroup_count", "loss_chunk_tokens")
        for name in (*counts, "pole_guard", "eta"):
            if getattr(self, name) is not None:
                check_not_negative(name, getattr(self, name))
        self._check_losses()
        if self.router_sharpening < 1:
            raise ValueError(f"router_sharpening must be at least 1, got router_sharpening={self.router_sharpening}")
        # That of a trainer's arguments, where this is a part of them.
        above: Any = super()
        getattr(above, "__post_init__", lambda: None)()

    def _check_losses(self) -> None:
        check_choice("match_to", self.match_to, get_args(MatchTo))
        check_choice("layer_budgets", self.layer_budgets, get_args(Budgets))
        check_choice("price_on", self.price_on, get_args(PriceOn))
        for name in ("match_weight", "margin_weight", "predecessor_weight", "union_weight", "even_weight"):
            check_not_negative(name, getattr(self, name))
        check_fraction("margin_start", self.margin_start)
        if self.margin_width <= 0:
            raise ValueError(
                f"margin_width must be positive, got margin_width={self.margin_width}; 0.4 is a score 0.1 from tau"
            )
        if self.union_tokens < 2:
            raise ValueError(f"union_tokens must be at least 2, got union_tokens={self.union_tokens}")
        routed = self.recipe not in ("dense", "method")
        if self.layer_budgets != "free" and routed and not (self.holds_target and self.eta is None):
            raise ValueError(
                "layer_budgets must be free where no controller holds the target, got "
                f"layer_budgets={self.layer_budgets} with recipe={self.recipe} and eta={self.eta}; leave eta unset, "
                "or take recipe=straight_through"
            )

    @property
    def holds_target(self) -> bool:
        """Whether the recipe meets the target sparsity by itself."""
        return self.recipe in ("straight_through", "annealed")

    @property
    def separability_weight(self) -> float:
        """lambda: as set, else the recipe's own."""
        if self.lambda_ is not None:
            return self.lambda_
        return 0.5 if self.recipe == "paper" else 0.0


@dataclass(kw_only=True)
class TrainConfig(RecipeSettings):
    """Settings of `train_two_stage`. Every field is a flag of `lte train` and a key of its YAML file."""

    stage1_epochs: float = option(1.0, "Passes over the data in stage 1 (model and routers learn to skip).")
    stage2_epochs: float = option(1.0, "Passes over the data in stage 2 (the model adapts to its routing).")
    distillation_weight: float = option(
        0.0, "Share of the task loss that is the KL divergence from the teacher; needs a teacher."
    )
    stage1_steps: int = option(-1, "Optimiser steps of stage 1; overrides stage1_epochs when positive.")
    stage2_steps: int = option(-1, "Optimiser steps of stage 2; overrides stage2_epochs when positive.")
    learning_rate: float = option(3e-4, "Peak learning rate of the model.")
    weight_decay: float = option(0.0, "AdamW weight decay.")
    adam_beta2: float = option(0.999, "AdamW's decay of the squared gradients' mean.")
    warmup_ratio: float = option(0.06, "Share of each stage's steps with a rising learning rate.")
    batch_size: int = option(8, "Sequences per device and forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes per optimiser step.")
    calibration_answers: int = option(
        256,
        "In tasks whose answers the model writes: prompts of the training data that it answers at the end, so that the "
        "target is met on what it writes itself; 0: on the training text alone. `calibrate_on_answers_` does it.",
        affects="routing",
    )
    count_prompts: bool = option(
        False,
        "Count the tokens of prompts, too, in the routers' losses and for the thresholds, not those of answers alone. "
        "The task loss and the sparsity that is reported stay on the answers.",
    )
    lora_rank: int | None = option(
        None,
        "Train LoRA adapters of this rank on all projections, and the routers whole, in place of all weights. "
        "lte train keeps the adapter beside the model, which has it merged.",
    )
    lora_4bit: bool = option(
        False,
        "With lora_rank: hold the weights under the adapters in 4 bits (NF4) in training; needs bitsandbytes.",
    )
    lora_alpha: float | None = option(None, "Scale of the adapters, over their rank; unset: twice the rank.")
    bf16: bool = option(False, "Train in bfloat16 autocast with fp32 weights.")
    weights_dtype: Dtype = option(
        "float32",
        "What the weights are in while they train; routers stay in fp32. bfloat16 halves weights, gradients and "
        "activations, and products are in it without bf16.",
    )
    optim: Optim | None = option(
        None,
        "Optimiser, by its name in Trainer; unset: adamw_torch_8bit for weights in bfloat16, adamw_torch otherwise. "
        "Those in 8 and 4 bits have narrow moments, of routers in fp32; adamw_torch_8bit and adamw_torch_4bit "
        "(pip install torchao) round weights in bfloat16 stochastically.",
    )
    tf32: bool | None = option(
        None,
        "Train with TensorFloat-32 products of fp32 weights on the GPUs that have them; unset: with bf16 or weights in "
        "bfloat16, where those are the routers'.",
    )
    compile: bool = option(
        False,
        "Compile each decoder layer and the loss with torch.compile. Each shape of a batch would be compiled anew, so "
        "rows are padded to a multiple of 64 tokens, and the smaller batch at the end of a pass is left out.",
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    dataloader_num_workers: int = option(
        2,
        "Processes that prepare batches on a GPU machine; 0 where many trainings share its cores.",
        affects="nothing",
    )
    logging_steps: int = option(10, "Steps between two log entries.", affects="nothing")
    save_steps: int = option(500, "Steps between two checkpoints.", affects="nothing")
    report_to: Reporter = option(
        "auto",
        "Where the curves of the log also go while it trains; auto: to TensorBoard if it is installed.",
        affects="nothing",
    )
    seed: int = option(0, "Seed of data order and dropout.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("report_to", self.report_to, get_args(Reporter))
        check_choice("weights_dtype", self.weights_dtype, get_args(Dtype))
        if self.optim is not None:
            check_choice("optim", self.optim, get_args(Optim))
        if self.lora_4bit and self.weights_dtype != "float32":
            raise ValueError(
                f"weights_dtype must be float32 with lora_4bit, whose weights are in 4 bits, got "
                f"weights_dtype={self.weights_dtype}"
            )
        if self.report_to not in ("auto", "none") and find_spec(self.report_to) is None:
            raise ValueError(
                f"report_to must name an installed package, got report_to={self.report_to}; pip install "
                f"{self.report_to}, or say none"
            )
        check_fraction("warmup_ratio", self.warmup_ratio)
        check_fraction("adam_beta2", self.adam_beta2)
        check_fraction("distillation_weight", self.distillation_weight, upper_closed=True)
        if self.lora_4bit and self.lora_rank is None:
            raise ValueError("lora_rank must be given with lora_4bit, got lora_rank=None")
        if self.lora_4bit and self.compile:
            # Bitsandbytes warns that its products have no gradient of their own there, and then fails (0.50).
            raise ValueError(
                "compile must be off with lora_4bit, whose layers torch.compile cannot train, got compile=True"
            )
        for name in ("learning_rate", "batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {name}={getattr(self, name)}")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1 or unset, got lora_rank={self.lora_rank}")
        for name in ("calibration_answers", "dataloader_num_workers", "stage1_epochs", "stage2_epochs", "weight_decay"):
            check_not_negative(name, getattr(self, name))

    @property
    def reporters(self) -> list[str]:
        """`report_to` as `transformers.TrainingArguments` takes it."""
        if self.report_to == "auto":
            return ["tensorboard"] if find_spec("tensorboard") else []
        return [] if self.report_to == "none" else [self.report_to]

    @property
    def trains_in_tf32(self) -> bool:
        """Whether products of fp32 weights are in TensorFloat-32 during training."""
        return (self.bf16 or self.weights_dtype == "bfloat16") if self.tf32 is None else self.tf32

    def leaves_out_last_batch(self, rows: int) -> bool:
        """Whether a pass over so many rows ends with its last full batch, if the last one is not full."""
        return self.compile and rows >= self.batch_size

    def sets_thresholds(self, stages: Sequence[int]) -> bool:
        """Whether a training of these stages ends with thresholds that meet the target."""
        return 2 in stages and self.holds_target and self.calibration_tokens > 0

    def to_dict(self) -> dict[str, Any]:
        """All settings, JSON-ready."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def check_not_negative(name: str, value: float) -> None:
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {name}={value}")


@dataclass(frozen=True)
class Stage:
    """One stage of training, resolved from its settings.

    Attributes:
        number: 1 or 2.
        mode: how the FFNs switch their experts in the forward pass.
        train_routers: whether the router weights get gradients.
        controls_eta: whether eta follows the target sparsity.
        controls_bias: whether a shift of all router biases follows the target sparsity.
        scheduler: name of the learning-rate schedule in transformers.
        eta: weight of the efficiency loss where no controller sets it.
    """

    number: int
    mode: FfnMode
    train_routers: bool
    controls_eta: bool
    controls_bias: bool
    scheduler: str
    eta: float = 0.0


def stages_of(config: RecipeSettings) -> tuple[Stage, Stage]:
    """The two stages of a recipe.

    The paper's: soft scores with both router losses, then frozen routers and the task loss alone, each with its own
    decaying learning rate. Ours: stage 1 keeps the learning rate up while the target ramps, stage 2 decays it to zero
    at the full target, which a feedback on eta holds, or on the router biases while the routers are frozen. The
    control `dense` follows the schedule of ours and never switches, and so does `method`, whose modules have a mode of
    their own.
    """
    if config.recipe == "paper":
        trained = config.stage2_routers == "trained"
        return (
            Stage(1, "soft", True, config.eta is None, False, "linear", config.eta or 0.0),
            Stage(2, "straight_through" if trained else "hard", trained, False, False, "linear"),
        )
    if config.recipe in ("dense", "method"):
        return (
            Stage(1, "dense", False, False, False, "constant_with_warmup"),
            Stage(2, "dense", False, False, False, "linear"),
        )
    first_mode: FfnMode = "soft" if config.recipe == "annealed" else "straight_through"
    unset = "trained" if config.recipe == "straight_through" else "frozen"
    trained = (config.stage2_routers or unset) == "trained"
    return (
        Stage(1, first_mode, True, config.eta is None, False, "constant_with_warmup", config.eta or 0.0),
        Stage(2, "straight_through" if trained else "hard", trained, trained, not trained, "linear"),
    )
