"""TransNormerLM: a language model of linear attention layers alone, as a transformers model.

Qin et al., "TransNormerLLM" (arXiv 2307.14995), as released: embedding times the square root of its width, blocks of
lightning attention and SGLU, LRPE in the first, a decay a head and layer, SimpleRMSNorm.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from longctx.cache.cache import CACHE_NAME
from longctx.linear import (
    LRPE,
    LightningAttention,
    LightningState,
    SimpleRMSNorm,
    TransNormerBlock,
    transnormer_code_log_decay,
)
from longctx.models.lightning_cache import LightningCache

# Calls of up to so many tokens on a cache update its states in place; from 32 on whole chunks are faster (measured).
MAX_DECODE_TOKENS = 16
# What other models take and this one has no use for; anything but None would be ignored.
UNSUPPORTED = ("position_ids", "token_type_ids", "output_attentions", "cu_seq_lens_q", "cu_seq_lens_k")


class TransNormerConfig(PreTrainedConfig):
    """Configuration of a `TransNormerLM`.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers: as in other models.
        num_attention_heads: each with a decay of its own, `transnormer_code_log_decay`.
        num_key_value_heads: divides them; None is as many.
        head_dim: None is `hidden_size // num_attention_heads`.
        use_lrpe: positions in the first layer by `LRPE`; without it the decays alone tell near from far.
        scale_embeddings: by `sqrt(hidden_size)`, as in the released code.
        use_bias: in all projections.
        rms_norm_eps: of all norms.
        initializer_range: standard deviation of initial weights.
        use_cache: return a `LightningCache` unless told otherwise, outside training.
        tie_word_embeddings: the head is the embedding.
    """

    model_type = "longctx_transnormer"
    keys_to_ignore_at_inference = (CACHE_NAME,)

    def __init__(
        self,
        vocab_size: int = 64000,
        hidden_size: int = 1024,
        intermediate_size: int = 2816,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        use_lrpe: bool = True,
        scale_embeddings: bool = True,
        use_bias: bool = False,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **options: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.use_lrpe = use_lrpe
        self.scale_embeddings = scale_embeddings
        self.use_bias = use_bias
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**options)


class TransNormerPreTrainedModel(PreTrainedModel):
    """What the model with and without head share."""

    config: TransNormerConfig
    config_class = TransNormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = {"TransNormerBlock"}  # noqa: RUF012
    _keep_in_fp32_modules_strict = {"theta", "log_decay"}  # noqa: RUF012  (rounded, they are other angles and decays)
    _is_stateful = True  # `generate` then refuses to crop the cache


class TransNormerModel(TransNormerPreTrainedModel):
    """Hidden states of tokens: embedding, blocks, norm."""

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_scale = math.sqrt(config.hidden_size) if config.scale_embeddings else 1.0
        self.layers = nn.ModuleList(
            TransNormerBlock(
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                _log_decay(config, layer_idx),
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                use_lrpe=config.use_lrpe and layer_idx == 0,
                bias=config.use_bias,
                eps=config.rms_norm_eps,
            )
            for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = SimpleRMSNorm(config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: LightningCache | None = None,
        cache: LightningCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """One piece of a batch of sequences, from the start or after the tokens of `cache`.

        Args:
            input_ids: `[batch, seqlen]`, or `inputs_embeds [batch, seqlen, hidden_size]`, not yet scaled.
            attention_mask: `[batch, seqlen]`, or with the columns of earlier pieces before them; zeros are padding,
                on any side, and as if they were not there.
            past_key_values, cache: two names of the same, a `LightningCache`, which is changed.
            use_cache: make one where none is given.
            output_hidden_states: the input of every block, and the normed output of the last.
        """
        for name in UNSUPPORTED:
            if options.get(name) is not None and options[name] is not False:
                raise NotImplementedError(f"longctx: TransNormerModel does not take `{name}`; got {options[name]!r}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("longctx: TransNormerModel takes either `input_ids` or `inputs_embeds`")
        if inputs_embeds is None:
            inputs_embeds = cast(Tensor, self.embed_tokens(input_ids))
        cache = _checked_cache(cache if past_key_values is None else past_key_values)
        if cache is None and (self.config.use_cache and not self.training if use_cache is None else use_cache):
            cache = LightningCache()
        x = inputs_embeds * self.embed_scale
        mask = _padding_of(x, attention_mask)

        inputs = []
        states: list[LightningState] = []
        for layer_idx, block in enumerate(self.layers):
            inputs.append(x)
            state = cache.states[layer_idx] if cache is not None and cache.states else None
            x, state = self._run(block, x, state, mask)
            states.append(state)
        x = self.norm(x)
        if cache is not None:
            cache.advance(states, x.shape[1])

        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = (*inputs, x) if wanted else None
        after: dict[str, Any] = {CACHE_NAME: cache}
        output = BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden_states, **after)
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LRPE):
            init.copy_(module.theta, module.initial_theta())
        elif isinstance(module, LightningAttention):
            layer_idx = [block.attention for block in self.layers].index(module)
            init.copy_(module.log_decay, _log_decay(self.config, layer_idx))

    def _run(
        self, block: nn.Module, x: Tensor, state: LightningState | None, mask: Tensor | None
    ) -> tuple[Tensor, LightningState]:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(block.__call__, x, state, attention_mask=mask)  # type: ignore
        if state is not None and x.shape[1] <= MAX_DECODE_TOKENS and not torch.is_grad_enabled():
            return block.decode(x, state, attention_mask=mask), state  # type: ignore
        return block(x, state, attention_mask=mask)  # type: ignore


class TransNormerLM(TransNormerPreTrainedModel, GenerationMixin):
    """A causal language model that trains in linear time and generates at constant cost a token.

    Everything a transformers model does: `labels` give a loss, `generate` (greedy, sampling, beams, chunked prefill,
    padded batches), `save_pretrained`, `from_pretrained`, `AutoModelForCausalLM` once `longctx.models` is imported.
    Refused: assisted decoding (a state cannot be rolled back), static caches, position ids.

    Example:
        >>> import torch
        >>> from longctx.models import TransNormerConfig, TransNormerLM
        >>> config = TransNormerConfig(
        ...     vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> model = TransNormerLM(config).eval()
        >>> prompt = torch.randint(100, (2, 500))
        >>> model.generate(prompt, max_new_tokens=5, do_sample=False).shape
        torch.Size([2, 505])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.model = TransNormerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: LightningCache | None = None,
        cache: LightningCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As `TransNormerModel`; `labels [batch, seqlen]` are shifted inside, -100 does not count.

        `logits_to_keep`: so many last positions, or these; 0 is all.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            past_key_values,
            cache,
            use_cache,
            output_hidden_states,
            return_dict=True,
            **options,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **options)
        after: dict[str, Any] = {CACHE_NAME: getattr(outputs, CACHE_NAME)}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **after)
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **options: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise NotImplementedError(
                "longctx: a TransNormerLM has a cache of its own, of constant size; `cache_implementation` must be "
                f"None; got {generation_config.cache_implementation!r}"
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **options)  # type: ignore[misc]
        if generation_config.use_cache and model_kwargs.get(CACHE_NAME) is None:
            model_kwargs[CACHE_NAME] = LightningCache()


def _log_decay(config: TransNormerConfig, layer_idx: int) -> Tensor:
    return transnormer_code_log_decay(config.num_attention_heads, layer_idx, config.num_hidden_layers)


def _checked_cache(cache: object) -> LightningCache | None:
    if cache is not None and not isinstance(cache, LightningCache):
        raise ValueError(f"longctx: the cache of a TransNormerModel is a LightningCache; got {type(cache).__name__}")
    return cache


def _padding_of(x: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Bool `[batch, seqlen]` of this piece, False at padding; None where there is none."""
    if attention_mask is None:
        return None
    batch, seqlen = x.shape[:2]
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < seqlen:
        raise ValueError(
            "longctx: `attention_mask` must have shape [batch, seqlen or more] = "
            f"[{batch}, {seqlen} or more]; got {list(attention_mask.shape)}"
        )
    mask = attention_mask[:, attention_mask.shape[1] - seqlen :].bool()
    return None if bool(mask.all()) else mask


def _wants_dict(config: TransNormerConfig, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)
