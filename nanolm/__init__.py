"""nanolm: prepare text, train a Transformer, evaluate it and sample from it. Read chapter by
chapter, in the order of the table in the README."""

__version__ = "0.1.0"
