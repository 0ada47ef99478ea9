"""Policies that keep all and read few: what is read, and that it is read from where it should be."""

from __future__ import annotations

import pytest
import torch

from vestige.context.layer import EMPTY, all_runs
from vestige.context.select import longheads as longheads_module
from vestige.context.select.longheads import LongHeads
from vestige.context.select.recycled_attention import RecycledAttention
from vestige.context.select.tidal_decode import TidalDecode
from vestige.errors import InputError, SpecError
from vestige.evidence.certify.caching import feed, reference_run
from vestige.evidence.references import longheads as longheads_reference
from vestige.evidence.references import recycled_attention as recycled_reference
from vestige.evidence.references import tidal_decode as tidal_reference
from vestige.models.tiny import tiny_model

PROMPT, DECODED = 26, 14
CHUNKS = (PROMPT, *[1] * DECODED)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(policy, model, ids, chunks, mask=None):
    with policy.attach(model) as kept:
        return torch.cat(feed(model, ids, chunks, kept.new_cache(), mask).logits, dim=1)


def turned_rows(similarity: float) -> RecycledAttention:
    return RecycledAttention(budget=8, stride=2, similarity=similarity)


@pytest.mark.parametrize("similarity", [-1.0, 0.2, 0.6, 1.0])
def test_full_steps_come_where_queries_have_turned(similarity):
    model, ids = tiny_model("llama", torch.float64), tokens(1, PROMPT + DECODED)
    policy = turned_rows(similarity)
    due = reference_run(model, ids, CHUNKS, recycled_reference.simulate, policy)
    mine = logits(policy, model, ids, CHUNKS)
    assert (mine - torch.cat(due.logits, dim=1)).abs().max() < 1e-6


def test_rows_of_a_batch_decide_for_themselves():
    model, ids = tiny_model("llama", torch.float64), tokens(4, PROMPT + DECODED)
    policy, full_steps = turned_rows(0.4), []
    whole = policy._turned

    def noted(entries, look):
        full_steps.append(whole(entries, look))
        return full_steps[-1]

    object.__setattr__(policy, "_turned", noted)
    together = logits(policy, model, ids, CHUNKS)
    assert any(0 < int(rows.sum()) < 4 for rows in full_steps), "no step in which rows differ was tried"
    alone = torch.cat([logits(turned_rows(0.4), model, row[None], CHUNKS) for row in ids])
    assert (together - alone).abs().max() < 1e-6


def test_a_stride_of_one_is_full_attention():
    model, ids = tiny_model("llama", torch.float64), tokens(2, PROMPT + DECODED)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
    assert (logits(RecycledAttention(budget=4, stride=1), model, ids, CHUNKS) - plain).abs().max() < 1e-6
    assert (logits(RecycledAttention(budget=4, stride=3), model, ids, CHUNKS) - plain).abs().max() > 1e-2


def test_a_partial_step_reads_the_budget_alone(monkeypatch):
    model, ids = tiny_model("llama", torch.float64), tokens(2, PROMPT + DECODED)
    read = []
    plain = RecycledAttention.read

    def noted(self, entries, look, step):
        reading = plain(self, entries, look, step)
        read.append((step.turn, reading.values.shape[2]))
        return reading

    monkeypatch.setattr(RecycledAttention, "read", noted)
    logits(RecycledAttention(budget=8, stride=5), model, ids, CHUNKS)
    for turn, entries in read:
        assert entries == (8 if turn % 5 else PROMPT + turn)


def test_a_smoothing_window_has_a_middle():
    with pytest.raises(SpecError, match="pool"):
        RecycledAttention(pool=4)


@pytest.mark.parametrize("form", [{"start": 1, "again": 3}, {"start": 2, "again": 0.5}, {"start": 5, "again": None}])
@pytest.mark.parametrize("budget", [6, 0.25])
def test_layers_read_what_the_last_choosing_layer_chose(form, budget):
    model, ids = tiny_model("llama-deep", torch.float64), tokens(1, PROMPT + DECODED)
    policy = TidalDecode(budget=budget, **form)
    due = torch.cat(reference_run(model, ids, CHUNKS, tidal_reference.simulate, policy).logits, dim=1)
    mine = logits(policy, model, ids, CHUNKS)
    assert (mine - due).abs().max() < 1e-6


