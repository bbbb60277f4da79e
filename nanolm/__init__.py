"""nanolm: prepare text, train a Transformer, evaluate it and sample from it. Read chapter by
chapter, in the order of the table in the README."""

import sys

__version__ = "0.1.0"

if sys.argv[0] == "-m" and "nanolm.runs.load" not in sys.orig_argv:  # python -m nanolm.<chapter>
    sys.exit("a chapter is to be read and imported: run train.py, sample.py or prepare.py")
