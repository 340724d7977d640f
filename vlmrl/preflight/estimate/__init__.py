"""What a run will take, worked out from the config before anything is started: `dry_run=true`. No torch.

machine.py   the GPUs and the memory that are here
sizes.py     the model's numbers, from its config.json or `model.tiny`
episode.py   tokens of an episode
memory.py    bytes on the trainer's GPUs, the servers' GPUs, the host
places.py    which process starts on which device, and whether they have room
plan.py      all of it as a table
"""
