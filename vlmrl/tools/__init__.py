"""Tools that a policy may call before it answers, one file per tool."""
