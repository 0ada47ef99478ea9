"""The filler text of the tasks: that of :mod:`vestige.core.haystack`, which other rooms write prompts with too."""

from vestige.core.haystack import GRAMMAR, check_source, fingerprint, sentences, vocabulary

__all__ = ["GRAMMAR", "check_source", "fingerprint", "sentences", "vocabulary"]
