"""Training: Hydra configurations, Lightning loop, and the corpus of the mini models. Entry points are run.py and
corpus.py."""
