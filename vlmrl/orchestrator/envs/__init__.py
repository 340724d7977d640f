"""Where the envs of a run live: in threads of the run (threads.py), or in worker processes (processes.py).

RolloutRunner ─▶ Envs.new(problem) ─▶ EnvHandle: reset, step, …, end      of any kind (base.py)
"""
