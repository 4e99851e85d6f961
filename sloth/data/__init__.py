"""Rows, masks, examples, batches: from a file of rows to what the network is given."""
