"""SmolLM2 with a cache that hardly grows: most of its layers become Lizard, and learn what their attention did.

    python convert_smollm2.py TEXT.txt [STEPS]

The first two layers and those seven that copy most from far back stay attention. Twenty steps show that it works; a
model that writes as before needs some millions of tokens and an accelerator.
"""

import sys
from pathlib import Path

from vestige.context.plan.razor_attention import RazorAttention
from vestige.layers.mixers.lizard import Lizard
from vestige.models import load
from vestige.models.convert import convert
from vestige.models.distill import distill

LENGTH, KEPT = 512, 7

text, steps = Path(sys.argv[1]).read_text(encoding="utf-8"), int(sys.argv[2]) if len(sys.argv) > 2 else 20
model, tokenizer = load("smollm2", device="auto")
ids = tokenizer(text, return_tensors="pt").input_ids[0]
blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

found = RazorAttention().fit(model, tokenizer)
copying = [max(echo + follows) for echo, follows in zip(found.echo, found.induction, strict=True)]
layers = sorted(range(2, len(copying)), key=copying.__getitem__)[:-KEPT]
print("stay attention:", sorted({*range(len(copying))} - {*layers}))

swap = convert(model, Lizard(window=128), layers=layers)
distill(swap, blocks, match_steps=steps, tune_steps=steps, batch=1, tell=lambda *what: print(*what))
swap.save("smollm2-lizard", tokenizer)  # vestige.models.load("smollm2-lizard") reads it again

prompt = tokenizer("A short history of forgetting:", return_tensors="pt").to(model.device)
for count in (1, 200):
    out = model.generate(**prompt, max_new_tokens=count, min_new_tokens=count, return_dict_in_generate=True)
    print(f"{count} tokens written: {swap.nbytes(out.past_key_values):,} bytes held")
