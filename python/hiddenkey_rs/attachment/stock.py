"""The model's own dropout: finding it, switching it off, and giving it back."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..errors import ConfigError

STOCK_DROPOUT = ("keep", "off")


def live_dropouts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, float]]:
    """Every dropout rate above 0 that the model applies in training: (module name, module, attribute, rate).

    Besides ``nn.Dropout`` these are the plain numbers that attention and decoder layers hand to functional dropout.
    An adapter's own (peft's ``lora_dropout``) is not the model's: it is left out.
    """
    of_adapters = {id(module) for module in adapter_dropouts(model)}
    for name, module in model.named_modules():
        if id(module) in of_adapters:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if module.p > 0:
                yield name, module, "p", module.p
            continue
        for attribute, value in vars(module).items():
            if "drop" in attribute and isinstance(value, float) and value > 0:
                yield name, module, attribute, value


def adapter_dropouts(model: nn.Module) -> Iterator[nn.Module]:
    """The dropout modules of adapters: peft keeps them, one an adapter, under ``lora_dropout``, ``vera_dropout`` and the like."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleDict) and name.endswith("_dropout"):
            yield from module.modules()


def adapters_draw(model: nn.Module) -> bool:
    """Whether an adapter of the model drops its inputs (``lora_dropout``), its ranks or all of itself (LoHa, LoKr)."""
    if any(getattr(module, "p", 0) > 0 for module in adapter_dropouts(model)):
        return True
    rates = (vars(module).get(name) for module in model.modules() for name in ("rank_dropout", "module_dropout"))
    return any(rate > 0 for by_adapter in rates if isinstance(by_adapter, dict) for rate in by_adapter.values())


class StockDropout:
    """Switches the model's own dropout off (``mode="off"``) and back on at :meth:`restore`."""

    def __init__(self, model: nn.Module, mode: str) -> None:
        if mode not in STOCK_DROPOUT:
            raise ConfigError(f"unknown stock_dropout (got {mode!r}); use one of {', '.join(STOCK_DROPOUT)}")
        self.found = list(live_dropouts(model))
        self.off = mode == "off"
        if self.off:
            for _, module, attribute, _ in self.found:
                setattr(module, attribute, 0.0)

    @property
    def live(self) -> int:
        """How many of the model's own dropouts act in training."""
        return 0 if self.off else len(self.found)

    def restore(self) -> None:
        """Give every dropout the rate that it had."""
        if self.off:
            for _, module, attribute, value in self.found:
                setattr(module, attribute, value)
