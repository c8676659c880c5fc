"""Counts of parameters, whole and trainable, are those of the models, adapters among them; so are the ranks' shares."""

from dataclasses import replace

import pytest
import torch

from harness.plan.parameters import by_group, parameters, shapes
from harness.plan.step import Step
from optimized import DeepseekV32ForCausalLM
from optimized.distributed.layout import ParallelLayout
from reference import DeepseekV32Config
from reference.training import add_lora, lora_parts, set_trainable, trainable_report

STAGES = ("model", "indexer", "all")


def model_of(config):
    with torch.device("meta"):
        return DeepseekV32ForCausalLM(config)


def report(model):
    return {count.group: (count.parameters, count.trainable) for count in trainable_report(model)}


@pytest.mark.parametrize("preset", ["tiny", "bench", "medium"])
def test_names_and_shapes_are_the_models(preset):
    config = DeepseekV32Config.preset(preset)
    assert [(name, shape) for name, shape, _ in shapes(config)] == [
        (name, tuple(p.shape)) for name, p in model_of(config).named_parameters()
    ]


@pytest.mark.parametrize("trains", STAGES)
def test_what_trains_of_the_671_billion_is_what_the_report_of_the_model_says(trains):
    config = DeepseekV32Config.preset("v32")
    model = model_of(config)
    set_trainable(model, trains)
    counts = by_group(parameters(config, trains))
    assert counts == report(model)
    assert counts["indexer"][0] == 851_524_864


@pytest.mark.parametrize("trains", STAGES)
def test_adapters_are_counted_as_peft_makes_them(trains):
    config, parts = DeepseekV32Config.preset("tiny"), lora_parts(trains)
    with torch.device("cpu"):
        adapted = add_lora(DeepseekV32ForCausalLM(config), parts, rank=3)
    assert by_group(parameters(config, trains, parts, 3)) == report(adapted)


@pytest.mark.parametrize("layout", [ParallelLayout(dp=4), ParallelLayout(cp=2, ep=2), ParallelLayout(ep=2, tp=2)])
def test_the_shards_of_all_ranks_are_the_whole_model(layout):
    config = DeepseekV32Config.preset("tiny")
    step = Step(config, 64, 1, True, "all", layout=layout)
    copies = {p.name: layout.tp if not (p.is_expert or p.is_cut) else 1 for p in step.parameters}
    for p in step.parameters:
        assert step.shard(p) * layout.world == p.count * copies[p.name], p.name
    alone = replace(step, layout=ParallelLayout())
    assert sum(map(alone.shard, alone.parameters)) == sum(p.numel() for p in model_of(config).parameters())
