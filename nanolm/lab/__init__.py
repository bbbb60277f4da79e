"""Looking inside a model, setting runs side by side, and learning a chapter by writing it anew.

What enters may import everything, and nothing imports it: it is for people, and no run needs it.
"""
