"""A model as remote code writes it: an ``MoEGate`` that returns (ids, weights, loss) and a ModuleList of experts.

Copied into a checkpoint folder as its modeling file; nothing here knows of dbes.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class MockMoeConfig(PretrainedConfig):
    model_type = "mock_remote_moe"

    def __init__(self, n_routed_experts=8, num_experts_per_tok=2, hidden_size=32, num_hidden_layers=3, vocab_size=128, **kwargs):
        self.n_routed_experts = n_routed_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.vocab_size = vocab_size
        self.max_position_embeddings = 128
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


class MoEGate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.randn(config.n_routed_experts, config.hidden_size) * 0.3)

    def forward(self, hidden_states):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores = functional.linear(flat, self.weight).softmax(dim=-1)
        topk_weight, topk_idx = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        return topk_idx, topk_weight, None


class Expert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 16, bias=False)
        self.down = nn.Linear(16, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.down(functional.silu(self.up(hidden_states)))


class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = MoEGate(config)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.n_routed_experts))

    def forward(self, hidden_states):
        ids, weights, _ = self.gate(hidden_states)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == number)
            if len(tokens):
                output.index_add_(0, tokens, expert(flat[tokens]) * weights[tokens, slots, None])
        return output.reshape(hidden_states.shape)


class Layer(nn.Module):
    def __init__(self, config, dense):
        super().__init__()
        self.mix = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mlp = Expert(config) if dense else MoE(config)

    def forward(self, hidden_states):
        past = hidden_states.cumsum(dim=1) / torch.arange(1, hidden_states.shape[1] + 1)[None, :, None]
        hidden_states = hidden_states + self.mix(past)
        return hidden_states + self.mlp(hidden_states)


class MockMoePreTrainedModel(PreTrainedModel):
    config_class = MockMoeConfig
    base_model_prefix = "model"

    def _init_weights(self, module):
        pass


class MockMoeModel(MockMoePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, dense=index == 0) for index in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids=None, **_):
        hidden_states = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states)


class MockMoeForCausalLM(MockMoePreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = MockMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden_states = self.model(input_ids, attention_mask, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden_states))
