"""What a computer needs and no lesson does: whole files, signals, workers, typed keys from text.

What enters knows nothing of models and texts, and imports the standard library and tqdm alone.
"""
