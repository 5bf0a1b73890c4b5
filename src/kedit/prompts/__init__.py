"""Edits as tokens: templates, contexts and encoded prompts."""
