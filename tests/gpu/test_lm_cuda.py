"""The model on CUDA: rows that are packed each in its own way, blocks on two devices, shards on two."""

import copy
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from vestige.core.ledger import Ledger
from vestige.layers.mixers.base import Mixer
from vestige.layers.mixers.sliding_window import SlidingWindow
from vestige.models import VestigeConfig, VestigeLM
from vestige.models.blocks import names_of
from vestige.models.convert import convert
from vestige.models.tiny import tiny_model
from vestige.training.pretrain import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
ROOT = Path(__file__).parents[2]
CUTS = ((0, 70, 71, 200), (0, 130, 200))
EVERY_KIND = "gated-delta-net sliding-window(window=8) softmax titans mamba2(head_dim=8) lizard(window=8)"


def build(blocks, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "vocab_size": 90, "initializer_range": 0.15, **options}
    return VestigeLM(VestigeConfig(blocks=blocks, **sizes)).eval()


def tokens(rows, length):
    return torch.randint(2, 90, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", names_of(Mixer))
@torch.no_grad()
def test_rows_packed_each_in_its_own_way(name):
    """By kernels in bfloat16, the first tokens of a later sequence are as alone, and not as behind another."""
    model, text = build(name, num_hidden_layers=2).to("cuda", torch.bfloat16), tokens(2, 200).cuda()
    places = torch.stack([torch.cat([torch.arange(b - a) for a, b in pairwise(row)]) for row in CUTS]).cuda()
    packed, behind = model(text, position_ids=places).logits, model(text).logits
    for row, begin in ((0, 71), (1, 130)):
        alone = model(text[row : row + 1, begin:]).logits[0, :16].float()
        error, leak = ((t[row, begin : begin + 16].float() - alone).norm() / alone.norm() for t in (packed, behind))
        assert error < 0.03 and error < leak / 5, (float(error), float(leak))


@two
@pytest.mark.parametrize("beams", [1, 3])
def test_blocks_on_two_devices(tmp_path, beams):
    """As Accelerate spreads it: what blocks are told, and what they hold, is where they are."""
    model = build(EVERY_KIND)
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": 0, "lm_head": 0, "model.norm": 1}
    places |= {f"model.layers.{n}": n % 2 for n in range(model.config.num_hidden_layers)}
    spread = VestigeLM.from_pretrained(tmp_path, device_map=places)
    assert {weight.device.index for weight in spread.parameters()} == {0, 1}
    text, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    due = model.cuda().generate(text.cuda(), **{**given, "attention_mask": mask.cuda()})
    seen = spread.generate(text.cuda(), **{**given, "attention_mask": mask.cuda()}, return_dict_in_generate=True)
    assert torch.equal(seen.sequences, due)
    held = [next(iter(layer.tensors.values())).device.index for layer in seen.past_key_values.layers]
    assert held == [n % 2 for n in range(len(held))]
    packed = torch.tensor([[*range(9), *range(11)], [*range(14), *range(6)]]).cuda()
    torch.testing.assert_close(
        spread(text.cuda(), position_ids=packed).logits,
        model(text.cuda(), position_ids=packed).logits,
        atol=1e-4,
        rtol=1e-4,
    )


@two
def test_converted_layers_on_two_devices(tmp_path):
    model = copy.deepcopy(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    layers = {f"model.layers.{n}": n % 2 for n in range(model.config.num_hidden_layers)}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map={"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 0, **layers}
    )
    text, mask = tokens(2, 20).cuda(), torch.ones(2, 20, dtype=torch.long).cuda()
    mask[0, :6] = 0
    told = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 2}
    written = []
    for each in (model.cuda(), spread):
        torch.manual_seed(1)
        with convert(each, SlidingWindow(window=8)):
            written.append(each.generate(text, **told))
    assert torch.equal(*written)


@two
def test_the_trainers_way_with_two_devices_and_one_process():
    """It wraps the model in nn.DataParallel, in training and in evaluation."""
    model, text = build("gated-delta-net softmax lizard(window=8)").cuda(), tokens(4, 20).cuda()
    both = torch.nn.DataParallel(model)
    for mode in (True, False):
        due, seen = (each.train(mode)(input_ids=text, labels=text) for each in (model, both))
        torch.testing.assert_close(seen.logits, due.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(seen.loss.mean(), due.loss, atol=1e-4, rtol=1e-4)
    seen.loss.mean().backward()
    assert all(weight.grad is not None for weight in model.parameters())


@two
def test_one_process_trains_on_one_device(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the rat ran after the cat. " * 60)
    sizes = {"blocks": "gla softmax", "hidden_size": 32, "num_attention_heads": 2}
    given = {"out": str(tmp_path / "run"), "data": [str(tmp_path / "text.txt")], "model": sizes, "steps": 20}
    trained = train({**given, "length": 32, "batch": 4, "learning_rate": 1e-2, "warmup": 2}, quiet=True)
    (row,) = Ledger(tmp_path / "run" / "ledger.jsonl").rows()
    assert trained.finished and trained.loss < 4 and row["tokens"] == 20 * 4 * 32


SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tests.gpu.test_lm_cuda import EVERY_KIND, build, tokens

dist.init_process_group("nccl")
rank = dist.get_rank()
torch.cuda.set_device(rank)
mesh = dist.device_mesh.init_device_mesh("cuda", (dist.get_world_size(),))
losses = []
for sharded in (False, True):
    model = build(EVERY_KIND).cuda().train()
    if sharded:
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=False)
    text = tokens(2, 40).cuda()
    for _ in range(5):
        loss = model(text, labels=text).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
assert losses[4] < losses[0], losses
assert all(abs(a - b) < 1e-2 * a for a, b in zip(losses[:5], losses[5:])), losses
if rank == 0:
    print("sharded as whole", losses)
dist.destroy_process_group()
"""


@two
def test_sharded_by_fsdp2(tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*launch, str(tmp_path / "sharded.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "sharded as whole" in done.stdout, done.stderr
