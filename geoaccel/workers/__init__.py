"""Work on many machines: Ray actors that keep slow-to-load objects, and results in the order of the tasks.

    with Workers(Team(address="auto"), load) as workers:
        for done in workers.in_order((name, (work, images)) for name, images in scenes):
            result = done.get()  # of work(load(), images)

`Here` does the same in this process. Inputs are sent with each task, and results are sent back: only files that a task
reads itself have to be on all machines.
"""

from __future__ import annotations

from geoaccel.workers.actor import reason_to_go_on
from geoaccel.workers.cluster import ENGINES, Team, check_engine, connect, device_for, machines
from geoaccel.workers.pool import Done, Here, Task, Workers

__all__ = [
    "ENGINES",
    "Done",
    "Here",
    "Task",
    "Team",
    "Workers",
    "check_engine",
    "connect",
    "device_for",
    "machines",
    "reason_to_go_on",
]
