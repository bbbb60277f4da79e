"""Hugging Face's formats, in and out, and GGUF: names, families of models, weights, tokenizers.

What enters translates; nothing outside this room knows other people's names.
"""
