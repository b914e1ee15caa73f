"""OneStepGenerator: images of seeds and labels, whatever the batch; what it refuses."""

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from edm_reference import SIZE, SMALL, fill
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gdd_fast
from benchmarks.counts import exactness
from benchmarks.counts.exactness import TEACHER, compare
from gdd_fast.backend import has_extension
from gdd_fast.device import gpu_arithmetic
from gdd_fast.engine import one_step as one_step_module
from gdd_fast.engine.fold import make_target
from gdd_fast.engine.one_step import OneStepGenerator
from gdd_fast.errors import BackendError, ConfigError, InputError, WeightsError
from gdd_fast.models.files.save import save_network
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.ops import small_maps, winograd_conv2d
from gdd_fast.ops.group_norm_silu import OPERATOR
from gdd_fast.ops.to_uint8 import to_uint8
from gdd_fast.sampling.generate import generate
from gdd_fast.sampling.sampler import one_step
from gdd_fast.sampling.seeds import latents
from rehearsal import forbid_waiting

ROOT = Path(__file__).resolve().parents[2]
TINY = {"model_type": "SongUNet", "model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": []}


def tiny(label_dim: int = 0) -> GDDPrecond:
    return fill(GDDPrecond(8, 3, label_dim, **TINY)).requires_grad_(False)


@pytest.fixture(scope="module")
def conditional() -> OneStepGenerator:
    return OneStepGenerator.from_network(tiny(5))


def saved_by_torch(generator):
    """By pickle's protocol 2."""
    file = io.BytesIO()
    torch.save(generator, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g)), saved_by_torch])
def test_copies_and_pickles_draw_the_same_bits(again, dtype) -> None:
    generator = OneStepGenerator.from_network(tiny(5), dtype=dtype)
    with torch.no_grad():
        for parameter in generator.network.parameters():
            parameter.mul_(0.5)  # which the generator does not follow, and so its copies must not either
    twin = again(generator)
    draw = lambda g: g(2, [1, 2], seeds=range(2), output="float")
    assert torch.equal(draw(twin), draw(generator))
    assert twin.run is not generator.run and twin.dtype is generator.dtype
    soft = torch.full((2, 5), 0.2)
    assert torch.equal(twin.run(torch.ones(2, 3, 8, 8), soft), generator.run(torch.ones(2, 3, 8, 8), soft))


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_an_engine_that_follows_the_process_asks_it_for_tf32(monkeypatch, precision) -> None:
    asked = []

    def spy(*args, **options):
        asked.append(options["tf32"])
        return make_target(*args, **options)

    monkeypatch.setattr(one_step_module, "make_target", spy)
    with gpu_arithmetic(precision):
        OneStepGenerator.from_network(tiny(), engine="eager")
    assert asked == [precision == "tf32"]


def draw_elsewhere(generator: OneStepGenerator, queue) -> None:
    queue.put(generator(2, 1, seeds=range(2)).numpy())


@pytest.mark.slow
def test_a_spawned_process_can_have_one(conditional) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=draw_elsewhere, args=(conditional, queue))
    process.start()
    assert np.array_equal(queue.get(timeout=120), conditional(2, 1, seeds=range(2)).numpy())
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.slow
def test_a_process_that_has_only_the_file_can_have_one(conditional, tmp_path) -> None:
    """A spawned one imports this module, and with it what loads the extension."""
    torch.save(conditional, tmp_path / "generator.pt")
    program = "import sys, torch; g = torch.load(sys.argv[1], weights_only=False); "
    program += "torch.save(g(2, 1, seeds=range(2)), sys.argv[2])"
    files = [tmp_path / "generator.pt", tmp_path / "images.pt"]
    subprocess.run([sys.executable, "-c", program, *files], check=True, timeout=120, cwd=ROOT)
    assert torch.equal(torch.load(files[1]), conditional(2, 1, seeds=range(2)))


