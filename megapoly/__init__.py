"""megapoly: multilingual language models in 3D parallel, from raw text to an evaluated model."""

__version__ = "0.1.0"
