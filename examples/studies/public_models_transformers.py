"""Builds tiny models of every type that transformers knows; nothing is downloaded.

The script shrinks the configuration of a type by the names of its fields. If the model refuses the
result, the script tries these configurations in turn:

1. Wider heads.
2. Fewer layers, words and experts; nothing else is changed.
3. The default configuration.

It uses the first configuration that has few enough parameters, and runs with inputs that its signature
suggests.
"""

import copy
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers
from public_models_subject import Subject, Unmeasured, finish
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from vision import import_torchvision  # isort: skip

# Models of transformers import torchvision themselves.
import_torchvision()

TOKENS, WORDS, WIDTH, LAYERS = 64, 512, 128, 2

#: Pattern of a field's name -> its new value, used if the default is larger. The first match counts.
FEWER = (
    (r"num_feat_extract_layers", 99),
    (r"num_kv_shared_layers|num_nextn_predict_layers", 0),
    (r"first_k_dense_replace", 1),
    (r"(\w+_)?layers?|depth", LAYERS),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|(\w+_)?top_?k(_experts)?|moe_k", 2),
    (r"topk_group|n_group", 1),
    (r"vocab_size(_\w+)?|\w+_vocab_size|n_words", WORDS),
)
SMALLER = (
    *FEWER,
    (r"mamba_\w*heads", 8),
    (r"index_topk", 16),
    (r"multi_query_kv", 1),
    (r"(num_|n_)?(key_value|kv)_heads|linear_num_key_heads", 2),
    (r"(\w+_)?(n_|num_)?heads?", 4),
    (r"qk_(nope|rope)_head_dim|v_head_dim|(linear|index)_\w*head_dim|state_size|mamba_d_state", 16),
    (r"head_dim|d_kv|global_head_dim|qk_head_dim|mamba_\w*(head_dim|d_head)|(\w+_)?lora_rank", 32),
    (r"moe_intermediate_size|shared_expert_intermediate_size|projection_dim|output_dim|\w*window", 64),
    (r"hidden_size|d_model|n_embd|dim|emb_dim|embed_dim|embedding_size|hidden_dim|lru_width", WIDTH),
    (r"(encoder|decoder|attention|out|text)_hidden_size|word_embed_proj_dim", WIDTH),
    (r"intermediate_size|(\w+_)?ffn_dim|d_ff|n_inner|mlp_dim|(\w+_)?dim_feedforward", 2 * WIDTH),
    (r"max_position_embeddings|n_positions|n_ctx", 8 * TOKENS),
    (r"max_source_positions", 128),
    (r"max_target_positions", 256),
    (r"hidden_size_per_layer_input|rotary_dim", 16),
    (r"(mamba_)?dt_rank|time_step_rank|num_query_tokens", 8),
    (r"(mamba_)?chunk_size", 32),
    (r"num_queries", 20),
)

#: Heads of 128 elements, for rotations in sections of a fixed width.
WIDER = tuple((rule, {32: 128, WIDTH: 512, 2 * WIDTH: 1024}.get(n, n)) for rule, n in SMALLER)

#: Fields with one entry per layer. The first entry of each kind is kept.
PER_LAYER = re.compile(r"(mlp_)?layer_types|layers_block_type|block_types|\w*layer_pattern")
#: Fields with the number of layers of each stage.
PER_STAGE = re.compile(r"depths?|layers|num_layers|stage_num_blocks|\w+_depths")


def names() -> list[str]:
    """Returns every model type that has a base class."""
    transformers.logging.set_verbosity_error()
    return list(MODEL_MAPPING_NAMES)


# Configurations