def test_one_whose_operators_are_not_here_says_so(conditional) -> None:
    state = conditional.__getstate__()
    there = OneStepGenerator.__new__(OneStepGenerator)
    with pytest.raises(BackendError, match=r"group_norm_silu: backend 'cuda' cannot run here"):
        there.__setstate__({**state, "_chosen": {OPERATOR: "cuda"}})


class OursCalled(TorchDispatchMode):
    """The extension's operators that are called, by the beginning of their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "gdd_fast_C":
            known = (operator.name for operator in (OPERATOR, winograd_conv2d.OPERATOR))
            self.names.add(next((start for start in known if name.startswith(start)), small_maps.OPERATOR.name))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_whoever_takes_a_pickle_up_is_asked_for_each_kernel_that_it_runs(backend) -> None:
    generator = OneStepGenerator.from_network(fill(GDDPrecond(SIZE, 3, **SMALL["ncsnpp"])), backend=backend)
    with OursCalled() as called:
        generator(2, seeds=range(2))
    asked_for = {operator.name for operator, runs in generator.__getstate__()["_chosen"].items() if runs == "cpp"}
    assert called.names == asked_for
    assert bool(asked_for) == (backend == "auto" and has_extension())


def levels(a: torch.Tensor, b: torch.Tensor) -> int:
    return (a.int() - b.int()).abs().max().item()


def test_images_are_those_of_the_network(tmp_path) -> None:
    net = fill(GDDPrecond(SIZE, 3, **SMALL["ncsnpp"])).requires_grad_(False)
    save_network(net, tmp_path)
    generator = gdd_fast.OneStepGenerator.from_pretrained(tmp_path, device="cpu")
    want = one_step(net, latents(range(4), (3, SIZE, SIZE))[0])
    floats = generator(4, seeds=range(4), output="float")
    torch.testing.assert_close(floats.permute(0, 3, 1, 2), want, rtol=1e-4, atol=1e-4)
    images = generator(4, seeds=range(4))
    assert (images.dtype, images.shape) == (torch.uint8, (4, SIZE, SIZE, 3))
    assert levels(images, to_uint8(want)) <= 1
    assert (generator.img_resolution, generator.img_channels, generator.label_dim) == (SIZE, 3, 0)
    assert (generator.device.type, generator.dtype, generator.engine) == ("cpu", torch.float32, "eager")


def test_an_image_depends_on_its_seed_alone(conditional) -> None:
    together = conditional(6, seeds=[3, 1, 4, 1 << 31, 5, 9])
    for batch in ([3], [1, 4], [9, 5, 1 << 31]):
        parts = conditional(len(batch), seeds=batch)
        where = [[3, 1, 4, 1 << 31, 5, 9].index(seed) for seed in batch]
        assert levels(parts, together[where]) <= 1
    assert levels(together[:1], together[1:2]) > 10


def test_labels_in_every_form(conditional) -> None:
    z = {"seeds": range(4)}
    drawn = latents(range(4), (3, 8, 8), 5)[1].argmax(1)
    images = conditional(4, **z)
    one_hot = torch.nn.functional.one_hot(drawn, 5).float()
    for labels in (drawn, drawn.tolist(), drawn.int(), one_hot, one_hot.double()):
        assert levels(conditional(4, labels, **z), images) <= 1
    twos = conditional(4, 2, **z)
    assert levels(twos, conditional(4, [2] * 4, **z)) == 0
    assert levels(twos[drawn != 2], images[drawn != 2]) > 1


def test_one_generator_for_a_batch(conditional) -> None:
    def images(seed: int) -> torch.Tensor:
        return conditional(4, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(images(1), images(1))
    assert levels(images(1), images(2)) > 10
    torch.manual_seed(0)
    first = conditional(2)
    assert not torch.equal(first, conditional(2))
    torch.manual_seed(0)
    assert torch.equal(first, conditional(2))


def test_latents_of_the_callers(conditional) -> None:
    z, classes = conditional.draw(3, [0, 1, 2])
    assert torch.equal(conditional(3, classes, latents=z), conditional(3, seeds=range(3)))
    for wrong in ({"n": 2, "labels": 1}, {"n": 3}, {"n": 3, "labels": 1, "seeds": range(3)}):
        with pytest.raises(InputError, match="instead of seeds"):
            conditional(**wrong, latents=z)


def test_none_at_all(conditional) -> None:
    assert conditional(0).shape == (0, 8, 8, 3)
    assert conditional(0, seeds=[], output="float").shape == (0, 8, 8, 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compute_types(dtype: str) -> None:
    net = tiny()
    half, full = (OneStepGenerator.from_network(net, dtype=d)(4, seeds=range(4)) for d in (dtype, None))
    assert 0 < levels(half, full) < 40
    assert net.dtype == torch.float32


def test_results_are_the_callers(conditional) -> None:
    z, _ = conditional.draw(2, [0, 1])
    first = conditional.run(z, [0, 1])
    kept = first.clone()
    conditional.run(z, [3, 4])
    assert torch.equal(first, kept)
    assert not first.requires_grad
    with torch.inference_mode():
        assert levels(conditional(2, seeds=[0, 1]), conditional(2, seeds=[0, 1])) == 0


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1), ("bfloat16", 2)])
def test_the_bundled_teacher_in_levels(dtype: str, most: int) -> None:
    generator = OneStepGenerator.from_pretrained(TEACHER, device="cpu", dtype=dtype)
    found = compare(generator, images=48, batch=24)
    assert found["engine, plain"].values == 48 * 16 * 16
    assert 0 < found["engine, float32"].largest <= most or dtype == "float32"
    assert found["engine, plain"].largest <= most


@pytest.mark.parametrize(("levels_off", "exact"), [(0, True), (4, False)])
def test_the_command_fails_beyond_its_limits(monkeypatch, capsys, levels_off: int, exact: bool) -> None:
    run = OneStepGenerator.run
    monkeypatch.setattr(OneStepGenerator, "run", lambda self, *inputs: run(self, *inputs) + levels_off / 127.5)
    arguments = ["--images", "4", "--batch", "4", "--device", "cpu"]
    if exact:
        exactness.main(arguments)
    else:
        with pytest.raises(SystemExit) as end:
            exactness.main(arguments)
        assert end.value.code == 1
    (*_, verdict) = capsys.readouterr().out.splitlines()
    assert verdict.startswith("exact: " if exact else "NOT exact: ")
    assert "teacher float32" in verdict and "of at most 2 levels" in verdict


@pytest.mark.slow
def test_compiled() -> None:
    net = fill(GDDPrecond(SIZE, 3, **SMALL["adm_cond"])).requires_grad_(False)
    torch._dynamo.reset()
    compiled = OneStepGenerator.from_network(net, engine="compile")
    eager = OneStepGenerator.from_network(net)
    for n in (1, 3):
        assert levels(compiled(n, seeds=range(n)), eager(n, seeds=range(n))) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "n must"),
        ((2.0,), "n must"),
        ((2, 5), "0 to 4"),
        ((2, [0]), "labels must"),
        ((2, torch.zeros(2, 4)), "labels must"),
        ((2, torch.zeros(2)), "labels must"),
        ((2, None, [1]), "2 images need 2 seeds"),
    ],
)
def test_arguments_that_do_not_fit(conditional, arguments, message) -> None:
    with pytest.raises(InputError, match=message):
        conditional(*arguments)


def test_other_mistakes(conditional, tmp_path) -> None:
    with pytest.raises(InputError, match="output"):
        conditional(1, output="png")
    with pytest.raises(InputError, match="not both"):
        conditional(1, seeds=[0], generator=torch.Generator())
    with pytest.raises(InputError, match="latents"):
        conditional.run(torch.zeros(1, 3, 4, 4))
    with pytest.raises(InputError, match="no classes"):
        OneStepGenerator.from_network(tiny())(1, 0)
    with pytest.raises(WeightsError, match="does not exist"):
        OneStepGenerator.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="device"):
        OneStepGenerator.from_network(tiny(), device="abacus")
    with pytest.raises(ConfigError, match="dtype"):
        OneStepGenerator.from_network(tiny(), dtype="int8")
    with pytest.raises(ConfigError, match="engine"):
        OneStepGenerator.from_network(tiny(), engine="warp")
    with pytest.raises(BackendError, match="graph"):
        OneStepGenerator.from_network(tiny(), engine="graph", device="cpu")
    broken = tiny()
    broken.model.map_layer0.weight.fill_(float("nan"))
    with pytest.raises(WeightsError, match="NaN"):
        OneStepGenerator.from_network(broken)(1, seeds=[0])


def test_autocast_is_without_effect() -> None:
    want = OneStepGenerator.from_network(tiny(5))(2, 3, seeds=[0, 1], output="float")
    with torch.autocast("cpu", torch.bfloat16):
        generator = OneStepGenerator.from_network(tiny(5))
        assert torch.equal(generator(2, 3, seeds=[0, 1], output="float"), want)
        soft = torch.eye(5)[[3, 3]]
        torch.testing.assert_close(generator(2, soft, seeds=[0, 1], output="float"), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"n": True},
        {"n": 2.0},
        {"n": "2"},
        {"seeds": 5},
        {"seeds": "ab"},
        {"seeds": [1.7, 2]},
        {"seeds": [True, False]},
        {"labels": "cat"},
        {"labels": ["cat", "dog"]},
        {"labels": [1, None]},
        {"labels": [[1], [2, 3]]},
        {"labels": [1 << 70, 0]},
        {"labels": True},
        {"labels": 1.5},
        {"labels": torch.zeros(2, dtype=torch.complex64)},
    ],
)
def test_what_is_no_number_is_refused_in_a_sentence(conditional, arguments) -> None:
    with pytest.raises(InputError, match="must be"):
        conditional(**{"n": 2, **arguments})


def test_numpys_numbers_are_numbers(conditional) -> None:
    want = conditional(2, 3, [0, 1])
    assert torch.equal(conditional(np.int64(2), np.int64(3), np.arange(2)), want)
    assert torch.equal(conditional(2, np.array([3, 3]), torch.arange(2)), want)
    assert torch.equal(conditional(2, torch.tensor([3, 3]), [0, 1]), want)


def test_other_networks_and_devices_are_refused() -> None:
    with pytest.raises(InputError, match="accelerate"):
        OneStepGenerator.from_network(torch.nn.Conv2d(3, 3, 3))
    for device in ("mps", "meta", "gpu", 1.5):
        with pytest.raises(ConfigError, match="device"):
            OneStepGenerator.from_network(tiny(), device=device)


def test_classes_of_its_own_are_not_looked_at(conditional, monkeypatch) -> None:
    """Looking waits for the GPU, and a batch could not be computed ahead."""
    want = conditional(2, seeds=[0, 1])
    checked = []
    original = OneStepGenerator._labels
    monkeypatch.setattr(
        OneStepGenerator,
        "_labels",
        lambda self, labels, n, check: checked.append(check) or original(self, labels, n, check),
    )
    assert torch.equal(conditional(2, seeds=[0, 1]), want)
    list(generate(conditional, [0, 1], class_index=2))
    conditional(2, 3)
    assert checked == [False, False, True]


def test_without_seeds_latents_and_classes_are_drawn_where_the_network_is(conditional, monkeypatch) -> None:
    monkeypatch.setattr(conditional, "device", torch.device("cuda", 0))
    with FakeTensorMode(), forbid_waiting():
        drawn = conditional.draw(3)
    assert [t.device.type for t in drawn] == ["cuda", "cuda"]


class Waits(TorchDispatchMode):
    """Counts the questions for a value that a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("output", ["uint8", "float"])
def test_a_call_waits_once(conditional, output: str) -> None:
    """For the answer whether all values are finite."""
    with Waits() as waits:
        conditional(2, output=output)
    assert len(waits.asked) == 1
