"""A hybrid of the gated delta rule and softmax attention, three to one, learns a text and goes on with a line of it.

    python train_hybrid.py TEXT.txt [STEPS]

The same as a description, for `vestige train` and for several devices: train_hybrid.yaml.
"""

import sys

from vestige.models import load
from vestige.training.pretrain import train

trained = train(
    {
        "out": "hybrid",
        "data": [sys.argv[1]],
        "tokenizer": "bpe:1024",
        "model": {"blocks": "gated-delta-net*3 softmax", "hidden_size": 128, "num_attention_heads": 4},
        "length": 256,
        "batch": 8,
        "steps": int(sys.argv[2]) if len(sys.argv) > 2 else 300,
        "warmup": 10,
        "learning_rate": 3e-3,
    }
)
print(f"held out: {trained.loss:.3f} nats per token, {trained.bits_per_byte:.3f} bits per byte")

model, tokenizer = load("hybrid")
prompt = tokenizer("The ", return_tensors="pt")
for count in (1, 200):
    out = model.generate(**prompt, max_new_tokens=count, min_new_tokens=count, return_dict_in_generate=True)
    print(f"{count} tokens written: bytes held by each block {out.past_key_values.nbytes_by_layer}")
print(tokenizer.decode(out.sequences[0]))
