"""Names of the stages, for those who do not load the rest."""

STAGES = ("layers", "clamp", "moment_weight", "threshold", "l2", "gamma")
"""What is searched, in this order: blocks, the bound of the value, λ of MEMIT and PMET, AlphaEdit's null space and λ, γ."""
