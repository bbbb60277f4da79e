"""What a run would need and take, before it runs: memory, time, and which layout is the cheapest.

What enters computes with shapes alone: nothing here holds a weight or reads a text.
"""
