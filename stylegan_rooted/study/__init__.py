"""The rooted objective beyond GANs: paired studies of classifiers. Knows the losses; knows nothing of networks that generate.

A study is a flat list of cells, each a small training run or a few; `cells` computes those whose result is not on disk
yet, `summary` turns results into paired comparisons, `write` into a report.
"""
