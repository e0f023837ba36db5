"""A model as remote code writes it: a ModuleList of experts that the block loops over, with gates of many kinds (``BLOCKS``).

Copied into a checkpoint folder as its modeling file; nothing here knows of dbes.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class MockMoeConfig(PretrainedConfig):
    model_type = "mock_remote_moe"

    def __init__(
        self, n_routed_experts=8, num_experts_per_tok=2, hidden_size=32, num_hidden_layers=3, vocab_size=128, block="gate", **kwargs
    ):
        self.n_routed_experts = n_routed_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.vocab_size = vocab_size
        self.block = block
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
    """DeepSeek-V2: ids and weights come from the gate."""

    def __init__(self, config):
        super().__init__()
        self.top_k, self.count = config.num_experts_per_tok, config.n_routed_experts
        self.gate = self.make_gate(config)
        self.experts = self.make_experts(config)

    def make_gate(self, config):
        return MoEGate(config)

    def make_experts(self, config):
        return nn.ModuleList(Expert(config) for _ in range(config.n_routed_experts))

    def forward(self, hidden_states):
        ids, weights, _ = self.gate(hidden_states)
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == number)
            if len(tokens):
                output.index_add_(0, tokens, expert(flat[tokens]) * weights[tokens, slots, None])
        return output.reshape(hidden_states.shape)


class Sorted(MoE):
    """DeepSeek's ``moe_infer``: tokens sorted by expert, outputs put back and weighted at the end."""

    def forward(self, hidden_states):
        ids, weights, _ = self.gate(hidden_states)
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        counts = ids.new_zeros((len(ids), self.count)).scatter_(1, ids, 1).sum(dim=0)
        order = ids.view(-1).argsort()
        rows, outputs, start = flat[order // ids.shape[1]], [], 0
        for number, length in enumerate(counts.tolist()):
            if length:
                outputs.append(self.experts[number](rows[start : start + length]))
            start += length
        sorted_outputs = torch.cat(outputs)
        back = torch.empty_like(sorted_outputs)
        back[order] = sorted_outputs
        return (back.view(*ids.shape, -1) * weights[..., None]).sum(dim=1).view(hidden_states.shape)


class Mixtral(MoE):
    """The block that Mixtral had: a linear gate, softmax, top-k, weights divided in place; rows in the order of slots."""

    def make_gate(self, config):
        gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        nn.init.normal_(gate.weight, std=0.3)
        return gate

    def choose(self, logits):
        weights, ids = torch.topk(functional.softmax(logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        return ids, weights

    def score(self, hidden_states):
        return self.gate(hidden_states)

    def experts_of(self, ids):
        return functional.one_hot(ids, num_classes=self.count).permute(2, 1, 0)

    def expert(self, number):
        return self.experts[number]

    def forward(self, hidden_states):
        shape = hidden_states.shape
        hidden_states = hidden_states.view(-1, shape[-1])
        ids, weights = self.choose(self.score(hidden_states))
        weights = weights.to(hidden_states.dtype)
        output, mask = torch.zeros_like(hidden_states), self.experts_of(ids)
        for number in range(self.count):
            slots, tokens = torch.where(mask[number])
            given = hidden_states[None, tokens].reshape(-1, shape[-1])
            output.index_add_(0, tokens, self.expert(number)(given) * weights[tokens, slots, None])
        return output.reshape(shape), None


class SharedExpert(Mixtral):
    """Qwen2-MoE: a shared expert behind a sigmoid, and weights that do not add up to 1."""

    def __init__(self, config):
        super().__init__(config)
        self.shared_expert = Expert(config)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def choose(self, logits):
        weights, ids = torch.topk(logits.softmax(dim=-1), self.top_k, dim=-1)
        return ids, weights

    def forward(self, hidden_states):
        output, _ = super().forward(hidden_states)
        return output + torch.sigmoid(self.shared_expert_gate(hidden_states)) * self.shared_expert(hidden_states), None


class Sigmoid(Mixtral):
    """A sigmoid score, chosen with a bias, weighted without it; scores scaled in place after the choice."""

    def choose(self, logits):
        scores = logits.sigmoid()
        ids = (scores + torch.linspace(-0.2, 0.2, self.count, device=scores.device)).topk(self.top_k, dim=-1)[1]
        weights = scores.gather(1, ids)
        return ids, weights.div_(weights.sum(dim=-1, keepdim=True)).mul_(2.5)


class LogitsFirst(Mixtral):
    """Mistral's reference code: top-k of the logits, then a softmax over those."""

    def choose(self, logits):
        weights, ids = torch.topk(logits, self.top_k)
        return ids, functional.softmax(weights, dim=1, dtype=torch.float)


class Noisy(Mixtral):
    """A gate with noise, also outside training."""

    def choose(self, logits):
        return super().choose(logits + torch.randn_like(logits))


class Combined(Mixtral):
    """A matrix of gates [tokens, experts] that is zero where an expert is not chosen."""

    def choose(self, logits):
        scores = logits.softmax(dim=-1)
        ids = scores.topk(self.top_k, dim=-1)[1]
        gates = scores * torch.zeros_like(scores).scatter_(1, ids, 1.0)
        self.gates = gates / gates.sum(dim=-1, keepdim=True)
        return ids, self.gates.gather(1, ids)


class Ordered(Mixtral):
    """Chosen by sorting."""

    def choose(self, logits):
        values, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        return order[:, : self.top_k], values[:, : self.top_k]


class Dictionary(Mixtral):
    """NLLB: a ModuleDict of experts."""

    def make_experts(self, config):
        return nn.ModuleDict({f"expert_{number}": Expert(config) for number in range(config.n_routed_experts)})

    def expert(self, number):
        return self.experts[f"expert_{number}"]


class Functional(Mixtral):
    """A gate whose weights are used without calling it."""

    def score(self, hidden_states):
        return functional.linear(hidden_states, self.gate.weight)


class Switch(Mixtral):
    """Switch Transformer: one expert, by its maximum."""

    def choose(self, logits):
        weights, ids = torch.max(logits.softmax(dim=-1), dim=-1)
        return ids[:, None], weights[:, None]


class Argmax(Switch):
    def choose(self, logits):
        scores = logits.softmax(dim=-1)
        ids = scores.argmax(dim=-1)
        return ids[:, None], scores.gather(1, ids[:, None])


class Dense(Mixtral):
    """Every expert sees every token."""

    def forward(self, hidden_states):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids, weights = self.choose(self.gate(flat))
        gates = torch.zeros(len(flat), self.count).scatter_(1, ids, weights)
        output = sum(gates[:, number, None] * self.expert(number)(flat) for number in range(self.count))
        return output.reshape(hidden_states.shape)


class Capacity(Mixtral):
    """Tokens beyond an expert's capacity are dropped."""

    def experts_of(self, ids):
        mask = super().experts_of(ids)
        return mask * (mask.flatten(1).cumsum(dim=1).view(mask.shape) <= 3)


class Hidden(Mixtral):
    """Weights that are made while the experts run, and were not seen before."""

    def expert(self, number):
        expert = self.experts[number]
        return lambda rows: expert(rows) * (rows.square().sum(dim=-1, keepdim=True).sqrt() + number)


class Remapped(Mixtral):
    """Experts other than those chosen: the choice is turned by one place."""

    def expert(self, number):
        return self.experts[(number + 1) % self.count]


class InPlace(Mixtral):
    """Works in place on everything after the choice; the experts get what was chosen all the same."""

    spoil = True

    def choose(self, logits):
        scores = logits.softmax(dim=-1)
        weights, ids = scores.topk(self.top_k, dim=-1)
        kept, chosen = weights.clone(), ids.clone()
        if self.spoil:
            logits.zero_()
            scores.mul_(-3).add_(1)
            ids.clamp_(0, 0)
        return chosen, kept

    def forward(self, hidden_states):
        given = hidden_states.clone()
        output, _ = super().forward(given)
        if self.spoil:
            given.add_(1)
        return output


class Fused(nn.Module):
    """Experts in one module, which works in place on its arguments at the end."""

    def __init__(self, experts):
        super().__init__()
        self.num_experts = len(experts)
        self.inner = experts
        self.spoil = False

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self.inner):
            tokens, slots = torch.where(top_k_index == number)
            output.index_add_(0, tokens, expert(hidden_states[tokens]) * top_k_weights[tokens, slots, None])
        if self.spoil:
            hidden_states.add_(1)
            top_k_index.clamp_(0, 0)
            top_k_weights.mul_(5)
        return output


class InPlaceFused(InPlace):
    def make_experts(self, config):
        return Fused(super().make_experts(config))

    def forward(self, hidden_states):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1]).clone()
        ids, weights = self.choose(self.score(flat))
        self.experts.spoil = self.spoil
        return self.experts(flat, ids, weights).reshape(hidden_states.shape)


