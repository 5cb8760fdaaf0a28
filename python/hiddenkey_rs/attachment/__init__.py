"""Attaching transformer-specific dropout to transformers and peft models, and detaching it without a trace."""

from .handle import Handle, attach, detach
from .passes import DrawnMask
from .report import Report, ReportRow
from .stock import live_dropouts
from .two_pass import LossOutput

__all__ = ["DrawnMask", "Handle", "LossOutput", "Report", "ReportRow", "attach", "detach", "live_dropouts"]
