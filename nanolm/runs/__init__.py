"""A run as a thing on disk and in time: its keys, folder, checkpoints, processes, and console.

What enters conducts: it brings together what the book and the other rooms hold.
"""
