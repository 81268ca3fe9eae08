"""Results on disk, tables, figures, and the papers' numbers beside ours. Nothing here computes a score. Read first
`session.py`: the one object that a notebook talks to. `results.py` stores what an evaluation gives and knows when that
is stale, `settings.py` keeps TP's settings, `paper.py` compares with what is published, `figures*.py` draw."""
