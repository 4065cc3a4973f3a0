"""Models on PolyLM's benchmark, through lm-evaluation-harness, under any layout and from any format.

``benchmarks``, ``words``, ``records``, ``metrics`` and ``results`` know neither torch nor the harness; ``tasks`` and
``model`` are what the harness sees, and ``run`` is the evaluation.
"""
