"""Texts and likelihoods from a trained model, under any layout."""

from megapoly.generate.generator import Completion, Generator, Likelihood
from megapoly.generate.sampling import Sampling

__all__ = ["Completion", "Generator", "Likelihood", "Sampling"]
