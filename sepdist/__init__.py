"""sepdist: distributed training of monaural speech separation from object storage."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sepdist.inference.separator import Separation, Separator, load

__all__ = ["Separation", "Separator", "__version__", "load"]
__version__ = "0.1.0"

if not TYPE_CHECKING:  # or a type checker would accept any attribute

    def __getattr__(name: str) -> Any:
        """Import torch, which takes seconds, only when something of the API is used."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from sepdist.inference import separator

        return getattr(separator, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
