"""Patches applied to and reverted from checkpoint folders on disk."""
