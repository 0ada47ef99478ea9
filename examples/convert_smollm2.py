"""SmolLM2 with a cache that does not grow: layers 2 to 29 become Lizard, and learn what their attention did.

    python convert_smollm2.py TEXT.txt [STEPS]

Twenty steps show that it works; a model that writes as before needs some millions of tokens and an accelerator.
"""

import sys
from pathlib import Path

from vestige.layers.mixers.lizard import Lizard
from vestige.models import load
from vestige.models.convert import convert
from vestige.models.distill import distill

LENGTH = 512

text, steps = Path(sys.argv[1]).read_text(encoding="utf-8"), int(sys.argv[2]) if len(sys.argv) > 2 else 20
model, tokenizer = load("smollm2", device="auto")
ids = tokenizer(text, return_tensors="pt").input_ids[0]
blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

swap = convert(model, Lizard(window=128), layers="2-29")
distill(swap, blocks, match_steps=steps, tune_steps=steps, batch=1, tell=lambda *what: print(*what))
swap.save("smollm2-lizard")  # vestige.models.load("smollm2-lizard") reads it again

prompt = tokenizer("A short history of forgetting:", return_tensors="pt").to(model.device)
for count in (1, 200):
    out = model.generate(**prompt, max_new_tokens=count, min_new_tokens=count, return_dict_in_generate=True)
    print(f"{count} tokens written: {swap.nbytes(out.past_key_values):,} bytes held")
