"""The score model: a trunk, a masked mean, a linear layer, a sigmoid; higher score means keep.

    h_i = (1 / n_i) sum_{t real} trunk(x_i)_t        s_i = sigmoid(w' h_i + b)

BLISS, arXiv 2510.06048, section 3. After ``import bilect`` a saved score model loads with
``transformers.AutoModel.from_pretrained``.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from bilect.models.own_memory import own_memory

__all__ = ["ScoreModel", "ScoreModelConfig", "ScoreOutput"]


class ScoreModelConfig(PreTrainedConfig):
    """Configuration of ``ScoreModel``.

    Args:
        trunk: config of the trunk, as a dict with ``model_type``.
        head: "sigmoid" (the paper) bounds the scores to (0, 1), and so the ratio of two softmax weights by e;
            "linear" leaves them free.
    """

    model_type = "bilect_score"

    def __init__(
        self, trunk: dict[str, Any] | None = None, head: Literal["sigmoid", "linear"] = "sigmoid", **more: Any
    ) -> None:
        self.trunk = trunk
        self.head = head
        super().__init__(**more)

    @classmethod
    def on(
        cls, model: PreTrainedModel, head: Literal["sigmoid", "linear"] = "sigmoid", layers: int | None = None
    ) -> "ScoreModelConfig":
        """With the trunk of a causal LM, or its first blocks; see ``ScoreModel.from_causal_lm``."""
        trunk = copy.deepcopy(getattr(model, model.base_model_prefix).config)
        text_config = trunk.get_text_config()
        if layers is not None and layers < text_config.num_hidden_layers:
            text_config.num_hidden_layers = layers
            if getattr(text_config, "layer_types", None):  # models whose blocks differ
                text_config.layer_types = text_config.layer_types[:layers]
        left_out = ("architectures", "transformers_version")
        return cls(trunk={k: v for k, v in trunk.to_dict().items() if k not in left_out}, head=head)


@dataclass
class ScoreOutput(ModelOutput):
    """``scores``: (B,)."""

    scores: Tensor | None = None


class ScoreModel(PreTrainedModel):
    """Scores documents; see the module for the equation."""

    config_class = ScoreModelConfig
    base_model_prefix = "score_model"
    _supports_sdpa = True
    _supports_flash_attn = True
    supports_gradient_checkpointing = True

    def __init__(self, config: ScoreModelConfig) -> None:
        super().__init__(config)
        if not config.trunk:
            raise ValueError("ScoreModelConfig needs the config of a trunk")
        trunk_config = AutoConfig.for_model(**config.trunk)
        self.trunk = AutoModel.from_config(trunk_config)
        self.linear = nn.Linear(trunk_config.get_text_config().hidden_size, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is getattr(self, "linear", None):
            nn.init.normal_(self.linear.weight, std=0.02)
            nn.init.zeros_(self.linear.bias)

    @classmethod
    def from_pretrained(cls, *args: Any, **settings: Any) -> Any:
        """As in transformers, with the weights in memory of their own: it scores what the saved model scored."""
        loaded = super().from_pretrained(*args, **settings)
        own_memory(loaded[0] if isinstance(loaded, tuple) else loaded)  # with output_loading_info, a report is second
        return loaded

    @classmethod
    def from_causal_lm(
        cls,
        model: PreTrainedModel,
        generator: torch.Generator,
        head: Literal["sigmoid", "linear"] = "sigmoid",
        layers: int | None = None,
    ) -> "ScoreModel":
        """A score model whose trunk starts from ``model``'s (the warmed-up proxy); the linear layer is drawn anew.

        Args:
            model: a causal LM.
            generator: for the linear layer.
            head: see ``ScoreModelConfig``.
            layers: how many of the trunk's blocks are kept, the first ones; None: all.
        """
        score_model = cls(ScoreModelConfig.on(model, head, layers))
        state = getattr(model, model.base_model_prefix).state_dict()
        score_model.trunk.load_state_dict({name: state[name].clone() for name in score_model.trunk.state_dict()})
        with torch.no_grad():
            score_model.linear.weight.normal_(std=0.02, generator=generator)
            score_model.linear.bias.zero_()
        return score_model.to(model.device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        *,
        right_padded: bool = False,
    ) -> ScoreOutput:
        """Scores of a batch.

        Args:
            input_ids: (B, T), padded on either side.
            attention_mask: (B, T), 1 at real tokens; None where all are real.
            return_dict: accepted for the Hugging Face interface; the output is always a ``ScoreOutput``.
            right_padded: promised by the caller, else looked at, for which a GPU is waited for.
        """
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        # where it is not padded on the right, the trunk must know
        if not (right_padded or bool((mask_BT[:, :-1] >= mask_BT[:, 1:]).all())):
            inputs["attention_mask"] = mask_BT
            inputs["position_ids"] = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
        hidden_BTD = self.trunk(**inputs).last_hidden_state
        weight_BT = mask_BT.to(torch.promote_types(hidden_BTD.dtype, torch.float32))
        total_BD = torch.einsum("btd,bt->bd", hidden_BTD.to(weight_BT.dtype), weight_BT)
        mean_BD = total_BD / weight_BT.sum(dim=1, keepdim=True).clamp(min=1)
        with torch.autocast(mean_BD.device.type, enabled=False):
            score_B = self.linear(mean_BD.to(self.linear.weight.dtype))[:, 0]
        score_B = torch.sigmoid(score_B) if self.config.head == "sigmoid" else score_B
        return ScoreOutput(scores=score_B)


AutoConfig.register(ScoreModelConfig.model_type, ScoreModelConfig)
AutoModel.register(ScoreModelConfig, ScoreModel)
