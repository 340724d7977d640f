"""Estimates of what a run takes, computed from the config before anything is started (`dry_run=true`). No torch.

    sizes.py     the model's numbers, from its config.json or `model.tiny`; constants of the estimates
    episode.py   tokens of an episode
    memory.py    bytes on the trainer's GPUs, on the servers' GPUs, and on the host
    plan.py      all of it as a table

../machine.py finds the GPUs and the memory of this host; ../places.py says which process runs on which GPU.
"""
