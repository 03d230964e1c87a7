"""Training and text generation on top of the library: what `grokkernels train` and `grokkernels generate` run."""
