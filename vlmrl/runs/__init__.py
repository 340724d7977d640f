"""Runs: the parts of a run (build), its start and end (lifecycle), and one file per mode (modes has the table)."""
