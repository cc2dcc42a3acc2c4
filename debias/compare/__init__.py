"""Grids of methods x seeds x hyperparameters, each run in a process of its own; tables, figures, W&B.

``search`` draws and sets hyperparameters, ``grid`` expands, ``debias.cli.one_run`` makes one run, ``runner`` all.
``records`` is what a run leaves behind, and all that ``selection``, ``table``, ``figures`` and ``report`` read.
"""
