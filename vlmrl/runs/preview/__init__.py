"""`mode=preview`: look at the data, the prompts and the rewards before a run."""
