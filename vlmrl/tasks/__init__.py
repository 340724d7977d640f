"""Tasks: problems with scoring. `base` is the contract, `check` tests a task of your own against it."""
