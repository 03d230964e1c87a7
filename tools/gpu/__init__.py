"""What tools/gpu_day.py is made of. record, engine and phases run in the process that watches, on Python's standard
library alone; the rest runs in the processes that it starts (worker.py), beside torch."""
