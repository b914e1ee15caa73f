"""The forecast of memory is what autograd keeps in the steps that a run takes."""

from types import SimpleNamespace

import pytest
import torch
from tiny_run import ALONE, tiny_config, tiny_task, write_inputs

from gdd_fast.config import override
from gdd_fast.distill import components, memory_forecast
from gdd_fast.distill.memory_forecast import GB, Forecast, Kept, automatic, of_components, own_storages, saved_bytes
from gdd_fast.errors import ConfigError
from gdd_fast.layers.spectral_conv import SpectralConv2d
from gdd_fast.training.captured_steps import WARM_UP, CapturedSteps
from gdd_fast.training.random_state import RandomState
from gdd_fast.training.trial import Trial


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_forecast_is_what_the_steps_keep(inputs, monkeypatch, precision):
    """Of 6 images, which the forecast has not run, on real tensors and in the run's own methods, with a GPU's norms."""
    monkeypatch.setattr(SpectralConv2d, "divide_result", False)
    precisions = {"g_precision": precision, "d_precision": precision}
    config = tiny_config(inputs, batch=6, r1_gamma=0.1, **precisions)
    found = of_components(config, components.build(config))
    task = tiny_task(config, ALONE)
    own = own_storages(task.generator, task.features, task.r1_features, task.heads)
    real = torch.rand(6, 1, 16, 16) * 2 - 1
    steps = {
        "G": lambda: task._generator_step(None),
        "D": lambda: task._discriminator_step(real, None),
        "R1": lambda: task._r1_step(real, None),
    }
    assert found.steps.keys() == steps.keys()
    for name, step in steps.items():
        assert found.steps[name].bytes(6) == pytest.approx(saved_bytes(step, own), rel=0.02), name


def test_fixed_bytes_are_counted_from_the_parameters(inputs):
    config = tiny_config(inputs)
    found, task = of_components(config, components.build(config)), tiny_task(config, ALONE)
    task.generator_step(None)
    task.discriminator_step(torch.rand(4, 1, 16, 16), None)
    moments = [
        t
        for guard in (task.g_guard, task.d_guard)
        for state in guard.optimizer.state.values()
        for t in (state["exp_avg"], state["exp_avg_sq"])
    ]
    assert found.fixed["optimizers"] == sum(t.numel() * t.itemsize for t in moments)
    assert found.fixed["data set"] == 24 * 16 * 16
    assert of_components(override(config, data_memory_gib=0.0), components.build(config)).fixed["data set"] == 0


def test_fsdp_divides_what_belongs_to_the_generator(inputs, monkeypatch):
    config = tiny_config(inputs)
    whole = of_components(config, components.build(config)).fixed
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    part = of_components(override(config, fsdp=True), components.build(config)).fixed
    net = "generator and its moving average"
    assert part[net] == whole[net] // 2 and part["backbones, projections and heads"] > 0
    trained = sum(4 * p.numel() for p in components.build(config).generator.parameters() if p.requires_grad)
    assert whole["gradients"] - part["gradients"] == trained // 2
    assert 0 < part["its blocks that --fsdp gathers"] < 3 * whole[net]


class Pool:
    """A recorder that counts: graphs share the memory of the largest step, eager steps take theirs beside it."""

    warm_up = WARM_UP

    def __init__(self):
        self.held = self.most = 0

    def eagerly(self, step, inputs):
        self.most = max(self.most, self.held + step.size)
        return {}

    def record(self, step, inputs):
        self.held = max(self.held, step.size)
        self.most = max(self.most, self.held)
        return dict


@pytest.mark.parametrize("sizes", [{"G": 1, "D": 2, "R1": 4}, {"G": 4, "D": 1, "R1": 2}, {"G": 3, "D": 2}])
def test_captured_steps_need_room_for_their_trials_beside_the_graphs(sizes):
    """As much as the loop's own recordings on trial take, in iterations of which every third has an R1 step."""
    pool = Pool()
    steps = CapturedSteps(pool, Trial(list, RandomState(0, ALONE)))
    for number in range(30):
        for name, size in sizes.items():
            if name != "R1" or number % 3 == 2:
                steps(name, SimpleNamespace(size=size))
    assert steps.recorder is pool and len(steps._recorded) == len(sizes)
    found = Forecast({"weights": GB}, {name: Kept(0, size * GB) for name, size in sizes.items()})
    assert found.captured_bytes(1) == GB + int(1.25 * pool.most * GB)


