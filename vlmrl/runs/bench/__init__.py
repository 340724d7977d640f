"""`mode=bench`: how fast a run is beside its limits, and what bounds its step. bench.py takes the steps."""
