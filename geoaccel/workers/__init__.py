"""Work on many machines: Ray actors that keep what takes long to load, and results in the order of the work.

    with Workers(Team(address="auto"), load) as workers:
        for done in workers.in_order((name, (work, images)) for name, images in scenes):
            result = done.get()  # of work(load(), images)

`Here` does the same in this process. Workers get what they are to do with the work itself, and what they find comes
back with the result: only files that the work reads by its own have to be on all machines.
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
