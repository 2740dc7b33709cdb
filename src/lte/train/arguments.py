"""The settings of a trainer that trains routing, too."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from lte.config import check_fraction
from lte.settings import option
from lte.train.config import RecipeSettings


@dataclass(kw_only=True)
class RoutingArguments(RecipeSettings):
    """The training settings that are ours, beside those of a trainer.

    `lte.LteTrainingArguments` is these over `transformers.TrainingArguments`. Over the arguments of another trainer,
    `class LteSFTConfig(lte.RoutingArguments, trl.SFTConfig)` say, decorated with `@dataclass`, they are settings of
    that one.
    """

    stage1_ratio: float = option(
        0.5, "Share of all steps in which the model learns to skip (stage 1); in the others it adapts (stage 2)."
    )
    distillation_weight: float | None = option(
        None, "Share of the task loss that is the KL divergence from the teacher; unset: 1 with a teacher, else 0."
    )
    compile_layers: bool = option(
        False,
        "Compile each decoder layer and the loss with torch.compile; takes batches of few different widths.",
    )

    def __post_init__(self) -> None:
        check_fraction("stage1_ratio", self.stage1_ratio, upper_closed=True)
        if self.distillation_weight is not None:
            check_fraction("distillation_weight", self.distillation_weight, upper_closed=True)
        super().__post_init__()


@dataclass
class LteTrainingArguments(RoutingArguments, TrainingArguments):
    """`transformers.TrainingArguments` with the settings of LTE, and the learning rate and warm-up of our recipes.

    `max_steps`, or `num_train_epochs`, is that of both stages together, of which `stage1_ratio` is stage 1. With
    `lr_scheduler_type="linear"`, the default, the recipe sets the learning rate: each stage warms up over
    `warmup_steps` (below 1 a share of its steps), then the first stays at its peak and the second falls to 0; in the
    paper's recipe both fall. Any other schedule is taken as it is, over both stages.
    """

    learning_rate: float = option(3e-4, "Peak learning rate of the model.")
    warmup_steps: float = option(0.06, "Steps of each stage with a rising learning rate; below 1 a share of them.")
    logging_nan_inf_filter: bool = option(False, "Whether NaN and infinite losses are left out of the log.")
    ddp_find_unused_parameters: bool | None = option(False, "As in TrainingArguments; all that trains is used.")
