"""What all converted models have, of transformers and of diffusers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headwise.hf.conversion import Conversion
from headwise.hf.reading import StrictlyLoaded
from headwise.ops import HeadRouting, Routing, balance_loss, router_z_loss


class Converted(StrictlyLoaded):
    """Mixed into the class of a converted model: what was converted, its loss, strict loading."""

    config: Any

    @property
    def conversion(self) -> Conversion:
        """What `headwise.convert` made of this model."""
        return Conversion.from_dict(self.config.headwise)

    @property
    def original_class(self) -> Any:
        """The class that the model had before."""
        # Sharding puts a class of its own before the model's.
        kinds = type(self).__mro__
        return next(k.__bases__[1] for k in kinds if issubclass(k.__bases__[0], Converted))

    def routing_loss(self, routings: Mapping[str, Routing]) -> Tensor:
        """The balance losses (and z-losses) of a forward, weighted as configured.

        Averaged over the layers of a kind: over attentions, and over mixtures of experts.

        Args:
            routings: What `headwise.record_routing` saw in a forward.
        """
        conversion: Any = self.conversion
        mlp = conversion.mlp
        heads, experts = [], []
        for routing in routings.values():
            if isinstance(routing, HeadRouting):
                heads.append(conversion.attention.balance_coefficient * balance_loss(routing))
            else:
                z_loss = mlp.z_loss_coefficient * router_z_loss(routing)
                balance = balance_loss(routing, form=mlp.balance_form, scope=mlp.balance_scope)
                experts.append(mlp.balance_coefficient * balance + z_loss)
        kinds = [torch.stack(losses).mean() for losses in (heads, experts) if losses]
        return torch.stack(kinds).sum()