def is_int(value: Any) -> bool:
    """Whether a value is an integer, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def few_kinds(values: list[Any]) -> list[Any]:
    """Returns one value of each kind: at least two values, at most four."""
    kinds = list(dict.fromkeys(values))
    return (kinds + values)[:min(max(LAYERS, len(kinds)), 4)]


def shrunk(fields: dict[str, Any], rules: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    """Returns the fields of a configuration that change, with their new values."""
    changes: dict[str, Any] = {}
    tokens = itertools.count(3)
    small = rules is SMALLER or rules is WIDER
    for name, value in fields.items():
        if isinstance(value, dict):
            if value and name.startswith("per_layer") and all(str(key).isdigit() for key in value):
                changes[name] = {}  # remove the exceptions of single layers
            elif name.endswith("_config"):
                changes[name] = value | shrunk(value, rules)
            elif rules is SMALLER and "mrope_section" in value:
                whole = sum(value["mrope_section"])
                changes[name] = value | {
                    "mrope_section": sections([16 * part / whole for part in value["mrope_section"]])}
        elif isinstance(value, list) and value:
            if PER_LAYER.fullmatch(name) and isinstance(value[0], str | int):
                changes[name] = few_kinds(value)
            elif name == "attention_types":
                changes[name] = [[kinds, 1] for kinds, _ in value]
            elif PER_STAGE.fullmatch(name) and all(map(is_int, value)):
                changes[name] = [min(number, LAYERS) for number in value]
        elif is_int(value):
            if re.search(r"token(_id|_index)?$", name) and not name.startswith("num"):
                changes |= {name: next(tokens)} if value >= WORDS else {}
            elif small and name in ("image_size", "pretrain_image_size") and value > 64:
                patch = fields.get("patch_size")
                patch = patch if is_int(patch) else 16
                changes[name] = max(4 * patch, 64 // patch * patch)
            else:
                most = next((n for rule, n in rules if re.fullmatch(rule, name)), value)
                changes |= {name: most} if most < value else {}
    return consistent(fields, changes)


def sections(parts: list[float]) -> list[int]:
    """Rounds numbers to integers and keeps their sum."""
    whole = [int(part) for part in parts]
    return [*whole[:-1], whole[-1] + round(sum(parts)) - sum(whole)]


def consistent(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Repairs settings that involve several fields: number of layers, heads that must be alike."""
    counts = ("num_hidden_layers", "num_layers")
    layers = next((len(v) for name, v in changes.items() if PER_LAYER.fullmatch(name)), LAYERS)
    if "depths" in fields:  # here layers are the number of stages, which stays
        other = (*counts, "hidden_size")
        changes = {name: value for name, value in changes.items() if name not in other}
    else:
        changes |= {name: layers for name in counts if name in changes}
        changes |= {
            name: value[:layers] for name, value in fields.items()
            if isinstance(value, list) and name not in changes and len(value) in map(fields.get, counts)}
    if "num_key_value_heads" in changes and (
            fields["num_key_value_heads"] == fields.get("num_attention_heads")):
        changes["num_key_value_heads"] = changes.get("num_attention_heads", 2)
    if "state_size" in fields:
        changes |= {n: v for n, v in (("num_heads", 8), ("head_dim", 32)) if n in changes}
    if "prediction_length" in fields:
        changes["prediction_length"] = 8
    if fields.get("use_cache"):
        changes["use_cache"] = False
    return changes


# Inputs


def setting(config: Any, *wanted: str, default: int) -> int:
    """Returns the first integer found under one of some names, in a configuration or one inside it."""
    inside = [c for c in vars(config).values() if isinstance(c, transformers.PreTrainedConfig)]
    for place in (config, *inside):
        for name in wanted:
            value = getattr(place, name, None)
            value = value[0] if isinstance(value, list | tuple) and value else value
            if is_int(value):
                return value
    return default


