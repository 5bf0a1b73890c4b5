"""Results of the analysis functions: numbers, summaries and JSON."""
