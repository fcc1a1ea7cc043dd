"""`docker run` and `wasm run`: from flags to a job, and from a job to its end."""