class Einsum(nn.Module):
    """Experts in one tensor, run by einsum."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.matrices = nn.Parameter(torch.randn(config.n_routed_experts, config.hidden_size, config.hidden_size) * 0.1)

    def forward(self, hidden_states):
        values, ids = self.gate(hidden_states).softmax(dim=-1).topk(self.top_k, dim=-1)
        return torch.einsum("bth,btkhi,btk->bti", hidden_states, self.matrices[ids], values)


READ = {
    "gate": MoE,
    "sorted": Sorted,
    "mixtral": Mixtral,
    "shared": SharedExpert,
    "sigmoid": Sigmoid,
    "logits first": LogitsFirst,
    "noisy": Noisy,
    "combined": Combined,
    "ordered": Ordered,
    "dictionary": Dictionary,
    "functional": Functional,
    "switch": Switch,
    "argmax": Argmax,
    "in place": InPlace,
}
REFUSED = {"dense": Dense, "capacity": Capacity, "hidden": Hidden, "remapped": Remapped, "einsum": Einsum}
BLOCKS = READ | REFUSED | {"in place, fused": InPlaceFused}


class Layer(nn.Module):
    def __init__(self, config, dense):
        super().__init__()
        self.mix = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.mlp = Expert(config) if dense else BLOCKS[config.block](config)

    def forward(self, hidden_states):
        past = hidden_states.cumsum(dim=1) / torch.arange(1, hidden_states.shape[1] + 1, device=hidden_states.device)[None, :, None]
        hidden_states = hidden_states + self.mix(past)
        output = self.mlp(hidden_states)
        return hidden_states + (output[0] if isinstance(output, tuple) else output)


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
        hidden_states = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden_states))
