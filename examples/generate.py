"""Generates with the kernels, which read the weights of active experts alone, and without them."""

import sys
import time
from pydoc_data.topics import topics

from transformers import AutoModelForCausalLM, AutoTokenizer

import lte
from lte.train.router_init import fit_routers_

NAME = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"

tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForCausalLM.from_pretrained(NAME)
if not lte.sparse_ffns(model):
    # Without training the text suffers; the time does not.
    lte.sparsify_(model, lte.LteConfig(target_sparsity=0.5))
    fit_routers_(model, [tokenizer(text, return_tensors="pt") for text in list(topics.values())[:20]])
    lte.calibrate_(model, list(topics.values())[:20], tokenizer=tokenizer)
inputs = tokenizer("The for statement", return_tensors="pt").to(model.device)


def timed() -> tuple[str, float]:
    """What the model writes, and the milliseconds of a token."""
    model.generate(**inputs, max_new_tokens=4, do_sample=False)  # compiles what has to be
    start = time.perf_counter()
    ids = model.generate(**inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    return tokenizer.decode(ids[0]), (time.perf_counter() - start) / 20 * 1000


print("plain PyTorch: {!r}, {:.1f} ms a token".format(*timed()))
lte.accelerate_(model)
print("the kernels:   {!r}, {:.1f} ms a token".format(*timed()))
lte.decelerate_(model)
