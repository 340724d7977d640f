"""Constants of the formula in episode.py. Imports nothing heavy: the checks of every start use it."""

TURN_FRAME, CHARACTERS_PER_TOKEN, TINY_CHARACTERS_PER_TOKEN = 10, 4, 2
