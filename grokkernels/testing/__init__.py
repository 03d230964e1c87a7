"""The judge: case tables, the float64 rule, fences. Used by the tests, the benchmarks and `grokkernels verify`."""
