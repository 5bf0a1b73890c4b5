"""Figures and pages about edits and evaluations."""
