"""Training: from text to an exported model. Entry points are run.py, prepare.py and, for the minis' text, corpus.py."""
