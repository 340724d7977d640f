"""`mode=replay`: send a recorded batch through today's code. replay.py runs the comparisons in order."""
