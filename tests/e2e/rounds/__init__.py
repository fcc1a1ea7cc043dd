"""Rounds of real trouble: real processes in network namespaces of their own, faults at random
moments from a seed, and what must be true afterwards.

`lab.py` makes the namespaces and the links between them, `fleet.py` runs the processes there,
`work.py` says what they have to do, `faults.py` what goes wrong, `checks.py` what must be true in
the end, `campaign.py` puts rounds of it in a row. Start it by `python -m tests.e2e.rounds`.
"""
