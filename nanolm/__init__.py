"""nanolm: prepare text, train a Transformer, evaluate it and sample from it. Read chapter by
chapter, in the order of the table in the README."""

import sys

__version__ = "0.1.0"

COMMANDS = {"nanolm.runs.export", "nanolm.plan"}
COMMANDS |= {f"nanolm.lab.{name}" for name in ("look", "compare", "exercises", "grading")}
if sys.argv[0] == "-m" and COMMANDS.isdisjoint(sys.orig_argv):  # python -m nanolm.<chapter>
    sys.exit("a chapter is to be read and imported: run train.py, sample.py or prepare.py")
