"""`mode=doctor`: check that renderer, engine and trainer agree. doctor.py runs the checks in order."""
