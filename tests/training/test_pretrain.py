"""Training from a description: it learns, goes on where it stopped, and says what is wrong before it begins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from vestige.core.ledger import Ledger
from vestige.errors import InputError, ModelError, SpecError
from vestige.models import VestigeConfig, VestigeLM, load
from vestige.training import pretrain
from vestige.training.pretrain import read, train
from vestige.training.text import Blocks, find_files, make_tokenizer, split, tokens_of

EXAMPLES = Path(__file__).parents[2] / "examples"
RHYME = "the cat sat on the mat and the rat ran after the cat. "


@pytest.fixture
def run(tmp_path):
    """A description of a short training run, as a file."""
    (tmp_path / "text.txt").write_text(RHYME * 120, encoding="utf-8")
    given = {
        "out": "run",
        "data": ["text.txt"],
        "model": {"blocks": "gated-delta-net softmax", "hidden_size": 32, "num_attention_heads": 2},
        "length": 32,
        "batch": 4,
        "steps": 30,
        "warmup": 3,
        "learning_rate": 1e-2,
        "save_every": 10,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return path


def test_it_learns_saves_and_tells(run):
    trained = train(run, quiet=True)
    assert trained.finished and trained.steps == 30
    assert trained.loss < 0.6 * np.log(258)
    assert trained.bits_per_byte == pytest.approx(trained.loss / np.log(2), rel=0.01)  # each byte is a token
    kinds = {p.suffix for p in trained.folder.iterdir() if p.is_file()}
    assert kinds <= {".json", ".safetensors", ".yaml", ".jsonl"}
    model, tokenizer = load(trained.folder)
    assert isinstance(model, VestigeLM)
    for key, weight in trained.model.state_dict().items():
        assert torch.equal(weight.cpu(), model.state_dict()[key])
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0]).startswith("the cat")
    assert model(ids).past_key_values is not None
    (row,) = Ledger(trained.folder / "ledger.jsonl").rows()
    assert row["metrics"]["loss"] == trained.loss and row["state_bytes"] > 0 and row["tokens"] == 30 * 4 * 32
    assert row["parameters"] == model.num_parameters()


def test_the_finished_run_is_not_run_again(run, monkeypatch):
    first = train(run, quiet=True)
    monkeypatch.setattr(pretrain._Trainer, "train", lambda *a, **k: pytest.fail("trained again"))
    again = train(run, quiet=True)
    assert again.steps == 30 and again.loss == pytest.approx(first.loss)
    assert len(Ledger(first.folder / "ledger.jsonl")) == 1


def test_what_was_interrupted_ends_as_what_was_not(run, monkeypatch):
    """Asked to stop after twelve steps it saves; the same call goes on, to the very same weights."""
    whole = train(read(run, out=str(run.parent / "whole")), quiet=True)
    step = pretrain._StopWhenAsked.on_step_end

    def asked(self, args, state, control, **rest):
        if state.global_step == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, args, state, control, **rest)

    monkeypatch.setattr(pretrain._StopWhenAsked, "on_step_end", asked)
    before = signal.getsignal(signal.SIGINT)
    part = train(run, quiet=True)
    assert not part.finished and part.steps in (12, 13)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(pretrain._StopWhenAsked, "on_step_end", step)
    rest = train(run, quiet=True)
    assert rest.finished and rest.steps == 30
    for key, weight in whole.model.state_dict().items():
        torch.testing.assert_close(rest.model.state_dict()[key], weight, atol=1e-6, rtol=1e-5)


def test_another_description_needs_another_folder(run):
    train(run, quiet=True)
    with pytest.raises(SpecError, match=r"described otherwise \(learning_rate\)"):
        train(read(run, learning_rate=1e-3), quiet=True)
    assert train(read(run, steps=3), quiet=True, fresh=True).steps == 3


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"stepz": 3}, SpecError, "unknown field 'stepz'; did you mean steps"),
        ({"steps": 0}, SpecError, "'steps' is 0"),
        ({"data": ["absent.txt"]}, InputError, "names no file: .*absent.txt"),
        ({"data": []}, SpecError, "'data'"),
        ({"model": {"hidden": 3}}, SpecError, "field 'model': unknown field 'hidden'; did you mean hidden_size"),
        ({"model": {"blocks": "glaa"}}, SpecError, "unknown mixer 'glaa'"),
        ({"length": 5000}, InputError, "two blocks of 5000"),
        ({"tokenizer": "bpe:100"}, SpecError, "bpe:N with N >= 258"),
        ({"tokenizer": "no/such"}, ModelError, "no tokenizer 'no/such'"),
        ({"trainer": {"nonsense": 1}}, SpecError, "TrainingArguments has no nonsense"),
        ({"trainer": {"optim": "nonsense"}}, SpecError, "TrainingArguments refuses this: nonsense is"),
        ({"out": "run.yaml"}, SpecError, "field 'out': .* is a file"),
    ],
)
def test_what_is_wrong_is_said_first(run, changes, error, words):
    given = yaml.safe_load(run.read_text())
    run.write_text(yaml.safe_dump({**given, **changes}))
    with pytest.raises(error, match=words):
        train(run, quiet=True)
    assert not (run.parent / "run" / "model.safetensors").exists()
    if "model" in changes:  # before a tokenizer was learnt
        assert not (run.parent / "run").exists()


def test_the_vocabulary_is_the_tokenizers_or_larger(run):
    assert (
        train(read(run, steps=1, model={"blocks": "gla", "vocab_size": 320}), quiet=True).model.config.vocab_size == 320
    )
    with pytest.raises(SpecError, match="vocab_size is 200; the tokenizer has 258 tokens"):
        train(read(run, steps=1, model={"blocks": "gla", "vocab_size": 200}), quiet=True, fresh=True)


def test_the_example_is_a_description():
    """And the script beside it trains the same pattern."""
    shown = read(EXAMPLES / "train_hybrid.yaml")
    assert VestigeConfig(**shown.model).plan()[3].mixer.name == "softmax"
    assert repr(shown.model["blocks"]).strip("'") in (EXAMPLES / "train_hybrid.py").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_of_a_script(run):
    """It trains, reads what it saved, and writes."""
    script = [sys.executable, str(EXAMPLES / "train_hybrid.py"), "text.txt", "3"]
    done = subprocess.run(script, cwd=run.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "200 tokens written" in done.stdout
    assert (run.parent / "hybrid" / "model.safetensors").is_file()


def test_files_that_are_no_description(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "absent.yaml")
    for text, words in (("a: [", "no YAML"), ("- 3", "holds no fields")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(SpecError, match=words):
            read(tmp_path / "bad.yaml")
    with pytest.raises(SpecError, match="'out' is missing"):
        read({"data": ["x"]})


def test_only_weights_of_maps_decay():
    model = VestigeLM(
        VestigeConfig(blocks="gated-delta-net mamba2 hgrn2 transnormer-llm", hidden_size=64, vocab_size=9)
    )
    names = set(pretrain._Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    for name, weight in model.named_parameters():
        if any(part in name for part in ("a_log", "dt_bias", "skip", "bound", "speed", "norm", "bias")):
            assert name not in names
        elif "proj" in name:
            assert name in names and weight.dim() == 2


def test_text(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("zwölf Boxkämpfer", encoding="utf-8")
    (tmp_path / "deep" / "a.txt").write_text("x" * 20)
    files = find_files([str(tmp_path / "*.txt"), str(tmp_path)])
    assert [f.name for f in files] == ["b.txt", "a.txt"]
    tokenizer = make_tokenizer("bytes", files)
    ids = tokenizer("zwölf  Boxkämpfer\n", add_special_tokens=False).input_ids
    assert len(ids) == len("zwölf  Boxkämpfer\n".encode()) and len(tokenizer) == 258
    assert tokenizer.decode(ids) == "zwölf  Boxkämpfer\n"
    tokens, size = tokens_of(tokenizer, files)
    assert len(tokens) == size + 2 and list(tokens).count(tokenizer.eos_token_id) == 2
    learnt = make_tokenizer("bpe:300", files)
    assert len(learnt) <= 300 and learnt.decode(learnt("Boxkämpfer").input_ids) == "Boxkämpfer"
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(InputError, match=r"bad\.txt cannot be read as text"):
        tokens_of(tokenizer, [tmp_path / "bad.txt"])


def test_blocks():
    first, last = split(np.arange(103, dtype=np.int32), 10, 0.2)
    assert (len(first), len(last)) == (8, 2)
    assert last[1]["input_ids"].tolist() == list(range(90, 100))
    assert isinstance(first, Blocks)


TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
ACCELERATED = """
import sys
from accelerate import debug_launcher
from vestige.cli import main

