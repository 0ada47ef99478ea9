"""Natural text that is there without a network."""

from __future__ import annotations

import pytest

from vestige.errors import InputError
from vestige.evidence.data.text import passages, python_reference


def test_the_text_is_long_and_natural():
    texts = python_reference()
    assert sum(map(len, texts)) > 200_000
    assert len(set(texts)) == len(texts)
    words = " ".join(texts).split()
    assert 0.02 < sum(word.lower() == "the" for word in words) / len(words) < 0.12


def test_passages_depend_on_the_seed_alone(tokenizer):
    first = passages(tokenizer, 50, (0, 1, 2))
    assert first.shape == (3, 50)
    assert passages(tokenizer, 50, (2, 0)).tolist() == [first[2].tolist(), first[0].tolist()]
    assert len({tuple(row) for row in first.tolist()}) == 3
    assert passages(tokenizer, 20, (1,))[0].tolist() == first[1, :20].tolist()


def test_a_passage_longer_than_the_text_is_refused():
    class Silent:
        """A tokenizer that finds little in any text."""

        def __call__(self, text, **options):
            self.input_ids = [1, 2, 3]
            return self

    with pytest.raises(InputError, match="3 tokens; a passage of 10"):
        passages(Silent(), 10, (0,))
