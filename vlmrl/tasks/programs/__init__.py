"""Tasks whose episodes are played by programs outside of the run."""