class Inputs:
    """Tensors for the arguments of a forward pass, with several shapes for some arguments."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.generator = torch.Generator().manual_seed(0)
        self.width = setting(config, "hidden_size", "d_model", "dim", default=WIDTH)
        positions = setting(config, "max_position_embeddings", "n_positions", default=8 * TOKENS)
        self.tokens = min(TOKENS, positions - 2)
        self.times = setting(config, "num_time_features", default=0)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def ids(self, length: int) -> Tensor:
        words = setting(self.config, "vocab_size", default=WORDS)
        low = 100 if words > 200 else 3
        return torch.randint(low, max(words, low + 1), (2, length), generator=self.generator)

    def images(self) -> list[Tensor]:
        """Returns images, clips, and the flat patches that models of any resolution take."""
        channels = setting(self.config, "num_channels", "in_channels", "in_chans", default=3)
        size = getattr(self.config, "image_size", None)
        if not isinstance(size, list | tuple) or len(size) != 2:
            size = [setting(self.config, "image_size", default=64)] * 2
        frames = setting(self.config, "num_frames", "frames_per_clip", default=4)
        flat = channels * setting(self.config, "patch_size", default=14) ** 2
        times = setting(self.config, "temporal_patch_size", default=2)
        return [
            self.floats(2, channels, *size), self.floats(1, frames, channels, *size),
            self.floats(2, channels, 64, 64), self.floats(64, flat * times), self.floats(64, flat),
            self.floats(1, channels, 224, 224), self.floats(1, channels, 384, 384)]

    def spectra(self) -> list[Tensor]:
        """Returns spectrograms, time last and time first."""
        bands = setting(
            self.config, "num_mel_bins", "feature_size", "input_dim", "input_feat_per_channel",
            default=80)
        long = 2 * setting(self.config, "max_source_positions", default=128)
        shapes = [(2, bands, long), (2, long, bands), (2, 1, 1024, bands), (2, bands, 1024)]
        return [self.floats(*shape) for shape in shapes]

    def sounds(self) -> list[Tensor]:
        """Returns waveforms, and the spectrograms that some models take under the same name."""
        bands = setting(self.config, "num_mel_bins", default=80)
        long = setting(self.config, "max_length", default=1024)
        shapes = [(2, 8000), (2, 1, 8000), (2, long, bands)]
        return [self.floats(*shape) for shape in shapes]

    def series(self, *shape: int) -> list[Tensor]:
        """Returns time series, including the past values that lags need."""
        long = setting(self.config, "context_length", default=32)
        lags = getattr(self.config, "lags_sequence", None) or [0]
        channels = setting(self.config, "num_input_channels", "input_size", default=1)
        return [self.floats(4, long, channels), self.floats(4, long + max(lags), *shape)]

    def choices(self, name: str) -> list[Any]:
        """Returns candidates for an argument, the likeliest first."""
        if name in ("pixel_values", "pixel_values_images"):
            return self.images()
        if name.startswith("pixel_values_"):
            return self.images()[1:2]
        table = {
            "input_ids": lambda: [self.ids(self.tokens)],
            "decoder_input_ids": lambda: [self.ids(self.tokens // 2)],
            "attention_mask": lambda: [torch.ones(2, self.tokens, dtype=torch.long)],
            "input_features": self.spectra, "input_values": self.sounds, "past_values": self.series,
            "past_time_features": lambda: self.series(self.times)[1:],
            "past_observed_mask": lambda: [torch.ones_like(self.series()[1])],
            "future_values": lambda: [self.floats(4, 8)],
            "future_time_features": lambda: [self.floats(4, 8, self.times)],
            "inputs_embeds": lambda: [self.floats(2, self.tokens, self.width)],
            "hidden_states": lambda: [
                *self.images()[3:5], self.floats(64, self.width),
                self.floats(2, self.tokens, self.width)],
            "inputs": lambda: [self.floats(2, self.tokens, self.width), self.ids(self.tokens)],
            "bbox": lambda: [torch.tensor([0, 0, 50, 50]).repeat(2, self.tokens, 1)],
            "visual_feats": lambda: [
                self.floats(2, 10, setting(self.config, "visual_feat_dim", default=2048))],
            "visual_pos": lambda: [self.floats(2, 10, 4).abs()],
            "spectrogram": lambda: [
                self.floats(2, 64, setting(self.config, "model_in_dim", default=80))],
            "grid_thw": lambda: [torch.tensor([[1, 8, 8]])],
            "image_grid_thw": lambda: [torch.tensor([[1, 8, 8]])],
        }
        return table[name]() if name in table else []


def candidates(config: Any, model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yields inputs to try: first all arguments that go together, then fewer and fewer."""
    arguments = inspect.signature(model.forward).parameters
    required = [
        name for name, argument in arguments.items()
        if argument.default is argument.empty
        and argument.kind is argument.POSITIONAL_OR_KEYWORD]
    main = getattr(model, "main_input_name", "input_ids")
    decoder = ["decoder_input_ids"] * ("decoder_input_ids" in arguments)
    media = ["pixel_values", "input_features", "input_values"]
    sets = [
        [main, "input_ids", *media, *required, *decoder, "future_values", "future_time_features"],
        [main, "input_ids", *media, *required, *decoder],
        [main, *required, *decoder], [main, *required], ["input_ids", *required, *decoder],
        *([name, *decoder] for name in media), ["pixel_values", "bbox", "input_ids"],
        ["inputs_embeds", *required, *decoder]]
    inputs = Inputs(config)
    seen = set()
    for group in sets:
        chosen = [name for name in dict.fromkeys(group) if name in arguments]
        if not chosen or tuple(chosen) in seen:
            continue
        seen.add(tuple(chosen))
        for values in itertools.product(*map(inputs.choices, chosen)):
            yield dict(zip(chosen, values))


