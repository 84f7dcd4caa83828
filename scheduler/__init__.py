"""Decides what runs. One pure function, `scheduler.step.step(state, inputs, limits) -> (state, plan)`.

No JAX, no clock, no log, no I/O: the same code is the production scheduler, the simulator and the replay
tool.
"""
