"""The models: blocks written for one group, bound to a mesh by a `sharding.Layout`."""

from foejax.models.language_model import Batch, LanguageModel, RoutingTrace
from foejax.models.router import Routing, SelectionBias, route

__all__ = ["Batch", "LanguageModel", "Routing", "RoutingTrace", "SelectionBias", "route"]
