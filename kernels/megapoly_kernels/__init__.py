"""Kernels of megapoly, usable on their own. Imports nothing from megapoly."""
