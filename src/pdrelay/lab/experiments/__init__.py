"""The four experiments, one module each: a list of steps for one started server."""
