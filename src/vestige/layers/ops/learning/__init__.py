"""Memories that learn while they read: one engine, and the choices that make a rule of it."""

from __future__ import annotations

from vestige.layers.ops.learning.biases import Bias
from vestige.layers.ops.learning.engine import Lesson, Rule, learn
from vestige.layers.ops.learning.perceptron import Perceptron
from vestige.layers.ops.learning.retentions import Retention

__all__ = ["Bias", "Lesson", "Perceptron", "Retention", "Rule", "learn"]