def lm_names() -> list[str]:
    """Returns every model type that has a causal language model."""
    return [name for name in names() if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def from_config(config: Any, kind: Any = transformers.AutoModel, **options: Any) -> nn.Module:
    """Builds a model from a copy of the configuration, since models may change it."""
    return kind.from_config(copy.deepcopy(config), **options)


def with_labels(
        inputs: Callable[[Any, nn.Module], Iterator[dict[str, Any]]], config: Any,
        model: nn.Module) -> Iterator[dict[str, Any]]:
    """Adds the tokens as labels, so that the model computes its loss."""
    for arguments in inputs(config, model):
        if "input_ids" in arguments:
            yield {**arguments, "labels": arguments["input_ids"]}


def build_lm(name: str, most_parameters: int, std: float) -> Subject:
    """Builds a causal language model of one type, with its loss."""
    make = functools.partial(from_config, kind=transformers.AutoModelForCausalLM)
    return build(name, most_parameters, std, make, functools.partial(with_labels, candidates))


def build_eager(name: str, most_parameters: int, std: float) -> Subject:
    """Builds a model of one type whose attention is written out."""
    make = functools.partial(from_config, attn_implementation="eager")
    return build(name, most_parameters, std, make)


def build_bfloat16(name: str, most_parameters: int, std: float) -> Subject:
    """Builds a language model with its loss that runs under autocast to bfloat16."""
    return replace(build_lm(name, most_parameters, std), autocast=True)


def build(
        name: str, most_parameters: int, std: float, make: Callable[..., nn.Module] = from_config,
        inputs: Callable[[Any, nn.Module], Iterator[dict[str, Any]]] = candidates) -> Subject:
    """Builds a model of one type with random weights.

    Args:
        name: the type.
        most_parameters: size of the largest model to build.
        std: see ``finish``.
        make: makes the model from a configuration.
        inputs: (configuration, model) -> inputs to try.

    Raises:
        Unmeasured: no configuration gives a model that is small enough and accepts some inputs.
    """
    config_class = CONFIG_MAPPING[name]
    fields = config_class().to_dict()
    status, reasons = "too large", []
    for changes in (*(shrunk(fields, rules) for rules in (SMALLER, WIDER, FEWER)), {}):
        try:
            config = config_class(**copy.deepcopy(changes))  # the class modifies nested values
            return finish(
                functools.partial(make, config), functools.partial(inputs, config),
                most_parameters, std)
        except Unmeasured as reason:
            status = reason.status if reason.status != "too large" else status
            reasons.append(reason.detail)
        except Exception as error:
            status = "not built"
            reasons.append(f"{type(error).__name__}: {error}"[:150])
    raise Unmeasured(status, " || ".join(reasons))
