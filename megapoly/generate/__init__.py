"""Texts and likelihoods from a trained model, under any layout."""

from megapoly.generate.generator import Completion, Generator, Likelihood
from megapoly.generate.sampling import Sampling
from megapoly.generate.vocabulary import Question

__all__ = ["Completion", "Generator", "Likelihood", "Question", "Sampling"]
