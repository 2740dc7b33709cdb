"""In what numbers a training's model is measured, before it and as the folder that is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from lte.train.config import TrainConfig
from lte.train.processes import products_in_tf32, training_device


@dataclass(frozen=True)
class Precision:
    """The same before and after the training, so that both can be compared.

    Attributes:
        dtype: of the weights that are measured, `float32` or `bfloat16`.
        tf32: whether products of fp32 weights are in TensorFloat-32.
    """

    dtype: str = "float32"
    tf32: bool = False

    @classmethod
    def of_training(cls, train: TrainConfig, save_dtype: str | None) -> Precision:
        """bfloat16 where a GPU trains in it and the folder holds it, which people then load; else float32.

        TF32 is for those who set `tf32`: unset, it is training's alone.

        Args:
            train: the settings.
            save_dtype: of the saved weights; `None`: as they were trained, adapters merged in fp32.
        """
        if save_dtype is None:
            save_dtype = train.weights_dtype if train.lora_rank is None else "float32"
        trains_narrow = train.bf16 or train.weights_dtype == "bfloat16"
        if not torch.cuda.is_available():
            return cls()
        if trains_narrow and save_dtype == "bfloat16":
            return cls("bfloat16")
        return cls(tf32=bool(train.tf32))

    @property
    def name(self) -> str:
        """For a sentence."""
        return self.dtype + (" with TF32 products" if self.tf32 else "")

    @contextmanager
    def products_of(self, model: nn.Module) -> Iterator[None]:
        """Products of a model in fp32 as they will be of the saved folder: in bfloat16 by autocast."""
        tf32 = products_in_tf32(model) if self.tf32 else nullcontext()
        with tf32, torch.autocast(training_device().type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            yield
