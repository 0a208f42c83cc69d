"""The rooted objective beyond GANs: paired studies of classifiers. Knows the losses and nothing of generators.

A study is a flat list of cells, each a small training run or a few; `cells` computes those whose result is not on disk
yet, `summary` turns results into paired comparisons, `write` into a report.
"""
