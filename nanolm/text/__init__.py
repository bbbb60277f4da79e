"""From text to token ids on disk: corpora, known datasets, tokenizers as objects, datasets.

What enters makes or opens what a task then reads; the algorithms themselves are chapters of the
book.
"""
