"""Checks for cache policies: reference, undo, bytes and invariance, on small random models.

A small model sees a prompt of a few dozen tokens under a budget of :data:`~vestige.evidence.certify.caching.BUDGET`
entries, in float64 where numbers are compared. Claims of single policies stand in ``vestige.evidence.claims``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vestige.context.policy import CachePolicy, Evict
from vestige.core.anatomy import Anatomy
from vestige.evidence.certify.caching import (
    BUDGET,
    CacheCase,
    Run,
    differences,
    feed,
    held_bytes,
    reference_run,
    snapshot,
)
from vestige.evidence.certify.suite import NotApplicable, Seen, Suite, expect
from vestige.evidence.references import reference_of

policies = Suite(CachePolicy, case=CacheCase)
evicting = Suite(Evict, case=CacheCase)

PROMPT, DECODED = 24, 8
CHUNKS = (PROMPT, *[1] * DECODED)
EXACT = 1e-6  # of logits of the order of ten; Llama's norms round to float32 whatever the dtype
ARCHITECTURES = ("llama", "gpt2", "opt", "gpt-neox", "mistral", "qwen2")


def agree(mine: Run, other: Run, what: str, tolerance: float = EXACT) -> float:
    """Compare two runs, positions exactly and logits to a tolerance; the largest difference."""
    for number, (here, there) in enumerate(zip(mine.kept, other.kept, strict=True)):
        for layer, (left, right) in enumerate(zip(here, there, strict=True)):
            expect(left == right, f"{what}: after chunk {number} layer {layer} holds {left}, and {right} is due")
    largest = max(float((a - b).abs().max()) for a, b in zip(mine.logits, other.logits, strict=True))
    expect(largest <= tolerance, f"{what}: logits differ by {largest:.3g}, more than {tolerance:g}")
    return largest


def run_attached(policy: CachePolicy, model: Any, tokens: Tensor, chunks: Any, mask: Tensor | None = None) -> Run:
    """What the method does, in one go."""
    with policy.attach(model) as kept:
        return feed(model, tokens, chunks, kept.new_cache(), mask)


def against_reference(case: CacheCase, policy: CachePolicy, architecture: str, chunks: tuple[int, ...]) -> float:
    """Run method and reference on the same tokens and compare, making sure that something was at stake."""
    module = reference_of(policy.name)
    expect(module is not None, f"no reference for {policy.name!r}")
    model = case.tiny(architecture)
    tokens = case.tokens(1, sum(chunks))
    mine = run_attached(policy, model, tokens, chunks)
    due = reference_run(model, tokens, chunks, module.simulate, policy)  # type: ignore[union-attr]
    return agree(mine, due, f"{architecture}, {policy.to_json()}")


@policies.check("reference")
def logits_and_positions_agree(case: CacheCase) -> Seen:
    """In float64 every step's logits and kept positions are the reference's, with and without grouped heads."""
    largest = {name: against_reference(case, case.fitted, name, CHUNKS) for name in ("llama", "gpt2")}
    return {f"difference on {name}": difference for name, difference in largest.items()}


@policies.check("reference")
def chunked_prompts_agree(case: CacheCase) -> Seen:
    """The same for a prompt in several chunks, with single tokens and a further chunk after it."""
    return {"difference": against_reference(case, case.fitted, "llama", (13, 9, 1, 1, 1, 5, 1, 1))}


@policies.check("reference")
def sliding_window_layers_agree(case: CacheCase) -> Seen:
    """The same on models whose layers, or some of them, attend within a sliding window."""
    largest = [against_reference(case, case.fitted, name, CHUNKS) for name in ("mistral", "qwen2")]
    return {"difference": max(largest)}


@evicting.check("reference")
def each_schedule_agrees(case: CacheCase) -> Seen:
    """The same when entries are dropped after the prompt only, while decoding only, and with a lag."""
    case.require_bounded()
    forms: dict[str, Any] = {"prefill": {"when": "prefill"}, "decoding": {"when": "decoding"}, "lag of 3": {"lag": 3}}
    return {
        f"difference, {name}": against_reference(case, case.variant(**form), "llama", CHUNKS)
        for name, form in forms.items()
    }


@evicting.check("reference")
def shares_agree(case: CacheCase) -> Seen:
    """The same for budgets and recent windows that are shares, and for none of the recent tokens protected."""
    case.require_bounded()
    forms: list[Any] = [{"budget": 0.4, "recent": 0.5}, {"budget": 0.25, "recent": 0}, {"sinks": 0, "recent": 0}]
    return {"difference": max(against_reference(case, case.variant(**form), "llama", CHUNKS) for form in forms)}


@policies.check("undo")
def outputs_are_bit_identical(case: CacheCase) -> Seen:
    """After the block, logits, cached or not, and generated tokens are those of before, bit for bit."""
    tokens = case.tokens(2, PROMPT)
    for architecture in ARCHITECTURES:
        for dtype in (torch.float32, torch.bfloat16):
            model = case.tiny(architecture, dtype)
            before = _all_outputs(model, tokens)
            with case.fitted.attach(model):
                model.generate(tokens, max_new_tokens=DECODED, do_sample=False)
            for was, now in zip(before, _all_outputs(model, tokens), strict=True):
                expect(torch.equal(was, now), f"{architecture} in {dtype} gives other outputs after the block")
    return {"models": len(ARCHITECTURES), "dtypes": 2}


@torch.no_grad()
def _all_outputs(model: Any, tokens: Tensor) -> list[Tensor]:
    plain = model(tokens, use_cache=False).logits
    first = model(tokens[:, :-1], use_cache=True)
    cached = model(tokens[:, -1:], past_key_values=first.past_key_values).logits
    return [plain, first.logits, cached, model.generate(tokens, max_new_tokens=4, do_sample=False)]


@policies.check("undo")
def nothing_is_left_behind(case: CacheCase) -> Seen:
    """No hook, attribute, config value or registered function stays: on return, on an error, on Ctrl-C, in mid-pass."""
    model = case.tiny("llama", torch.float32)
    tokens = case.tokens(1, PROMPT)
    before = snapshot(model)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    for ending in (None, ValueError, KeyboardInterrupt, "in mid-pass"):
        try:
            with case.fitted.attach(model) as kept:
                feed(model, tokens, CHUNKS[:1], kept.new_cache())
                if ending == "in mid-pass":
                    kept.watch(interrupt)
                    feed(model, tokens, CHUNKS[:1], kept.new_cache())
                elif ending is not None:
                    raise ending  # type: ignore[misc]
        except (ValueError, KeyboardInterrupt):
            pass
        changed = differences(before, snapshot(model))
        expect(not changed, f"changed after a block that ended with {ending}: {', '.join(changed)}")
    kept = case.fitted.attach(model)
    kept.undo()
    kept.undo()
    expect(not differences(before, snapshot(model)), "changed after undo() by hand, twice")
    return {"ways out": 5}


@policies.check("bytes")
def reported_bytes_are_held(case: CacheCase) -> Seen:
    """What is reported equals the storage of all tensors that can be reached from the cache, at every step."""
    model = case.tiny("llama", torch.float32)
    steps = 0
    for tokens, mask in ((case.tokens(1, PROMPT + DECODED), None), padded(case)):
        with case.fitted.attach(model) as kept:
            expect(kept.nbytes == 0, f"{kept.nbytes} bytes are reported before anything was run")
            kept.cache = cache = kept.new_cache()
            for start, count in ((0, 18), (18, PROMPT - 18), *((n, 1) for n in range(PROMPT, PROMPT + DECODED))):
                step = tokens[:, start : start + count]
                feed(model, step, [count], cache, None if mask is None else mask[:, : start + count])
                held = held_bytes(cache)
                expect(kept.nbytes == held, f"{kept.nbytes} bytes are reported, {held} are held after {start + count}")
                parts = kept.nbytes_by_part
                expect(sum(parts.values()) == held, f"the parts {parts} do not add up to {held}")
                steps += 1
            twin = cache.fork()
            shared = held_bytes([cache, twin]) != held_bytes(cache) + held_bytes(twin)
            expect(not shared and twin.nbytes == held_bytes(twin), "a fork shares storage with its origin")
    return {"steps": steps, "bytes at the end": held}


@evicting.check("bytes")
def storage_really_shrinks(case: CacheCase) -> Seen:
    """Once entries have been dropped, keys and values take the budget's bytes; the rest takes less than they do."""
    case.require_bounded()
    policy = case.variant(lag=1)
    schedule = getattr(policy, "when", "both")
    model = case.tiny("llama", torch.float32)
    per_token = Anatomy.of(model).cache_bytes_per_token()
    tokens = case.tokens(3, 200)
    with policy.attach(model) as kept:
        cache = kept.cache = kept.new_cache()
        feed(model, tokens, [199 if schedule == "decoding" else 200], cache)
        if schedule == "decoding":
            feed(model, tokens[:, 199:], [1], cache)
        parts = kept.nbytes_by_part
        entries = parts["keys"] + parts["values"]
        due = 3 * BUDGET * per_token
        expect(entries == due, f"keys and values take {entries} bytes; {BUDGET} entries take {due}")
        expect(kept.nbytes - entries < entries, f"what ranks the entries takes more than they do: {parts}")
        if schedule != "prefill":
            feed(model, tokens[:, :8], [1] * 8, cache)
            expect(kept.nbytes == sum(parts.values()), "bytes grow while decoding within the budget")
    return {"kept": kept.nbytes, "of a full cache": f"{kept.nbytes / (3 * 200 * per_token):.1%}"}


