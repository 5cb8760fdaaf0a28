"""Attaching transformer-specific dropout to transformers and peft models, and detaching it without a trace."""

from .handle import Handle, attach
from .report import Report, ReportRow
from .stock import live_dropouts
from .two_pass import LossOutput

__all__ = ["Handle", "LossOutput", "Report", "ReportRow", "attach", "live_dropouts"]