debug_launcher(main, (sys.argv[1:],), num_processes=2)
"""  # on a CPU `accelerate launch` begins several processes through MPI alone


def launched(launcher: tuple[str, ...], *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command in two processes on the CPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    whole = [sys.executable, *launcher, *command]
    return subprocess.run(whole, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [(*TORCHRUN, "-m", "vestige.cli"), ("-c", ACCELERATED)], ids=["torch", "accelerate"]
)
def test_two_processes(run, launcher):
    """Two processes share each step, and one of them writes model and ledger."""
    done = launched(launcher, "train", str(run), "--quiet", "--json", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["finished"] and outcome["loss"] < 0.6 * np.log(258)
    (row,) = Ledger(run.parent / "run" / "ledger.jsonl").rows()
    assert row["processes"] == 2 and row["tokens"] == 2 * 30 * 4 * 32


SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from vestige.models import VestigeConfig, VestigeLM

dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))

def build():
    torch.manual_seed(0)
    blocks = "gated-delta-net mamba2(head_dim=8) hgrn2 softmax sliding-window(window=8)"
    return VestigeLM(VestigeConfig(blocks=blocks, hidden_size=32, num_attention_heads=2, vocab_size=50))

whole, model = build(), build()
for block in model.model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
assert all(isinstance(p, DTensor) for p in model.parameters())
text = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(1))
for network in (whole, model):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        loss = network(text, labels=text).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
for (name, mine), due in zip(model.named_parameters(), whole.parameters(), strict=True):
    torch.testing.assert_close(mine.full_tensor(), due, atol=1e-5, rtol=1e-4, msg=name)
print("sharded as whole")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_by_fsdp2(tmp_path):
    """Blocks wrapped by FSDP2 in two processes train to the weights of the unwrapped model."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    done = launched(TORCHRUN, str(tmp_path / "sharded.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sharded as whole") == 2
