"""`mode=doctor`: do renderer, engine and trainer agree? See doctor.py."""
