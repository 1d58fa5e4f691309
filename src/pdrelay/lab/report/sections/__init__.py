"""The report's sections, each drawn from the summary alone."""