def test_largest_batch_divides_and_fits():
    found = Forecast({"weights": GB}, {"G": Kept(GB, GB // 10), "R1": Kept(0, GB // 5)})
    for card in (24, 40, 80):
        images = found.largest(card * GB, 256)
        assert 256 % images == 0 and found.bytes(images) <= card * GB < found.bytes(2 * images)
    assert found.largest(GB, 256) is None
    assert "24 GB: 64, 40 GB: 128" in found.table(256, 64)
    assert "captured" not in found.table(256, 64)
    assert "with steps captured as graphs: 24 GB: 32, 40 GB: 64" in found.table(256, 64, captured=True)


@pytest.mark.parametrize(("size", "stage"), [(1, "distillation"), (3, "learning v")])
def test_of_two_stages_the_larger_counts_and_is_named(size, stage):
    first = Forecast({"network": GB}, {"v": Kept(0, size * GB)})
    found = Forecast({"weights": GB}, {"G": Kept(0, 2 * GB)}, first)
    larger = max(size, 2)
    assert found.bytes(2) == int((1 + 2.5 * larger) * GB)
    table = found.table(8, 2)
    assert f"{1 + 2.5 * larger:.1f} GB with 2 images at once, in the stage of {stage}\n" in table
    assert all(text in table for text in ("Learning v: ", "Distillation: 6.0 GB", "kept by the v step"))
    assert found.largest(found.bytes(4), 8) == 4 and found.largest(found.bytes(4) - 1, 8) == 2


def test_a_card_too_small_for_a_stage_names_it(monkeypatch):
    monkeypatch.setattr(memory_forecast, "memory_of", lambda device: GB)
    found = Forecast({}, {"G": Kept(0, GB)}, Forecast({}, {"v": Kept(0, 2 * GB)}))
    with pytest.raises(ConfigError, match=r"5\.0 GB in the stage of learning v .* --g-precision bf16"):
        automatic(found, torch.device("cuda"), 4)


def test_auto_is_the_cards_memory_on_a_gpu_and_everything_on_a_cpu(inputs, monkeypatch, capsys):
    config = tiny_config(inputs, batch=4, batch_gpu="auto")
    config.validate()
    built = components.build(config)
    assert memory_forecast.settle(config, built, torch.device("cpu"), 2).run.batch_gpu == 2
    found = of_components(config, built)
    card = SimpleNamespace(total_memory=found.bytes(2))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    settled = memory_forecast.settle(config, built, torch.device("cuda"), 1).run
    assert (settled.batch_gpu, settled.engine) == (2, "eager")
    assert "with captured ones 2 images at once may not fit" in capsys.readouterr().err
    card.total_memory = found.captured_bytes(4)
    settled = memory_forecast.settle(config, built, torch.device("cuda"), 1).run
    assert (settled.batch_gpu, settled.engine) == (4, "auto") and capsys.readouterr().err == ""
    card.total_memory -= 1
    assert found.bytes(4) < card.total_memory, "four images at once fit without graphs"
    settled = memory_forecast.settle(config, built, torch.device("cuda"), 1).run
    assert (settled.batch_gpu, settled.engine) == (2, "auto") and capsys.readouterr().err == ""
    card.total_memory += 1
    eager = memory_forecast.settle(override(config, engine="eager"), built, torch.device("cuda"), 1).run
    assert (eager.batch_gpu, eager.engine) == (4, "eager")
    graphs = override(config, engine="graph")
    assert memory_forecast.settle(graphs, built, torch.device("cuda"), 1).run.batch_gpu == 4
    card.total_memory -= 1
    assert memory_forecast.settle(graphs, built, torch.device("cuda"), 1).run.batch_gpu == 2
    card.total_memory = found.bytes(2)
    with pytest.raises(ConfigError, match=r"two images at once need .* with captured steps: use --engine auto"):
        memory_forecast.settle(graphs, built, torch.device("cuda"), 1)
    card.total_memory = found.bytes(2) - 1
    with pytest.raises(ConfigError, match="two images at once need"):
        automatic(found, torch.device("cuda"), 4)