@evicting.check("bytes")
def the_budget_is_never_exceeded(case: CacheCase) -> Seen:
    """While decoding no attention call sees, and no head holds, more entries than budget, lag and schedule allow."""
    case.require_bounded()
    most_seen = most_held = 0
    model = case.tiny("llama")
    lag, schedule = getattr(case.fitted, "lag", 1), getattr(case.fitted, "when", "both")
    limit = BUDGET + (DECODED if schedule == "prefill" else lag - 1)
    with case.fitted.attach(model) as kept:

        def look(layer: int, query: Tensor, keys: Tensor, positions: Tensor | None, scaling: float) -> None:
            nonlocal most_seen
            if query.shape[2] == 1:
                most_seen = max(most_seen, keys.shape[2])

        cache = kept.new_cache()
        feed(model, case.tokens(2, PROMPT), [PROMPT], cache)
        if schedule == "decoding":  # up to the first drop the prompt is held whole
            feed(model, case.tokens(2, lag), [1] * lag, cache)
        kept.watch(look)
        for n in range(DECODED):
            feed(model, case.tokens(2, 1, seed=n), [1], cache)
            most_held = max(most_held, *(cache.positions(layer).shape[-1] for layer in range(len(cache.layers))))
    expect(BUDGET <= most_seen <= limit, f"{most_seen} entries were attended to, where {limit} are allowed")
    expect(BUDGET <= most_held <= limit, f"{most_held} entries were held, where {limit} are allowed")
    return {"allowed": limit, "most attended to": most_seen, "most held": most_held}


