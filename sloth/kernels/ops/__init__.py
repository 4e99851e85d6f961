"""One op per file: formula, reference, torch engine, Triton engine, Function, public op."""
