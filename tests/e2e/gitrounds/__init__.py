"""Random work on directories that are watched, as people work: `python -m tests.e2e.gitrounds`.

Two real git repositories (one bare, that is pushed to and read by an orchestrator; one work tree,
read as files by `gitops run`), real processes, and a seed. `desk` is a person at a work tree,
`fleet` the processes, `truth` what a directory says, read by a few lines of their own; `verdict` holds
against it what is stored and what the history tells; `campaign` plays it all.
"""
