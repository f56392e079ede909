"""The benchmark: what a flanneld costs and how long it takes, on a real kernel with a real etcd.

``make bench`` or ``python -m tests.bench``; ``--help`` tells the rest. One host of a lab gets a daemon and a
store full of *hollow* leases, written in the form their owners would write, without hosts behind them. The
daemon is watched from outside only: files, kernel notifications, packets, ``/proc``. Its log is never asked,
so any flanneld can be put beside ours. Nothing is asserted about time: figures are printed, people judge.

``metrics`` names what is measured and the figures to beat; ``stage`` is one measured host; ``cases`` are the
measurements; ``report`` and ``plot`` show them.
"""