def plain_logits(model, ids, mask=None):
    with torch.no_grad():
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
        return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_correction_makes_good_what_was_read_sparsely(architecture, padded):
    model, ids = tiny_model(architecture, torch.float64), tokens(2, PROMPT + DECODED)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :9] = 0
    with TidalDecode(budget=5, start=0, again=None, correction=4).attach(model) as kept:
        cache = kept.new_cache()
        mine = torch.cat(feed(model, ids, CHUNKS, cache, mask).logits, dim=1)
        assert cache.real == mask.sum(dim=1).tolist() and cache.get_seq_length() == ids.shape[1]
    error = (mine - plain_logits(model, ids, mask)).abs().amax(dim=(0, 2))[PROMPT:]
    corrected = torch.arange(1, DECODED + 1) % 4 == 0
    assert error[corrected].max() < 1e-6 < 1e-3 < error[~corrected].min()


def test_a_correction_at_every_token_is_full_attention():
    model, ids = tiny_model("llama", torch.float64), tokens(2, PROMPT + DECODED)
    mine = logits(TidalDecode(budget=5, start=0, again=None, correction=1), model, ids, CHUNKS)
    assert (mine - plain_logits(model, ids)).abs().max() < 1e-6


def test_generation_and_beams_go_through_corrections():
    model, ids = tiny_model("llama", torch.float32), tokens(2, PROMPT)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    found = {}
    with TidalDecode(budget=64, start=0, again=None, correction=5).attach(model):
        for beams in (1, 3):
            mine = model.generate(ids, num_beams=beams, **options)
            hidden = model.model(ids, output_hidden_states=True)
            assert hidden.hidden_states[-1].shape[1] == PROMPT
            found[beams] = mine
    for beams, mine in found.items():
        assert torch.equal(mine, model.generate(ids, num_beams=beams, **options))


def test_a_correction_wants_one_kind_of_input():
    model, ids = tiny_model("llama", torch.float64), tokens(1, PROMPT + 2)
    with TidalDecode(budget=5, start=0, again=None, correction=4).attach(model) as kept, torch.no_grad():
        cache = kept.new_cache()
        model(ids[:, :PROMPT], past_key_values=cache)
        model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache)
        with pytest.raises(InputError, match="inputs_embeds"):
            model(inputs_embeds=model.get_input_embeddings()(ids[:, -1:]), past_key_values=cache)


@pytest.mark.parametrize("form", [{"start": 2}, {"start": 0, "again": 2}])
def test_layers_that_the_model_lacks_are_refused(form):
    with pytest.raises(SpecError, match="0 to 1"):
        TidalDecode(**form).attach(tiny_model("llama"))


@pytest.mark.parametrize("form", [{"start": 3, "again": 3}, {"again": 1.5}, {"budget": 1.5}, {"budget": 0}])
def test_forms_that_cannot_be_are_refused(form):
    with pytest.raises(SpecError, match=next(reversed(form))):
        TidalDecode(**form)


@pytest.mark.parametrize(
    "chunk, budget, chunks",
    [(2, 13, (42, 1, 1, 1)), (4, 12, (7, 1, 1, 20, 1, 1, 8, 1, 5)), (5, 26, (7, 1, 1, 20, 1, 1, 8, 1, 5))],
)
def test_chunks_are_chosen_and_moved_together(chunk, budget, chunks):
    model, ids = tiny_model("llama-deep", torch.float64), tokens(1, 45)
    policy = LongHeads(budget=budget, chunk=chunk)
    due = torch.cat(reference_run(model, ids, chunks, longheads_reference.simulate, policy).logits, dim=1)
    assert (logits(policy, model, ids, chunks) - due).abs().max() < 1e-6
    assert (plain_logits(model, ids) - due)[:, budget - budget % chunk :].abs().amax(dim=2).min() > 1e-3


