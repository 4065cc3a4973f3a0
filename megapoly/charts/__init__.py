"""Pictures for people: what a plan mixes, how tokenizers compare. matplotlib draws them, where it is installed."""
