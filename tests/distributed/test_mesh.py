"""Training is the same on one device and on any mesh, and goes on from one to the other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sct.errors import ConfigError
from sct.models import registry
from sct.nn import axes
from sct.nn.adapters import KINDS
from sct.train import sharding
from sct.train.loop import TrainConfig
from sct.train.sharding import MeshConfig
from tests.train.conftest import merged
from tests.train.test_cell_objective import ALL_TERMS
from tests.train.test_masked_values import BATCHES
from tests.train.test_masked_values import CONFIG as CELLS

from .conftest import answer

ROOT = Path(__file__).resolve().parents[2]
MESHES = [
    {"data": 1}, {"data": 8}, {"fsdp": 8}, {"sequence": 8}, {"tensor": 4}, {"data": 2, "fsdp": 4},
    {"fsdp": 2, "sequence": 4}, {"sequence": 4, "tensor": 2}, {"fsdp": 2, "sequence": 2, "tensor": 2},
    {"data": 2, "sequence": 2, "tensor": 2},
]  # fmt: skip
# Splitting length and channels at once is what XLA alone gets wrong, so it is always tested.
FEW = [{"data": 1}, {"fsdp": 2, "sequence": 2, "tensor": 2}]


def ask(**request: Any) -> Any:
    return answer("mesh_steps", request)


@pytest.fixture
def small(config) -> dict[str, Any]:
    """Eight bags of eight cells, and heads and channels that two devices divide."""
    changes = {"data__cells_per_bag": 8, "train__batch_size": 8, "objective__max_masked_fraction": 0.3}
    return config(**changes, model__remat="level")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("meshes", "levels"), [(FEW, 1), pytest.param(MESHES, 3, marks=pytest.mark.slowest)], ids=["few", "all"]
)
def test_losses_and_gradients_do_not_depend_on_the_mesh(small, meshes, levels):
    small["model"]["num_downsamples"] = levels
    single, *others = ask(config=small, meshes=meshes)
    assert single["losses"][2] < single["losses"][0]
    for sizes, other in zip(meshes[1:], others, strict=True):
        np.testing.assert_allclose(other["losses"], single["losses"], rtol=1e-5, err_msg=str(sizes))
        assert single["dropped_targets"] == other["dropped_targets"] == 0
        assert other["error"] < 1e-5, f"gradient of {other['worst']} on {sizes} differs by {other['error']}"
        # Parameters and moments are really divided, but for small arrays that do not divide.
        parts = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
        for what, held in other["bytes"].items():
            share = held / single["bytes"][what]
            assert share == 1 if parts == 1 else 1 / parts <= share < 1 / parts + 0.25, (sizes, what, share)


@pytest.mark.slow
@pytest.mark.parametrize(
    "meshes",
    [[*FEW, {"data": 2, "sequence": 2}], pytest.param(MESHES, marks=pytest.mark.slowest)],
    ids=["few", "all"],
)
def test_terms_that_compare_all_cells_of_a_batch_do_not_depend_on_the_mesh(small, meshes):
    single, *others = ask(config=merged(small, model__num_downsamples=1, **ALL_TERMS), meshes=meshes)
    assert single["losses"][2] < single["losses"][0]
    for sizes, other in zip(meshes[1:], others, strict=True):
        np.testing.assert_allclose(other["losses"], single["losses"], rtol=1e-5, err_msg=str(sizes))
        assert other["error"] < 2e-5, f"gradient of {other['worst']} on {sizes} differs by {other['error']}"


@pytest.mark.slow
def test_the_cell_encoder_does_not_depend_on_the_mesh(store):
    """Also where terms of the loss compare all cells of a batch with each other, or know the batches of cells."""
    config = merged(
        CELLS, data__store=str(store), data__max_genes=23, model__dropout=0.0, model__remat="level",
        objective__ecs_weight=1.0, **BATCHES,
    )  # fmt: skip
    # Without rotary embedding, the bias of keys adds the same number to all scores of a query.
    zero = "params/layers/attention/key/bias"
    single, *others = ask(config=config, meshes=[{"data": 1}, *FEW[1:]], zero=zero)
    assert single["losses"][2] < single["losses"][0]
    for other in others:
        np.testing.assert_allclose(other["losses"], single["losses"], rtol=1e-5)
        assert other["error"] < 1e-5, f"gradient of {other['worst']} differs by {other['error']}"


@pytest.mark.slow
@pytest.mark.parametrize("meshes", [FEW, pytest.param(MESHES, marks=pytest.mark.slowest)], ids=["few", "all"])
def test_fine_tuning_does_not_depend_on_the_mesh(store, meshes):
    """All methods with adapters at once, so that the gradients of all kinds of adapters are compared."""
    config = merged(
        {"family": "scgpt", "task": "annotation"}, data__store=str(store), model=CELLS["model"], model__dropout=0.0,
        model__remat="level", objective__class_weights="balanced",
        peft={"method": "prefix+lora+gene_token+gene_encoder", "rank": 2, "length": 4, "width": 16},
    )  # fmt: skip
    parent = {"max_genes": 23, "genes": "top", "values": "quantiles", "dropped": []}
    single, *others = ask(config=config, meshes=[{"data": 1}, *meshes[1:]], noise=0.1, parent=parent)
    names = {path.split("/")[-1] for path in single["trained"] if path.startswith("adapters/")}
    assert names == {array for kind in KINDS for array in kind.trained}
    assert any(path.startswith("adapters/gene/") for path in single["trained"])
    assert not any(path.startswith("params/") for path in single["trained"])
    assert single["losses"][2] < single["losses"][0]
    for sizes, other in zip(meshes[1:], others, strict=True):
        np.testing.assert_allclose(other["losses"], single["losses"], rtol=1e-5, err_msg=str(sizes))
        assert other["error"] < 1e-5, f"gradient of {other['worst']} on {sizes} differs by {other['error']}"


@pytest.mark.slow
def test_every_masked_position_is_seen_or_counted_on_any_mesh(small):
    """Devices that share a bag have their own parts of the budget: where it is too small, losses may differ."""
    small["objective"]["max_masked_fraction"] = 0.05
    single, parts = ask(config=small, meshes=[{"data": 1}, {"sequence": 4}])
    assert single["dropped_targets"] > 0
    assert parts["dropped_targets"] >= single["dropped_targets"]
    assert parts["masked"] + parts["dropped_targets"] == single["masked"] + single["dropped_targets"]


@pytest.mark.slow
def test_a_run_goes_from_mesh_to_mesh(small, tmp_path):
    meshes = [{"fsdp": 8}, {"data": 2, "tensor": 2, "sequence": 2}, {"data": 1}]
    answer = ask(config=small, meshes=meshes, folder=str(tmp_path / "checkpoints"))
    np.testing.assert_allclose(answer["losses"], answer["expected"], rtol=1e-5)
    assert len(answer["losses"]) == 6
    assert answer["losses"][-1] < answer["losses"][0]


@pytest.mark.slow
def test_presets_and_sizes_on_eight_devices():
    wanted = {
        "data": [8, 1, 1, 1],
        "single": [1, 1, 1, 1],
        "fsdp": [1, 8, 1, 1],
        "pod": [1, 8, 1, 1],
        "sequence=4": [2, 1, 4, 1],
        "fsdp=-1, tensor=2": [1, 4, 1, 2],
        "data=2,devices=2": [2, 1, 1, 1],
    }
    assert ask(texts=list(wanted)) == list(wanted.values())


@pytest.mark.parametrize(("platform", "processes"), [("tpu", 4), ("gpu", 16)])
def test_pod_copies_the_model_to_hosts_and_divides_it_inside(platform, processes):
    """Four hosts of four devices each; on GPU every device has a process of its own."""

    def device(i: int) -> SimpleNamespace:
        wires = {"slice_index": i // 4} if platform == "gpu" else {}
        return SimpleNamespace(id=i, platform=platform, process_index=i * processes // 16, **wires)

    devices = [device(i) for i in np.random.default_rng(0).permutation(16).tolist()]
    made = sharding.arrange(MeshConfig.parse("pod"), devices)
    assert made.shape == (4, 4, 1, 1)
    assert [[device.id for device in host] for host in made[:, :, 0, 0]] == np.arange(16).reshape(
        4, 4
    ).tolist()
    free = sharding.arrange(MeshConfig.parse("data=2,sequence=2,tensor=4"), devices)
    assert {device.id // 4 for device in free[1, 0, 0]} == {2}, "the last axis stays on a host"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pods", "data, single, fsdp, pod"),
        ("data=2,data=4", "data=2,fsdp=4"),
        ("fsdp=two", "data=2,fsdp=4"),
        ("", "data=2,fsdp=4"),
    ],
)
def test_a_text_that_is_no_mesh_is_explained(text, message):
    with pytest.raises(ConfigError, match=message):
        MeshConfig.parse(text)


def test_a_configuration_takes_a_text_or_sizes():
    for value, mesh in (("pod", MeshConfig.parse("pod")), ({"fsdp": 4}, MeshConfig(fsdp=4))):
        assert registry.build(TrainConfig, {"mesh": value}, "train").mesh == mesh
    with pytest.raises(ConfigError, match="'all'"):
        registry.build(TrainConfig, {"mesh": "all"}, "train")
    with pytest.raises(ConfigError, match=r"train\.mesh"):
        registry.build(TrainConfig, {"mesh": 3}, "train")


def test_a_mesh_must_fit_the_devices():
    with pytest.raises(ConfigError, match=r"\b1 device"):
        sharding.make_mesh(MeshConfig(data=-1, fsdp=2), jax.devices()[:1])
    with pytest.raises(ConfigError, match=r"\b2\b.*\b1\b|\b1\b.*\b2\b"):
        sharding.make_mesh(MeshConfig(devices=2), jax.devices()[:1])


def test_one_device_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"several processes \(here 2\)"):
        sharding.make_mesh(MeshConfig.parse("single"), jax.devices()[:1])


def test_cells_must_divide_over_the_mesh():
    mesh = jax.sharding.AbstractMesh((1, 1, 8, 1), sharding.MESH_AXES)
    with (
        axes.on_mesh(mesh, sharding.RULES),
        pytest.raises(ConfigError, match=r"--config\.data\.cells_per_bag=16"),
    ):
        axes.on_each_device(lambda params, x: x, {}, jnp.zeros((1, 24, 2)), cells=12)


def test_a_batch_must_divide_over_the_mesh():
    mesh = jax.sharding.AbstractMesh((4, 2, 1, 1), sharding.MESH_AXES)
    with pytest.raises(ConfigError, match=r"--config\.train\.batch_size=16"):
        sharding.check_batch_size(12, mesh)
    sharding.check_batch_size(16, mesh)