def test_padding_between_chunks_moves_nothing(monkeypatch):
    """Rows with padding on the left, and in the middle, where a second prompt follows: each as alone."""
    for size, least in {"BLOCK_BYTES": 1, "TILES_BYTES": 1, "TILE": 5}.items():
        monkeypatch.setattr(longheads_module, size, least)
    model, ids, policy = tiny_model("llama", torch.float64), tokens(3, 50), LongHeads(budget=12, chunk=3)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, 24:33] = 0
    mask[2, :20] = 0
    chunks = (24, 14, 1, 1, 1, 9)
    together = logits(policy, model, ids, chunks, mask)
    monkeypatch.undo()
    for row in range(3):
        real = mask[row].bool()
        ends = [int(real[: sum(chunks[: n + 1])].sum()) for n in range(len(chunks))]
        own = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        alone = logits(policy, model, ids[row : row + 1, real], own)
        assert (together[row, real] - alone[0]).abs().max() < 1e-6


def test_queries_that_read_a_chunk_sit_at_its_tiles():
    """Every pair of a query and a chunk has a seat of its own, at a tile of that chunk; no tile is there in vain."""
    rows, count, length, width, most = 2, 40, 3, 8, 5
    asked = torch.arange(count).repeat(rows, 1) + 20
    asked[0, :9] = EMPTY
    at = longheads_module._Near(asked, 0, length, most, None, None)
    exist = torch.rand(rows, 3, count, at.known, generator=torch.Generator().manual_seed(0)).masked_fill(at.later, -1)
    high, best = exist.topk(most, dim=3)
    chosen = best.masked_fill(high < 0, at.known).sort(dim=3).values
    tiles = longheads_module._Tiles(chosen, at, width)
    pairs = chosen.flatten(2)
    due = pairs < at.known
    assert torch.equal(tiles.pair.gather(2, tiles.seat)[due], torch.arange(count * most).expand_as(pairs)[due])
    assert torch.equal(tiles.chunk.gather(2, tiles.seat // width)[due], pairs[due])
    readers = torch.nn.functional.one_hot(pairs, at.known + 1)[..., :-1].sum(dim=2)
    assert tiles.count == (readers / width).ceil().sum(dim=2).max()
    within = chosen == at.own[:, None, :, None]
    assert tiles.open <= (tiles.seat // width)[within.flatten(2)].min()


def test_a_text_beyond_the_trained_length_is_read_at_trained_distances():
    """Twenty times the length that the budget allows: nothing overflows, and a step reads the budget alone."""
    model, ids = tiny_model("llama", torch.float32), tokens(1, 900)
    with LongHeads(budget=48, chunk=8).attach(model) as kept:
        cache = kept.new_cache()
        assert torch.cat(feed(model, ids, (600, 290, *[1] * 10), cache, kept=False).logits, dim=1).isfinite().all()
        assert cache.layers[0].aside["chunks"].shape[2] == 900 // 8


@pytest.mark.parametrize("layout", ["plain", "with room", "by token", "repeated"])
def test_runs_of_entries_are_found_however_they_lie(layout):
    batch, heads, slots, dim, length = 2, 3, 11, 4, 3
    room = torch.randn(batch, heads, 2 * slots, dim)
    entries = {
        "plain": room[:, :, :slots].contiguous(),
        "with room": room[:, :, :slots],
        "by token": room.transpose(1, 2).contiguous().transpose(1, 2)[:, :, :slots],
        "repeated": room[:1, :, :slots].expand(batch, -1, -1, -1),
    }[layout]
    first = torch.randint(0, slots - length + 1, (batch, heads, 5))
    first[-1, -1, -1] = slots - length
    found, again = all_runs((entries, entries), first, length, {})
    due = entries.gather(2, (first[..., None] + torch.arange(length)).flatten(2)[..., None].expand(-1, -1, -1, dim))
    assert torch.equal(found, due) and torch.equal(again, due)


@pytest.mark.parametrize("form, word", [({"budget": 700, "chunk": 256}, "768"), ({"budget": 0.5}, "budget")])
def test_chunks_that_do_not_fit_are_refused(form, word):
    with pytest.raises(SpecError, match=word):
        LongHeads(**form)


def test_more_than_the_trained_length_is_refused():
    with pytest.raises(SpecError, match="256 positions"):
        LongHeads(budget=512, chunk=8).attach(tiny_model("llama"))
