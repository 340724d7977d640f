"""Environments of others as tasks: `task=gymnasium`."""