def padded(case: CacheCase) -> tuple[Tensor, Tensor]:
    """Rows of different lengths, padded on the left, with tokens to decode after them; and the mask."""
    lengths = (9, 18, PROMPT)
    tokens = case.tokens(len(lengths), PROMPT + DECODED, seed=1)
    mask = torch.ones_like(tokens)
    for row, length in enumerate(lengths):
        tokens[row, : PROMPT - length] = 0
        mask[row, : PROMPT - length] = 0
    return tokens, mask


def compare_rows(case: CacheCase, policy: CachePolicy, model: Any, chunks: tuple[int, ...]) -> float:
    """Each row of a left-padded batch against the row alone; the largest difference in the logits."""
    tokens, mask = padded(case)
    together = run_attached(policy, model, tokens, chunks, mask)
    largest = 0.0
    for row in range(len(tokens)):
        pads = int((mask[row] == 0).sum())
        ends = [max(0, sum(chunks[: n + 1]) - pads) for n in range(len(chunks))]
        own = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        shown = [n for n, count in enumerate(own) if count]
        single = run_attached(policy, model, tokens[row : row + 1, pads:], [own[n] for n in shown])
        for step, alone in zip(shown, single.kept, strict=True):
            for layer, (here, there) in enumerate(zip(together.kept[step], alone, strict=True)):
                what = f"{policy.to_json()}: row {row}, chunk {step}, layer {layer}"
                expect(here[row] == there[0], f"{what}: {here[row]} held in the batch, {there[0]} alone")
        largest = max(largest, float((together.last[shown, row] - single.last[:, 0]).abs().max()))
    expect(largest <= EXACT, f"{policy.to_json()}: a left-padded row's logits differ by {largest:.3g} from its own")
    return largest


