"""Attention rows of a running model, differentiable, beside its own fast attention."""

from kedit.capture.attention_capture import AttentionCapture as AttentionCapture
from kedit.capture.attention_rule import Rule as Rule
from kedit.capture.context import capture_attention as capture_attention
from kedit.capture.context import substitute_attention as substitute_attention
from kedit.capture.divergence import row_divergence as row_divergence
from kedit.capture.divergence import row_kl as row_kl
from kedit.capture.functional import attention_rows as attention_rows
from kedit.capture.functional import sdpa_with_rows as sdpa_with_rows
from kedit.capture.install import use_capture_attention as use_capture_attention
from kedit.capture.record import AttentionRecord as AttentionRecord
from kedit.capture.record import record_attention as record_attention
from kedit.capture.reference import reference_rows as reference_rows
