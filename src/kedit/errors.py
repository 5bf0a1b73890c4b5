"""Exceptions and warnings of kedit: sentences that say what was found, what was expected and what to do next."""

from __future__ import annotations


class KEditError(Exception):
    """Base of every error that kedit raises on purpose; the model is untouched when it arrives."""


class EditError(KEditError, ValueError):
    """An edit request is malformed or does not fit the model."""


class ContextLengthError(EditError):
    """A prompt with its context and target is longer than the model's context window."""


class TokenizerError(KEditError, TypeError):
    """The tokenizer cannot say where its tokens lie in the text, or is otherwise unusable."""


class ArchitectureError(KEditError, TypeError):
    """The model's architecture is unknown or lacks what the method needs."""


class UnsupportedError(ArchitectureError):
    """The method has no sound form for this architecture, or not for how this model is stored."""


class ConfigError(KEditError, ValueError):
    """A hyper-parameter is out of range or does not fit the model."""


class UnknownNameError(KEditError, LookupError):
    """No editor, regularizer or metric has this name."""


class NonFiniteError(KEditError, ArithmeticError):
    """A loss, value or update is NaN or infinite."""


class SingularMomentError(KEditError, ArithmeticError):
    """A second moment is not positive definite, so the closed form has no solution."""


class CaptureError(KEditError, RuntimeError):
    """Attention rows cannot be captured as asked."""


class ProcessError(KEditError, RuntimeError):
    """The processes that share a job cannot work together: one is gone, or cannot be reached."""


class PatchError(KEditError, ValueError):
    """A patch file is damaged, foreign or malformed."""


class PatchMismatchError(PatchError):
    """A patch was made for weights other than the ones it is applied to."""


class DependencyError(KEditError, ImportError):
    """An optional package is needed and not installed."""


class KEditWarning(UserWarning):
    """Something a user should know that does not stop the work."""


class IneffectiveEditWarning(KEditWarning):
    """The edited model does not say what an edit asked for."""