@policies.check("invariance")
def left_padded_rows_are_as_alone(case: CacheCase) -> Seen:
    """In a left-padded batch each row keeps and answers what it does alone, in one prompt chunk or several."""
    found = [
        compare_rows(case, case.fitted, case.tiny(architecture), chunks)
        for architecture, chunks in (("llama", CHUNKS), ("gpt2", CHUNKS), ("llama", (13, 11, *[1] * DECODED)))
    ]
    return {"difference": max(found)}


@evicting.check("invariance")
def left_padded_rows_have_their_own_shares(case: CacheCase) -> Seen:
    """The same where the budget is a share of each row's own tokens, and under every schedule."""
    case.require_bounded()
    forms: list[Any] = [
        {"budget": 0.5},
        {"budget": 0.3, "recent": 0.5},
        {"when": "decoding"},
        {"when": "prefill"},
        {"lag": 3},
    ]
    return {"difference": max(compare_rows(case, case.variant(**form), case.tiny("llama"), CHUNKS) for form in forms)}


@policies.check("invariance")
def chunked_prompt_is_whole_prompt(case: CacheCase) -> Seen:
    """While nothing has to be dropped inside the prompt, its chunking changes nothing, then or later."""
    policy = case.variant(budget=PROMPT) if case.bounded else case.roomy(PROMPT + DECODED)
    model, tokens = case.tiny("llama"), case.tokens(1, PROMPT + DECODED)
    whole = run_attached(policy, model, tokens, CHUNKS)
    # A token that comes alone after others counts as decoded, which is another thing where only decoding is looked at.
    inside = (7, 11, 6) if getattr(policy, "when", "both") == "decoding" else (7, 11, 1, 5)
    parts = run_attached(policy, model, tokens, (*inside, *[1] * DECODED))
    return {"difference": agree(parts.tail(DECODED), whole.tail(DECODED), "in chunks and whole")}


@policies.check("invariance")
def cached_is_uncached(case: CacheCase) -> Seen:
    """While nothing is dropped, token by token gives the logits of the plain model without a cache."""
    policy = case.roomy(PROMPT + DECODED)
    largest = 0.0
    for architecture in ("llama", "gpt2", "opt", "gpt-neox"):
        model, tokens = case.tiny(architecture), case.tokens(2, PROMPT + DECODED)
        with torch.no_grad():
            plain = model(tokens, use_cache=False).logits
        steps = torch.cat(run_attached(policy, model, tokens, CHUNKS).logits, dim=1)
        largest = max(largest, float((steps - plain).abs().max()))
    expect(largest <= EXACT, f"cached logits differ from uncached ones by {largest:.3g}")
    return {"difference": largest}


