"""What runs workloads: one module or package per engine, and the log files that all of them write.

Nothing is imported here, because the fork server of the wasm engine lives below this package and
has to stay small.
"""
