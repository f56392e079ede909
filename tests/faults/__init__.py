"""Faults made on purpose, in a live cluster under traffic: what each costs, and that all is right afterwards.

``python -m tests.faults`` (``make faults``) prints the table, ``python -m tests.faults.chaos`` throws faults at random.
``registry.py`` names the faults, ``README.md`` says by which test each failure of the collection is proved.
"""
