"""What a model can be trained for: one file each, all that the training loop does not know.

A task is a small frozen dataclass of the keys that it needs, and says:

    prepare            how documents become arrays on disk
    fit                the dataset as the task sees it, and the keys that it asks of a model
    batch              micro-batch number i of a run, a dict of arrays: "targets", and what else
                       the model's forward takes
    evaluation         the batches of an evaluation, and evaluation_size how many they are
    model              which of the book's models a config asks for
    tally, score       counts that add up over batches and processes; what they mean, loss first
    matrix             which label is taken for which, in these counts, for a picture; or None
    n_tokens           how many tokens a batch holds, without padding
    baselines          scores of models that have learned nothing
    facts, amount      what a person should know of the data, and what so many batches are
    answer             what sample.py shows
    show               what the model does now, for the console

What enters is one file, and one line in table.py; and scores.py, which counts.
"""
