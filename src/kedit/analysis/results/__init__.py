"""Results of the analysis functions: figures, summaries and JSON."""
