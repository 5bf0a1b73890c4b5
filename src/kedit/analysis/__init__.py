"""Analyses of edits inside the model: causal tracing, attention drift, patching, and pages that show them.

The functions themselves are :func:`kedit.trace`, :func:`kedit.drift`,
:func:`kedit.analysis.activation_patching.patch_activations` and :func:`kedit.report.overview.reveal`.
"""
