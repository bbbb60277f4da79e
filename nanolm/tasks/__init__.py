"""What a model can be trained for: one file each, all that the training loop does not know.

What enters makes batches, chooses the model, tallies and scores it, and shows an answer.
"""