@policies.check("invariance")
def reordered_beams_go_on_as_recomputed(case: CacheCase) -> Seen:
    """A cache whose rows are reordered, repeated or selected goes on as one that was filled in that order."""
    model, tokens = case.tiny("llama"), case.tokens(3, PROMPT + DECODED)
    mask = padded(case)[1]
    largest = 0.0
    for change, order in (("reorder_cache", [2, 0, 0]), ("batch_select_indices", [1, 2])):
        rows = torch.tensor(order, device=tokens.device)
        with case.fitted.attach(model) as kept:
            moved, anew = kept.new_cache(), kept.new_cache()
            feed(model, tokens, CHUNKS[:5], moved, mask)
            getattr(moved, change)(rows)
            feed(model, tokens[rows], CHUNKS[:5], anew, mask[rows])
            rest = tokens[:, PROMPT + 4 :][rows]
            here, there = (feed(model, rest, CHUNKS[5:], cache, mask[rows]) for cache in (moved, anew))
        largest = max(largest, agree(here, there, change))
    return {"difference": largest}


@policies.check("invariance")
def beam_search_runs(case: CacheCase) -> Seen:
    """Beam search runs under the budget, and while nothing is dropped gives the plain model's beams."""
    model, tokens = case.tiny("llama"), case.tokens(2, PROMPT)
    search = {"num_beams": 3, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    plain = model.generate(tokens, **search)
    with case.roomy(PROMPT + 8).attach(model):
        same = model.generate(tokens, **search)
    expect(torch.equal(plain, same), f"beams differ where nothing is dropped: {same.tolist()} and {plain.tolist()}")
    with case.fitted.attach(model) as kept:
        cut = model.generate(tokens, **search)
        expect(cut.shape == plain.shape, f"beam search gave {tuple(cut.shape)} tokens, not {tuple(plain.shape)}")
        rows = kept.positions(0).shape[0]
    return {"beams": 3, "rows in the cache": rows}


@policies.check("invariance")
def one_generation_does_not_touch_the_next(case: CacheCase) -> Seen:
    """Under one attachment the same prompt gives the same tokens again, whatever ran in between."""
    model, tokens = case.tiny("llama", torch.float32), case.tokens(1, PROMPT)
    options = {"max_new_tokens": DECODED, "min_new_tokens": DECODED, "do_sample": False}
    with case.fitted.attach(model) as kept:
        first = model.generate(tokens, **options)
        held = [kept.positions(layer) for layer in range(len(kept.cache.layers))]  # type: ignore[union-attr]
        model.generate(case.tokens(2, 9, seed=5), **options)
        again = model.generate(tokens, **options)
        expect(torch.equal(first, again), "the second generation differs from the first")
        same = all(torch.equal(kept.positions(layer), was) for layer, was in enumerate(held))
        expect(same, "the second generation keeps other positions than the first")
    with case.fitted.attach(model):
        expect(torch.equal(first, model.generate(tokens, **options)), "a new attachment gives other tokens")
    return {"tokens": DECODED}


@policies.check("invariance")
def a_fork_goes_its_own_way(case: CacheCase) -> Seen:
    """A forked cache goes on as its origin would, and leaves the origin alone."""
    model, tokens = case.tiny("llama"), case.tokens(1, PROMPT + DECODED)
    with case.fitted.attach(model) as kept:
        origin = kept.new_cache()
        feed(model, tokens[:, :PROMPT], [PROMPT], origin)
        twin = origin.fork()
        feed(model, case.tokens(1, 5, seed=3), [1] * 5, twin.fork())
        runs = [feed(model, tokens[:, PROMPT:], CHUNKS[1:], cache) for cache in (twin, origin)]
    return {"difference": agree(runs[0], runs[1], "fork and origin", tolerance=0.0)}


@policies.check("invariance")
def bfloat16_is_finite_and_close(case: CacheCase) -> Seen:
    """In bfloat16 all is finite; while nothing is dropped, as near to float64 as the plain model in bfloat16."""
    tokens = case.tokens(2, PROMPT + DECODED)
    roomy = case.roomy(PROMPT + DECODED)
    worst = 0.0
    for architecture in ("llama", "gpt2"):
        half, exact = case.tiny(architecture, torch.bfloat16), case.tiny(architecture)
        cut = torch.cat(run_attached(case.fitted, half, tokens, CHUNKS).logits, dim=1)
        expect(bool(cut.isfinite().all()), f"{architecture}: logits in bfloat16 are not finite")
        with torch.no_grad():
            truth, plain = exact(tokens, use_cache=False).logits, half(tokens, use_cache=False).logits.double()
        mine = torch.cat(run_attached(roomy, half, tokens, CHUNKS).logits, dim=1).double()
        ratio = float((mine - truth).square().mean().sqrt() / (plain - truth).square().mean().sqrt())
        expect(ratio < 1.5, f"{architecture}: in bfloat16 the error is {ratio:.2f} times the plain model's")
        worst = max(worst, ratio)
    return {"error over the plain model's": worst}


@policies.check("invariance")
def nothing_has_to_be_saved(case: CacheCase) -> Seen:
    """A policy that has learnt nothing is its spec, which round-trips."""
    raise NotApplicable("the policy learns nothing: its spec is all there is to save, and that round-trips")


@evicting.check("invariance")
def cut_is_attaching_with_that_budget(case: CacheCase) -> Seen:
    """One prompt under a budget of 1.0, then cut: positions and answers of a prompt under that budget."""
    case.require_bounded()
    ranked = case.variant(budget=1.0)
    model, tokens = case.tiny("llama"), case.tokens(2, PROMPT + DECODED)
    largest = 0.0
    for budget in (BUDGET, 8, 0.5):
        once = run_attached(case.variant(budget=budget, when="prefill"), model, tokens, CHUNKS)
        with ranked.attach(model) as kept:
            whole = kept.new_cache()
            feed(model, tokens[:, :PROMPT], [PROMPT], whole)
            held = whole.nbytes
            cut = whole.cut(budget)
            rest = feed(model, tokens[:, PROMPT:], CHUNKS[1:], cut)
            expect(whole.nbytes == held, "cutting a copy changes the cache that it was cut from")
            expect(whole.get_seq_length() == PROMPT, "the cut copy's tokens came into the cache that it was cut from")
        largest = max(largest, agree(rest, once.tail(DECODED), f"cut({budget})"))
    return {"difference": largest}


@evicting.check("invariance")
def generation_goes_on_from_a_cut_cache(case: CacheCase) -> Seen:
    """Context, cut, question: ``generate`` goes on with the position ids of the whole text."""
    case.require_bounded()
    model, tokens = case.tiny("llama"), case.tokens(1, PROMPT + 5)
    with case.variant(budget=1.0).attach(model) as kept:
        whole = kept.new_cache()
        feed(model, tokens[:, :PROMPT], [PROMPT], whole)
        by_hand, cut = whole.cut(BUDGET), whole.cut(BUDGET)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        given = model.generate(tokens, past_key_values=cut, **options)[0, PROMPT + 5 :]
        logits = feed(model, tokens[:, PROMPT:], [5], by_hand).logits[0]
        for expected in given.tolist():
            token = int(_without_end(logits[0, -1], model).argmax())
            expect(token == expected, f"generate gives token {expected} where going on by hand gives {token}")
            logits = feed(model, torch.tensor([[token]], device=tokens.device), [1], by_hand).logits[0]
    return {"tokens": 6}


def _without_end(logits: Tensor, model: Any) -> Tensor:
    """What ``min_new_tokens`` makes of logits: the end may not come yet."""
    logits = logits.clone()
    logits[model.generation_config.eos_token_id] = float("-inf")
    return logits
