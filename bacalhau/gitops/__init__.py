"""Watched directories, as far as they touch the world: reading them at one moment, noticing
changes, and running a source next to its directory. What is decided lies in
`bacalhau_controllers.gitops`."""
