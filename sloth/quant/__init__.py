"""NF4: quantizing, the 4-bit projection, and bitsandbytes' file form."""
